"""The definition of memory decoding: memory attention of a single query, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.memory_attention import reference

Pair = tuple[Float[Array, "..."], Float[Array, "..."]]


def heads_apart(array: Float[Array, "..."], head_dim: int) -> Float[Array, "... K H"]:
    """A flat last axis of K x H as two axes, in float32."""
    return array.astype(jnp.float32).reshape(*array.shape[:-1], -1, head_dim)


def unfold(rows: Float[Array, "B S W"], tokens_per_row: int) -> Float[Array, "B SR KH"]:
    """Every token in a row of its own."""
    return rows.reshape(rows.shape[0], -1, rows.shape[-1] // tokens_per_row)


def memory_decode(
    query: Float[Array, "B N H"],
    key: Float[Array, "B S KH"],
    value: Float[Array, "B S KH"],
    *,
    lengths: Int[Array, " B"],
    preface: Pair | None = None,
    slots: Pair | None = None,
    slot_valid: Bool[Array, "B M K"] | None = None,
    tokens_per_row: int = 1,
) -> Float[Array, "B N H"]:
    """Memory attention at T = 1, every kv head by itself, since each has slots of its own.

    What is not visible is replaced by zeros first, so that it may hold anything. Zeros come out
    where nothing at all is visible.
    """
    batch, heads, head_dim = query.shape
    key, value = (unfold(rows, tokens_per_row) for rows in (key, value))
    exists = lengths > 0
    behind = (jnp.arange(key.shape[1]) < lengths[:, None])[..., None, None]
    key, value = (jnp.where(behind, heads_apart(x, head_dim), 0) for x in (key, value))
    grouped = query.astype(jnp.float32).reshape(batch, 1, key.shape[2], -1, head_dim)
    if preface is not None:
        preface = tuple(heads_apart(part, head_dim) for part in preface)
        exists = exists | (preface[0].shape[0] > 0)
    exists = jnp.broadcast_to(exists[:, None], (batch, key.shape[2]))
    if slots is not None:
        valid = slot_valid[..., None]
        slots = tuple(jnp.where(valid, heads_apart(part, head_dim), 0)[:, None] for part in slots)
        exists = exists | slot_valid.any(axis=1)
        slot_valid = slot_valid[:, None]

    def one_head(query, key, value, preface, slots, slot_valid):
        keep = lambda x: x[..., None, :]  # noqa: E731
        return reference.memory_attention(
            query,
            keep(key),
            keep(value),
            start=lengths.astype(jnp.int32) - 1,
            preface=jax.tree.map(keep, preface),
            slots=jax.tree.map(keep, slots),
            slot_valid=slot_valid,
        )

    out = jax.vmap(one_head, in_axes=(2, 2, 2, 1, 3, 3), out_axes=2)(
        grouped, key, value, preface, slots, slot_valid
    )
    out = jnp.where(exists[:, None, :, None, None], out, 0)
    return out.reshape(batch, heads, head_dim).astype(query.dtype)
