"""Memories read lately, kept in RAM as they are stored."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from jaxlab.memory.store import StoredMemories


class RecentMemories:
    """Keeps what ``read`` gave last: ``limit`` bytes of it at most, 0 keeps nothing.

    ``read`` is like :meth:`Bank.read`. Safe to use from several threads.
    """

    def __init__(self, read: Callable[[np.ndarray], StoredMemories], limit: int):
        self._read, self.limit = read, limit
        self._rows: OrderedDict[int, tuple[np.ndarray, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = self.hits = self.misses = 0

    def read(self, ids: Int[np.ndarray, "*ids"]) -> StoredMemories:
        """As the function given; each id counts as one hit or miss, a negative one as neither."""
        rows, place = np.unique(ids, return_inverse=True)
        counts = np.bincount(place.ravel(), minlength=len(rows))
        with self._lock:
            held = {row: self._rows[row] for row in rows.tolist() if row in self._rows}
            for row in held:
                self._rows.move_to_end(row)
        absent = np.array([row not in held for row in rows.tolist()], bool)
        found = self._read(np.where(absent, rows, -1))
        for at in np.flatnonzero(~absent):
            found.memories[at], found.kept[at] = held[int(rows[at])]
        with self._lock:
            self.misses += int(counts[absent & (rows >= 0)].sum())
            self.hits += int(counts[~absent].sum())
            for at in np.flatnonzero(absent & (rows >= 0)):
                self._keep(int(rows[at]), found.memories[at], int(found.kept[at]))
        place = place.reshape(ids.shape)
        return StoredMemories(found.memories[place], found.kept[place], found.cold[place])

    def _keep(self, row: int, memory: np.ndarray, kept: int) -> None:
        if row in self._rows or memory.nbytes > self.limit:
            return  # another thread was faster, or it would push out everything for nothing
        # A copy: a row of what was read together would keep all of it.
        self._rows[row] = memory.copy(), kept
        self.bytes += memory.nbytes
        while self.bytes > self.limit:
            _, (old, _) = self._rows.popitem(last=False)
            self.bytes -= old.nbytes
