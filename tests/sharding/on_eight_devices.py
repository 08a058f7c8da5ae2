"""One tiny run of both stages with IRE, in a process with eight virtual devices.

``python -m tests.sharding.on_eight_devices CONFIG FOLDER`` prints one JSON object: the losses
of one device and of eight.
"""

import json
import os
import sys
from pathlib import Path

from tests.eight_devices import ENVIRONMENT

os.environ |= ENVIRONMENT

import jax

from jaxlab.config import MeshConfig, load_config
from jaxlab.sharding.mesh import make_mesh
from jaxlab.training import loop
from jaxlab.training.metrics import read_metrics

MESH = ["mesh.replica=2", "mesh.fsdp=2", "mesh.tensor=2"]


def losses(run: Path) -> list[float]:
    """Training and validation losses, in order."""
    lines = read_metrics(run)
    return [line[key] for line in lines for key in ("loss", "validation_loss") if key in line]


def one_device(config):
    """The mesh of a single device, whatever the configuration says."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def main(file: str, folder: Path) -> dict:
    """Losses on one device and on eight."""
    run_mesh, loop.run_mesh = loop.run_mesh, one_device
    loop.train(load_config(file), folder / "one", report=_nothing)
    loop.run_mesh = run_mesh
    run = folder / "eight"
    loop.train(load_config(file, MESH), run, report=_nothing)
    return {"one device": losses(folder / "one"), "eight devices": losses(run)}


def _nothing(_: str) -> None:
    pass


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
