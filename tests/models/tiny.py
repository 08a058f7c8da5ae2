"""Tiny decoders that the law tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlab.config import MemoryConfig, ModelConfig
from jaxlab.memory.write import encode_references
from jaxlab.models.decoder import (
    Decoder,
    abstract_decoder,
    encode_preface,
)

PREFACE = np.array([1, 5, 6], np.int32)


def tiny_config(**changes) -> ModelConfig:
    """Four layers, two of them memory layers, four query heads on two kv heads."""
    values = dict(
        vocab_size=61,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn_width=24,
        memory_layers=2,
        compute_dtype="float32",
    )
    return ModelConfig(**{**values, **changes})


def tiny_memory(**changes) -> MemoryConfig:
    """References of 12 tokens of which 4 are kept, chunks of 4, three references a chunk."""
    values = dict(
        reference_length=12, tokens_kept=4, chunk_length=4, references_per_chunk=3, candidates=5
    )
    return MemoryConfig(**{**values, **changes})


@functools.cache
def tiny_decoder(config: ModelConfig | None = None, *, seed: int = 0) -> Decoder:
    """A decoder whose weights are large enough for attention to be far from uniform."""
    config = tiny_config() if config is None else config
    graphdef, shapes = abstract_decoder(config)
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        return generator.standard_normal(leaf.shape, np.float32) * 0.25

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, shapes))


@functools.partial(jax.jit, static_argnames=("graphdef", "grid", "start"))
def _run(graphdef, params, tokens, arrays, *, grid, start):
    decoder = nnx.merge(graphdef, params)
    hidden, cache = decoder(tokens, **arrays, grid=grid, start=start)
    return decoder.logits(hidden), cache


def run(decoder: Decoder, tokens, *, grid=None, start=0, **arrays):
    """Logits and cache of one compiled pass."""
    graphdef, params = nnx.split(decoder)
    return _run(graphdef, params, tokens, arrays, grid=grid, start=start)


@functools.partial(jax.jit, static_argnames=("graphdef", "memory"))
def _write(graphdef, params, tokens, lengths, *, memory):
    decoder = nnx.merge(graphdef, params)
    preface = encode_preface(decoder, jnp.asarray(PREFACE))
    return preface, encode_references(decoder, tokens, lengths, preface=preface, memory=memory)


def write(decoder: Decoder, tokens, lengths, *, memory=None):
    """The preface and the memories of some references, by one compiled program."""
    graphdef, params = nnx.split(decoder)
    return _write(graphdef, params, tokens, lengths, memory=memory or tiny_memory())


def random_tokens(seed: int, *shape: int) -> jax.Array:
    """Ordinary tokens, none of the special ones."""
    return jax.random.randint(jax.random.key(seed), shape, 7, 61, jnp.int32)
