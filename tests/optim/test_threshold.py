"""The threshold of a whole pytree against a sort in numpy."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.optim import threshold

ranked = jax.jit(
    lambda leaves, rank: threshold.kth_smallest_bits(
        [threshold.magnitude_bits(leaf) for leaf in leaves], rank
    )
)


def found(leaves, rank: int) -> np.float32:
    bits = ranked([jnp.asarray(leaf) for leaf in leaves], threshold.count_of(rank))
    return np.asarray(bits).view(np.float32)


def by_sorting(leaves, rank: int) -> np.float32:
    """NaN is the largest of all, as numpy sorts it."""
    everything = np.concatenate(
        [np.abs(np.asarray(leaf)).astype(np.float32).ravel() for leaf in leaves]
    )
    return np.sort(everything)[rank - 1]


SPECIAL = [0.0, -0.0, 1e-45, 1e-38, -1e-38, 1.0, 1.0, -1.0, 3e38, np.inf, -np.inf, np.nan]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_subnormal=True)),
        min_size=12,
        max_size=12,
    ),
    rank=st.integers(1, 12),
)
def test_it_is_the_value_that_a_sort_puts_there(values, rank):
    """Ties, zeros, denormals, infinities and NaN included, bit for bit."""
    leaves = [np.array(values[:5], np.float32), np.array(values[5:], np.float32).reshape(1, 7)]
    np.testing.assert_array_equal(found(leaves, rank), by_sorting(leaves, rank))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_any_float_is_ranked_by_its_own_magnitude(dtype, scale):
    values = (np.random.default_rng(0).standard_normal(999) * scale).astype(dtype)
    for rank in (1, 2, 500, 998, 999):
        assert found([values], rank) == by_sorting([values], rank)


def test_leaves_split_or_joined_and_scaled_by_a_power_of_two_give_the_same():
    values = np.random.default_rng(1).standard_normal(600).astype(np.float32)
    whole = found([values], 377)
    assert (
        found([values[:1].reshape(1, 1, 1), values[1:400].reshape(3, 133), values[400:]], 377)
        == whole
    )
    assert found([values * np.float32(2**20)], 377) == whole * 2**20


def test_complex_numbers_are_ranked_by_their_modulus():
    values = np.array([3 + 4j, 1j, -2, 0], np.complex64)
    assert [found([values], rank) for rank in (1, 2, 3, 4)] == [0, 1, 2, 5]


@pytest.mark.parametrize(
    "left, right", [(0, 0), (65_536, 1), (10**11, 10**11 - 1), (131_071, 65_535)]
)
def test_counts_go_beyond_32_bits(left, right):
    def number(count):
        return (int(count[0]) << 16) + int(count[1])

    ours, theirs = (tuple(map(jnp.asarray, threshold.count_of(n))) for n in (left, right))
    assert number(threshold.add(ours, theirs)) == left + right
    assert number(threshold.subtract(ours, theirs)) == left - right
    assert float(threshold.as_float(ours)) == np.float32(left)


def test_a_traced_share_is_rounded_down_and_is_at_least_one():
    total = tuple(map(jnp.asarray, threshold.count_of(1000)))
    for share, expected in ((0.5, 500), (0.4999, 499), (1.0, 1000), (1e-6, 1)):
        high, low = threshold.share_of(jnp.float32(share), total)
        assert (int(high) << 16) + int(low) == expected


@pytest.mark.parametrize("number", [2**24 + 3, 2**31 + 2**8 - 1, 2**36 + 2**13 - 1])
def test_a_traced_share_of_a_count_that_float32_rounds_up_is_not_more_than_all(number):
    total = tuple(map(jnp.asarray, threshold.count_of(number)))
    assert float(threshold.as_float(total)) > number
    high, low = threshold.share_of(jnp.float32(1.0), total)
    assert (int(high) << 16) + int(low) == number


def test_only_a_program_for_the_cpu_counts_in_one_reduction_of_several_operands():
    """Which would be partitioned with gathers: a pod's program is compiled on one CPU too."""
    leaf = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    traced = ranked.trace([leaf], threshold.count_of(5))
    joined = re.compile(r"stablehlo\.reduce\([^)]*\), \(")
    for platform, expected in (("cpu", True), ("tpu", False), ("cuda", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.reduce(" in text
        assert bool(joined.search(text)) == expected, platform
