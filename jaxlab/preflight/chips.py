"""Kinds of TPU and their figures as data; topologies, and how a group of chips is wired.

The figures are the makers' (https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e: system
architecture), with the bandwidth of one link in one direction as "How to Scale Your Model"
(https://jax-ml.github.io/scaling-book/hardware, table of TPU specifications) states it. GiB of HBM
are what libtpu lets a program have, as its own message says when one does not fit.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from jaxlab.errors import ConfigError, JaxlabError


class CompilerMissing(JaxlabError):
    """libtpu is not installed."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    hbm_bytes: of main memory; hbm_bandwidth: bytes a second. flops: of bfloat16 products a second.
    link: bytes a second of one link in one direction. torus: axes of the wiring. wraps_at: an axis
    closes to a ring when it is a multiple of this. dcn: bytes a second of one host's network, in
    one direction; hosts have four chips.
    """

    hbm_bytes: float
    hbm_bandwidth: float
    flops: float
    link: float
    torus: int
    wraps_at: int
    dcn: float


GIB = 2.0**30
CHIPS: dict[str, Chip] = {
    "v5e": Chip(15.75 * GIB, 819e9, 197e12, 45e9, 2, 16, 12.5e9),
    "v5p": Chip(95.74 * GIB, 2765e9, 459e12, 90e9, 3, 4, 25e9),
    "v6e": Chip(31.25 * GIB, 1640e9, 918e12, 90e9, 2, 16, 50e9),
}
CHIPS_PER_HOST = 4

# Names of shapes that Google rents; others that are multiples of a host's 2x2 chips work as well.
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": (
        "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
    ),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}  # fmt: skip
# How many a name such as v5p-128 counts for a chip: its two TensorCores, where it has two.
_COUNTED = {"v5litepod": ("v5e", 1), "v5e": ("v5e", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips of a kind, or several of them."""

    kind: str
    sides: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """The figures of its kind."""
        return CHIPS[self.kind]

    @property
    def name(self) -> str:
        """As libtpu spells a slice: v5p:4x4x4."""
        return f"{self.kind}:{'x'.join(map(str, self.sides))}"

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(self.sides) * self.slices

    def __str__(self) -> str:
        several = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{several}{self.name} ({self.chips} chips)"


def topology(text: str, slices: int = 1) -> Topology:
    """Read ``v5p:4x4x4`` or an accelerator's name, ``v5p-128``. Raises ConfigError listing both."""
    if found := re.fullmatch(r"(\w+)-(\d+)", text):
        kind, cores = _COUNTED.get(found[1], ("", 1))
        count = int(found[2]) // cores
        shapes = [s for s in TOPOLOGIES.get(kind, ()) if math.prod(_sides(s)) == count]
        if shapes and int(found[2]) % cores == 0:
            return Topology(kind, _sides(shapes[0]), slices)
    elif found := re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text):
        kind, sides = found[1], _sides(found[2])
        if kind in CHIPS and len(sides) == CHIPS[kind].torus and not (sides[0] % 2 or sides[1] % 2):
            return Topology(kind, sides, slices)
    raise ConfigError(
        f"--topology {text}: unknown; known are "
        + "; ".join(f"{kind}:{', '.join(shapes)}" for kind, shapes in TOPOLOGIES.items())
        + "; and names such as v5e-256, v5p-128 (64 chips), v6e-64"
    )


def _sides(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def devices(where: Topology) -> Sequence[Any]:
    """The devices of a topology, none of which need exist.

    Raises CompilerMissing without libtpu, and ConfigError for a shape that libtpu refuses.
    """
    import importlib.util

    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise CompilerMissing(
            "preflight needs the TPU compiler, which is not installed (it needs no TPU): "
            "pip install 'jax[tpu]'"
        )
    several = {"num_slices": where.slices} if where.slices > 1 else {}
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=where.name, **several
        ).devices
    except Exception as error:
        text = str(error).splitlines()[0]
        raise ConfigError(f"--topology {where.name}: the TPU compiler refuses it: {text}") from None


@dataclasses.dataclass(frozen=True)
class Wires:
    """What joins a group of devices: bytes a second that each can send to the others, and how."""

    bandwidth: float
    network: str  # ici or dcn


def wires(where: Topology, group: Sequence[Any]) -> Wires:
    """The wiring of a group of a topology's devices.

    Along each axis of the torus on which the group has several chips, a closed ring sends both ways
    and an open line one way; chips that are some steps apart share the links with those between.
    Across slices everything goes over the hosts' network.
    """
    if len({getattr(device, "slice_index", 0) or 0 for device in group}) > 1:
        return Wires(where.chip.dcn / CHIPS_PER_HOST, "dcn")
    # Three-dimensional slices are cabled in cubes: one that is thinner on any side is a mesh.
    closes = where.chip.torus < 3 or all(side % where.chip.wraps_at == 0 for side in where.sides)
    total = 0.0
    for axis, side in enumerate(where.sides):
        places = sorted({device.coords[axis] for device in group})
        if len(places) == 1:
            continue
        apart = min(b - a for a, b in zip(places, places[1:], strict=False))
        whole = len(places) * apart == side
        ring = whole and closes and side % where.chip.wraps_at == 0 and len(places) > 2
        total += where.chip.link * (2 if ring else 1) / apart
    return Wires(total or where.chip.link, "ici")
