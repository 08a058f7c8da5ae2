"""Laws of memory decoding: the definition against a loop, every implementation against it."""

import contextlib
import functools
import io
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,
    force_gpu_interpret_mode,
)
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kernels_pallas import dispatch
from kernels_pallas.memory_decode import blocked, gpu, memory_decode, plan, tpu
from tests.kernels import simulated

# Float32 sums in another order. Bfloat16: weights and result are each rounded to 8 bits, and the
# result is a mean of values.
FLOAT32 = dict(rtol=0, atol=2e-6)
BFLOAT16 = 2.0**-8


def arrays(
    lengths=(5, 0, 32),
    *,
    tokens=32,
    kv_heads=2,
    group=2,
    head_dim=16,
    preface=2,
    slots=5,
    dtype=np.float32,
    tokens_per_row=1,
    seed=0,
):
    """Arguments of memory decoding with random contents."""
    draw, batch = np.random.default_rng(seed), len(lengths)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape, np.float32), dtype)

    cache = batch, tokens // tokens_per_row, tokens_per_row * kv_heads * head_dim
    found = {
        "query": normal(batch, kv_heads * group, head_dim),
        "key": normal(*cache),
        "value": normal(*cache),
        "lengths": jnp.asarray(lengths, jnp.int32),
    }
    if tokens_per_row > 1:
        found["tokens_per_row"] = tokens_per_row
    if preface:
        found["preface"] = tuple(normal(preface, kv_heads, head_dim) for _ in range(2))
    if slots:
        found["slots"] = tuple(normal(batch, slots, kv_heads, head_dim) for _ in range(2))
        found["slot_valid"] = jnp.asarray(draw.random((batch, slots, kv_heads)) < 0.6)
    return found


@contextlib.contextmanager
def simulated_tpu(block_rows=None):
    """``block_rows``: rows of a block of the cache, to have several in a small one."""
    rows = block_rows or plan.MOST_BLOCK_ROWS
    with simulated.tpu(), mock.patch.object(plan, "MOST_BLOCK_ROWS", rows):
        yield


# Quick to compile: the programs are large, the arrays tiny.
@functools.partial(
    jax.jit,
    static_argnames=("tokens_per_row", "implementation", "blocks"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def compiled(arrays, *, implementation, blocks=None, tokens_per_row=1):
    """One program; ``blocks`` only tells apart programs of different block sizes."""
    return memory_decode(**arrays, tokens_per_row=tokens_per_row, implementation=implementation)


def run(given, implementation, blocks=None):
    """``given`` computed with jit."""
    arrays = dict(given)
    fixed = dict(tokens_per_row=arrays.pop("tokens_per_row", 1), implementation=implementation)
    return jax.block_until_ready(compiled(arrays, blocks=blocks, **fixed))


def on_tpu(given, block_rows=None):
    """The TPU kernel, simulated."""
    with simulated_tpu(block_rows):
        return run(given, "tpu", block_rows)


@contextlib.contextmanager
def simulated_gpu():
    """Copies, barriers and races of a GPU; its products and register layouts have no simulation."""

    def dot(a, b, contract):
        return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)

    plain = {
        (gpu, "_scores"): lambda query, keys: dot(query[...], keys[...], ((1,), (1,))),
        (gpu, "_weigh"): lambda weights, values: dot(weights, values[...], ((1,), (0,))),
        (gpu.plgpu, "layout_cast"): lambda array, layout: array,
        (gpu.plgpu, "broadcasted_iota"): lambda *args, layout: jax.lax.broadcasted_iota(*args),
        (gpu, "WANTED"): 8,
    }
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        for (module, name), value in plain.items():
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(dispatch.lowering_for("gpu"))
        stack.enter_context(force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)))
        stack.enter_context(contextlib.redirect_stdout(printed))
        yield
    assert "RACE" not in printed.getvalue()


def on_gpu(given):
    """The GPU kernel, simulated."""
    with simulated_gpu():
        return run(given, "gpu")


def in_blocks(given):
    """The cache walked in blocks of 20 tokens, which divides no cache here."""
    with mock.patch.object(blocked, "BLOCK", 20):
        return run(given, "blocked")


def defined(given):
    """The definition."""
    return run(given, "xla")


