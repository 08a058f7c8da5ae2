"""The backward kernel for TPU: all gradients of memory attention in one pass over the blocks.

Laid out like the forward kernel, keys along sublanes and queries along lanes. Gradients of keys and
values of a kv head stay on chip, in float32, until all of its queries have gone by.
"""

import functools

import jax
import jax.numpy as jnp
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


class _Head:
    """One head of one block of queries; the methods emit straight-line code."""

    def __init__(self, tiling: Tiling, query, grad_out, lse, delta, grad_query):
        self.tiling, self.query, self.grad_out = tiling, query, grad_out
        self.lse, self.delta, self.grad_query = lse, delta, grad_query

    def block(self, keys, keys_across, values, columns: slice, mask=None):
        """Gradients of some keys and values from some queries; adds to those of the queries.

        keys, values: (rows, H); keys_across: (H, rows). The gradient of the keys is not scaled.
        """
        scores = dot(keys, self.query[columns], NT) * self.tiling.scale
        if mask is not None:
            scores = jnp.where(mask, scores, NEVER)
        weights = jnp.exp2(scores - self.lse[:, columns])
        grad_weights = dot(values, self.grad_out[columns], NT)
        grad_scores = (weights * (grad_weights - self.delta[:, columns])).astype(keys.dtype)
        grad_values = dot(weights.astype(keys.dtype), self.grad_out[columns], NN)
        grad_keys = dot(grad_scores, self.query[columns], NN)
        self.grad_query[:, columns] += dot(keys_across, grad_scores, NN)
        return grad_keys, grad_values


class _Context:
    """Keys and values of a kv head, and the sums of their gradients."""

    def __init__(self, key, key_across, value, grad_key, grad_value):
        self.key, self.key_across, self.value = key, key_across, value
        self.grad_key, self.grad_value = grad_key, grad_value

    def visit(self, head: _Head, at, rows: int, columns: slice, mask=None, seen=None) -> None:
        """Add the gradients between ``rows`` keys from ``at`` on and some queries.

        ``seen`` (rows, 1) marks keys that some query sees: what the others hold is not multiplied.
        """
        here = pl.ds(pl.multiple_of(at, min(rows, head.tiling.triangle)), rows)
        values, across = self.value[here], self.key_across[:, here]
        if seen is not None:
            values = jnp.where(seen, values, jnp.zeros_like(values))
            across = jnp.where(seen.T, across, jnp.zeros_like(across))
        grad_keys, grad_values = head.block(self.key[here], across, values, columns, mask)
        self.grad_key[here] += grad_keys
        self.grad_value[here] += grad_values


def _diagonal(head: _Head, context: _Context, low) -> None:
    """The causal square of a block's own keys, by strips of the triangle's side."""
    size, side = head.tiling.block_q, head.tiling.triangle
    for row in range(0, size, side):
        context.visit(head, low + row, side, slice(row, size), causal_square(side, size - row))


def _window(head: _Head, ref, index, first_head) -> None:
    """Preface and slots: each unit of queries its own window, summed over the heads."""
    for number, columns, mask in windows_of(head.tiling, ref["interval"], index):
        found = head.block(
            ref["window_keys"][number],
            ref["window_across"][number],
            ref["window_values"][number],
            columns,
            mask,
        )
        for name, part in zip(("grad_window_keys", "grad_window_values"), found, strict=True):
            before = ref[name][number]
            before = jnp.where(first_head, jnp.zeros_like(before), before)
            ref[name][number] = before + part


def _blocks(head: _Head, context: _Context, first, end, cut=None) -> None:
    """Whole blocks of keys, or, with ``cut = (index, segments)``, masked ones."""
    size = head.tiling.block_k

    def step(block, _):
        mask = seen = None
        if cut is not None:
            index, segments = cut
            mask = cut_mask(block, size, index, segments)
            seen = seen_keys(block, size, index, axis=0)
        context.visit(head, block * size, size, slice(None), mask, seen)
        return 0

    jax.lax.fori_loop(first, end, step, 0)


