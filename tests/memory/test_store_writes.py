"""Laws of writing a bank: whole commits or none, killed writers, full disks, two writers."""

import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxlab.errors import BankError
from jaxlab.memory import objects, store, writing
from jaxlab.memory.store import Bank
from tests.memory.stored import SPEC, bits, contents, files_of, written


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


STEPS = ["list_folders", "write_object", "delete_folder", "delete_object", "read_object"]


def interrupted(patch, name, nth, act) -> list:
    """Run ``act`` before the nth call of a function of the store; what it gave, once it ran."""
    module = writing if name == "write_object" else store
    real, calls, done = getattr(module, name), [], []

    def late(*given, **options):
        calls.append(name)
        if len(calls) == nth and not done:
            done.append(None)  # what it calls itself is not interrupted
            done[0] = act()
        return real(*given, **options)

    patch.setattr(module, name, late)
    return done


def told_all(bank: Bank) -> list[tuple]:
    alive = [row for row in range(bank.rows) if bank.alive() is None or bank.alive()[row]]
    memories = bank.read(alive).memories
    return [(bits(m), text) for m, text in zip(memories, bank.references(alive), strict=True)]


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("work", ["open", "compact", "keep_index"])
def test_a_writer_that_comes_at_any_step_of_clearing_keeps_what_it_commits(
    tmp_path, monkeypatch, work, step, nth
):
    """Whatever another writer does between two steps: all that it committed is there."""
    bank = written(tmp_path, counts=(3, 2, 2))
    bank.delete(rows=[1])
    (tmp_path / "shards/000003-0ther").mkdir()
    (tmp_path / "shards/000003-0ther/sources.json").write_text("the rest of a killed writer")

    def other():
        latter = Bank.open(tmp_path, write=True)
        latter.append(*contents(2, seed=5))
        latter.delete(rows=[0])
        latter.keep_index(b"an index of the other", record())
        return told_all(latter)

    with monkeypatch.context() as patch:
        done = interrupted(patch, step, nth, other)
        try:
            if work == "open":
                Bank.open(tmp_path, write=True)
            elif work == "compact":
                bank.compact(shard_references=4)
            else:
                bank.keep_index(b"an index", record())
        except BankError as error:
            assert "changed by another writer" in str(error)
    after = Bank.open(tmp_path)
    assert after.verify().ok
    if done:
        assert told_all(after) == done[0]
    Bank.open(tmp_path, write=True)
    assert Bank.open(tmp_path).verify().ok
    assert not files_of(tmp_path / "shards/000003-0ther")


