"""The leak guard against a plain dynamic programme."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.data.overlap import exceeds, most_allowed, overlap
from jaxlab.data.references import References, first_allowed


def array(ids):
    return np.array(ids, np.int32)


def plain_overlap(text, reference):
    """Equation 6 as it is written: every start, every table, every last token within 2 |r|."""
    best = 0
    for start in range(len(text)):
        window = text[start : start + 2 * len(reference) + 1]
        table = np.zeros((len(window) + 1, len(reference) + 1), int)
        for i, a in enumerate(window):
            for j, b in enumerate(reference):
                table[i + 1, j + 1] = (
                    table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
                )
        best = max(best, table[-1, -1])
    return best / len(reference)


def bank(*references):
    tokens = np.zeros((len(references), 8), np.int32)
    for row, reference in zip(tokens, references, strict=True):
        row[: len(reference)] = reference
    lengths = array([len(reference) for reference in references])
    names = [str(i) for i in range(len(references))]
    return References(tokens, lengths, names, names, "hash")


tokens_strategy = st.lists(st.integers(0, 4), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30), tokens_strategy)
def test_overlap_equals_a_plain_dynamic_programme(text, reference):
    assert overlap(array(text), array(reference)) == plain_overlap(text, reference)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=30),
    tokens_strategy,
    st.sampled_from([-0.5, 0.0, 0.1, 0.25, 1 / 3, 0.5, 2 / 3, 0.9, 1.0]),
)
def test_exceeds_is_overlap_compared_with_the_limit(text, reference, limit):
    expected = plain_overlap(text, reference) > limit
    assert exceeds(array(text), array(reference), limit=limit) == expected


def test_the_most_allowed_is_found_in_the_arithmetic_of_the_comparison():
    limits = [0.29, 0.58, 0.9, 2 / 3, 0.0, 1.0, 1.5, *(n / 100 for n in range(100))]
    for length in (1, 3, 100, 128):
        for limit in limits:
            allowed = [n for n in range(length + 1) if n / length <= limit]
            assert most_allowed(length, limit) == allowed[-1]
    assert (most_allowed(0, 0.9), most_allowed(5, -1.0)) == (0, -1)


def test_bytes_that_agree_across_token_borders_are_not_the_reference():
    assert not exceeds(array([0x10000, 0]), array([0x100]), limit=0.5)
    assert exceeds(array([0x10000, 0, 0x100]), array([0x100]), limit=0.5)


def test_overlap_by_hand():
    reference = array([1, 2, 3, 4])
    assert overlap(array([9, 1, 2, 3, 4, 9]), reference) == 1.0
    assert overlap(array([1, 9, 9, 2, 3, 9, 9, 9, 4]), reference) == 1.0  # 8 = 2 |r| apart
    assert overlap(array([1, 9, 9, 2, 3, 9, 9, 9, 9, 4]), reference) == 0.75  # 9 apart
    assert overlap(array([4, 1, 9, 9, 2, 3, 9, 9, 9, 4]), reference) == 1.0  # one window later
    assert overlap(array([4, 3, 2, 1]), reference) == 0.25
    assert overlap(array([7, 8]), reference) == 0.0
    assert overlap(array([]), reference) == overlap(reference, array([])) == 0.0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=24),
    st.lists(tokens_strategy, min_size=1, max_size=5),
    st.data(),
    st.sampled_from([0.0, 0.25, 0.5, 2 / 3, 0.75, 0.9, 1.0]),
)
def test_the_first_candidate_under_the_limit_is_taken(text, references, data, limit):
    chunks, k = 3, 3
    one = st.integers(-1, len(references) - 1)
    ids = np.array(data.draw(st.lists(one, min_size=9, max_size=9))).reshape(chunks, k)
    expected = [
        next((i for i in row if i >= 0 and plain_overlap(text, references[i]) <= limit), -1)
        for row in ids.tolist()
    ]
    chosen = first_allowed(ids, array(text), bank(*references), limit=limit)
    assert chosen.tolist() == expected
    assert chosen.dtype == np.int32


@pytest.mark.parametrize("limit", [0.9, 0.0])
def test_a_reference_taken_from_the_row_is_refused_and_an_unrelated_one_is_not(limit):
    rng = np.random.default_rng(0)
    row = rng.integers(5, 4000, 512, dtype=np.int32)
    references = bank(row[100:108], array([4001, 4002, 4003]))
    assert first_allowed(np.array([[0, 1]]), row, references, limit=limit).tolist() == [1]