def _kernel(table, start, *refs, tiling: Tiling, has_window: bool, has_segments: bool):
    names = ["query", "key", "key_across"]
    names += ["window_keys", "window_across", "interval"] * has_window
    names += ["mine", "theirs"] * has_segments
    names += ["value", "grad_out", "lse", "delta"] + ["window_values"] * has_window
    names += ["grad_query", "grad_key", "grad_value"]
    names += ["grad_window_keys", "grad_window_values"] * has_window
    names += ["query_sums", "key_sums", "value_sums"]
    ref = dict(zip(names, refs, strict=True))
    place = Place.of(table, start, tiling)
    index = place.index
    segments = (ref["mine"], ref["theirs"]) if has_segments else None
    sums = ref["key_sums"], ref["value_sums"]
    context = _Context(ref["key"], ref["key_across"], ref["value"], *sums)
    per_logit = tiling.head_dim**-0.5

    @pl.when(pl.program_id(2) == 0)
    def _():
        for part in sums:
            part[...] = jnp.zeros_like(part)

    def one_head(number, _):
        row = pl.ds(number, 1)
        statistics = ref["lse"].at[row], ref["delta"].at[row]
        query, grad_out = ref["query"].at[number], ref["grad_out"].at[number]
        head = _Head(tiling, query, grad_out, *statistics, ref["query_sums"])
        ref["query_sums"][...] = jnp.zeros_like(ref["query_sums"])

        # In one region, so that one fills the gaps that the other leaves.
        @pl.when(place.diagonal > 0)
        def _():
            if has_window:
                _window(head, ref, index, number == 0)
            _diagonal(head, context, place.low)

        if has_window:
            pl.when(place.diagonal == 0)(lambda: _window(head, ref, index, number == 0))
        _blocks(head, context, place.first, place.whole_first, (index, segments))
        _blocks(head, context, place.whole_first, place.whole_end)
        _blocks(head, context, place.whole_end, place.end, (index, segments))
        scaled = ref["query_sums"][...] * per_logit
        ref["grad_query"][number] = scaled.astype(ref["grad_query"].dtype)
        return 0

    jax.lax.fori_loop(0, ref["query"].shape[0], one_head, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        ref["grad_key"][...] = (sums[0][...] * per_logit).astype(ref["grad_key"].dtype)
        ref["grad_value"][...] = sums[1][...].astype(ref["grad_value"].dtype)


def backward(operands, lse, delta, grad_out, window, *, table, start, segments, tiling, settings):
    """Gradients: query transposed (B, K, G, H, T), key and value (B, K, S, H), and the window's.

    Args:
      operands: query (B, K, G, T, H), key (B, K, S, H), value (B, K, S, H).
      lse: from the forward kernel; delta: sum over H of output times its gradient, alike.
      grad_out: (B, K, G, T, H). window: keys and values (B, K, U, W, H), intervals, or None.
      The others as for the forward kernel. The window's gradients are float32, its keys' unscaled.
    """
    query, key, value = operands
    batch, kv_heads, heads, queries, width = query.shape
    keys, size = key.shape[2], 0 if window is None else window[0].shape[3]
    given = [query, key, key.swapaxes(2, 3)]
    in_specs = specs(tiling, heads, keys, width, size, segments is not None)
    rows, columns = in_specs[0], in_specs[1]
    if window is not None:
        given += [window[0], window[0].swapaxes(3, 4), window[2]]
    statistic = pl.BlockSpec((None, None, heads, tiling.block_q), lambda b, k, i, *_: (b, k, 0, i))
    given += [*(segments or ()), value, grad_out, lse, delta]
    in_specs += [columns, rows, statistic, statistic]
    across = pl.BlockSpec(
        (None, None, heads, width, tiling.block_q), lambda b, k, i, *_: (b, k, 0, 0, i)
    )
    out_specs = [across, columns, columns]
    shapes = [((batch, kv_heads, heads, width, queries), query.dtype)]
    shapes += [(key.shape, key.dtype), (value.shape, value.dtype)]
    if window is not None:
        given, in_specs = [*given, window[1]], [*in_specs, in_specs[3]]
        out_specs += [in_specs[3]] * 2
        shapes += [(window[0].shape, jnp.float32)] * 2
    kernel = functools.partial(
        _kernel, tiling=tiling, has_window=window is not None, has_segments=segments is not None
    )
    f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return pl.pallas_call(
        kernel,
        name="memory_attention_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, queries // tiling.block_q),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[f32((width, tiling.block_q)), f32((keys, width)), f32((keys, width))],
        ),
        out_shape=shapes,
        compiler_params=settings,
        cost_estimate=cost(tiling, query, keys, size, products=5, arrays=(*given, *shapes)),
    )(table, start, *given)
