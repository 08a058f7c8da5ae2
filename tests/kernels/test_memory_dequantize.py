"""Laws of decoding: the definition against FAISS and loops, the TPU kernel against that."""

import functools

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from kernels_pallas import dispatch
from kernels_pallas.memory_dequantize import Codebook, memory_dequantize, unpack_bits
from tests.kernels import simulated


def codebook_of(index) -> Codebook:
    """The codebook of a trained FAISS index ``OPQm_d,Residual2xb,PQnxb``."""
    transform = faiss.downcast_VectorTransform(index.chain.at(0))
    assert not transform.have_bias
    rotation = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
    levels = faiss.downcast_index(index.index)
    halves = faiss.downcast_index(levels.q1.quantizer).pq

    def centroids(pq):
        return faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)

    return Codebook(*map(jnp.asarray, (centroids(halves), centroids(levels.pq), rotation)))


def random_codebook(dims=16, bits=(5, 4), parts=4, seed=0, dtype=np.float32):
    draw = np.random.default_rng(seed)
    shapes = (2, 2 ** bits[0], dims // 2), (parts, 2 ** bits[1], dims // parts), (dims, dims)
    return Codebook(*(jnp.asarray(draw.standard_normal(shape), dtype) for shape in shapes))


def random_codes(codebook, *shape, seed=0):
    draw = np.random.default_rng(seed)
    return jnp.asarray(draw.integers(0, 256, (*shape, sum(codebook.widths)), np.uint8))


@functools.partial(jax.jit, static_argnames=("target", "dtype"))
def decode(codes, codebook, index=None, *, target="cpu", dtype="float32"):
    """One program; ``target`` only tells apart programs of different platforms."""
    return memory_dequantize(codes, codebook, index=index, dtype=jnp.dtype(dtype))


def by_tpu(*args, **kwargs):
    with simulated.tpu():
        return np.asarray(decode(*args, target="tpu", **kwargs))


def test_decoding_equals_faiss_for_an_index_of_the_papers_family():
    rows = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    index = faiss.index_factory(16, "OPQ4_16,Residual2x5,PQ4x4")
    # Fewer rounds than by default: a second of training, and any codebook serves.
    opq = faiss.downcast_VectorTransform(index.chain.at(0))
    opq.niter, opq.niter_pq = 2, 2
    index.train(rows)
    codes, codebook = index.sa_encode(rows), codebook_of(index)
    assert codebook.level1.shape == (2, 32, 8) and codebook.level2.shape == (4, 16, 4)
    np.testing.assert_allclose(decode(codes, codebook), index.sa_decode(codes), atol=1e-5)


@pytest.mark.parametrize(("count", "bits"), [(2, 14), (8, 10), (3, 16), (5, 1), (4, 4), (3, 11)])
def test_unpacking_equals_a_walk_over_the_bits(count, bits):
    packed = np.random.default_rng(bits).integers(0, 256, (3, -(-count * bits // 8)), np.uint8)
    found = unpack_bits(jnp.asarray(packed), count, bits)
    for row, numbers in zip(packed, found, strict=True):
        stream = [(int(byte) >> place) & 1 for byte in row for place in range(8)]
        for n in range(count):
            one = stream[n * bits : (n + 1) * bits]
            assert numbers[n] == sum(bit << place for place, bit in enumerate(one))


def test_the_papers_codec_takes_14_bytes_and_adds_two_levels_before_rotating():
    codebook = random_codebook(80, (14, 10), 8)
    assert codebook.bits == (14, 10) and codebook.widths == (4, 10)
    codes = random_codes(codebook, 5)
    whole = np.array([int.from_bytes(row.tobytes(), "little") for row in np.asarray(codes)])
    for word, found in zip(whole, decode(codes, codebook), strict=True):
        halves = [np.asarray(codebook.level1[m, (word >> 14 * m) % 2**14]) for m in range(2)]
        parts = [np.asarray(codebook.level2[m, (word >> 32 + 10 * m) % 2**10]) for m in range(8)]
        rotated = np.concatenate(halves).astype(float) + np.concatenate(parts)
        np.testing.assert_allclose(found, rotated @ codebook.rotation, rtol=1e-4, atol=1e-4)


def test_rows_are_gathered_by_slot_in_the_layout_of_the_index():
    codebook = random_codebook()
    codes = random_codes(codebook, 9)
    every = np.asarray(decode(codes, codebook))
    index = np.random.default_rng(1).integers(0, 9, (2, 3, 4))
    for run in (decode, by_tpu):
        np.testing.assert_array_equal(run(codes, codebook, index), every[index])
    # A slot may hold an array of codes: layers, keys and values, tokens and heads of a reference.
    entries = random_codes(codebook, 3, 2, 5)
    chosen = np.array([2, 0])
    wanted = np.asarray(decode(entries.reshape(30, -1), codebook)).reshape(3, 2, 5, 16)[chosen]
    for run in (decode, by_tpu):
        np.testing.assert_array_equal(run(entries, codebook, chosen), wanted)


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    count=st.sampled_from([1, 100, 128, 200]),
    codec=st.sampled_from([(80, (6, 8), 8), (16, (3, 4), 2), (64, (5, 2), 8), (128, (4, 9), 4)]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_the_tpu_kernel_equals_the_definition_for_any_count_and_codec(count, codec, dtype):
    dims, bits, parts = codec
    codebook = random_codebook(dims, bits, parts)
    codes = random_codes(codebook, count)
    found, wanted = by_tpu(codes, codebook, dtype=dtype), decode(codes, codebook, dtype=dtype)
    assert found.dtype == wanted.dtype == dtype
    # One rounding of bfloat16 apart where float32 sums in another order.
    rtol = 1e-5 if dtype == "float32" else 2**-7
    wanted = np.asarray(wanted, np.float32)
    np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=rtol, atol=1e-4)


def test_slots_and_centroids_that_no_code_names_are_never_read():
    codebook = random_codebook()
    codes, index = random_codes(codebook, 9), np.array([3, 5])
    halves = np.asarray(unpack_bits(codes[index, :2], 2, 5))
    parts = np.asarray(unpack_bits(codes[index, 2:], 4, 4))
    level1, level2 = (np.full(level.shape, np.nan, np.float32) for level in codebook[:2])
    for level, numbers, full in ((level1, halves, 0), (level2, parts, 1)):
        for m in range(level.shape[0]):
            level[m, numbers[:, m]] = codebook[full][m, numbers[:, m]]
    poisoned = Codebook(jnp.asarray(level1), jnp.asarray(level2), codebook.rotation)
    others = np.where(np.isin(np.arange(9), index)[:, None], codes, 255).astype(np.uint8)
    for run in (decode, by_tpu):
        clean = run(codes, codebook, index)
        np.testing.assert_array_equal(run(jnp.asarray(others), poisoned, index), clean)


def test_an_index_outside_the_bank_is_an_error_where_known_and_clamped_where_traced():
    codebook = random_codebook()
    codes = random_codes(codebook, 9)
    for wrong in (np.array([[0, 9]]), np.array([-1])):
        with pytest.raises(ValueError, match="index reaches from .* codes has slots 0 to 8"):
            memory_dequantize(codes, codebook, index=jnp.asarray(wrong))
    clamped = decode(codes, codebook, np.array([-7, 0, 8, 1000]))
    np.testing.assert_array_equal(clamped, np.asarray(decode(codes, codebook))[[0, 0, 8, 8]])
    for platform in ("cpu", "tpu"):
        with dispatch.lowering_for(platform):
            none = memory_dequantize(codes, codebook, index=jnp.zeros((0, 2), int))
        assert none.shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (dict(level1=(2, 31, 8)), {}, "codebook.level1 has 31 entries: a power of two"),
        (dict(level2=(4, 16, 3)), {}, "codebook.level2 has 4 x 3 dims, codebook.rotation 16"),
        (dict(codes=(9, 14)), {}, "codes has 14 bytes a vector, the codebook's codes take 4"),
        ({}, dict(dtype=jnp.float16), "dtype is .*float16.*: float32 or bfloat16"),
        ({}, dict(implementation="fast"), "no implementation named 'fast'"),
    ],
)
def test_wrong_arguments_are_named_with_the_rule(change, options, says):
    shapes = dict(level1=(2, 32, 8), level2=(4, 16, 4), rotation=(16, 16), codes=(9, 4)) | change
    codes = jnp.zeros(shapes.pop("codes"), jnp.uint8)
    codebook = Codebook(**{name: jnp.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match=says):
        memory_dequantize(codes, codebook, **options)


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        ((20, (3, 4), 2), "vectors of 20"),
        ((136, (3, 4), 2), "vectors of 136"),
        ((16, (16, 4), 2), "level 1 of 65536 entries does not fit"),
    ],
)
def test_what_the_tpu_kernel_cannot_take_is_said_and_never_replaced(codec, says):
    dims, bits, parts = codec
    shapes = (2, 2 ** bits[0], dims // 2), (parts, 2 ** bits[1], dims // parts), (dims, dims)
    codebook = Codebook(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    codes = jax.ShapeDtypeStruct((9, sum(codebook.widths)), jnp.uint8)
    decoded = functools.partial(memory_dequantize, implementation="tpu")
    with dispatch.lowering_for("tpu"), pytest.raises(NotImplementedError, match=says):
        jax.eval_shape(decoded, codes, codebook)
    with pytest.raises(NotImplementedError, match="made for tpu"):
        jax.eval_shape(decoded, codes, codebook)


def test_the_gpu_takes_gathers_of_xla_and_lowers_for_cuda():
    shapes = (2, 16384, 40), (8, 1024, 10), (80, 80)
    codebook = Codebook(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    codes = jax.ShapeDtypeStruct((1000, 14), jnp.uint8)
    index = jax.ShapeDtypeStruct((5, 8, 8), jnp.int32)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh), dispatch.lowering_for("gpu"):
        lowered = decode.trace(codes, codebook, index, target="gpu").lower(
            lowering_platforms=("cuda",)
        )
    assert "gather" in lowered.as_text() and "5x8x8x80xf32" in lowered.as_text()
