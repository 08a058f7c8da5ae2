"""The memory bank: references with their memories, on a disk or in an object store.

Layout, every object written through TensorStore::

    header.json                    what is in the bank; the commit point of every change
    deleted/SHA-WRITER             numbers of the rows that were deleted
    index/SHA-WRITER               the index, where the bank has one
    embedder/SHA-WRITER            state of a fitted embedder
    codec/SHA-WRITER               the codec of a quantized bank
    shards/000000-WRITER/          the first shard, under a name that only its writer uses
        memories/                  zarr3 (n, layers, 2, kv heads, tokens kept, head dim); or
        codes/                     zarr3 (n, layers, 2, kv heads, tokens kept, bytes) uint8
        embeddings/                zarr3 (n, dim) float32
        kept/                      zarr3 (n,) int32
        references.jsonl           text, source and token count of each reference
        lines/                     zarr3 (n, 3) uint64: start, length and CRC-32 of each line
        source/                    zarr3 (n,) int32: which of sources.json
        sources.json               the sources of the shard

A shard is written once, by one ``append``, and exists from the moment the header lists it. One
memory is one inner chunk of the zarr3 shard, with a checksum: it is read with one range request,
and a damaged one is an error. In a cold shard the memories are objects of their own, each written
when it is first read. Whoever opened the bank for writing last is its writer; a former one can add
nothing more and takes nothing away, since no two of them use the same key. Any number of readers,
each of which sees the bank as it was when opened.
"""

import contextlib
import operator
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import numpy as np
import tensorstore as ts
from jaxtyping import Bool, Float, Int, Shaped

from jaxlab.errors import BankError
from jaxlab.memory.header import (
    ALONE,
    HEADER_FILE,
    BankIdentity,
    BankSpec,
    Header,
    IndexRecord,
    PlacedFile,
    Shard,
    cure_of,
)
from jaxlab.memory.objects import (
    default_context,
    delete_folder,
    delete_object,
    list_folders,
    open_kvstore,
    read_object,
)
from jaxlab.memory.reading import BankReader, StoredMemories
from jaxlab.memory.shards import StoredReference
from jaxlab.memory.verify import RepairReport, VerifyReport
from jaxlab.memory.writing import ShardWriter

SHARD_REFERENCES = 1024
_LARGE = 64
__all__ = [
    "Bank",
    "BankIdentity",
    "BankSpec",
    "RepairReport",
    "StoredMemories",
    "StoredReference",
    "VerifyReport",
    "bank_exists",
]


