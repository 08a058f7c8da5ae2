"""The device mesh of a run: four named axes, always all of them, whatever their sizes.

=========  ====================================================================
replica    whole copies of everything, one for each slice: only gradients cross
data       copies of the weights within a slice, each with its own rows
fsdp       rows as well; weights and optimizer state are cut along it, too
tensor     heads, feed-forward width and vocabulary are cut along it
=========  ====================================================================
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxlab.config import MeshConfig, ModelConfig
from jaxlab.errors import ConfigError
from jaxlab.sharding.rules import RULES, parts_of

AXES = tuple(axis.name for axis in dataclasses.fields(MeshConfig))


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """Sizes of the axes over so many devices; the one that is -1 takes what the others leave.

    Raises ConfigError when they do not multiply to the number of devices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % given == 0:
        sizes[sizes.index(-1)] = devices // given
    if math.prod(sizes) != devices:
        asked = ", ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
        if -1 in sizes:
            cure = f"those but the -1 must multiply to a divisor of {devices}, and are {given}"
        else:
            cure = f"the four must multiply to {devices}; set one to -1 to take what is left"
        raise ConfigError(f"mesh: {asked} does not divide {devices} devices: {cure}")
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices, or over some that need not exist here (a compiled topology).

    Devices of a TPU lie in it as their wires do; those of several slices along ``replica``.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(devices))
    if devices[0].platform != "tpu" or len(devices) == 1:
        placed = np.array(devices).reshape(sizes)
    elif (slices := len({getattr(device, "slice_index", 0) or 0 for device in devices})) > 1:
        if sizes[0] % slices:
            raise ConfigError(
                f"mesh.replica: is {sizes[0]}, and the devices are in {slices} slices: only "
                "replicas may be apart; set it to a multiple of that number"
            )
        within = (sizes[0] // slices, *sizes[1:])
        placed = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices)
    else:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 4)


def check_model_fits(mesh: Mesh | AbstractMesh, model: ModelConfig) -> None:
    """Raises ConfigError naming the first size of the model that an axis of the mesh cuts unevenly.

    A vocabulary of 0 is not known yet and passes.
    """
    for name, key, size in (
        ("heads", "heads", model.heads),
        ("kv_heads", "kv_heads", model.kv_heads),
        ("ffn", "ffn_width", model.ffn_width),
        ("vocab", "vocab_size", model.vocab_size),
        ("embed", "width", model.model_width),
    ):
        parts = parts_of(mesh, name)
        if size % parts:
            fitting = [n for n in range(1, parts) if size % n == 0 == mesh.size % n]
            cure = ""
            if RULES[name] == "fsdp" and parts % (most := fitting[-1]) == 0:
                data = mesh.shape["data"] * parts // most
                cure = f"; such as mesh.data={data} mesh.fsdp={most}"
            raise ConfigError(
                f"mesh.{RULES[name]}: {parts} does not divide model.{key} ({size}); of what "
                f"divides {mesh.size} devices these do: {', '.join(map(str, fitting))}{cure}"
            )


def check_batch_fits(mesh: Mesh | AbstractMesh, key: str, rows: int) -> None:
    """Raises ConfigError when the rows of a micro-batch do not spread evenly over the mesh."""
    parts = parts_of(mesh, "batch")
    if rows % parts:
        raise ConfigError(
            f"{key}: a micro-batch of {rows} rows does not spread over {parts} groups of devices "
            "(mesh.replica x mesh.data x mesh.fsdp); make it a multiple or use a larger mesh.tensor"
        )
