"""Laws of writing a bank: whole commits or none, killed writers, full disks, two writers."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jaxlab.errors import BankError
from jaxlab.memory import objects, writing
from jaxlab.memory.store import Bank
from tests.memory.stored import bits, contents, files_of, written


@pytest.mark.parametrize("when", range(1, 14))
def test_an_append_that_fails_at_any_write_leaves_the_bank_as_it_was(tmp_path, monkeypatch, when):
    bank = written(tmp_path)
    before, header = files_of(tmp_path), (tmp_path / "header.json").read_bytes()
    calls = []

    def full_disk(kvstore, key, content, **options):
        calls.append(key)
        if len(calls) == when:
            raise BankError(f"cannot write {key} (No space left on device)")
        return objects.write_object(kvstore, key, content, **options)

    monkeypatch.setattr(writing, "write_object", full_disk)
    with pytest.raises(BankError, match="No space left"):
        bank.append(*contents(2, seed=5))
    assert len(calls) == when and (calls[-1] == "header.json") == (when == 13)
    monkeypatch.undo()
    assert (tmp_path / "header.json").read_bytes() == header and len(bank) == 5
    again = Bank.open(tmp_path, write=True)
    assert files_of(tmp_path) == before and again.verify().ok
    assert again.append(*contents(2, seed=5)) == range(5, 7)


CHILD = """
    import os, resource, signal, sys
    import numpy as np
    from jaxlab.errors import BankError
    from jaxlab.memory import store, writing
    from tests.memory.stored import contents

    bank = store.Bank.open(sys.argv[1], write=True)
"""


def run_child(tmp_path: Path, body: str) -> subprocess.CompletedProcess:
    code = textwrap.dedent(CHILD) + textwrap.dedent(body)
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_writer_killed_before_its_commit_leaves_what_was_committed(tmp_path):
    written(tmp_path)
    before = files_of(tmp_path / "shards")
    child = run_child(
        tmp_path,
        """
        write = writing.write_object
        def dying(kvstore, key, content, **options):
            if key == "header.json":
                os._exit(9)
            return write(kvstore, key, content, **options)
        writing.write_object = dying
        bank.append(*contents(4, seed=7))
        """,
    )
    assert child.returncode == 9, child.stderr
    assert list(tmp_path.glob("shards/000002-*/references.jsonl"))
    assert len(Bank.open(tmp_path)) == 5 and Bank.open(tmp_path).verify().ok

    bank = Bank.open(tmp_path, write=True)
    assert files_of(tmp_path / "shards") == before
    fresh = contents(2, seed=8)
    assert bank.append(*fresh) == range(5, 7)
    bank = Bank.open(tmp_path)
    assert bits(bank.read([5, 6]).memories) == bits(fresh[0])
    assert [(s.start, s.count) for s in bank.shards] == [(0, 3), (3, 2), (5, 2)]


def test_a_file_that_the_system_refuses_to_grow_is_one_clear_error(tmp_path):
    written(tmp_path)
    before = files_of(tmp_path / "shards")
    child = run_child(
        tmp_path,
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            bank.append(*contents(400, seed=7))
        except BankError as error:
            print(f"error: {error}")
        print(len(bank), len(store.Bank.open(sys.argv[1])))
        """,
    )
    message, lengths = child.stdout.splitlines()
    assert re.search(r"cannot write shards/000002-\w+/memories", message)
    assert "File too large" in message
    assert "make room" in message and lengths == "5 5", child.stderr
    assert Bank.open(tmp_path).verify().ok
    Bank.open(tmp_path, write=True)
    assert files_of(tmp_path / "shards") == before


def test_of_two_writers_the_former_is_told_and_nothing_is_lost(tmp_path):
    former = written(tmp_path)
    latter = Bank.open(tmp_path, write=True)
    with pytest.raises(BankError, match="changed by another writer"):
        former.append(*contents(3, seed=6))
    latter.append(*contents(2, seed=5))
    bank = Bank.open(tmp_path)
    assert len(bank) == 7 and bank.verify().ok
    assert bits(bank.read([5, 6]).memories) == bits(contents(2, seed=5)[0])


@pytest.mark.parametrize("adds", [False, True])
def test_a_writer_that_comes_while_another_writes_takes_nothing_from_its_own(
    tmp_path, monkeypatch, adds
):
    former, latter = written(tmp_path), []
    commit = former._commit

    def late(header):
        # The shard of the former writer is on disk, its header is not.
        latter.append(Bank.open(tmp_path, write=True))
        if adds:
            latter[0].append(*contents(2, seed=5))
        commit(header)

    monkeypatch.setattr(former, "_commit", late)
    with pytest.raises(BankError, match="changed by another writer"):
        former.append(*contents(3, seed=6))
    latter[0].append(*contents(4, seed=7))
    bank = Bank.open(tmp_path)
    assert [shard.count for shard in bank.shards] == [3, 2, *[2] * adds, 4] and bank.verify().ok
    assert bits(bank.read(range(len(bank) - 4, len(bank))).memories) == bits(contents(4, seed=7)[0])
