"""Reading a memory bank: memories, texts, embeddings and sources by row, each where it lies.

What a reader holds is bounded by its cache (:func:`jaxlab.memory.objects.default_context`) and by
the number of arrays it keeps open, whatever the size of the bank.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, SupportsIndex
from urllib.parse import unquote

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Shaped, UInt64

from jaxlab.errors import BankError
from jaxlab.memory.embedders import Embedder, ModelEmbed, open_embedder
from jaxlab.memory.header import HEADER_FILE, IndexRecord, Shard, StoredFile, cure_of
from jaxlab.memory.objects import read_object
from jaxlab.memory.quantize import Codec
from jaxlab.memory.rows import BankRows
from jaxlab.memory.shards import (
    CHECKSUM_BYTES,
    REFERENCES,
    SOURCES,
    StoredReference,
    line_marks,
    marks_of,
    read_line,
)
from jaxlab.memory.verify import VerifyReport, verify_objects

_BLOCK_ROWS = 65536


class StoredMemories(NamedTuple):
    """Memories in the order asked for, and how many of their token slots are valid.

    ``memories`` are as the bank stores them: keys and values, or their codes (uint8). ``cold`` is
    True where the memory has not been encoded yet.
    """

    memories: Shaped[np.ndarray, "*ids Lm 2 K m stored"]
    kept: Int32[np.ndarray, "*ids"]
    cold: Bool[np.ndarray, "*ids"]


class BankReader(BankRows):
    """What can be read of a bank. Row numbers (ids) count over all shards from 0."""

    @property
    def index_record(self) -> IndexRecord | None:
        """What the bank notes of its index; None when it has none, and is searched exactly."""
        return self._header.index

    def index_object(self) -> tuple[str, bytes | None]:
        """The index as a local path, or for a bank elsewhere its key and its bytes.

        Raises BankError when it is missing or damaged: it is read once, against its checksum.
        """
        placed = self._header.index_file
        if self.url.startswith("file://"):
            path = unquote(self.url.removeprefix("file://"))
        elif "://" in self.url:
            return placed.key, self._checked(placed)
        else:
            path = os.path.expanduser(self.url)
        path = os.path.join(path, placed.key)
        if not os.path.exists(path) or StoredFile.of_path(path) != placed.file:
            raise BankError(
                f"bank {self.url}: {placed.key} is damaged or missing; {cure_of('index')}"
            )
        return path, None

    def fingerprint(self, rows: int | None = None) -> str:
        """SHA-256 over the embeddings of the first ``rows``: what an index has to be of."""
        return self._header.fingerprint(self.rows if rows is None else rows)

    def continues(self, older: "BankReader") -> bool:
        """Whether the rows of ``older`` are the same here, but for those that were lost since."""
        return self._header.continues(older._header)

    def index_fits(self) -> bool:
        """Whether the index is of this bank's rows; appended ones may be missing from it."""
        return self._header.index_fits()

    def is_now(self, generation: bytes) -> bool:
        """Whether the header that lies there is still the one of this generation."""
        found = read_object(self._kvstore, HEADER_FILE, self.url, unless=generation)
        return found.state == "unspecified"

    def read(self, ids: Int[np.ndarray, "*ids"] | Sequence[int]) -> StoredMemories:
        """Memories by row number, read concurrently; a negative id gives zeros and kept 0.

        Raises BankError for an id past the end, for a deleted reference and for a shard that cannot
        be read.
        """
        ids = np.asarray(ids, np.int64)
        self._require_living(ids[ids >= 0])
        return self.read_any(ids)

    def read_any(self, ids: Int[np.ndarray, "*ids"]) -> StoredMemories:
        """As :meth:`read`, of deleted references, too."""
        rows, place = np.unique(ids, return_inverse=True)
        memories = np.zeros((len(rows), *self.spec.stored_shape), self.spec.stored_dtype)
        kept, cold = np.zeros(len(rows), np.int32), np.zeros(len(rows), bool)
        pending, lone = [], []
        empty = int(np.searchsorted(rows, 0))
        for shard, inside, part in self._by_shard(rows[empty:]):
            part = slice(empty + part.start, empty + part.stop)
            pending.append((shard, self._start(shard, "kept", inside), kept[part]))
            if not shard.cold:
                stored = self._start(shard, self.spec.stored_name, inside)
                pending.append((shard, stored, memories[part]))
                continue
            for row, at in zip(inside.tolist(), range(part.start, part.stop), strict=True):
                lone.append((shard, row, self._start(shard, self.spec.stored_name, row), at))
        for shard, future, out in pending:
            out[...] = self._finish(shard, future)
        for shard, row, future, at in lone:
            memory = self._finish_lone(shard, row, future)
            if memory is None:
                cold[at] = True
            else:
                memories[at] = memory
        place = place.reshape(ids.shape)
        return StoredMemories(memories[place], kept[place], cold[place])

    def cold_rows(self) -> Int[np.ndarray, " n"]:
        """The living rows whose memories have not been encoded yet."""
        return self._cold_rows(self._encoded())

    def embeddings(
        self, start: int = 0, stop: int | None = None
    ) -> Float32[np.ndarray, "rows dim"]:
        """Embeddings of the rows from ``start`` to ``stop`` (None: the last), at once and in order.

        Of deleted ones as well; zeros for lost ones.
        """
        stop = self.rows if stop is None else stop
        out = np.zeros((stop - start, self.spec.embedding_dim), np.float32)
        pending = []
        for shard in self.shards:
            first, last = max(start, shard.start), min(stop, shard.start + shard.count)
            if first < last:
                inside = slice(first - shard.start, last - shard.start)
                future = self._start(shard, "embeddings", inside)
                pending.append((shard, future, out[first - start : last - start]))
        for shard, future, part in pending:
            part[...] = self._finish(shard, future)
        return out

    def embedding_blocks(
        self, rows: int = _BLOCK_ROWS
    ) -> Iterator[tuple[int, Float32[np.ndarray, "n dim"]]]:
        """All embeddings in blocks of ``rows``, each with the number of its first row."""
        for start in range(0, self.rows, rows):
            yield start, self.embeddings(start, min(start + rows, self.rows))

    def reference(self, row: int) -> StoredReference:
        """The text of one reference."""
        return self.references([row])[0]

    def references(self, ids: Iterable[SupportsIndex]) -> list[StoredReference]:
        """The texts of references, read concurrently, each with one range request.

        Raises BankError for an id that is not in the bank, or was deleted, and for a damaged text.
        """
        rows, place = np.unique(np.fromiter(ids, np.int64), return_inverse=True)
        self._require_living(rows)
        tables = [
            (shard, self._start(shard, "lines", inside))
            for shard, inside, _ in self._by_shard(rows)
        ]
        pending = []
        for shard, future in tables:
            for start, length, crc in self._finish(shard, future).tolist():
                where = slice(start, start + length)
                line = self._start_object(shard, REFERENCES, where)
                pending.append((shard, line, crc))
        texts = [self._text(*each) for each in pending]
        return [texts[where] for where in place]

    def has(self, references: Sequence[StoredReference]) -> Bool[np.ndarray, " n"]:
        """Whether the bank holds each reference, alive; texts are read only where sums agree."""
        marks = marks_of(references)
        wanted: dict[int, list[int]] = {}
        for place, mark in enumerate(marks.tolist()):
            wanted.setdefault(mark, []).append(place)
        there, found = self.marks(), np.zeros(len(references), bool)
        alive, same = self.alive(), np.isin(there, marks)
        rows = np.flatnonzero(same if alive is None else same & alive)
        for mark, one in zip(there[rows].tolist(), self.references(rows), strict=True):
            for place in wanted[mark]:
                found[place] |= references[place] == one
        return found

    def marks(self) -> UInt64[np.ndarray, " rows"]:
        """Length and checksum of each row's text, source and tokens (:func:`marks_of`)."""
        out = np.zeros(self.rows, np.uint64)
        tables = [(shard, self._start(shard, "lines", slice(None))) for shard in self.shards]
        for shard, table in tables:
            out[shard.start : shard.start + shard.count] = line_marks(self._finish(shard, table))
        return out

    def sources(self) -> dict[str, int]:
        """How many living references each source has."""
        found: dict[str, int] = {}
        alive = self.alive()
        for shard, names, places in self._shard_sources():
            if alive is not None:
                places = places[alive[shard.start : shard.start + shard.count]]
            for name, count in zip(names, np.bincount(places, minlength=len(names)), strict=True):
                found[name] = found.get(name, 0) + int(count)
        return {name: count for name, count in found.items() if count}

    def rows_of(self, sources: Iterable[str]) -> Bool[np.ndarray, " rows"]:
        """True at the rows of references of these sources, deleted ones among them."""
        wanted, out = set(sources), np.zeros(self.rows, bool)
        for shard, names, places in self._shard_sources():
            chosen = np.array([name in wanted for name in names], bool)
            out[shard.start : shard.start + shard.count] = chosen[places]
        return out

    def embedder(self, *, model_embed: ModelEmbed | None = None) -> Embedder:
        """The embedder the bank was written with; raises BankError when its state is damaged."""
        return open_embedder(
            self.spec.embedder, state=self.embedder_state() or None, model_embed=model_embed
        )

    def embedder_state(self) -> bytes:
        """What the embedder was fitted to; empty where its name says it all."""
        record = self._header.embedder_file
        return b"" if record is None else self._checked(record)

    @functools.cached_property
    def codec(self) -> Codec | None:
        """What decodes the codes of a quantized bank; raises BankError when it is damaged."""
        record = self._header.codec_file
        if record is None:
            return None
        return Codec.from_bytes(self.spec.codec, self._checked(record))

    def stats(self) -> dict[str, Any]:
        """Counts, sizes and settings, ready to print or to store as JSON.

        ``bytes`` are those of the shards, with what cold ones have of memories by now.
        """
        sizes = [file.bytes for shard in self.shards for file in shard.files.values()]
        encoded = self._encoded()
        lone = self.spec.bytes_per_reference + CHECKSUM_BYTES
        sizes += [len(rows) * lone for _, rows in encoded]
        return {
            "url": self.url,
            "references": len(self),
            "rows": self.rows,
            "cold": len(self._cold_rows(encoded)),
            "lost_shards": len(self.lost),
            "index": self.index_record and asdict(self.index_record),
            "shards": len(self.shards),
            "bytes": sum(sizes),
            "bytes_per_reference": self.spec.bytes_per_reference,
            **asdict(self.spec),
        }

    def verify(self) -> VerifyReport:
        """Read every object back and compare size and SHA-256; damage is reported, not raised.

        Raises RewrittenError when objects are gone because the bank was rewritten meanwhile.
        """
        # Anew: it may be damaged, or readable, by now. That it cannot be read is found below.
        alive = self._read_alive(self._header)
        if isinstance(self._alive, BankError):
            self._know(alive, self.rows)
        alive = None if isinstance(alive, BankError) else alive
        given = alive, self.encoded, self.check_lone
        found = verify_objects(self._kvstore, self._header, *given)
        now = None if found.ok else self._header_now()
        if now is not None:
            listed = {key for _, key, _ in now.objects()}
            if any(key not in listed for _, key, _ in self._header.objects()):
                raise self._rewritten()
        return found

    def embeddings_of(self, rows: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n dim"]:
        """Embeddings of rising rows."""
        out = np.zeros((len(rows), self.spec.embedding_dim), np.float32)
        pending = [
            (shard, self._start(shard, "embeddings", inside), out[part])
            for shard, inside, part in self._by_shard(rows)
        ]
        for shard, future, part in pending:
            part[...] = self._finish(shard, future)
        return out

    def _encoded(self) -> list[tuple[Shard, Int[np.ndarray, " _"]]]:
        """The cold shards, each with the rows within it whose memories are there."""
        return [(shard, self.encoded(shard)) for shard in self.shards if shard.cold]

    def _cold_rows(
        self, encoded: list[tuple[Shard, Int[np.ndarray, " _"]]]
    ) -> Int[np.ndarray, " n"]:
        alive, out = self.alive(), np.zeros(self.rows, bool)
        for shard, rows in encoded:
            out[shard.start : shard.start + shard.count] = True
            out[shard.start + rows] = False
        return np.flatnonzero(out if alive is None else out & alive)

    def _shard_sources(self) -> Iterator[tuple[Shard, list[str], Int32[np.ndarray, " n"]]]:
        """For each shard the names of its sources and the place of each row's among them."""
        pending = [
            (shard, self._start_object(shard, SOURCES), self._start(shard, "source", slice(None)))
            for shard in self.shards
        ]
        for shard, names, places in pending:
            names = json.loads(self._finish_whole(shard, SOURCES, names))
            yield shard, names, self._finish(shard, places)

    def _text(self, shard: Shard, line: Any, crc: int) -> StoredReference:
        try:
            return read_line(self._finish_object(shard, line, REFERENCES), crc)
        except ValueError as error:
            raise self._unreadable(shard, error) from error
