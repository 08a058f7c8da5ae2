"""The TPU kernels, simulated on the CPU, against the definition: values and all gradients."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kernels_pallas import dispatch
from kernels_pallas.memory_attention import ChunkGrid, memory_attention
from tests.kernels import simulated
from tests.kernels.simulated import interpreted, small_blocks
from tests.kernels.test_memory_attention import arrays, attend, differentiable

BAND, OWN = ChunkGrid(64, 5), ChunkGrid(64, 1)
# float32 sums in another order; bfloat16 keeps 8 bits of every weight and every result.
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2}


def value_and_gradients(given, grid, implementation):
    moving, fixed = differentiable(jax.tree.map(jnp.asarray, given))
    weights = np.random.default_rng(1).standard_normal(given["query"].shape, np.float32)

    def loss(moving):
        out = memory_attention(**moving, **fixed, grid=grid, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(moving)
    return {"out": out, **gradients}


def assert_equals_the_definition(given, grid, run, blocks=small_blocks):
    with run(), blocks():
        found = value_and_gradients(given, grid, "tpu")
    wanted = value_and_gradients(given, grid, "xla")
    atol = TOLERANCE[str(given["query"].dtype)]
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        scale = max(1.0, np.abs(other).max())
        np.testing.assert_allclose(
            one / scale, other / scale, atol=atol, err_msg=jax.tree_util.keystr(path)
        )


def in_dtype(given, dtype):
    """The same arguments, their floating-point arrays in another type."""
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 else x, given)


def packed(given, lengths):
    """The same row as several documents."""
    numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    numbers = np.tile(numbers, (len(given["query"]), 1))
    return {**given, "segments": (numbers, numbers)}


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # each smaller example would be two more programs
    suppress_health_check=list(HealthCheck),
)
@given(
    queries=st.sampled_from([1, 2, 65, 128, 257, 300]),
    cached=st.sampled_from([0, 1, 128, 130]),
    heads=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    head_dim=st.sampled_from([16, 42, 64, 80, 96, 128]),
    memory=st.sampled_from([(0, 0, None), (1, 40, None), (6, 8, BAND), (5, 40, OWN)]),
    preface=st.sampled_from([0, 3]),
    documents=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_drawn_shapes_equal_the_definition(
    queries, cached, heads, head_dim, memory, preface, documents, dtype, seed
):
    chunks, slots, grid = memory
    given = arrays(
        batch=2,  # each with its own start
        queries=queries,
        length=queries + cached,
        kv_heads=heads[0],
        group=heads[1],
        head_dim=head_dim,
        chunks=chunks,
        slots=slots,
        preface=preface,
        seed=seed,
    )
    numbers = np.sort(np.random.default_rng(seed).integers(0, documents, queries + cached))
    if documents > 1:
        theirs = np.tile(numbers.astype(np.int32), (2, 1))
        mine = np.stack([theirs[0, at : at + queries] for at in given["start"]])
        given["segments"] = mine, theirs
    assert_equals_the_definition(in_dtype(given, dtype), grid, interpreted)


def test_the_shipped_block_sizes_equal_the_definition():
    """Several forward blocks, and windows that no chunk, unit or lane edge falls together with."""
    given = arrays(
        batch=1, queries=1100, head_dim=16, kv_heads=1, chunks=12, slots=9, preface=130, group=1
    )
    given["start"][:] = 0
    assert_equals_the_definition(given, ChunkGrid(100, 3, 0), interpreted, contextlib.nullcontext)


@pytest.mark.parametrize("run", [interpreted, simulated.tpu])
def test_every_kind_of_block_at_once_equals_the_definition(run):
    """Whole blocks, cut ones at both ends and a diagonal, of three documents with their slots."""
    given = arrays(batch=1, queries=520, head_dim=16, chunks=9, slots=8, kv_heads=1)
    given["start"][:] = 0
    assert_equals_the_definition(packed(given, [256, 130, 134]), BAND, run)


def test_a_long_row_of_bfloat16_equals_the_definition():
    given = arrays(batch=1, queries=400, head_dim=80, chunks=7, slots=8, kv_heads=1)
    given["start"][:] = 0
    assert_equals_the_definition(in_dtype(given, "bfloat16"), BAND, interpreted)


def test_slots_that_are_all_missing_leave_plain_causal_attention():
    given = arrays(batch=1, queries=140, head_dim=16, chunks=3, slots=8, preface=0)
    given["slot_valid"] = np.zeros_like(given["slot_valid"])
    plain = {name: part for name, part in given.items() if "slot" not in name}
    with interpreted(), small_blocks():
        found = attend(given, grid=BAND, implementation="tpu")
    np.testing.assert_allclose(found, attend(plain), atol=1e-5)


@pytest.mark.parametrize("start", [128, 190], ids=["on a block", "within a block"])
def test_what_no_query_may_see_is_never_read_into_a_result(start):
    """The rest of a cache and slots that are empty or out of reach are poison: no bit changes."""
    given = arrays(batch=1, queries=70, length=400, head_dim=16, chunks=8, slots=8)
    given["start"][:] = start
    index = start + np.arange(70)
    unseen = ~np.asarray(BAND.visible(jnp.asarray(index)[None], 8)).any((0, 1))
    given["slot_valid"][:, 4] = False
    holes = ~given["slot_valid"] | unseen[None, :, None]

    def with_rest(fill):
        changed = dict(given)
        for name in ("key", "value"):
            changed[name] = given[name].copy()
            changed[name][:, start + 70 :] = fill
        changed["slots"] = tuple(np.where(holes[..., None, None], fill, x) for x in given["slots"])
        with simulated.tpu(), small_blocks():
            return value_and_gradients(changed, BAND, "tpu")

    for path, one in jax.tree_util.tree_leaves_with_path(with_rest(np.float32(np.nan))):
        assert not np.isnan(one).any(), jax.tree_util.keystr(path)
    jax.tree.map(np.testing.assert_array_equal, with_rest(np.float32(np.nan)), with_rest(0.0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "made for tpu, the target is cpu"),
        ({"dtype": np.float16}, "takes bfloat16 and float32, not float16"),
        ({"value": np.float16}, "query, key and value differ in dtype: float32, float32, float16"),
        ({"queries": 0}, "there is nothing to compute"),
        ({"keys": 1 << 17}, "131072 keys of one head do not fit on chip"),
        ({"heads": 64}, "64 query heads to a kv head do not fit on chip"),
    ],
)
def test_asked_for_by_name_it_refuses_with_the_reason(changes, reason):
    dtype = changes.get("dtype", np.float32)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    given = {
        "query": shape((1, changes.get("queries", 4), changes.get("heads", 2), 16)),
        "key": shape((1, changes.get("keys", 4), 1, 16)),
        "value": jax.ShapeDtypeStruct(
            (1, changes.get("keys", 4), 1, 16), changes.get("value", dtype)
        ),
        "start": jax.ShapeDtypeStruct((1,), np.int32),
    }
    call = functools.partial(memory_attention, implementation="tpu")
    with pytest.raises(NotImplementedError, match=reason):
        if changes:
            with dispatch.lowering_for("tpu", "v5e"):
                jax.eval_shape(lambda given: call(**given), given)
        else:
            jax.eval_shape(lambda given: call(**given), given)
