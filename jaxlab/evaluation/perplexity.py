"""Bits per byte of held-out documents: with memory, without, and with the memories exchanged.

At lag 1 a chunk reads what the chunk before it retrieved, as in decoding; at lag 0 it reads what it
retrieves itself, so that its references may give away its own later tokens: an optimistic figure
(Memory³ spec 10.11). References that repeat the document are left out (overlap above 2/3, §4.4).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxlab.data.packing import Rows, pack_by_document
from jaxlab.data.sources import Document
from jaxlab.errors import ConfigError, DataError
from jaxlab.memory.read import MemoryReader
from jaxlab.models.attention import Slots
from jaxlab.sharding.batches import BatchPlace, local_place
from jaxlab.sharding.processes import exchange, same_everywhere
from jaxlab.sharding.rules import current_mesh, is_spread, spec
from jaxlab.training.checksums import texts_digest
from jaxlab.training.load import LoadedModel
from jaxlab.training.losses import token_log_probabilities
from jaxlab.training.step import SequenceFormat
from kernels_pallas.memory_attention import ChunkGrid

MODES = ("on", "off", "shuffled", "plain")
OVERLAP_LIMIT = 2 / 3
_BATCH = 8


@dataclasses.dataclass(frozen=True)
class DocumentScores:
    """Nats, bytes and tokens of each document, in order."""

    nats: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        """All nats over all bytes."""
        return float(self.nats.sum() / self.bytes.sum() / math.log(2))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A difference and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def score_documents(
    model: LoadedModel,
    documents: Sequence[Document],
    *,
    memory: str,
    lag: int = 1,
    reader: MemoryReader | None = None,
    overlap_limit: float = OVERLAP_LIMIT,
    report: Callable[[int, int], None] | None = None,
) -> DocumentScores:
    """Score every token of every document once, in rows of the model's training length.

    ``memory`` is ``on``; ``shuffled`` (each reference's memory exchanged for another's); ``off``
    (preface and gap, no memories); or ``plain`` (the ordinary language model): both readings of
    "without memory" (spec 10.6). ``report(done, all)`` is called after each batch of rows. Several
    processes score their share each; all have the scores of all.

    Raises ConfigError for an unknown mode and for a mode that needs a bank when there is none;
    WorkerError in several processes that have other documents or models.
    """
    if memory not in MODES:
        raise ConfigError(f"memory is {memory!r}: choose one of {', '.join(MODES)}")
    if lag not in (0, 1):
        raise ConfigError(f"lag is {lag}: choose 0 or 1")
    if memory in ("on", "shuffled"):
        if reader is None:
            raise ConfigError(f"memory {memory} needs a bank: give one with --bank")
        model.require_memory()
        reader = reader.shuffled(seed=0) if memory == "shuffled" else reader
    same_everywhere("the model", lambda: dataclasses.asdict(model.identity))
    same_everywhere("the source", lambda: texts_digest(document.text for document in documents))
    rows, place = _rows(model, documents), local_place(_BATCH)
    score, given = _compile(model, memory), place.whole((model.params, model.preface))
    nats, count = np.zeros(len(documents)), jax.process_count()
    # Every process scores its own batches of rows, on all its devices.
    for start in range(jax.process_index() * place.size, len(rows), count * place.size):
        part = np.arange(start, min(start + place.size, len(rows)))
        slots = None
        if memory in ("on", "shuffled"):
            slots = _slots(model, reader, rows, part, place, lag=lag, limit=overlap_limit)
        tokens, mask = _pad(rows.tokens[part], place.size), _pad(rows.mask[part], place.size)
        with current_mesh(place.mesh):
            found = score(*given, slots, place({"tokens": tokens})["tokens"])
        # float64: sums of millions of tokens of different documents.
        lost = -(np.asarray(found).astype(np.float64) * mask).sum(axis=1)[: len(part)]
        np.add.at(nats, rows.document[part], lost)
        if report is not None:
            report(min(int(part[-1]) + 1 + (count - 1) * place.size, len(rows)), len(rows))
    nats = sum(np.frombuffer(bytes.fromhex(said)) for said in exchange(nats.tobytes().hex()))
    sizes = np.array([len(document.text.encode()) for document in documents], np.int64)
    tokens = np.bincount(rows.document, weights=rows.mask.sum(axis=1), minlength=len(documents))
    return DocumentScores(nats, sizes, tokens.astype(np.int64))


def gain(
    without: DocumentScores, with_memory: DocumentScores, *, per: str = "byte", seed: int = 0
) -> Interval:
    """Saved bits per byte, or nats per token, with a paired bootstrap over documents.

    ``per`` is ``byte`` or ``token``; 10,000 resamples.
    """
    generator = np.random.default_rng(seed)
    count = len(without.nats)
    saved, sizes = without.nats - with_memory.nats, without.tokens.astype(float)
    if per == "byte":
        saved, sizes = saved / math.log(2), without.bytes.astype(float)
    draws = np.empty(10_000)
    for i in range(len(draws)):
        chosen = generator.integers(0, count, count)
        draws[i] = saved[chosen].sum() / sizes[chosen].sum()
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(saved.sum() / sizes.sum()), float(low), float(high))


def _rows(model: LoadedModel, documents: Sequence[Document]) -> Rows:
    if not documents:
        raise DataError("there is no document to score: check the corpus")
    encoded = model.tokenizer.encode_batch([document.text for document in documents])
    return pack_by_document(
        encoded,
        sequence_length=model.config.data.sequence_length,
        pad_id=model.tokenizer.pad_id,
    )


def _pad(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))


def _slots(
    model,
    reader: MemoryReader,
    rows: Rows,
    part: np.ndarray,
    place: BatchPlace,
    *,
    lag: int,
    limit: float,
) -> Slots:
    """The slots of every chunk of some rows, padded to the batch and cut as it is."""
    length, size = model.config.memory.chunk_length, place.size
    tokens = _pad(rows.tokens[part], size).reshape(size, -1, length)
    real = _pad(rows.mask[part], size).reshape(tokens.shape)
    texts, against = [], []
    for row in range(size):
        whole = tokens[row][real[row]]
        for chunk in range(tokens.shape[1]):
            # With lag 1 nothing reads what the last chunk retrieves.
            wanted = chunk + lag < tokens.shape[1] and real[row, chunk].any()
            ids = tokens[row, chunk][real[row, chunk]] if wanted else ()
            texts.append(model.tokenizer.decode(int(i) for i in ids))
            against.append(whole)
    hits = reader.search_filtered(
        texts,
        against,
        model.tokenizer.encode,
        limit=limit,
        candidates=max(model.config.memory.candidates, 2 * reader.per_chunk),
    )
    ids = hits.ids.reshape(size, tokens.shape[1], -1)
    if lag:
        ids = np.concatenate([np.full_like(ids[:, :1], -1), ids[:, :-1]], axis=1)
    slots = reader.slots(ids)
    if not is_spread(place.mesh):
        return slots
    rows_of = functools.partial(NamedSharding, place.mesh)
    pairs = rows_of(spec(None, "batch"))
    return jax.device_put(slots, Slots(pairs, pairs, rows_of(spec("batch"))))


def _compile(model: LoadedModel, memory: str):
    """Compiled function of parameters, preface, slots and tokens: log-probability of each token."""
    form = SequenceFormat(bos_id=model.tokenizer.bos_id)
    plain = memory == "plain"
    grid = ChunkGrid(length=model.config.memory.chunk_length, band=1)
    start = 0 if plain else model.context_start

    def score(params, preface, slots, tokens):
        decoder = nnx.merge(model.graphdef, params)
        hidden, _ = decoder(
            form.inputs(tokens),
            preface=None if plain else preface,
            slots=slots,
            grid=None if slots is None else grid,
            start=start,
        )
        return token_log_probabilities(hidden, decoder.unembedding(), tokens)

    return jax.jit(score)
