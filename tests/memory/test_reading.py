"""Laws of reading by row: texts, embeddings and sources, each alone, with a bounded cache."""

import numpy as np
import pytest
import tensorstore as ts

from jaxlab.errors import BankError
from jaxlab.memory import access
from jaxlab.memory.store import Bank, StoredReference
from tests.memory.stored import SPEC, contents, written


def bytes_read() -> int:
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def test_a_text_is_read_alone_whatever_the_others_are(tmp_path):
    memories, kept, embeddings, references = contents(3)
    references[1] = StoredReference("long " * 100_000, "s", 7)
    Bank.create(tmp_path, spec=SPEC).append(memories, kept, embeddings, references)
    bank = Bank.open(tmp_path)
    bank.reference(0)  # the table of lines is now in the cache
    before = bytes_read()
    assert bank.reference(2) == references[2]
    assert bytes_read() - before == len(references[2].to_line())
    assert bank.references([2, 0, 2, 1]) == [references[row] for row in (2, 0, 2, 1)]


def test_the_tokens_of_a_text_come_back_where_they_were_given(tmp_path):
    memories, kept, embeddings, _ = contents(2)
    references = [StoredReference("a", "s", 2, ids=(5, 6)), StoredReference("b", "s", 1)]
    Bank.create(tmp_path, spec=SPEC).append(memories, kept, embeddings, references)
    assert Bank.open(tmp_path).references([0, 1]) == references


@pytest.mark.parametrize("rows", [1, 2, 4, 100])
def test_blocks_of_embeddings_are_the_embeddings_in_order(tmp_path, rows):
    bank = written(tmp_path, counts=(3, 2, 4))
    whole = bank.embeddings()
    blocks = list(bank.embedding_blocks(rows))
    assert [start for start, _ in blocks] == list(range(0, 9, rows))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), whole)


def test_sources_are_found_without_their_texts(tmp_path):
    bank = Bank.create(tmp_path, spec=SPEC)
    for names in (["b", "a", "b"], ["c", "a"]):
        memories, kept, embeddings, _ = contents(len(names))
        references = [StoredReference("t", name, 1) for name in names]
        bank.append(memories, kept, embeddings, references)
    for path in tmp_path.rglob("references.jsonl"):
        path.unlink()
    bank = Bank.open(tmp_path)
    assert bank.sources() == {"a": 2, "b": 2, "c": 1}
    assert bank.rows_of(["a", "none"]).tolist() == [False, True, False, False, True]
    assert bank.rows_of(["c", "b"]).tolist() == [True, False, True, True, False]
    assert not bank.rows_of([]).any()


def test_arrays_that_were_closed_are_opened_again(tmp_path, monkeypatch):
    written(tmp_path, counts=(3, 2, 4))
    monkeypatch.setattr(access, "_OPEN_ARRAYS", 2)
    bank, ids = Bank.open(tmp_path), [8, 0, 4, 3]
    first = bank.read(ids).memories.tobytes()
    assert bank.read(ids).memories.tobytes() == first
    assert bank._array.cache_info().currsize == 2


def test_the_fingerprint_is_that_of_the_embeddings_in_their_rows(tmp_path):
    marks = {
        name: written(tmp_path / name, counts=counts).fingerprint()
        for name, counts in {"one": (3, 2), "same": (3, 2), "more": (3, 2, 1), "less": (3,)}.items()
    }
    assert marks["one"] == marks["same"] == Bank.open(tmp_path / "one").fingerprint()
    assert len(set(marks.values())) == 3
    memories, kept, embeddings, references = contents(3)
    bank = Bank.create(tmp_path / "other", spec=SPEC)
    bank.append(memories, kept, embeddings + 1e-3, references)
    assert bank.fingerprint() != marks["less"]


def test_texts_of_no_row_are_refused(tmp_path):
    bank = written(tmp_path)
    for ids in ([0, 5], [-1, 2]):
        with pytest.raises(BankError, match="has 5 references; there is no"):
            bank.references(ids)


def test_rows_of_a_shard_that_was_set_aside_are_read_from_no_other(tmp_path):
    bank = written(tmp_path, counts=(3, 2, 4))
    whole = bank.embeddings()
    (tmp_path / bank.shards[1].folder / "references.jsonl").unlink()
    bank.repair(set_aside=True)
    assert not bank.embeddings(2, 6)[1:3].any()
    np.testing.assert_array_equal(bank.embeddings(2, 6)[[0, 3]], whole[[2, 5]])
    for rows in ([2, 3], [4]):
        for read in (bank.embeddings_of, bank.read_any):
            with pytest.raises(BankError, match=f"reference {rows[-1]} lies in no shard"):
                read(np.array(rows))
    (tmp_path / bank.shards[0].folder / "references.jsonl").unlink()
    bank = Bank.open(tmp_path, write=True)
    bank.repair(set_aside=True)
    with pytest.raises(BankError, match="reference 1 lies in no shard"):
        bank.embeddings_of(np.array([1, 6]))
