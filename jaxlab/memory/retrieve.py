"""Search: which references lie nearest to a text (exact inner product, FAISS).

Memory³ (arXiv 2407.01178, §3.1) takes, for each chunk of 64 tokens, the references whose
embeddings have the highest cosine with the chunk's. Exact search is the choice while all embeddings
fit in RAM; it needs no training and has nothing to tune. For more, see ``approximate.py``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

from jaxlab.errors import BankError
from jaxlab.memory.embedders import Embedder

_SPARE = 16
_NEAR = 1e-5
_BLOCK_NUMBERS = 1 << 22


class Hits(NamedTuple):
    """Row numbers, best first, and their inner products; -1 and -inf where there is no more."""

    ids: Int64[np.ndarray, "n k"]
    scores: Float32[np.ndarray, "n k"]


@dataclass(frozen=True, eq=False)
class Allowed:
    """Rows that may be found: those that were not deleted, or those of some sources.

    ``mask`` has one entry a row and decides. ``sources`` names what the rows come from: a server is
    sent these names, where a mask of 1e8 rows cannot go with each query.
    """

    mask: Bool[np.ndarray, " rows"]
    sources: tuple[str, ...] | None = None

    @cached_property
    def count(self) -> int:
        """How many rows may be found."""
        return int(np.count_nonzero(self.mask))

    @cached_property
    def selector(self) -> Any:
        """The mask as FAISS takes it, a bit a row."""
        import faiss

        return faiss.IDSelectorBitmap(np.packbits(self.mask, bitorder="little"))


def lacking(bank: Any, sources: Sequence[str]) -> str | None:
    """What ``bank`` lacks of these sources, in words; None where it has references of each."""
    known = bank.sources() if sources else {}
    unknown = min(set(sources) - known.keys(), default=None)
    if unknown is None:
        return None
    such = f", such as {next(iter(known))}" if known else ""
    return f"no references of {unknown}: name a source as a search names it{such}"


@runtime_checkable
class Index(Protocol):
    """What finds the rows of highest inner product."""

    dim: int

    def __len__(self) -> int:
        """Rows in the index."""
        ...

    def search(
        self,
        queries: Float[np.ndarray, "n dim"],
        k: int,
        *,
        allowed: Allowed | None = None,
    ) -> Hits:
        """The ``k`` best of the ``allowed`` rows (None: of all) for each query.

        The hits of a query do not depend on the other queries of the call.
        """
        ...


class FlatIndex:
    """Exact inner-product search; equal scores are ordered by row number, lowest first.

    FAISS sums in another order for one query than for many, so its last bits (and with them the
    order of ties) depend on the batch. It therefore only proposes; a few more candidates than
    asked for are scored again, one way for every batch.
    """

    def __init__(self, embeddings: Float[np.ndarray, "rows dim"]) -> None:
        import faiss

        if np.ndim(embeddings) != 2:
            raise ValueError(f"embeddings have shape {embeddings.shape}; expected (rows, dim)")
        self.dim = embeddings.shape[1]
        self._index = faiss.IndexFlatIP(self.dim)
        self.add(embeddings)

    @classmethod
    def of(cls, blocks: Iterable[tuple[int, Float[np.ndarray, "n dim"]]], dim: int) -> "FlatIndex":
        """From embeddings in blocks, in order, each with the number of its first row."""
        index = cls(np.zeros((0, dim), np.float32))
        for _, block in blocks:
            index.add(block)
        return index

    def __len__(self) -> int:
        return self._index.ntotal

    def add(self, embeddings: Float[np.ndarray, "rows dim"]) -> None:
        """Add rows behind those that are there; raises BankError when one is not finite."""
        vectors = np.ascontiguousarray(embeddings, np.float32)
        require_finite(vectors, len(self))
        if len(vectors):
            self._index.add(vectors)

    @property
    def _vectors(self) -> Float32[np.ndarray, "rows dim"]:
        """The rows where FAISS holds them: no second copy."""
        import faiss

        size = len(self) * self.dim
        return faiss.rev_swig_ptr(self._index.get_xb(), size).reshape(-1, self.dim)

    def search(
        self,
        queries: Float[np.ndarray, "n dim"],
        k: int,
        *,
        allowed: Allowed | None = None,
    ) -> Hits:
        """The ``k`` rows of highest inner product with each query, of those that are allowed.

        Raises ValueError for ``k < 1``, BankError when the queries have another width.
        """
        queries = check_queries(self, queries, k, allowed)
        hits = no_hits(len(queries), k)
        there = len(self) if allowed is None else allowed.count
        if there:
            width = min(k + _SPARE, there)
            self._fill(hits, queries, np.arange(len(queries)), allowed, width=width, there=there)
        return hits

    def _fill(
        self,
        hits: Hits,
        queries: np.ndarray,
        rows: np.ndarray,
        allowed: Allowed | None,
        *,
        width: int,
        there: int,
    ) -> None:
        """Write the hits of ``rows``; those whose ties may reach past ``width`` go again, wider."""
        found = min(hits.ids.shape[1], there)
        step = max(1, _BLOCK_NUMBERS // (width * self.dim))
        wider = []
        for start in range(0, len(rows), max(step, 1024)):
            block = rows[start : start + max(step, 1024)]
            params = search_params(allowed)
            rough, ids = self._index.search(queries[block], width, params=params)
            tied = rough[:, -1] >= rough[:, found - 1] - _NEAR
            settled = ~tied if width < there else np.ones(len(block), bool)
            wider.append(block[~settled])
            block, ids = block[settled], ids[settled]
            for first in range(0, len(block), step):
                some = slice(first, first + step)
                ranked = self._rank(queries[block[some]], ids[some], found)
                hits.ids[block[some], :found], hits.scores[block[some], :found] = ranked
        again = np.concatenate(wider) if wider else rows[:0]
        if len(again):
            width = min(4 * width, there)
            self._fill(hits, queries, again, allowed, width=width, there=there)

    def _rank(self, queries: np.ndarray, ids: np.ndarray, found: int) -> Hits:
        """Score candidates in float64 and order them by score, then by row number."""
        products = self._vectors[ids].astype(np.float64) * queries[:, None, :]
        scores = products.sum(axis=-1).astype(np.float32)
        order = np.lexsort((ids, -scores), axis=-1)[:, :found]
        return Hits(np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1))


def require_finite(vectors: Float32[np.ndarray, "n dim"], first: int) -> None:
    """Raise BankError naming the first row (of the bank) that is not finite."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise BankError(
            f"embedding of reference {first + bad[0]} is not finite; build the bank again"
        )