def by_loop(given):
    """The visible keys and values of one sequence and head at a time, in float64."""
    query = np.asarray(given["query"], np.float64)
    batch, heads, head_dim = query.shape
    out = np.zeros(query.shape)
    rows = [np.asarray(given[n], np.float64).reshape(batch, -1, head_dim) for n in ("key", "value")]
    tokens = given["key"].shape[1] * given.get("tokens_per_row", 1)
    rows = [part.reshape(batch, tokens, -1, head_dim) for part in rows]
    for b in range(batch):
        for n in range(heads):
            k = n // (heads // rows[0].shape[2])
            kinds = []
            for which in range(2):
                parts = [rows[which][b, : given["lengths"][b], k]]
                if "preface" in given:
                    parts.append(given["preface"][which][:, k])
                if "slots" in given:
                    valid = np.asarray(given["slot_valid"][b, :, k])
                    parts.append(np.asarray(given["slots"][which][b, :, k])[valid])
                kinds.append(np.concatenate(parts))
            keys, values = kinds
            if len(keys):
                weights = np.exp(keys @ query[b, n] / np.sqrt(head_dim))
                out[b, n] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("parts", [{}, dict(preface=0), dict(slots=0), dict(preface=0, slots=0)])
def test_the_definition_is_one_softmax_over_what_is_visible(parts):
    given = arrays(**parts)
    np.testing.assert_allclose(defined(given), by_loop(given), **FLOAT32)


SHAPES = dict(
    lengths=st.lists(
        st.one_of(st.sampled_from([0, 1, 48]), st.integers(0, 48)), min_size=1, max_size=4
    ),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([8, 16]),
    preface=st.integers(0, 3),
    slots=st.integers(0, 4),
    tokens_per_row=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)


def drawn(examples):
    def both(test):
        rules = settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],  # each smaller example would be two more programs
            suppress_health_check=list(HealthCheck),
        )
        return rules(given(**SHAPES)(test))

    return both


@drawn(5)
def test_blocks_give_what_the_definition_gives(**shapes):
    given = arrays(tokens=48, **shapes)
    np.testing.assert_allclose(in_blocks(given), defined(given), **FLOAT32)


@drawn(4)
def test_the_tpu_kernel_gives_what_the_definition_gives(**shapes):
    given = arrays(tokens=48, **shapes)
    np.testing.assert_allclose(on_tpu(given), defined(given), **FLOAT32)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_head_dims_need_no_padding_by_the_caller(head_dim):
    given = arrays((1, 17), head_dim=head_dim, preface=1, slots=1)
    np.testing.assert_allclose(on_tpu(given), defined(given), **FLOAT32)


# More blocks than buffers, with empty sequences before, between and behind, and blocks of which
# nothing, one row, a part, or everything is visible.
LONG = dict(lengths=(0, 641, 0, 0, 128, 1, 704, 256, 0), tokens=704, slots=3)


def test_blocks_follow_each_other_through_the_ring_across_sequences():
    given = arrays(**LONG)
    np.testing.assert_allclose(on_tpu(given, block_rows=128), defined(given), **FLOAT32)


@pytest.mark.parametrize("tokens_per_row", [1, 4])
def test_splits_of_the_cache_give_what_the_whole_gives(tokens_per_row):
    given = arrays((300, 1, 0), tokens=320, tokens_per_row=tokens_per_row, kv_heads=1, slots=0)
    given["preface"] = tuple(part.reshape(2, -1) for part in given["preface"])
    whole = defined(given)
    with simulated_tpu(block_rows=128):
        decode = jax.jit(
            functools.partial(tpu.memory_decode, tokens_per_row=tokens_per_row, splits=3),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        given.pop("tokens_per_row", None)
        split = jax.block_until_ready(decode(**given))
    np.testing.assert_allclose(split, whole, **FLOAT32)


@pytest.mark.parametrize("decode", [on_tpu, in_blocks, defined])
def test_bfloat16_is_within_its_two_roundings(decode):
    given = arrays((47, 0, 48), tokens=48, dtype=jnp.bfloat16, head_dim=80)
    exact = by_loop(
        jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x, given)
    )
    found = decode(given)
    assert found.dtype == jnp.bfloat16
    largest = max(float(jnp.abs(part).max()) for part in (given["value"], given["slots"][1]))
    np.testing.assert_allclose(found.astype(np.float32), exact, rtol=0, atol=BFLOAT16 * largest)


