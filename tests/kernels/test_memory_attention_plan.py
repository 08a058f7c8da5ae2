"""Laws of the plan: what is visited is what is seen."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.memory_attention import ChunkGrid, plan

BLOCK_Q, BLOCK_K = 8, 4
# One program for each set of sizes.
visits = jax.jit(plan.visits, static_argnums=(1, 2, 3))
windows = jax.jit(plan.windows, static_argnames=("units", "unit", "grid", "dtype"))


@st.composite
def rows(draw):
    """Starts, sizes and maybe segments of two sequences."""
    queries, more = draw(st.sampled_from([(1, 0), (7, 20), (16, 0), (29, 5)]))
    keys = queries + more
    start = np.array([draw(st.integers(0, keys - queries)) for _ in range(2)], np.int32)
    segments = None
    if draw(st.booleans()):
        cuts = draw(st.lists(st.integers(0, keys), max_size=3))
        theirs = np.sum([np.arange(keys) >= cut for cut in cuts], axis=0, dtype=np.int32)
        theirs = np.broadcast_to(theirs, (2, keys)).astype(np.int32)
        mine = np.stack([theirs[b, s : s + queries] for b, s in enumerate(start)])
        segments = mine, theirs
    return start, queries, keys, segments


def dense(start, queries, keys, segments):
    index = start[:, None] + np.arange(queries)
    mask = np.arange(keys) <= index[..., None]
    if segments is not None:
        mask &= segments[0][..., None] == segments[1][:, None, :]
    return mask


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(rows())
def test_every_block_with_a_visible_pair_is_visited_once_and_no_other(row):
    start, queries, keys, segments = row
    padded = -(-queries // BLOCK_Q) * BLOCK_Q
    found = visits(start, (queries, padded, keys), BLOCK_Q, BLOCK_K, segments)
    mask = dense(*row)
    for b in range(2):
        for i in range(padded // BLOCK_Q):
            first, whole_first, whole_end, end, diagonal = (int(part[b, i]) for part in found)
            assert first <= whole_first <= whole_end <= end
            here = mask[b, i * BLOCK_Q : (i + 1) * BLOCK_Q]
            low = int(start[b]) + i * BLOCK_Q
            seen = {
                j
                for j in range(-(-keys // BLOCK_K))
                if here[:, j * BLOCK_K : (j + 1) * BLOCK_K].any()
            }
            own = set(range(low // BLOCK_K, (low + BLOCK_Q) // BLOCK_K)) if diagonal else set()
            assert seen - own == set(range(first, end))
            for j in range(whole_first, whole_end):
                assert here[:, j * BLOCK_K : (j + 1) * BLOCK_K].all()
                assert (j + 1) * BLOCK_K <= keys
            if diagonal:
                square = here[:, low : low + BLOCK_Q]
                causal = np.tri(BLOCK_Q, dtype=bool)
                np.testing.assert_array_equal(square, causal[: len(here), : square.shape[1]])


def test_the_causal_square_of_one_document_is_diagonals_and_whole_blocks():
    found = visits(jnp.zeros(1, jnp.int32), (24, 24, 24), 8, 4, None)
    np.testing.assert_array_equal(found.diagonal, [[1, 1, 1]])
    np.testing.assert_array_equal(found.end, [[0, 2, 4]])
    np.testing.assert_array_equal(found.whole_end - found.whole_first, [[0, 2, 4]])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    start=st.integers(0, 40),
    units=st.sampled_from([1, 3]),
    chunks=st.sampled_from([1, 4, 12]),
    grid=st.sampled_from([ChunkGrid(4, 3), ChunkGrid(4, 1), ChunkGrid(3, 2, 0), None]),
    preface=st.sampled_from([0, 3]),
    seed=st.integers(0, 9),
)
def test_a_window_holds_exactly_what_its_queries_may_read(
    start, units, chunks, grid, preface, seed
):
    """Entries carry their own number as key; who sees which is compared with the grid's mask."""
    chunks = 1 if grid is None else chunks
    slots, unit = 2, 8
    valid = np.random.default_rng(seed).random((1, chunks, slots)) < 0.7
    numbers = 1.0 + np.arange(chunks * slots, dtype=np.float32).reshape(1, chunks, slots, 1, 1)
    names = -1.0 - np.arange(preface, dtype=np.float32).reshape(preface, 1, 1)
    found = windows(
        jnp.array([start], jnp.int32),
        units=units,
        unit=unit,
        preface=(names, names) if preface else None,
        slots=(numbers, numbers),
        slot_valid=valid,
        grid=grid,
        dtype=jnp.dtype("float32"),
    )
    assert found.keys.shape[2] % plan.LANES == 0
    for t in range(units * unit):
        index, u = start + t, t // unit
        low, high = np.asarray(found.interval[0, u])
        seen = np.asarray(found.keys[0, u, :, 0, 0])[(low <= index) & (index < high)]
        wanted = set(names.ravel())
        for c in range(chunks):
            if grid is None or bool(grid.visible(jnp.array([[index]]), chunks)[0, 0, c]):
                wanted |= set(numbers[0, c, valid[0, c], 0, 0])
        assert sorted(seen) == sorted(wanted)


def test_what_a_window_leaves_empty_is_zero_whatever_the_slot_holds():
    poison = np.full((1, 3, 2, 1, 4), np.nan, np.float32)
    found = windows(
        jnp.zeros(1, jnp.int32),
        units=1,
        unit=8,
        preface=None,
        slots=(poison, poison),
        slot_valid=np.zeros((1, 3, 2), bool),
        grid=ChunkGrid(4, 2),
        dtype=jnp.dtype("float32"),
    )
    assert not jax.tree.reduce(lambda any_, x: any_ or bool(jnp.any(x != 0)), found, False)
