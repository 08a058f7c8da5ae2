"""Giving back the room of deleted references."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxlab.memory.header import Shard
from jaxlab.memory.store import Bank


def compact(bank: Bank, *, shard_references: int) -> int:
    """Rewrite shards without deleted references; how many shards were written.

    Neighbours that are small, or cold, are put together in shards of ``shard_references``; a shard
    that is whole stays as it is. Rows are numbered anew, in the same order: citations of the bank
    are of no use afterwards, its index goes, and readers have to open it again. All happens in one
    commit: a bank whose writer was killed is what it was.
    """
    bank.require_writable()
    alive = bank.alive()
    alive = np.ones(bank.rows, bool) if alive is None else alive
    shards, start, number, written = [], 0, bank.next_number, 0
    for run in _runs(bank, alive, shard_references):
        if isinstance(run, Shard):
            made = [dataclasses.replace(run, start=start)]
        else:
            made = []
            for first in range(0, len(run), shard_references):
                rows = run[first : first + shard_references]
                made.append(_rewrite(bank, rows, number=number + written, start=start + first))
                written += 1
        shards += made
        start += sum(shard.count for shard in made)
    if written or bank.alive() is not None:
        bank.exchange(shards, lost=(), deleted_file=None)
    return written


def _runs(bank: Bank, alive: np.ndarray, size: int) -> Iterator[Shard | np.ndarray]:
    """In the order of rows: shards that stay, and rows of neighbours that are put together."""
    pending: list[Shard] = []

    def merged() -> Iterator[Shard | np.ndarray]:
        whole = len(pending) == 1 and _is_whole(bank, pending[0], alive)
        if whole:
            yield pending[0]
        elif pending:
            rows = [s.start + np.flatnonzero(alive[s.start : s.start + s.count]) for s in pending]
            yield np.concatenate(rows)
        pending.clear()

    for shard in bank.shards:
        if shard.count >= size and _is_whole(bank, shard, alive):
            yield from merged()
            yield shard
        else:
            pending.append(shard)
    yield from merged()


def _is_whole(bank: Bank, shard: Shard, alive: np.ndarray) -> bool:
    """Whether it gives nothing back to rewrite a shard alone."""
    if not alive[shard.start : shard.start + shard.count].all():
        return False
    # Of a cold one the memories are put together once all of them are there.
    return not shard.cold or bank.encoded(shard).size < shard.count


def _rewrite(bank: Bank, rows: np.ndarray, *, number: int, start: int) -> Shard:
    found = bank.read(rows)
    return bank.store(
        found.memories,
        found.kept,
        bank.embeddings_of(rows),
        bank.references(rows),
        number=number,
        start=start,
        cold=found.cold if found.cold.any() else None,
    )
