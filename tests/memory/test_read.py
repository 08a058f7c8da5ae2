"""Laws of reading: which references, which memories, in which slots."""

import numpy as np
import pytest

from jaxlab.data.overlap import overlap
from jaxlab.data.sources import Document
from jaxlab.errors import BankError, RewrittenError
from jaxlab.memory import pipeline
from jaxlab.memory.embedders import ModelEmbedder
from jaxlab.memory.indexing import build_index
from jaxlab.memory.library import open_reader
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.requantize import quantize_bank
from jaxlab.memory.retrieve import FlatIndex, Hits, Retriever
from jaxlab.memory.store import Bank, BankIdentity, BankSpec, StoredReference
from jaxlab.training.load import LoadedModel
from tests.inference.small import TEXTS, letters, small_bank, small_encoder, small_model
from tests.memory.stored import bits

SHAPE = (2, 2, 2, 3, 4)


def made_bank(url, texts) -> Bank:
    """A bank whose memories are their row numbers, one to three slots of each valid."""
    spec = BankSpec(
        identity=BankIdentity("m", "t", "c"),
        memory_shape=SHAPE,
        embedder="model",
        embedding_dim=8,
        dtype="float32",
        references_per_chunk=2,
    )
    bank = Bank.create(url, spec=spec)
    if texts:
        count = len(texts)
        bank.append(
            np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None, None, None],
                            (count, *SHAPE)),
            np.arange(count, dtype=np.int32) % 3 + 1,
            ModelEmbedder(letters).embed(texts),
            [StoredReference(text, f"source {n}", len(text)) for n, text in enumerate(texts)],
        )  # fmt: skip
    return bank


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    bank = made_bank(tmp_path_factory.mktemp("read") / "bank", TEXTS)
    return MemoryReader.open(bank, model_embed=letters)


def rows_read(slots):
    """The reference number that each slot's memory carries; -1 where the slot is empty."""
    found = np.asarray(slots.keys)[0, ..., 0, 0].astype(int)
    return np.where(np.asarray(slots.valid), found, -1)


def test_each_chunk_gets_the_valid_slots_of_its_references(reader):
    slots = reader.slots(np.array([[[0, 2], [1, -1]], [[-1, -1], [5, 5]]]))
    assert slots.keys.shape == slots.values.shape == (2, 2, 2, 6, 2, 4)
    np.testing.assert_array_equal(
        rows_read(slots),
        [
            [[0, -1, -1, 2, 2, 2], [1, 1, -1, -1, -1, -1]],
            [[-1, -1, -1, -1, -1, -1], [5, 5, 5, 5, 5, 5]],
        ],
    )


def test_shuffling_reads_another_memory_for_every_reference_and_each_just_once(reader):
    for seed in range(5):
        shuffled = reader.shuffled(seed=seed)
        ids = np.arange(len(TEXTS)).reshape(1, -1, 1)
        read = rows_read(shuffled.slots(ids))[0, :, 0]
        assert (read != ids.ravel()).all() and sorted(read) == list(range(len(TEXTS)))
        # The search is the one it was, and what has no hit stays empty.
        np.testing.assert_array_equal(shuffled.search(["ab"]).ids, reader.search(["ab"]).ids)
        assert (rows_read(shuffled.slots(np.array([[[-1, -1]]]))) == -1).all()
    one, same, other = (
        rows_read(reader.shuffled(seed=seed).slots(ids)).tolist() for seed in (1, 1, 2)
    )
    assert one == same != other


def test_an_empty_bank_has_nothing_to_find_or_to_shuffle(tmp_path):
    reader = MemoryReader.open(made_bank(tmp_path / "bank", []), model_embed=letters)
    hits = reader.search(["abc"])
    assert hits.ids.tolist() == [[-1, -1]]
    for one in (reader, reader.shuffled(seed=0)):
        assert not np.asarray(one.slots(hits.ids[None]).valid).any()