def test_the_gpu_kernel_gives_what_the_definition_gives_and_reads_nothing_else():
    given = arrays((300, 0, 512, 65), tokens=512, dtype=jnp.bfloat16, head_dim=80, group=3)
    exact = by_loop(
        jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x, given)
    )
    found = on_gpu(poisoned(given))
    largest = max(float(jnp.abs(part).max()) for part in (given["value"], given["slots"][1]))
    np.testing.assert_allclose(found.astype(np.float32), exact, rtol=0, atol=BFLOAT16 * largest)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_the_gpu_kernel_lowers_for_cuda(head_dim):
    given = arrays((0,), tokens=4096, dtype=jnp.bfloat16, head_dim=head_dim, kv_heads=8, group=5)
    mesh = AbstractMesh(
        (1,),
        ("x",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice("NVIDIA H200", None, platform="gpu"),
    )
    with jax.sharding.use_abstract_mesh(mesh), dispatch.lowering_for("gpu"):
        traced = jax.jit(lambda given: memory_decode(**given, implementation="gpu")).trace(given)
        lowered = traced.lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def poisoned(given):
    """NaN in every cache row behind the lengths and in every empty slot."""
    batch, tokens = given["key"].shape[0], given["key"].shape[1] * given.get("tokens_per_row", 1)
    behind = np.arange(tokens) >= np.asarray(given["lengths"])[:, None]
    found = dict(given)
    for name in ("key", "value"):
        rows = given[name].reshape(batch, tokens, -1)
        found[name] = jnp.where(behind[..., None], jnp.nan, rows).reshape(given[name].shape)
    valid = given["slot_valid"][..., None]
    found["slots"] = tuple(jnp.where(valid, part, jnp.nan) for part in given["slots"])
    return found


@pytest.mark.parametrize("tokens_per_row", [1, 2])
@pytest.mark.parametrize("decode", [on_tpu, in_blocks, defined])
def test_what_is_not_visible_is_never_read(decode, tokens_per_row):
    given = arrays((5, 0, 31), tokens_per_row=tokens_per_row)
    assert np.isnan(poisoned(given)["value"]).any() and np.isnan(poisoned(given)["slots"][1]).any()
    found = decode(given)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(decode(poisoned(given)), found)


@pytest.mark.parametrize("decode", [on_tpu, in_blocks, defined])
def test_empty_slots_alone_are_as_none(decode):
    given = arrays((7, 0))
    given["slot_valid"] = jnp.zeros((2, 5), bool)
    none = {name: part for name, part in given.items() if name not in ("slots", "slot_valid")}
    np.testing.assert_allclose(decode(given), decode(none), **FLOAT32)


@pytest.mark.parametrize("decode", [on_tpu, in_blocks, defined])
def test_zeros_come_out_where_nothing_is_visible(decode):
    given = arrays((0, 3), preface=0)
    given["slot_valid"] = given["slot_valid"].at[0].set(False).at[0, 1, 1].set(True)
    found = decode(given)
    assert (found[0, :2] == 0).all()  # heads of the first kv head, which has no slot
    assert (decode(arrays((0,), preface=0, slots=0)) == 0).all()
    np.testing.assert_allclose(found, by_loop(given), **FLOAT32)


def test_flat_and_apart_are_the_same():
    given = arrays()
    flat = lambda pair: tuple(part.reshape(*part.shape[:-2], -1) for part in pair)  # noqa: E731
    apart = lambda rows: rows.reshape(3, 32, 2, 16)  # noqa: E731
    other = {
        **given,
        "key": apart(given["key"]),
        "value": apart(given["value"]),
        "preface": flat(given["preface"]),
        "slots": flat(given["slots"]),
    }
    np.testing.assert_array_equal(defined(given), defined(other))


def test_all_slots_count_where_no_validity_is_given_and_heads_share_theirs_where_it_is_flat():
    given = arrays()
    valid = given["slot_valid"][..., 0]
    spread = jnp.repeat(valid[..., None], 2, axis=-1)
    both = (defined({**given, "slot_valid": part}) for part in (valid, spread))
    np.testing.assert_array_equal(*both)
    del given["slot_valid"]
    full = {**given, "slot_valid": jnp.ones((3, 5), bool)}
    np.testing.assert_array_equal(defined(given), defined(full))
