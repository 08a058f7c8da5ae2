"""Token streams into rows of one length, and rows into the grid of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Integer

from jaxlab.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of ``T`` tokens; ``mask`` is False on padding, which only ever ends a row.

    ``document`` gives the index of the document that a row belongs to, where rows do not mix
    documents, and is None otherwise.
    """

    tokens: Int32[np.ndarray, "N T"]
    mask: Bool[np.ndarray, "N T"]
    document: Int32[np.ndarray, " N"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """The chunks of rows, row after row: chunk ``c`` of row ``n`` is ``n * C + c``."""

    tokens: Int32[np.ndarray, "chunks chunk_length"]
    lengths: Int32[np.ndarray, " chunks"]


def pack(
    documents: Sequence[Integer[np.ndarray, " _"]],
    *,
    sequence_length: int,
    eos_id: int,
    pad_id: int,
) -> Rows:
    """One stream of all documents, each followed by eos, cut into rows; the last is padded.

    Raises DataError when there is no token at all.
    """
    eos = np.array([eos_id], np.int32)
    stream = [part for document in documents for part in (document, eos)]
    if not stream:
        raise DataError("nothing to pack: the corpus has no documents")
    return _rows(np.concatenate(stream), sequence_length=sequence_length, pad_id=pad_id)


def pack_by_document(
    documents: Sequence[Integer[np.ndarray, " _"]], *, sequence_length: int, pad_id: int
) -> Rows:
    """Rows for evaluation: every document starts a row of its own, and none gets an eos.

    A document without tokens has no row. Raises DataError when there is no token at all.
    """
    parts = {
        index: _rows(np.asarray(document), sequence_length=sequence_length, pad_id=pad_id)
        for index, document in enumerate(documents)
        if len(document)
    }
    if not parts:
        raise DataError("nothing to pack: the documents have no tokens")
    return Rows(
        tokens=np.concatenate([rows.tokens for rows in parts.values()]),
        mask=np.concatenate([rows.mask for rows in parts.values()]),
        document=np.repeat(
            np.fromiter(parts, np.int32), [len(rows) for rows in parts.values()]
        ).astype(np.int32),
    )


def chunks(rows: Rows, chunk_length: int) -> Chunks:
    """The grid of chunks (Memory³, §3.1: 64 tokens). Raises DataError when ``T`` is no multiple."""
    count, length = rows.tokens.shape
    if chunk_length <= 0 or length % chunk_length:
        raise DataError(
            f"sequence_length {length} is not a multiple of the chunk length {chunk_length}: "
            "change one of the two"
        )
    lengths = rows.mask.reshape(count * (length // chunk_length), chunk_length).sum(axis=1)
    return Chunks(rows.tokens.reshape(-1, chunk_length), lengths.astype(np.int32))


def _rows(stream: Integer[np.ndarray, " _"], *, sequence_length: int, pad_id: int) -> Rows:
    if sequence_length <= 0:
        raise DataError(f"sequence_length is {sequence_length}: it must be positive")
    count = -(-len(stream) // sequence_length)
    tokens = np.full(count * sequence_length, pad_id, np.int32)
    tokens[: len(stream)] = stream
    mask = np.arange(count * sequence_length) < len(stream)
    shape = (count, sequence_length)
    return Rows(tokens.reshape(shape), mask.reshape(shape))
