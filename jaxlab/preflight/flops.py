"""Floating-point operations of a traced program, counted from its jaxpr: nothing is compiled.

Matrix products and convolutions count two for a multiply-add; a scan's body counts for every step,
what is recomputed under ``remat`` counts again, and a kernel counts what its ``cost_estimate``
states. Work on single elements (norms, activations, the optimizer) is left out.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of all devices together, in one execution.

    kernels: the part of Pallas kernels. most: with the dearest branch of every conditional, where
    ``total`` weighs the branches. unknown: names of kernels that state no cost and count zero.
    """

    total: float
    kernels: float
    most: float
    unknown: tuple[str, ...] = ()


def count(traced: Any, *, rare: float = 1.0) -> Flops:
    """FLOPs of ``jax.jit(f).trace(...)``, or of a closed jaxpr.

    The dearest branch of a conditional runs ``rare`` of the times, the next one the others.
    """
    closed = traced if isinstance(traced, ClosedJaxpr) else traced.jaxpr
    unknown: dict[str, None] = {}
    total, kernels = _walk(closed.jaxpr, rare, unknown)
    most, _ = _walk(closed.jaxpr, 1.0, unknown)
    return Flops(total, kernels, most, tuple(unknown))


def _walk(jaxpr: Jaxpr, rare: float, unknown: dict[str, None]) -> tuple[float, float]:
    total = kernels = 0.0
    for each in jaxpr.eqns:
        found = _of_equation(each, rare, unknown)
        total, kernels = total + found[0], kernels + found[1]
    return total, kernels


def _of_equation(each: Any, rare: float, unknown: dict[str, None]) -> tuple[float, float]:
    name, params = each.primitive.name, each.params
    if name == "dot_general":
        return _dot(each), 0.0
    if name == "conv_general_dilated":
        return _convolution(each), 0.0
    if name == "pallas_call":
        stated = params.get("cost_estimate")
        if stated is None:
            unknown[str(params.get("name") or "pallas_call")] = None
            return 0.0, 0.0
        return float(stated.flops), float(stated.flops)
    if name == "cond":
        branches = sorted((_walk(b.jaxpr, rare, unknown) for b in params["branches"]), reverse=True)
        shares = (rare, 1 - rare)
        return tuple(
            sum(share * branch[i] for share, branch in zip(shares, branches, strict=False))
            for i in range(2)
        )
    times = 1.0
    if name == "scan":
        times = float(params["length"])
    elif name == "shard_map":
        mesh = params["mesh"]
        manual = params.get("manual_axes", mesh.axis_names)
        times = float(math.prod(mesh.shape[axis] for axis in manual))
    inside = [_walk(inner, rare, unknown) for inner in _inner(params)]
    return times * sum(part[0] for part in inside), times * sum(part[1] for part in inside)


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs that an equation runs, which are all that it carries (a while's once)."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part


def _dot(each: Any) -> float:
    (summed, _), _ = each.params["dimension_numbers"]
    left = each.invars[0].aval.shape
    out = each.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in summed)


def _convolution(each: Any) -> float:
    numbers = each.params["dimension_numbers"]
    right = each.invars[1].aval.shape
    features = right[numbers.rhs_spec[1]]
    window = math.prod(right[axis] for axis in numbers.rhs_spec[2:])
    out = math.prod(each.outvars[0].aval.shape)
    return 2.0 * out * features * window / each.params["batch_group_count"]


def traced(function: Any, *arguments: Any) -> Any:
    """``function`` traced on shapes; it may be jitted already."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return jitted.trace(*arguments)
