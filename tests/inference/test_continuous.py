"""Laws of continuous batching: nobody waits for another, and nobody's answer depends on another."""

import re
import threading

import jax
import numpy as np
import pytest
from flax import nnx

from jaxlab.errors import BankError, DataError, JaxlabError
from jaxlab.inference.engine import Engine
from jaxlab.inference.programs import say
from jaxlab.inference.requests import Request
from jaxlab.inference.retrieval import Retrieval
from jaxlab.inference.sampling import Sampling
from jaxlab.memory.read import MemoryReader
from kernels_pallas.memory_attention import ChunkGrid
from tests.inference.small import CHUNK, letters, small_bank, small_model
from tests.models.tiny import run

ROWS = 3
SECONDS = 60.0
PROMPTS = ("abcddaga", "hc", "", "ghgfe", "aaaa", "bcdbcdbcdbcd", "h", "deadbeef", "cab")


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return small_bank(tmp_path_factory.mktemp("continuous"))


@pytest.fixture(scope="module")
def first():
    return Engine(small_model(), use_preface=True, rows=1)


@pytest.fixture
def engine_of(first):
    engines = []

    def make(reader, *, rows=ROWS, running=False):
        engine = Engine(small_model(), reader, use_preface=True, rows=rows, like=first)
        engines.append(engine)
        if running:
            engine.start()
        return engine

    yield make
    for engine in engines:
        engine.close()


def reader_of(bank, **options) -> MemoryReader:
    return MemoryReader.open(bank, model_embed=letters, **options)


class Listener:
    """Gathers the events of one request."""

    def __init__(self, engine, prompt, **options):
        self.events, self.ended = [], threading.Event()
        self.changed = threading.Condition()
        self.ticket = engine.submit(Request(prompt, **options), self.take)

    def take(self, event):
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()
        if event.finish:
            self.ended.set()

    def wait(self, condition=None):
        if condition is None:
            assert self.ended.wait(SECONDS)
        else:
            with self.changed:
                assert self.changed.wait_for(lambda: condition(self.events), SECONDS)
        return self

    @property
    def tokens(self):
        return [token for event in self.events for token in event.said]

    @property
    def logprobs(self):
        return [one for event in self.events for one in event.logprobs]


def test_an_answer_is_the_same_to_the_last_bit_in_any_company(bank, engine_of):
    """Greedy and drawn, in whatever row, beside whatever else, with whoever asks for more."""

    def ask(order, rows):
        engine = engine_of(reader_of(bank), rows=rows)
        listeners = {}
        for number in order:
            sampling = Sampling(temperature=1.5, top_p=0.9, seed=number)
            listeners[number] = Listener(
                engine,
                PROMPTS[number],
                max_tokens=5 + number % 4,
                sampling=Sampling() if number % 2 else sampling,
                logprobs=2,
                memory=("on", "on", "off", "shuffled")[number % 4],
            )
        while not all(one.ended.is_set() for one in listeners.values()):
            engine._turn()
        return {number: one.logprobs for number, one in listeners.items()}

    orders = list(range(len(PROMPTS))), [8, 2, 6, 0, 1, 7, 3, 5, 4], [4, 5]
    first, second, third = (ask(order, ROWS) for order in orders)
    assert first == second
    assert third == {number: first[number] for number in (4, 5)}


def test_an_answer_is_the_same_beside_whoever_asks_for_more(bank, engine_of):
    """Draws, limits and log-probabilities of the others are programs that it shares with them."""
    alone = engine_of(reader_of(bank)).generate([PROMPTS[0]], max_tokens=9)[0].tokens
    for others in (
        dict(sampling=Sampling(temperature=2.0)),
        dict(sampling=Sampling(temperature=2.0, top_p=0.5)),
        dict(logprobs=20),
    ):
        engine = engine_of(reader_of(bank))
        listeners = [Listener(engine, PROMPTS[0], max_tokens=9)]
        listeners += [Listener(engine, text, max_tokens=6, **others) for text in PROMPTS[1:]]
        while not all(one.ended.is_set() for one in listeners):
            engine._turn()
        assert listeners[0].tokens == alone


