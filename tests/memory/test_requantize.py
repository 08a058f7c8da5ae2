"""Laws of a quantized bank: its codes, its size, what is copied, going on behind a kill."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import BankError, ConfigError
from jaxlab.memory import requantize
from jaxlab.memory.quantize import PAPER, Codec
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.requantize import measure, quantize_bank, sample_vectors
from jaxlab.memory.store import Bank, StoredReference
from jaxlab.memory.write import from_stored
from tests.memory.stored import DIM, SPEC, bits, files_of

SHAPE = (2, 2, 2, 3, 8)
CODEC = "OPQ2_8,Residual2x3,PQ2x3"
OPTIONS = {"codec": CODEC, "rounds": (1, 1), "report": lambda _: None}


def raw_bank(url, counts=(8, 6, 10), dtype="float32") -> Bank:
    """A bank of finite numbers; slots that hold no token are full of what must not be learnt."""
    spec = dataclasses.replace(SPEC, memory_shape=SHAPE, dtype=dtype, references_per_chunk=2)
    bank, draw = Bank.create(url, spec=spec), np.random.default_rng(0)
    for n in counts:
        kept = draw.integers(1, 4, n).astype(np.int32)
        memories = draw.standard_normal((n, *SHAPE))
        memories = np.where(
            (np.arange(3) < kept[:, None])[:, None, None, None, :, None], memories, 1e4
        )
        references = [StoredReference(f"text {i}", f"source {i % 2}", 3) for i in range(n)]
        embeddings = draw.standard_normal((n, DIM)).astype(np.float32)
        bank.append(memories.astype(spec.numpy_dtype), kept, embeddings, references)
    return bank


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    source = raw_bank(folder / "raw")
    return source, quantize_bank(source, folder / "codes", **OPTIONS), Bank.open(folder / "codes")


def test_all_but_the_memories_is_copied_bit_for_bit(banks):
    source, report, made = banks
    assert (report.references, report.resumed_at) == (24, 0) and made.verify().ok
    assert dataclasses.replace(made.spec, codec=None) == source.spec
    for ours, theirs in zip(made.shards, source.shards, strict=True):
        assert (ours.start, ours.count) == (theirs.start, theirs.count)
        for path, file in theirs.files.items():
            if not path.startswith("memories/"):
                assert ours.files[path] == file
    assert made.references(range(24)) == source.references(range(24))
    assert made.fingerprint() == source.fingerprint() and made.sources() == source.sources()


def test_the_codes_are_those_of_the_memories(banks):
    source, _, made = banks
    ids = np.array([[23, 0], [-1, 4]])
    found, raw = made.read(ids), source.read(ids)
    assert found.memories.dtype == np.uint8
    np.testing.assert_array_equal(found.kept, raw.kept)
    codes = made.codec.encode(raw.memories)
    np.testing.assert_array_equal(found.memories[ids >= 0], codes[ids >= 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_slots_are_the_codes_decoded_and_empty_ones_stay_invalid(tmp_path, dtype):
    source = raw_bank(tmp_path / "raw", dtype=dtype)
    quantize_bank(source, tmp_path / "codes", **OPTIONS)
    bank, ids = Bank.open(tmp_path / "codes"), np.array([[[0, 5], [-1, 23]]])
    slots = MemoryReader.open(bank, model_embed=silent).slots(ids)
    found = bank.read(ids)
    decoded = jnp.asarray(bank.codec.decode(found.memories)).astype(dtype)
    wanted = from_stored(decoded, jnp.asarray(np.arange(3) < found.kept[..., None]))
    assert slots.keys.dtype == slots.values.dtype == dtype
    np.testing.assert_array_equal(slots.valid, wanted.valid)
    assert not slots.valid[0, 1, :3].any()
    for ours, theirs in zip(slots[:2], wanted[:2], strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours, theirs, atol=1e-5 if dtype == "float32" else 2e-2)


def silent(texts):
    return np.zeros((len(texts), DIM), np.float32)


def test_a_quantized_bank_takes_memories_and_codes_alike(tmp_path, banks):
    source, _, made = banks
    raw, kept, _ = source.read(range(3))
    codes, texts = made.codec.encode(raw), source.references(range(3))
    found = []
    for name, memories in (("raw", raw), ("codes", codes)):
        bank = Bank.create(tmp_path / name, spec=made.spec, codec_state=made.codec.to_bytes())
        bank.append(memories, kept, source.embeddings()[:3], texts)
        found.append(bits(bank.read(range(3)).memories))
    assert found[0] == found[1] == bits(codes)
    with pytest.raises(BankError, match="codes have shape"):
        bank.append(codes[..., :1], kept, source.embeddings()[:3], texts)
    with pytest.raises(BankError, match="a codec takes both its name and its state"):
        Bank.create(tmp_path / "other", spec=made.spec)


def test_empty_slots_are_never_sampled_and_the_sample_is_the_seeds(banks):
    source, _, _ = banks
    every = sample_vectors(source, 10_000, seed=0)
    slots = int(source.read(range(24)).kept.sum())
    assert every.shape == (slots * 2 * 2 * 2, 8) and np.abs(every).max() < 100
    some, same, other = (sample_vectors(source, 100, seed=seed) for seed in (1, 1, 2))
    assert some.shape == (100, 8)
    np.testing.assert_array_equal(some, same)
    assert not np.array_equal(some, other)


def test_the_errors_are_those_of_their_definitions(banks):
    """By hand, one query at a time, over what the codec makes of the memories."""
    source, report, made = banks
    rows = np.sort(np.random.default_rng(0).permutation(24))
    raw, kept, _ = source.read(rows)
    lost = made.codec.decode(made.read(rows).memories)
    square = {"keys": [0, 0], "values": [0, 0], "outputs": [0, 0]}
    for n in range(24):
        for part, name in enumerate(("keys", "values")):
            exact, changed = (m[n, :, part, :, : kept[n]] for m in (raw, lost))
            square[name][0] += ((changed - exact) ** 2).sum()
            square[name][1] += (exact**2).sum()

    def output(memories, group, layer, head, query):
        slots = [(n, i) for n in (2 * group, 2 * group + 1) for i in range(kept[n])]
        keys, values = (
            np.array([memories[n, layer, part, head, i] for n, i in slots], np.float64)
            for part in (0, 1)
        )
        weights = np.exp(keys @ query / np.sqrt(8))
        return weights @ values / weights.sum()

    for n in range(24):
        for layer in range(2):
            for head in range(2):
                for i in range(kept[n]):
                    asked = (n // 2 + 1) % 12, layer, head, raw[n, layer, 0, head, i]
                    exact, changed = (output(m, *asked) for m in (raw, lost))
                    square["outputs"][0] += ((changed - exact) ** 2).sum()
                    square["outputs"][1] += (exact**2).sum()
    wanted = [np.sqrt(part / whole) for part, whole in square.values()]
    found = [report.relative_l2_keys, report.relative_l2_values, report.attention_output_error]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert 0 < max(wanted) < 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_killed_copy_goes_on_with_the_codec_it_stored(tmp_path, banks, monkeypatch, done):
    source, _, whole = banks
    add, added = Bank.add, []

    def dying(self, shards):
        if len(added) == done:
            raise Killed
        added.append(1)
        add(self, shards)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Bank, "add", dying)
        quantize_bank(source, tmp_path / "codes", **OPTIONS)
    monkeypatch.setattr(Codec, "fit", None)  # is not trained again
    report = quantize_bank(source, tmp_path / "codes", **OPTIONS)
    assert report.resumed_at == (0, 8, 14)[done] and report.references == 24
    made = Bank.open(tmp_path / "codes")
    assert [shard.files for shard in made.shards] == [shard.files for shard in whole.shards]
    before = files_of(tmp_path), (tmp_path / "codes/header.json").read_bytes()
    assert quantize_bank(source, tmp_path / "codes", **OPTIONS).resumed_at == 24
    assert before == (files_of(tmp_path), (tmp_path / "codes/header.json").read_bytes())


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_deleted_or_lost_is_so_in_the_copy(tmp_path, monkeypatch, killed):
    source = raw_bank(tmp_path / "raw", counts=(8, 6, 10, 8))
    source.delete(rows=[2, 30])
    (file,) = (tmp_path / "raw" / source.shards[1].folder).glob("references.jsonl")
    file.unlink()
    assert source.repair(set_aside=True).set_aside
    if killed:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Bank, "lack_the_same", lambda *_: (_ for _ in ()).throw(Killed))
            quantize_bank(source, tmp_path / "codes", **OPTIONS)
    report = quantize_bank(source, tmp_path / "codes", **OPTIONS)
    made = Bank.open(tmp_path / "codes")
    assert made.verify().ok and report.references == len(made) == len(source) == 24
    np.testing.assert_array_equal(made.alive(), source.alive())
    assert (made.fingerprint(), made.rows) == (source.fingerprint(), 32)
    rows = np.flatnonzero(made.alive())
    assert made.references(rows) == source.references(rows)
    codes = made.codec.encode(source.read(rows).memories)
    np.testing.assert_array_equal(made.read(rows).memories, codes)


def test_what_cannot_be_quantized_or_gone_on_with_is_named(tmp_path, banks):
    source, _, made = banks
    with pytest.raises(BankError, match="is quantized already"):
        quantize_bank(made, tmp_path / "a", **OPTIONS)
    with pytest.raises(BankError, match=f"was begun with codec {CODEC}; .* another --out"):
        quantize_bank(source, made.url, **{**OPTIONS, "codec": "OPQ2_8,Residual2x2,PQ2x2"})
    with pytest.raises(ConfigError, match="these have 8: .* OPQ2_8,Residual2x8,PQ1x8"):
        quantize_bank(source, tmp_path / "a", **{**OPTIONS, "codec": PAPER})
    other = raw_bank(tmp_path / "other", counts=(6, 8, 10))
    with pytest.raises(BankError, match="was begun from another bank"):
        quantize_bank(other, made.url, **OPTIONS)
    for codec, message in (("PQ8", "is not of the kind"), (PAPER, "memory_shape has 8")):
        with pytest.raises(BankError, match=message):
            dataclasses.replace(source.spec, codec=codec)


def test_a_damaged_codec_is_one_error_and_is_verified(tmp_path):
    quantize_bank(raw_bank(tmp_path / "raw"), tmp_path / "codes", **OPTIONS)
    (file,) = (tmp_path / "codes/codec").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    bank = Bank.open(tmp_path / "codes")
    assert bank.verify().damaged == ("codec",)
    with pytest.raises(BankError, match=r"codec/[\w-]+ is damaged or missing"):
        bank.codec  # noqa: B018
    file.unlink()
    assert Bank.open(tmp_path / "codes").verify().missing == ("codec",)


def test_a_reference_of_the_published_model_takes_39424_bytes_on_disk(tmp_path, monkeypatch):
    """The paper's rate: the length of a code is all that the size depends on."""
    spec = dataclasses.replace(SPEC, memory_shape=(22, 2, 8, 8, 80), codec=PAPER)
    assert spec.bytes_per_reference == 39_424
    assert dataclasses.replace(spec, codec=None).bytes_per_reference == 450_560
    bank = Bank.create(tmp_path, spec=spec, codec_state=b"not trained here")
    codes = np.random.default_rng(0).integers(0, 256, (3, 22, 2, 8, 8, 14), np.uint8)
    monkeypatch.setattr(Bank, "codec", None)
    texts = [StoredReference("t", "s", 8)] * 3
    bank.append(codes, np.full(3, 8), np.ones((3, DIM), np.float32), texts)
    (data,) = (path for path in tmp_path.rglob("codes/c/*/*/*/*/*/*") if path.is_file())
    index, chunk = 3 * 16 + 4, 39_424 + 4  # places of the chunks; a checksum of each
    assert data.stat().st_size == 3 * chunk + index
    assert data.read_bytes()[chunk : 2 * chunk - 4] == bits(codes[1])


def test_nothing_lost_is_measured_of_a_codec_that_loses_nothing(banks, monkeypatch):
    source, _, made = banks
    raw = source.read(np.arange(24)).memories

    class Exact:
        def decode(self, codes):
            return raw

    made = Bank.open(made.url)
    monkeypatch.setattr(Bank, "codec", Exact())
    assert set(measure(source, made).values()) == {0.0}
    assert json.dumps(measure(source, made)) and requantize._MEASURED >= 24
