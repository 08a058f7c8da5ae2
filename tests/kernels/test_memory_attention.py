"""Laws of memory attention: the definition against loops, blocks against the definition."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kernels_pallas.memory_attention import ChunkGrid, api, blocked, memory_attention
from tests.kernels.users import spy_on, untyped


def arrays(
    *,
    batch=2,
    queries=6,
    length=None,
    kv_heads=2,
    group=2,
    head_dim=4,
    preface=2,
    chunks=0,
    slots=0,
    seed=0,
):
    """Arguments of memory attention with random contents, as numpy arrays."""
    draw = np.random.default_rng(seed)
    length = length or queries

    def normal(*shape):
        return draw.standard_normal(shape, np.float32)

    found = {
        "query": normal(batch, queries, kv_heads * group, head_dim),
        "key": normal(batch, length, kv_heads, head_dim),
        "value": normal(batch, length, kv_heads, head_dim),
        "start": draw.integers(0, length - queries + 1, batch).astype(np.int32),
    }
    if preface:
        found["preface"] = tuple(normal(preface, kv_heads, head_dim) for _ in range(2))
    if chunks:
        shape = (batch, chunks, slots, kv_heads, head_dim)
        found["slots"] = normal(*shape), normal(*shape)
        found["slot_valid"] = draw.random((batch, chunks, slots)) < 0.7
    return found


@functools.partial(jax.jit, static_argnames=("grid", "implementation", "blocks"))
def attend(given, *, grid=None, implementation="xla", blocks=None):
    """One compiled program; ``blocks`` only tells apart programs of different block sizes."""
    return memory_attention(**given, grid=grid, implementation=implementation)


def by_loops(given, grid=None):
    """Equation 4 with the preface, one query and head at a time, in float64."""
    query, key = given["query"].astype(np.float64), given["key"].astype(np.float64)
    value = given["value"].astype(np.float64)
    batch, queries, heads, head_dim = query.shape
    group = heads // key.shape[2]
    out = np.zeros(query.shape)
    for b in range(batch):
        for t in range(queries):
            index = int(given["start"][b]) + t
            for n in range(heads):
                rows = []
                if "preface" in given:
                    keys, values = given["preface"]
                    rows += [(k[n // group], v[n // group]) for k, v in zip(keys, values)]  # noqa: B905
                if "slots" in given:
                    keys, values = given["slots"]
                    chunk = None if grid is None else max(index - grid.offset, 0) // grid.length
                    for c in range(keys.shape[1]):
                        if chunk is not None and not chunk - grid.band < c <= chunk:
                            continue
                        for m in range(keys.shape[2]):
                            if given["slot_valid"][b, c, m]:
                                rows.append(
                                    (keys[b, c, m, n // group], values[b, c, m, n // group])
                                )
                for j in range(min(index + 1, key.shape[1])):
                    if "segments" in given:
                        mine, theirs = given["segments"]
                        if mine[b, t] != theirs[b, j]:
                            continue
                    rows.append((key[b, j, n // group], value[b, j, n // group]))
                scores = np.array([k @ query[b, t, n] for k, _ in rows]) / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = (weights / weights.sum()) @ np.array([v for _, v in rows])
    return out


GRID = ChunkGrid(length=2, band=2)


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        (dict(preface=0), None),
        (dict(queries=7, chunks=3, slots=3, group=1), GRID),
        (dict(queries=3, length=8, chunks=1, slots=4, kv_heads=1, group=3), None),
        (dict(queries=4, length=9, chunks=5, slots=2), ChunkGrid(length=2, band=1)),
    ],
    ids=["plain", "band", "one group in a cache", "own chunk in a cache"],
)
def test_the_definition_equals_loops_over_queries_and_heads(shape, grid):
    given = arrays(**shape)
    np.testing.assert_allclose(attend(given, grid=grid), by_loops(given, grid), atol=2e-6)


def test_segments_keep_packed_documents_apart():
    """A packed row is its documents, each attended alone behind the same preface."""
    given = arrays(batch=1, queries=8)
    lengths = [3, 4, 1]
    numbers = np.repeat(np.arange(3, dtype=np.int32), lengths)[None]
    packed = attend({**given, "segments": (numbers, numbers)})
    np.testing.assert_allclose(
        packed, by_loops({**given, "segments": (numbers, numbers)}), atol=2e-6
    )
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        alone = {name: given[name][:, own] for name in ("query", "key", "value")}
        alone["start"] = np.zeros(1, np.int32)
        alone["preface"] = given["preface"]
        np.testing.assert_allclose(packed[:, own], by_loops(alone), atol=2e-6)
        start += length


def test_slots_that_are_all_empty_change_nothing():
    given = arrays(queries=7, chunks=3, slots=3)
    given["slot_valid"] = np.zeros_like(given["slot_valid"])
    without = {name: part for name, part in given.items() if "slot" not in name}
    np.testing.assert_allclose(attend(given, grid=GRID), attend(without), atol=1e-6)


@pytest.mark.parametrize("settings", [dict(length=0), dict(band=0), dict(offset=-1)])
def test_a_grid_that_cannot_be_is_refused(settings):
    with pytest.raises(ValueError, match="length and band must be at least 1"):
        ChunkGrid(**settings)


def test_who_reads_which_chunk_written_out_by_hand():
    index = jnp.arange(8)[None]
    # `<s>` and three chunks: the band of training, where each chunk brings one reference.
    np.testing.assert_array_equal(
        ChunkGrid(length=3, band=2).visible(index, 3)[0].astype(int),
        [
            [1, 0, 0],  # <s> reads with chunk 0
            [1, 0, 0],
            [1, 0, 0],
            [1, 0, 0],
            [1, 1, 0],
            [1, 1, 0],
            [1, 1, 0],
            [0, 1, 1],
        ],
    )
    # Each chunk its own slots; a chunk beyond the last group reads nothing.
    np.testing.assert_array_equal(
        ChunkGrid(length=2, band=1).visible(index, 3)[0].astype(int),
        [
            [1, 0, 0],
            [1, 0, 0],
            [1, 0, 0],
            [0, 1, 0],
            [0, 1, 0],
            [0, 0, 1],
            [0, 0, 1],
            [0, 0, 0],
        ],
    )
    # Without a separator chunks are counted from the first token.
    np.testing.assert_array_equal(
        ChunkGrid(length=4, band=1, offset=0).visible(index, 2)[0].astype(int),
        [[1, 0]] * 4 + [[0, 1]] * 4,
    )


def differentiable(given):
    kinds = {name for name in given if name not in ("start", "slot_valid", "segments")}
    return {n: given[n] for n in kinds}, {n: given[n] for n in given if n not in kinds}


@functools.partial(jax.jit, static_argnames=("grid", "implementation", "blocks"))
def attend_with_gradients(given, weights, *, grid, implementation, blocks=None):
    moving, fixed = differentiable(given)

    def loss(moving):
        out = memory_attention(**moving, **fixed, grid=grid, implementation=implementation)
        return jnp.sum(out * weights), out

    return jax.grad(loss, has_aux=True)(moving)


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # each smaller example would be two more programs
    suppress_health_check=list(HealthCheck),
)
@given(
    batch=st.sampled_from([4, 6]),
    queries=st.integers(1, 5),
    cached=st.integers(0, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    memory=st.sampled_from([(0, 0, None), (1, 3, None), (3, 2, GRID), (2, 2, ChunkGrid(2, 1))]),
    extras=st.sampled_from([(0, False), (2, False), (2, True)]),
    several=st.sampled_from([1, 2]),
)
def test_blocks_equal_the_definition_in_value_and_gradient(
    batch, queries, cached, kv_heads, group, memory, extras, several
):
    chunks, slots, grid = memory
    preface, packed = extras
    given = arrays(
        batch=batch,
        queries=queries,
        length=queries + cached,
        kv_heads=kv_heads,
        group=group,
        chunks=chunks,
        slots=slots,
        preface=preface,
    )
    if packed:
        theirs = np.arange(queries + cached, dtype=np.int32) // 2
        given["segments"] = (
            theirs[given["start"][:, None] + np.arange(queries)],
            np.tile(theirs, (batch, 1)),
        )
    scores = queries * kv_heads * group * (queries + cached + chunks * slots)
    weights = np.random.default_rng(1).standard_normal(given["query"].shape, np.float32)
    with mock.patch.object(blocked, "BLOCK_SCORES", several * scores):
        gradient, out = attend_with_gradients(
            given, weights, grid=grid, implementation="blocked", blocks=several
        )
    wanted_gradient, wanted = attend_with_gradients(given, weights, grid=grid, implementation="xla")
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, wanted_gradient
    )


def test_a_block_is_the_largest_divisor_of_the_batch_that_fits():
    given = arrays(batch=12, queries=4, kv_heads=1, group=2, chunks=2, slots=3)
    one = 4 * 2 * (4 + 2 * 3)
    for room, expected in [(one - 1, 1), (5 * one, 4), (11 * one, 6), (12 * one, 12)]:
        with mock.patch.object(blocked, "BLOCK_SCORES", room):
            found = blocked.sequences_per_block(given["query"], given["key"], given["slots"])
        assert found == expected


@pytest.mark.parametrize("shape", [dict(queries=0, length=3), dict(batch=0)])
def test_nothing_to_compute_gives_an_empty_result(shape):
    given = arrays(**shape)
    assert attend(given, implementation=None).shape == given["query"].shape


def chosen(given, monkeypatch):
    """The name of the implementation that is called when none is named."""
    called = spy_on(api, monkeypatch)
    with untyped():
        memory_attention(**given)
    return called


def test_blocks_are_chosen_for_one_cpu_device_and_a_batch_too_large_for_one(monkeypatch):
    given = arrays(batch=4)
    with mock.patch.object(blocked, "BLOCK_SCORES", 1):
        assert chosen(given, monkeypatch) == ["blocked"]
    assert chosen(given, monkeypatch) == ["xla"]
    for name, value in [("default_backend", "gpu"), ("device_count", 2)]:
        with (
            mock.patch.object(blocked, "BLOCK_SCORES", 1),
            mock.patch.object(jax, name, lambda value=value: value),
        ):
            assert chosen(given, monkeypatch) == ["xla"]


def test_blocks_asked_for_by_name_refuse_with_the_reason():
    with pytest.raises(NotImplementedError, match="the whole batch fits in one block"):
        attend(arrays(), implementation="blocked")
    with pytest.raises(ValueError, match=r"memory_attention: no implementation named 'flash'"):
        attend(arrays(), implementation="flash")


def wrong(**changes):
    given = {**arrays(queries=4, chunks=2, slots=3), **changes}
    return {name: part for name, part in given.items() if part is not None}


OTHER = arrays(head_dim=6, kv_heads=2, queries=4, chunks=2, slots=3)


@pytest.mark.parametrize(
    ("given", "grid", "message"),
    [
        (wrong(query=np.zeros((2, 4, 3, 4), np.float32)), GRID, "3 heads and key has 2"),
        (wrong(preface=OTHER["preface"]), GRID, r"preface has heads x head_dim \(2, 6\)"),
        (wrong(slots=OTHER["slots"]), GRID, r"slots has heads x head_dim \(2, 6\)"),
        (wrong(query=np.zeros((2, 4, 4), np.float32)), GRID, "query has 3 axes"),
        (wrong(query=np.zeros((2, 4, 4, 6), np.float32)), GRID, r"\(2, 6\), key \(2, 4\)"),
        (wrong(query=np.zeros((3, 4, 4, 4), np.float32)), GRID, r"\(3, 4\), key \(2, 4\)"),
        (wrong(start=np.zeros(3, np.int32)), GRID, r"start: int32 of shape \(3,\)"),
        (wrong(start=np.zeros(2, np.float32)), GRID, "start: float32"),
        (wrong(segments=(np.zeros((2, 4), int), np.zeros((2, 5), int))), GRID, "of the keys"),
        (wrong(slots=tuple(x[:1] for x in wrong()["slots"])), GRID, "slots has batch 1, query 2"),
        (wrong(query=np.zeros((2, 5, 4, 4), np.float32)), GRID, "query has 5 tokens and key 4"),
        (wrong(value=np.zeros((2, 4, 1, 4), np.float32)), GRID, "value has shape"),
        (wrong(slot_valid=None), GRID, "slots and slot_valid come together"),
        (wrong(slots=None), GRID, "slots and slot_valid come together"),
        (wrong(slot_valid=np.ones((2, 2, 4), bool)), GRID, r"slots need \(2, 2, 3\)"),
        (wrong(), None, "slots of 2 chunks need grid"),
        (
            wrong(slots=tuple(x.astype(np.float16) for x in wrong()["slots"])),
            GRID,
            "slots is float16, the context float32",
        ),
        (
            wrong(preface=tuple(x.astype(np.float16) for x in wrong()["preface"])),
            GRID,
            "preface is float16, the context float32",
        ),
        (wrong(), ChunkGrid(1, 2), "slots of 2 chunks do not cover the 4 queries: .* make 3"),
    ],
)
def test_arguments_that_do_not_fit_are_named(given, grid, message):
    with untyped(), pytest.raises(ValueError, match=message):
        memory_attention(**given, grid=grid)
