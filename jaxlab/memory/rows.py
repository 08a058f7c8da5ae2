"""Which rows a bank has, which of them live, and in which shard each lies."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Bool, Int

from jaxlab.errors import BankError
from jaxlab.memory.access import ShardAccess
from jaxlab.memory.header import Header, LostShard, Shard


class BankRows(ShardAccess):
    """The rows of a bank: their numbers count over all shards from 0."""

    def __init__(self, url: str, *, context: ts.Context, kvstore: Any, header: Header) -> None:
        super().__init__(url, context=context, kvstore=kvstore)
        self._use(header)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards, in the order of their rows."""
        return self._header.shards

    @property
    def rows(self) -> int:
        """Row numbers in use, 0 to ``rows - 1``; those of deleted references stay as they are."""
        return self._header.rows

    @property
    def next_number(self) -> int:
        """What the name of the next shard begins with."""
        return self._header.next_number

    def __len__(self) -> int:
        """Living references."""
        self.alive()  # raises where it is not known
        return self._count

    def alive(self) -> Bool[np.ndarray, " rows"] | None:
        """False at deleted rows; None when every row lives. Raises BankError when not known."""
        if isinstance(self._alive, BankError):
            raise self._alive
        return self._alive

    @property
    def lost(self) -> tuple[LostShard, ...]:
        """Shards that :meth:`repair` set aside; their rows count as deleted."""
        return self._header.lost

    def lacks_the_same(self, other: "BankRows") -> bool:
        """Whether the same rows were deleted or lost as in another bank."""
        return _living(self._header) == _living(other._header)

    def _use(self, header: Header) -> None:
        if getattr(self, "_header", None) is None or _living(self._header) != _living(header):
            # At once, not when asked for: a later writer clears away what was valid when opened.
            self._know(self._read_alive(header), header.rows)
        self._header = header
        self._starts = np.array([shard.start for shard in header.shards], np.int64)
        # The last is for rows before the first shard, whose owner is -1.
        self._stops = np.array([*(each.start + each.count for each in header.shards), 0], np.int64)

    def _know(self, alive: np.ndarray | BankError | None, rows: int) -> None:
        self._alive = alive
        # Once: a server is asked for it with every request, and the rows may be 1e8.
        self._count = int(alive.sum()) if isinstance(alive, np.ndarray) else rows

    def _read_alive(self, header: Header) -> np.ndarray | BankError | None:
        if header.deleted_file is None and not header.lost:
            return None
        alive = np.ones(header.rows, bool)
        for each in header.lost:
            alive[each.start : each.start + each.count] = False
        if header.deleted_file is not None:
            try:
                content = self._checked(header.deleted_file)
            except BankError as error:
                return error  # to look after a bank is possible all the same
            alive[np.frombuffer(content, "<i8")] = False
        return alive

    def _require_living(self, rows: Int[np.ndarray, " n"]) -> None:
        alive = self.alive()
        for row in rows[(rows < 0) | (rows >= self.rows)][:1]:
            raise BankError(f"bank {self.url} has {self.rows} references; there is no {row}")
        if alive is not None and not alive[rows].all():
            row = int(rows[~alive[rows]][0])
            raise BankError(f"bank {self.url}: reference {row} was deleted")

    def _by_shard(
        self, rows: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[Shard, Int[np.ndarray, " part"], slice]]:
        """Shards of rising ``rows``: each with its rows, counted within it, and their places."""
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for row in rows[rows >= self._stops[owner]][:1]:
            raise BankError(f"bank {self.url}: reference {row} lies in no shard")
        for number in np.unique(owner):
            first, last = np.searchsorted(owner, [number, number + 1])
            shard = self.shards[number]
            yield shard, rows[first:last] - shard.start, slice(first, last)


def _living(header: Header) -> tuple:
    # The content alone: in another bank the same list has another key.
    return header.rows, header.deleted_file and header.deleted_file.file, header.lost
