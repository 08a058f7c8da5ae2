"""Laws of token selection: kernels against the definition, which loops hold in tests/memory.

Two ways of summing round differently, so the choice is defined up to rounding: tokens whose
received logarithms are closer than ``ROUNDING`` may change places, all others not. Tokens that are
exactly alike receive exactly alike, in every implementation, and go by index.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from kernels_pallas import dispatch
from kernels_pallas.memory_select import attention_received, gpu, memory_select
from tests.kernels import simulated

# In the kernel a mean is a sum and "first" is a matter of what is passed in, for both selections.
FORMS = [
    ("softmax", "sum"),
    ("softmax", "max"),
    ("exponential", "sum"),
    ("exponential", "max"),
    ("exponential", "first"),
]
LENGTHS = [0, 1, 5, 127, 128]
ROUNDING = 2e-5


def references(lengths, *, width=128, kv_heads=2, group=2, head_dim=8, dtype=np.float32, seed=0):
    """Queries, keys and validity of references with so many valid tokens each, these in front."""
    draw = np.random.default_rng(seed)
    query = draw.standard_normal((len(lengths), width, kv_heads * group, head_dim), np.float32)
    key = draw.standard_normal((len(lengths), width, kv_heads, head_dim), np.float32)
    valid = np.arange(width) < np.array(lengths)[:, None]
    return jnp.asarray(query, dtype), jnp.asarray(key, dtype), valid


@functools.partial(jax.jit, static_argnames=("target", "received", "form"))
def run(*given, target, received, form):
    """One program; ``target`` only tells apart programs of different platforms."""
    form = dict(form)
    chosen = memory_select(*given, **form)
    del form["kept"]
    return (attention_received(*given, **form) if received else None), chosen


def by_definition(given, *, received=True, **form):
    """What tokens receive and which are kept, on the platform at hand."""
    form = tuple(sorted(form.items()))
    return jax.tree.map(np.asarray, run(*given, target="cpu", received=received, form=form))


def by_tpu(given, *, received=True, **form):
    form = tuple(sorted(form.items()))
    with simulated.tpu():
        return jax.tree.map(np.asarray, run(*given, target="tpu", received=received, form=form))


def assert_same(found, wanted, valid):
    """Received logarithms agree, and so does the choice, up to places closer than rounding."""
    (received, chosen), (reference, expected) = found, wanted
    finite = np.isfinite(reference)
    if received is not None:
        np.testing.assert_array_equal(np.isneginf(received), ~finite)
        np.testing.assert_allclose(
            received[finite], reference[finite], rtol=ROUNDING, atol=ROUNDING
        )
    assert (np.diff(np.sort(chosen, axis=-1), axis=-1) > 0).all(), "a token was kept twice"
    ranks = np.where(finite, reference, np.where(valid[:, None], -1e38, -2e38))
    for b, k, m in np.argwhere(chosen != expected):
        mine, theirs = ranks[b, k, chosen[b, k, m]], ranks[b, k, expected[b, k, m]]
        np.testing.assert_allclose(mine, theirs, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(("selection", "pooling"), FORMS)
def test_the_tpu_kernel_equals_the_definition_at_every_length(selection, pooling):
    given = references(LENGTHS)
    form = dict(kept=8, selection=selection, pooling=pooling)
    assert_same(by_tpu(given, **form), by_definition(given, **form), given[2])


def test_the_tpu_kernel_equals_the_definition_in_bfloat16():
    given = references([5, 128], kv_heads=8, group=5, head_dim=80, dtype=jnp.bfloat16)
    found = by_tpu(given, kept=8, received=False)
    assert_same(found, by_definition(given, kept=8), given[2])


def test_indices_of_many_references_fill_several_tiles_and_part_of_the_last():
    """Two references of four kv heads a step, three steps of 40 indices a tile."""
    given = references([40, 64, 50, 0, 41, 64, 64], width=64, kv_heads=4, group=1, head_dim=4)
    found = by_tpu(given, kept=40, received=False)
    assert_same(found, by_definition(given, kept=40), given[2])


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_the_tpu_kernel_equals_the_definition_for_any_shape_and_mask(data):
    """Any count of references, kv heads and tokens; valid tokens anywhere."""
    draw = data.draw
    width = draw(st.sampled_from([1, 2, 9, 64, 128]))
    batch = draw(st.integers(1, 9))
    query, key, _ = references(
        [0] * batch,
        width=width,
        kv_heads=draw(st.sampled_from([1, 2, 3, 9])),
        group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([4, 20, 80])),
    )
    valid = np.random.default_rng(draw(st.integers(0, 99))).random((batch, width)) < 0.6
    form = dict(
        kept=min(width, draw(st.sampled_from([1, 3, 8]))),
        selection=draw(st.sampled_from(["softmax", "exponential"])),
        pooling=draw(st.sampled_from(["sum", "max", "first"])),
    )
    given = query, key, valid
    assert_same(by_tpu(given, received=False, **form), by_definition(given, **form), valid)


def test_whole_numbers_are_ordered_exactly_and_equal_ones_by_index():
    """Scores that float32 holds exactly: all 128 tokens in the order of their steps, ties in front.

    Every giver gives a receiver the same, so the sum is a count times a power: no rounding differs.
    """
    query, key, valid = references([128, 100], kv_heads=1, head_dim=4)
    steps = np.random.default_rng(1).integers(0, 60, (2, 128, 1, 1))
    query, key = jnp.full(query.shape, 2.0), jnp.broadcast_to(steps, key.shape).astype(jnp.float32)
    order = np.argsort(-np.where(valid, steps[:, :, 0, 0], -1), axis=-1, kind="stable")
    for found in (by_tpu, by_definition):
        received, chosen = found((query, key, valid), kept=128)
        np.testing.assert_array_equal(chosen[:, 0], order)
        # Beyond the range of exp: the logarithms stay finite, and the differences are exact.
        assert received[0].max() > 200 and np.isfinite(received[0]).all()
        gap = received[0, 0] - received[0, 0, 0]
        np.testing.assert_allclose(gap, 4 * (steps[0] - steps[0, 0])[:, 0, 0], atol=1e-4)


@pytest.mark.parametrize("selection", ["softmax", "exponential"])
def test_tokens_alike_are_kept_by_index_and_valid_ones_before_the_rest(selection):
    query, key, valid = references(LENGTHS)
    alike = jnp.zeros_like(key)
    valid[0] = np.isin(np.arange(128), [0, 1, 2, *range(100, 128)])
    valid[1] = np.isin(np.arange(128), [4, 77])
    form = dict(kept=8, selection=selection, pooling="sum")
    expected = [[0, 1, 2, 100, 101, 102, 103, 104], [4, 77, 0, 1, 2, 3, 5, 6], [*range(8)]]
    for found in (by_tpu, by_definition):
        chosen = found((query, alike, valid), **form)[1]
        np.testing.assert_array_equal(chosen[:3], np.repeat(np.array(expected)[:, None], 2, axis=1))
    # All the attention goes to the last token: the others receive nothing and are valid still.
    key, query, valid[:, 127] = alike.at[:, 127].set(400.0), jnp.ones_like(query), True
    for found in (by_tpu, by_definition):
        chosen = found((query, key, valid), **form)[1]
        assert (chosen[:, :, 0] == 127).all()
        assert (np.sort(chosen[1, :, :3], axis=-1) == [4, 77, 127]).all()


@pytest.mark.parametrize("selection", ["softmax", "exponential"])
def test_what_lies_in_invalid_tokens_is_never_read(selection):
    query, key, valid = references(LENGTHS)
    form = dict(kept=8, selection=selection, pooling="sum")
    poisoned = [jnp.where(valid[:, :, None, None], part, jnp.nan) for part in (query, key)]
    for found in (by_tpu, by_definition):
        clean, spoilt = found((query, key, valid), **form), found((*poisoned, valid), **form)
        for one, other in zip(clean, spoilt, strict=True):
            np.testing.assert_array_equal(one, other)


def test_gradients_pass_through_what_is_gathered_and_not_through_the_choice():
    query, key, valid = references([9, 9], width=9)

    @jax.jit
    def gradients(query, key, valid):
        def kept_rows(query, key):
            chosen = memory_select(query, key, valid, kept=2)
            rows = jnp.take_along_axis(key, chosen.swapaxes(1, 2)[..., None], axis=1)
            return rows.sum(), chosen

        return jax.grad(kept_rows, argnums=(0, 1), has_aux=True)(query, key)

    with simulated.tpu():
        (of_query, of_key), chosen = jax.tree.map(np.asarray, gradients(query, key, valid))
    assert not of_query.any()
    expected = np.zeros(key.shape)
    for b, k in np.ndindex(2, 2):
        expected[b, chosen[b, k], k] = 1
    np.testing.assert_array_equal(of_key, expected)


def test_gpu_blocks_equal_the_definition(monkeypatch):
    given = references([0, 3, 9, 9, 7], width=9)
    # Two references of 9 x 9 scores by 4 heads at a time: two blocks and one that is not full.
    monkeypatch.setattr(gpu, "BLOCK_SCORES", 2 * 9 * 9 * 4)
    form = (("kept", 4),)
    with dispatch.lowering_for("gpu"):
        found = jax.tree.map(np.asarray, run(*given, target="gpu", received=True, form=form))
    assert gpu.references_per_block(given[0]) == 2
    assert_same(found, by_definition(given, kept=4), given[2])


def test_the_gpu_form_lowers_for_cuda_and_peaks_at_a_block_of_scores():
    shapes = (
        jax.ShapeDtypeStruct((64, 128, 40, 80), jnp.bfloat16),
        jax.ShapeDtypeStruct((64, 128, 8, 80), jnp.bfloat16),
        jax.ShapeDtypeStruct((64, 128), jnp.bool_),
    )
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh), dispatch.lowering_for("gpu"):
        chosen = functools.partial(memory_select, implementation="gpu")
        lowered = jax.jit(chosen).trace(*shapes).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "x8x5x128x128xf32" in text and "64x8x5x128x128xf32" not in text


FITTING = dict(query=(1, 4, 2, 2), key=(1, 4, 2, 2), valid=(1, 4))
BAD = [
    (dict(query=(1, 4, 3, 2)), {}, "query has 3 heads and key has 2"),
    (dict(key=(1, 5, 2, 2)), {}, "key has shape"),
    (dict(key=(1, 4, 2, 3)), {}, "key has shape"),
    (dict(valid=(1, 5)), {}, "valid has shape"),
    ({}, dict(kept=5), "kept is 5"),
    ({}, dict(kept=0), "kept is 0"),
    ({}, dict(selection="most"), "selection is 'most'"),
    ({}, dict(pooling="min"), "pooling is 'min'"),
    ({}, dict(implementation="fast"), "no implementation named 'fast'"),
]


@pytest.mark.parametrize(("shapes", "options", "says"), BAD)
def test_wrong_arguments_are_named_with_the_rule(shapes, options, says):
    shapes = FITTING | shapes
    query, key = jnp.zeros(shapes["query"]), jnp.zeros(shapes["key"])
    with pytest.raises(ValueError, match=says):
        memory_select(query, key, jnp.ones(shapes["valid"], bool), **{"kept": 2, **options})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(width=129), "references of 129 tokens"),
        (dict(dtype=jnp.float16), "query is float16"),
        (dict(kv_heads=64, head_dim=1024), "do not fit on chip"),
    ],
)
def test_what_the_tpu_kernel_cannot_take_is_said_and_never_replaced(change, says):
    shape = {**dict(width=128, kv_heads=1, head_dim=4, dtype=jnp.float32), **change}
    dims = (1, shape["width"], shape["kv_heads"], shape["head_dim"])
    rows = jax.ShapeDtypeStruct(dims, shape["dtype"])
    valid = jax.ShapeDtypeStruct(dims[:2], jnp.bool_)
    with dispatch.lowering_for("tpu"), pytest.raises(NotImplementedError, match=says):
        jax.eval_shape(functools.partial(memory_select, implementation="tpu"), rows, rows, valid)
    with pytest.raises(NotImplementedError, match="made for tpu"):
        jax.eval_shape(functools.partial(memory_select, implementation="tpu"), rows, rows, valid)
