"""Laws of cold shards: encoded when first read, once, and then what would have been written."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxlab.errors import BankError
from jaxlab.memory.pipeline import reference_encoder
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.requantize import quantize_bank
from jaxlab.memory.store import Bank
from tests.inference.small import (
    TEXTS,
    letters,
    small_encoder,
    small_model,
    write_small_bank,
)
from tests.memory.stored import SHAPE, SPEC, bits, contents, files_of, written


class Encoder:
    """The small model's; remembers what it was asked."""

    def __init__(self):
        self.asked = []
        self._encode = reference_encoder(small_model(), small_encoder())

    def __call__(self, references):
        self.asked.append([reference.text for reference in references])
        return self._encode(references)


def cold_bank(folder) -> Bank:
    write_small_bank(folder, cold=True, shard_references=5)
    return Bank.open(folder / "bank", identity=small_model().identity)


def lone_files(folder) -> list[str]:
    return [path for path in files_of(folder) if "memories/c/" in path]


def test_slots_of_a_cold_bank_are_bit_for_bit_those_of_the_bank_written_warm(tmp_path):
    write_small_bank(tmp_path / "warm", shard_references=5)
    warm = Bank.open(tmp_path / "warm/bank")
    cold = cold_bank(tmp_path / "cold")
    assert cold.cold_rows().tolist() == list(range(8)) and not lone_files(tmp_path / "cold")
    assert cold.references(range(8)) == warm.references(range(8))
    assert cold.fingerprint() == warm.fingerprint()
    encode, ids = Encoder(), np.array([[[0, 7], [-1, 5]], [[2, 2], [7, 0]]])
    wanted = MemoryReader.open(warm, model_embed=letters).slots(ids)
    reader = MemoryReader.open(cold, model_embed=letters, encode=encode)
    for _ in range(2):
        for ours, theirs in zip(reader.slots(ids), wanted, strict=True):
            assert bits(np.asarray(ours)) == bits(np.asarray(theirs))
    # Once each; nor again by whoever opens the bank later.
    assert encode.asked == [[TEXTS[row] for row in (0, 2, 5, 7)]]
    again = MemoryReader.open(
        Bank.open(cold.url), model_embed=letters, encode=lambda _: pytest.fail("encoded again")
    )
    assert bits(np.asarray(again.slots(ids).keys)) == bits(np.asarray(wanted.keys))
    assert Bank.open(cold.url).cold_rows().tolist() == [1, 3, 4, 6]


def test_without_an_encoder_a_cold_memory_is_one_error_and_is_not_read_as_zeros(tmp_path):
    bank = cold_bank(tmp_path)
    found = bank.read(np.array([3, -1]))
    assert found.cold.tolist() == [True, False] and found.kept.tolist() == [4, 0]
    reader = MemoryReader.open(bank, model_embed=letters)
    with pytest.raises(BankError, match="memory of reference 3 has not been encoded yet"):
        reader.slots(np.array([[[3, 4]]]))
    assert reader.slots(np.array([[[-1, -1]]])).valid.sum() == 0


def test_writing_goes_on_to_encode_what_is_missing(tmp_path):
    write_small_bank(tmp_path / "warm", shard_references=5)
    warm, cold = Bank.open(tmp_path / "warm/bank"), cold_bank(tmp_path / "cold")
    cold.warm(np.array([6]), warm.read([6]).memories)
    assert write_small_bank(tmp_path / "cold", shard_references=5).resumed_at == 8
    cold = Bank.open(cold.url)
    assert not len(cold.cold_rows()) and cold.verify().cold == 0 and cold.verify().ok
    assert bits(cold.read(range(8)).memories) == bits(warm.read(range(8)).memories)


def test_a_memory_of_zeros_is_a_memory(tmp_path):
    bank = Bank.create(tmp_path, spec=SPEC)
    memories, _, embeddings, references = contents(3)
    assert bank.append_cold(embeddings, references) == range(3)
    memories[1] = 0
    reader = Bank.open(tmp_path)
    assert reader.read([1, 2]).cold.all()  # also: that it was missing is not remembered
    Bank.open(tmp_path).warm(np.array([2, 1]), memories[[2, 1]])
    for opened in (reader, Bank.open(tmp_path)):
        found = opened.read(np.arange(3))
        assert found.cold.tolist() == [True, False, False]
        assert bits(found.memories[1:]) == bits(memories[1:])
        np.testing.assert_array_equal(found.kept, [0, 1, 2])  # of 0, 1 and 2 tokens


