"""Quantizing, compacting, repairing a bank from the command line: killed, resumed, no room."""

import json
import shutil

import numpy as np
import pytest

from jaxlab.cli import main
from jaxlab.errors import BankError
from jaxlab.memory.store import Bank
from tests.integration.test_bank_writes import same_bank, write
from tests.integration.tiny_run import files_of, flip_bit

CODEC = "OPQ2_8,Residual2x3,PQ2x3"
OBJECTS = 12  # of a shard


@pytest.fixture(scope="module")
def larger(tiny, tmp_path_factory):
    """A bank with vectors enough to train a codec on, and its quantized copy."""
    folder = tmp_path_factory.mktemp("larger")
    source = tiny.folder / "corpus.jsonl"
    words = ("memory", "write", "--run", tiny.run, "--data", source, "--bank", folder / "raw")
    ended = tiny.child(folder, *words, before=[("small_shards", 128)])
    assert ended.code == 0, ended.err
    assert len(Bank.open(folder / "raw").shards) > 2
    report = folder / "report.json"
    words = ("--report", report, "--run", tiny.run, "--data", source)
    ended = tiny.child(folder, *quantize(folder / "raw", folder / "codes"), *words)
    assert ended.code == 0, ended.err
    return folder


def quantize(raw, out):
    return ("memory", "quantize", "--bank", raw, "--out", out, "--codec", CODEC)


def told(bank: Bank) -> list[tuple]:
    """All that a bank says of its living references, in order."""
    alive = bank.alive()
    rows = np.arange(bank.rows) if alive is None else np.flatnonzero(alive)
    found = bank.read(rows)
    memories = [memory.tobytes() for memory in found.memories]
    embeddings = [each.tobytes() for each in bank.embeddings()[rows]]
    kept = found.kept.tolist()
    return list(zip(memories, kept, embeddings, bank.references(rows), strict=True))


