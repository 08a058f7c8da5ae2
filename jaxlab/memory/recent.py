"""Memories read lately, kept in RAM as they are stored."""

import threading
from collections import OrderedDict

import numpy as np
from jaxtyping import Int

from jaxlab.memory.store import Bank, StoredMemories


class RecentMemories:
    """Reads a bank, and keeps what was read last: ``limit`` bytes of it at most, 0 keeps nothing.

    Safe to use from several threads.
    """

    def __init__(self, bank: Bank, limit: int):
        self._bank, self.limit = bank, limit
        self._rows: OrderedDict[int, tuple[np.ndarray, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = self.hits = self.misses = 0

    def read(self, ids: Int[np.ndarray, "*ids"]) -> StoredMemories:
        """As :meth:`Bank.read`; each id counts as one hit or miss, a negative one as neither."""
        if not self.limit:
            self.misses += int(np.count_nonzero(ids >= 0))
            return self._bank.read(ids)
        rows, place = np.unique(ids[ids >= 0], return_inverse=True)
        with self._lock:
            held = {row: self._rows[row] for row in rows.tolist() if row in self._rows}
            for row in held:
                self._rows.move_to_end(row)
        absent = np.array([row for row in rows.tolist() if row not in held], np.int64)
        found = self._bank.read(absent)
        pairs = zip(found.memories, found.kept.tolist(), strict=True)
        came = dict(zip(absent.tolist(), pairs, strict=True))
        with self._lock:
            missed = int(np.isin(ids, absent).sum())
            self.misses += missed
            self.hits += len(place) - missed
            for row, (memory, kept) in came.items():
                self._keep(row, memory, kept)
        memories = np.zeros((*ids.shape, *found.memories.shape[1:]), found.memories.dtype)
        kept = np.zeros(ids.shape, np.int32)
        for where in zip(*np.nonzero(ids >= 0), strict=True):
            row = int(ids[where])
            memories[where], kept[where] = held[row] if row in held else came[row]
        return StoredMemories(memories, kept)

    def _keep(self, row: int, memory: np.ndarray, kept: int) -> None:
        if row in self._rows or memory.nbytes > self.limit:
            return
        # A copy: a row of what was read together would keep all of it.
        self._rows[row] = memory.copy(), kept
        self.bytes += memory.nbytes
        while self.bytes > self.limit:
            _, (old, _) = self._rows.popitem(last=False)
            self.bytes -= old.nbytes
