"""Laws of writing memories, and of reading back what was stored: Memory³ spec tests 4, 6 and 7."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlab.config import MemoryConfig, ModelConfig
from jaxlab.memory.header import BankIdentity, BankSpec
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.write import as_slots, encode_references, from_stored, to_stored
from jaxlab.models.decoder import (
    abstract_decoder,
    context_start,
    encode_preface,
)
from jaxlab.models.presets import PRESETS
from kernels_pallas.memory_attention import ChunkGrid
from tests.inference.small import (
    LETTERS,
    TEXTS,
    letters,
    small_bank,
    small_encoder,
    small_model,
)
from tests.models.tiny import (
    PREFACE,
    random_tokens,
    run,
    tiny_decoder,
    tiny_memory,
    write,
)

LENGTHS = np.array([12, 3, 0, 12], np.int32)


def test_a_memory_of_memory3_2b_has_the_papers_shape_and_size():
    """(22, 2, 8, 8, 80) and 450,560 bytes in bfloat16; nothing is computed or allocated."""
    config = ModelConfig(**PRESETS["memory3-2b"])
    graphdef, params = abstract_decoder(config)

    def encode(params, tokens, lengths):
        decoder = nnx.merge(graphdef, params)
        preface = encode_preface(decoder, jnp.zeros(3, jnp.int32))
        memory = MemoryConfig()
        return to_stored(
            encode_references(decoder, tokens, lengths, preface=preface, memory=memory)
        )

    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((5, 128), (5,)))
    stored = jax.eval_shape(encode, params, tokens, lengths)
    assert stored.shape == (5, 22, 2, 8, 8, 80) and stored.dtype == jnp.bfloat16
    spec = BankSpec(
        identity=BankIdentity("m", "t", "c"),
        memory_shape=stored.shape[1:],
        embedder="model",
        embedding_dim=1,
    )
    assert spec.bytes_per_reference == stored.size // 5 * 2 == 450_560


def test_a_reference_is_encoded_alike_alone_and_in_any_company():
    decoder, tokens = tiny_decoder(), random_tokens(0, 4, 12)
    _, together = write(decoder, tokens, LENGTHS)
    order = np.array([3, 1, 2, 0])
    _, others = write(decoder, tokens[order], LENGTHS[order])
    _, alone = write(decoder, tokens[1:2], LENGTHS[1:2])
    for part, moved, one in zip(together[:2], others[:2], alone[:2], strict=True):
        np.testing.assert_allclose(moved, part[:, order], rtol=0, atol=1e-6)
        np.testing.assert_allclose(one[:, :, :3], part[:, 1:2, :3], rtol=0, atol=1e-6)


def test_what_stands_behind_a_short_reference_changes_nothing():
    decoder, tokens = tiny_decoder(), random_tokens(0, 4, 12)
    noise = jnp.where(np.arange(12) < LENGTHS[:, None], tokens, random_tokens(9, 4, 12))
    assert (noise != tokens).any()
    _, one = write(decoder, tokens, LENGTHS)
    _, other = write(decoder, noise, LENGTHS)
    for part, same in zip(one[:2], other[:2], strict=True):
        real = np.asarray(one.valid)[None, :, :, None, None]
        np.testing.assert_array_equal(np.where(real, part, 0), np.where(real, same, 0))


def test_valid_slots_are_as_many_as_the_reference_has_tokens():
    _, memories = write(tiny_decoder(), random_tokens(0, 4, 12), LENGTHS)
    np.testing.assert_array_equal(
        np.asarray(memories.valid).astype(int),
        [[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    )
    assert all(np.isfinite(part).all() for part in memories[:2])


def embedding_gradient(references, loss, *, memory):
    """Gradient of a loss of the memories with respect to the embedding of each token, by jit."""
    graphdef, params = nnx.split(tiny_decoder())
    params = nnx.to_pure_dict(params)

    def whole(embedding, params):
        decoder = nnx.merge(graphdef, {**params, "embedding": embedding})
        preface = encode_preface(decoder, jnp.asarray(PREFACE))
        lengths = jnp.asarray([12, 12, 0, 5])
        return loss(
            decoder,
            preface,
            encode_references(decoder, references, lengths, preface=preface, memory=memory),
        )

    return np.asarray(jax.jit(jax.grad(whole))(params["embedding"], params))


# Each token stands in one place: reference 2 has length 0, the last one only 5 tokens.
DISTINCT = jnp.arange(10, 58).reshape(4, 12)


def test_gradients_flow_from_the_context_through_the_references():
    context = jnp.array([[1, *[7, 8, 9] * 5]])

    def loss(decoder, preface, memories):
        hidden, _ = decoder(
            context,
            preface=preface,
            slots=as_slots(memories, batch=1),
            grid=ChunkGrid(length=4, band=3),
            start=context_start(len(PREFACE), 12),
        )
        return jnp.sum(jnp.sin(hidden))

    gradient = embedding_gradient(DISTINCT, loss, memory=tiny_memory())
    sizes = np.abs(gradient).sum(axis=1)
    assert np.isfinite(gradient).all() and (sizes[[1, 7, 8, 9]] > 1e-4).all()
    assert (sizes[34:46] == 0).all() and (sizes[51:58] == 0).all()
    assert (np.concatenate([sizes[10:34], sizes[46:51]]) > 1e-6).mean() > 0.6


def test_stopped_gradients_are_zero():
    def loss(decoder, preface, memories):
        return jnp.sum(memories.keys) + jnp.sum(jnp.sin(memories.values))

    assert not embedding_gradient(DISTINCT, loss, memory=tiny_memory(stop_gradient=True)).any()


def test_storing_and_loading_is_only_another_order():
    _, memories = write(tiny_decoder(), random_tokens(0, 4, 12), LENGTHS)
    stored = jax.jit(to_stored)(memories)
    assert stored.shape == (4, 2, 2, 2, 4, 8)
    np.testing.assert_array_equal(stored[3, 1, 0, 1, 2], memories.keys[1, 3, 2, 1])
    np.testing.assert_array_equal(stored[3, 1, 1, 1, 2], memories.values[1, 3, 2, 1])
    ours = as_slots(memories, batch=2)
    theirs = jax.jit(from_stored)(
        stored.reshape(2, 2, 1, *stored.shape[1:]), memories.valid.reshape(2, 2, 1, 4)
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    # Several references a chunk: their slots stand one behind the other.
    both = jax.jit(from_stored)(
        stored.reshape(1, 2, 2, *stored.shape[1:]), memories.valid.reshape(1, 2, 2, 4)
    )
    np.testing.assert_array_equal(both.keys[:, 0, 1, 4:], memories.keys[:, 3])
    np.testing.assert_array_equal(both.valid[0, 0], memories.valid[:2].reshape(-1))


def reference_tokens(model):
    encoded = [model.tokenizer.encode(text) for text in TEXTS]
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    tokens = np.zeros((len(TEXTS), 12), np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    return tokens, lengths


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bank_on_a_disk_gives_back_the_bits_that_were_encoded(tmp_path, dtype):
    bank = small_bank(tmp_path, dtype=dtype)
    tokens, lengths = reference_tokens(small_model(dtype))
    encoded = small_encoder(dtype)(tokens, lengths)
    found = bank.read(np.arange(len(TEXTS)))
    assert found.memories.dtype == jnp.dtype(dtype)
    assert found.memories.tobytes() == encoded.tobytes()
    np.testing.assert_array_equal(found.kept, np.minimum(lengths, 4))


def test_a_stored_memory_reads_like_one_made_on_the_fly(tmp_path):
    """From a bank on a disk, the same logits as with the memories of the training step."""
    model = small_model()
    bank = small_bank(tmp_path)
    tokens, lengths = reference_tokens(model)

    @jax.jit
    def encode(params, preface, tokens, lengths):
        decoder, memory = nnx.merge(model.graphdef, params), model.config.memory
        return encode_references(decoder, tokens, lengths, preface=preface, memory=memory)

    fresh = as_slots(encode(model.params, model.preface, tokens[:4], lengths[:4]), batch=1)
    reader = MemoryReader.open(bank, model_embed=letters)
    stored, other = (reader.slots(ids.reshape(1, 4, 1)) for ids in (np.arange(4), np.arange(4) + 4))
    context = np.array([[model.tokenizer.bos_id, *model.tokenizer.encode(LETTERS * 2)]], np.int32)
    decoder = nnx.merge(model.graphdef, model.params)
    reading = dict(
        preface=model.preface, grid=ChunkGrid(length=4, band=1), start=model.context_start
    )
    logits = [np.asarray(run(decoder, context, slots=s, **reading)[0]) for s in (fresh, stored)]
    np.testing.assert_allclose(*logits, rtol=0, atol=2e-5)
    assert np.abs(run(decoder, context, slots=other, **reading)[0] - logits[0]).max() > 0.2
