"""The real TPU compiler on a machine without a TPU: compile, and read the machine code.

Needs libtpu (``pip install 'jax[tpu]'``) and, before jax is first imported,
``without_tpu.ENVIRONMENT`` in the process's environment. A bundle issues in one cycle if nothing
stalls, so what is read here bounds the time from below: call it a static figure wherever it is
quoted.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.without_tpu import ENVIRONMENT

TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}


def mesh_of(chip: str, devices: int = 1) -> Mesh:
    """A mesh with the axis ``tensor`` over some chips of a kind; none of them need exist.

    Raises:
      ValueError: an unknown kind of chip.
      RuntimeError: libtpu is not installed.
    """
    if chip not in TOPOLOGIES:
        raise ValueError(f"unknown chip {chip!r}: there are {sorted(TOPOLOGIES)}")
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    except Exception as error:
        raise RuntimeError("no TPU compiler here: pip install 'jax[tpu]' brings it") from error
    return Mesh(np.array(topology.devices[:devices]), ("tensor",))


def compile_for(
    chip: str, function: Callable, *shapes: Any, devices: int = 1
) -> jax.stages.Compiled:
    """``function`` of trees of ``jax.ShapeDtypeStruct``, compiled for some chips of a kind.

    Shapes with a sharding keep it; the others are whole on every chip. Call it within
    ``dispatch.lowering_for("tpu", chip)`` on a function that was not traced before: elsewhere this
    machine's implementations are compiled, and no kernel.
    """
    mesh = mesh_of(chip, devices)

    def placed(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if shape.sharding is not None:
            return shape
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.jit(function).lower(*jax.tree.map(placed, shapes)).compile()


@dataclasses.dataclass(frozen=True)
class Region:
    """Consecutive bundles between two branch targets, with what they use.

    mxu: share of the matrix-unit slots in use; spills and fills in vector registers.
    """

    first: int
    bundles: int
    mxu: float
    spills: int
    fills: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The machine code of one kernel, by region; ``hot`` regions are those with matrix work.

    vmem_bytes: of its blocks, doubly buffered, and its scratch.
    """

    name: str
    bundles: int
    vmem_bytes: int
    regions: tuple[Region, ...]

    @property
    def hot(self) -> tuple[Region, ...]:
        """Regions that use the matrix unit, in program order."""
        return tuple(region for region in self.regions if region.mxu > 0)


_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|\d+)\s+(LH|LB|LE|PB|PF|CT)?\s*:")
_VMEM = re.compile(r"space=vmem, size = 0x([0-9a-f]+), scoped")
_COUNTS = re.compile(r"\d+(\s+\d+)+\s*$")
_UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")


def read_kernels(dump: Path, name: str = "") -> list[Kernel]:
    """Every kernel whose name contains ``name`` in a directory that the compiler dumped into."""
    found = []
    for program in sorted(dump.glob("*-final_bundles.txt")):
        parts = re.fullmatch(r"\d+-(.*)-\d+-final_bundles\.txt", program.name)
        if not parts or name not in parts[1]:
            continue
        usage = sorted(dump.glob(f"*-{parts[1]}-*-final_hlo-static-per-bundle-utilization.txt"))
        original = sorted(dump.glob(f"*-{parts[1]}-*-original.txt"))
        if usage and original:
            texts = (path.read_text() for path in (program, usage[-1], original[0]))
            found.append(_read_kernel(parts[1], *texts))
    return found


def _read_kernel(name: str, program: str, usage: str, original: str) -> Kernel:
    lines = [line for line in usage.splitlines() if _COUNTS.match(line.strip())]
    capacity, *rows = (tuple(map(int, line.split())) for line in lines)
    # Branch targets split the program; a bundle's line begins with its address.
    starts = {0, len(rows)}
    for line in program.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle and bundle[2]:
            starts.add(int(bundle[1], 0))
    borders, regions = sorted(starts), []
    for first, end in zip(borders, borders[1:], strict=False):
        sums = dict(zip(_UNITS, map(sum, zip(*rows[first:end], strict=True)), strict=True))
        mxu = sums["MXU"] / ((end - first) * capacity[0])
        regions.append(Region(first, end - first, mxu, sums["SPILL"], sums["FILL"]))
    vmem = sum(int(size, 16) for size in _VMEM.findall(original))
    return Kernel(name, len(rows), vmem, tuple(regions))


def dump_in_child(arguments: list[str], *, timeout: int = 900) -> tuple[str, Path]:
    """Run ``python ARGUMENTS`` with the compiler writing its machine code; stdout and the folder.

    A process of its own, because the compiler reads where to dump once, when jax is imported. The
    folder is the caller's to remove.

    Raises:
      RuntimeError: the child failed; the message ends with its last lines.
    """
    dump = Path(tempfile.mkdtemp(prefix="llo-"))
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
    environment = {**os.environ, **ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}
    ended = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if ended.returncode:
        shutil.rmtree(dump)
        raise RuntimeError(f"{arguments} failed: " + "\n".join(ended.stderr.splitlines()[-8:]))
    return ended.stdout, dump


def last_json(text: str) -> dict:
    """The JSON object on the last line of a child's output."""
    return json.loads(text.strip().splitlines()[-1])
