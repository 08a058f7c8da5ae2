"""Laws of bits per byte: sums by hand, no leak at lag 1, controls that control."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from jaxlab.data.sources import Document
from jaxlab.errors import ConfigError, DataError
from jaxlab.evaluation import perplexity
from jaxlab.evaluation.perplexity import DocumentScores, gain, score_documents
from jaxlab.memory.read import MemoryReader
from kernels_pallas.memory_attention import ChunkGrid
from tests.inference.small import (
    CHUNK,
    TEXTS,
    documents,
    small_bank,
    small_model,
    small_reader,
)
from tests.models.tiny import run

ROW = 4 * CHUNK
HELD_OUT = ["abcdeffghhgaabbccddeefafdbgchegbbafeg", "hgfe é cdab", "", "ddee"]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return small_bank(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(autouse=True)
def one_program_for_all(monkeypatch, compiled):
    """The compiled score of each kind, made once for all tests."""
    original = perplexity._compile

    def shared(model, memory):
        kind = "plain" if memory == "plain" else "with preface"
        if kind not in compiled:
            compiled[kind] = original(model, memory)
        return compiled[kind]

    monkeypatch.setattr(perplexity, "_compile", shared)


@pytest.fixture(scope="module")
def compiled():
    return {}


def score(reader, texts, **options):
    return score_documents(small_model(), documents(texts), reader=reader, **options)


def log_probabilities(tokens, *, slots=None, plain=False):
    """What the model gives each token of one padded row, from the logits of the decoder."""
    model = small_model()
    inputs = np.concatenate([[model.tokenizer.bos_id], tokens[:-1]]).astype(np.int32)[None]
    reading = dict(preface=model.preface, start=model.context_start)
    if slots is not None:
        reading |= dict(slots=slots, grid=ChunkGrid(length=CHUNK, band=1))
    decoder = nnx.merge(model.graphdef, model.params)
    logits, _ = run(decoder, inputs, **({} if plain else reading))
    rows = np.asarray(jax.nn.log_softmax(logits[0]))
    return rows[np.arange(len(tokens)), tokens].astype(np.float64)


def padded_rows(text):
    """Rows of one document by hand: (padded tokens, how many are real)."""
    ids = small_model().tokenizer.encode(text)
    for start in range(0, len(ids), ROW):
        part = ids[start : start + ROW]
        yield np.array(part + [0] * (ROW - len(part))), len(part)


@pytest.mark.parametrize("memory", ["plain", "off"])
def test_bits_per_byte_is_the_sum_over_tokens_by_hand(memory):
    found = score(None, HELD_OUT, memory=memory)
    nats = [
        -sum(
            log_probabilities(tokens, plain=memory == "plain")[:count].sum()
            for tokens, count in padded_rows(text)
        )
        for text in HELD_OUT
    ]
    np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
    assert found.bytes.tolist() == [37, 12, 0, 4] and found.tokens.tolist() == [37, 12, 0, 4]
    assert found.bits_per_byte == pytest.approx(sum(nats) / 53 / math.log(2), rel=1e-5)


@pytest.mark.parametrize("lag", [0, 1])
def test_each_chunk_is_scored_with_the_memories_of_its_own_or_of_the_last_text(bank, lag):
    """By hand, without a filter: the hits of every chunk's text, moved on by the lag."""
    reader, model = small_reader(bank), small_model()
    found = score(reader, HELD_OUT, memory="on", lag=lag, overlap_limit=1.0)
    nats = np.zeros(len(HELD_OUT))
    for number, text in enumerate(HELD_OUT):
        for tokens, count in padded_rows(text):
            ids = np.full((1, 4, 2), -1)
            for chunk in range(4 - lag):
                part = tokens[:count][chunk * CHUNK : (chunk + 1) * CHUNK]
                ids[0, chunk + lag] = reader.search([model.tokenizer.decode(part)]).ids[0]
            slots = reader.slots(ids)
            nats[number] -= log_probabilities(tokens, slots=slots)[:count].sum()
    np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
    off = score(None, HELD_OUT, memory="off")
    assert np.abs(found.nats - off.nats)[0] > 0.05


def test_at_lag_1_the_first_chunk_reads_nothing_and_the_others_what_the_last_one_found(bank):
    reader = small_reader(bank)
    score(reader, HELD_OUT[:1], memory="on", lag=1, overlap_limit=1.0)
    (ids,) = reader.ids
    hits = reader.search([HELD_OUT[0][i : i + CHUNK] for i in range(0, ROW, CHUNK)]).ids
    assert (ids[:, 0] == -1).all()
    np.testing.assert_array_equal(ids[0, 1:], hits[:-1])
    assert len(reader.searched) == 2  # one search for the batch, one of this test
    # Nothing reads what a last chunk finds, and rows of the batch that are padding find nothing.
    assert reader.searched[0][3] == "" and (ids[3:] == -1).all()


@pytest.mark.parametrize("chunk", [0, 1, 2, 3])
def test_changing_a_chunk_changes_no_earlier_score_and_no_memory_up_to_it(
    bank, compiled, chunk, monkeypatch
):
    """The leak test at lag 1: what is scored never depends on text that comes later."""
    seen = []
    shared = perplexity._compile

    def recording(model, memory):
        compiled_score = shared(model, memory)

        def call(*args):
            seen.append(np.asarray(compiled_score(*args)))
            return seen[-1]

        return call

    monkeypatch.setattr(perplexity, "_compile", recording)
    text = "abbaccdehgfheeff"
    changed = text[: chunk * CHUNK] + "hdhd" + text[(chunk + 1) * CHUNK :]
    ids = []
    for one in (text, changed):
        reader = small_reader(bank)
        score(reader, [one], memory="on", lag=1)
        ids.append(reader.ids[0][0])
    np.testing.assert_array_equal(seen[0][0][: chunk * CHUNK], seen[1][0][: chunk * CHUNK])
    np.testing.assert_array_equal(ids[0][: chunk + 1], ids[1][: chunk + 1])
    if chunk < 3:
        assert (ids[0][chunk + 1] != ids[1][chunk + 1]).any()
        after = slice((chunk + 1) * CHUNK, None)
        assert (seen[0][0][after] != seen[1][0][after]).any()


