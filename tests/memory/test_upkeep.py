"""Laws of deleting, compacting and appending: what lives stays as it was."""

import dataclasses
import itertools

import numpy as np
import pytest

from jaxlab.data.sources import Document
from jaxlab.errors import BankError, DataError
from jaxlab.memory import pipeline
from jaxlab.memory.pipeline import append_to_bank
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.store import Bank, StoredReference
from tests.inference.small import (
    TEXTS,
    letters,
    small_bank,
    small_encoder,
    small_model,
    write_small_bank,
)
from tests.memory.stored import SPEC, bits, contents, files_of, flip, part_of, told, written

COUNTS = (3, 2, 4)


# Delete


def test_deleted_rows_are_read_no_more_and_the_others_are_what_they_were(tmp_path):
    whole = told(written(tmp_path, counts=COUNTS))
    reader = Bank.open(tmp_path)
    bank = Bank.open(tmp_path, write=True)
    assert bank.alive() is None
    assert bank.delete(rows=[1, 7]) == 2 and bank.delete(rows=[7, 3]) == 1
    for each in (bank, Bank.open(tmp_path)):
        assert (each.rows, len(each)) == (9, 6)
        assert np.flatnonzero(~each.alive()).tolist() == [1, 3, 7]
        assert told(each) == [whole[row] for row in (0, 2, 4, 5, 6, 8)]
        for row in (1, 3, 7):
            for read in (each.read, each.references):
                with pytest.raises(BankError, match=f"reference {row} was deleted"):
                    read([0, row])
        assert each.verify().ok and each.stats()["references"] == 6
        assert not each.read([-1]).memories.astype(np.float32).any()
    assert told(reader) == whole  # as it was when opened
    assert len(files_of(tmp_path / "deleted")) == 2
    Bank.open(tmp_path, write=True)
    assert len(files_of(tmp_path / "deleted")) == 1


def test_verify_counts_what_lives(tmp_path):
    bank = written(tmp_path)
    _, _, embeddings, references = contents(4, seed=3)
    bank.append_cold(embeddings, references)
    bank.warm(np.array([6, 8]), contents(2)[0])
    bank.delete(rows=[1, 5, 6])
    found = bank.verify()
    assert (found.references, found.cold) == (6, 1)  # 7 is cold, 8 is not
    (tmp_path / "deleted").rename(tmp_path / "elsewhere")
    late = Bank.open(tmp_path)
    found = late.verify()
    assert (found.references, found.cold, found.missing) == (9, 2, ("deleted",))
    (tmp_path / "elsewhere").rename(tmp_path / "deleted")
    flip(part_of(tmp_path, bank.shards[2], "kept"))
    found = late.verify()
    assert (found.references, found.cold) == (6, 1) and found.damaged == (bank.shards[2].name,)
    assert len(late) == 6  # known from now on


def test_who_opens_a_bank_while_rows_are_deleted_sees_it_before_or_after(tmp_path, monkeypatch):
    bank, opened = written(tmp_path), []
    bank.delete(rows=[1])
    read = Bank._read_alive

    def late(self, header):
        if not opened:
            opened.append(True)
            other = Bank.open(tmp_path, write=True)
            other.delete(rows=[2])
            Bank.open(tmp_path, write=True)  # clears away the list of before
        return read(self, header)

    monkeypatch.setattr(Bank, "_read_alive", late)
    assert np.flatnonzero(Bank.open(tmp_path).alive()).tolist() == [0, 3, 4]


def test_a_source_is_deleted_whole(tmp_path):
    bank = written(tmp_path, counts=COUNTS)
    assert bank.sources() == {"source 0": 3, "source 1": 2, "source 2": 4}
    assert bank.delete(rows=[0], sources=["source 2", "none"]) == 5
    assert bank.sources() == {"source 0": 2, "source 1": 2}
    assert np.flatnonzero(bank.alive()).tolist() == [1, 2, 3, 4]


def test_what_is_appended_later_lives(tmp_path):
    bank = written(tmp_path)
    bank.delete(rows=[0, 4])
    assert bank.append(*contents(2, seed=7)) == range(5, 7)
    assert np.flatnonzero(~Bank.open(tmp_path).alive()).tolist() == [0, 4]


def test_a_row_that_is_not_there_deletes_nothing(tmp_path):
    bank = written(tmp_path)
    for rows, wrong in (([1, 5], 5), ([-1, 1], -1), ([1, 10**30], 10**30)):
        with pytest.raises(BankError, match=f"has no reference {wrong}; nothing was deleted"):
            bank.delete(rows=rows)
    assert bank.alive() is None and bank.delete(rows=[]) == 0
    with pytest.raises(BankError, match="not open for writing"):
        Bank.open(tmp_path).delete(rows=[1])


