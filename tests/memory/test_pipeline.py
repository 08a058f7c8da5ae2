"""Laws of writing a bank: what is in it, going on behind a kill, refusing another corpus."""

import dataclasses

import numpy as np
import pytest

from jaxlab.data.sources import Document
from jaxlab.errors import BankError, ConfigError
from jaxlab.memory import pipeline
from jaxlab.memory.pipeline import bank_exists, write_bank
from jaxlab.memory.progress import Progress
from jaxlab.memory.store import Bank
from tests.inference.small import (
    TEXTS,
    letters,
    small_encoder,
    small_model,
    without_memory_layers,
    write_small_bank,
)


def opened(folder) -> Bank:
    return Bank.open(str(folder / "bank"), identity=small_model().identity)


def test_a_bank_holds_every_reference_with_its_memory_text_source_and_embedding(tmp_path):
    # The second document is two references of at most 12 tokens, none of them across documents.
    texts = ["aabb", "cdcdcdcdcdcdefe", "h"]
    report = write_small_bank(tmp_path, texts)
    bank = opened(tmp_path)
    assert (report.references, report.resumed_at) == (4, 0)
    assert report.bytes == bank.stats()["bytes"]
    cut = ["aabb", "cdcdcdcdcdcd", "efe", "h"]
    assert [r.text for r in bank.references(range(4))] == cut
    assert [r.source for r in bank.references(range(4))] == ["doc 0", "doc 1", "doc 1", "doc 2"]
    assert [r.tokens for r in bank.references(range(4))] == [4, 12, 3, 1]
    assert bank.read(np.arange(4)).kept.tolist() == [4, 4, 3, 1]
    wanted = letters(cut)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(bank.embeddings(), wanted, atol=1e-6)
    config = small_model().config
    assert bank.spec.memory_shape == (2, 2, 2, 4, 8)
    assert bank.spec.preface == small_model().tokenizer.preface_ids
    assert bank.spec.chunk_length == config.memory.chunk_length
    assert bank.spec.references_per_chunk == config.memory.references_per_chunk


def test_the_size_of_shards_changes_nothing_that_is_read(tmp_path):
    write_small_bank(tmp_path / "one")
    write_small_bank(tmp_path / "three", shard_references=3)
    one, three = opened(tmp_path / "one"), opened(tmp_path / "three")
    assert len(three.shards) == 3 and len(one.shards) == 1
    ids = np.arange(len(TEXTS))
    np.testing.assert_allclose(one.read(ids).memories, three.read(ids).memories, atol=1e-6)
    assert one.references(range(8)) == three.references(range(8))


def drawn(count: int = 90) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    tokens = draw.integers(270, 290, (count, 12)).astype(np.int32)
    lengths = draw.integers(1, 13, count).astype(np.int32)
    tokens[np.arange(12) >= lengths[:, None]] = 0
    return tokens, lengths


def test_more_references_than_a_batch_are_encoded_each_like_itself():
    encode = small_encoder()
    tokens, lengths = drawn()
    whole = encode(tokens, lengths)
    assert whole.shape == (90, 2, 2, 2, 4, 8)
    for few in (slice(0, 3), slice(30, 34), slice(39, 40), slice(None, None, -1)):
        np.testing.assert_array_equal(whole[few], encode(tokens[few], lengths[few]))


