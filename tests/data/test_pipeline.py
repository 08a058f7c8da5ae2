"""Laws of the order of training: every sample once an epoch, resume is equality, any host count."""

import json
from itertools import islice

import numpy as np
import pytest

from jaxlab.data.packing import Rows
from jaxlab.data.pipeline import TextSamples, training_iterator
from jaxlab.data.references import References
from jaxlab.errors import DataError


def text_rows(count, length=8, first=0):
    """Row n holds the token ``first + n`` everywhere; its last token is padding."""
    tokens = np.repeat(np.arange(first, first + count, dtype=np.int32)[:, None], length, axis=1)
    mask = np.ones(tokens.shape, bool)
    mask[:, -1] = False
    return Rows(tokens, mask)


@pytest.fixture
def references():
    tokens = np.array([[5, 6, 7], [8, 0, 0]], np.int32)
    return References(tokens, np.array([3, 1], np.int32), ["a", "b"], ["a", "b"], "hash")


def batches(iterator, count):
    return [{k: v.tolist() for k, v in b.items()} for b in islice(iterator, count)]


def names(iterator, count):
    """The first token of every sample, batch by batch."""
    return [batch["tokens"][:, 0].tolist() for batch in islice(iterator, count)]


def test_a_sample_without_references_is_tokens_and_mask():
    sample = TextSamples(text_rows(3))[1]
    assert {k: (v.dtype, v.shape) for k, v in sample.items()} == {
        "tokens": (np.int32, (8,)),
        "loss_mask": (np.float32, (8,)),
    }
    assert sample["tokens"].tolist() == [1] * 8
    assert sample["loss_mask"].tolist() == [1.0] * 7 + [0.0]


@pytest.mark.parametrize(("lag", "expected"), [(0, [1, -1, 0, 1]), (1, [-1, 1, -1, 0])])
def test_each_chunk_carries_the_reference_of_its_lag(references, lag, expected):
    ids = np.array([[-1, -1, -1, -1], [1, -1, 0, 1]], np.int32)
    samples = TextSamples(text_rows(2), references, ids, chunk_length=2, retrieval_lag=lag)
    by_hand = {-1: ([0, 0, 0], 0), 0: ([5, 6, 7], 3), 1: ([8, 0, 0], 1)}
    sample = samples[1]
    assert sample["references"].tolist() == [by_hand[i][0] for i in expected]
    assert sample["reference_lengths"].tolist() == [by_hand[i][1] for i in expected]
    assert sample["references"].dtype == sample["reference_lengths"].dtype == np.int32
    assert not samples[0]["references"].any()
    assert not samples[0]["reference_lengths"].any()


def test_parts_that_do_not_fit_each_other_are_errors(references):
    rows, ids = text_rows(2), np.zeros((2, 4), np.int32)
    for arguments, message in (
        ((rows, references, None, 2), "belong together"),
        ((rows, None, ids, 2), "belong together"),
        ((rows, references, ids, 4), r"need \(2, 2\)"),
        ((rows, references, ids, 3), "find the neighbours anew"),
        ((rows, references, ids + 2, 2), "reference 2 of 2"),
        ((rows, references, ids, 2, 2), "retrieval_lag is 2"),
    ):
        with pytest.raises(DataError, match=message):
            TextSamples(*arguments)


def two_sources():
    return [TextSamples(text_rows(7)), TextSamples(text_rows(5, first=100))]


def iterator(batch_size=4, seed=3, weights=(0.75, 0.25), rows=None):
    return training_iterator(two_sources(), weights, batch_size=batch_size, seed=seed, rows=rows)


