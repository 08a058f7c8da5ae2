"""Writing the objects of a memory bank: the shards, before the header lists them."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from jaxlab.errors import BankError
from jaxlab.memory.header import PlacedFile, Shard, StoredFile
from jaxlab.memory.objects import delete_folder, delete_object, write_object
from jaxlab.memory.reading import BankReader
from jaxlab.memory.shards import (
    StoredReference,
    encode_array,
    encode_cold,
    encode_lone,
    encode_shard,
    shard_arrays,
)


class ShardWriter(BankReader):
    """Writes shards that are in the bank once its header lists them, which is left to ``Bank``."""

    def store(
        self,
        memories: Shaped[np.ndarray, "n Lm 2 K m H"] | None,
        kept: Int[np.ndarray, " n"] | None,
        embeddings: Float[np.ndarray, "n dim"],
        references: Sequence[StoredReference],
        *,
        number: int,
        start: int,
        cold: Bool[np.ndarray, " n"] | None = None,
    ) -> Shard:
        """Write the objects of a shard, which is in the bank once its writer adds it.

        None for ``memories`` makes a cold shard, and so does ``cold``: it says which of them are
        not encoded. None for ``kept``: every token, as many as a memory has. Several processes
        store shards of one bank at once, each its own ``number``. Raises as :meth:`append` does.
        """
        spec, count = self.spec, len(references)
        if kept is None:
            tokens = [reference.tokens for reference in references]
            kept = np.minimum(np.array(tokens, np.int32), spec.memory_shape[3])
        if memories is None:
            cold = np.ones(count, bool)
            memories = np.broadcast_to(spec.stored_dtype.type(0), (count, *spec.stored_shape))
        arrays = shard_arrays(
            spec, self.as_stored(np.asarray(memories)), kept, embeddings, count, url=self.url
        )
        if cold is None:
            return self._put(encode_shard(arrays, references), number, start, count)
        lone = encode_cold(spec.stored_name, arrays.pop(spec.stored_name), cold)
        return self._put(
            encode_shard(arrays, references), number, start, count, cold=True, lone=lone
        )

    def warm(
        self, rows: Int[np.ndarray, " n"], memories: Shaped[np.ndarray, "n Lm 2 K m stored"]
    ) -> None:
        """Store the memories of cold references, each at once or not at all.

        For readers, too, and for several at once: model and text decide what is stored. Rows that
        lie in no cold shard are left as they are.
        """
        stored = self.as_stored(np.asarray(memories))
        wanted = (len(rows), *self.spec.stored_shape)
        if stored.shape != wanted or stored.dtype != self.spec.stored_dtype:
            raise BankError(
                f"warm {self.url}: memories are {stored.dtype} of shape {stored.shape}, expected"
                f" {self.spec.stored_dtype} of shape {wanted}"
            )
        self._require_living(np.asarray(rows, np.int64))
        order = np.argsort(rows, kind="stable")
        for shard, inside, part in self._by_shard(np.asarray(rows, np.int64)[order]):
            if not shard.cold:
                continue
            for row, place in zip(inside.tolist(), order[part], strict=True):
                content = encode_lone(stored[place])
                self._write(self._lone_key(shard, row), content)

    def store_copy(
        self,
        source: BankReader,
        shard: Shard,
        memories: Shaped[np.ndarray, "n Lm 2 K m stored"],
    ) -> Shard:
        """Write a shard of another bank with other ``memories`` and the rest bit for bit."""
        old, new = f"{source.spec.stored_name}/", self.spec.stored_name
        same = {path for path in shard.files if not path.startswith(old)}
        objects = {path: source.object_of(shard, path) for path in same}
        objects |= encode_array(new, self.as_stored(memories))
        return self._put(objects, self.next_number, shard.start, shard.count)

    def forget(self, shard: Shard, paths: Iterable[str]) -> None:
        """Delete memories of a cold shard, which are encoded again when they are next read."""
        for path in paths:
            delete_object(self._kvstore, shard.folder + path, url=self.url)

    def _put(
        self,
        objects: Mapping[str, bytes],
        number: int,
        start: int,
        count: int,
        *,
        cold: bool = False,
        lone: Mapping[str, bytes] = MappingProxyType({}),
    ) -> Shard:
        """Write the objects of a shard, or none; of ``lone`` no memory is listed in the header."""
        listed = {**objects, **{path: each for path, each in lone.items() if "/c/" not in path}}
        files = {path: StoredFile.of(content) for path, content in listed.items()}
        name = f"{number:06d}-{self._header.writer}"
        shard = Shard(name=name, start=start, count=count, files=files, cold=cold)
        try:
            for path, content in {**objects, **lone}.items():
                self._write(shard.folder + path, content)
        except BaseException:
            with contextlib.suppress(BankError):
                delete_folder(self._kvstore, shard.folder, url=self.url)
            raise
        return shard

    def as_stored(
        self, memories: Shaped[np.ndarray, "n Lm 2 K m H"]
    ) -> Shaped[np.ndarray, "n Lm 2 K m stored"]:
        """Memories, or the codes of them in a quantized bank, which may be given already."""
        whole = memories.shape[1:] == self.spec.memory_shape
        if self.codec is not None and whole and memories.dtype != np.uint8:
            memories = self.codec.encode(memories.astype(np.float32))
        return np.ascontiguousarray(memories)

    def _place(self, folder: str, content: bytes) -> PlacedFile:
        """Write an object that the header is to list by itself."""
        file = StoredFile.of(content)
        placed = PlacedFile(f"{folder}/{file.sha256[:16]}-{self._header.writer}", file)
        self._write(placed.key, content)
        return placed

    def _write(self, key: str, content: bytes, *, if_equal: bytes | None = None) -> Any:
        """Write one object at once or not at all; every byte of a bank goes through here."""
        return write_object(self._kvstore, key, content, url=self.url, if_equal=if_equal)
