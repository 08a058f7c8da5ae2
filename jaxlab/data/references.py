"""References of at most 128 tokens, and the one that each chunk of a training row may read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer, Shaped

from jaxlab.data.archive import (
    checksum,
    read_archive,
    texts_from_arrays,
    texts_to_arrays,
    write_archive,
)
from jaxlab.data.overlap import exceeds, most_allowed, overlap
from jaxlab.data.packing import Rows, chunks
from jaxlab.data.sources import Document
from jaxlab.data.tokenizer import Tokenizer
from jaxlab.errors import DataError

__all__ = [
    "References",
    "Search",
    "first_allowed",
    "load_neighbours",
    "neighbours",
    "overlap",
    "save_neighbours",
    "split_references",
]

Search = Callable[
    [list[str], int], tuple[Shaped[np.ndarray, "queries k"], Shaped[np.ndarray, "queries k"]]
]
_QUERIES_AT_ONCE = 4096


def split_references(
    document_tokens: Integer[np.ndarray, " _"], *, length: int = 128
) -> list[Integer[np.ndarray, " _"]]:
    """Cut one document into references of ``length`` tokens; the last may be shorter (§3.1)."""
    if length <= 0:
        raise DataError(f"reference length is {length}: it must be positive")
    return [
        document_tokens[start : start + length] for start in range(0, len(document_tokens), length)
    ]


@dataclass(frozen=True, eq=False)
class References:
    """References in the order of their documents: tokens (padded), lengths, texts, document ids."""

    tokens: Int32[np.ndarray, "n R"]
    lengths: Int32[np.ndarray, " n"]
    texts: list[str]
    sources: list[str]
    tokenizer_hash: str

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def build(
        cls, documents: Sequence[Document], tokenizer: Tokenizer, *, length: int = 128
    ) -> References:
        """Cut the documents; no reference crosses from one into the next. Raises DataError."""
        parts: list[np.ndarray] = []
        sources: list[str] = []
        encoded = tokenizer.encode_batch([document.text for document in documents])
        for document, ids in zip(documents, encoded, strict=True):
            own = split_references(ids, length=length)
            parts += own
            sources += [document.id] * len(own)
        if not parts:
            raise DataError("no references: the documents have no tokens")
        tokens = np.full((len(parts), length), tokenizer.pad_id, np.int32)
        for row, part in zip(tokens, parts, strict=True):
            row[: len(part)] = part
        lengths = np.array([len(part) for part in parts], np.int32)
        texts = [tokenizer.decode(part) for part in parts]
        return cls(tokens, lengths, texts, sources, tokenizer.hash)

    @cached_property
    def copies(self) -> Int32[np.ndarray, "n R"]:
        """How many equal tokens stand before each in its reference; huge on padding."""
        width = self.tokens.shape[1]
        order = np.argsort(self.tokens, axis=1, kind="stable")
        ordered = np.take_along_axis(self.tokens, order, axis=1)
        places = np.broadcast_to(np.arange(width, dtype=np.int32), ordered.shape)
        is_new = np.ones(ordered.shape, bool)
        is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        first = np.maximum.accumulate(np.where(is_new, places, 0), axis=1)
        copies = np.empty_like(self.tokens)
        np.put_along_axis(copies, order, places - first, axis=1)
        copies[places >= self.lengths[:, None]] = np.iinfo(np.int32).max
        return copies

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything the references hold."""
        return checksum(self._arrays())

    def save(self, path: str | Path) -> None:
        """Write one ``.npz`` file with header and checksum."""
        write_archive(path, self._arrays(), kind="references", origin=_made_by(self.tokenizer_hash))

    @classmethod
    def load(cls, path: str | Path, *, tokenizer: Tokenizer) -> References:
        """Read what ``save`` wrote. Raises DataError when damaged or of another tokenizer."""
        arrays = read_archive(path, kind="references", origin=_made_by(tokenizer.hash))
        return cls(
            tokens=arrays["tokens"],
            lengths=arrays["lengths"],
            texts=texts_from_arrays(arrays, "texts"),
            sources=texts_from_arrays(arrays, "sources"),
            tokenizer_hash=tokenizer.hash,
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        texts, sources = (
            texts_to_arrays(self.texts, "texts"),
            texts_to_arrays(self.sources, "sources"),
        )
        return {"tokens": self.tokens, "lengths": self.lengths, **texts, **sources}


def first_allowed(
    ids: Integer[np.ndarray, "C k"],
    row_tokens: Integer[np.ndarray, " T"],
    references: References,
    *,
    limit: float,
) -> Int32[np.ndarray, " C"]:
    """For each chunk the first candidate whose overlap with the whole row is at most ``limit``.

    ``ids`` are candidates in falling order of score, -1 where there is none; ``row_tokens`` are
    the valid tokens of the row. The answer is -1 for a chunk without an allowed candidate.
    """
    verdicts: dict[int, bool] = {}
    possible = _shared_tokens(ids, row_tokens, references)
    chosen = np.full(len(ids), -1, np.int32)
    for chunk, candidates in enumerate(ids.tolist()):
        for rank, candidate in enumerate(candidates):
            if candidate < 0:
                continue
            if candidate not in verdicts:
                reference = references.tokens[candidate, : references.lengths[candidate]]
                verdicts[candidate] = possible[chunk, rank] <= most_allowed(
                    len(reference), limit
                ) or not exceeds(row_tokens, reference, limit=limit)
            if verdicts[candidate]:
                chosen[chunk] = candidate
                break
    return chosen


def neighbours(
    rows: Rows,
    references: References,
    *,
    tokenizer: Tokenizer,
    search: Search,
    chunk_length: int,
    candidates: int,
    limit: float,
) -> Int32[np.ndarray, "N C"]:
    """The reference of each chunk, by index; -1 where there is none (Memory³, §3.6).

    The text of each chunk is the query; ``search(texts, k)`` gives (ids, scores), best first, -1
    for no hit. Of ``candidates`` hits the first is taken whose overlap with the row is at most
    ``limit``. A chunk of padding has none. Raises DataError when the search names no reference.
    """
    grid = chunks(rows, chunk_length)
    asked = np.flatnonzero(grid.lengths)
    hits = np.full((len(grid.lengths), candidates), -1, np.int64)
    for start in range(0, len(asked), _QUERIES_AT_ONCE):
        part = asked[start : start + _QUERIES_AT_ONCE]
        texts = [tokenizer.decode(grid.tokens[i, : grid.lengths[i]].tolist()) for i in part]
        ids, _ = search(texts, candidates)
        hits[part, : ids.shape[1]] = ids
    if hits.max(initial=-1) >= len(references):
        raise DataError(
            f"the search names reference {hits.max()} of {len(references)}: "
            "its index was built from other references"
        )
    hits = hits.reshape(len(rows), -1, candidates)
    chosen = [
        first_allowed(hits[row], rows.tokens[row][rows.mask[row]], references, limit=limit)
        for row in range(len(rows))
    ]
    return np.stack(chosen).astype(np.int32)


def save_neighbours(
    path: str | Path,
    ids: Int32[np.ndarray, "N C"],
    *,
    rows: Rows,
    references: References,
    settings: Mapping[str, Any],
) -> None:
    """Write the neighbours with what they were made from; ``settings`` are plain JSON values."""
    origin = _neighbour_origin(rows, references, settings)
    write_archive(path, {"ids": ids}, kind="neighbours", origin=origin)


def load_neighbours(
    path: str | Path, *, rows: Rows, references: References, settings: Mapping[str, Any]
) -> Int32[np.ndarray, "N C"]:
    """Read what ``save_neighbours`` wrote; DataError if rows, references or settings are others."""
    origin = _neighbour_origin(rows, references, settings)
    return read_archive(path, kind="neighbours", origin=origin)["ids"]


def _shared_tokens(
    ids: Integer[np.ndarray, "C k"], row: Integer[np.ndarray, " T"], references: References
) -> Integer[np.ndarray, "C k"]:
    """Size of the multiset intersection of row and reference: no subsequence can be longer.

    The i-th copy of a token in the reference counts when the row has more than i of them.
    """
    size = int(max(row.max(initial=0), references.tokens.max(initial=0))) + 1
    counts = np.bincount(row, minlength=size)
    return (references.copies[ids] < counts[references.tokens[ids]]).sum(axis=-1)


def _made_by(tokenizer_hash: str) -> dict[str, str]:
    return {"tokenizer": tokenizer_hash}


def _neighbour_origin(
    rows: Rows, references: References, settings: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        **settings,
        "rows": checksum({"tokens": rows.tokens, "mask": rows.mask}),
        "references": references.fingerprint,
        "tokenizer": references.tokenizer_hash,
    }
