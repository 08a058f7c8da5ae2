"""The forward kernel for TPU: flash attention over slots and context with one running softmax.

Everything is transposed: keys lie along sublanes and queries along lanes, so that the statistics of
a query are sums and maxima over rows (no cross-lane unit), and its accumulator is (H, queries). The
scores of a block are made while the softmax of the block before is taken, so that the matrix unit
and the vector unit work at once. See README.md of this folder.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.memory_attention.tpu_common import (
    NEVER,
    NN,
    NT,
    Place,
    Tiling,
    causal_square,
    cost,
    cut_mask,
    dot,
    seen_keys,
    specs,
    windows_of,
)

_LEAST = np.float32(1e-30)
_WINDOW = ("window_keys", "window_values", "interval")


def _partial_max(scores):
    """Maxima over groups of rows, (8, queries): the last step is left to when it is needed."""
    return jnp.max(scores.reshape(-1, 8, scores.shape[1]), axis=0)


class _Head:
    """One head of one block of queries while its keys go by; the methods emit straight code."""

    def __init__(self, tiling: Tiling, query, maximum, total, sums, scratch):
        self.tiling, self.query = tiling, query
        self.maximum, self.total, self.sums, self.scratch = maximum, total, sums, scratch

    def start(self) -> None:
        """Nothing seen yet."""
        self.maximum[...] = jnp.full_like(self.maximum, NEVER)
        self.total[...] = jnp.zeros_like(self.total)
        self.sums[...] = jnp.zeros_like(self.sums)

    def score(self, keys, buffer: int, rows: slice, columns: slice, mask=None):
        """Logits of some keys and queries into a scratch buffer; returns their partial maxima."""
        scores = dot(keys, self.query[columns], NT) * self.tiling.scale
        if mask is not None:
            scores = jnp.where(mask, scores, NEVER)
        self.scratch[buffer][rows, columns] = scores
        return _partial_max(scores)

    def absorb(self, maxima, values, buffer: int, rows: slice, columns: slice) -> None:
        """Weigh values (H, rows) by the softmax of logits that were stored, rescaling what was."""
        before = self.maximum[:, columns]
        maximum = jnp.maximum(before, jnp.max(maxima, axis=0, keepdims=True))
        shrink = jnp.exp2(before - maximum)
        weights = jnp.exp2(self.scratch[buffer][rows, columns] - maximum[:1])
        self.maximum[:, columns] = maximum
        total = jnp.sum(weights.reshape(-1, 8, weights.shape[1]), axis=0)
        self.total[:, columns] = self.total[:, columns] * shrink + total
        weighed = dot(values, weights.astype(values.dtype), NN)
        self.sums[:, columns] = self.sums[:, columns] * shrink[:1] + weighed


def _score_diagonal(head: _Head, key, at, step: int):
    """Logits of one step of block_k keys of the diagonal; only squares on and above it."""
    size, side = head.tiling.block_q, head.tiling.triangle
    square = causal_square(side, side)
    found = []
    for row in range(0, head.tiling.block_k, side):
        column = step * head.tiling.block_k + row
        keys = key[pl.ds(pl.multiple_of(at + column, side), side)]
        for columns, mask in (((column, column + side), square), ((column + side, size), None)):
            if columns[0] < columns[1]:
                rows = slice(row, row + side)
                maxima = head.score(keys, step % 2, rows, slice(*columns), mask)
                found.append((*columns, maxima))
    return found


def _absorb_diagonal(head: _Head, value, at, step: int, found) -> None:
    """Absorb a step of the diagonal: each group of queries the keys up to itself."""
    block_k, side, first = head.tiling.block_k, head.tiling.triangle, step * head.tiling.block_k
    groups = [(first + row, first + row + side, row + side) for row in range(0, block_k, side)]
    if first + block_k < head.tiling.block_q:
        groups.append((first + block_k, head.tiling.block_q, block_k))
    for begin, end, rows in groups:
        maxima = functools.reduce(
            jnp.maximum,
            [part[:, begin - x : end - x] for x, y, part in found if x <= begin and end <= y],
        )
        values = value[:, pl.ds(pl.multiple_of(at + first, side), rows)]
        head.absorb(maxima, values, step % 2, slice(0, rows), slice(begin, end))


def _diagonal(head: _Head, key, value, at) -> None:
    """The causal square of a block's own keys, whose first is ``at``."""
    steps = head.tiling.block_q // head.tiling.block_k
    found = _score_diagonal(head, key, at, 0)
    for step in range(steps):
        following = _score_diagonal(head, key, at, step + 1) if step + 1 < steps else None
        _absorb_diagonal(head, value, at, step, found)
        found = following


def _window(head: _Head, keys, values, interval, index) -> None:
    """Preface and slots: each unit of queries its own window."""
    rows, found = slice(0, keys.shape[1]), []
    for number, columns, mask in windows_of(head.tiling, interval, index):
        found.append((columns, head.score(keys[number], 0, rows, columns, mask)))
    for number, (columns, maxima) in enumerate(found):
        head.absorb(maxima, values[number], 0, rows, columns)


