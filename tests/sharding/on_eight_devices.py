"""One tiny run of both stages with IRE, in a process with eight virtual devices.

``python -m tests.sharding.on_eight_devices CONFIG FOLDER`` prints one JSON object: the losses
of one device, of eight, and of a run that changed its mesh half way.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Eight devices that wait for each other need as many threads, and one program at a time.
os.environ |= {"NPROC": "32", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}

import jax

from jaxlab.config import MeshConfig, load_config
from jaxlab.sharding.mesh import make_mesh
from jaxlab.training import loop
from jaxlab.training.metrics import read_metrics

BEFORE = ["mesh.replica=2", "mesh.fsdp=2", "mesh.tensor=2"]
AFTER = ["mesh.fsdp=8"]


def losses(run: Path) -> list[float]:
    """Training and validation losses, in order."""
    lines = read_metrics(run)
    return [line[key] for line in lines for key in ("loss", "validation_loss") if key in line]


def one_device(config):
    """The mesh of a single device, whatever the configuration says."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def main(file: str, folder: Path) -> dict:
    """Losses on one device, on eight, and when the mesh of the eight changes after step 3."""
    run_mesh, loop.run_mesh = loop.run_mesh, one_device
    loop.train(load_config(file), folder / "one", report=_nothing)
    loop.run_mesh = run_mesh
    run = folder / "eight"
    loop.train(load_config(file, BEFORE), run, report=_nothing)
    found = {"one device": losses(folder / "one"), "eight devices": losses(run)}
    for path in (run / "checkpoints").glob("*"):
        if int(path.name[:9]) > 3:
            path.rename(folder / path.name)
    loop.train(load_config(file, AFTER), run, report=_nothing)
    return found | {"another mesh": losses(run)}


def _nothing(_: str) -> None:
    pass


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