class Bank(ShardWriter):
    """A memory bank at a local path or a ``file://``, ``gs://``, ``s3://``, ``memory://`` URL.

    Made by ``Bank.create`` or ``Bank.open``. Row numbers (ids) count over all shards from 0.
    """

    def __init__(
        self,
        url: str,
        *,
        context: ts.Context,
        kvstore: Any,
        header: Header,
        generation: bytes,
        write: bool = True,
    ) -> None:
        super().__init__(url, context=context, kvstore=kvstore, header=header)
        # Of the header.json that this bank was opened with, or that it wrote last.
        self.generation = generation
        # Generation of header.json this bank may replace; None: opened for reading only.
        self._generation = generation if write else None

    @classmethod
    def create(
        cls,
        url: str | os.PathLike[str],
        *,
        spec: BankSpec,
        embedder_state: bytes = b"",
        codec_state: bytes = b"",
        context: ts.Context | None = None,
    ) -> "Bank":
        """A new, empty bank, open for writing; raises BankError when one is there already.

        ``context`` shares TensorStore's settings; ``memory://`` banks live as long as theirs.
        """
        url, context = os.fspath(url), context or default_context()
        kvstore = open_kvstore(url, context)
        found = read_object(kvstore, HEADER_FILE, url)
        if found.state != "missing":
            raise BankError(f"there is a bank at {url} already; open it, or choose another place")
        if list_folders(kvstore, "shards/", url=url):
            # Not to be cleared away: with its header the bank is whole again.
            raise BankError(
                f"at {url} lie the shards of a bank whose {HEADER_FILE} is missing:"
                f" {cure_of('header')}"
            )
        if bool(spec.codec) != bool(codec_state):
            raise BankError(f"bank {url}: a codec takes both its name and its state")
        header, generation = Header(spec=spec, writer=_new_name()), found.stamp.generation
        bank = cls(url, context=context, kvstore=kvstore, header=header, generation=generation)
        embedder = bank._place("embedder", embedder_state) if embedder_state else None
        codec = bank._place("codec", codec_state) if codec_state else None
        bank._commit(replace(header, embedder_file=embedder, codec_file=codec))
        return bank

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str],
        *,
        identity: BankIdentity | None = None,
        write: bool = False,
        context: ts.Context | None = None,
    ) -> "Bank":
        """Open a bank; with ``write``, end the time of any other writer and clear away its rests.

        Raises BankError when there is no bank, its header is damaged or of another version, or
        it was written by another model than ``identity``.
        """
        url, context = os.fspath(url), context or default_context()
        kvstore = open_kvstore(url, context)
        found = read_object(kvstore, HEADER_FILE, url)
        if found.state == "missing":
            raise BankError(
                f"no memory bank at {url}: {HEADER_FILE} is missing; check the path, or write"
                " a bank"
            )
        header = Header.from_bytes(found.value, url=url)
        if identity is not None:
            header.spec.identity.require(identity, url=url)
        given = {"generation": found.stamp.generation, "write": write}
        bank = cls(url, context=context, kvstore=kvstore, header=header, **given)
        if isinstance(bank._alive, BankError) and not bank.is_now(bank.generation):
            # Another writer replaced the list of deleted rows, and cleared this one away.
            return cls.open(url, identity=identity, write=write, context=context)
        if write:
            bank._take_over(header)
        return bank

    def append(
        self,
        memories: Shaped[np.ndarray, "n Lm 2 K m H"],
        kept: Int[np.ndarray, " n"],
        embeddings: Float[np.ndarray, "n dim"],
        references: Sequence[StoredReference],
    ) -> range:
        """Store references as one new shard, all or nothing; returns their row numbers.

        Raises BankError when an argument does not fit the bank, when the bank was opened for
        reading or changed by another writer, and when storing fails (a full disk); then the bank
        is what it was before. A quantized bank takes memories or their codes. The shard is put
        together in host memory, so append some hundred references of a large model at a time.
        """
        self.require_writable()
        shard = self.store(
            memories,
            kept,
            embeddings,
            references,
            number=self.next_number,
            start=self.rows,
        )
        self.add([shard])
        return range(shard.start, shard.start + shard.count)

    def append_cold(
        self, embeddings: Float[np.ndarray, "n dim"], references: Sequence[StoredReference]
    ) -> range:
        """As :meth:`append`, of references whose memories are encoded when they are first read."""
        self.require_writable()
        number, start = self.next_number, self.rows
        self.add([self.store(None, None, embeddings, references, number=number, start=start)])
        return range(start, self.rows)

    def add(self, shards: Sequence[Shard]) -> None:
        """List stored shards in the header: its writer commits it, others only take note.

        Raises BankError when the bank was changed by another writer.
        """
        header = self._header
        for shard in shards:
            header = header.with_shard(shard)
        if self._generation is None:
            self._use(header)
        else:
            self._commit(header)

    def delete(self, *, rows: Iterable[SupportsIndex] = (), sources: Iterable[str] = ()) -> int:
        """Delete references, by row or by source; their number, without those deleted before.

        They are never read again, and other row numbers stay; :meth:`compact` gives back the room.
        Raises BankError for a row that the bank does not have.
        """
        self.require_writable()
        rows = [operator.index(row) for row in rows]
        for row in rows:
            if not 0 <= row < self.rows:
                raise BankError(f"bank {self.url} has no reference {row}; nothing was deleted")
        alive = self.alive()
        before = np.ones(self.rows, bool) if alive is None else alive
        sources, after = list(sources), before.copy()
        if sources:
            after &= ~self.rows_of(sources)
        after[np.array(rows, np.int64)] = False
        if (gone := int(before.sum() - after.sum())) > 0:
            self._commit(replace(self._header, deleted_file=self.store_deleted(after)))
        return gone

    def store_deleted(self, alive: Bool[np.ndarray, " rows"]) -> PlacedFile:
        """Write the list of deleted rows, which holds once the header names it."""
        return self._place("deleted", np.flatnonzero(~alive).astype("<i8").tobytes())

    def compact(self, *, shard_references: int = SHARD_REFERENCES) -> int:
        """Rewrite shards without deleted references; see :func:`jaxlab.memory.compact.compact`."""
        from jaxlab.memory.compact import compact

        return compact(self, shard_references=shard_references)

    def repair(self, **options: Any) -> RepairReport:
        """Make damaged shards again, or set them aside; see :func:`jaxlab.memory.repair.repair`."""
        from jaxlab.memory.repair import repair

        return repair(self, **options)

    def keep_index(self, content: bytes, index: IndexRecord) -> None:
        """Store an index of this bank's rows in place of the one it had."""
        self.require_writable()
        placed = self._place("index", content)
        self._take_over(replace(self._header, index_file=placed, index=index))

    def lack_the_same(self, other: BankReader) -> None:
        """Take over what was deleted or lost in another bank of the same rows."""
        deleted = other._header.deleted_file
        if deleted is not None:
            deleted = self._place("deleted", other._checked(deleted))
        self._commit(replace(self._header, deleted_file=deleted, lost=other._header.lost))

    def exchange(self, shards: Sequence[Shard], **changes: Any) -> None:
        """Commit another list of shards in one go, then delete what is no longer listed.

        The index goes with them when it is of other rows than are there then.
        """
        header = replace(self._header, shards=tuple(shards), **changes)
        if not header.index_fits():
            header = replace(header, index=None, index_file=None)
        self._take_over(header)

    def require_writable(self) -> None:
        """Raise BankError when opened for reading or changed by another writer."""
        if self._generation is None:
            raise self._not_open()
        if read_object(self._kvstore, HEADER_FILE, self.url).stamp.generation != self._generation:
            raise self._changed()

    def _not_open(self) -> BankError:
        return BankError(f"bank {self.url} is not open for writing; open it with write=True")

    def _changed(self) -> BankError:
        return BankError(
            f"bank {self.url} was changed by another writer; nothing was added: repeat"
            " the command (in Python open the bank again)"
        )

    def _take_over(self, header: Header) -> None:
        """Commit under a new writer's name, then delete what lay there before and is not listed.

        Every key holds the name of its writer. What was found before the commit is thus of former
        names, under which nothing can be committed any more: unlisted now, it is so for ever. What
        a later writer stores while this one deletes, is not among it.
        """
        folders, keys = self._rests(header)
        self._commit(replace(header, writer=_new_name()))
        # What cannot be deleted now goes when the bank is next opened for writing.
        with contextlib.suppress(BankError):
            for folder in folders:
                delete_folder(self._kvstore, folder, url=self.url)
            for key in keys:
                delete_object(self._kvstore, key, url=self.url)

    def _rests(self, header: Header) -> tuple[set[str], set[str]]:
        """Folders of shards, and keys, that lie there and that ``header`` does not list."""
        # Each memory of a cold shard is an object, and to list them all takes long.
        large = {each.name for each in header.shards if each.cold and each.count >= _LARGE}
        shards = list_folders(self._kvstore, "shards/", url=self.url, without=large)
        keys = {
            f"{folder}/{name}"
            for folder in ALONE
            for name in list_folders(self._kvstore, f"{folder}/", url=self.url)
        }
        listed = {key for _, key, _ in header.objects()}
        return {f"shards/{name}/" for name in shards - header.names}, keys - listed

    def _commit(self, header: Header) -> None:
        """Replace the header if it is still the one this bank knows."""
        expected, self._generation = self._generation, None  # until the outcome is certain
        if expected is None:
            raise self._not_open()
        stamp = self._write(HEADER_FILE, header.to_bytes(), if_equal=expected)
        if not stamp.generation:
            raise self._changed()
        self._use(header)
        self.generation = self._generation = stamp.generation


def _new_name() -> str:
    return secrets.token_hex(4)


def bank_exists(url: str | os.PathLike[str]) -> bool:
    """Whether a bank has been begun at ``url``; raises BankError when that cannot be read."""
    url = os.fspath(url)
    kvstore = open_kvstore(url, default_context())
    return read_object(kvstore, HEADER_FILE, url).state != "missing"
