"""Objects in the shards of a bank: arrays, texts, lone memories, each checked where it is read."""

import functools
import json
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Int

from jaxlab.errors import BankError, RewrittenError
from jaxlab.memory.header import (
    HEADER_FILE,
    BankSpec,
    Header,
    PlacedFile,
    Shard,
    StoredFile,
    cure_of,
)
from jaxlab.memory.objects import list_folders, read_object, reason
from jaxlab.memory.shards import SOURCES, is_lone, lone_key
from jaxlab.memory.verify import DAMAGED, MISSING, CheckedLone, Trouble, trouble_of

# An open array takes some 10 kB; to open one again costs the request of its zarr.json.
_OPEN_ARRAYS = 4096
_LONE_AT_ONCE = 64


class ShardAccess:
    """What lies in the shards of a bank.

    Every method raises BankError for what is damaged or cannot be read, and RewrittenError where
    the bank has given it up since it was opened here.
    """

    _header: Header

    def __init__(self, url: str, *, context: ts.Context, kvstore: Any) -> None:
        self.url = url
        self._context, self._kvstore = context, kvstore
        self._array = functools.lru_cache(_OPEN_ARRAYS)(self._open_array)

    @property
    def spec(self) -> BankSpec:
        """Shapes, dtype, identity and chunk grid of the bank."""
        return self._header.spec

    def object_of(self, shard: Shard, path: str) -> bytes:
        """One object of a shard as it lies there."""
        return self._finish_whole(shard, path, self._start_object(shard, path))

    def found_object_of(self, shard: Shard, path: str) -> bytes | None:
        """One object of a shard as it lies there, damaged or not; None where it is missing."""
        found = read_object(self._kvstore, shard.folder + path, self.url)
        return None if found.state == "missing" else found.value

    def array_of(self, shard: Shard, name: str) -> np.ndarray:
        """One array of a shard, whole."""
        return self._finish(shard, self._start(shard, name, slice(None)))

    def sources_of(self, shard: Shard) -> list[str]:
        """The sources of a shard."""
        return json.loads(self.object_of(shard, SOURCES))

    def encoded(self, shard: Shard) -> Int[np.ndarray, " n"]:
        """The rows, counted within a cold shard, whose memories are there."""
        folder = f"{shard.folder}{self.spec.stored_name}/c/"
        found = list_folders(self._kvstore, folder, url=self.url)
        # Nothing is known of anything else that lies there.
        rows = (int(name) for name in found if name.isdecimal())
        return np.array(sorted(row for row in rows if row < shard.count), np.int64)

    def check_lone(self, shard: Shard) -> CheckedLone:
        """The rows of a cold shard that are encoded; row, key and trouble of each bad memory."""
        rows, bad = self.encoded(shard), []
        for start in range(0, len(rows), _LONE_AT_ONCE):
            some = rows[start : start + _LONE_AT_ONCE].tolist()
            pending = [(row, self._start(shard, self.spec.stored_name, row)) for row in some]
            for row, future in pending:
                try:
                    self._finish_lone(shard, row, future)
                except BankError:
                    key = self._lone_key(shard, row)
                    trouble = trouble_of(self._kvstore, key, self._lone_damage)
                    # Else it can be read, or is gone, by now.
                    if trouble is not None and trouble.kind != MISSING:
                        bad.append((row, key, trouble))
        return rows, bad

    def _lone_damage(self, content: bytes) -> Trouble | None:
        return None if is_lone(content, self.spec) else Trouble(DAMAGED, "another checksum")

    def _lone_key(self, shard: Shard, row: int) -> str:
        """Where the memory of a row, counted within a cold shard, lies in the bank."""
        name, axes = self.spec.stored_name, 1 + len(self.spec.stored_shape)
        return shard.folder + lone_key(name, row, axes)

    def _open_array(self, folder: str, name: str, cold: bool) -> Any:
        spec = {
            "driver": "zarr3",
            # Shards never change, but for memories that are encoded one by one.
            "recheck_cached_data": True if cold else "open",
            "recheck_cached_metadata": "open",
            "fill_missing_data_reads": False,  # a lost file is an error, not zeros
        }
        base = self._kvstore / f"{folder}{name}/"
        return ts.open(spec, kvstore=base, context=self._context).result()

    def _start(self, shard: Shard, name: str, rows: Any) -> Any:
        try:
            cold = shard.cold and name == self.spec.stored_name
            return self._array(shard.folder, name, cold)[rows].read()
        except Exception as error:
            raise self._unreadable(shard, error) from error

    def _finish(self, shard: Shard, future: Any) -> Any:
        try:
            return future.result()
        except Exception as error:
            raise self._unreadable(shard, error) from error

    def _finish_lone(self, shard: Shard, row: int, future: Any) -> np.ndarray | None:
        """A memory of a cold shard; None when it has not been encoded."""
        try:
            return future.result()
        except Exception as error:
            if read_object(self._kvstore, self._lone_key(shard, row), self.url).state == "missing":
                return None
            raise self._unreadable(shard, error) from error

    def _start_object(self, shard: Shard, path: str, part: slice | None = None) -> Any:
        return self._kvstore.read(shard.folder + path, byte_range=part)

    def _finish_whole(self, shard: Shard, path: str, future: Any) -> bytes:
        content = self._finish_object(shard, future, path)
        if StoredFile.of(content) != shard.files[path]:
            raise self._unreadable(shard, ValueError(f"{path} is damaged: another SHA-256"))
        return content

    def _finish_object(self, shard: Shard, future: Any, name: str) -> bytes:
        found = self._finish(shard, future)
        if found.state == "missing":
            raise self._unreadable(shard, FileNotFoundError(f"{name} is missing"))
        return found.value

    def _checked(self, placed: PlacedFile) -> bytes:
        """An object that the header lists by itself."""
        found = read_object(self._kvstore, placed.key, self.url)
        if found.state == "missing" or StoredFile.of(found.value) != placed.file:
            raise BankError(
                f"bank {self.url}: {placed.key} is damaged or missing;"
                f" {cure_of(placed.key.split('/')[0])}"
            )
        return found.value

    def _unreadable(self, shard: Shard, error: Exception) -> BankError:
        now = self._header_now()
        if now is not None and shard not in now.shards:
            return self._rewritten()
        return BankError(
            f"bank {self.url}: shard {shard.name} cannot be read ({reason(error)});"
            " run `jaxlab memory verify` to see what is damaged"
        )

    def _header_now(self) -> Header | None:
        """The header that lies there by now; None where it cannot be read."""
        try:
            found = read_object(self._kvstore, HEADER_FILE, self.url)
            return None if found.state == "missing" else Header.from_bytes(found.value, url="")
        except BankError:
            return None

    def _rewritten(self) -> RewrittenError:
        return RewrittenError(
            f"bank {self.url} was rewritten meanwhile (compacted or repaired): open it again"
        )
