"""Laws of generation with memory: the cache against recomputation, when memories are renewed."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlab.errors import ConfigError, DataError
from jaxlab.inference import batching
from jaxlab.inference.engine import Engine
from jaxlab.inference.programs import Said
from jaxlab.inference.requests import Request
from jaxlab.inference.sampling import Sampling
from jaxlab.memory.embedders import ModelEmbedder
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.retrieve import FlatIndex, Retriever
from kernels_pallas.memory_attention import ChunkGrid
from tests.inference.small import (
    CHUNK,
    LETTERS,
    small_bank,
    small_model,
    small_reader,
    without_memory_layers,
)
from tests.models.tiny import run

# Two chunks to read and two to write: as 128 tokens of each in the paper's chunks of 64.
PROMPTS = ["abcddaga", "hc", ""]
NEW = 2 * CHUNK
WIDTH = 1 + 5 * CHUNK


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return small_bank(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def engine_of():
    """Engines that share their compiled programs: these depend on the model alone."""
    first = Engine(small_model(), use_preface=True)

    def make(reader, *, rows=3, **options):
        return Engine(small_model(), reader, use_preface=True, rows=rows, like=first, **options)

    return make


def by_recomputation(reader, prompt):
    """Greedy tokens, the whole text run again for each, memories fixed on the chunk grid."""
    model = small_model()
    tokenizer, decoder = model.tokenizer, nnx.merge(model.graphdef, model.params)
    text = tokenizer.encode(prompt)
    prompt_length, chunks = len(text), WIDTH // CHUNK
    ids = np.full((1, chunks, 2), -1, np.int64)

    def retrieve(part):
        return reader.search([tokenizer.decode(part)]).ids[0]

    for chunk in range(-(-prompt_length // CHUNK)):
        ids[0, chunk] = retrieve(text[chunk * CHUNK :][:CHUNK])
    for _ in range(NEW):
        chunk, first = divmod(len(text), CHUNK)
        if first == 0 and len(text) == prompt_length and chunk:
            ids[0, chunk] = ids[0, chunk - 1]  # the first decoded chunk inherits
        elif first == 0 and chunk:
            ids[0, chunk] = retrieve(text[-CHUNK:])
        tokens = np.zeros((1, WIDTH), np.int32)
        tokens[0, : 1 + len(text)] = [tokenizer.bos_id, *text]
        logits, _ = run(
            decoder,
            tokens,
            preface=model.preface,
            slots=reader.slots(ids),
            grid=ChunkGrid(length=CHUNK, band=1),
            start=model.context_start,
        )
        text.append(int(np.argmax(logits[0, len(text)])))
    return text[prompt_length:]


def test_greedy_generation_of_a_ragged_batch_equals_recomputing_each_prompt(bank, engine_of):
    reader = small_reader(bank)
    found = engine_of(reader).generate(PROMPTS, max_tokens=NEW)
    for prompt, generation in zip(PROMPTS, found, strict=True):
        assert generation.tokens == by_recomputation(small_reader(bank), prompt)
        assert generation.text == small_model().tokenizer.decode(generation.tokens)
        assert not generation.finished
    # Else the memories decided nothing: without them the texts are others.
    silent = engine_of(None).generate(PROMPTS, max_tokens=NEW)
    assert [one.tokens for one in silent[:2]] != [one.tokens for one in found[:2]]


def test_a_prompt_alone_is_continued_as_in_a_batch(bank, engine_of):
    whole = engine_of(small_reader(bank)).generate(PROMPTS, max_tokens=NEW)
    (alone,) = engine_of(small_reader(bank)).generate(PROMPTS[1:2], max_tokens=NEW)
    assert (alone.tokens, alone.text) == (whole[1].tokens, whole[1].text)
    assert [c.reference for c in alone.citations] == [c.reference for c in whole[1].citations]


@pytest.fixture
def scripted(monkeypatch):
    """Lets row n say text n, a character a step, whatever the model thinks; gives the steps.

    ``|`` is the end of the text.
    """
    tokenizer = small_model().tokenizer

    def script(*texts):
        scripts, steps = [], []
        for text in texts:
            said, end, _ = text.partition("|")
            ids = tokenizer.encode(said) + [tokenizer.eos_id] * bool(end)
            scripts.append(ids + tokenizer.encode("a") * 20)

        def say(logits, choices, **_):
            steps.append(choices.said)
            said = choices.said.tolist()
            return Said(jnp.array([script[n] for script, n in zip(scripts, said, strict=True)]))

        monkeypatch.setattr(batching, "say", say)
        return steps

    return script


def test_memories_are_renewed_exactly_where_a_chunk_is_complete(bank, engine_of, scripted):
    """A prompt of two chunks and two chunks of answer retrieve three times, as in the paper."""
    reader = small_reader(bank)
    scripted("ccddeeff", "ggggaaaa", "bcbcefef")
    engine_of(reader).generate(PROMPTS, max_tokens=NEW)
    assert reader.searched == [
        # The prompts by chunk; where there is no text there is nothing to find.
        ["abcd", "daga", "hc", ""],
        # Behind two tokens the second prompt's chunk is full, behind four the others'.
        ["hcgg"],
        ["ccdd", "bcbc"],
        ["ggaa"],
    ]


def test_citations_are_the_references_that_were_read(bank, engine_of, scripted):
    reader = small_reader(bank)
    scripted("ccddeeff", "ggggaaaa", "bcbcefef")
    found = engine_of(reader).generate(PROMPTS, max_tokens=NEW)
    places = {
        0: [(0, 0, 0), (0, 1, 1), (2, 0, 3)],
        1: [(0, 2, 0), (1, 0, 1), (3, 0, 2)],
        2: [(2, 1, 1)],
    }
    for row, wanted in places.items():
        expected = []
        for search, place, chunk in wanted:
            hits = reader.hits[search]
            for hit, score in zip(hits.ids[place], hits.scores[place], strict=True):
                stored = bank.reference(int(hit))
                expected.append((chunk, int(hit), float(score), stored.source, stored.text))
        assert expected == [
            (c.chunk, c.reference, c.score, c.source, c.text) for c in found[row].citations
        ]
    # What was searched is what was read, in the same order.
    for hits, ids in zip(reader.hits, reader.ids, strict=True):
        np.testing.assert_array_equal(hits.ids, ids)


def test_a_finished_sequence_says_and_reads_nothing_more(bank, engine_of, scripted):
    reader = small_reader(bank)
    scripted("ccdd|", "dd\nddddd", "efefefef")
    pieces = [[], [], []]
    found = engine_of(reader).generate(
        PROMPTS,
        max_tokens=NEW,
        stop="\n",
        on_token=lambda row, piece: pieces[row].append(piece),
    )
    assert [one.text for one in found] == ["ccdd", "dd", "efefefef"]
    assert ["".join(part) for part in pieces] == ["ccdd", "dd", "efefefef"]
    assert [one.finished for one in found] == [True, True, False]
    assert len(found[0].tokens) == 4 and len(found[1].tokens) == 3
    # Both chunks were complete before the end came; afterwards "ccdd" is not searched again.
    assert reader.searched[1:] == [["hcdd"], ["ccdd", "efef"]]


def test_generation_ends_when_every_sequence_has_ended(bank, engine_of, scripted):
    steps = scripted("c|", "|", "é|")
    found = engine_of(small_reader(bank)).generate(PROMPTS, max_tokens=NEW)
    assert [one.text for one in found] == ["c", "", "é"]
    assert all(one.finished for one in found)
    # Three tokens, and the step that was under way while the last of them was looked at.
    assert len(steps) <= 4


def test_what_is_streamed_is_the_text(bank, engine_of, scripted):
    for stop, wanted in (
        (None, ["aé☃a", "no stop", "abcabcab"]),
        ("ca", ["aé☃a", "no stop", "ab"]),
    ):
        scripted("aé☃aa", "no stop", "abcabcab")
        pieces = [[], [], []]
        found = engine_of(small_reader(bank)).generate(
            PROMPTS,
            max_tokens=NEW,
            stop=stop,
            on_token=lambda row, piece, pieces=pieces: pieces[row].append(piece),
        )
        for row, one in enumerate(found):
            assert "".join(pieces[row]) == one.text
            assert one.text.startswith(wanted[row]) and "\ufffd" not in one.text
        assert stop is None or found[2].text == wanted[2]


def test_without_a_hit_the_model_is_the_preface_only_model(bank, engine_of):
    knows_nothing = ModelEmbedder(lambda texts: np.zeros((len(texts), len(LETTERS)), np.float32))
    reader = MemoryReader(bank, Retriever(knows_nothing, FlatIndex(bank.embeddings())))
    found = engine_of(reader).generate(PROMPTS, max_tokens=NEW)
    silent = engine_of(None).generate(PROMPTS, max_tokens=NEW)
    assert [one.tokens for one in found] == [one.tokens for one in silent]
    assert not any(one.citations for one in found)


def test_a_bank_may_hold_fewer_references_than_a_chunk_reads(tmp_path, engine_of):
    reader = small_reader(small_bank(tmp_path, ["ddbdeh"]))
    found = engine_of(reader).generate(PROMPTS, max_tokens=NEW)
    assert found[0].tokens == by_recomputation(small_reader(reader.bank), PROMPTS[0])
    assert {citation.reference for one in found for citation in one.citations} == {0}


def test_the_same_seed_says_the_same(bank, engine_of):
    def say(seed):
        sampling = Sampling(temperature=2.0, seed=seed)
        found = engine_of(None).generate(PROMPTS, max_tokens=NEW, sampling=sampling)
        return [one.tokens for one in found]

    assert say(3) == say(3) != say(4)


def test_what_does_not_fit_is_an_error_before_anything_runs(engine_of):
    engine = engine_of(None)
    with pytest.raises(DataError, match=r"prompt 1: .* 25 tokens; .* is 34, .* holds 32"):
        engine.generate(["ab", "a" * 25], max_tokens=8)
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        engine.generate(["ab"], max_tokens=0)
    with pytest.raises(DataError, match=r"0 rows and 32 tokens"):
        engine_of(None, rows=0)
    with pytest.raises(DataError, match=r"3 rows and 33 tokens: .* from 2 to 32"):
        engine_of(None, context=33)


def test_each_prompt_is_encoded_once(engine_of, monkeypatch):
    """A long one takes seconds."""
    engine, tokenizer = engine_of(None), small_model().tokenizer
    encode = mock.Mock(wraps=tokenizer.encode)
    monkeypatch.setattr(type(tokenizer), "encode", encode)
    engine.generate(["ab", "c"], max_tokens=1)
    assert [call.args[0] for call in encode.call_args_list] == ["ab", "c"]


def test_a_prompt_that_no_tokens_could_hold_is_refused_by_its_bytes(monkeypatch):
    """What a token stands for at most bounds how few there are: a long one takes no time."""
    engine, tokenizer = Engine(small_model(), rows=1), small_model().tokenizer
    longest = max(len(tokenizer.bytes_of(token)) for token in range(tokenizer.vocab_size))
    room = engine.context - 1 - 4
    fits = " " * (longest * room)
    assert len(engine.encode(Request(fits, max_tokens=4))) == room
    encode = mock.Mock()
    monkeypatch.setattr(type(tokenizer), "encode", encode)
    for prompt in (fits + "a", "é" * (longest * room // 2) + "é", "a" * 10**6):
        with pytest.raises(DataError, match=rf"at least \d+ tokens; .* holds {engine.context}"):
            engine.encode(Request(prompt, max_tokens=4))
    encode.assert_not_called()


def test_a_model_without_memory_layers_cannot_read_a_bank(bank):
    with pytest.raises(ConfigError, match="no memory layers"):
        Engine(without_memory_layers(small_model()), small_reader(bank))


def test_parameters_of_the_host_lie_on_the_device_once():
    model = small_model()
    there = jax.tree.map(np.asarray, model.params)
    engine = Engine(dataclasses.replace(model, params=there), use_preface=True, rows=1)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(engine._given[0]))


def test_without_bank_and_preface_it_is_the_ordinary_language_model(engine_of):
    plain = Engine(small_model(), rows=1)
    assert plain.programs.start == 0
    assert engine_of(None).programs.start == small_model().context_start == 11 + 12
    model = small_model()
    (found,) = plain.generate(["abcd"], max_tokens=4)
    text = model.tokenizer.encode("abcd")
    decoder = nnx.merge(model.graphdef, model.params)
    tokens = jnp.asarray([[model.tokenizer.bos_id, *text, *found.tokens]])
    logits = np.asarray(run(decoder, tokens)[0])[0]
    assert found.tokens == logits[len(text) : -1].argmax(axis=-1).tolist()
