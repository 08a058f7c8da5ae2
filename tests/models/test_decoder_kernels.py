"""The decoder with the TPU kernels, interpreted on the CPU, equals the decoder without them."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlab.models.cache import empty_cache
from kernels_pallas import dispatch
from kernels_pallas.memory_attention import ChunkGrid
from tests.kernels.simulated import interpreted
from tests.models.test_decoder import START, memories_for
from tests.models.tiny import random_tokens, tiny_config, tiny_decoder


def program(function, *arrays):
    """What a fresh compilation gives, and which implementations it chose."""
    chosen, choose = set(), dispatch.choose

    def spy(op, *args):
        found = choose(op, *args)
        chosen.add((op, found.name))
        return found

    with mock.patch.object(dispatch, "choose", spy):
        return jax.jit(lambda *arrays: function(*arrays))(*arrays), chosen


def assert_same_with_kernels(function, *arrays, ops):
    plain, _ = program(function, *arrays)
    with interpreted():
        found, chosen = program(function, *arrays)
    assert chosen == {(op, "tpu") for op in ops}

    def close(one, other):
        # Sums in another order; gradients pass norms, which multiply them.
        scale = max(1.0, float(jnp.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale)

    jax.tree.map(close, found, plain)


def test_a_training_row_with_its_memories_and_all_gradients():
    decoder = tiny_decoder(tiny_config(remat="none"))
    graphdef, params = nnx.split(decoder)
    preface, slots = memories_for(decoder, batch=1, chunks=4)
    tokens, grid = random_tokens(1, 1, 16), ChunkGrid(length=4, band=3)

    def loss(params, preface, keys, values):
        hidden, _ = nnx.merge(graphdef, params)(
            tokens, preface=preface, slots=slots._replace(keys=keys, values=values), grid=grid
        )
        return jnp.sum(jnp.sin(hidden))

    assert_same_with_kernels(
        jax.value_and_grad(loss, argnums=(0, 1, 2, 3)),
        params,
        preface,
        slots.keys,
        slots.values,
        ops=["memory_attention"],
    )


def test_a_prompt_and_the_tokens_decoded_behind_it():
    decoder = tiny_decoder(tiny_config(remat="none"))
    graphdef, params = nnx.split(decoder)
    preface, slots = memories_for(decoder, batch=2, chunks=1)
    tokens = random_tokens(2, 2, 7)

    def generate(params):
        model, cache = nnx.merge(graphdef, params), empty_cache(decoder.config, batch=2, length=16)
        found = []
        for piece in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
            hidden, cache = model(piece, preface=preface, slots=slots, cache=cache, start=START)
            found.append(model.logits(hidden))
        return jnp.concatenate(found, axis=1)

    assert_same_with_kernels(generate, params, ops=["memory_attention", "memory_decode"])
