"""Approximate search for banks whose embeddings do not fit in RAM: FAISS's inverted lists.

Rows are put into lists by their nearest of ``lists`` centroids and stored in fewer bytes; a query
looks into its ``probes`` nearest lists, or into more where only some rows may be found. How much
that misses is measured against exact search when an index is built, and kept with it.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.header import IndexRecord
from jaxlab.memory.retrieve import (
    Allowed,
    Hits,
    check_queries,
    no_hits,
    require_finite,
    search_params,
)

Blocks = Callable[[], Iterable[tuple[int, Float32[np.ndarray, "n dim"]]]]

FLAT = "Flat"
_NAME = re.compile(r"IVF(\d+),(Flat|SQ8|PQ(\d+))")
# Bytes of embeddings that are held for exact search, or of one byte a number for SQ8.
RAM_BYTES = 1 << 31
# FAISS asks for so many training rows a centroid, and takes no more than the second.
_LEAST_A_LIST, _MOST_A_LIST = 39, 256
# The codes of PQ, a byte each, are that many centroids.
_LEAST_OF_CODES = 256
_MARGIN = 32


def index_name(rows: int, dim: int) -> str:
    """The index that suits a bank: exact while 4 bytes a number fit in ``RAM_BYTES``.

    Beyond that lists of rows with a byte a number, and where not even these fit, product
    quantization with 8 numbers in a byte. About 4 sqrt(rows) lists, as FAISS advises.
    """
    if 4 * rows * dim <= RAM_BYTES:
        return FLAT
    lists = 1 << round(math.log2(4 * math.sqrt(rows)))
    parts = dim // 8 if dim % 8 == 0 else dim
    return f"IVF{lists},SQ8" if rows * dim <= RAM_BYTES else f"IVF{lists},PQ{parts}"


def fitting_name(rows: int) -> str | None:
    """An index that so many rows can train, however few; None for fewer than one list takes."""
    if rows < _LEAST_A_LIST:
        return None
    lists = min(4 * math.sqrt(rows), rows / _LEAST_A_LIST)
    return f"IVF{1 << math.floor(math.log2(lists))},SQ8"


class ApproximateIndex:
    """Inverted lists; made by :meth:`fit` or :meth:`from_file`."""

    def __init__(self, name: str, index: Any, *, probes: int):
        import faiss

        self.name, self._index, self.probes = name, index, probes
        self._faiss = faiss
        self.dim = index.d

    @classmethod
    def fit(
        cls,
        blocks: Blocks,
        name: str,
        *,
        rows: int,
        dim: int,
        seed: int = 0,
        probes: int | None = None,
    ) -> "ApproximateIndex":
        """Train on rows drawn from ``blocks`` and add all of them, a block at a time.

        ``probes``: lists that a query looks into (None: a 32nd of them, at least 8). Deterministic.
        Raises ConfigError for a name of another kind and for more lists than rows can train.
        """
        import faiss

        lists, parts = _parse(name)
        if rows < _LEAST_A_LIST * lists:
            raise ConfigError(
                f"index {name!r}: {lists} lists are trained on {_LEAST_A_LIST * lists:,} "
                f"references or more, the bank has {rows:,}: choose fewer lists, such as "
                f"{fitting_name(rows) or FLAT}"
            )
        if parts and rows < _LEAST_OF_CODES:
            raise ConfigError(
                f"index {name!r}: codes of PQ are trained on {_LEAST_OF_CODES} references or more,"
                f" the bank has {rows:,}: choose {fitting_name(rows) or FLAT}"
            )
        if parts and dim % parts:
            raise ConfigError(f"index {name!r}: {parts} parts do not divide the dimension {dim}")
        index = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed
        index.train(_drawn(blocks, rows, min(rows, _MOST_A_LIST * lists), dim, seed))
        made = cls(name, index, probes=min(lists, probes or max(8, lists // 32)))
        for _, block in blocks():
            made.add(block)
        return made

    def __len__(self) -> int:
        return self._index.ntotal

    @property
    def bytes(self) -> int:
        """What a row takes, times the rows: the size of the index but for its centroids."""
        return len(self) * (self._index.code_size + 8)

    def add(self, embeddings: Float[np.ndarray, "rows dim"]) -> None:
        """Add rows behind those that are there; raises BankError when one is not finite."""
        vectors = np.ascontiguousarray(embeddings, np.float32)
        require_finite(vectors, len(self))
        if len(vectors):
            self._index.add(vectors)

    def search(
        self,
        queries: Float[np.ndarray, "n dim"],
        k: int,
        *,
        allowed: Allowed | None = None,
    ) -> Hits:
        """The ``k`` nearest that are found; scores are those of the shortened rows.

        Never fewer than ``k`` where so many are allowed. Query by query: FAISS takes other ways for
        many at once, and other roundings with them.
        """
        queries = check_queries(self, queries, k, allowed)
        hits = no_hits(len(queries), k)
        there = len(self) if allowed is None else allowed.count
        for row in range(len(queries) if there else 0):
            ids, scores = self._nearest(queries[row : row + 1], k, allowed, there)
            order = np.lexsort((ids, -scores))[:k]
            hits.ids[row, : len(order)], hits.scores[row, : len(order)] = ids[order], scores[order]
        return hits

    def _nearest(
        self, query: np.ndarray, k: int, allowed: Allowed | None, there: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores of one query, more than ``k`` so that ties go by row number."""
        params = search_params(allowed, "SearchParametersIVF")
        params = params or self._faiss.SearchParametersIVF()
        # As many rows are looked at as if all were allowed: few of them may lie in few lists.
        probes = math.ceil(self.probes * len(self) / there)
        while True:
            params.nprobe = min(probes, self._index.nlist)
            scores, ids = self._index.search(query, min(k + _MARGIN, there), params=params)
            found = ids[0] >= 0
            if found.sum() >= min(k, there) or probes >= self._index.nlist:
                return ids[0][found], scores[0][found]
            probes *= 4

    def to_file(self, path: str | Path) -> None:
        """Write the index to a local file."""
        self._faiss.write_index(self._index, str(path))

    @classmethod
    def from_file(
        cls, path: str | Path, record: IndexRecord, *, url: str, grows: bool = False
    ) -> "ApproximateIndex":
        """Open a stored index; its lists stay in the file, of which the system holds what is used.

        With ``grows`` they are read, and rows can be added. Raises BankError, naming the bank at
        ``url``, for a file that is not what the record says.
        """
        import faiss

        try:
            index = faiss.read_index(str(path), 0 if grows else faiss.IO_FLAG_MMAP)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise _damaged(url, reason) from None
        if index.ntotal != record.rows or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise _damaged(url, f"{index.ntotal} rows in place of {record.rows}")
        return cls(record.name, index, probes=record.probes)


