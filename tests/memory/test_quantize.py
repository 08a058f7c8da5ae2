"""The codec of keys and values: FAISS and JAX decode alike, and its size is what its name says."""

import faiss
import jax
import numpy as np
import pytest

from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.quantize import PAPER, Codec, Rate
from jaxlab.memory.rate import codec_for
from kernels_pallas.memory_dequantize import memory_dequantize

SMALL = "OPQ4_16,Residual2x5,PQ4x4"


def vectors(*shape: int, seed: int = 0) -> np.ndarray:
    """Rows whose numbers hang together, as those of keys do."""
    draw = np.random.default_rng(seed)
    mixed = draw.standard_normal((*shape, 16)) @ np.random.default_rng(9).standard_normal((16, 16))
    return mixed.astype(np.float32)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.fit(vectors(1300), SMALL, rounds=(2, 2))


def test_the_papers_rate_is_14_bytes_and_its_reference_39424():
    rate = Rate(PAPER)
    assert (rate.dim, rate.bytes, rate.least) == (80, 14, 16384)
    # 22 memory layers, keys and values, 8 heads, 8 tokens.
    assert 22 * 2 * 8 * 8 * rate.bytes == 39_424
    assert rate.bytes / (2 * rate.dim) == 0.0875


def test_jax_decodes_what_faiss_encodes(codec):
    codes = codec.encode(vectors(3, 2, 5, seed=1))
    assert codes.dtype == np.uint8 and codes.shape == (3, 2, 5, codec.rate.bytes)
    found = jax.jit(memory_dequantize)(codes, codec.codebook)
    np.testing.assert_allclose(found, codec.decode(codes), atol=1e-5)


def test_the_error_is_small_and_smaller_with_more_bits(codec):
    rows = vectors(400, seed=2)

    def error(codec):
        return np.linalg.norm(codec.decode(codec.encode(rows)) - rows) / np.linalg.norm(rows)

    assert error(codec) < 0.6  # 26 bits for 16 numbers
    finer = Codec.fit(vectors(1300), "OPQ4_16,Residual2x5,PQ8x5", rounds=(2, 2))
    assert error(finer) < 0.8 * error(codec)


def test_a_codec_comes_back_from_its_bytes(codec):
    again = Codec.from_bytes(SMALL, codec.to_bytes())
    assert again.to_bytes() == codec.to_bytes()
    rows = vectors(20, seed=3)
    np.testing.assert_array_equal(again.encode(rows), codec.encode(rows))
    same = Codec.fit(vectors(1300), SMALL, rounds=(2, 2))
    assert same.to_bytes() == codec.to_bytes()  # training draws nothing that differs


def test_training_is_as_faiss_does_it_but_quiet(codec, capfd):
    index = faiss.index_factory(16, SMALL)
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    rotation.niter, rotation.niter_pq = 2, 2
    index.train(vectors(1300))
    assert faiss.serialize_index(index).tobytes() == codec.to_bytes()
    assert "WARNING" in capfd.readouterr().err
    Codec.fit(vectors(1300), SMALL, rounds=(2, 2))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dim", [2, 6, 8, 16, 32, 64, 100, 128])
def test_a_codec_is_proposed_that_few_vectors_of_any_even_width_train(dim):
    few = np.random.default_rng(dim).standard_normal((300, dim)).astype(np.float32)
    made = Codec.fit(few, codec_for(dim), rounds=(1, 1))
    assert made.decode(made.encode(few)).shape == few.shape
    assert codec_for(80) == PAPER and codec_for(dim + 1) is None


def test_what_is_no_codec_is_refused(codec):
    state = codec.to_bytes()
    with pytest.raises(BankError, match=f"codec {SMALL}: cannot be read"):
        Codec.from_bytes(SMALL, state[:100])
    with pytest.raises(BankError, match="what is stored is another codec"):
        Codec.from_bytes("OPQ4_16,Residual2x5,PQ8x4", state)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("PQ8", vectors(9), "codec 'PQ8': is not of the kind OPQm_d,Residual2xb,PQnxb"),
        ("OPQ4_16,Residual2x5,PQ3x4", vectors(9), "2, 4 and 3 must all divide its dimension 16"),
        (PAPER, vectors(9), "is for vectors of 80 numbers, these have 16: .* as OPQ4_16,Residual"),
        (SMALL, vectors(9), "is trained on 256 vectors or more, here are 9"),
    ],
)
def test_what_cannot_be_fitted_is_named(name, rows, message):
    with pytest.raises(ConfigError, match=message):
        Codec.fit(rows, name)