def _whole(head: _Head, key, value, first, end, maxima) -> None:
    """Blocks that every query sees whole: scores of the next while the last is absorbed."""
    size, rows, columns = head.tiling.block_k, slice(0, head.tiling.block_k), slice(None)

    def keys(block):
        return key[pl.ds(pl.multiple_of(block * size, size), size)]

    def values(block):
        return value[:, pl.ds(pl.multiple_of(block * size, size), size)]

    @pl.when(first < end)
    def _():
        maxima[...] = head.score(keys(first), 0, rows, columns)

        def step(block, _):
            head.absorb(maxima[...], values(block), 0, rows, columns)
            maxima[...] = head.score(keys(block + 1), 0, rows, columns)
            return 0

        jax.lax.fori_loop(first, end - 1, step, 0)
        head.absorb(maxima[...], values(end - 1), 0, rows, columns)


def _cut(head: _Head, key, value, first, end, index, segments) -> None:
    """Blocks that the mask cuts; what values hold that no query sees is not multiplied."""
    size, rows, columns = head.tiling.block_k, slice(0, head.tiling.block_k), slice(None)

    def step(block, _):
        here = pl.ds(pl.multiple_of(block * size, size), size)
        mask = cut_mask(block, size, index, segments)
        maxima = head.score(key[here], 0, rows, columns, mask)
        values = value[:, here]
        values = jnp.where(seen_keys(block, size, index, axis=1), values, jnp.zeros_like(values))
        head.absorb(maxima, values, 0, rows, columns)
        return 0

    jax.lax.fori_loop(first, end, step, 0)


def _kernel(table, start, *refs, tiling: Tiling, has_window: bool, has_segments: bool):
    names = ["query", "key", "value"]
    names += list(_WINDOW) * has_window
    names += ["mine", "theirs"] * has_segments
    names += ["out", "lse", "maximum", "total", "sums", "even", "odd", "maxima"]
    ref = dict(zip(names, refs, strict=True))
    place = Place.of(table, start, tiling)
    index = place.index
    segments = (ref["mine"], ref["theirs"]) if has_segments else None
    scratch = (ref["even"], ref["odd"])

    def one_head(number, _):
        query = ref["query"].at[number]
        head = _Head(tiling, query, ref["maximum"], ref["total"], ref["sums"], scratch)
        context = ref["key"], ref["value"]
        head.start()
        window = [ref[name] for name in _WINDOW] + [index] if has_window else None

        # In one region, so that one fills the gaps that the other leaves.
        @pl.when(place.diagonal > 0)
        def _():
            _diagonal(head, *context, place.low)
            if has_window:
                _window(head, *window)

        if has_window:
            pl.when(place.diagonal == 0)(lambda: _window(head, *window))
        _cut(head, *context, place.first, place.whole_first, index, segments)
        _whole(head, *context, place.whole_first, place.whole_end, ref["maxima"])
        _cut(head, *context, place.whole_end, place.end, index, segments)
        # Queries that are padding may have seen nothing.
        total = jnp.maximum(jnp.sum(ref["total"][...], axis=0, keepdims=True), _LEAST)
        ref["out"][number] = (ref["sums"][...] / total).astype(ref["out"].dtype)
        ref["lse"][number] = (ref["maximum"][:1] + jnp.log2(total))[0]
        return 0

    jax.lax.fori_loop(0, ref["query"].shape[0], one_head, 0)


def forward(query, key, value, window, *, table, start, segments, tiling: Tiling, settings):
    """Output (B, K, G, H, T), transposed, and log2-sum-exp2 of the logits (B, K, G, T).

    Args:
      table: (B * Q * 5,) the numbers of plan.Visits; start: (B,) index of the first query.
      query: (B, K, G, T, H); key: (B, K, S, H); value: (B, K, H, S).
      window: keys (B, K, U, W, H), values (B, K, U, H, W) and intervals (B, U, 8, W), or None.
      segments: of queries (B, 1, T) and keys (B, 1, S), or None.
      tiling: static sizes; settings: compiler parameters.
    """
    batch, kv_heads, heads, queries, width = query.shape
    size = 0 if window is None else window[0].shape[3]
    kernel = functools.partial(
        _kernel, tiling=tiling, has_window=window is not None, has_segments=segments is not None
    )
    f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    row = (8, tiling.block_q)
    logits = (max(tiling.block_k, size), tiling.block_q)
    operands = (query, key, value, *(window or ()), *(segments or ()))
    shapes = [
        jax.ShapeDtypeStruct((batch, kv_heads, heads, width, queries), query.dtype),
        jax.ShapeDtypeStruct((batch, kv_heads, heads, queries), jnp.float32),
    ]
    arrays = (*operands, *shapes)
    return pl.pallas_call(
        kernel,
        name="memory_attention_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, queries // tiling.block_q),
            in_specs=specs(tiling, heads, key.shape[2], width, size, segments is not None),
            out_specs=[
                pl.BlockSpec(
                    (None, None, heads, width, tiling.block_q), lambda b, k, i, *_: (b, k, 0, 0, i)
                ),
                pl.BlockSpec((None, None, heads, tiling.block_q), lambda b, k, i, *_: (b, k, 0, i)),
            ],
            scratch_shapes=[
                f32(row),
                f32(row),
                f32((width, tiling.block_q)),
                f32(logits),
                f32(logits),
                f32(row),
            ],
        ),
        out_shape=shapes,
        compiler_params=settings,
        cost_estimate=cost(tiling, query, key.shape[2], size, products=2, arrays=arrays),
    )(table, start, *operands)
