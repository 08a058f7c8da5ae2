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


def empty_cache(config: ModelConfig, *, batch: int, length: int, unstacked: bool = False) -> Cache:
    """A cache for ``length`` context tokens of each of ``batch`` sequences.

    ``unstacked``: for a decoder from ``unstack``, a tuple of layers in place of their axis.
    """
    counts = (config.memory_layers, config.layers - config.memory_layers)
    shape = (batch, length, config.kv_heads * config.head_dim)

    def rows(count: int):
        if unstacked:
            return tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(count))
        return jnp.zeros((count, *shape), config.compute_dtype)

    layers = tuple(KeyValues(rows(count), rows(count)) for count in counts if count)
    return Cache(layers, jnp.zeros((batch,), jnp.int32))