def check_queries(
    index: Index, queries: Float[np.ndarray, "n dim"], k: int, allowed: Allowed | None
) -> Float32[np.ndarray, "n dim"]:
    """Queries as FAISS takes them; ValueError or BankError for what cannot be searched."""
    if k < 1:
        raise ValueError(f"k is {k}; ask for at least one reference")
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != index.dim:
        raise BankError(
            f"queries have shape {queries.shape} but the index holds vectors of {index.dim};"
            " use the embedder the bank was built with"
        )
    if allowed is not None and len(allowed.mask) != len(index):
        raise BankError(
            f"the mask of allowed rows has {len(allowed.mask):,} entries but the index has"
            f" {len(index):,} rows: make it again for this bank"
        )
    return queries


def no_hits(count: int, k: int) -> Hits:
    """Hits of ``count`` queries, to be filled."""
    return Hits(np.full((count, k), -1, np.int64), np.full((count, k), -np.inf, np.float32))


def search_params(allowed: Allowed | None, kind: str = "SearchParameters") -> Any:
    """FAISS's parameters of a search among some rows; None for all of them."""
    import faiss

    return None if allowed is None else getattr(faiss, kind)(sel=allowed.selector)


class Retriever:
    """An embedder and an index over the same vectors: texts in, row numbers out."""

    def __init__(self, embedder: Embedder, index: Index) -> None:
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

    def find(
        self,
        queries: Float32[np.ndarray, "n dim"],
        k: int,
        *,
        allowed: Allowed | None = None,
    ) -> Hits:
        """The ``k`` rows nearest to each query, of those allowed; none where it is zero."""
        hits = self.index.search(queries, k, allowed=allowed)
        silent = ~queries.any(axis=1)
        hits.ids[silent] = -1
        hits.scores[silent] = -np.inf
        return hits