@pytest.mark.parametrize("count", [OBJECTS // 2, 2 * OBJECTS, 2 * OBJECTS + 5])
def test_a_writer_killed_within_a_shard_goes_on_and_the_bank_is_the_same(tiny, tmp_path, count):
    bank = tmp_path / "bank"
    ended = write(tiny, tmp_path, bank, before=[("die_at_object", count)])
    assert ended.code == -9
    ended = write(tiny, tmp_path, bank)
    assert ended.code == 0, ended.err
    assert same_bank(bank, tiny.bank)


def test_what_a_codec_loses_is_reported(larger):
    report = json.loads((larger / "report.json").read_text())
    raw, codes = Bank.open(larger / "raw"), Bank.open(larger / "codes")
    assert report["codec"] == CODEC and report["references"] == len(raw) == len(codes)
    assert report["bytes_per_reference_raw"] == raw.spec.bytes_per_reference
    assert report["bytes_per_reference"] == codes.spec.bytes_per_reference
    for name in ("relative_l2_keys", "relative_l2_values", "attention_output_error"):
        assert 0 < report[name] < 1
    change = report["bpb_quantized"] - report["bpb_raw"]
    assert report["bpb_change"] == change != 0


# Before the header; within the first, the second shard; between two, where the header is written.
@pytest.mark.parametrize("count", [2, 3, 3 + 7, 3 + OBJECTS + 1, 4 + OBJECTS + 7])
def test_a_killed_copy_goes_on_and_is_the_same(tiny, larger, tmp_path, capsys, count):
    raw, out = larger / "raw", tmp_path / "codes"
    ended = tiny.child(tmp_path, *quantize(raw, out), before=[("die_at_object", count)])
    assert ended.code == -9, ended.err
    assert main([str(word) for word in quantize(raw, out)]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["resumed_at"] == (128 if count > 3 + OBJECTS + 1 else 0)
    assert same_bank(out, larger / "codes")


def test_no_room_for_a_copy_is_one_error_and_it_can_be_made_later(tiny, larger, tmp_path, capsys):
    raw, out = larger / "raw", tmp_path / "codes"
    ended = tiny.child(tmp_path, *quantize(raw, out), before=[("limit_files", 20_000)])
    assert ended.code == 1
    line = ended.err.splitlines()[-1]
    assert line.startswith(f"error: bank {out}: cannot write ") and "File too large" in line
    assert main([str(word) for word in quantize(raw, out)]) == 0
    assert same_bank(out, larger / "codes")


@pytest.mark.parametrize("count", [2, OBJECTS // 2, OBJECTS + 2])
def test_a_killed_compaction_loses_nothing_and_is_done_again(tiny, tmp_path, capsys, count):
    bank = tiny.copy_bank(tmp_path)
    assert main(["memory", "delete", "--bank", str(bank), "--rows", "3,9,10"]) == 0
    before = told(Bank.open(bank))
    assert len(before) == len(Bank.open(tiny.bank)) - 3
    compact = ("memory", "compact", "--bank", bank)
    ended = tiny.child(tmp_path, *compact, before=[("die_at_object", count)])
    assert ended.code == -9, ended.err
    assert told(Bank.open(bank)) == before and Bank.open(bank).verify().ok
    assert main([str(word) for word in compact]) == 0
    after = Bank.open(bank)
    assert told(after) == before and after.verify().ok and after.alive() is None
    assert {path.split("/")[0] for path in files_of(bank / "shards")} == {
        shard.name for shard in after.shards
    }


def test_no_room_for_a_compaction_is_one_error_and_nothing_is_lost(tiny, tmp_path):
    bank = tiny.copy_bank(tmp_path)
    assert main(["memory", "delete", "--bank", str(bank), "--rows", "3"]) == 0
    before = told(Bank.open(bank))
    most = max(path.stat().st_size for path in bank.rglob("references.jsonl"))
    header = (bank / "header.json").stat().st_size
    ended = tiny.child(
        tmp_path, "memory", "compact", "--bank", bank, before=[("limit_files", max(most, header))]
    )
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert "cannot write shards/" in line and "File too large" in line
    bank = Bank.open(bank, write=True)
    assert told(bank) == before and bank.verify().ok


@pytest.mark.parametrize("work", ["delete", "compact", "repair", "append_cold"])
def test_a_former_writer_changes_nothing(tiny, tmp_path, work):
    url = tiny.copy_bank(tmp_path)
    former = Bank.open(url, write=True)
    latter = Bank.open(url, write=True)
    latter.delete(rows=[2])
    before = files_of(url)
    arguments = {
        "delete": {"rows": [1]},
        "append_cold": {
            "embeddings": latter.embeddings()[:1],
            "references": former.references([0]),
        },
    }
    with pytest.raises(BankError, match="changed by another writer"):
        getattr(former, work)(**arguments.get(work, {}))
    assert files_of(url) == before


def test_a_bit_of_the_header_is_never_believed(tiny, tmp_path):
    bank = tiny.copy_bank(tmp_path)
    Bank.open(bank, write=True).delete(rows=[2])
    header = bank / "header.json"
    content = header.read_bytes()
    for place in range(0, len(content), 211):
        changed = bytes([content[place] ^ 1])
        header.write_bytes(content[:place] + changed + content[place + 1 :])
        with pytest.raises(BankError, match=r"header.json is damaged|has format"):
            Bank.open(bank)
    header.write_bytes(content)
    assert Bank.open(bank).alive().sum() == len(Bank.open(tiny.bank)) - 1


def test_codes_with_a_flipped_bit_are_not_read(larger, tmp_path):
    url = shutil.copytree(larger / "codes", tmp_path / "codes")
    shard = Bank.open(url).shards[1]
    flip_bit(next(path for path in (url / shard.folder).rglob("codes/c/**/*") if path.is_file()))
    bank = Bank.open(url)
    rows = range(shard.start, shard.start + shard.count)
    with pytest.raises(BankError, match=f"shard {shard.name} cannot be read"):
        bank.read(rows)
    assert bank.read([shard.start - 1]).kept.all() and bank.verify().damaged == (shard.name,)


def test_a_missing_shard_is_set_aside_and_the_rest_is_served(tiny, tmp_path, capsys):
    bank = tiny.copy_bank(tmp_path)
    before, shard = told(Bank.open(bank)), Bank.open(bank).shards[1]
    shutil.move(bank / shard.folder, tmp_path / "elsewhere")
    words = ["memory", "repair", "--bank", str(bank), "--run", str(tiny.run)]
    assert main(words) == 1  # a disk that is not mounted looks the same
    shutil.move(tmp_path / "elsewhere", bank / shard.folder)
    assert told(Bank.open(bank)) == before
    shutil.rmtree(bank / shard.folder)
    capsys.readouterr()
    assert main([*words, "--set-aside"]) == 1
    printed = capsys.readouterr()
    last = shard.start + shard.count - 1
    assert f"error: lost: shard {shard.name}: rows {shard.start} to {last}" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["set_aside"] == [shard.name]
    assert told(Bank.open(bank)) == before[: shard.start] + before[last + 1 :]
    assert main(words[:4]) == 0  # what is left is sound


def test_damaged_memories_are_encoded_again_with_the_run(tiny, tmp_path):
    bank = tiny.copy_bank(tmp_path)
    shard = Bank.open(bank).shards[2]
    (path,) = (p for p in (bank / shard.folder / "memories/c").rglob("*") if p.is_file())
    flip_bit(path)
    assert main(["memory", "repair", "--bank", str(bank), "--run", str(tiny.run)]) == 0
    assert told(Bank.open(bank)) == told(Bank.open(tiny.bank))


def test_a_bank_written_cold_is_encoded_by_the_same_command(tiny, tmp_path, capsys):
    bank = tmp_path / "bank"
    words = ["memory", "write", "--run", tiny.run, "--data", tiny.notes, "--bank", bank]
    words = [str(word) for word in words]
    assert main([*words, "--cold"]) == 0
    assert len(Bank.open(bank).cold_rows()) == len(Bank.open(tiny.bank))
    assert main(["memory", "verify", "--bank", str(bank)]) == 0
    assert " of them cold" in capsys.readouterr().out
    assert main(words) == 0
    assert told(Bank.open(bank)) == told(Bank.open(tiny.bank))


def test_a_bank_is_appended_to_and_cut_by_source(tiny, tmp_path, capsys):
    url = tiny.copy_bank(tmp_path)
    data = tmp_path / "more"
    shutil.copytree(tiny.notes, data)
    (data / "new.txt").write_text("The axis of every array is named here.")
    words = ["memory", "append", "--bank", str(url), "--run", str(tiny.run), "--data", str(data)]
    for added in (True, False):
        assert main(words) == 0
        assert bool(json.loads(capsys.readouterr().out.splitlines()[-1])["added"]) == added
    bank = Bank.open(url)
    (new,) = bank.sources().keys() - Bank.open(tiny.bank).sources().keys()
    assert main(["memory", "delete", "--bank", str(url), "--source", new]) == 0
    assert told(Bank.open(url)) == told(Bank.open(tiny.bank))
    assert main(["memory", "delete", "--bank", str(url), "--source", "nobody"]) == 1
    assert "has no references of nobody" in capsys.readouterr().err
    assert main(["memory", "delete", "--bank", str(url)]) == 1
