"""Search: which references lie nearest to a text (exact inner product, FAISS).

Memory³ (arXiv 2407.01178, §3.1) takes, for each chunk of 64 tokens, the references whose
embeddings have the highest cosine with the chunk's. Exact search is the choice up to about 1e7
references of 1024 numbers; it needs no training and has nothing to tune.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int64

from jaxlab.errors import BankError
from jaxlab.memory.embedders import Embedder

_SPARE = 16
_NEAR = 1e-5
_BLOCK_NUMBERS = 1 << 22


class Hits(NamedTuple):
    """Row numbers, best first, and their inner products; -1 and -inf where there is no more."""

    ids: Int64[np.ndarray, "n k"]
    scores: Float32[np.ndarray, "n k"]


class FlatIndex:
    """Exact inner-product search; equal scores are ordered by row number, lowest first.

    FAISS sums in another order for one query than for many, so its last bits (and with them the
    order of ties) depend on the batch. It therefore only proposes; a few more candidates than
    asked for are scored again, one way for every batch.
    """

    def __init__(self, embeddings: Float[np.ndarray, "rows dim"]) -> None:
        import faiss

        vectors = np.ascontiguousarray(embeddings, np.float32)
        if vectors.ndim != 2:
            raise ValueError(f"embeddings have shape {vectors.shape}; expected (rows, dim)")
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise BankError(f"embedding of reference {row} is not finite; build the bank again")
        self._vectors = vectors
        self._index = faiss.IndexFlatIP(self.dim)
        if len(vectors):
            self._index.add(vectors)

    @property
    def dim(self) -> int:
        """Numbers in each embedding."""
        return self._vectors.shape[1]

    def __len__(self) -> int:
        return len(self._vectors)

    def search(self, queries: Float[np.ndarray, "n dim"], k: int) -> Hits:
        """The ``k`` rows of highest inner product with each query.

        Raises ValueError for ``k < 1``, BankError when the queries have another width.
        """
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least one reference")
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise BankError(
                f"queries have shape {queries.shape} but the index holds vectors of {self.dim};"
                " use the embedder the bank was built with"
            )
        hits = Hits(
            np.full((len(queries), k), -1, np.int64),
            np.full((len(queries), k), -np.inf, np.float32),
        )
        if len(self):
            self._fill(hits, queries, np.arange(len(queries)), width=k + _SPARE)
        return hits

    def _fill(self, hits: Hits, queries: np.ndarray, rows: np.ndarray, *, width: int) -> None:
        """Write the hits of ``rows``; those whose ties may reach past ``width`` go again, wider."""
        found = min(hits.ids.shape[1], len(self))
        width = min(width, len(self))
        step = max(1, _BLOCK_NUMBERS // (width * self.dim))
        wider = []
        for start in range(0, len(rows), max(step, 1024)):
            block = rows[start : start + max(step, 1024)]
            rough, ids = self._index.search(queries[block], width)
            tied = rough[:, -1] >= rough[:, found - 1] - _NEAR
            settled = ~tied if width < len(self) else np.ones(len(block), bool)
            wider.append(block[~settled])
            block, ids = block[settled], ids[settled]
            for first in range(0, len(block), step):
                some = slice(first, first + step)
                ranked = self._rank(queries[block[some]], ids[some], found)
                hits.ids[block[some], :found], hits.scores[block[some], :found] = ranked
        again = np.concatenate(wider) if wider else rows[:0]
        if len(again):
            self._fill(hits, queries, again, width=4 * width)

    def _rank(self, queries: np.ndarray, ids: np.ndarray, found: int) -> Hits:
        """Score candidates in float64 and order them by score, then by row number."""
        products = self._vectors[ids].astype(np.float64) * queries[:, None, :]
        scores = products.sum(axis=-1).astype(np.float32)
        order = np.lexsort((ids, -scores), axis=-1)[:, :found]
        return Hits(np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1))


class Retriever:
    """An embedder and an index over the same vectors: texts in, row numbers out."""

    def __init__(self, embedder: Embedder, index: FlatIndex) -> None:
        if embedder.dim != index.dim:
            raise BankError(
                f"embedder {embedder.name} gives vectors of {embedder.dim} but the bank holds"
                f" vectors of {index.dim}; use the embedder the bank was built with"
            )
        self.embedder = embedder
        self.index = index

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The ``k`` nearest references of each text; none (-1) where a text says nothing."""
        return self.find(self.embed(texts), k)

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dim"]:
        """What is searched for each text: zeros where it says nothing."""
        queries = self.embedder.embed(texts)
        queries[[not text.strip() for text in texts]] = 0
        return queries

    def find(self, queries: Float32[np.ndarray, "n dim"], k: int) -> Hits:
        """The ``k`` rows nearest to each query; none where it is zero."""
        hits = self.index.search(queries, k)
        silent = ~queries.any(axis=1)
        hits.ids[silent] = -1
        hits.scores[silent] = -np.inf
        return hits
