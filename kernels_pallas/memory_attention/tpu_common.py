"""What both TPU kernels of memory attention share: sizes, products, masks and block specs."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.memory_attention.plan import Visits

# The logit of what may not be seen: finite, so that no NaN comes of differences.
NEVER = np.float32(-1e30)
NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Static sizes of one call: blocks of queries and keys, units of a window, triangle's side.

    ``queries`` and ``head_dim`` are those before padding.
    """

    block_q: int
    block_k: int
    unit: int
    triangle: int
    queries: int
    head_dim: int

    @property
    def scale(self) -> float:
        """What raw products are multiplied by to be logits to the base of two."""
        return self.head_dim**-0.5 * _LOG2E

    def index(self, start, block):
        """Context indices of a block's queries, (1, block_q); padding repeats the last query's."""
        lanes = jax.lax.broadcasted_iota(jnp.int32, (1, self.block_q), 1)
        return start + jnp.minimum(block * self.block_q + lanes, self.queries - 1)


def cost(tiling: Tiling, query, keys: int, window: int, *, products: int, arrays):
    """What a kernel with so many matrix products a score does at most, for XLA and for reports.

    query: (B, K, G, T, H); keys: of the context, the last ones the queries' own; window: entries
    that every query scores besides. The causal mask is counted, packed documents are not.
    """
    batch, kv_heads, heads, padded, _ = query.shape
    before = keys - padded if keys > padded else 0
    queries = tiling.queries
    scores = queries * (before + window) + queries * (queries + 1) // 2
    scores *= batch * kv_heads * heads
    return pl.CostEstimate(
        flops=2 * products * scores * tiling.head_dim,
        transcendentals=scores,
        bytes_accessed=sum(x.size * jnp.dtype(x.dtype).itemsize for x in arrays),
    )


def dot(x, y, dimensions):
    """A matrix product with float32 sums; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


class Place(NamedTuple):
    """Where a grid step stands: the numbers of plan.Visits for its block of queries, and these.

    low: context index of the block's first query; index: of each of its queries, (1, block_q).
    """

    first: Any
    whole_first: Any
    whole_end: Any
    end: Any
    diagonal: Any
    low: Any
    index: Any

    @classmethod
    def of(cls, table, start, tiling: Tiling) -> "Place":
        """Of this step of the grid (batch, kv heads, blocks of queries)."""
        batch, block = pl.program_id(0), pl.program_id(2)
        numbers = len(Visits._fields)
        at = (batch * pl.num_programs(2) + block) * numbers
        low = start[batch] + block * tiling.block_q
        index = tiling.index(start[batch], block)
        return cls(*(table[at + n] for n in range(numbers)), low, index)


def causal_square(keys: int, queries: int):
    """Which of some keys some queries see whose first ones stand at the same place."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (keys, queries), n) for n in (0, 1))
    return row <= column


def windows_of(tiling: Tiling, interval, index) -> Iterator[tuple[int, slice, Any]]:
    """The windows of a block: number, queries, and which entries (rows) they see."""
    for number in range(tiling.block_q // tiling.unit):
        columns = slice(number * tiling.unit, (number + 1) * tiling.unit)
        bounds = interval[number].T  # (W, 8): entries along sublanes
        yield (
            number,
            columns,
            (index[:, columns] >= bounds[:, :1]) & (index[:, columns] < bounds[:, 1:2]),
        )


def seen_keys(block, size: int, index, *, axis: int):
    """Which keys of a block lie before the last query, along ``axis``; others may hold anything."""
    shape = (size, 1) if axis == 0 else (1, size)
    return block * size + jax.lax.broadcasted_iota(jnp.int32, shape, axis) <= index[:, -1:]


def cut_mask(block, size: int, index, segments):
    """Which keys of a block the queries see, (keys, queries): causal, and of their document."""
    mask = block * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0) <= index
    if segments is not None:
        mine, theirs = segments
        own = theirs[:, pl.ds(pl.multiple_of(block * size, size), size)]
        mask &= jnp.broadcast_to(own, (8, size)).T[:, :1] == mine[...]
    return mask


def specs(tiling: Tiling, heads: int, keys: int, width: int, window: int, has_segments: bool):
    """Block specs of the arguments that both directions read, in their order."""
    units = tiling.block_q // tiling.unit
    found = [
        pl.BlockSpec(
            (None, None, heads, tiling.block_q, width), lambda b, k, i, *_: (b, k, 0, i, 0)
        ),
        pl.BlockSpec((None, None, keys, width), lambda b, k, i, *_: (b, k, 0, 0)),
        pl.BlockSpec((None, None, width, keys), lambda b, k, i, *_: (b, k, 0, 0)),
    ]
    if window:
        found += [
            pl.BlockSpec((None, None, units, window, width), lambda b, k, i, *_: (b, k, i, 0, 0)),
            pl.BlockSpec((None, None, units, width, window), lambda b, k, i, *_: (b, k, i, 0, 0)),
            pl.BlockSpec((None, units, 8, window), lambda b, k, i, *_: (b, i, 0, 0)),
        ]
    if has_segments:
        found += [
            pl.BlockSpec((None, 1, tiling.block_q), lambda b, k, i, *_: (b, 0, i)),
            pl.BlockSpec((None, 1, keys), lambda b, k, i, *_: (b, 0, 0)),
        ]
    return found
