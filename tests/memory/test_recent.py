"""Laws of the memories kept in RAM: what is read never differs, and the limit holds."""

import threading

import numpy as np
import pytest

from jaxlab.memory.recent import RecentMemories
from tests.memory.stored import bits, written

COUNT = 9


@pytest.fixture
def bank(tmp_path):
    return written(tmp_path, counts=(4, 5))


@pytest.fixture
def reads(bank, monkeypatch):
    """The rows that came from the bank."""
    seen, read = [], type(bank).read

    def spied(self, ids):
        seen.append([row for row in ids.tolist() if row >= 0])
        return read(self, ids)

    monkeypatch.setattr(type(bank), "read", spied)
    return seen


def test_whatever_was_read_before_the_same_comes(bank):
    whole = bank.read(np.arange(COUNT))
    one = whole.memories[0].nbytes
    rng = np.random.default_rng(0)
    for limit in (0, one - 1, one, 3 * one, 100 * one):
        recent = RecentMemories(bank.read, limit)
        for _ in range(20):
            ids = rng.integers(-1, COUNT, (2, 3))
            found = recent.read(ids)
            valid = ids >= 0
            assert bits(found.memories[valid]) == bits(whole.memories[ids[valid]])
            np.testing.assert_array_equal(found.kept, np.where(valid, whole.kept[ids], 0))
            assert not found.memories[~valid].view(np.uint16).any()
            assert recent.bytes <= limit


def test_only_what_is_not_there_is_read_and_what_was_used_longest_ago_goes(bank, reads):
    one = bank.spec.bytes_per_reference
    recent = RecentMemories(bank.read, 3 * one)
    for ids, wanted in (
        ([0, 1, 2, 2], [0, 1, 2]),
        ([2, 0], []),
        ([3, -1], [3]),  # 1 goes: 2 and 0 were used later
        ([0, 2, 3], []),
        ([1], [1]),
    ):
        recent.read(np.array(ids))
        assert reads.pop() == wanted
    assert (recent.hits, recent.misses, recent.bytes) == (5, 6, 3 * one)


def test_without_room_everything_is_read_each_time(bank, reads):
    recent = RecentMemories(bank.read, 0)
    for _ in range(2):
        recent.read(np.array([5, 5, -1]))
    assert reads == [[5], [5]]
    assert (recent.hits, recent.misses, recent.bytes) == (0, 4, 0)


def test_what_comes_is_the_callers_own(bank):
    recent = RecentMemories(bank.read, 1 << 20)
    recent.read(np.array([1])).memories.view(np.uint16)[:] = 7
    again = recent.read(np.array([1]))
    assert bits(again.memories) == bits(bank.read([1]).memories)
    again.memories.view(np.uint16)[:] = 7
    assert bits(recent.read(np.array([1])).memories) == bits(bank.read([1]).memories)


def test_several_threads_read_one_bank(bank):
    whole, wrong = bank.read(np.arange(COUNT)), []
    recent = RecentMemories(bank.read, 4 * bank.spec.bytes_per_reference)

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(50):
            ids = rng.integers(0, COUNT, 4)
            if bits(recent.read(ids).memories) != bits(whole.memories[ids]):
                wrong.append(ids)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and recent.hits + recent.misses == 4 * 50 * 4
    assert recent.bytes == sum(m.nbytes for m, _ in recent._rows.values()) <= recent.limit
