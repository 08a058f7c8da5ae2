"""References and neighbours: cut once, kept whole, refused when they belong to something else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.data.packing import pack
from jaxlab.data.references import (
    References,
    load_neighbours,
    neighbours,
    save_neighbours,
    split_references,
)
from jaxlab.data.sources import Document
from jaxlab.data.tokenizer import train_tokenizer
from jaxlab.errors import DataError

from .conftest import sentences


@pytest.fixture(scope="module")
def documents():
    return [Document(f"d{i}", text) for i, text in enumerate(["", *sentences(6), "é"])]


@pytest.fixture(scope="module")
def references(documents, tokenizer):
    return References.build(documents, tokenizer, length=16)


@pytest.fixture(scope="module")
def rows(documents, tokenizer):
    encoded = tokenizer.encode_batch([d.text for d in documents])
    return pack(encoded, sequence_length=32, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(1, 9))
def test_references_joined_are_the_document(size, length):
    document = np.arange(size)
    parts = split_references(document, length=length)
    assert [t for part in parts for t in part] == document.tolist()
    assert all(len(part) == length for part in parts[:-1])
    assert all(0 < len(part) <= length for part in parts)


def test_no_reference_crosses_a_document_and_each_knows_its_own(references, documents, tokenizer):
    assert references.sources == sorted(references.sources, key=[d.id for d in documents].index)
    for document in documents:
        own = [i for i, source in enumerate(references.sources) if source == document.id]
        ids = [t for i in own for t in references.tokens[i, : references.lengths[i]]]
        assert ids == tokenizer.encode(document.text)
        assert [references.texts[i] for i in own] == [
            tokenizer.decode(references.tokens[i, : references.lengths[i]]) for i in own
        ]
    assert (references.tokens[np.arange(16) >= references.lengths[:, None]] == 0).all()
    assert references.tokens.dtype == references.lengths.dtype == np.int32


def test_copies_count_the_equal_tokens_before():
    tokens = np.array([[5, 7, 5, 5, 7], [0, 0, 9, 0, 0]], np.int32)
    references = References(tokens, np.array([5, 3], np.int32), ["", ""], ["", ""], "")
    huge = np.iinfo(np.int32).max
    assert references.copies.tolist() == [[0, 0, 1, 2, 1], [0, 1, 0, huge, huge]]


def test_nothing_to_cut_is_an_error(tokenizer):
    with pytest.raises(DataError, match="no references"):
        References.build([Document("a", "")], tokenizer)
    with pytest.raises(DataError, match="length is 0"):
        split_references(np.arange(3), length=0)


# Files


def test_saved_references_come_back_equal(references, tokenizer, tmp_path):
    references.save(tmp_path / "r.npz")
    loaded = References.load(tmp_path / "r.npz", tokenizer=tokenizer)
    assert (loaded.tokens == references.tokens).all()
    assert (loaded.lengths == references.lengths).all()
    assert (loaded.texts, loaded.sources) == (references.texts, references.sources)
    assert loaded.fingerprint == references.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["r.npz"]


def test_references_of_another_tokenizer_are_refused_by_both_names(references, tokenizer, tmp_path):
    other = train_tokenizer(sentences(30), vocab_size=300, path=tmp_path / "other.model")
    references.save(tmp_path / "r.npz")
    with pytest.raises(DataError) as caught:
        References.load(tmp_path / "r.npz", tokenizer=other)
    assert tokenizer.hash in str(caught.value)
    assert other.hash in str(caught.value)


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a file",
        lambda data: data[: len(data) // 2],
        lambda data: flipped(data, len(data) // 2),
    ],
    ids=["empty", "foreign", "truncated", "flipped bit"],
)
def test_damaged_references_are_refused(references, tokenizer, tmp_path, damage):
    path = tmp_path / "r.npz"
    references.save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"r\.npz: .*build it anew"):
        References.load(path, tokenizer=tokenizer)


def test_a_change_that_the_container_does_not_see_is_refused(references, tokenizer, tmp_path):
    path = tmp_path / "r.npz"
    references.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["tokens"][0, 0] += 1
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=r"r\.npz: its checksum"):
        References.load(path, tokenizer=tokenizer)


def test_missing_and_other_files_are_refused(references, rows, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"none\.npz: cannot be read"):
        References.load(tmp_path / "none.npz", tokenizer=tokenizer)
    ids = np.zeros((len(rows), 2), np.int32)
    save_neighbours(tmp_path / "n.npz", ids, rows=rows, references=references, settings={})
    with pytest.raises(DataError, match="holds neighbours in format 1, not references"):
        References.load(tmp_path / "n.npz", tokenizer=tokenizer)


# Neighbours


class Search:
    """Answers every query with the same references; remembers what was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, texts, k):
        self.asked += texts
        ids = np.array([self.answer[:k]] * len(texts))
        return ids, np.zeros(ids.shape, np.float32)


