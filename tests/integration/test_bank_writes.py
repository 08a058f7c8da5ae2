"""Writing a bank from the command line: killed, resumed, repeated, refused, without room."""

import json

import pytest

from jaxlab.cli import main
from jaxlab.memory.store import Bank
from tests.integration.tiny_run import SMALL_SHARDS, files_of


def write(tiny, folder, bank, *, data=None, before=()):
    source = data or tiny.notes
    words = ("memory", "write", "--run", tiny.run, "--data", source, "--bank", bank)
    return tiny.child(folder, *words, before=[SMALL_SHARDS, *before])


def same_bank(bank, other) -> bool:
    """Equal shards but for their writers' names; what TensorStore keeps besides is gone."""

    def told(url):
        opened = Bank.open(url)
        listed = {f"{shard.name}/{path}" for shard in opened.shards for path in shard.files}
        assert files_of(url / "shards").keys() == listed and opened.verify().ok
        return opened.spec, [(shard.start, shard.count, shard.files) for shard in opened.shards]

    return told(bank) == told(other)


def test_a_writer_killed_between_its_shards_goes_on_and_the_bank_is_the_same(tiny, tmp_path):
    bank = tmp_path / "bank"
    ended = write(tiny, tmp_path, bank, before=[("die_after_append", 2)])
    assert ended.code == -9
    begun = Bank.open(bank)
    assert [shard.count for shard in begun.shards] == [8, 8] and begun.verify().ok
    ended = write(tiny, tmp_path, bank)
    assert ended.code == 0, ended.err
    report = json.loads(ended.out.splitlines()[-1])
    assert report["resumed_at"] == 16 and report["references"] == len(Bank.open(tiny.bank))
    assert len(Bank.open(tiny.bank).shards) > 3
    assert same_bank(bank, tiny.bank)


def test_writing_a_finished_bank_again_does_nothing(tiny, tmp_path, capsys):
    bank = tiny.copy_bank(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in bank.rglob("*")}
    words = ["memory", "write", "--run", tiny.run, "--data", tiny.notes, "--bank", bank]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert report["resumed_at"] == report["references"] == len(Bank.open(bank))
    assert {path: path.stat().st_mtime_ns for path in bank.rglob("*")} == stamps


@pytest.mark.parametrize("change", ["another beginning", "less than is there"])
def test_a_bank_begun_with_another_source_is_refused(tiny, tmp_path, capsys, change):
    bank, data = tiny.copy_bank(tmp_path), tmp_path / "data"
    data.mkdir()
    if change == "another beginning":
        (data / "0.txt").write_text("something else, told at some length")
    else:
        (data / "0.txt").write_text((tiny.notes / "0.txt").read_text())
    words = ["memory", "write", "--run", tiny.run, "--data", data, "--bank", bank]
    assert main([str(word) for word in words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: bank {bank}: reference ")
    assert line.endswith("begun with another source; use the same --data or another --bank")
    assert same_bank(bank, tiny.bank)


def test_no_room_for_a_bank_is_one_error_and_the_bank_can_be_written_later(tiny, tmp_path):
    bank = tmp_path / "bank"
    ended = write(tiny, tmp_path, bank, before=[("limit_files", 2000)])
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error: bank {bank}: cannot write ") and "File too large" in line
    assert not (bank / "header.json").exists()
    ended = write(tiny, tmp_path, bank)
    assert ended.code == 0, ended.err
    assert same_bank(bank, tiny.bank)
