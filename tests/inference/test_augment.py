"""Laws of references as text: the baseline reads what memory reads, as a longer prompt."""

import dataclasses

import pytest

from jaxlab.errors import DataError
from jaxlab.inference import engine as engines
from jaxlab.inference.augment import augment, most_tokens
from jaxlab.inference.engine import Engine
from jaxlab.inference.requests import Request
from jaxlab.memory.read import MemoryReader
from tests.inference.small import TEXTS, letters, small_bank, small_model


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    bank = small_bank(tmp_path_factory.mktemp("augment"))
    return MemoryReader.open(bank, model_embed=letters)


@pytest.fixture(scope="module")
def model():
    """The small model with room for references in its context."""
    small = small_model()
    longer = dataclasses.replace(small.config.model, max_context=128)
    return dataclasses.replace(small, config=dataclasses.replace(small.config, model=longer))


def test_the_prompt_stands_behind_what_its_end_retrieves_the_nearest_last(reader):
    tokenizer = small_model().tokenizer
    prompt = tokenizer.encode("ccccaahh")
    tokens, cited = augment(reader, tokenizer, prompt)
    hits = reader.search(["aahh"])
    assert [one.reference for one in cited] == hits.ids[0].tolist()
    assert [one.score for one in cited] == hits.scores[0].tolist()
    near, far = (one.text for one in cited)
    assert tokenizer.decode(tokens) == f"Reference:{far}\nReference:{near}\nccccaahh"
    assert len(tokens) - len(prompt) <= most_tokens(reader, tokenizer)


def test_it_is_generation_from_the_longer_prompt_without_memory(reader, model):
    tokenizer = model.tokenizer
    engine = Engine(model, reader, rows=2)
    (found,) = engine.generate(["aahh"], max_tokens=7, memory="text")
    tokens, cited = augment(reader, tokenizer, tokenizer.encode("aahh"))
    (wanted,) = engine.generate([tokenizer.decode(tokens)], max_tokens=7, memory="off")
    assert found.tokens == wanted.tokens and tuple(found.citations) == cited
    (without,) = engine.generate(["aahh"], max_tokens=7, memory="off")
    assert found.tokens != without.tokens


def test_the_references_count_before_anything_is_searched(reader, model):
    engine = Engine(model, reader, rows=1)
    room = most_tokens(reader, model.tokenizer)
    assert len(engine.encode(Request("a" * 20, max_tokens=127 - 20 - room, memory="text"))) == 20
    told = f"and {room} kept free for references, that is 129, the context holds 128"
    with pytest.raises(DataError, match=told):
        engine.encode(Request("a" * 20, max_tokens=128 - 20 - room, memory="text"))
    for mode in ("text", "shuffled"):
        with pytest.raises(DataError, match=f'"{mode}", but there is no bank to find references'):
            Engine(model, rows=1).encode(Request("a", max_tokens=1, memory=mode))


def test_every_text_of_the_bank_fits(reader):
    tokenizer = small_model().tokenizer
    for text in TEXTS:
        tokens, cited = augment(reader, tokenizer, tokenizer.encode(text))
        assert len(tokens) <= len(text) + most_tokens(reader, tokenizer)
        assert text in {one.text for one in cited}


@pytest.mark.parametrize("known", [True, False])
def test_references_take_no_more_than_is_kept_free_whatever_their_characters(tmp_path, known):
    """One that was cut inside a character has other tokens, and more, if it is read as text."""
    tokenizer = small_model().tokenizer
    texts = ("a" * 11 + "😀b😀b😀", "c" * 11 + "😀b😀bb😀")
    bank = small_bank(tmp_path, texts)
    reader = MemoryReader.open(bank, model_embed=letters)
    stored = bank.references(range(len(bank)))
    assert any(len(tokenizer.encode(one.text)) > bank.spec.reference_length for one in stored)
    if not known:  # as in a bank that keeps texts alone
        stored = [dataclasses.replace(one, ids=()) for one in stored]
        bank.references = lambda rows: [stored[row] for row in rows]
    for prompt in ("aaaa", "bbbb", "cccc"):
        own = tokenizer.encode(prompt)
        tokens, cited = augment(reader, tokenizer, own)
        assert 0 < len(tokens) - len(own) <= most_tokens(reader, tokenizer)
        if known:
            parts = [stored[one.reference].ids for one in reversed(cited)]
            around = tokenizer.encode("Reference:"), tokenizer.encode("\n")
            read = [token for part in parts for token in (*around[0], *part, *around[1])]
            assert tokens == read + own


def test_what_is_too_long_with_its_references_is_refused_before_it_is_read(
    reader, model, monkeypatch
):
    engine = Engine(model, reader, rows=1)
    monkeypatch.setattr(engines, "augment", lambda *_: ([5] * 127, ()))
    with pytest.raises(DataError, match=r"127 tokens; .* is 129, the context holds 128"):
        engine.submit(Request("a", max_tokens=1, memory="text"), lambda _: None)
