"""Laws of packing: nothing is lost, nothing comes twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.data.packing import chunks, pack, pack_by_document
from jaxlab.errors import DataError

EOS, PAD = 2, 0
documents_strategy = st.lists(
    st.lists(st.integers(0, 9), max_size=12).map(lambda ids: np.array(ids, np.int32)),
    min_size=1,
    max_size=6,
)
lengths_strategy = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(documents_strategy, lengths_strategy)
def test_valid_tokens_of_the_rows_are_the_stream(documents, length):
    rows = pack(documents, sequence_length=length, eos_id=EOS, pad_id=PAD)
    stream = [t for document in documents for t in (*document, EOS)]
    assert rows.tokens[rows.mask].tolist() == stream
    assert (rows.tokens[~rows.mask] == PAD).all()
    assert rows.tokens.shape == rows.mask.shape == (-(-len(stream) // length), length)
    assert rows.tokens.dtype == np.int32
    assert rows.document is None


@settings(max_examples=60, deadline=None)
@given(documents_strategy, lengths_strategy)
def test_rows_of_a_document_hold_that_document_alone(documents, length):
    if not any(map(len, documents)):
        with pytest.raises(DataError, match="no tokens"):
            pack_by_document(documents, sequence_length=length, pad_id=PAD)
        return
    rows = pack_by_document(documents, sequence_length=length, pad_id=PAD)
    for index, document in enumerate(documents):
        own = rows.document == index
        assert rows.tokens[own][rows.mask[own]].tolist() == document.tolist()
        assert own.sum() == -(-len(document) // length)
    assert (np.diff(rows.document) >= 0).all()
    assert rows.document.dtype == np.int32


@settings(max_examples=40, deadline=None)
@given(documents_strategy, st.integers(1, 4), st.integers(1, 4))
def test_padding_only_ever_ends_a_row_and_chunks_are_the_rows_cut(documents, size, count):
    rows = pack(documents, sequence_length=size * count, eos_id=EOS, pad_id=PAD)
    assert (np.diff(rows.mask.astype(int), axis=1) <= 0).all()
    grid = chunks(rows, size)
    for n in range(len(rows)):
        for c in range(count):
            part = slice(c * size, (c + 1) * size)
            assert grid.tokens[n * count + c].tolist() == rows.tokens[n, part].tolist()
            assert grid.lengths[n * count + c] == rows.mask[n, part].sum()


def test_packing_by_hand():
    rows = pack([np.array([5, 6, 7]), np.array([8])], sequence_length=4, eos_id=EOS, pad_id=PAD)
    assert rows.tokens.tolist() == [[5, 6, 7, 2], [8, 2, 0, 0]]
    assert rows.mask.tolist() == [[True] * 4, [True, True, False, False]]
    rows = pack_by_document(
        [np.array([5, 6, 7]), np.array([], int), np.array([8])], sequence_length=2, pad_id=PAD
    )
    assert rows.tokens.tolist() == [[5, 6], [7, 0], [8, 0]]
    assert rows.document.tolist() == [0, 0, 2]


def test_a_chunk_length_that_does_not_divide_the_row_is_an_error():
    rows = pack([np.array([5])], sequence_length=6, eos_id=EOS, pad_id=PAD)
    with pytest.raises(DataError, match="6 is not a multiple of the chunk length 4"):
        chunks(rows, 4)


def test_nothing_to_pack_is_an_error():
    with pytest.raises(DataError, match="no documents"):
        pack([], sequence_length=4, eos_id=EOS, pad_id=PAD)
    with pytest.raises(DataError, match="sequence_length"):
        pack([np.array([5])], sequence_length=0, eos_id=EOS, pad_id=PAD)