def test_every_epoch_of_a_source_holds_each_sample_once_in_a_new_order():
    seen = [n for batch in names(iterator(), 40) for n in batch]
    for first, count in ((0, 7), (100, 5)):
        own = [n for n in seen if first <= n < first + 100]
        epochs = [own[i : i + count] for i in range(0, len(own) - count + 1, count)]
        assert all(sorted(epoch) == list(range(first, first + count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2


def test_each_source_has_an_order_of_its_own():
    alike = [TextSamples(text_rows(7)), TextSamples(text_rows(7, first=100))]
    stream = training_iterator(alike, [0.5, 0.5], batch_size=14, seed=3)
    seen = [n for batch in names(stream, 1) for n in batch]
    assert [n for n in seen if n < 100] != [n - 100 for n in seen if n >= 100]


def test_sources_are_mixed_by_their_weights():
    seen = [n for batch in names(iterator(), 20) for n in batch]
    assert sum(n < 100 for n in seen) == 60


def test_equal_seeds_give_equal_streams_and_others_do_not():
    assert names(iterator(), 5) == names(iterator(), 5) != names(iterator(seed=4), 5)


def test_restoring_at_every_position_continues_the_unbroken_stream():
    length = 9
    unbroken, states = [], []
    stream = iterator()
    for _ in range(length):
        states.append(json.dumps(stream.get_state()))
        unbroken += batches(stream, 1)
    for position, state in enumerate(states):
        fresh, used = iterator(), iterator()
        batches(used, 3)
        for restored in (fresh, used):
            restored.set_state(json.loads(state))
            assert batches(restored, length - position) == unbroken[position:]
            assert json.dumps(restored.get_state()) == json.dumps(stream.get_state())


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[3], [1, 0], [2]], [[0, 1, 2, 3]] * 2])
def test_rows_of_a_batch_are_read_by_whom_they_concern(parts):
    whole = names(iterator(), 8)
    for rows in parts:
        assert names(iterator(rows=rows), 8) == [[batch[row] for row in rows] for batch in whole]


def test_the_position_of_some_rows_is_that_of_all():
    one, all_rows, stream = iterator(rows=[2]), iterator(), iterator(rows=[1, 3])
    batches(one, 5)
    stream.set_state(json.loads(json.dumps(one.get_state())))
    whole = names(all_rows, 8)[5:]
    assert names(stream, 3) == [[batch[1], batch[3]] for batch in whole]


def test_batches_stack_the_samples(references):
    ids = np.zeros((3, 4), np.int32)
    samples = TextSamples(text_rows(3), references, ids, chunk_length=2)
    batch = next(training_iterator([samples], [1.0], batch_size=5, seed=0))
    shapes = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert shapes == {
        "tokens": ((5, 8), np.int32),
        "loss_mask": ((5, 8), np.float32),
        "segments": ((5, 8), np.int32),
        "references": ((5, 4, 3), np.int32),
        "reference_lengths": ((5, 4), np.int32),
    }


def test_what_cannot_be_iterated_is_an_error(references):
    plain = TextSamples(text_rows(3))
    with_references = TextSamples(text_rows(3), references, np.zeros((3, 4), np.int32), 2)
    empty = TextSamples(Rows(np.zeros((0, 8), np.int32), np.zeros((0, 8), bool)))
    for sources, weights, more, message in (
        ([], [], {}, "0 sources"),
        ([plain], [0.5, 0.5], {}, "1 sources with 2 weights"),
        ([plain], [0.0], {}, "positive"),
        ([plain], [float("inf")], {}, "finite"),
        ([plain, empty], [1.0, 1.0], {}, "source 1 holds no samples"),
        ([plain, with_references], [1.0, 1.0], {}, "must be alike"),
        ([plain], [1.0], {"seed": -1}, "seed is -1"),
        ([plain], [1.0], {"batch_size": 0}, "batch_size is 0"),
        ([plain], [1.0], {"rows": [1, 4]}, r"rows \[1, 4\] of batches of 4"),
        ([plain], [1.0], {"rows": []}, r"rows \[\] of batches of 4"),
    ):
        with pytest.raises(DataError, match=message):
            training_iterator(sources, weights, **{"batch_size": 4, "seed": 0} | more)