def test_search_gives_as_many_as_a_chunk_reads_unless_told(reader):
    assert reader.search(["ab", ""]).ids.shape == (2, 2)
    found = reader.search(["aaabca"], 5)
    assert found.ids.shape == (1, 5) and found.ids[0, 0] == 0
    assert reader.search(["zzz"]).ids.tolist() == [[-1, -1]]


def spell(text):
    return [ord(letter) for letter in text]


def test_the_filter_keeps_the_nearest_that_overlap_little_enough(reader):
    """Against the rule itself: walk down the candidates, drop what repeats the tested text."""
    texts = ["aabca", "ggha", "dece", "", "zz"]
    tested = [np.array(spell(t)) for t in ("xxaaabcaxx", "ffghffgghagg", "abc", "aaabca", "bcb")]
    for limit in (0.0, 0.5, 2 / 3, 1.0):
        found = reader.search_filtered(texts, tested, spell, limit=limit, candidates=4)
        plain = reader.search(texts, 4)
        for row, against in enumerate(tested):
            allowed = [
                (hit, score)
                for hit, score in zip(plain.ids[row], plain.scores[row], strict=True)
                if hit >= 0 and overlap(against, np.array(spell(TEXTS[hit]))) <= limit
            ]
            wanted = (allowed + [(-1, -np.inf)] * 2)[:2]
            assert found.ids[row].tolist() == [hit for hit, _ in wanted]
            assert found.scores[row].tolist() == [score for _, score in wanted]


def test_near_copies_of_the_tested_text_are_left_out(reader):
    copy = np.array(spell("so: aaabca."))
    kept = reader.search_filtered(["aaabca"], [copy], spell, limit=1.0, candidates=4)
    filtered = reader.search_filtered(["aaabca"], [copy], spell, limit=2 / 3, candidates=4)
    assert kept.ids[0, 0] == 0 and 0 not in filtered.ids[0] and filtered.ids[0, 0] >= 0


def test_texts_of_one_call_are_filtered_each_against_its_own(reader):
    """Chunks of one row share the tested tokens; equal chunks of other rows do not."""
    copy, free = np.array(spell("aaabca")), np.array(spell("xyz"))
    found = reader.search_filtered(
        ["aaabca"] * 3, [copy, free, copy], spell, limit=2 / 3, candidates=4
    )
    assert [0 in row for row in found.ids] == [False, True, False]


def test_a_reader_can_be_put_together_from_its_parts(reader):
    embedder = ModelEmbedder(letters)
    same = MemoryReader(reader.bank, Retriever(embedder, FlatIndex(reader.bank.embeddings())))
    one, other = (r.search(["ddee", "hh"]) for r in (same, reader))
    assert isinstance(one, Hits)
    np.testing.assert_array_equal(one.ids, other.ids)


def test_a_reader_finds_and_encodes_what_was_added_and_others_when_they_open(tmp_path, monkeypatch):
    monkeypatch.setattr(LoadedModel, "embed_texts", lambda self, texts: letters(texts))
    monkeypatch.setattr(pipeline, "ReferenceEncoder", lambda model: small_encoder())
    first = small_bank(tmp_path, TEXTS[:4])
    reader = open_reader(small_model(), first.url, grows=True)
    before = reader.search(["aabb"])
    rows = reader.add([Document(f"doc {n}", text) for n, text in enumerate(TEXTS)])
    assert rows == range(4, 8) and len(reader.bank) == 8
    whole = small_bank(tmp_path / "whole")
    wanted = MemoryReader.open(whole, model_embed=letters)
    assert bits(reader.search(TEXTS).ids) == bits(wanted.search(TEXTS).ids) != bits(before.ids)
    ids = np.array([[[5, 7]]])
    assert bits(reader.slots(ids).keys) == bits(wanted.slots(ids).keys)
    assert not len(reader.add([Document("doc 0", TEXTS[0])]))
    other = MemoryReader.open(Bank.open(first.url), model_embed=letters)
    assert bits(other.slots(ids).keys) == bits(wanted.slots(ids).keys)  # encoded by then
    with pytest.raises(BankError, match="opened for reading only"):
        other.add([Document("doc", "abc")])


