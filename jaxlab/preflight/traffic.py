"""Bytes that a compiled program moves through main memory, and the products it computes, a chip.

Every instruction reads its operands and writes its result once; what is fused stays on chip, and so
do arrays that the compiler has placed there. A loop's stacked array counts by the slice that is
read or written, not as a whole.
"""

import math
import re

import numpy as np

from jaxlab.preflight.hlo import Computation, Instruction, Module, runs

# They move nothing themselves: names for what is there, control flow, and ends of what was started.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "opt-barrier", "optimization-barrier", "partition-id", "replica-id",
    "add-dependency", "domain", "iota",
}  # fmt: skip
_SLICING = ("dynamic-slice", "slice", "gather")
_PASSING = ("bitcast", "reshape", "copy", "transpose", "convert", "get-tuple-element")


def memory_traffic(module: Module, *, rare: float = 1.0) -> float:
    """Bytes of main memory read and written in one execution of the program on one chip."""
    return math.fsum(
        run.times * _moved(module, run.computation, each)
        for run in runs(module, rare=rare)
        for each in run.computation.instructions
        if each.op not in _FREE
    )


def _stored(shapes) -> int:
    return sum(shape.stored_bytes for shape in shapes if shape.space == 0)


def _moved(module: Module, place: Computation, each: Instruction) -> float:
    if each.op.endswith(("-done", "-update")) or "AllocateBuffer" in each.text:
        return 0.0
    operands = [place.by_name[name] for name in each.operands if name in place.by_name]
    if each.op in ("copy-start", "slice-start"):
        # The result comes first in a copy's tuple and second in a slice's.
        result = each.shapes[0 if each.op == "copy-start" else -2]
        ends = (result.space == 0) + (operands[0].shapes[0].space == 0)
        return float(ends * result.stored_bytes)
    if each.op == "fusion":
        return _moved_by_fusion(module.computations[each.called[0]], each, operands)
    if each.op == "dynamic-update-slice":
        return 2.0 * _stored(operands[1].shapes)
    if each.op in _SLICING:
        return 2.0 * _stored(each.shapes)
    if each.op == "scatter":
        return 3.0 * _stored(operands[-1].shapes)
    if each.op.endswith("-start"):
        return 2.0 * sum(_stored(operand.shapes) for operand in operands)
    return float(_stored(each.shapes) + sum(_stored(operand.shapes) for operand in operands))


def _moved_by_fusion(inner: Computation, each: Instruction, operands) -> float:
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.instructions:
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    total = 0.0
    parameters = {
        int(p.attribute(r"parameter\((\d+)\)") or 0): p
        for p in inner.instructions
        if p.op == "parameter"
    }
    for number, operand in enumerate(operands):
        whole = _stored(operand.shapes)
        if whole and number in parameters:
            total += min(whole, _read_of(parameters[number].name, whole, users))
    root = inner.root
    leaves = [inner.by_name[n] for n in root.operands] if root.op == "tuple" else [root]
    for shape, leaf in zip(each.shapes, leaves, strict=False):
        if shape.space == 0:
            total += _written_by(inner, leaf, shape.stored_bytes)
    return total


def _read_of(name: str, whole: int, users: dict[str, list[Instruction]]) -> float:
    """Bytes read of a fused operand: its slices where only slices are used."""
    total = 0.0
    for user in users.get(name, []):
        if user.op in _SLICING and user.operands[0] == name:
            total += sum(shape.stored_bytes for shape in user.shapes)
        elif user.op == "dynamic-update-slice" and user.operands[0] == name:
            continue  # written in place; only the slice is touched
        elif user.op in _PASSING:
            total += _read_of(user.name, whole, users)
        else:
            return float(whole)
    return total


def _written_by(inner: Computation, leaf: Instruction, whole: int) -> float:
    """Bytes written of a fused result: the slice where it is an update in place."""
    while leaf.op in ("bitcast", "reshape", "copy") and leaf.operands[0] in inner.by_name:
        leaf = inner.by_name[leaf.operands[0]]
    if leaf.op != "dynamic-update-slice":
        return float(whole)
    written = sum(shape.stored_bytes for shape in inner.by_name[leaf.operands[1]].shapes)
    return float(min(whole, written))


def compiled_flops(module: Module, *, rare: float = 1.0) -> float:
    """Floating-point operations of all matrix products and convolutions, on one chip.

    Kernels count what their authors state: see ``pallas_call``'s ``cost_estimate``.
    """
    return math.fsum(run.times * _flops(module, run.computation) for run in runs(module, rare=rare))


def _flops(module: Module, place: Computation) -> float:
    total = 0.0
    for each in place.instructions:
        if each.op == "dot":
            total += _dot(place, each)
        elif each.op == "convolution":
            total += _convolution(place, each)
        elif each.op == "custom-call":
            stated = each.attribute(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')
            total += int(stated) if stated else 0
        elif each.op == "fusion":
            total += sum(_flops(module, module.computations[name]) for name in each.called)
    return total


def _dot(place: Computation, each: Instruction) -> float:
    left = place.by_name[each.operands[0]].shapes[0]
    summed = _numbers(each.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
    return 2.0 * math.prod(each.shapes[0].sizes) * math.prod(left.sizes[i] for i in summed)


def _convolution(place: Computation, each: Instruction) -> float:
    """A product for every output, input feature and place of the window that is not padding.

    TPU programs write matrix products as convolutions, with batch or summed axes as windows.
    """
    left, right = (place.by_name[name].shapes[0].sizes for name in each.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.text)
    given, kernel, result = (dict(zip(part, range(9), strict=False)) for part in labels.groups())
    window = each.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(part.split("=", 1) for part in window.split())
    groups = int(each.attribute(r"batch_group_count=(\d+)") or 1)
    total = 2.0 * left[given["b"]] / groups * right[kernel["i"]] * right[kernel["o"]]
    for axis in range(len(given) - 2):
        name = str(axis)

        def of(key: str, default: str, axis: int = axis) -> str:
            return fields[key].split("x")[axis] if key in fields else default

        total *= _window_places(
            left[given[name]],
            right[kernel[name]],
            each.shapes[0].sizes[result[name]],
            before=int(of("pad", "0_0").split("_")[0]),
            stride=int(of("stride", "1")),
            apart=int(of("lhs_dilate", "1")),
            spread=int(of("rhs_dilate", "1")),
        )
    return total


def _window_places(
    given: int, window: int, out: int, *, before: int, stride: int, apart: int, spread: int
) -> int:
    """Pairs of an output and a place of its window that meet an element of the input."""
    outputs = np.arange(out) * stride - before
    met = 0
    for start in range(0, window, 512):
        at = outputs[:, None] + np.arange(start, min(start + 512, window)) * spread
        met += int(((at >= 0) & (at <= (given - 1) * apart) & (at % apart == 0)).sum())
    return met


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in (text or "").split(",") if number)
