"""Laws of repairing: what is damaged is made again as it was, or said to be lost."""

from pathlib import Path

import numpy as np
import pytest

from jaxlab.cli import main
from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.pipeline import reference_encoder
from jaxlab.memory.requantize import quantize_bank
from jaxlab.memory.store import Bank
from tests.inference.small import letters, small_encoder, small_model, write_small_bank
from tests.memory.stored import SPEC, bits, contents, files_of, flip, part_of, told, written

COUNTS = (3, 2, 4)
TEXTS = "references.jsonl"
CODES = {"codec": "OPQ2_8,Residual2x3,PQ2x3", "rounds": (1, 1), "report": lambda _: None}


def ruin_texts(folder, shard, rows=None) -> None:
    """Change two bits of each of these texts, or of all: more than can be mended."""
    path = part_of(folder, shard, TEXTS)
    lines = path.read_bytes().splitlines(keepends=True)
    for row in range(len(lines)) if rows is None else rows:
        lines[row] = bytes([lines[row][0] ^ 4, lines[row][1] ^ 4]) + lines[row][2:]
    path.write_bytes(b"".join(lines))


class Encoder:
    def __init__(self):
        self.asked = 0
        self._encode = reference_encoder(small_model(), small_encoder())

    def __call__(self, references):
        self.asked += len(references)
        return self._encode(references)