def test_several_may_encode_the_same_at_once(tmp_path):
    memories, _, embeddings, references = contents(6)
    Bank.create(tmp_path, spec=SPEC).append_cold(embeddings, references)
    banks = [Bank.open(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(len(banks)) as pool:
        for _ in range(5):
            list(pool.map(lambda bank: bank.warm(np.arange(6), memories), banks))
    for bank in (*banks, Bank.open(tmp_path)):
        assert bits(bank.read(np.arange(6)).memories) == bits(memories) and bank.verify().ok


def test_rows_of_other_shards_are_left_as_they_are(tmp_path):
    bank = written(tmp_path, counts=(2,))
    memories, _, embeddings, references = contents(2, seed=4)
    bank.append_cold(embeddings, references)
    before = bits(bank.read([1]).memories)
    bank.warm(np.array([1, 3]), memories)
    assert bits(bank.read([1]).memories) == before
    assert bits(bank.read([3]).memories) == bits(memories[1:])
    with pytest.raises(BankError, match="warm .*: memories are .*, expected"):
        bank.warm(np.array([2]), memories.astype(np.float32)[:1])
    with pytest.raises(BankError, match="there is no 4"):
        bank.warm(np.array([4]), memories[:1])


def test_a_damaged_memory_of_a_cold_shard_is_found_and_not_read(tmp_path):
    bank = cold_bank(tmp_path)
    MemoryReader.open(bank, model_embed=letters, encode=Encoder()).slots(np.array([[[0, 6]]]))
    assert bank.verify().ok and bank.verify().cold == 6
    for path in lone_files(tmp_path):
        file = tmp_path / path
        content = file.read_bytes()
        for changed in (content[:7] + bytes([content[7] ^ 1]) + content[8:], content[:-1]):
            file.write_bytes(changed)
            opened = Bank.open(bank.url)
            report = opened.verify()
            assert report.damaged == (path.split("/")[2],) and path.endswith(report.findings[0].key)
            with pytest.raises(BankError, match="cannot be read .*jaxlab memory verify"):
                opened.read([0]), opened.read([6])
        file.write_bytes(content)
    for path in files_of(tmp_path):
        if "memories/zarr.json" in path:
            content = (tmp_path / path).read_bytes()
            (tmp_path / path).unlink()
            opened = Bank.open(bank.url)
            assert opened.verify().missing == (path.split("/")[2],)
            with pytest.raises(BankError, match="cannot be read"):
                opened.read([1]), opened.read([5])
            (tmp_path / path).write_bytes(content)


def test_a_quantized_bank_may_be_cold_and_a_cold_bank_is_not_quantized(tmp_path):
    write_small_bank(tmp_path / "warm", ["aabbccdd" + t for t in TEXTS * 2])
    codec, silent = "OPQ2_8,Residual2x3,PQ2x3", {"report": lambda _: None, "rounds": (1, 1)}
    with pytest.raises(BankError, match="8 references have no memory yet"):
        quantize_bank(cold_bank(tmp_path / "cold"), tmp_path / "codes", codec=codec, **silent)
    warm = Bank.open(tmp_path / "warm/bank")
    quantize_bank(warm, tmp_path / "codes", codec=codec, **silent)
    codes = Bank.open(tmp_path / "codes")
    spec = dataclasses.replace(codes.spec)
    bank = Bank.create(tmp_path / "lazy", spec=spec, codec_state=codes.codec.to_bytes())
    bank.append_cold(warm.embeddings(), warm.references(range(len(warm))))
    ids = np.array([[[3, 9]]])
    slots = [
        MemoryReader.open(each, model_embed=letters, encode=Encoder()).slots(ids)
        for each in (codes, bank)
    ]
    assert bits(np.asarray(slots[0].keys)) == bits(np.asarray(slots[1].keys))
    assert bits(bank.read([3]).memories) == bits(codes.read([3]).memories)
    assert spec.memory_shape != SHAPE


@pytest.mark.parametrize("trouble", ["link to itself", "stray file"])
def test_a_damaged_cold_shard_is_told_though_its_memories_cannot_be_listed(tmp_path, trouble):
    bank = cold_bank(tmp_path)
    folder = tmp_path / "bank" / bank.shards[0].folder
    (folder / "sources.json").write_bytes(b"[]")
    memories = folder / "memories/c"
    if trouble == "stray file":
        memories.mkdir(parents=True)
        (memories / "notes.txt").write_text("mine")
    else:
        memories.symlink_to(memories)
    found = Bank.open(bank.url).verify()
    assert found.damaged == (bank.shards[0].name,) and len(found.findings) == 1
    assert found.cold == 8
