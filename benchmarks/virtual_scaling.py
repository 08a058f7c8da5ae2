"""Strong and weak scaling over virtual CPU devices as a table of losses: correctness, not speed.

    python -m benchmarks.virtual_scaling --out runs/scaling --json FILE

Strong: one batch size on 1, 2, 4 and 8 devices. Weak: a batch that grows with them. Both stages,
with IRE; every cell has to give the losses of one device with the same batch. All devices are
threads of one CPU: no time is taken, and none would say anything.
"""

import argparse
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.kill_workers import write_config
from jaxlab.tools.output import machine, write_json
from jaxlab.training.metrics import read_metrics

MESHES = {
    1: {"fsdp": 1},
    2: {"fsdp": 2},
    4: {"fsdp": 2, "tensor": 2},
    8: {"data": 2, "fsdp": 2, "tensor": 2},
}


def train(config: Path, folder: Path, devices: int, rows: int) -> np.ndarray:
    """Training losses of both stages and the validation losses at their ends."""
    run = folder / f"{devices}-devices-{rows}-rows"
    mesh = ", ".join(f"{axis}: {size}" for axis, size in MESHES[devices].items())
    changes = [f"mesh={{{mesh}}}", "training.save_every=0"]
    for stage in ("warmup", "continual"):
        changes += [f"stages.{stage}.batch_size={rows}", f"stages.{stage}.steps=4"]
    launcher = ["-m", "launch.pod", "local", "--processes", "1", "--devices", str(devices)]
    words = ["-m", "jaxlab.cli", "train", str(config), "--out", str(run), "--set", *changes]
    command = [sys.executable, *launcher, "--restarts", "0", "--", sys.executable, *words]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    subprocess.run(command, check=True, env=os.environ | cache, stdout=sys.stderr)
    lines = read_metrics(run)
    return np.array(
        [line[key] for line in lines for key in ("loss", "validation_loss") if key in line]
    )


def main() -> None:
    """Train every cell, compare with one device, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    losses = functools.cache(functools.partial(train, write_config(args.out), args.out))
    rows = []
    for kind, size_of in (("strong", lambda _: 16), ("weak", lambda devices: 2 * devices)):
        for devices in MESHES:
            size = size_of(devices)
            found, alone = losses(devices, size), losses(1, size)
            apart = float(np.abs(found / alone - 1).max())
            rows.append(
                {
                    "scaling": kind,
                    "virtual_devices": devices,
                    "mesh": MESHES[devices],
                    "rows": size,
                    "losses": found.tolist(),
                    "largest_relative_difference_to_one_device": apart,
                }
            )
            print(f"{kind:7} {devices} virtual devices, {size:2} rows: {apart:.1e} from one device")
    if args.json:
        note = "virtual devices of one CPU: equal losses are shown, speed is not"
        write_json(args.json, {"machine": machine(("jax", "jaxlib")), "note": note, "rows": rows})


if __name__ == "__main__":
    main()