def test_nothing_is_added_to_a_bank_whose_rows_were_renumbered(tmp_path, monkeypatch):
    monkeypatch.setattr(LoadedModel, "embed_texts", lambda self, texts: letters(texts))
    first = small_bank(tmp_path, TEXTS[:5])
    reader = open_reader(small_model(), first.url, grows=True)
    other = Bank.open(first.url, write=True)
    other.delete(rows=[0])
    other.compact()
    with pytest.raises(BankError, match="was rewritten since it was opened here"):
        reader.add([Document("doc", text) for text in TEXTS[5:]])
    assert len(Bank.open(first.url)) == 4
    again = open_reader(small_model(), first.url, grows=True)
    assert again.add([Document("doc", text) for text in TEXTS[5:]]) == range(4, 7)
    known = again.bank
    again.refresh()
    assert again.bank is known  # what it added itself was taken over


def test_what_was_deleted_elsewhere_is_not_found_after_a_refresh(tmp_path):
    bank = made_bank(tmp_path / "bank", TEXTS)
    reader = MemoryReader.open(bank, model_embed=letters)
    assert reader.search(["aaabca"]).ids[0, 0] == 0
    reader.refresh()
    assert reader.bank is bank  # nothing changed: it was not opened again
    Bank.open(bank.url, write=True).delete(rows=[0])
    reader.refresh()
    wanted = MemoryReader.open(Bank.open(bank.url), model_embed=letters)
    found = reader.search(TEXTS, 8)
    assert 0 not in found.ids and bits(found.ids) == bits(wanted.search(TEXTS, 8).ids)
    assert len(reader.bank) == len(TEXTS) - 1
    known = reader.bank
    reader.refresh()
    assert reader.bank is known


@pytest.mark.parametrize("grows", [False, True])
def test_what_was_appended_elsewhere_is_found_where_the_index_can_grow(tmp_path, grows):
    texts = [a + b for a in TEXTS for b in TEXTS] * 2
    bank = made_bank(tmp_path / "bank", texts)
    exact = MemoryReader.open(bank, model_embed=letters)
    build_index(Bank.open(bank.url, write=True), "IVF2,Flat", probes=2, model_embed=letters)
    append = (lambda documents: range(0)) if grows else None
    near = MemoryReader.open(Bank.open(bank.url), model_embed=letters, append=append)
    Bank.open(bank.url, write=True).append(
        np.full((1, *SHAPE), 128, np.float32), np.array([3], np.int32), letters(["h" * 9]),
        [StoredReference("h" * 9, "new", 9)],
    )  # fmt: skip
    Bank.open(bank.url, write=True).delete(rows=[63])  # the best of those that were there
    for reader, finds in ((exact, True), (near, grows)):
        reader.refresh()
        for sources in (None, ["new", "source 3"]):
            found = reader.search(["hhh"], sources=sources).ids
            assert (128 in found) == finds and 63 not in found
        reader.slots(found[None])
    assert (rows_read(exact.slots(np.array([[[128]]]))) == 128).all()


def test_deletions_are_taken_over_though_a_shard_that_was_never_seen_was_set_aside(tmp_path):
    """Its rows, and those of a shard that was read before, count as deleted and are not found."""
    bank = made_bank(tmp_path / "bank", TEXTS)
    reader = MemoryReader.open(Bank.open(bank.url), model_embed=letters)
    for row in range(8, 12):
        bank.append(
            np.full((1, *SHAPE), row, np.float32), np.array([3], np.int32), letters(["h" * 9]),
            [StoredReference("h" * 9, f"new {row}", 9)],
        )  # fmt: skip
        if row == 8:
            reader.refresh()
    for number in (1, 3):
        (tmp_path / "bank" / bank.shards[number].folder / "references.jsonl").unlink()
    assert len(bank.repair(set_aside=True).set_aside) == 2
    bank.delete(rows=[0])
    reader.refresh()
    wanted = MemoryReader.open(Bank.open(bank.url), model_embed=letters)
    texts = [*TEXTS, "hhh"]
    found = reader.search(texts, 12).ids
    assert bits(found) == bits(wanted.search(texts, 12).ids)
    assert {0, 8, 10}.isdisjoint(found.ravel()) and {9, 11} <= set(found[-1])
    assert rows_read(reader.slots(np.array([[[9, 11]]]))).max() == 11


