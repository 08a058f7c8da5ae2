"""What goes wrong with a bank on the command line is one line on stderr, and nothing half done."""

import shutil

import pytest

from jaxlab.cli import main
from tests.integration.tiny_run import files_of, flip_bit


def damaged_file(bank, shard, array):
    (folder,) = (bank / "shards").glob(f"{shard}-*")
    (path,) = (path for path in (folder / array / "c").rglob("*") if path.is_file())
    return path


@pytest.mark.parametrize("array", ["memories", "embeddings"])
def test_a_flipped_bit_is_found_and_its_shard_is_named(fails, tiny, tmp_path, array):
    bank = tiny.copy_bank(tmp_path)
    path = damaged_file(bank, "000001", array)
    flip_bit(path)
    line = fails("memory", "verify", "--bank", bank)
    shard = path.relative_to(bank).parts[1]
    assert line.startswith(f"shard {shard}: {path.relative_to(bank)} ") and "SHA-256" in line


def test_a_lost_file_is_named_by_verify_and_by_who_reads_it(fails, tiny, tmp_path):
    bank = tiny.copy_bank(tmp_path)
    path = damaged_file(bank, "000001", "embeddings")
    path.unlink()
    shard = path.relative_to(bank).parts[1]
    line = fails("memory", "verify", "--bank", bank)
    assert line.startswith(f"shard {shard}: ") and line.endswith(" is missing")
    line = fails("generate", "--run", tiny.run, "--bank", bank, "--prompt", "the array")
    assert line.startswith(f"bank {bank}: shard {shard} cannot be read (")
    assert line.endswith("run `jaxlab memory verify` to see what is damaged")


def test_a_lost_shard_is_named_by_verify_and_by_who_reads_it(fails, tiny, tmp_path, capsys):
    bank = tiny.copy_bank(tmp_path)
    (shard,) = (bank / "shards").glob("000001-*")
    shutil.rmtree(shard)
    assert main(["memory", "verify", "--bank", str(bank)]) == 1
    printed = capsys.readouterr()
    assert f"{bank}: damaged, " in printed.out
    for line in printed.err.splitlines():
        assert line.startswith(f"error: shard {shard.name}: ") and line.endswith(" is missing")
    line = fails("memory", "search", "--bank", bank, "--query", "the array")
    assert line.startswith(f"bank {bank}: shard {shard.name} cannot be read (")


def test_a_shard_is_given_up_only_where_no_run_can_help_and_verify_tells_of_it(
    fails, tiny, tmp_path, capsys
):
    bank = tiny.copy_bank(tmp_path)
    path = damaged_file(bank, "000001", "memories")
    flip_bit(path)
    shard, before = path.relative_to(bank).parts[1], files_of(bank)
    line = fails("memory", "repair", "--bank", bank)
    assert line.startswith(f"bank {bank}: shard {shard} has damaged memories, which the model")
    assert "give --run RUN" in line
    changed = {
        name for name in before | files_of(bank) if before.get(name) != files_of(bank).get(name)
    }
    assert changed == {"header.json"}  # the name of the writer
    (bank / "shards" / shard / "references.jsonl").unlink()
    line = fails("memory", "repair", "--bank", bank)
    assert line.startswith(f"bank {bank}: shard {shard}: rows ") and "--set-aside" in line
    line = fails("memory", "repair", "--bank", bank, "--set-aside")
    assert line.startswith(f"lost: shard {shard}: rows ")
    capsys.readouterr()
    assert main(["memory", "verify", "--bank", str(bank)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"error: shard {shard}: rows ") and said.err.count("\n") == 1
    assert f"{bank}: 8 references lost, " in said.out
    assert main(["memory", "compact", "--bank", str(bank)]) == 0
    assert main(["memory", "verify", "--bank", str(bank)]) == 0


def test_a_place_without_a_bank_is_named(fails, tmp_path):
    for command in (("verify",), ("stats",), ("search", "--query", "the")):
        line = fails("memory", *command, "--bank", tmp_path / "none")
        assert line.startswith(f"no memory bank at {tmp_path / 'none'}: ")
    assert not (tmp_path / "none").exists()


def test_sources_that_are_not_there_are_named_with_how_sources_are_called(fails, tiny):
    words = ("--bank", tiny.bank, "--source", "0.txt", "notes/0.txt")
    for command in (("search", "--query", "the"), ("delete",)):
        line = fails("memory", *command, *words)
        assert line == (
            f"bank {tiny.bank} has no references of notes/0.txt: name a source as "
            "a search names it, such as 0.txt"
        )


def test_a_codec_that_fits_the_bank_is_proposed(fails, tiny, tmp_path):
    line = fails("memory", "quantize", "--bank", tiny.bank, "--out", tmp_path / "codes")
    assert line.startswith(f"bank {tiny.bank}: codec 'OPQ20_80,Residual2x14,PQ8x10' is for ")
    assert line.endswith("has d = 8, such as OPQ2_8,Residual2x8,PQ1x8")


def test_damage_that_a_prompt_reads_is_one_line_and_the_prompt_is_not_begun(tiny, tmp_path):
    bank = tiny.copy_bank(tmp_path)
    for path in (bank / "shards").glob("*/memories/c/**/*"):
        if path.is_file():
            path.unlink()
    words = ("generate", "--run", tiny.run, "--bank", bank, "--prompt", "the array axis")
    ended = tiny.child(tmp_path, *words)
    (line,) = ended.err.splitlines()
    assert (ended.code, ended.out) == (1, "")
    assert line.startswith(f"error: bank {bank}: shard ")
