"""Block-diagonal queries: what makes every relayout of the TPU kernel a matrix product."""

import jax
import jax.numpy as jnp

from kernels_pallas.memory_decode.plan import Plan


def dot(a, b, contract: tuple[int, int]):
    """A product in float32; float32 operands are not rounded."""
    if 1 in (*a.shape, *b.shape):  # The compiler has no bfloat16 product of a single row.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def one_hot(rows: int, columns: int, group: tuple[int, int], dtype):
    """1 where the kv head of a row is that of a column; ``group`` of either make up a kv head."""
    places = (jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in range(2))
    row, column = (jax.lax.div(place, size) for place, size in zip(places, group, strict=True))
    return (row == column).astype(dtype)


def constants(plan: Plan, spread, own):
    """What every sequence needs.

    spread: H x W, the unit matrix again and again, for a cache row of W columns.
    own: RN x W, 1 where a row of scores has its columns; row r N + n is of token r and head n.
    """
    row, column = (jax.lax.broadcasted_iota(jnp.int32, spread.shape, axis) for axis in (0, 1))
    spread[...] = (jax.lax.rem(column, plan.head_dim) == row).astype(spread.dtype)
    own[...] = one_hot(*own.shape, (plan.group, plan.head_dim), own.dtype)


def spread_out(plan: Plan, query, spread, own, out):
    """The block-diagonal query."""
    query = query[...]
    if plan.fold > 1:
        places = (jax.lax.broadcasted_iota(jnp.int32, (plan.scores, plan.heads), a) for a in (0, 1))
        row, head = places
        query = dot((jax.lax.rem(row, plan.heads) == head).astype(query.dtype), query, (1, 0))
        query = query.astype(spread.dtype)
        yield
    wide = dot(query, spread[...], (1, 0))
    yield
    out[...] = jnp.where(own[...] > 0, wide, 0).astype(out.dtype)


def own_columns(mean, spread, dtype):
    """The H columns of every row that are not zero, by a product that only moves them."""
    if spread.dtype == jnp.float32:
        return dot(mean, spread[...], (1, 1))
    high = mean.astype(spread.dtype)
    moved = dot(high, spread[...], (1, 1))
    if dtype == spread.dtype:  # Already rounded as the result is.
        return moved
    low = (mean - high.astype(jnp.float32)).astype(spread.dtype)
    return moved + dot(low, spread[...], (1, 1))