def test_what_lies_in_large_cold_shards_is_not_listed_and_rests_between_them_go(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(store, "_LARGE", 2)
    bank = Bank.create(tmp_path, spec=SPEC)
    for seed, n in enumerate((3, 1, 2, 2, 4)):
        memories, _, embeddings, references = contents(n, seed=seed)
        rows = np.array(bank.append_cold(embeddings, references))
        bank.warm(rows, memories)
    before, told = files_of(tmp_path), told_all(bank)
    for name in ("000000-", "000001-zzzzzzzz", "000002-", "000003-zzzzzzzz", "000004-zzzzzzzz"):
        (tmp_path / "shards" / name).mkdir()
        (tmp_path / "shards" / name / "kept").write_bytes(b"a rest")
    large = {shard.name for shard in bank.shards if shard.count > 1}
    kvstore, keys = bank._kvstore, []

    class Told:
        def list(self, part):
            future = kvstore.list(part)
            keys.extend(future.result())
            return future

    everything = objects.list_folders(kvstore, "shards/", url="")
    found = objects.list_folders(Told(), "shards/", url="", without=large)
    assert found == everything - large and len(everything) == 10
    assert not [key for key in keys if key.decode().split("/")[1] in large]
    after = Bank.open(tmp_path, write=True)
    assert files_of(tmp_path) == before and told_all(after) == told and after.verify().ok


def record():
    return store.IndexRecord("IVF16,SQ8", 5, 1, 1.0, "0" * 64)


def test_a_name_that_was_given_up_is_never_used_again(tmp_path):
    """A reader may still store a memory in a shard that was compacted away."""
    memories, _, embeddings, references = contents(4)
    bank = Bank.create(tmp_path, spec=SPEC)
    bank.append_cold(embeddings[:2], references[:2])
    reader = Bank.open(tmp_path)
    bank.delete(rows=[0, 1])
    bank.compact()
    reader.warm(np.arange(2), memories[:2])
    bank.append_cold(embeddings[2:], references[2:])
    assert Bank.open(tmp_path).cold_rows().tolist() == [0, 1]


@pytest.mark.parametrize("nth", range(1, 6))
@pytest.mark.parametrize("step", ["read_object", "write_object"])
def test_who_loses_the_race_to_make_a_bank_takes_nothing_from_the_winner(
    tmp_path, monkeypatch, step, nth
):
    codec = replace(SPEC, codec="OPQ2_4,Residual2x2,PQ2x2")

    def make(name: bytes) -> Bank:
        states = {"embedder_state": name + b" embedder", "codec_state": name + b" codec"}
        return Bank.create(tmp_path, spec=codec, **states)

    with monkeypatch.context() as patch:
        done = interrupted(patch, step, nth, lambda: make(b"winner"))
        try:
            make(b"loser")
        except BankError as error:
            assert re.search("changed by another writer|there is a bank", str(error))
    for bank in (Bank.open(tmp_path), Bank.open(tmp_path, write=True)):
        assert bank.verify().ok
        assert bank.embedder_state() == (b"winner embedder" if done else b"loser embedder")
    assert len(files_of(tmp_path)) == 3  # of the loser nothing is left


def test_a_bank_of_version_2_is_read_and_written_on(tmp_path):
    """Its objects have fixed keys: embedder.npz, codec.faiss, and the sum alone of a list."""
    bank = Bank.create(tmp_path, spec=SPEC, embedder_state=b"the embedder")
    for seed in (0, 1):
        bank.append(*contents(3, seed=seed))
    bank.delete(rows=[1])
    bank.keep_index(b"the index", record())
    before, header = told_all(bank), json.loads((tmp_path / "header.json").read_bytes())
    del header["checksum"]
    for name in ("embedder", "deleted", "index"):
        placed = header[f"{name}_file"]
        fixed = "embedder.npz" if name == "embedder" else placed["file"]["sha256"][:16]
        (tmp_path / placed["key"]).rename(tmp_path / name / fixed)
        header[f"{name}_file"] = placed["file"]
    header["version"] = 2
    checksum = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    (tmp_path / "header.json").write_text(json.dumps({**header, "checksum": checksum}))
    for each in (Bank.open(tmp_path), Bank.open(tmp_path, write=True), Bank.open(tmp_path)):
        assert told_all(each) == before and each.verify().ok
        assert each.embedder_state() == b"the embedder"
    each = Bank.open(tmp_path, write=True)
    each.delete(rows=[0])
    Bank.open(tmp_path, write=True).compact()
    assert told_all(Bank.open(tmp_path)) == before[1:] and Bank.open(tmp_path).verify().ok
    assert not files_of(tmp_path / "deleted")


def test_no_bank_is_begun_where_the_shards_of_another_lie_without_their_header(tmp_path):
    bank = written(tmp_path)
    before = told_all(bank)
    (tmp_path / "header.json").rename(tmp_path.parent / "away.json")
    files = files_of(tmp_path)
    with pytest.raises(BankError, match="shards of a bank whose header.json is missing: restore"):
        Bank.create(tmp_path, spec=SPEC)
    assert files_of(tmp_path) == files
    (tmp_path.parent / "away.json").rename(tmp_path / "header.json")
    assert told_all(Bank.open(tmp_path)) == before