def test_batches_are_as_wide_as_their_references_need(monkeypatch):
    """At full width each gives the same memory, to the last places."""
    encode, shapes = small_encoder(), []
    tokens, lengths = drawn()
    batch = type(encode)._batch

    def watched(self, tokens, lengths):
        shapes.append((tokens.shape, lengths))
        return batch(self, tokens, lengths)

    monkeypatch.setattr(type(encode), "_batch", watched)
    found = encode(tokens, lengths)
    # Not 3, a quarter: a memory takes 4.
    short = int((lengths <= 6).sum())
    assert sorted({shape[1] for shape, _ in shapes}) == [6, 12]
    for width, count in ((6, short), (12, 90 - short)):
        sizes = [shape[0] for shape, _ in shapes if shape[1] == width]
        assert sum(sizes) == count and len(sizes) == -(-count // 32)
    assert all((each <= shape[1]).all() for shape, each in shapes)
    valid = np.arange(4) < lengths[:, None]
    for start in range(0, 90, 32):
        some = slice(start, start + 32)
        wide = batch(encode, tokens[some], lengths[some])
        kept = np.moveaxis(np.stack([found[some], wide]), 5, 2)[:, valid[some]]
        np.testing.assert_allclose(*kept, atol=1e-5)


def test_progress_says_how_fast_it_goes_and_when_it_will_end():
    clock, lines = iter([0.0, 2.0, 4.0, 100.0, 110.0, 300.0]), []
    progress = Progress(lines.append, "bank b", 1_000_000, begun=200, clock=lambda: next(clock))
    for done in (2_200, 999_000, 1_200, 210, 1_000_000):
        progress(done)
    assert lines == [
        "bank b: 2,200 of 1,000,000 references, 1,000/s, 17 min left",
        "bank b: 999,000 of 1,000,000 references, 249,700/s, 1 s left",
        "bank b: 1,200 of 1,000,000 references, 10/s, 27.7 h left",
        "bank b: 210 of 1,000,000 references, 0.091/s, 3054.9 h left",
        "bank b: 1,000,000 of 1,000,000 references, 3,333/s",
    ]


class Killed(BaseException):
    pass


def test_a_killed_writer_goes_on_behind_the_last_whole_shard(tmp_path, monkeypatch):
    write_small_bank(tmp_path / "whole", shard_references=3)
    store, done = Bank.store, []

    def dying(self, *args, **options):
        if len(done) == 2:
            raise Killed
        done.append(1)
        return store(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Bank, "store", dying)
        write_small_bank(tmp_path, shard_references=3)
    assert len(opened(tmp_path)) == 6
    report = write_small_bank(tmp_path, shard_references=3)
    assert (report.references, report.resumed_at) == (len(TEXTS), 6)
    whole, again = opened(tmp_path / "whole"), opened(tmp_path)
    assert again.verify().ok and again.references(range(8)) == whole.references(range(8))
    ids = np.arange(8)
    assert again.read(ids).memories.tobytes() == whole.read(ids).memories.tobytes()
    # And once more: there is nothing left to do.
    assert write_small_bank(tmp_path).resumed_at == len(TEXTS)


def test_a_bank_is_not_continued_with_another_corpus(tmp_path):
    write_small_bank(tmp_path)
    for other in (["bbbb", *TEXTS[1:]], TEXTS[:3], [*TEXTS[:-1], "aaaa"]):
        with pytest.raises(BankError, match="reference .* begun with another source") as raised:
            write_small_bank(tmp_path, other)
        # It may be the same source, and something appended behind it.
        assert ("`jaxlab memory append` added it" in str(raised.value)) == (other[0] == TEXTS[0])
    assert len(opened(tmp_path)) == len(TEXTS)


@pytest.mark.parametrize("row", [1, 2, 5, 6])
@pytest.mark.parametrize("whole", [True, False])
def test_a_change_anywhere_in_the_source_is_noticed_and_its_row_named(tmp_path, row, whole):
    write_small_bank(tmp_path, TEXTS if whole else TEXTS[:7], shard_references=3)
    Bank.open(tmp_path / "bank", write=True).delete(rows=[3])
    changed = [*TEXTS[:row], "ababab", *TEXTS[row + 1 :]]
    with pytest.raises(BankError, match=f"reference {row} is not .* another source"):
        write_small_bank(tmp_path, changed)
    changed = [*TEXTS[:3], "ababab", *TEXTS[4:]]
    assert write_small_bank(tmp_path, changed).references == len(TEXTS) - 1  # 3 was deleted


def test_a_bank_is_neither_continued_nor_read_with_another_model(tmp_path):
    write_small_bank(tmp_path)
    model = small_model()
    other = dataclasses.replace(
        model, params={**model.params, "embedding": model.params["embedding"] + 1}
    )
    with pytest.raises(BankError, match="the model of the bank is"):
        write_bank(other, [Document("d", "ab")], str(tmp_path / "bank"))


def test_whether_a_bank_exists(tmp_path):
    assert not bank_exists(str(tmp_path / "bank"))
    write_small_bank(tmp_path, TEXTS[:1])
    assert bank_exists(str(tmp_path / "bank"))


def test_the_embedder_that_the_configuration_names_is_fitted_and_kept(tmp_path, monkeypatch):
    model = small_model()
    config = dataclasses.replace(
        model.config, memory=dataclasses.replace(model.config.memory, embedder="lsa")
    )
    model = dataclasses.replace(model, config=config)
    monkeypatch.setattr(pipeline, "ReferenceEncoder", lambda model: small_encoder())
    documents = [Document(f"d{n}", text) for n, text in enumerate(["ab cd", "ef gh", "ab gh"])]
    lines = []
    write_bank(model, documents, str(tmp_path / "bank"), report=lines.append)
    bank = Bank.open(str(tmp_path / "bank"), identity=model.identity)
    assert bank.spec.embedder == "lsa"
    (line,) = lines
    assert line.startswith(f"bank {tmp_path}/bank: 3 of 3 references, ") and line.endswith("/s")
    rows = bank.embedder().embed(["ef gh", "ab cd"]) @ bank.embeddings().T
    assert rows.argmax(axis=1).tolist() == [1, 0]


def test_a_model_without_memory_layers_writes_no_bank(tmp_path):
    plain = without_memory_layers(small_model())
    with pytest.raises(ConfigError, match="model small has no memory layers"):
        write_bank(plain, [Document("d", "ab")], str(tmp_path / "bank"))
    assert not bank_exists(str(tmp_path / "bank"))
