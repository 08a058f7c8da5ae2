"""The memory bank: references with their memories, on a disk or in an object store.

Layout, every object written through TensorStore::

    header.json                    what is in the bank; the commit point of every change
    embedder/embedder.npz          state of a fitted embedder
    shards/000000-WRITER/          the first shard, under a name that only its writer uses
        memories/                  zarr3 (n, layers, 2, kv heads, tokens kept, head dim)
        embeddings/                zarr3 (n, dim) float32
        kept/                      zarr3 (n,) int32
        references.jsonl           text, source and token count of each reference

A shard is written once, by one ``append``, and exists from the moment the header lists it. One
memory is one inner chunk of the zarr3 shard, with a checksum: it is read with one range request,
and a damaged one is an error. Whoever opened the bank for writing last is its writer; a former one
can add nothing more. Any number of readers, each of which sees the bank as it was when opened.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from jaxtyping import Float, Float32, Int, Int32, Shaped

from jaxlab.errors import BankError
from jaxlab.memory.embedders import STATE_FILE, Embedder, ModelEmbed, open_embedder
from jaxlab.memory.header import BankIdentity, BankSpec, Header, Shard, StoredFile
from jaxlab.memory.objects import (
    REFERENCES,
    default_context,
    delete_folder,
    encode_shard,
    list_folders,
    open_kvstore,
    read_object,
    reason,
    write_object,
)
from jaxlab.memory.verify import VerifyReport, verify_objects

__all__ = ["Bank", "BankIdentity", "BankSpec", "StoredMemories", "StoredReference", "VerifyReport"]

HEADER_FILE = "header.json"
_EMBEDDER = f"embedder/{STATE_FILE}"


@dataclass(frozen=True)
class StoredReference:
    """One reference as text: where it came from and how many tokens it has."""

    text: str
    source: str
    tokens: int


class StoredMemories(NamedTuple):
    """Memories in the order asked for, and how many of their token slots are valid."""

    memories: Shaped[np.ndarray, "*ids Lm 2 K m H"]
    kept: Int32[np.ndarray, "*ids"]


class Bank:
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
        self.url = url
        self._context, self._kvstore = context, kvstore
        self._header = header
        # Generation of header.json this bank may replace; None: opened for reading only.
        self._generation = generation
        self._arrays: dict[tuple[str, str], Any] = {}
        self._texts: dict[str, list[StoredReference]] = {}

    @classmethod
    def create(
        cls,
        url: str | os.PathLike[str],
        *,
        spec: BankSpec,
        embedder_state: bytes = b"",
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
        header = Header(spec=spec)
        if embedder_state:
            write_object(kvstore, _EMBEDDER, embedder_state, url=url)
            header = Header(spec=spec, embedder_file=StoredFile.of(embedder_state))
        bank = cls(
            url,
            context=context,
            kvstore=kvstore,
            header=header,
            generation=found.stamp.generation,
        )
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

    @property
    def spec(self) -> BankSpec:
        """Shapes, dtype, identity and chunk grid of the bank."""
        return self._header.spec

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards, in the order of their rows."""
        return self._header.shards

    def __len__(self) -> int:
        return self._header.count

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
        is what it was before. The shard is put together in host memory, so append some hundred
        references of a large model at a time.
        """
        self._require_writable()
        shard = self.store(
            memories, kept, embeddings, references, number=len(self.shards), start=len(self)
        )
        self.add([shard])
        return range(shard.start, shard.start + shard.count)

    def store(
        self,
        memories: Shaped[np.ndarray, "n Lm 2 K m H"],
        kept: Int[np.ndarray, " n"],
        embeddings: Float[np.ndarray, "n dim"],
        references: Sequence[StoredReference],
        *,
        number: int,
        start: int,
    ) -> Shard:
        """Write the objects of a shard, which is in the bank once its writer adds it.

        Several processes store shards of one bank at once, each its own ``number``. Raises as
        :meth:`append` does.
        """
        arrays = self._check(memories, kept, embeddings, references)
        name = f"{number:06d}-{self._header.writer}"
        objects = encode_shard(arrays, [asdict(reference) for reference in references])
        files = {path: StoredFile.of(content) for path, content in objects.items()}
        folder = f"shards/{name}/"
        try:
            for path, content in objects.items():
                write_object(self._kvstore, folder + path, content, url=self.url)
        except BaseException:
            with contextlib.suppress(BankError):
                delete_folder(self._kvstore, folder, url=self.url)
            raise
        return Shard(name=name, start=start, count=len(references), files=files)

    def add(self, shards: Sequence[Shard]) -> None:
        """List stored shards in the header: its writer commits it, others only take note.

        Raises BankError when the bank was changed by another writer.
        """
        header = self._header
        for shard in shards:
            header = header.with_shard(shard)
        if self._generation is None:
            self._header = header
        else:
            self._commit(header)

    def read(self, ids: Int[np.ndarray, "*ids"] | Sequence[int]) -> StoredMemories:
        """Memories by row number, read concurrently; a negative id gives zeros and kept 0.

        Raises BankError for an id past the end and for a shard that cannot be read.
        """
        ids = np.asarray(ids, np.int64)
        rows, place = np.unique(ids, return_inverse=True)
        if len(rows) and rows[-1] >= len(self):
            raise BankError(f"bank {self.url} has {len(self)} references; there is no {rows[-1]}")
        memories = np.zeros((len(rows), *self.spec.memory_shape), self.spec.numpy_dtype)
        kept = np.zeros(len(rows), np.int32)
        pending = []
        for shard in self.shards:
            first, last = np.searchsorted(rows, [shard.start, shard.start + shard.count])
            if last > first:
                inside = rows[first:last] - shard.start
                for name, out in (("memories", memories), ("kept", kept)):
                    future = self._start_read(shard, name, inside)
                    pending.append((shard, future, out[first:last]))
        for shard, future, out in pending:
            out[...] = self._finish_read(shard, future)
        return StoredMemories(memories[place.reshape(ids.shape)], kept[place.reshape(ids.shape)])

    def embeddings(self) -> Float32[np.ndarray, "rows dim"]:
        """The embeddings of all references, in row order."""
        out = np.zeros((len(self), self.spec.embedding_dim), np.float32)
        pending = [(s, self._start_read(s, "embeddings", slice(None))) for s in self.shards]
        for shard, future in pending:
            out[shard.start : shard.start + shard.count] = self._finish_read(shard, future)
        return out

    def reference(self, row: int) -> StoredReference:
        """The text of one reference."""
        return self.references([row])[0]

    def references(self, ids: Sequence[int]) -> list[StoredReference]:
        """The texts of references; raises BankError for an id that is not in the bank.

        Texts of a shard stay in memory once read: they are small beside the embeddings.
        """
        starts = np.array([shard.start for shard in self.shards])
        out = []
        for row in ids:
            if not 0 <= row < len(self):
                raise BankError(f"bank {self.url} has {len(self)} references; there is no {row}")
            shard = self.shards[int(np.searchsorted(starts, row, side="right")) - 1]
            out.append(self._shard_texts(shard)[row - shard.start])
        return out

    def embedder(self, *, model_embed: ModelEmbed | None = None) -> Embedder:
        """The embedder the bank was written with; raises BankError when its state is damaged."""
        record, state = self._header.embedder_file, None
        if record is not None:
            found = read_object(self._kvstore, _EMBEDDER, self.url)
            state = found.value
            if found.state == "missing" or StoredFile.of(state) != record:
                raise BankError(
                    f"bank {self.url}: {_EMBEDDER} is damaged or missing; restore it from a copy,"
                    " or write the bank again"
                )
        return open_embedder(self.spec.embedder, state=state, model_embed=model_embed)

    def stats(self) -> dict[str, Any]:
        """Counts, sizes and settings, ready to print or to store as JSON."""
        sizes = [file.bytes for shard in self.shards for file in shard.files.values()]
        return {
            "url": self.url,
            "references": len(self),
            "shards": len(self.shards),
            "bytes": sum(sizes),
            "bytes_per_reference": self.spec.bytes_per_reference,
            **asdict(self.spec),
        }

    def verify(self) -> VerifyReport:
        """Read every object back and compare size and SHA-256; damage is reported, not raised."""
        return verify_objects(self._kvstore, self._header, embedder_key=_EMBEDDER)

    def _check(self, memories: Any, kept: Any, embeddings: Any, references: Any) -> dict[str, Any]:
        """The arrays of a shard, once they are known to fit the bank."""
        spec, n = self.spec, len(references)
        arrays = {
            "memories": np.ascontiguousarray(memories),
            "embeddings": np.ascontiguousarray(embeddings, np.float32),
            "kept": np.ascontiguousarray(kept, np.int32),
        }
        shapes = {
            "memories": (n, *spec.memory_shape),
            "embeddings": (n, spec.embedding_dim),
            "kept": (n,),
        }
        if not n:
            raise BankError("nothing to append: the list of references is empty")
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                raise BankError(
                    f"append to {self.url}: {name} have shape {arrays[name].shape},"
                    f" expected {shape}"
                )
        if arrays["memories"].dtype != spec.numpy_dtype:
            raise BankError(
                f"append to {self.url}: memories are {arrays['memories'].dtype}, the bank holds"
                f" {spec.dtype}"
            )
        if arrays["kept"].min() < 0 or arrays["kept"].max() > spec.memory_shape[3]:
            raise BankError(
                f"append to {self.url}: kept must lie between 0 and {spec.memory_shape[3]}"
            )
        if not np.isfinite(arrays["embeddings"]).all():
            raise BankError(f"append to {self.url}: an embedding is not finite")
        return arrays

    def _require_writable(self) -> None:
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
        stamp = write_object(
            self._kvstore, HEADER_FILE, header.to_bytes(), url=self.url, if_equal=expected
        )
        if not stamp.generation:
            raise self._changed()
        self._header, self._generation = header, stamp.generation

    def _sweep(self) -> None:
        """Delete shards that no header lists: a writer was killed before its commit."""
        known = {shard.name for shard in self.shards}
        for name in list_folders(self._kvstore, "shards/", url=self.url) - known:
            delete_folder(self._kvstore, f"shards/{name}/", url=self.url)

    def _start_read(self, shard: Shard, name: str, rows: Any) -> Any:
        try:
            key = (shard.name, name)
            if key not in self._arrays:
                base = self._kvstore / f"shards/{shard.name}/{name}/"
                spec = {
                    "driver": "zarr3",
                    "recheck_cached_data": "open",  # shards never change
                    "fill_missing_data_reads": False,  # a lost file is an error, not zeros
                }
                self._arrays[key] = ts.open(spec, kvstore=base, context=self._context).result()
            return self._arrays[key][rows].read()
        except Exception as error:
            raise self._unreadable(shard, error) from error

    def _finish_read(self, shard: Shard, future: Any) -> np.ndarray:
        try:
            return future.result()
        except Exception as error:
            raise self._unreadable(shard, error) from error

    def _unreadable(self, shard: Shard, error: Exception) -> BankError:
        return BankError(
            f"bank {self.url}: shard {shard.name} cannot be read ({reason(error)});"
            " run `jaxlab memory verify` to see what is damaged"
        )

    def _shard_texts(self, shard: Shard) -> list[StoredReference]:
        if shard.name not in self._texts:
            try:
                found = self._kvstore.read(f"shards/{shard.name}/{REFERENCES}").result()
                if found.state == "missing":
                    raise FileNotFoundError(f"{REFERENCES} is missing")
                if StoredFile.of(found.value) != shard.files[REFERENCES]:
                    raise ValueError(f"{REFERENCES} is damaged: another SHA-256")
                lines = found.value.decode().splitlines()
                texts = [StoredReference(**json.loads(line)) for line in lines]
            except Exception as error:
                raise self._unreadable(shard, error) from error
            self._texts[shard.name] = texts
        return self._texts[shard.name]