def test_a_damaged_list_of_deleted_rows_lets_nothing_be_read(tmp_path):
    written(tmp_path).delete(rows=[1])
    (file,) = (tmp_path / "deleted").iterdir()
    for damage in (flip, lambda path: path.unlink()):
        content = file.read_bytes()
        damage(file)
        bank = Bank.open(tmp_path)
        report = bank.verify()
        assert "deleted" in (*report.damaged, *report.missing)
        for read in (lambda b: b.read([1]), lambda b: b.references([0]), len):
            with pytest.raises(BankError, match=r"deleted/[\w-]+ is damaged or missing"):
                read(bank)
        with pytest.raises(BankError, match="cannot be made again"):
            Bank.open(tmp_path, write=True).repair()
        file.write_bytes(content)


def test_search_passes_over_the_deleted_and_gives_as_many_as_it_should(tmp_path):
    bank = small_bank(tmp_path)
    before = MemoryReader.open(bank, model_embed=letters).search(["aabb", "", "hhgg"], 8)
    Bank.open(bank.url, write=True).delete(rows=[0, 6])
    reader = MemoryReader.open(Bank.open(bank.url), model_embed=letters)
    for k in (1, 2, 5, 8):
        found = reader.search(["aabb", "", "hhgg"], k)
        for row, scores, ids in zip(range(3), before.scores, before.ids, strict=True):
            wanted = [(i, s) for i, s in zip(ids, scores, strict=True) if i not in (-1, 0, 6)]
            wanted = (wanted + [(-1, -np.inf)] * k)[:k]
            assert found.ids[row].tolist() == [i for i, _ in wanted]
            assert found.scores[row].tolist() == [s for _, s in wanted]
    living = np.array([1, 2, 3, 4, 5, 7])
    shuffled = reader.shuffled(seed=0)
    exchanged = shuffled._permutation[living]
    assert sorted(exchanged) == living.tolist() and (exchanged != living).all()


# Compact


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("dead", [(), (1, 3, 7), (3, 4), tuple(range(9))])
def test_a_compacted_bank_says_the_same_of_what_lives(tmp_path, size, dead):
    bank = written(tmp_path, counts=COUNTS)
    bank.delete(rows=dead)
    before = told(bank)
    bank.compact(shard_references=size)
    for each in (bank, Bank.open(tmp_path)):
        assert told(each) == before and each.alive() is None and each.verify().ok
        assert len(each) == each.rows == 9 - len(dead)
        starts = [shard.start for shard in each.shards]
        assert starts == [0, *itertools.accumulate(s.count for s in each.shards)][: len(starts)]
    assert {p.name for p in (tmp_path / "shards").glob("*") if any(p.rglob("*.json"))} == {
        shard.name for shard in bank.shards
    }
    assert not files_of(tmp_path / "deleted")
    assert bank.append(*contents(2, seed=9)) == range(9 - len(dead), 11 - len(dead))
    assert bank.verify().ok


def test_compacting_leaves_whole_shards_alone_and_merges_small_ones(tmp_path):
    bank = written(tmp_path, counts=(4, 1, 2, 4, 1))
    names = [shard.name for shard in bank.shards]
    assert bank.compact(shard_references=4) == 1
    assert [shard.count for shard in bank.shards] == [4, 3, 4, 1]
    kept = [shard.name for shard in bank.shards]
    assert (kept[0], kept[2], kept[3]) == (names[0], names[3], names[4])
    header = (tmp_path / "header.json").read_bytes()
    assert bank.compact(shard_references=4) == 0
    assert (tmp_path / "header.json").read_bytes() == header


def test_compacting_merges_cold_shards_once_they_are_encoded(tmp_path):
    bank = Bank.create(tmp_path, spec=SPEC)
    memories, _, embeddings, references = contents(8)
    for part in (slice(0, 4), slice(4, 8)):
        bank.append_cold(embeddings[part], references[part])
    bank.warm(np.array([0, 1, 2, 3, 6]), memories[[0, 1, 2, 3, 6]])
    before = told(bank)
    partly = bank.shards[1].name
    assert bank.compact(shard_references=4) == 1
    assert told(Bank.open(tmp_path)) == before and bank.verify().ok
    assert [shard.cold for shard in bank.shards] == [False, True]
    assert bank.cold_rows().tolist() == [4, 5, 7]
    # To rewrite a full shard that is cold in part would give back nothing.
    assert bank.shards[1].name == partly and bank.compact(shard_references=4) == 0