KINDS = ["memories/c", "memories/zarr", "embeddings", "kept", "lines", "source/", "sources.json"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cold", [False, True])
def test_a_shard_with_sound_texts_is_made_again_as_it_was(tmp_path, kind, cold):
    write_small_bank(tmp_path, shard_references=3, cold=cold)
    bank = Bank.open(tmp_path / "bank", write=True)
    if cold:
        bank.warm(np.array([4]), small_encoder()(np.ones((1, 12), np.int32), np.array([12])))
    before, mark = told(bank), bank.fingerprint()
    flip(part_of(tmp_path / "bank", bank.shards[1], kind))
    assert not bank.verify().ok
    encode = Encoder()
    done = Bank.open(bank.url, write=True).repair(encode=encode, model_embed=letters)
    assert (done.set_aside, done.lost, done.problems) == ((), (), ())
    after = Bank.open(bank.url)
    assert after.verify().ok and after.fingerprint() == mark and after.alive() is None
    if cold and kind == "memories/c":
        assert (done.repaired, done.forgotten) == ((), 1)
    else:
        assert (done.repaired, done.forgotten) == ((bank.shards[1].name,), 0)
    assert encode.asked == (3 if kind.startswith("memories") and not cold else 0)
    again = told(after)
    if cold and kind in ("memories/c", "memories/zarr", "kept"):
        assert after.cold_rows().tolist() == list(range(8))  # is encoded when next read
        after.warm(np.array([4]), small_encoder()(np.ones((1, 12), np.int32), np.array([12])))
        again = told(after)
    assert again == before
    assert Bank.open(bank.url, write=True).repair().repaired == ()


@pytest.mark.parametrize("kind", ["memories/c", "memories/zarr", "embeddings"])
def test_what_only_the_model_makes_again_waits_for_it(tmp_path, kind):
    """Another shard may be beyond repair: nothing is set aside before all is known."""
    write_small_bank(tmp_path, shard_references=3)
    bank = Bank.open(tmp_path / "bank", write=True)
    before, header = told(bank), (tmp_path / "bank/header.json").read_bytes()
    ruin_texts(tmp_path / "bank", bank.shards[0])
    flip(part_of(tmp_path / "bank", bank.shards[1], kind))
    with pytest.raises(ConfigError, match="give --run RUN"):
        bank.repair(set_aside=True)
    assert (tmp_path / "bank/header.json").read_bytes() == header
    again = Bank.open(bank.url, write=True)
    done = again.repair(encode=Encoder(), model_embed=letters, set_aside=True)
    assert (done.set_aside, done.repaired) == ((bank.shards[0].name,), (bank.shards[1].name,))
    assert told(Bank.open(bank.url)) == before[3:]


def test_what_cannot_be_made_again_is_set_aside_and_said(tmp_path):
    bank = written(tmp_path, counts=COUNTS)
    whole, name = told(bank), bank.shards[1].name
    ruin_texts(tmp_path, bank.shards[1])
    before = files_of(tmp_path)
    with pytest.raises(BankError, match=rf"{name}: rows 3 to 4 of source 1 cannot .* nothing was"):
        bank.repair()
    assert files_of(tmp_path) == before
    done = bank.repair(set_aside=True)
    assert (done.repaired, done.set_aside) == ((), (name,))
    assert done.lost == (f"shard {name}: rows 3 to 4 of source 1",)
    for each in (bank, Bank.open(tmp_path, write=True)):
        assert each.verify().ok and (each.rows, len(each)) == (9, 7)
        assert [(lost.name, lost.count) for lost in each.verify().lost] == [(name, 2)]
        assert told(each) == whole[:3] + whole[5:]
        with pytest.raises(BankError, match="reference 4 was deleted"):
            each.read([4])
        assert not each.embeddings()[3:5].any() and each.fingerprint() == bank.fingerprint()
        assert not each.rows_of(["source 1"]).any()
    assert files_of(tmp_path / "shards" / name)  # to be looked at
    assert bank.read([5]).cold.tolist() == [False]
    with pytest.raises(BankError, match="changed by another writer"):
        bank.compact()
    bank = Bank.open(tmp_path, write=True)
    bank.compact()
    assert told(bank) == whole[:3] + whole[5:] and bank.lost == ()
    assert not files_of(tmp_path / "shards" / name)


def test_the_last_shard_may_be_lost_and_its_rows_are_not_given_again(tmp_path):
    bank = written(tmp_path)
    ruin_texts(tmp_path, bank.shards[1])
    bank.repair(set_aside=True)
    assert bank.append(*contents(2, seed=8)) == range(5, 7)
    bank = Bank.open(tmp_path)
    assert np.flatnonzero(bank.alive()).tolist() == [0, 1, 2, 5, 6] and bank.verify().ok
    assert bits(bank.read([5, 6]).memories) == bits(contents(2, seed=8)[0])


def test_repairing_a_sound_bank_does_nothing(tmp_path):
    bank = written(tmp_path)
    header = (tmp_path / "header.json").read_bytes()
    done = bank.repair()
    assert (done.repaired, done.set_aside, done.lost, done.problems) == ((), (), (), ())
    assert (tmp_path / "header.json").read_bytes() == header


@pytest.mark.parametrize("also", [None, "source/"])
def test_of_a_shard_with_a_damaged_text_the_other_references_are_kept(tmp_path, also):
    bank = written(tmp_path, counts=COUNTS)
    whole, name, mark = told(bank), bank.shards[2].name, bank.fingerprint()
    bank.delete(rows=[1])
    ruin_texts(tmp_path, bank.shards[2], [1, 3])
    if also == "source/":
        flip(part_of(tmp_path, bank.shards[2], also))
    before = files_of(tmp_path)
    source = "sources that cannot be read" if also == "source/" else "source 2"
    lost = f"shard {name}: rows 6, 8 of {source}"
    with pytest.raises(BankError, match=f"{lost} cannot be made again.* nothing was changed"):
        bank.repair()
    assert files_of(tmp_path) == before
    done = bank.repair(set_aside=True)
    assert (done.repaired, done.set_aside, done.lost) == ((name,), (), (lost,))
    for each in (bank, Bank.open(tmp_path, write=True)):
        assert each.verify().ok and each.lost == () and each.fingerprint() == mark
        assert told(each) == [whole[row] for row in (0, 2, 3, 4, 5, 7)]
        with pytest.raises(BankError, match="reference 6 was deleted"):
            each.references([6])
        assert each.sources() == {"source 0": 2, "source 1": 2, "source 2": 2}
    assert each.repair().repaired == ()


@pytest.mark.parametrize("bit", [0, 5])
def test_a_flipped_bit_in_a_text_or_two_costs_nothing(tmp_path, bit):
    """The checksum of the line says which bit it was, and that of the file that it was."""
    bank = written(tmp_path, counts=COUNTS)
    before, path = told(bank), part_of(tmp_path, bank.shards[2], TEXTS)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for row, place in ((1, 7), (3, len(lines[3]) - 1)):
        lines[row] = (
            lines[row][:place] + bytes([lines[row][place] ^ 1 << bit]) + lines[row][place + 1 :]
        )
    path.write_bytes(b"".join(lines))
    done = bank.repair()
    assert (len(done.repaired), done.lost) == (1, ())
    again = Bank.open(tmp_path)
    assert told(again) == before and again.verify().ok
    assert part_of(tmp_path, again.shards[2], TEXTS).read_bytes() == content


def test_a_text_torn_at_its_end_costs_what_lay_behind_it(tmp_path):
    bank = written(tmp_path, counts=COUNTS)
    whole, path = told(bank), part_of(tmp_path, bank.shards[2], TEXTS)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3])[:-2])
    bank.repair(set_aside=True)
    assert told(Bank.open(tmp_path)) == whole[:7]