def test_shuffled_reads_as_many_memories_but_never_the_one_that_was_found(bank, monkeypatch):
    read = []
    original = MemoryReader.fetch
    monkeypatch.setattr(
        MemoryReader, "fetch", lambda self, ids: read.append(np.array(ids)) or original(self, ids)
    )
    on = score(small_reader(bank), HELD_OUT, memory="on")
    shuffled = score(small_reader(bank), HELD_OUT, memory="shuffled")
    ours, theirs = read
    np.testing.assert_array_equal(ours < 0, theirs < 0)
    assert (ours >= 0).sum() > 6 and (ours != theirs)[ours >= 0].all()
    # Always the same exchange: one reference, one other.
    assert len(set(zip(ours[ours >= 0], theirs[ours >= 0], strict=True))) == len(
        set(ours[ours >= 0])
    )
    assert (on.nats != shuffled.nats)[0]


def test_references_that_repeat_the_document_are_left_out(bank):
    text = TEXTS[0] + "hgfe" + TEXTS[3]
    read = {}
    for limit in (1.0, perplexity.OVERLAP_LIMIT):
        reader = small_reader(bank)
        score(reader, [text], memory="on", lag=0, overlap_limit=limit)
        read[limit] = set(reader.ids[0].ravel().tolist())
    assert {0, 3} <= read[1.0] and not {0, 3} & read[perplexity.OVERLAP_LIMIT]
    assert read[perplexity.OVERLAP_LIMIT] - {-1}


def test_a_document_is_scored_alike_in_any_company(bank):
    """More rows than one batch holds, in another order."""
    texts = [HELD_OUT[0], *TEXTS, "hhgg", "é" * 3]
    steps = []
    forward = score(
        small_reader(bank), texts, memory="on", report=lambda done, of: steps.append((done, of))
    )
    backward = score(small_reader(bank), texts[::-1], memory="on")
    np.testing.assert_allclose(forward.nats, backward.nats[::-1], rtol=1e-5)
    assert steps == [(8, 13), (13, 13)] and forward.tokens.tolist()[-1] == 6


def test_modes_that_do_not_exist_or_lack_a_bank_are_errors(bank):
    for options, message in [
        (dict(memory="both"), "memory is 'both': choose one of on, off, shuffled, plain"),
        (dict(memory="on", lag=2), "lag is 2: choose 0 or 1"),
        (dict(memory="on"), "memory on needs a bank"),
        (dict(memory="shuffled"), "memory shuffled needs a bank"),
    ]:
        with pytest.raises(ConfigError, match=message):
            score(None, TEXTS, **options)
    for texts in ([], [""]):
        with pytest.raises(DataError):
            score(None, texts, memory="plain")


def scores(nats, sizes):
    nats, sizes = np.asarray(nats, float), np.asarray(sizes)
    return DocumentScores(nats, sizes, sizes)


def test_an_equal_gain_of_every_document_is_certain():
    sizes = np.array([10, 200, 35])
    found = gain(scores(3.0 * sizes, sizes), scores((3.0 - math.log(2) / 4) * sizes, sizes))
    assert dataclasses.astuple(found) == pytest.approx((0.25, 0.25, 0.25))


def test_the_interval_is_that_of_a_mean_of_documents():
    """Equal sizes, gains of +1 and -0.5 bit: normal approximation of the mean of 400 draws."""
    sizes = np.full(400, 50)
    bits = np.where(np.arange(400) % 4 == 0, -0.5, 1.0)
    before = scores(np.full(400, 500.0), sizes)
    found = gain(before, scores(before.nats - bits * 50 * math.log(2), sizes))
    half = 1.96 * bits.std() / math.sqrt(400)
    assert found.value == pytest.approx(bits.mean())
    assert (found.low, found.high) == pytest.approx(
        (bits.mean() - half, bits.mean() + half), abs=half / 10
    )
    assert gain(before, before, seed=3) == perplexity.Interval(0.0, 0.0, 0.0)


def test_long_documents_weigh_by_their_bytes():
    before, after = scores([10.0, 1000.0], [10, 990]), scores([0.0, 1000.0], [10, 990])
    found = gain(before, after)
    assert found.value == pytest.approx(10 / 1000 / math.log(2))
    assert found.low == 0 and found.high == pytest.approx(1 / math.log(2))


def test_the_gain_per_token_weighs_by_tokens():
    """Two documents of equal tokens and unequal bytes: 0 and 1 nat a token are saved."""
    sizes, tokens = np.array([10, 990]), np.array([100, 100])
    before = DocumentScores(np.array([300.0, 300.0]), sizes, tokens)
    found = gain(before, dataclasses.replace(before, nats=np.array([300.0, 200.0])), per="token")
    assert dataclasses.astuple(found) == pytest.approx((0.5, 0.0, 1.0))


def test_a_document_is_known_by_its_bytes_not_its_tokens():
    found = score_documents(small_model(), [Document("d", "é☃")], memory="plain")
    assert found.bytes.tolist() == [5] and found.tokens.tolist() == [5]
