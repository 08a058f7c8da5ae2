"""Laws of the decoder: Memory³ spec section 10, tests 1 to 3, 5 and 9."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlab.config import ModelConfig
from jaxlab.memory.write import as_slots
from jaxlab.models.attention import Slots
from jaxlab.models.cache import empty_cache
from jaxlab.models.decoder import context_start, parameter_count, unstack
from jaxlab.models.presets import PRESETS
from kernels_pallas.memory_attention import ChunkGrid
from tests.models.tiny import (
    PREFACE,
    random_tokens,
    run,
    tiny_config,
    tiny_decoder,
    tiny_memory,
    write,
)

START = context_start(len(PREFACE), 12)


def memories_for(decoder, *, batch, chunks, memory=None, lengths=None, seed=3):
    memory = memory or tiny_memory()
    tokens = random_tokens(seed, batch * chunks, memory.reference_length)
    if lengths is None:
        lengths = jnp.full((batch * chunks,), memory.reference_length, jnp.int32)
    preface, encoded = write(decoder, tokens, lengths, memory=memory)
    return preface, as_slots(encoded, batch=batch)


def logits(decoder, tokens, **kwargs):
    return np.asarray(run(decoder, tokens, **kwargs)[0])


def test_parameter_counts_are_the_papers():
    counts = {
        name: parameter_count(ModelConfig(**PRESETS[name]), embeddings=False)
        for name in ("memory3-2b", "memory3-0.9b")  # the paper has no smaller one
    }
    norms = {"memory3-2b": (2 * 44 + 1) * 3200, "memory3-0.9b": (2 * 40 + 1) * 2048}
    matrices = {name: counts[name] - norms[name] for name in counts}
    assert matrices["memory3-2b"] == 44 * (2 * 3200**2 + 2 * 3200 * 640 + 3 * 3200 * 3200)
    assert round(matrices["memory3-2b"] / 1e9, 3) == 2.433
    assert round(matrices["memory3-0.9b"] / 1e9, 4) == 0.9227


@pytest.mark.parametrize(
    ("preset", "millions"), [("llama-60m", 66.3), ("llama-119m", 119.7), ("llama-229m", 228.3)]
)
def test_llama_presets_have_their_named_size(preset, millions):
    assert round(parameter_count(ModelConfig(**PRESETS[preset])) / 1e6, 1) == millions


def test_a_model_without_valid_slots_is_the_preface_only_model():
    decoder = tiny_decoder()
    preface, slots = memories_for(decoder, batch=2, chunks=4)
    tokens = random_tokens(1, 2, 16)
    empty = slots._replace(valid=jnp.zeros_like(slots.valid))
    grid = ChunkGrid(length=4, band=3)
    with_empty = logits(decoder, tokens, preface=preface, slots=empty, grid=grid, start=START)
    without = logits(decoder, tokens, preface=preface, start=START)
    np.testing.assert_allclose(with_empty, without, rtol=0, atol=1e-5)
    full = logits(decoder, tokens, preface=preface, slots=slots, grid=grid, start=START)
    assert np.abs(full - without).max() > 1e-2


def test_order_of_memories_and_of_their_tokens_does_not_matter():
    decoder = tiny_decoder()
    preface, slots = memories_for(decoder, batch=1, chunks=3)
    flat = Slots(
        *(part.reshape(*part.shape[:2], 1, -1, 2, 8) for part in slots[:2]),
        slots.valid.reshape(1, 1, -1),
    )
    order = np.random.default_rng(0).permutation(flat.valid.shape[-1])
    permuted = Slots(flat.keys[:, :, :, order], flat.values[:, :, :, order], flat.valid[..., order])
    tokens = random_tokens(1, 1, 9)
    one = logits(decoder, tokens, preface=preface, slots=flat, start=START)
    other = logits(decoder, tokens, preface=preface, slots=permuted, start=START)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_full_selection_equals_plain_causal_attention_over_the_joined_sequence():
    """All tokens kept, all layers memory layers: reading is plain attention (spec test 3)."""
    config = tiny_config(memory_layers=4)
    decoder = tiny_decoder(config)
    memory = tiny_memory(tokens_kept=12)
    reference = random_tokens(5, 1, 12)
    preface, encoded = write(decoder, reference, jnp.array([12]), memory=memory)
    context = random_tokens(6, 1, 10)
    read = logits(decoder, context, preface=preface, slots=as_slots(encoded, batch=1), start=START)
    joined = jnp.concatenate([PREFACE[None], reference, context], axis=1)
    plain = logits(decoder, joined)[:, -10:]
    np.testing.assert_allclose(read, plain, rtol=0, atol=1e-5)


def test_training_band_equals_the_per_chunk_loop():
    """One pass with the band mask, against each chunk run with just the slots it may read."""
    decoder = tiny_decoder()
    chunks, band, length = 5, 3, 4
    preface, slots = memories_for(decoder, batch=2, chunks=chunks)
    tokens = random_tokens(1, 2, chunks * length)
    grid = ChunkGrid(length=length, band=band)
    whole = logits(decoder, tokens, preface=preface, slots=slots, grid=grid, start=START)

    cache = empty_cache(decoder.config, batch=2, length=chunks * length)
    # `<s>` belongs to chunk 0, so its span is one token longer and the last one token shorter.
    edges = [0, *range(1 + length, chunks * length, length), chunks * length]
    pieces = []
    for chunk, (start, stop) in enumerate(itertools.pairwise(edges)):
        first = max(0, chunk - band + 1)
        mine = Slots(
            *(p[:, :, first : chunk + 1].reshape(2, 2, 1, -1, 2, 8) for p in slots[:2]),
            slots.valid[:, first : chunk + 1].reshape(2, 1, -1),
        )
        out, cache = run(
            decoder, tokens[:, start:stop], preface=preface, slots=mine, cache=cache, start=START
        )
        pieces.append(np.asarray(out))
    np.testing.assert_allclose(whole, np.concatenate(pieces, axis=1), rtol=0, atol=1e-5)


def test_cached_decoding_equals_one_pass_and_never_reads_behind_the_length():
    decoder = tiny_decoder()
    preface, slots = memories_for(decoder, batch=2, chunks=1)
    tokens = random_tokens(1, 2, 9)
    whole = logits(decoder, tokens, preface=preface, slots=slots, start=START)
    cache = empty_cache(decoder.config, batch=2, length=12)
    # What has not been written must not be read. A masked value is still multiplied by a weight of
    # exactly 0 in the plain definition, so the poison is large but finite.
    cache = cache._replace(layers=jax.tree.map(lambda part: part + 1e4, cache.layers))
    steps = []
    for t in range(9):
        out, cache = run(
            decoder, tokens[:, t : t + 1], preface=preface, slots=slots, cache=cache, start=START
        )
        steps.append(np.asarray(out))
    np.testing.assert_allclose(whole, np.concatenate(steps, axis=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("band", [1, 3])
def test_single_tokens_decoded_with_a_grid_read_their_own_chunks_slots(band):
    decoder = tiny_decoder()
    preface, slots = memories_for(decoder, batch=2, chunks=3)
    tokens, grid = random_tokens(1, 2, 10), ChunkGrid(length=4, band=band)
    reads = dict(preface=preface, slots=slots, grid=grid, start=START)
    whole = logits(decoder, tokens, **reads)
    cache, steps = empty_cache(decoder.config, batch=2, length=12), []
    for t in range(10):
        out, cache = run(decoder, tokens[:, t : t + 1], cache=cache, **reads)
        steps.append(np.asarray(out))
    np.testing.assert_allclose(whole, np.concatenate(steps, axis=1), rtol=0, atol=2e-5)


def test_a_context_token_never_sees_the_future():
    decoder = tiny_decoder()
    tokens = random_tokens(1, 1, 10)
    changed = tokens.at[0, 6].set(8)
    one, other = logits(decoder, tokens), logits(decoder, changed)
    np.testing.assert_array_equal(one[:, :6], other[:, :6])
    assert np.abs(one[:, 6:] - other[:, 6:]).max() > 1e-3


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_value_and_no_gradient(remat):
    decoder = tiny_decoder()
    again = tiny_decoder(dataclasses.replace(decoder.config, remat=remat))
    tokens = random_tokens(1, 2, 8)

    def loss(params, graphdef):
        model = nnx.merge(graphdef, params)
        return jnp.mean(jnp.square(model.logits(model(tokens)[0])))

    gradient_of = jax.jit(jax.value_and_grad(loss), static_argnums=1)

    results = []
    for model in (decoder, again):
        graphdef, params = nnx.split(model)
        value, gradient = gradient_of(nnx.to_pure_dict(params), graphdef)
        results.append((value, gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    decoder = tiny_decoder(tiny_config(compute_dtype="bfloat16"))
    out, cache = run(decoder, random_tokens(1, 1, 5))
    assert cache.layers[0].keys.dtype == jnp.bfloat16
    assert out.dtype == jnp.float32
    assert decoder.embedding[...].dtype == jnp.float32


# ---------------------------------------------------------------------------- packed texts


@pytest.mark.parametrize("read", [False, True])
def test_texts_packed_in_a_row_equal_each_text_alone(read):
    decoder = tiny_decoder()
    preface, slots = memories_for(decoder, batch=2, chunks=1)
    kwargs = dict(preface=preface, slots=slots, start=START) if read else {}
    texts = [random_tokens(seed, 2, length) for seed, length in ((1, 5), (2, 1), (3, 7))]
    segments = jnp.repeat(jnp.arange(3), jnp.asarray([5, 1, 7]), total_repeat_length=13)
    packed = logits(
        decoder,
        jnp.concatenate(texts, axis=1),
        segments=jnp.broadcast_to(segments, (2, 13)),
        **kwargs,
    )
    alone = np.concatenate([logits(decoder, text, **kwargs) for text in texts], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


def test_packed_texts_are_not_continued_from_a_cache():
    decoder = tiny_decoder()
    tokens = random_tokens(1, 2, 4)
    cache = empty_cache(decoder.config, batch=2, length=8)
    with pytest.raises(ValueError, match="cannot be continued from a cache"):
        decoder(tokens, segments=jnp.zeros((2, 4), jnp.int32), cache=cache)


def test_a_decoder_with_its_layers_apart_and_their_products_joined_computes_the_same():
    decoder = tiny_decoder()
    preface, slots = memories_for(decoder, batch=2, chunks=1)
    tokens = random_tokens(1, 2, 9)
    reads = dict(preface=preface, slots=slots, start=START)
    graphdef, params = nnx.split(decoder)
    apart = nnx.merge(*unstack(graphdef, nnx.to_pure_dict(params)))
    weights = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(apart))}
    assert "inner" in weights and not weights & {"query", "key", "value", "gate", "up"}
    whole = logits(decoder, tokens, **reads)
    np.testing.assert_allclose(logits(apart, tokens, **reads), whole, rtol=0, atol=1e-5)
