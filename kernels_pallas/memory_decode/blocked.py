"""Memory decoding in XLA, one block of the cache after the other: for CPUs, and any other device.

Never holds more scores than those of one block, B x N x BLOCK, and stops behind the longest
sequence, where the definition computes with the whole cache, in float32.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.memory_decode.reference import unfold

BLOCK = 128
# In place of minus infinity, so that the difference of two is 0 and not NaN.
MASKED = -1e30


def unsupported(query, key, value, *, tokens_per_row=1, **_) -> str | None:
    """Why this implementation does not take the arguments, or None when it does."""
    if key.shape[1] * tokens_per_row <= BLOCK:
        return f"a cache of {key.shape[1] * tokens_per_row} tokens is a single block"
    return None


def _attend(query, keys, values, mask, running):
    """Take keys and values into the running softmax: its top, its total and the weighted sums.

    Where ``mask``, of B x K x S, is False, they may hold anything.
    """
    top, total, sums = running
    mask, head_dim = jnp.broadcast_to(mask, (*query.shape[:2], keys.shape[1])), query.shape[-1]
    keys, values = (x.reshape(*x.shape[:2], -1, head_dim) for x in (keys, values))
    values = jnp.where(mask.swapaxes(1, 2)[..., None], values, 0)
    product = dict(preferred_element_type=jnp.float32)
    mask = mask[:, :, None]
    scores = jnp.einsum("bkgh,bskh->bkgs", query, keys, **product) * head_dim**-0.5
    scores = jnp.where(mask, scores, MASKED)
    highest = jnp.maximum(top, scores.max(-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - highest), 0)
    decay = jnp.exp(top - highest)
    total = total * decay + weights.sum(-1, keepdims=True)
    more = jnp.einsum("bkgs,bskh->bkgh", weights.astype(values.dtype), values, **product)
    return highest, total, sums * decay + more


def begin(query, preface, slots, slot_valid, kv_heads: int):
    """The running softmax, B x K x G, of preface and slots."""
    batch, _, head_dim = query.shape
    grouped = query.reshape(batch, kv_heads, -1, head_dim)
    one = (*grouped.shape[:3], 1)
    running = jnp.full(one, MASKED), jnp.zeros(one), jnp.zeros(grouped.shape, jnp.float32)
    if preface is not None:
        everyone = (jnp.broadcast_to(part, (batch, *part.shape)) for part in preface)
        running = _attend(grouped, *everyone, jnp.ones((1, 1, preface[0].shape[0]), bool), running)
    if slots is not None:
        running = _attend(grouped, *slots, slot_valid.swapaxes(1, 2), running)
    return running


def memory_decode(
    query, key, value, *, lengths, preface=None, slots=None, slot_valid=None, tokens_per_row=1
):
    """As :func:`reference.memory_decode`."""
    key, value = (unfold(rows, tokens_per_row) for rows in (key, value))
    (batch, _, head_dim), length = query.shape, key.shape[1]
    block, kv_heads = min(BLOCK, length), key.shape[-1] // head_dim
    grouped = query.reshape(batch, kv_heads, -1, head_dim)

    def step(number, running):
        # The last block begins early enough to fit; what it repeats is masked.
        first = jnp.minimum(number * block, length - block)
        place = first + jnp.arange(block)
        mask = (place >= number * block) & (place < lengths[:, None])
        part = (jax.lax.dynamic_slice_in_dim(x, first, block, axis=1) for x in (key, value))
        return _attend(grouped, *part, mask[:, None], running)

    blocks = -(-jnp.clip(lengths, 0, length).max(initial=0) // block) if length else 0
    running = begin(query, preface, slots, slot_valid, kv_heads)
    _, total, sums = jax.lax.fori_loop(0, blocks, step, running)
    out = sums / jnp.where(total > 0, total, 1)
    return out.reshape(query.shape).astype(query.dtype)