def test_a_warm_engine_compiles_nothing_more(bank, engine_of):
    engine = engine_of(reader_of(bank))
    engine.warm()
    compiled = [each._cache_size() for each in (engine.programs.decode, say)]
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=3)):
        for logprobs in (None, 2):
            engine.generate(PROMPTS, max_tokens=2, sampling=sampling, logprobs=logprobs)
    assert [each._cache_size() for each in (engine.programs.decode, say)] == compiled
    assert engine.stats()["requests"] == 6 * len(PROMPTS)


def test_a_running_engine_answers_as_one_that_is_driven(bank, engine_of):
    driven = engine_of(reader_of(bank)).generate(PROMPTS, max_tokens=9)
    engine = engine_of(reader_of(bank), running=True)
    assert engine.generate(PROMPTS, max_tokens=9) == driven
    listeners = [Listener(engine, prompt, max_tokens=9) for prompt in PROMPTS]
    assert [one.wait().tokens for one in listeners] == [one.tokens for one in driven]
    stats = engine.stats()
    assert stats["generated_tokens"] == 2 * 9 * len(PROMPTS)
    assert stats["waiting"] == stats["running"] == 0


def test_others_go_on_while_one_waits_for_its_memories(bank, engine_of, monkeypatch):
    """The search of one text hangs until the others have said all they were asked for."""
    reader, gate, held = reader_of(bank), threading.Event(), threading.Event()
    search = reader.search

    def hangs(texts, k=None):
        if "hhhh" in texts:
            held.set()
            assert gate.wait(SECONDS)
        return search(texts, k)

    monkeypatch.setattr(reader, "search", hangs)
    engine = engine_of(reader, running=True)
    slow = Listener(engine, "hhhh", max_tokens=3)
    assert held.wait(SECONDS)
    quick = [Listener(engine, "ab", max_tokens=9, memory="off") for _ in range(2)]
    for one in quick:
        assert len(one.wait().tokens) == 9
    assert not slow.events
    gate.set()
    assert len(slow.wait().tokens) == 3


def test_one_that_is_cancelled_leaves_its_row_to_the_next(bank, engine_of):
    engine = engine_of(reader_of(bank), rows=1, running=True)
    first = Listener(engine, "abcd", max_tokens=20).wait(lambda events: len(events) > 3)
    second = Listener(engine, "hc", max_tokens=2)
    third = Listener(engine, "hc", max_tokens=2)
    second.ticket.cancel()
    first.ticket.cancel()
    assert first.wait().events[-1].finish == "cancelled" and len(first.tokens) < 20
    assert second.wait().events[-1].finish == "cancelled" and not second.tokens
    (alone,) = engine_of(reader_of(bank), rows=1).generate(["hc"], max_tokens=2)
    assert third.wait().tokens == alone.tokens
    third.ticket.cancel()  # too late to matter
    assert third.events[-1].finish == "length"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (BankError("reference 3 is damaged"), "reference 3 is damaged"),
        (RuntimeError("out of luck"), "RuntimeError('out of luck')"),
    ],
)
def test_what_cannot_be_read_ends_only_those_who_need_it(bank, engine_of, monkeypatch, error, told):
    reader = reader_of(bank)
    bad = int(reader.search(["hhhh"]).ids[0, 0])
    good = [text for text in ("aaaa", "cccc") if bad not in reader.search([text]).ids]
    assert good
    fetch = reader.fetch

    def damaged(ids):
        if bad in ids:
            raise error
        return fetch(ids)

    monkeypatch.setattr(reader, "fetch", damaged)
    engine = engine_of(reader)
    listeners = [Listener(engine, text, max_tokens=2) for text in ("hhhh", *good)]
    while not all(one.ended.is_set() for one in listeners):
        engine._turn()
    last = listeners[0].events[-1]
    assert (last.finish, str(last.error)) == ("error", told)
    assert all(one.events[-1].finish == "length" for one in listeners[1:])
    with pytest.raises(JaxlabError, match=re.escape(told)):
        engine.generate(["hhhh"], max_tokens=2)