def test_a_damaged_text_of_a_deleted_reference_costs_nothing(tmp_path):
    bank = written(tmp_path)
    bank.delete(rows=[3])
    before = told(bank)
    ruin_texts(tmp_path, bank.shards[1], [0])
    done = bank.repair()
    assert len(done.repaired) == 1 and done.lost == ()
    again = Bank.open(tmp_path, write=True)
    assert told(again) == before and again.verify().ok
    again.compact()
    assert told(again) == before


def test_without_a_table_of_lines_no_damaged_text_is_told_from_a_sound_one(tmp_path):
    bank = written(tmp_path)
    ruin_texts(tmp_path, bank.shards[1], [0])
    flip(part_of(tmp_path, bank.shards[1], "lines"))
    assert bank.repair(set_aside=True).set_aside and len(bank) == 3


def test_what_is_left_is_told_with_its_cure(tmp_path):
    bank = Bank.create(tmp_path, spec=SPEC, embedder_state=b"what it was fitted to")
    bank.append(*contents(2))
    (embedder,) = (tmp_path / "embedder").iterdir()
    embedder.write_bytes(b"damaged")
    (problem,) = bank.repair().problems
    assert problem.startswith("embedder: embedder/") and problem.endswith(
        ": restore it from a copy, or write the bank anew at another place"
    )


def test_what_is_lost_is_decided_by_one_look_at_the_texts(tmp_path, monkeypatch):
    """A drive that fails may give other bytes the next time."""
    bank = written(tmp_path, counts=COUNTS)
    whole, looked, look = told(bank), [], Bank.found_object_of
    name = bank.shards[2].name
    ruin_texts(tmp_path, bank.shards[2], [1])

    def failing(self, shard, path):
        looked.append(path)
        found = look(self, shard, path)
        return found if len(looked) == 1 else b"x" * len(found)

    monkeypatch.setattr(Bank, "found_object_of", failing)
    assert bank.repair(set_aside=True).lost == (f"shard {name}: rows 6 of source 2",)
    again = Bank.open(tmp_path)
    assert told(again) == [*whole[:6], *whole[7:]] and "" not in again.sources()


def test_every_row_that_is_lost_is_named(tmp_path):
    bank = written(tmp_path, counts=(30,))
    name = bank.shards[0].name
    ruin_texts(tmp_path, bank.shards[0], [0, 2, 3, 4, 7, 9, 10, 12, 14, 16, 18, 29])
    rows = "0, 2 to 4, 7, 9 to 10, 12, 14, 16, 18, 29"
    with pytest.raises(BankError, match=f"shard {name}: rows {rows} of source 0 cannot be made"):
        bank.repair()
    assert bank.repair(set_aside=True).lost == (f"shard {name}: rows {rows} of source 0",)


