"""Laws of the memory bank: exact round trips, refusals, damage that is named."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tensorstore as ts

from jaxlab.errors import BankError
from jaxlab.memory.lsa import LsaEmbedder
from jaxlab.memory.store import Bank, StoredReference
from tests.memory.stored import (
    DIM,
    IDENTITY,
    SHAPE,
    SPEC,
    bits,
    contents,
    files_of,
    written,
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_read_is_bit_for_bit_what_was_appended(tmp_path, dtype):
    spec = replace(SPEC, dtype=dtype)
    bank = Bank.create(tmp_path / "bank", spec=spec)
    first, second = contents(3, seed=1, dtype=dtype), contents(4, seed=2, dtype=dtype)
    assert bank.append(*first) == range(0, 3)
    assert bank.append(*second) == range(3, 7)

    bank = Bank.open(tmp_path / "bank", identity=IDENTITY)
    assert len(bank) == 7 and bank.spec == spec
    found = bank.read(np.arange(7))
    assert found.memories.dtype == first[0].dtype
    assert bits(found.memories) == bits(first[0]) + bits(second[0])
    np.testing.assert_array_equal(found.kept, np.concatenate([first[1], second[1]]))
    assert bits(bank.embeddings()) == bits(first[2]) + bits(second[2])
    assert bank.references(range(7)) == first[3] + second[3]


def test_every_kind_of_place_keeps_the_same_bank(tmp_path):
    context = ts.Context()
    for url, shared in (
        (str(tmp_path / "a path"), None),
        (f"file://{tmp_path}/url", None),
        ("memory://bank", context),
    ):
        made = written(url, context=shared)
        bank = Bank.open(url, identity=IDENTITY, context=shared)
        assert bits(bank.read([4, 0]).memories) == bits(made.read([4, 0]).memories)
        assert bank.verify().ok


def test_ids_may_come_in_any_order_shape_and_number(tmp_path):
    bank = written(tmp_path, counts=(3, 2, 4))
    whole = bank.read(np.arange(9))
    ids = np.array([[8, 0, 3], [3, 3, 7]])
    found = bank.read(ids)
    assert found.memories.shape == (2, 3, *SHAPE)
    assert bits(found.memories) == bits(whole.memories[ids])
    np.testing.assert_array_equal(found.kept, whole.kept[ids])
    assert bank.read([]).memories.shape == (0, *SHAPE)


def test_a_negative_id_reads_as_an_empty_memory(tmp_path):
    bank = written(tmp_path)
    found = bank.read(np.array([-1, 2, -7]))
    assert not bits(found.memories[[0, 2]]).strip(b"\0")
    np.testing.assert_array_equal(found.kept[[0, 2]], 0)
    assert bits(found.memories[1]) == bits(bank.read([2]).memories)


def test_an_id_past_the_end_is_an_error(tmp_path):
    bank = written(tmp_path)
    with pytest.raises(BankError, match="has 5 references; there is no 5"):
        bank.read([5])
    for row in (5, -1):
        with pytest.raises(BankError, match="has 5 references"):
            bank.reference(row)


def test_an_empty_bank_has_nothing_and_says_so(tmp_path):
    Bank.create(tmp_path, spec=SPEC)
    bank = Bank.open(tmp_path)
    assert len(bank) == 0 and bank.embeddings().shape == (0, DIM)
    assert bits(bank.read([-1]).memories) == bytes(bank.spec.bytes_per_reference)
    assert bank.verify().ok


def test_a_reference_of_the_published_model_takes_450560_bytes(tmp_path):
    shape = (22, 2, 8, 8, 80)
    spec = replace(SPEC, memory_shape=shape)
    assert spec.bytes_per_reference == 450_560
    bank = Bank.create(tmp_path, spec=spec)
    memories, *rest = contents(3, shape=shape)
    memories[1] = 0  # zeros take their place like any other content
    bank.append(memories, *rest)
    [data] = [path for path in files_of(tmp_path) if "/memories/c/" in path]
    index = 3 * 16 + 4  # offset and length of each inner chunk, and a checksum
    chunk = 450_560 + 4  # and a checksum of each memory
    assert (tmp_path / data).stat().st_size == 3 * chunk + index
    content = (tmp_path / data).read_bytes()
    assert content[2 * chunk : 3 * chunk - 4] == bits(memories[2])


def test_texts_of_every_kind_come_back_unchanged(tmp_path):
    texts = ["", "line\nbreak\r\n", "\u2028 \x1c", "数学 é 🙂", "\ud800 alone", '"quoted" \\']
    memories, kept, embeddings, _ = contents(len(texts))
    references = [StoredReference(text, "s", 1) for text in texts]
    Bank.create(tmp_path, spec=SPEC).append(memories, kept, embeddings, references)
    assert Bank.open(tmp_path).references(range(len(texts))) == references


def test_what_does_not_fit_the_bank_is_refused(tmp_path):
    bank = written(tmp_path, counts=(2,))
    memories, kept, embeddings, references = contents(2, seed=3)
    wrong = [
        ((memories[..., :3], kept, embeddings, references), "memories have shape"),
        ((memories, kept, embeddings[:, :4], references), "embeddings have shape"),
        ((memories, kept, embeddings, references[:1]), "have shape"),
        ((memories.astype(np.float32), kept, embeddings, references), "are float32"),
        ((memories, kept + 4, embeddings, references), "kept must lie between 0 and 3"),
        ((memories, kept, embeddings * np.nan, references), "not finite"),
        (tuple(part[:0] for part in (memories, kept, embeddings, references)), "empty"),
    ]
    for arguments, message in wrong:
        with pytest.raises(BankError, match=message):
            bank.append(*arguments)
    assert len(Bank.open(tmp_path)) == 2
    with pytest.raises(BankError, match="not open for writing"):
        Bank.open(tmp_path).append(memories, kept, embeddings, references)
    for change in ({"memory_shape": (1, 3, 1, 1, 1)}, {"dtype": "int8"}, {"embedding_dim": 0}):
        with pytest.raises(BankError, match=next(iter(change))):
            replace(SPEC, **change)


def test_a_bank_is_not_made_over_another(tmp_path):
    written(tmp_path)
    with pytest.raises(BankError, match="a bank at .* already"):
        Bank.create(tmp_path, spec=SPEC)


def test_a_bank_of_another_model_names_both_hashes(tmp_path):
    written(tmp_path)
    other = replace(IDENTITY, model_hash="0ther", config_hash="c1")
    with pytest.raises(BankError) as caught:
        Bank.open(tmp_path, identity=other)
    message = str(caught.value)
    for part in ("model of the bank is m0del, yours is 0ther", "c0nfig", "c1", "write the bank"):
        assert part in message
    assert "tokenizer" not in message and "\n" not in message


def test_no_bank_and_a_damaged_header_are_one_clear_error(tmp_path):
    with pytest.raises(BankError, match="header.json is missing"):
        Bank.open(tmp_path / "nothing")
    written(tmp_path)
    header = tmp_path / "header.json"
    content = header.read_bytes()
    header.write_bytes(content[: len(content) // 2])
    with pytest.raises(BankError, match="header.json is damaged"):
        Bank.open(tmp_path)
    header.write_bytes(content.replace(b'"count": 3', b'"count": 4'))
    with pytest.raises(BankError, match="checksum does not match"):
        Bank.open(tmp_path)
    header.write_text(json.dumps({**json.loads(content), "version": 99}))
    with pytest.raises(BankError, match="version 99; this jaxlab reads .* versions 2 and 3"):
        Bank.open(tmp_path)


@pytest.mark.parametrize(
    "kind",
    ["memories/c", "memories/zarr", "kept", "embeddings", "jsonl", "lines", "source/", "sources"],
)
def test_a_flipped_bit_is_found_and_its_shard_named(tmp_path, kind):
    written(tmp_path)
    assert Bank.open(tmp_path).verify().ok
    paths = [p for p in files_of(tmp_path) if kind in p]
    assert paths
    for path in paths:
        content = bytearray((tmp_path / path).read_bytes())
        content[len(content) // 2] ^= 4
        (tmp_path / path).write_bytes(content)
        report = Bank.open(tmp_path).verify()
        shard = path.split("/")[1]
        assert (report.damaged, report.missing) == ((shard,), ()) and not report.ok
        assert path in report.problems[0]
        content[len(content) // 2] ^= 4
        (tmp_path / path).write_bytes(content)


def test_a_memory_or_text_with_a_flipped_bit_is_not_read(tmp_path):
    bank = written(tmp_path)
    for name, read in (
        ("memories", lambda b: b.read([3])),
        ("references", lambda b: b.reference(3)),
        ("lines", lambda b: b.reference(3)),
        ("source/", lambda b: b.rows_of([])),
        ("sources", lambda b: b.sources()),
    ):
        (path,) = (
            path
            for path in (tmp_path / "shards" / bank.shards[1].name).rglob("*")
            if path.is_file() and name in str(path) and path.name != "zarr.json"
        )
        content = path.read_bytes()
        for place in (3, len(content) // 3):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            opened = Bank.open(tmp_path)
            with pytest.raises(BankError, match="cannot be read .*jaxlab memory verify"):
                read(opened)
        path.write_bytes(content)
        read(Bank.open(tmp_path))


def test_a_lost_file_is_named_by_verify_and_by_whoever_reads_it(tmp_path):
    name = written(tmp_path).shards[1].name
    for path in files_of(tmp_path / "shards" / name):
        file = tmp_path / "shards" / name / path
        content = file.read_bytes()
        file.unlink()
        bank = Bank.open(tmp_path)
        report = bank.verify()
        assert (report.missing, report.damaged) == ((name,), ())
        with pytest.raises(BankError, match=f"shard {name} .*jaxlab memory verify"):
            bank.read([4]), bank.embeddings(), bank.reference(4), bank.sources()
        assert bank.read([2]).memories.shape == (1, *SHAPE)
        file.write_bytes(content[:-1])
        assert Bank.open(tmp_path).verify().damaged == (name,)
        file.write_bytes(content)
    assert Bank.open(tmp_path).verify().ok


def test_one_memory_is_one_request_and_none_when_it_was_just_read(tmp_path):
    written(tmp_path)
    bank = Bank.open(tmp_path)
    bank.read([0, 3])

    counts = []
    for row in (1, 1, 2, 4):
        bank.read([row])
        (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/batch_read")
        counts.append(metric["values"][0]["value"])
    assert np.diff(counts).tolist() == [0, 1, 1]


def test_a_reader_sees_the_bank_as_it_was_opened(tmp_path):
    writer = written(tmp_path)
    reader = Bank.open(tmp_path)
    writer.append(*contents(2, seed=5))
    assert len(reader) == 5 and len(Bank.open(tmp_path)) == 7
    assert reader.read([0]).memories.shape == (1, *SHAPE)


def test_the_embedder_travels_with_the_bank_and_is_verified(tmp_path):
    fitted = LsaEmbedder.fit(["one reference", "another reference"], dim=32)
    spec = replace(SPEC, embedder="lsa", embedding_dim=32)
    Bank.create(tmp_path, spec=spec, embedder_state=fitted.to_bytes())
    bank = Bank.open(tmp_path)
    np.testing.assert_array_equal(bank.embedder().embed(["another"]), fitted.embed(["another"]))
    (file,) = (tmp_path / "embedder").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert bank.verify().damaged == ("embedder",)
    with pytest.raises(BankError, match=r"embedder/[\w-]+ is damaged"):
        bank.embedder()


def test_stats_are_plain_json(tmp_path):
    bank = written(tmp_path)
    for encoded in range(3):
        if encoded == 1:
            memories, _, embeddings, references = contents(3, seed=7)
            bank.append_cold(embeddings, references)
        if encoded:
            bank.warm(np.array([5, 7][:encoded]), memories[[0, 2][:encoded]])
        stats = json.loads(json.dumps(bank.stats()))
        assert stats["references"] == (8 if encoded else 5)
        assert stats["shards"] == (3 if encoded else 2)
        sizes = [p.stat().st_size for p in tmp_path.glob("shards/**/*") if p.is_file()]
        assert stats["bytes"] == sum(sizes)
    assert stats["bytes_per_reference"] == 2 * 2 * 2 * 3 * 4 * 2
    assert stats["identity"]["model_hash"] == "m0del"
