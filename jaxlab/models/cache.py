"""The decode cache as a pytree: keys and values of the context, by stack of layers."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlab.config import ModelConfig
from jaxlab.models.attention import KeyValues


class Cache(NamedTuple):
    """Context keys and values, and how many of them are written.

    layers: one entry for each stack, keys and values of shape (layers, B, S, K H): with the heads
      in one axis decoding reads them as they lie. What a decoder returns that was given no cache
      has the heads apart, (layers, B, S, K, H).
    lengths: tokens written for each sequence; what lies behind is never read.
    """

    layers: tuple[KeyValues, ...]
    lengths: Int[Array, " B"]


def empty_cache(config: ModelConfig, *, batch: int, length: int) -> Cache:
    """A cache for ``length`` context tokens of each of ``batch`` sequences."""
    counts = (config.memory_layers, config.layers - config.memory_layers)
    shape = (batch, length, config.kv_heads * config.head_dim)
    layers = tuple(
        KeyValues(*(jnp.zeros((count, *shape), config.compute_dtype) for _ in range(2)))
        for count in counts
        if count
    )
    return Cache(layers, jnp.zeros((batch,), jnp.int32))