@pytest.mark.parametrize("running", [False, True])
def test_who_cannot_be_told_ends_and_the_others_go_on(bank, engine_of, running):
    wanted = engine_of(reader_of(bank)).generate(PROMPTS, max_tokens=6)
    engine = engine_of(reader_of(bank), running=running)

    def deaf(row, text):
        if row == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPTS, max_tokens=6, on_token=deaf)
    assert engine.generate(PROMPTS, max_tokens=6) == wanted


def test_off_reads_the_preface_alone_and_shuffled_another_memory(bank, engine_of):
    modes = {
        mode: engine_of(reader_of(bank)).generate(PROMPTS, max_tokens=6, memory=mode)
        for mode in ("on", "off", "shuffled")
    }
    silent = engine_of(None).generate(PROMPTS, max_tokens=6)
    assert [one.tokens for one in modes["off"]] == [one.tokens for one in silent]
    assert not any(one.citations for one in modes["off"])
    exchanged = reader_of(bank).shuffled(seed=0)
    theirs = engine_of(exchanged).generate(PROMPTS, max_tokens=6)
    assert modes["shuffled"] == theirs
    assert modes["shuffled"][0].tokens != modes["on"][0].tokens


def test_log_probabilities_are_the_models(bank, engine_of):
    model, reader = small_model(), reader_of(bank)
    prompt = "abcddag"
    (found,) = engine_of(reader).generate([prompt], max_tokens=5, logprobs=3)
    text = [*model.tokenizer.encode(prompt), *found.tokens]
    chunks = -(-len(text) // CHUNK)
    ids = np.full((1, chunks, 2), -1, np.int64)
    # The third chunk goes on from the second; what "gXXX" retrieves, it reads.
    for chunk in range(chunks):
        start = min(chunk, 1) if chunk < 2 else chunk - 1
        part = text[start * CHUNK :][:CHUNK]
        if chunk < 2:
            part = model.tokenizer.encode(prompt)[chunk * CHUNK :][:CHUNK]
        ids[0, chunk] = reader.search([model.tokenizer.decode(part)]).ids[0]
    logits, _ = run(
        nnx.merge(model.graphdef, model.params),
        np.array([[model.tokenizer.bos_id, *text]], np.int32),
        preface=model.preface,
        slots=reader.slots(ids),
        grid=ChunkGrid(length=CHUNK, band=1),
        start=model.context_start,
    )
    wanted = np.asarray(jax.nn.log_softmax(logits[0], axis=-1))[len(text) - 5 : -1]
    for row, token, said in zip(wanted, found.tokens, found.logprobs, strict=True):
        assert said.token == token == int(row.argmax())
        assert said.bytes.decode() == model.tokenizer.decode([token])
        assert said.logprob == pytest.approx(row[token], abs=1e-4)
        best = np.argsort(-row)[:3].tolist()
        assert [one[0] for one in said.alternatives] == best
        np.testing.assert_allclose([one[2] for one in said.alternatives], row[best], atol=1e-4)


def test_what_is_likely_to_be_read_is_brought_near(bank):
    reader, come = reader_of(bank), threading.Event()
    retrieval = Retrieval(reader, come.set, lead=1)
    retrieval.expect("hhh")
    retrieval.begin()
    assert come.wait(SECONDS)
    retrieval.close()
    assert reader.recent.misses == 2 and retrieval.take() is None
    reader.fetch(reader.search(["hhh"]).ids)
    assert (reader.recent.hits, reader.recent.misses) == (2, 2)


def test_reading_ahead_asks_once_a_chunk_and_changes_no_answer(bank, engine_of):
    reader = reader_of(bank)
    engine = engine_of(reader)
    expected, expect = [], engine._batch._retrieval.expect
    engine._batch._retrieval.lead = 1
    engine._batch._retrieval.expect = lambda text: expected.append(text) or expect(text)
    (found,) = engine.generate(["abcddag"], max_tokens=10)
    reader = reader_of(bank, cache_bytes=0)
    searched, search = [], reader.search
    reader.search = lambda texts: searched.extend(texts) or search(texts)
    (plain,) = engine_of(reader).generate(["abcddag"], max_tokens=10)
    assert found == plain
    # Where nothing is kept nothing is read ahead: the prompt has two chunks, and two follow.
    assert len(searched) == 4
    # A token before each of the two ends of chunks that a refresh follows.
    assert len(expected) == 2
    text = "abcddag" + found.text
    assert all(one in text for one in expected)


def test_a_closing_engine_finishes_what_it_has_and_takes_no_more(bank, engine_of):
    engine = engine_of(reader_of(bank), rows=1, running=True)
    listeners = [Listener(engine, prompt, max_tokens=9) for prompt in PROMPTS[:3]]
    engine.close(drain_seconds=SECONDS)
    assert [one.wait().events[-1].finish for one in listeners] == ["length"] * 3
    assert not engine.alive and engine.failure is None
    with pytest.raises(DataError, match="takes no more requests"):
        engine.submit(Request("a", max_tokens=1), lambda _: None)


def test_a_closing_engine_cancels_what_does_not_finish_in_time(bank, engine_of):
    engine = engine_of(reader_of(bank), rows=1, running=True)
    listeners = [Listener(engine, "abcd", max_tokens=20) for _ in range(4)]
    engine.close(drain_seconds=0.0)
    finishes = [one.wait().events[-1].finish for one in listeners]
    assert finishes[-1] == "cancelled" and set(finishes) <= {"cancelled", "length"}


def test_whoever_has_the_lock_finds_every_request(bank, engine_of, monkeypatch):
    """In the queue or in a row, so that closing cancels it; else it would be waited for."""
    engine = engine_of(reader_of(bank), rows=2)
    for prompt in PROMPTS[:3]:
        Listener(engine, prompt, max_tokens=2)
    batch, woken, found = engine._batch, engine._woken, []

    class Watched:
        def __enter__(self):
            return woken.__enter__()

        def __exit__(self, *error):
            found.append((batch.waiting, batch.running))
            return woken.__exit__(*error)

    monkeypatch.setattr(batch, "_woken", Watched())
    batch._admit()
    monkeypatch.undo()
    assert found == [(2, 1), (1, 2)]


def test_an_engine_that_fails_tells_all_who_wait(bank, engine_of, monkeypatch):
    engine = engine_of(reader_of(bank), rows=1)
    listeners = [Listener(engine, "abcd", max_tokens=4) for _ in range(2)]

    def fails():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._batch, "turn", fails)
    engine.start()
    for one in listeners:
        assert "out of memory" in str(one.wait().events[-1].error)
    engine._thread.join(SECONDS)
    assert not engine.alive and isinstance(engine.failure, RuntimeError)
    with pytest.raises(DataError, match="takes no more requests"):
        engine.submit(Request("a", max_tokens=1), lambda _: None)


def test_prompts_of_every_length_around_a_chunk_are_continued(bank, engine_of):
    """Each as by an engine whose other rows are empty: chunks that hold one token, or none."""
    prompts = ["abcdefghabc"[:length] for length in range(12)]
    whole = engine_of(reader_of(bank)).generate(prompts, max_tokens=6)
    for prompt, one in zip(prompts, whole, strict=True):
        (alone,) = engine_of(reader_of(bank)).generate([prompt], max_tokens=6)
        assert alone == one
        assert {citation.chunk for citation in one.citations} >= set(range(len(prompt) // CHUNK))
