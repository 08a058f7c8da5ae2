"""The write path from documents to a bank: split, encode, embed, append, shard by shard.

A shard is the unit of progress: a writer that was killed goes on behind the last whole shard. What
a bank was begun with (references, embedder, model) is checked before anything is added.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxlab.data.references import References
from jaxlab.data.sources import Document
from jaxlab.errors import BankError, DataError, Preempted
from jaxlab.memory.embedders import Embedder
from jaxlab.memory.header import BankSpec, Shard
from jaxlab.memory.progress import Progress
from jaxlab.memory.shards import marks_of
from jaxlab.memory.store import SHARD_REFERENCES, Bank, StoredReference, bank_exists
from jaxlab.memory.write import compile_encode
from jaxlab.sharding.batches import local_place
from jaxlab.sharding.processes import (
    exchange,
    leader_first,
    leads,
    raise_together,
    reporter,
    same_everywhere,
)
from jaxlab.sharding.rules import current_mesh
from jaxlab.training.checksums import texts_digest
from jaxlab.training.corpus import fit_embedder
from jaxlab.training.guards import InterruptGuard
from jaxlab.training.load import LoadedModel

_ENCODE_BATCH = 32
_WARM_BATCH = 256


@dataclasses.dataclass(frozen=True)
class WriteReport:
    """What a call of :func:`write_bank` did."""

    references: int
    resumed_at: int
    bytes: int


class ReferenceEncoder:
    """Compiled encoder of references in batches of one size, cut along this process's devices.

    References of like length go together, in batches no wider than they need. The width depends on
    a reference's own length alone, so that it gives the same bits in whatever company; padded to
    full length it differs in the last places of float32 sums.
    """

    def __init__(self, model: LoadedModel):
        model.require_memory()
        self._place = local_place(_ENCODE_BATCH)
        self._given = self._place.whole((model.params, model.preface))
        self._encode = compile_encode(model.graphdef, model.config.memory)
        self._kept = model.config.memory.tokens_kept

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Memories (n, layers, 2, K, m, H) in the compute dtype, in the order given."""
        out = None
        for width, rows in by_width(lengths, tokens.shape[1], least=self._kept):
            for start in range(0, len(rows), self._place.size):
                some = rows[start : start + self._place.size]
                found = self._batch(tokens[some, :width], lengths[some])
                if out is None:
                    out = np.zeros((len(tokens), *found.shape[1:]), found.dtype)
                out[some] = found
        return out

    def _batch(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        blank = self._place.size - len(tokens)
        given = {
            "tokens": np.pad(tokens, ((0, blank), (0, 0))),
            "lengths": np.pad(lengths, (0, blank)),
        }
        batch = self._place(given)
        with current_mesh(self._place.mesh):
            stored = self._encode(*self._given, batch["tokens"], batch["lengths"])
        return np.asarray(stored)[: len(tokens)]


def by_width(lengths: np.ndarray, length: int, *, least: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows by the width of their batches: a quarter, half or all of ``length``, narrow first."""
    widths = [width for width in (length // 4, length // 2) if width >= least] + [length]
    narrowest = np.searchsorted(widths, lengths)
    for place, width in enumerate(widths):
        rows = np.flatnonzero(narrowest == place)
        if len(rows):
            yield width, rows


def write_bank(
    model: LoadedModel,
    documents: Sequence[Document],
    url: str,
    *,
    embedder: Any = None,
    shard_references: int = SHARD_REFERENCES,
    cold: bool = False,
    report: Callable[[str], None] = print,
) -> WriteReport:
    """Write the explicit memories of ``documents`` into the bank at ``url``; resumable.

    ``embedder`` is a fitted embedder to use; None makes the one that the configuration names,
    fitted on these references. A bank that was begun goes on with its own. ``cold`` leaves the
    memories to whoever reads them first; without it, those that are missing are encoded.

    Several processes write a shard each at a time, and process 0 puts them into the header.

    Raises BankError when the bank belongs to another model or was begun with other references, and
    when it cannot be written; in several processes WorkerError when they have other references or
    models, and Preempted, between two shards, when the machine is being taken away.
    """
    model.require_memory()
    references = References.build(
        documents, model.tokenizer, length=model.config.memory.reference_length
    )
    same_everywhere("the model", lambda: dataclasses.asdict(model.identity))
    same_everywhere("the source", lambda: texts_digest(references.texts))
    report = reporter(report)
    bank, embedder = leader_first(
        functools.partial(_open_or_create, model, references, url, embedder)
    )
    begun = bank.rows
    _check_same_references(bank, references, url)
    if begun < len(references):
        # The name of the writer is in the header: all write under it, and process 0 commits.
        reopen = functools.partial(Bank.open, url, identity=model.identity)
        bank = leader_first(lambda: reopen(write=leads()))
    encoder = functools.cache(functools.partial(ReferenceEncoder, model))
    progress = Progress(report, f"bank {url}", len(references), begun=begun)
    processes, mine, guard = jax.process_count(), jax.process_index(), InterruptGuard()
    for start in range(begun, len(references), shard_references * processes):
        if guard.stops():
            raise Preempted(f"bank {url}: {bank.rows:,} of {len(references):,} references kept")
        starts = range(start, len(references), shard_references)[:processes]
        shard = problem = None
        try:
            if mine < len(starts):
                part = slice(starts[mine], min(starts[mine] + shard_references, len(references)))
                given = references.tokens[part], references.lengths[part]
                encoded = None if cold else encoder()(*given)
                shard = _store(bank, mine, encoded, embedder, references, part)
        except BankError as error:
            problem = error
        raise_together(problem)
        told = exchange(shard.to_json() if shard else "")[: len(starts)]
        leader_first(functools.partial(bank.add, [Shard.from_json(text) for text in told]))
        progress(bank.rows)
    if not cold and len(bank.cold_rows()):
        warm_bank(bank, reference_encoder(model, encoder()), report=report)
    return WriteReport(len(bank), begun, bank.stats()["bytes"])


def reference_encoder(
    model: LoadedModel, encode: ReferenceEncoder | None = None
) -> Callable[[Sequence[StoredReference]], np.ndarray]:
    """What encodes references of a bank as :func:`write_bank` does, bit for bit."""
    encode, length = encode or ReferenceEncoder(model), model.config.memory.reference_length

    def run(references: Sequence[StoredReference]) -> np.ndarray:
        tokens = np.full((len(references), length), model.tokenizer.pad_id, np.int32)
        lengths = np.zeros(len(references), np.int32)
        for row, reference in enumerate(references):
            ids = (reference.ids or model.tokenizer.encode(reference.text))[:length]
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        return encode(tokens, lengths)

    return run


def warm_bank(
    bank: Bank,
    encode: Callable[[Sequence[StoredReference]], np.ndarray],
    *,
    report: Callable[[str], None] = print,
) -> int:
    """Encode the references that have no memory yet, each process its share; their number."""
    rows, problem = bank.cold_rows(), None
    progress = Progress(report, f"bank {bank.url}", len(rows), unit="cold memories")
    mine = rows[jax.process_index() :: jax.process_count()]
    try:
        for start in range(0, len(mine), _WARM_BATCH):
            some = mine[start : start + _WARM_BATCH]
            bank.warm(some, encode(bank.references(some)))
            progress(min((start + len(some)) * jax.process_count(), len(rows)))
    except BankError as error:
        problem = error
    raise_together(problem)
    return len(rows)


def append_to_bank(
    model: LoadedModel,
    documents: Sequence[Document],
    url: str,
    *,
    cold: bool = False,
    shard_references: int = SHARD_REFERENCES,
    report: Callable[[str], None] = print,
) -> range:
    """Add those references of ``documents`` that the bank does not have, once; their row numbers.

    ``cold``: texts and embeddings now, each memory when it is first read. One that was killed adds
    the rest when it is repeated. The bank's embedder stays as it was fitted. References of white
    space alone are left out; raises DataError when there are no others, and BankError when there
    is no bank, or it is another model's.
    """
    model.require_memory()
    length = model.config.memory.reference_length
    references = References.build(documents, model.tokenizer, length=length)
    bank = Bank.open(url, identity=model.identity, write=True)
    embedder = bank.embedder(model_embed=model.embed_texts)
    stored = [_stored(references, row) for row in range(len(references))]
    first: dict[StoredReference, int] = {}
    for row, one in enumerate(stored):
        if one.text.strip():
            first.setdefault(one, row)
    if not first:
        raise DataError("nothing to add: the texts are white space alone")
    had = bank.has(stored)
    new = [row for row in first.values() if not had[row]]
    encode = ReferenceEncoder(model) if new and not cold else None
    before = bank.rows
    progress = Progress(report, f"bank {url}", len(new))
    for start in range(0, len(new), shard_references):
        rows = new[start : start + shard_references]
        memories = encode and encode(references.tokens[rows], references.lengths[rows])
        some = [stored[row] for row in rows]
        shard = bank.store(
            memories,
            None,
            embedder.embed([each.text for each in some]),
            some,
            number=bank.next_number,
            start=bank.rows,
        )
        bank.add([shard])
        progress(start + len(rows))
    return range(before, bank.rows)


def _stored(references: References, row: int) -> StoredReference:
    count = int(references.lengths[row])
    ids = tuple(references.tokens[row, :count].tolist())
    return StoredReference(references.texts[row], references.sources[row], count, ids)


def _store(bank, ahead: int, memories, embedder, references: References, part: slice) -> Shard:
    return bank.store(
        memories,
        None,
        embedder.embed(references.texts[part]),
        [_stored(references, row) for row in range(part.start, part.stop)],
        number=bank.next_number + ahead,
        start=part.start,
    )


def _open_or_create(model: LoadedModel, references: References, url: str, embedder: Any):
    if bank_exists(url):
        # For reading: a bank that is whole, or another source's, is left as it is.
        bank = Bank.open(url, identity=model.identity)
        return bank, bank.embedder(model_embed=model.embed_texts)
    config = model.config
    if embedder is None:
        embedder = fit_embedder(
            config.memory.embedder, references.texts, model_embed=model.embed_texts
        )
    bank = Bank.create(url, spec=bank_spec(model, embedder), embedder_state=embedder.to_bytes())
    return bank, embedder


def bank_spec(model: LoadedModel, embedder: Embedder) -> BankSpec:
    """What a bank of this model's memories, searched by this embedder, has in common."""
    config, shape = model.config, model.config.model
    return BankSpec(
        identity=model.identity,
        memory_shape=(
            shape.memory_layers,
            2,
            shape.kv_heads,
            config.memory.tokens_kept,
            shape.head_dim,
        ),
        embedder=embedder.name,
        embedding_dim=embedder.dim,
        dtype=shape.compute_dtype,
        chunk_length=config.memory.chunk_length,
        references_per_chunk=config.memory.references_per_chunk,
        reference_length=config.memory.reference_length,
        preface=model.tokenizer.preface_ids,
    )


def _check_same_references(bank: Bank, references: References, url: str) -> None:
    """A bank that was begun holds the first of these references, or it is another corpus."""
    alive, stored = bank.alive(), bank.marks()
    living = np.arange(bank.rows) if alive is None else np.flatnonzero(alive)
    shared = min(bank.rows, len(references))
    same = np.zeros(bank.rows, bool)
    same[:shared] = stored[:shared] == marks_of([_stored(references, n) for n in range(shared)])
    for row in living[~same[living]][:1]:
        why = "the bank was begun with another source; use the same --data or another --bank"
        if row != living[0]:
            why = f"`jaxlab memory append` added it, and adds what is missing, or {why}"
        raise BankError(
            f"bank {url}: reference {row} is not one of the {len(references):,} that this source "
            f"gives, at its place: {why}"
        )