def test_a_shard_of_deleted_references_alone_is_set_aside_and_nothing_was_lost(tmp_path, capsys):
    bank = written(tmp_path)
    bank.delete(rows=[3, 4])
    before = told(bank)
    (tmp_path / bank.shards[1].folder / TEXTS).unlink()
    done = bank.repair()
    assert len(done.set_aside) == 1 and done.lost == ()
    assert told(Bank.open(tmp_path)) == before
    assert main(["memory", "verify", "--bank", str(tmp_path)]) == 0
    assert f"{tmp_path}: whole, 1 shards, 3 references" in capsys.readouterr().out


def test_of_a_shard_that_is_lost_the_living_are_counted(tmp_path, capsys):
    bank = written(tmp_path)
    bank.delete(rows=[3])
    (tmp_path / bank.shards[1].folder / TEXTS).unlink()
    bank.repair(set_aside=True)
    assert main(["memory", "verify", "--bank", str(tmp_path)]) == 1
    assert ": 1 references lost, " in capsys.readouterr().out


def test_nothing_is_written_before_all_that_is_needed_is_there(tmp_path):
    write_small_bank(tmp_path, shard_references=3)
    bank = Bank.open(tmp_path / "bank", write=True)
    flip(part_of(tmp_path / "bank", bank.shards[0], "kept"))
    flip(part_of(tmp_path / "bank", bank.shards[1], "memories/c"))
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match="nothing was changed"):
        bank.repair()
    assert files_of(tmp_path) == before


def test_a_damaged_embedder_costs_the_shards_whose_embeddings_are_damaged(tmp_path):
    bank = Bank.create(tmp_path, spec=SPEC, embedder_state=b"what it was fitted to")
    for seed in range(2):
        bank.append(*contents(2, seed=seed))
    (embedder,) = (tmp_path / "embedder").iterdir()
    embedder.write_bytes(b"damaged")
    flip(part_of(tmp_path, bank.shards[1], "embeddings"))
    with pytest.raises(BankError, match="rows 2 to 3 of source 1 cannot be made again"):
        bank.repair(model_embed=letters)
    assert len(bank.repair(model_embed=letters, set_aside=True).set_aside) == 1
    assert Bank.open(tmp_path, write=True).sources() == {"source 0": 2}


def test_a_shard_without_its_texts_is_lost_whole(tmp_path):
    bank = written(tmp_path)
    (tmp_path / bank.shards[1].folder / TEXTS).unlink()
    assert bank.repair(set_aside=True).set_aside and len(bank) == 3


@pytest.mark.parametrize("kind", ["codec", "deleted"])
def test_what_decides_over_the_whole_bank_stops_a_repair(tmp_path, kind):
    bank = written(tmp_path)
    bank.delete(rows=[0])
    if kind == "codec":
        write_small_bank(tmp_path / "raw")
        quantize_bank(Bank.open(tmp_path / "raw/bank"), tmp_path / "codes", **CODES)
        bank = Bank.open(tmp_path / "codes", write=True)
    (file,) = (Path(bank.url) / kind).iterdir()
    file.write_bytes(b"damaged")
    before = files_of(tmp_path)
    with pytest.raises(BankError, match=f"{kind}: .* cannot be made again; nothing was changed: r"):
        Bank.open(bank.url, write=True).repair(set_aside=True)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("encoded", [(), (3, 5)])
def test_of_a_cold_shard_with_a_damaged_text_the_other_memories_are_kept(tmp_path, encoded):
    write_small_bank(tmp_path, shard_references=3, cold=True)
    bank = Bank.open(tmp_path / "bank", write=True)
    rows = np.array(encoded, np.int64)
    if encoded:
        bank.warm(rows, small_encoder()(np.ones((len(rows), 12), np.int32), np.full(len(rows), 12)))
    before = told(bank)
    ruin_texts(tmp_path / "bank", bank.shards[1], [1])
    bank.repair(set_aside=True)
    again = Bank.open(bank.url)
    assert told(again) == before[:4] + before[5:] and again.verify().ok
    assert again.cold_rows().tolist() == [row for row in range(8) if row not in (*encoded, 4)]
