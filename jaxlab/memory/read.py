"""From texts to the slots that the model reads: search, filter, load, arrange."""

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from jaxlab.data.overlap import exceeds
from jaxlab.data.sources import Document
from jaxlab.errors import BankError, RewrittenError
from jaxlab.memory.indexing import open_index
from jaxlab.memory.recent import RecentMemories
from jaxlab.memory.retrieve import Allowed, FlatIndex, Hits, Retriever
from jaxlab.memory.store import Bank, StoredMemories, StoredReference
from jaxlab.memory.write import from_stored
from jaxlab.models.attention import Slots
from kernels_pallas.memory_dequantize import Codebook, memory_dequantize

log = logging.getLogger(__name__)
# Enough for 500 memories of Memory³-2B, whose 450,560 bytes each are the largest there are.
CACHE_BYTES = 1 << 28
Encode = Callable[[Sequence[StoredReference]], np.ndarray]
Append = Callable[[Sequence[Document]], range]


class MemoryReader:
    """Retrieval from one bank, and loading of what was retrieved.

    ``permutation`` is the control "shuffled": search as ever, but read the memory of the reference
    at that place instead. ``encode`` makes the memories of references that have none yet
    (:func:`jaxlab.memory.pipeline.reference_encoder`); they are stored in the bank. ``append`` adds
    documents to the bank, and says which rows are new. Safe to use from several threads.
    """

    def __init__(
        self,
        bank: Bank,
        retriever: Retriever,
        *,
        permutation: np.ndarray | None = None,
        encode: Encode | None = None,
        append: Append | None = None,
        cache_bytes: int = CACHE_BYTES,
    ):
        self._encode, self._append = encode, append
        self._lock, self._adding = threading.Lock(), threading.Lock()
        self.bank, self._retriever, self._permutation = bank, retriever, permutation
        self.per_chunk = bank.spec.references_per_chunk
        self.recent = RecentMemories(self._read, cache_bytes)
        self._generation = bank.generation  # of the header that was last taken over
        # Seconds spent so far, by what on.
        self.seconds = {"embed": 0.0, "search": 0.0, "load": 0.0}

    @classmethod
    def open(
        cls,
        bank: Bank,
        *,
        model_embed: Callable | None = None,
        encode: Encode | None = None,
        append: Append | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> "MemoryReader":
        """Load the bank's embedder and index; keep ``cache_bytes`` of memories read lately."""
        embedder = bank.embedder(model_embed=model_embed)
        retriever = Retriever(embedder, open_index(bank, grows=append is not None))
        return cls(bank, retriever, encode=encode, append=append, cache_bytes=cache_bytes)

    def shuffled(self, *, seed: int) -> "MemoryReader":
        """The same bank with every reference's memory exchanged for another's."""
        alive = self.bank.alive()
        living = np.arange(self.bank.rows) if alive is None else np.flatnonzero(alive)
        order = np.random.default_rng(seed).permutation(living)
        exchanged = np.arange(self.bank.rows)
        # One cycle through all references: nothing stays in its place (if there are two at all).
        exchanged[order] = np.roll(order, 1)
        made = MemoryReader(self.bank, self._retriever, permutation=exchanged, encode=self._encode)
        made.recent = self.recent
        return made

    def search(
        self,
        texts: Sequence[str],
        k: int | None = None,
        *,
        sources: Sequence[str] | None = None,
    ) -> Hits:
        """The references nearest to each text, of those that were not deleted.

        ``sources``: among the references of these alone.
        """
        started = time.perf_counter()
        queries = self._retriever.embed(list(texts))
        embedded = time.perf_counter()
        hits = None
        while hits is None:
            bank = self.bank
            # Reads files: nobody shall wait for it.
            allowed = _allowed(bank, sources, len(self._retriever.index))
            with self._lock:
                if bank is self.bank:  # else the bank was changed meanwhile
                    hits = self._retriever.find(queries, k or self.per_chunk, allowed=allowed)
        self.seconds["embed"] += embedded - started
        self.seconds["search"] += time.perf_counter() - embedded
        return hits

    def add(self, documents: Sequence[Document]) -> range:
        """Add documents to the bank, to be found from now on; the rows that are new.

        Their memories are encoded when they are first read. Raises BankError when the bank cannot
        be written, or was rewritten (compacted) since it was opened here.
        """
        if self._append is None:
            raise BankError(f"bank {self.bank.url} was opened for reading only")
        with self._adding:
            self._grown()
            rows = self._append(documents)
            self._catch_up()
        return rows

    def refresh(self) -> None:
        """Take over what others deleted from the bank or appended to it; cheap if nothing changed.

        What a repair set aside counts as deleted. Appended rows are found from now on where the
        search is exact or ``append`` was given; else the index lies in its file, and they are found
        by who opens the bank again. Raises RewrittenError when the rows were numbered anew (a
        compacted bank), and BankError when the bank cannot be read now; all stays as it was then.
        """
        with self._adding:
            if not self.bank.is_now(self._generation):
                self._catch_up()

    def _catch_up(self) -> None:
        while True:
            bank = self._grown()
            try:
                return self._take_over(bank)
            except RewrittenError:  # one of its shards was made again since it was opened
                continue

    def _take_over(self, bank: Bank) -> None:
        bank.alive()  # raises where it cannot be read, before anything is taken over
        index = self._retriever.index
        grows = self._append is not None or isinstance(index, FlatIndex)
        fresh = bank.embeddings(len(index), bank.rows) if grows else None
        with self._lock:
            if fresh is not None:
                index.add(fresh)
            self.bank, self._generation = bank, bank.generation

    def _grown(self) -> Bank:
        """The bank as it is now; what is known of its rows here must still hold."""
        bank = Bank.open(self.bank.url, identity=self.bank.spec.identity)
        if not bank.continues(self.bank):
            raise RewrittenError(
                f"bank {bank.url} was rewritten since it was opened here (compacted, repaired with"
                " other embeddings, or made anew): open it again"
            )
        return bank

    def search_filtered(
        self,
        texts: Sequence[str],
        against: Sequence[np.ndarray],
        encode: Callable[[str], Sequence[int]],
        *,
        limit: float,
        candidates: int,
    ) -> Hits:
        """The nearest references whose overlap with ``against`` (tokens) is at most ``limit``.

        Memory³ §4.4: in evaluation a reference that repeats the text under test is left out.
        """
        found = self.search(texts, candidates)
        ids = np.full((len(texts), self.per_chunk), -1, np.int64)
        scores = np.full(ids.shape, -np.inf, np.float32)
        tokens: dict[int, np.ndarray] = {}
        refused: dict[tuple[int, int], bool] = {}
        for row, tested in enumerate(against):
            place = 0
            for hit, score in zip(found.ids[row], found.scores[row], strict=True):
                hit = int(hit)
                if hit < 0 or place == self.per_chunk:
                    break
                if hit not in tokens:
                    tokens[hit] = np.asarray(encode(self.bank.reference(hit).text), np.int32)
                key = (id(tested), hit)
                if key not in refused:
                    refused[key] = exceeds(tested, tokens[hit], limit=limit)
                if not refused[key]:
                    ids[row, place], scores[row, place] = hit, score
                    place += 1
        return Hits(ids, scores)

    @property
    def codebook(self) -> Codebook | None:
        """What decodes what :meth:`fetch` gives; None when it needs no decoding."""
        return None if self.bank.codec is None else self.bank.codec.codebook

    @property
    def keeps(self) -> bool:
        """Whether what was read is kept, so that reading ahead is worth it."""
        return self.recent.limit > 0

    def exchanged(self, ids: np.ndarray) -> np.ndarray:
        """The references whose memories stand in for ``ids``: other ones under "shuffled"."""
        # An empty bank has nothing to exchange, and every id is -1.
        if self._permutation is None or not len(self._permutation):
            return ids
        return np.where(ids >= 0, self._permutation[np.maximum(ids, 0)], -1)

    def fetch(
        self, ids: Int[np.ndarray, "*ids"]
    ) -> tuple[Shaped[np.ndarray, "..."], Bool[np.ndarray, "*ids m"]]:
        """Memories as they are stored, and which of their token slots are filled."""
        started = time.perf_counter()
        found = self.recent.read(ids)
        self.seconds["load"] += time.perf_counter() - started
        kept = self.bank.spec.memory_shape[3]
        return found.memories, np.arange(kept) < found.kept[..., None]

    def slots(self, ids: Int[np.ndarray, "B C r"]) -> Slots:
        """The slots of chunks that read references ``ids``; -1 is an empty slot."""
        stored, valid = self.fetch(self.exchanged(ids))
        if self.codebook is None:
            return from_stored(jnp.asarray(stored), jnp.asarray(valid))
        return _decoded_slots(stored, valid, self.codebook, dtype=self.bank.spec.dtype)

    def _read(self, ids: np.ndarray) -> StoredMemories:
        """What the bank has of these, once all of it is encoded."""
        found = self.bank.read(ids)
        if not found.cold.any():
            return found
        rows = np.unique(ids[found.cold])
        if self._encode is None:
            raise BankError(
                f"bank {self.bank.url}: the memory of reference {rows[0]} has not been encoded yet;"
                " read the bank with its model, or encode all with `jaxlab memory write`"
            )
        stored = self.bank.as_stored(self._encode(self.bank.references(rows)))
        try:
            self.bank.warm(rows, stored)
        except BankError as error:  # a full disk, a bank that can only be read
            log.warning("a memory will be encoded again when it is next read: %s", error)
        found.memories[found.cold] = stored[np.searchsorted(rows, ids[found.cold])]
        return found._replace(cold=np.zeros_like(found.cold))


def _allowed(bank: Bank, sources: Sequence[str] | None, indexed: int) -> Allowed | None:
    """Which of the rows in the index a search may find; None when it may find all of them."""
    alive = bank.alive()
    if sources is None:
        return None if alive is None else Allowed(alive[:indexed])
    mask = bank.rows_of(sources)
    return Allowed((mask if alive is None else mask & alive)[:indexed], tuple(sources))


@functools.partial(jax.jit, static_argnames="dtype")
def _decoded_slots(codes, valid, codebook: Codebook, *, dtype: str) -> Slots:
    return from_stored(decoded(codes, codebook, dtype), valid)


def decoded(
    codes: UInt8[Array, "*ids L 2 K m W"], codebook: Codebook, dtype: jax.typing.DTypeLike
) -> Float[Array, "*ids L 2 K m H"]:
    """Memories from the codes that a quantized bank holds."""
    # The kernel knows no float16.
    computed = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
    return memory_dequantize(codes, codebook, dtype=computed).astype(dtype)
