"""Which collectives a compiled program runs, over which axes of the mesh, and how many bytes."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxlab.preflight.hlo import Computation, Instruction, Module, runs

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_EXPLICIT = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind, over one group of axes, in one execution of the program.

    axes: of the mesh; "some of" them where a group is not all of their product. count: how often
    one is started. size: devices in a group. bytes: of the whole array that is gathered, reduced or
    exchanged within a group. sent: bytes that a chip sends at least, whatever the algorithm.
    groups: device numbers of each group.
    """

    kind: str
    axes: str
    size: int
    count: float
    bytes: float
    sent: float
    groups: tuple[tuple[int, ...], ...] = dataclasses.field(repr=False)


def collectives(
    module: Module, mesh_shape: Mapping[str, int], *, rare: float = 1.0
) -> list[Collective]:
    """All collectives by kind and axes, the one that sends most first.

    Asynchronous ones count where they start. ``rare`` as for :func:`hlo.runs`.
    """
    found: dict[tuple, Collective] = {}
    for run in runs(module, rare=rare):
        for place, each in _in_one_run(module, run.computation):
            one = _read(module, place, each, mesh_shape)
            if one is None:
                continue
            key = (one.kind, one.axes, one.size)
            before = found.get(key)
            found[key] = dataclasses.replace(
                one,
                count=run.times + (before.count if before else 0),
                bytes=run.times * one.bytes + (before.bytes if before else 0),
                sent=run.times * one.sent + (before.sent if before else 0),
            )
    return sorted(found.values(), key=lambda one: -one.sent)


def _in_one_run(
    module: Module, computation: Computation
) -> Iterator[tuple[Computation, Instruction]]:
    """The collectives of a computation, those within its fusions included, each once.

    A TPU's asynchronous collective is written out again in every fusion that runs beside it, with
    the same channel.
    """
    channels = set()
    for each in computation.instructions:
        if each.op in ("while", "conditional", "call"):
            continue
        parts = [(computation, each)]
        if each.op == "fusion" or each.op == "async-start":
            parts = [(inner, x) for inner in _within(module, each) for x in inner.instructions]
        for place, part in parts:
            if _kind(place, part) is None:
                continue
            channel = part.attribute(r"channel_id=(\d+)")
            if channel is None or channel not in channels:
                yield place, part
            channels.add(channel)


def _within(module: Module, instruction: Instruction) -> Iterator[Computation]:
    for name in instruction.called:
        inner = module.computations[name]
        yield inner
        for each in inner.instructions:
            if each.op in ("fusion", "call"):
                yield from _within(module, each)


def _kind(place: Computation, each: Instruction) -> str | None:
    kind = each.op.removesuffix("-start")
    if kind not in KINDS:
        return None
    # On TPU: an all-reduce that is fused with cutting its result.
    fused = kind == "all-reduce" and "all-reduce-scatter" in place.name
    return "reduce-scatter" if fused else kind


def _read(
    module: Module, place: Computation, each: Instruction, mesh_shape: Mapping[str, int]
) -> Collective | None:
    kind = _kind(place, each)
    devices = math.prod(mesh_shape.values())
    groups = _groups(each, devices)
    size = max(map(len, groups))
    if size < 2:
        return None
    operands = [place.by_name[name] for name in each.operands if name in place.by_name]
    given = sum(shape.bytes for operand in operands for shape in operand.shapes)
    whole = given * size if kind == "all-gather" else given
    share = {"all-reduce": 2 * (size - 1) / size, "collective-permute": 1.0}
    sent = whole * share.get(kind, (size - 1) / size)
    axes, whole_axes = _axes(groups, mesh_shape)
    if not whole_axes and kind != "collective-permute":
        axes = f"some of {axes}"
    return Collective(kind, axes, size, 1.0, float(whole), float(sent), groups)


def _groups(each: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    if found := _PAIRS.search(each.text):
        pairs = re.findall(r"(\d+),(\d+)", found[1])
        return tuple((int(a), int(b)) for a, b in pairs if a != b) or ((0,),)
    if found := _EXPLICIT.search(each.text):
        groups = re.findall(r"\{([\d,]+)\}", found[1])
        return tuple(tuple(map(int, group.split(","))) for group in groups)
    if found := _IOTA.search(each.text):
        shape, sizes, order = (_numbers(part) for part in found.groups())
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        numbers = numbers.transpose(order) if order else numbers
        return tuple(map(tuple, numbers.reshape(shape).tolist()))
    return (tuple(range(devices)),)


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def _axes(groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, bool]:
    """Names of the axes along which members of a group differ, and whether a group is all there."""
    names, sizes = tuple(mesh_shape), tuple(mesh_shape.values())
    varies = np.zeros(len(names), bool)
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), sizes))
        varies |= (places != places[:, :1]).any(axis=1)
    across = [i for i in range(len(names)) if varies[i]]
    whole = max(map(len, groups)) == math.prod(sizes[i] for i in across)
    return "+".join(names[i] for i in across), whole
