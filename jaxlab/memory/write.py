"""Encode references into explicit memory: sparse keys and values of the memory layers.

Memory³ §3.1 to §3.3: each reference is encoded alone behind the preface ``<s>Reference:``, through
the memory layers only; at each of them, for each kv head, the keys (after rotation) and values of
the tokens that receive most attention are kept. The same function writes the bank and runs inside
the continual stage's training step, where gradients flow through it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.config import MemoryConfig
from jaxlab.memory.select import gather_tokens, select_tokens
from jaxlab.models.attention import KeyValues, ReadingPlan, Slots
from jaxlab.models.decoder import Block, Decoder, Prefix, remat, residual


class Memories(NamedTuple):
    """Explicit memories of n references.

    keys, values: (memory layers, n, kept, K, H); valid: (n, kept).
    """

    keys: Float[Array, "L n m K H"]
    values: Float[Array, "L n m K H"]
    valid: Bool[Array, "n m"]


def _keep(block: Block, projected, context: KeyValues, valid, memory: MemoryConfig) -> KeyValues:
    chosen = select_tokens(
        projected.query,
        projected.key,
        valid,
        kept=min(memory.tokens_kept, valid.shape[1]),
        selection=memory.selection,
        pooling=memory.pooling,
    )
    return KeyValues(*(gather_tokens(rows, chosen) for rows in context))


def encode_references(
    decoder: Decoder,
    tokens: Int[Array, "n R"],
    lengths: Int[Array, " n"],
    *,
    preface: Prefix,
    memory: MemoryConfig,
) -> Memories:
    """Explicit memories of references, right-padded to R tokens; ``lengths`` counts the real ones.

    A reference of length 0 gives a memory with no valid slot.
    """
    count, width = tokens.shape
    index = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (count, width))
    plan = ReadingPlan(index=index, positions=index + preface.length)
    valid = index < lengths[:, None]
    stack, layers = decoder.stacks[0], decoder.config.memory_layers
    graphdef, params = nnx.split(stack)

    def attend(x, layer):
        params, preface_layer = layer
        block = nnx.merge(graphdef, params)
        projected = block.attention.project(block.attention_norm(x))
        rotated = (block.attention.rotate(part, plan.positions) for part in projected[:2])
        query, key = rotated
        context = KeyValues(key, projected.value)
        kept = _keep(block, projected, context, valid, memory)
        return block, x, query, context, kept

    def body(x, layer):
        block, x, query, context, kept = attend(x, layer)
        x = x + block.attention.read(query, context, plan, preface=layer[1], slots=None)
        return residual(x + block.mlp(block.mlp_norm(x))), kept

    # Nothing above the last memory layer's keys and values is needed (§1.3 of the cost model: one
    # feed-forward less than attention layers), so that layer stops there.
    def part(tree, lower, upper):
        return jax.tree.map(lambda leaf: leaf[lower:upper], tree)

    everything = (params, preface.layers[0])
    x, below = jax.lax.scan(
        remat(body, decoder.config.remat), decoder.embed(tokens), part(everything, 0, layers - 1)
    )
    last = jax.tree.map(lambda leaf: leaf[-1], everything)
    top = attend(x, last)[-1]
    kept = KeyValues(*(jnp.concatenate([b, t[None]]) for b, t in zip(below, top, strict=True)))
    slots = jnp.arange(kept.keys.shape[2]) < lengths[:, None]
    memories = Memories(kept.keys, kept.values, slots)
    return jax.lax.stop_gradient(memories) if memory.stop_gradient else memories


def compile_encode(graphdef: Any, memory: MemoryConfig) -> Callable[..., Array]:
    """Compiled function of parameters, preface, tokens (n, R) and lengths: memories as stored."""

    def encode(params, preface, tokens, lengths):
        decoder = nnx.merge(graphdef, params)
        return to_stored(
            encode_references(decoder, tokens, lengths, preface=preface, memory=memory)
        )

    return jax.jit(encode)


def as_slots(memories: Memories, *, batch: int) -> Slots:
    """Group the memories of ``batch`` x chunks references, one reference a chunk (training)."""
    keys, values = (
        rows.reshape(rows.shape[0], batch, -1, *rows.shape[2:]) for rows in memories[:2]
    )
    return Slots(keys, values, memories.valid.reshape(batch, -1, memories.valid.shape[-1]))


def to_stored(memories: Memories) -> Float[Array, "n L 2 K m H"]:
    """The layout of the bank: one reference's memory is contiguous."""
    both = jnp.stack([memories.keys, memories.values], axis=1)
    return jnp.transpose(both, (2, 0, 1, 4, 3, 5))


def from_stored(stored: Float[Array, "B C r L 2 K m H"], valid: Bool[Array, "B C r m"]) -> Slots:
    """Slots of each chunk from the r stored memories that it reads."""
    batch, chunks, references, layers, _, kv_heads, kept, head_dim = stored.shape
    rows = jnp.transpose(stored, (4, 3, 0, 1, 2, 6, 5, 7))
    rows = rows.reshape(2, layers, batch, chunks, references * kept, kv_heads, head_dim)
    return Slots(rows[0], rows[1], valid.reshape(batch, chunks, references * kept))