def found(rows, references, tokenizer, search, limit=1.0, candidates=3):
    return neighbours(
        rows,
        references,
        tokenizer=tokenizer,
        search=search,
        chunk_length=8,
        candidates=candidates,
        limit=limit,
    )


def test_each_chunk_asks_with_its_text_and_padding_asks_nothing(rows, references, tokenizer):
    search = Search([1, 0, 2])
    ids = found(rows, references, tokenizer, search)
    assert ids.shape == (len(rows), 4)
    assert ids.dtype == np.int32
    lengths = rows.mask.reshape(len(rows), 4, 8).sum(axis=2)
    assert not rows.mask[-1, -1], "the last row should end in padding"
    assert (ids == np.where(lengths > 0, 1, -1)).all()
    chunk_tokens = rows.tokens.reshape(-1, 8)
    texts = [
        tokenizer.decode(t[:n]) for t, n in zip(chunk_tokens, lengths.ravel(), strict=True) if n
    ]
    assert search.asked == texts


def test_a_reference_that_leaks_the_row_gives_way_to_the_next_candidate(
    rows, references, tokenizer
):
    other = references.sources.index("d5")
    chosen = found(rows, references, tokenizer, Search([0, other, 1]), limit=0.9)
    assert chosen[0].tolist() == [other] * 4
    nothing = found(rows, references, tokenizer, Search([0, -1, 0]), limit=0.9)
    assert nothing[0].tolist() == [-1] * 4


def test_fewer_hits_than_asked_for_are_enough(rows, references, tokenizer):
    assert found(rows, references, tokenizer, Search([2]), candidates=5)[0, 0] == 2


def test_an_index_of_other_references_is_an_error(rows, references, tokenizer):
    with pytest.raises(DataError, match="built from other references"):
        found(rows, references, tokenizer, Search([len(references)]))


def test_saved_neighbours_come_back_only_for_what_they_were_made_from(
    rows, references, tokenizer, documents, tmp_path
):
    path = tmp_path / "n.npz"
    ids = found(rows, references, tokenizer, Search([1, 0, 2]))
    save_neighbours(path, ids, rows=rows, references=references, settings={"limit": 0.9})
    loaded = load_neighbours(path, rows=rows, references=references, settings={"limit": 0.9})
    assert (loaded == ids).all()
    others = References.build(documents, tokenizer, length=17)
    more = pack([np.array([5])], sequence_length=32, eos_id=2, pad_id=0)
    for changed, message in (
        ({"settings": {"limit": 0.5}}, r"limit=0\.9 but limit=0\.5"),
        ({"settings": {}}, r"limit=0\.9 but limit=None"),
        ({"references": others}, "references='"),
        ({"rows": more}, "rows='"),
    ):
        arguments = {"rows": rows, "references": references, "settings": {"limit": 0.9}} | changed
        with pytest.raises(DataError, match=message):
            load_neighbours(path, **arguments)
