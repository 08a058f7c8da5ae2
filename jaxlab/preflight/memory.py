"""Where the bytes of a chip go: what the program is given, and what it makes for itself."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxlab.preflight.hlo import Frame, Module
from jaxlab.preflight.liveness import Buffer, peak_of

KINDS = (
    "parameters",
    "optimizer",
    "batch",
    "cache",
    "padding of these",
    "gradients",
    "gathered weights",
    "activations",
    "memory slots",
    "other temporaries",
    "program",
)
_LARGE = 1 << 16  # elements of what may be taken for a weight
# What gathers slots into the windows that a kernel reads.
_WINDOWS = ("windows", "_take")


@dataclasses.dataclass(frozen=True)
class Temporary:
    """One of the largest temporaries at the moment at which they take most.

    source: file and line, of this project where the stack has any.
    """

    bytes: int
    shape: str
    kind: str
    source: str
    op: str


@dataclasses.dataclass(frozen=True)
class ChipMemory:
    """Bytes of one chip's main memory by kind, their sum and what there is.

    by: who says so: "compiler", "message" (its refusal) or "estimate" (from shapes).
    """

    kinds: dict[str, int]
    total: int
    available: int
    largest: tuple[Temporary, ...]
    by: str = "compiler"

    @property
    def fits(self) -> bool:
        """Whether all of it has room."""
        return self.total <= self.available


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's shards of a tree of shapes with shardings."""
    return sum(math.prod(shape) * size for shape, size in _shards(tree))


def _shards(tree: Any) -> Iterator[tuple[tuple[int, ...], int]]:
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue  # a few words
        sharding = getattr(leaf, "sharding", None)
        yield (
            sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape,
            leaf.dtype.itemsize,
        )


def read_memory(
    compiled: jax.stages.Compiled,
    module: Module,
    given: Mapping[str, Any],
    *,
    available: float,
    slot_axes: tuple[int, ...] = (),
) -> ChipMemory:
    """What the compiler says that a program takes, by kind.

    given: trees of shapes with shardings by kind, all the program's arguments. slot_axes: sizes
    that every array of memory slots has among its own (kept tokens, kv heads, head dim), as one
    chip holds them. Temporaries are told apart by where they were traced; what
    the walk through the schedule does not find of the compiler's sum is "other temporaries".
    """
    stats = compiled.memory_analysis()
    kinds = dict.fromkeys(KINDS, 0) | {kind: shard_bytes(tree) for kind, tree in given.items()}
    kinds["padding of these"] = max(stats.argument_size_in_bytes - sum(kinds.values()), 0)
    kinds["program"] = stats.generated_code_size_in_bytes
    peak = peak_of(module)
    # The compiler's own peak counts on-chip memory as well; of a tiny program that is most of it.
    beside = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    whole = stats.peak_memory_in_bytes - sum(kinds.values())
    whole = max(min(whole, stats.temp_size_in_bytes + beside), 0)
    weights = _weight_sizes(given.get("parameters", {}))
    found = [_temporary(module, buffer, weights, slot_axes) for buffer in peak.buffers]
    share = min(1.0, whole / max(peak.bytes, 1))
    for one in found:
        kinds[one.kind] += int(one.bytes * share)
    kinds["other temporaries"] += max(whole - int(peak.bytes * share), 0)
    largest = sorted(found, key=lambda one: -one.bytes)[:10]
    return ChipMemory(kinds, sum(kinds.values()), int(available), tuple(largest))


def _weight_sizes(parameters: Any) -> set[int]:
    """Numbers of elements of a parameter: a shard, the whole, one layer of either."""
    sizes = set()
    for leaf in jax.tree.leaves(parameters):
        for shape in (leaf.sharding.shard_shape(leaf.shape), leaf.shape):
            sizes |= {math.prod(shape), math.prod(shape[1:])}
    return sizes


def _temporary(
    module: Module, buffer: Buffer, weights: set[int], slot_axes: tuple[int, ...]
) -> Temporary:
    each, stack = buffer.instruction, module.stack(buffer.instruction)
    sizes = [int(n) for n in buffer.shape.split("[")[1].rstrip("]").split(",") if n]
    backward, forward = "transpose(" in each.op_name, "jvp(" in each.op_name
    kind = "other temporaries"
    if _is_slots(sizes, slot_axes) or any(f.function.split(".")[-1] in _WINDOWS for f in stack):
        kind = "memory slots"
    elif math.prod(sizes) in weights and math.prod(sizes) >= _LARGE:
        summed = backward or buffer.shape.startswith("f32")
        moved = each.op in ("all-gather", "convert")
        kind = "gathered weights" if moved or not summed else "gradients"
    elif forward and not backward:
        kind = "activations"
    return Temporary(buffer.bytes, buffer.shape, kind, place(stack), each.op_name or each.op)


def _is_slots(sizes: Sequence[int], axes: tuple[int, ...]) -> bool:
    return bool(axes) and not Counter(axes) - Counter(sizes)


def place(stack: Sequence[Frame]) -> str:
    """The innermost place in this project, or else the innermost one."""
    ours = (frame for frame in stack if re.search(r"(^|/)(jaxlab|kernels_pallas)/", frame.file))
    frame = next(ours, stack[0] if stack else None)
    if frame is None:
        return ""
    file = re.sub(r"^.*/(?=(?:jaxlab|kernels_pallas)/)|^.*/site-packages/", "", frame.file)
    return f"{file}:{frame.line}"
