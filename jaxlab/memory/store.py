"""The memory bank: references with their memories, on a disk or in an object store.

Layout, every object written through TensorStore::

    header.json                    what is in the bank; the commit point of every change
    deleted/                       numbers of the rows that were deleted
    embedder/embedder.npz          state of a fitted embedder
    codec/codec.faiss              the codec of a quantized bank
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
when it is first read. Whoever opened the bank for writing last is its writer; a former one
can add nothing more. Any number of readers, each of which sees the bank as it was when opened.
"""

import contextlib
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import numpy as np
import tensorstore as ts
from jaxtyping import Float, Int, Shaped

from jaxlab.errors import BankError
from jaxlab.memory.header import (
    CODEC_FILE,
    EMBEDDER_FILE,
    HEADER_FILE,
    BankIdentity,
    BankSpec,
    Header,
    IndexRecord,
    Shard,
    StoredFile,
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
        generation: bytes | None,
    ) -> None:
        super().__init__(url, context=context, kvstore=kvstore, header=header)
        # Generation of header.json this bank may replace; None: opened for reading only.
        self._generation = generation

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
        if bool(spec.codec) != bool(codec_state):
            raise BankError(f"bank {url}: a codec takes both its name and its state")
        states = {EMBEDDER_FILE: embedder_state, CODEC_FILE: codec_state}
        files = [StoredFile.of(state) if state else None for state in states.values()]
        header = Header(spec=spec, embedder_file=files[0], codec_file=files[1])
        bank = cls(
            url,
            context=context,
            kvstore=kvstore,
            header=header,
            generation=found.stamp.generation,
        )
        for key, state in states.items():
            if state:
                bank._write(key, state)
        bank._become_writer()
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
                f"no memory bank at {url}: header.json is missing; check the path, or write a bank"
            )
        header = Header.from_bytes(found.value, url=url)
        if identity is not None:
            header.spec.identity.require(identity, url=url)
        generation = found.stamp.generation if write else None
        bank = cls(url, context=context, kvstore=kvstore, header=header, generation=generation)
        if write:
            bank._become_writer()
            bank._sweep()
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
        rows = np.fromiter(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.rows:
            raise BankError(f"bank {self.url} has no reference {rows.max()}; nothing was deleted")
        alive = self.alive()
        before = np.ones(self.rows, bool) if alive is None else alive
        sources, after = list(sources), before.copy()
        if sources:
            after &= ~self.rows_of(sources)
        after[rows] = False
        if (gone := int(before.sum() - after.sum())) > 0:
            content = np.flatnonzero(~after).astype("<i8").tobytes()
            header = replace(self._header, deleted_file=StoredFile.of(content))
            self._write(header.deleted_key, content)
            self._commit(header)
        return gone

    def compact(self, *, shard_references: int = SHARD_REFERENCES) -> int:
        """Rewrite shards without deleted references; see :func:`jaxlab.memory.upkeep.compact`."""
        from jaxlab.memory import upkeep

        return upkeep.compact(self, shard_references=shard_references)

    def repair(self, **options: Any) -> RepairReport:
        """Make damaged shards again, or set them aside; see :func:`jaxlab.memory.upkeep.repair`."""
        from jaxlab.memory import upkeep

        return upkeep.repair(self, **options)

    def keep_index(self, content: bytes, index: IndexRecord) -> None:
        """Store an index of this bank's rows in place of the one it had."""
        self.require_writable()
        header = replace(self._header, index_file=StoredFile.of(content), index=index)
        self._write(header.index_key, content)
        self._commit(header)
        with contextlib.suppress(BankError):
            self._sweep()

    def lack_the_same(self, other: BankReader) -> None:
        """Take over what was deleted or lost in another bank of the same rows."""
        header = replace(
            self._header, deleted_file=other._header.deleted_file, lost=other._header.lost
        )
        if header.deleted_file is not None:
            content = other._checked(header.deleted_key, header.deleted_file)
            self._write(header.deleted_key, content)
        self._commit(header)

    def exchange(self, shards: Sequence[Shard], **changes: Any) -> None:
        """Commit another list of shards in one go, then delete what is no longer listed."""
        self._commit(replace(self._header, shards=tuple(shards), **changes))
        # What cannot be deleted now goes when the bank is next opened for writing.
        with contextlib.suppress(BankError):
            self._sweep()

    def require_writable(self) -> None:
        """Raise BankError when opened for reading or changed by another writer."""
        if self._generation is None:
            raise BankError(f"bank {self.url} is not open for writing; open it with write=True")
        if read_object(self._kvstore, HEADER_FILE, self.url).stamp.generation != self._generation:
            raise self._changed()

    def _changed(self) -> BankError:
        return BankError(
            f"bank {self.url} was changed by another writer; nothing was added: open it again"
        )

    def _become_writer(self) -> None:
        """Put a new name into the header: the commit of any former writer then fails."""
        self._commit(replace(self._header, writer=secrets.token_hex(4)))

    def _commit(self, header: Header) -> None:
        """Replace the header if it is still the one this bank knows."""
        expected, self._generation = self._generation, None  # until the outcome is certain
        stamp = self._write(HEADER_FILE, header.to_bytes(), if_equal=expected)
        if not stamp.generation:
            raise self._changed()
        self._use(header)
        self._generation = stamp.generation

    def _sweep(self) -> None:
        """Delete what the header does not list: rests of killed writers, and what was replaced."""
        for name in list_folders(self._kvstore, "shards/", url=self.url) - self._header.names:
            delete_folder(self._kvstore, f"shards/{name}/", url=self.url)
        listed = {key for _, key, _ in self._header.objects()}
        for folder in ("deleted/", "index/"):
            for name in list_folders(self._kvstore, folder, url=self.url):
                if folder + name not in listed:
                    delete_object(self._kvstore, folder + name, url=self.url)


def bank_exists(url: str | os.PathLike[str]) -> bool:
    """Whether a bank has been begun at ``url``; raises BankError when that cannot be read."""
    url = os.fspath(url)
    kvstore = open_kvstore(url, default_context())
    return read_object(kvstore, HEADER_FILE, url).state != "missing"