def test_a_shard_that_is_made_again_while_it_is_taken_over_is_read_anew(tmp_path, monkeypatch):
    bank = made_bank(tmp_path / "bank", TEXTS)
    reader = MemoryReader.open(Bank.open(bank.url), model_embed=letters)
    bank.append(
        np.full((1, *SHAPE), 8, np.float32), np.array([3], np.int32), letters(["h" * 9]),
        [StoredReference("h" * 9, "new", 9)],
    )  # fmt: skip
    embeddings, damaged = Bank.embeddings, tmp_path / "bank" / bank.shards[-1].folder

    def late(self, *rows):
        if not repaired:
            (damaged / "sources.json").write_bytes(b"[]")
            repaired.extend(bank.repair().repaired)
        return embeddings(self, *rows)

    repaired = []
    monkeypatch.setattr(Bank, "embeddings", late)
    reader.refresh()
    assert len(repaired) == 1 and reader.search(["hhh"]).ids[0, 0] == 8


def test_a_bank_that_was_renumbered_or_lost_elsewhere_is_told_and_not_taken_over(tmp_path):
    bank = made_bank(tmp_path / "bank", TEXTS)
    reader = MemoryReader.open(bank, model_embed=letters)
    other = Bank.open(bank.url, write=True)
    other.delete(rows=[0])
    other.compact()
    for _ in range(2):
        with pytest.raises(RewrittenError, match="repaired with other embeddings, or made anew"):
            reader.refresh()
    assert reader.bank is bank
    (tmp_path / "bank" / "header.json").unlink()
    with pytest.raises(BankError, match="no memory bank"):
        reader.refresh()


@pytest.mark.parametrize("codec", ["", "OPQ2_8,Residual2x3,PQ2x3"])
def test_memories_that_cannot_be_stored_are_read_all_the_same(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(LoadedModel, "embed_texts", lambda self, texts: letters(texts))
    monkeypatch.setattr(pipeline, "ReferenceEncoder", lambda model: small_encoder())
    url = small_bank(tmp_path, ["aabbccdd" + text for text in TEXTS * 2]).url
    if codec:
        quantize_bank(Bank.open(url), tmp_path / "codes", codec=codec, rounds=(1, 1))
        url = str(tmp_path / "codes")
    reader = open_reader(small_model(), url, grows=True)
    reader.add([Document(f"doc {n}", text) for n, text in enumerate(TEXTS)])

    def full(self, *_, **__):
        raise BankError("cannot write (No space left on device)")

    ids = np.array([38, 1, 37, -1, 38])
    with monkeypatch.context() as patch:
        patch.setattr(Bank, "_write", full)
        found = reader.fetch(ids)
    assert Bank.open(url).read(ids).cold.tolist() == [True, False, True, False, True]
    wanted = open_reader(small_model(), url).fetch(ids)
    assert [bits(each) for each in found] == [bits(each) for each in wanted]
    assert not Bank.open(url).read(ids).cold.any()


def test_a_search_among_sources_finds_nothing_of_others(reader):
    sources = [reader.bank.reference(row).source for row in (2, 5)]
    found = reader.search([TEXTS[0]], 8, sources=sources)
    assert set(found.ids[0].tolist()) == {2, 5, -1}
    assert (reader.search([TEXTS[0]], sources=["nowhere"]).ids == -1).all()
