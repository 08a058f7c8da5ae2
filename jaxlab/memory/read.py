"""From texts to the slots that the model reads: search, filter, load, arrange."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.data.overlap import exceeds
from jaxlab.errors import BankError
from jaxlab.memory.retrieve import FlatIndex, Hits, Retriever
from jaxlab.memory.store import Bank, StoredMemories, StoredReference
from jaxlab.memory.write import from_stored
from jaxlab.models.attention import Slots
from kernels_pallas.memory_dequantize import Codebook, memory_dequantize

Encode = Callable[[Sequence[StoredReference]], np.ndarray]


class MemoryReader:
    """Retrieval from one bank, and loading of what was retrieved.

    ``permutation`` is the control "shuffled": search as ever, but read the memory of the reference
    at that place instead. ``encode`` makes the memories of references that have none yet
    (:func:`jaxlab.memory.pipeline.reference_encoder`); they are stored in the bank.
    """

    def __init__(
        self,
        bank: Bank,
        retriever: Retriever,
        *,
        permutation: np.ndarray | None = None,
        encode: Encode | None = None,
    ):
        self._encode = encode
        self.bank, self._retriever, self._permutation = bank, retriever, permutation
        self.per_chunk = bank.spec.references_per_chunk
        self._arrange = _arrangement(bank)

    @classmethod
    def open(
        cls, bank: Bank, *, model_embed: Callable | None = None, encode: Encode | None = None
    ) -> "MemoryReader":
        """Load the bank's embedder and index."""
        embedder = bank.embedder(model_embed=model_embed)
        return cls(bank, Retriever(embedder, FlatIndex(bank.embeddings())), encode=encode)

    def shuffled(self, *, seed: int) -> "MemoryReader":
        """The same bank with every reference's memory exchanged for another's."""
        alive = self.bank.alive()
        living = np.arange(self.bank.rows) if alive is None else np.flatnonzero(alive)
        order = np.random.default_rng(seed).permutation(living)
        exchanged = np.arange(self.bank.rows)
        # One cycle through all references: nothing stays in its place (if there are two at all).
        exchanged[order] = np.roll(order, 1)
        return MemoryReader(self.bank, self._retriever, permutation=exchanged, encode=self._encode)

    def search(self, texts: Sequence[str], k: int | None = None) -> Hits:
        """The references nearest to each text, of those that were not deleted."""
        k, alive = k or self.per_chunk, self.bank.alive()
        if alive is None:
            return self._retriever.search(list(texts), k)
        hits = self._retriever.search(list(texts), k + int((~alive).sum()))
        return _allowed(hits, alive, k)

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

    def slots(self, ids: np.ndarray) -> Slots:
        """The slots of chunks that read references ``ids`` (B, C, r); -1 is an empty slot."""
        # An empty bank has nothing to exchange, and every id is -1.
        if self._permutation is not None and len(self._permutation):
            ids = np.where(ids >= 0, self._permutation[np.maximum(ids, 0)], -1)
        found = self._read(ids)
        kept = self.bank.spec.memory_shape[3]
        valid = np.arange(kept) < found.kept[..., None]
        return self._arrange(jnp.asarray(found.memories), jnp.asarray(valid))

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
        self.bank.warm(rows, self._encode(self.bank.references(rows)))
        return self.bank.read(ids)


def _allowed(hits: Hits, allowed: np.ndarray, k: int) -> Hits:
    """The first ``k`` hits whose rows are allowed, in their order."""
    kept = (hits.ids >= 0) & allowed[hits.ids]
    order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
    ids, scores, kept = (np.take_along_axis(each, order, 1) for each in (*hits, kept))
    return Hits(np.where(kept, ids, -1), np.where(kept, scores, np.float32(-np.inf)))


def _arrangement(bank: Bank) -> Callable[..., Slots]:
    """The function from what a bank stores, and which slots are valid, to slots."""
    if bank.codec is None:
        return from_stored
    return functools.partial(_decoded, bank.codec.codebook, dtype=bank.spec.dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _decoded(codebook: Codebook, codes: jax.Array, valid: jax.Array, *, dtype: str) -> Slots:
    # The kernel knows no float16.
    computed = "bfloat16" if dtype == "bfloat16" else "float32"
    vectors = memory_dequantize(codes, codebook, dtype=computed).astype(dtype)
    return from_stored(vectors, valid)
