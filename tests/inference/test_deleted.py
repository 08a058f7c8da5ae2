"""Laws of references that are deleted or repaired while a request is about to read them."""

import dataclasses

import pytest

from jaxlab.inference.engine import Engine
from jaxlab.memory import pipeline
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.store import Bank
from tests.inference.small import letters, losing_reader, small_bank, small_encoder, small_model


@pytest.fixture(scope="module")
def engine_of():
    """Engines that share their programs, with room for references in their context."""
    small = small_model()
    longer = dataclasses.replace(small.config.model, max_context=128)
    model = dataclasses.replace(small, config=dataclasses.replace(small.config, model=longer))
    first = Engine(model, use_preface=True, rows=1)
    return lambda reader: Engine(model, reader, rows=1, like=first)


@pytest.mark.parametrize("memory", ["on", "shuffled", "text"])
def test_what_was_deleted_before_it_was_read_is_searched_for_again(tmp_path, engine_of, memory):
    bank = small_bank(tmp_path)
    nearest = int(MemoryReader.open(bank, model_embed=letters).search(["aaab"]).ids[0, 0])
    (found,) = engine_of(losing_reader(bank)).generate(["aaab"], max_tokens=2, memory=memory)
    reader = MemoryReader.open(Bank.open(bank.url), model_embed=letters)
    (wanted,) = engine_of(reader).generate(["aaab"], max_tokens=2, memory=memory)
    assert found == wanted and found.citations
    assert nearest not in {one.reference for one in found.citations}


@pytest.mark.parametrize("memory", ["on", "shuffled", "text"])
def test_what_was_repaired_before_it_was_read_is_read_all_the_same(
    tmp_path, engine_of, monkeypatch, memory
):
    bank = small_bank(tmp_path)
    engine = engine_of(MemoryReader.open(Bank.open(bank.url), model_embed=letters))
    (wanted,) = engine_of(MemoryReader.open(bank, model_embed=letters)).generate(
        ["aaab"], max_tokens=2, memory=memory
    )
    for path in (tmp_path / "bank" / bank.shards[0].folder / "memories").rglob("*"):
        path.is_file() and path.unlink()
    monkeypatch.setattr(pipeline, "ReferenceEncoder", lambda model: small_encoder())
    encode = pipeline.reference_encoder(small_model())
    done = Bank.open(bank.url, write=True).repair(encode=encode, model_embed=letters)
    assert len(done.repaired) == 1
    (found,) = engine.generate(["aaab"], max_tokens=2, memory=memory)
    assert found == wanted and found.citations
