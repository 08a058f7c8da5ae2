"""Laws of what cannot be read now: neither lost nor damaged, and nothing is changed for it."""

import numpy as np
import pytest

from jaxlab.cli import main
from jaxlab.errors import BankError, RewrittenError
from jaxlab.memory.store import Bank
from tests.memory.stored import SPEC, contents, files_of, written


def lock(path) -> None:
    """A file that is there and that nobody, root neither, can open: a link to itself."""
    path.rename(path.with_name("aside"))
    path.symlink_to(path.name)


def unlock(path) -> None:
    path.unlink()
    path.with_name("aside").rename(path)


def all_of(folder) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in files_of(folder)}


def mixed_bank(folder) -> Bank:
    """Two shards, and a cold one with all of its memories, each a file."""
    bank = written(folder)
    memories, _, embeddings, references = contents(3, seed=3)
    bank.append_cold(embeddings, references)
    bank.warm(np.arange(5, 8), memories)
    return Bank.open(folder, write=True)


@pytest.mark.parametrize(
    "name", ["references.jsonl", "memories/zarr.json", "memories/c/1/0/0/0/0/0"]
)
def test_a_file_that_cannot_be_read_now_is_said_to_be_that_and_repair_waits_for_it(tmp_path, name):
    """Though a shard beside it is damaged, and could be made again."""
    bank = mixed_bank(tmp_path)
    path = tmp_path / bank.shards[2].folder / name
    (tmp_path / bank.shards[0].folder / "sources.json").write_bytes(b"[]")
    (tmp_path / bank.shards[2].folder / "memories/c/2/0/0/0/0/0").write_bytes(b"damaged")
    before = all_of(tmp_path)
    lock(path)
    found = bank.verify()
    assert found.unreadable == (bank.shards[2].name,) and not found.ok
    assert bank.shards[0].name in found.damaged
    with pytest.raises(BankError, match=r"unreadable .*symbolic links.*mend the access, then rep"):
        bank.repair()
    unlock(path)
    assert all_of(tmp_path) == before
    assert len(bank.repair().repaired) == 1 and bank.verify().ok and bank.lost == ()


def test_a_bank_without_damage_that_cannot_all_be_read_is_not_called_damaged(tmp_path, capsys):
    bank = mixed_bank(tmp_path)
    lock(tmp_path / bank.shards[1].folder / "references.jsonl")
    assert main(["memory", "verify", "--bank", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert f"{tmp_path}: not all of it can be read, 3 shards" in printed.out
    assert "references.jsonl is unreadable (" in printed.err


def test_a_memory_of_a_cold_shard_that_can_be_read_again_is_no_damage(tmp_path, monkeypatch):
    bank = mixed_bank(tmp_path)

    def once(self, shard, row, future):
        raise self._unreadable(shard, ValueError("UNAVAILABLE: HTTP 503, slow down"))

    monkeypatch.setattr(Bank, "_finish_lone", once)
    assert bank.verify().ok


def test_a_damaged_memory_beside_damaged_tables_is_left_out_of_the_shard_made_again(tmp_path):
    """And one that cannot be read now stops the repair there, too."""
    bank = mixed_bank(tmp_path)
    memories, folder = contents(3, seed=3)[0], tmp_path / bank.shards[2].folder
    (folder / "sources.json").write_bytes(b"[]")
    (folder / "memories/c/2/0/0/0/0/0").write_bytes(b"damaged")
    before, path = all_of(tmp_path), folder / "memories/c/1/0/0/0/0/0"
    lock(path)
    with pytest.raises(BankError, match="mend the access, then repeat"):
        bank.repair()
    unlock(path)
    assert all_of(tmp_path) == before
    bank.repair()
    found = Bank.open(tmp_path).read(np.arange(5, 8))
    assert found.cold.tolist() == [False, False, True]
    assert found.memories[:2].tobytes() == memories[:2].tobytes()


def test_an_embedder_that_cannot_be_read_now_sets_no_shard_aside(tmp_path, monkeypatch):
    bank = Bank.create(tmp_path, spec=SPEC, embedder_state=b"what it was fitted to")
    bank.append(*contents(2))
    (tmp_path / bank.shards[0].folder / "embeddings/c/0/0").write_bytes(b"damaged")

    def cannot(self, **_):
        raise BankError("bank: cannot read embedder/1 (UNAVAILABLE: HTTP 503, slow down)")

    monkeypatch.setattr(Bank, "embedder", cannot)
    with pytest.raises(BankError, match="slow down"):
        bank.repair()
    assert Bank.open(tmp_path).lost == ()


READS = (
    lambda bank: bank.read([3]),
    lambda bank: bank.references([3]),
    lambda bank: bank.embeddings(),
    lambda bank: bank.sources(),
    lambda bank: bank.verify(),
)


@pytest.mark.parametrize("read", READS)
def test_what_a_compaction_took_from_an_open_reader_is_not_called_damage(tmp_path, read):
    bank = written(tmp_path)
    reader = Bank.open(tmp_path)
    bank.delete(rows=[0])
    bank.compact()
    with pytest.raises(RewrittenError, match="was rewritten meanwhile .*open it again"):
        read(reader)
    assert Bank.open(tmp_path).verify().ok


@pytest.mark.parametrize("read", READS[:-1])
def test_damage_is_called_damage_though_the_bank_was_changed_elsewhere(tmp_path, read):
    bank = written(tmp_path)
    reader = Bank.open(tmp_path)
    bank.delete(rows=[0])
    for path in (tmp_path / bank.shards[1].folder).rglob("*"):
        path.is_file() and path.write_bytes(b"damaged")
    with pytest.raises(BankError, match="verify` to see what is damaged") as raised:
        read(reader)
    assert not isinstance(raised.value, RewrittenError)
    assert reader.verify().damaged == (bank.shards[1].name,)
