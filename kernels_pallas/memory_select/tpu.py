"""One reference (or a few) a grid step: scores, what each token receives and the best, on chip.

Queries and keys come in with tokens on the lanes, (heads, H, R): 128 tokens fill a register's lanes
whatever the head dim, and one transposition inside turns either side of a product. A head's scores
are laid out so that the first reduction runs over rows, which costs no lane shuffles: over givers
for the exponential form, over receivers for the softmax.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dispatch
from kernels_pallas.memory_select.reference import INVALID, LEAST_VALID

LANES = 128
# Rows of a register: with fewer kv heads than this (a shard's), references share a grid step.
SUBLANES = 8
LOWEST = float(jnp.finfo(jnp.float32).min)
LOG2_E = 1.4426950408889634
VMEM_BYTES = 64 * 2**20


def unsupported(query, key, valid, *, kept=1, **_) -> str | None:
    """Why this implementation does not take the arguments, or None when it does."""
    reason = dispatch.only_on("tpu")
    if reason is not None:
        return reason
    if query.shape[1] > LANES:
        return f"references of {query.shape[1]} tokens, at most {LANES} fit"
    if query.dtype != key.dtype or query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"query is {query.dtype} and key {key.dtype}: both bfloat16 or both float32"
    if 3 * query.shape[2] * query.shape[3] * LANES * query.dtype.itemsize > VMEM_BYTES:
        return f"{query.shape[2]} heads of {query.shape[3]} do not fit on chip"
    return None


def _products(left, right):
    """Rows: tokens of ``left``; lanes: tokens of ``right``; both come as (H, R)."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left,
        right,
        (((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _received_exponential(queries, key, valid_rows, valid_lanes, *, scale, pooling):
    """(1, R): log of the sum over givers (rows), and over heads, of exp(score)."""
    scores = [jnp.where(valid_rows, _products(query, key), LOWEST) for query in queries]
    groups = [[one] for one in scores] if pooling == "max" else [scores]
    rows = []
    for group in groups:
        top = functools.reduce(jnp.maximum, group).max(axis=0, keepdims=True)
        terms = [jnp.exp2((one - top) * (scale * LOG2_E)) for one in group]
        total = functools.reduce(jnp.add, terms).sum(axis=0, keepdims=True)
        rows.append(top * scale + jnp.log(total))
    return functools.reduce(jnp.maximum, rows)


def _received_softmax(queries, key, valid_rows, valid_lanes, *, scale, pooling):
    """(1, R): log of the sum over givers (lanes), and over heads, of their softmax over rows."""
    shares = []
    for query in queries:
        scores = jnp.where(valid_rows, _products(key, query), LOWEST)
        top = scores.max(axis=0, keepdims=True)
        terms = jnp.exp2((scores - top) * (scale * LOG2_E))
        share = terms * (1 / terms.sum(axis=0, keepdims=True))
        shares.append(jnp.where(valid_lanes, share, 0.0))
    groups = shares if pooling == "max" else [functools.reduce(jnp.add, shares)]
    return functools.reduce(
        jnp.maximum, [jnp.log(group.T.sum(axis=0, keepdims=True)) for group in groups]
    )


def _received(valid_ref, query_ref, key_ref, *, kv_heads, scale, selection, pooling):
    """(refs * K, R) and its mask: what the tokens receive, -inf where they are invalid."""
    form = _received_softmax if selection == "softmax" else _received_exponential
    shape = (valid_ref.shape[0] * kv_heads, LANES)
    place = jax.lax.broadcasted_iota(jnp.int32, shape, 0)

    def reference(r, found):
        row = valid_ref[r]
        valid_rows = jnp.broadcast_to(row, (LANES, LANES)).T > 0

        def head(k, found):
            received, mask = found
            queries = [query_ref[r, k, g] for g in range(query_ref.shape[2])]
            line = form(queries, key_ref[r, k], valid_rows, row > 0, scale=scale, pooling=pooling)
            here = place == r * kv_heads + k
            return jnp.where(here, line, received), jnp.where(here, row, mask)

        return jax.lax.fori_loop(0, kv_heads, head, found, unroll=min(kv_heads, SUBLANES))

    start = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
    # Eight heads side by side hide each other's latencies: two thirds of the bundles of one by one.
    refs = valid_ref.shape[0]
    received, mask = jax.lax.fori_loop(0, refs, reference, start, unroll=refs)
    return jnp.where(mask > 0, received, -jnp.inf), mask


def _received_kernel(valid_ref, query_ref, key_ref, out_ref, **form):
    out_ref[0] = _received(valid_ref, query_ref, key_ref, **form)[0]


def _select_kernel(valid_ref, query_ref, key_ref, out_ref, *, kept, **form):
    """The best ``kept`` in turn; several grid steps fill one dense tile of indices."""
    step = pl.program_id(1)
    received, mask = _received(valid_ref, query_ref, key_ref, **form)
    # Lane numbers as floats, exact: the lowest of several best is a minimum like any other.
    lane = jax.lax.broadcasted_iota(jnp.int32, received.shape, 1)
    number = lane.astype(jnp.float32)
    # Lanes behind the last token are invalid too, and of equal ones the lower, a token, goes first.
    rank = jnp.where(mask > 0, jnp.maximum(received, LEAST_VALID), INVALID)

    @pl.when(step == 0)
    def _():
        out_ref[0] = jnp.zeros(out_ref.shape[1:], jnp.int32)

    def keep(m, carry):
        rank, found = carry
        best = rank.max(axis=1, keepdims=True)
        # A NaN is the best of none: the last lane, which is at least within.
        first = jnp.where(rank == best, number, float(LANES - 1)).min(axis=1, keepdims=True)
        found = jnp.where(lane == step * kept + m, first.astype(jnp.int32), found)
        return jnp.where(number == first, -jnp.inf, rank), found

    start = rank, out_ref[0]
    out_ref[0] = jax.lax.fori_loop(0, kept, keep, start, unroll=min(kept, SUBLANES))[1]


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _operands(query, key, valid, *, pooling, refs):
    """Validity, queries and keys as the kernel reads them: tokens on 128 lanes, whole steps."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    if pooling == "first":
        query = query[:, :, :, :1]
    more = _up(batch, refs) - batch, LANES - length
    # Sublanes of a register hold 8 numbers of 32 bits or 16 of 16: zeros add nothing to a product.
    wider = _up(head_dim, 32 // query.dtype.itemsize) - head_dim
    return (
        jnp.pad(valid.astype(jnp.float32)[:, None], ((0, more[0]), (0, 0), (0, more[1]))),
        jnp.pad(
            query.transpose(0, 2, 3, 4, 1),
            ((0, more[0]), (0, 0), (0, 0), (0, wider), (0, more[1])),
        ),
        jnp.pad(key.transpose(0, 2, 3, 1), ((0, more[0]), (0, 0), (0, wider), (0, more[1]))),
    )


def _run(kernel, query, key, valid, *, per_tile, dtype, selection, pooling):
    """Run ``kernel``; (tiles, refs * K, 128), each tile written by ``per_tile`` grid steps."""
    batch, _, _, head_dim = query.shape
    kv_heads = key.shape[2]
    refs = max(1, SUBLANES // kv_heads)
    operands = _operands(query, key, valid, pooling=pooling, refs=refs)
    last = operands[0].shape[0] // refs - 1
    steps = min(per_tile, last + 1)

    def block(operand):
        # Steps behind the last reference read it again; what they find is cut off.
        rest = (0,) * (operand.ndim - 1)
        return pl.BlockSpec(
            (refs, *operand.shape[1:]), lambda t, s: (jnp.minimum(t * steps + s, last), *rest)
        )

    form = dict(kv_heads=kv_heads, scale=head_dim**-0.5, selection=selection, pooling=pooling)
    shape = (pl.cdiv(last + 1, steps), refs * kv_heads, LANES)
    return pl.pallas_call(
        functools.partial(kernel, **form),
        grid=(shape[0], steps),
        in_specs=[block(operand) for operand in operands],
        out_specs=pl.BlockSpec((1, *shape[1:]), lambda t, s: (t, 0, 0)),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(query, key),
        name="memory_select",
    )(*operands)


def _cost(query, key) -> pl.CostEstimate:
    """One product of queries and keys, without the causal mask."""
    scores = math.prod(query.shape[:3]) * key.shape[1]
    return pl.CostEstimate(
        flops=2 * scores * query.shape[3],
        transcendentals=scores,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (query, key)),
    )


def attention_received(query, key, valid, *, selection, pooling):
    """As :func:`reference.attention_received`."""
    batch, length, kv_heads = key.shape[:3]
    form = dict(selection=selection, pooling=pooling, dtype=jnp.float32)
    found = _run(_received_kernel, query, key, valid, per_tile=1, **form)
    return found.reshape(-1, kv_heads, LANES)[:batch, :, :length]


def memory_select(query, key, valid, *, kept, selection, pooling):
    """As :func:`reference.memory_select`."""
    batch, _, kv_heads = key.shape[:3]
    kernel = functools.partial(_select_kernel, kept=kept)
    form = dict(selection=selection, pooling=pooling, dtype=jnp.int32)
    found = _run(kernel, query, key, valid, per_tile=LANES // kept, **form)
    # Lanes are (step, kept); of a tile that few references share, the last ones stay empty.
    tiles, rows, _ = found.shape
    refs = rows // kv_heads
    steps = min(LANES // kept, _up(batch, refs) // refs)
    found = found[:, :, : steps * kept].reshape(tiles, refs, kv_heads, steps, kept)
    return found.transpose(0, 3, 1, 2, 4).reshape(-1, kv_heads, kept)[:batch]