@pytest.mark.parametrize("encoded", [(), (0, 3), tuple(range(6))])
def test_compacting_merges_many_small_additions_encoded_or_not(tmp_path, encoded):
    bank = Bank.create(tmp_path, spec=SPEC)
    memories, _, embeddings, references = contents(6)
    for row in range(6):
        bank.append_cold(embeddings[row : row + 1], references[row : row + 1])
    bank.warm(np.array(encoded, np.int64), memories[list(encoded)])
    before = told(bank)
    assert bank.compact() == 1
    after = Bank.open(tmp_path)
    assert told(after) == before and [shard.count for shard in after.shards] == [6]
    assert set(after.cold_rows()) == set(range(6)) - set(encoded) and after.verify().ok


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", [1, 7, 12, 13])
def test_a_compaction_that_ends_before_its_commit_changes_nothing(tmp_path, monkeypatch, when):
    from jaxlab.memory import writing

    bank = written(tmp_path, counts=COUNTS)
    bank.delete(rows=[4])
    before, files, calls = told(bank), files_of(tmp_path), []

    def dying(kvstore, key, content, write=writing.write_object, **options):
        calls.append(key)
        if len(calls) == when:
            raise Killed
        return write(kvstore, key, content, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(writing, "write_object", dying)
        bank.compact(shard_references=4)
    again = Bank.open(tmp_path, write=True)
    assert told(again) == before and files_of(tmp_path) == files
    again.compact(shard_references=4)
    assert told(Bank.open(tmp_path)) == before


# Append


def test_appending_adds_what_is_not_there_and_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "ReferenceEncoder", lambda model: small_encoder())
    monkeypatch.setattr(type(small_model()), "embed_texts", lambda self, texts: letters(texts))
    write_small_bank(tmp_path, TEXTS[:4])
    url, silent = str(tmp_path / "bank"), {"report": lambda _: None}
    Bank.open(url, write=True).delete(rows=[1])
    documents = [Document(f"doc {n}", text) for n, text in enumerate(TEXTS)]
    added = append_to_bank(small_model(), documents, url, shard_references=3, **silent)
    assert added == range(4, 9)
    assert not append_to_bank(small_model(), documents, url, **silent)
    bank = Bank.open(url)
    assert [shard.count for shard in bank.shards] == [4, 3, 2] and len(bank) == 8
    wanted = small_bank(tmp_path / "whole")
    rows = [0, 4, 2, 3, 5, 6, 7, 8]
    assert bank.references(rows) == wanted.references(range(8))
    assert bits(bank.read(rows).memories) == bits(wanted.read(range(8)).memories)
    other = dataclasses.replace(documents[0], id="elsewhere")
    assert len(append_to_bank(small_model(), [other], url, **silent)) == 1


def test_a_reference_that_is_given_twice_is_added_once(tmp_path, monkeypatch):
    monkeypatch.setattr(type(small_model()), "embed_texts", lambda self, texts: letters(texts))
    write_small_bank(tmp_path, TEXTS[:2])
    url, silent = str(tmp_path / "bank"), {"cold": True, "report": lambda _: None}
    documents = [Document("notes", text) for text in (TEXTS[5], TEXTS[4], TEXTS[5], TEXTS[4])]
    documents.append(Document("elsewhere", TEXTS[5]))
    assert append_to_bank(small_model(), documents, url, **silent) == range(2, 5)
    found = Bank.open(url).references(range(2, 5))
    assert [(one.source, one.text) for one in found] == [
        ("notes", TEXTS[5]),
        ("notes", TEXTS[4]),
        ("elsewhere", TEXTS[5]),
    ]


def test_blank_texts_are_left_out_and_refused_where_there_are_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(type(small_model()), "embed_texts", lambda self, texts: letters(texts))
    write_small_bank(tmp_path, TEXTS[:2])
    url, silent = str(tmp_path / "bank"), {"cold": True, "report": lambda _: None}
    blank = [Document("notes", " " * 30), Document("notes", " \n")]
    with pytest.raises(DataError, match="the texts are white space alone"):
        append_to_bank(small_model(), blank, url, **silent)
    some = [blank[0], Document("notes", TEXTS[5]), blank[1]]
    assert append_to_bank(small_model(), some, url, **silent) == range(2, 3)
    assert Bank.open(url).reference(2).text == TEXTS[5]


def test_a_reference_is_had_only_with_text_and_source(tmp_path):
    bank = written(tmp_path)
    first = bank.reference(0)
    others = [
        first,
        dataclasses.replace(first, text="other"),
        dataclasses.replace(first, source="other"),
        StoredReference("", "", 0),
        bank.reference(4),
        first,
    ]
    assert bank.has(others).tolist() == [True, False, False, False, True, True]
    bank.delete(rows=[4])
    assert bank.has(others).tolist() == [True, False, False, False, False, True]