def _damaged(url: str, reason: str) -> BankError:
    return BankError(
        f"bank {url}: its index is damaged ({reason}); make it again with `jaxlab memory index`"
    )


def exact_hits(blocks: Blocks, queries: Float32[np.ndarray, "n dim"], k: int) -> Hits:
    """The ``k`` nearest rows of all, a block at a time; equal scores go by row number."""
    best = no_hits(len(queries), k)
    for first, block in blocks():
        scores = queries @ block.T
        width = min(k, len(block))
        ids = np.argpartition(-scores, width - 1, axis=1)[:, :width]
        ids = np.concatenate([best.ids, ids + first], axis=1)
        near = np.take_along_axis(scores, ids[:, k:] - first, axis=1)
        both = np.concatenate([best.scores, near], axis=1)
        order = np.lexsort((ids, -both), axis=-1)[:, :k]
        best = Hits(np.take_along_axis(ids, order, 1), np.take_along_axis(both, order, 1))
    return best


def recall(found: Hits, exact: Hits) -> float:
    """The share of the exact hits that were found (recall@k for hits of k)."""
    pairs = zip(found.ids, exact.ids, strict=True)
    both = sum(len(np.intersect1d(ours, theirs[theirs >= 0])) for ours, theirs in pairs)
    return both / max(1, int((exact.ids >= 0).sum()))


def _parse(name: str) -> tuple[int, int]:
    found = _NAME.fullmatch(name)
    if not found or int(found[1]) < 1 or found[3] == "0":
        raise ConfigError(
            f"index {name!r}: is none of Flat, IVFn,Flat, IVFn,SQ8 and IVFn,PQm, such as "
            "IVF4096,SQ8"
        )
    return int(found[1]), int(found[3] or 0)


def _drawn(blocks: Blocks, rows: int, count: int, dim: int, seed: int) -> np.ndarray:
    chosen = np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))
    return np.concatenate(list(_picked(blocks, chosen))).reshape(count, dim)


def _picked(blocks: Blocks, rows: np.ndarray) -> Iterator[np.ndarray]:
    for first, block in blocks():
        start, stop = np.searchsorted(rows, [first, first + len(block)])
        yield block[rows[start:stop] - first]
