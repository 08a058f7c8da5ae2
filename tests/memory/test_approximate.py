"""Laws of approximate search, and of the index that is stored with a bank."""

import dataclasses
import json

import faiss
import numpy as np
import pytest

from jaxlab.cli import main
from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.approximate import (
    RAM_BYTES,
    ApproximateIndex,
    exact_hits,
    fitting_name,
    index_name,
    recall,
)
from jaxlab.memory.embedders import unit_rows
from jaxlab.memory.indexing import build_index, open_index
from jaxlab.memory.lsa import LsaEmbedder
from jaxlab.memory.retrieve import Allowed, FlatIndex
from jaxlab.memory.store import Bank
from tests.memory.stored import SPEC, contents

ROWS, DIM, LISTS = 800, 16, 16
DRAWS = np.random.default_rng(0)
VECTORS = unit_rows(DRAWS.standard_normal((ROWS, DIM)) + 2 * DRAWS.standard_normal(DIM))
VECTORS[700:710] = VECTORS[3]  # equal scores
QUERIES = unit_rows(VECTORS[:40] + 0.3 * DRAWS.standard_normal((40, DIM)))


def blocks(size=170):
    for start in range(0, ROWS, size):
        yield start, VECTORS[start : start + size]


def fitted(kind="Flat", **options) -> ApproximateIndex:
    return ApproximateIndex.fit(blocks, f"IVF{LISTS},{kind}", rows=ROWS, dim=DIM, **options)


@pytest.fixture(scope="module")
def flat():
    return FlatIndex(VECTORS)


def same(found, wanted):
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-6)


def test_looking_into_all_lists_of_whole_rows_is_exact_search(flat):
    same(fitted(probes=LISTS).search(QUERIES, 7), flat.search(QUERIES, 7))


def test_a_query_finds_the_same_alone_and_with_any_number_of_threads():
    for kind in ("Flat", "SQ8", "PQ8"):
        index = fitted(kind, probes=3)
        together = index.search(QUERIES, 5)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            alone = [index.search(QUERIES[row : row + 1], 5) for row in range(len(QUERIES))]
        finally:
            faiss.omp_set_num_threads(threads)
        for part in (0, 1):
            np.testing.assert_array_equal(together[part], np.concatenate([a[part] for a in alone]))


def test_only_allowed_rows_are_found_and_of_them_the_nearest(flat):
    allowed = np.random.default_rng(1).random(ROWS) < 0.1
    rows = np.flatnonzero(allowed)
    some = FlatIndex(VECTORS[rows]).search(QUERIES, 6)
    for index in (flat, fitted(probes=LISTS)):
        found = index.search(QUERIES, 6, allowed=Allowed(allowed))
        np.testing.assert_array_equal(found.ids, rows[some.ids])
        np.testing.assert_allclose(found.scores, some.scores, atol=1e-6)
    few = np.zeros(ROWS, bool)
    few[[5, 70]] = True
    for index in (flat, fitted(probes=LISTS)):
        found = index.search(QUERIES, 6, allowed=Allowed(few))
        assert {frozenset(row) for row in found.ids.tolist()} == {frozenset((5, 70, -1))}
        assert (flat.search(QUERIES, 6, allowed=Allowed(np.zeros(ROWS, bool))).ids == -1).all()


@pytest.mark.parametrize("count", [1, 5, 90, 400])
def test_all_of_few_allowed_rows_are_found_however_few_lists_a_search_looks_into(flat, count):
    """Few rows lie in few lists, or in those that are far from the query."""
    index = fitted(probes=2)
    far = np.argsort(VECTORS @ QUERIES[0])[:count]
    for rows in (far, np.random.default_rng(count).choice(ROWS, count, replace=False)):
        mask = np.zeros(ROWS, bool)
        mask[rows] = True
        found = index.search(QUERIES, 5, allowed=Allowed(mask))
        assert ((found.ids >= 0).sum(axis=1) == min(5, count)).all()
        assert mask[found.ids[found.ids >= 0]].all()
        if count * LISTS <= 2 * ROWS:  # then it is an exact search
            same(found, flat.search(QUERIES, 5, allowed=Allowed(mask)))


def test_rows_may_be_added_in_any_blocks_and_later(flat):
    grown = FlatIndex.of(blocks(33), DIM)
    same(grown.search(QUERIES, 5), flat.search(QUERIES, 5))
    part = FlatIndex(VECTORS[:100])
    part.add(VECTORS[100:])
    same(part.search(QUERIES, 5), flat.search(QUERIES, 5))
    with pytest.raises(BankError, match="reference 800 is not finite"):
        part.add(np.full((2, DIM), np.nan, np.float32))


def test_exact_hits_in_blocks_are_exact_search(flat):
    for size in (3, 170, ROWS):
        same(exact_hits(lambda size=size: blocks(size), QUERIES, 5), flat.search(QUERIES, 5))


def test_recall_is_of_what_exact_search_finds_and_grows_with_probes(flat):
    exact = flat.search(QUERIES, 5)
    assert recall(exact, exact) == 1.0
    half = exact._replace(ids=exact.ids.copy())
    half.ids[:, 2:] = -1
    assert recall(half, exact) == pytest.approx(0.4)
    shares = [recall(fitted("SQ8", probes=n).search(QUERIES, 5), exact) for n in (1, 4, LISTS)]
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.97


@pytest.mark.parametrize("kind", ["Flat", "SQ8", "PQ8"])
def test_a_stored_index_finds_the_same_bit_for_bit(tmp_path, kind):
    index = fitted(kind, probes=3)
    index.to_file(tmp_path / "index")
    bank = bank_of(tmp_path)
    record = build_index(bank, f"IVF{LISTS},{kind}", probes=3)
    assert record.rows == ROWS
    for grows in (False, True):
        noted = bank.index_record
        again = ApproximateIndex.from_file(tmp_path / "index", noted, url="b", grows=grows)
        for ours, theirs in zip(index.search(QUERIES, 5), again.search(QUERIES, 5), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_index_is_chosen_by_the_room_that_the_embeddings_take():
    assert index_name(RAM_BYTES // 4 // 512, 512) == "Flat"
    assert index_name(1_100_000, 512) == "IVF4096,SQ8"
    assert index_name(110_000_000, 1024) == "IVF32768,PQ128"


@pytest.mark.parametrize("rows", [39, 77, 78, 406, ROWS])
def test_the_index_that_is_proposed_can_be_made_of_so_few(rows):
    def some():
        yield 0, VECTORS[:rows]

    assert len(ApproximateIndex.fit(some, fitting_name(rows), rows=rows, dim=DIM)) == rows
    assert fitting_name(38) is None and fitting_name(10**9) == "IVF65536,SQ8"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("HNSW32", "is none of Flat, IVFn"),
        ("IVF16,PQ0", "is none of Flat, IVFn"),
        ("IVF16,PQ5", "5 parts do not divide the dimension 16"),
        (
            "IVF21,Flat",
            "21 lists are trained on 819 references or more, the bank has 800: .* as IVF16,SQ8",
        ),
    ],
)
def test_what_cannot_be_built_is_an_error(name, message):
    with pytest.raises(ConfigError, match=message):
        ApproximateIndex.fit(blocks, name, rows=ROWS, dim=DIM)


def test_codes_of_fewer_rows_than_their_centroids_are_refused():
    def some():
        yield 0, VECTORS[:255]

    with pytest.raises(ConfigError, match="256 references or more, the bank has 255: .* IVF4,SQ8"):
        ApproximateIndex.fit(some, "IVF2,PQ4", rows=255, dim=DIM)


def bank_of(folder, rows=ROWS) -> Bank:
    texts = [f"word{row} and word{row * 7 % 97} of {row % 13}" for row in range(rows)]
    embedder = LsaEmbedder.fit(texts, dim=32)
    spec = dataclasses.replace(SPEC, embedder="lsa", embedding_dim=32)
    bank = Bank.create(folder / "bank", spec=spec, embedder_state=embedder.to_bytes())
    for start in range(0, rows, 300):
        some = texts[start : start + 300]
        memories, kept, _, references = contents(len(some), seed=start)
        references = [
            dataclasses.replace(one, text=text) for one, text in zip(references, some, strict=True)
        ]
        bank.append(memories, kept, embedder.embed(some), references)
    return bank


def test_a_bank_is_searched_through_its_index_and_grows_with_it(tmp_path):
    bank = bank_of(tmp_path)
    exact = open_index(bank)
    assert isinstance(exact, FlatIndex)
    report = build_index(bank, "IVF16,Flat", probes=16)
    assert report.recall_at_5 == 1.0 and report.rows == ROWS
    queries = bank.embeddings()[::37]
    reader = Bank.open(tmp_path / "bank")
    index = open_index(reader)
    assert isinstance(index, ApproximateIndex)
    same(index.search(queries, 4), exact.search(queries, 4))
    assert json.loads(json.dumps(reader.stats()))["index"]["name"] == "IVF16,Flat"
    assert reader.verify().ok

    memories, kept, _, references = contents(3, seed=9)
    added = bank.embeddings()[:3]
    bank.append(memories, kept, added, references)
    index = open_index(Bank.open(tmp_path / "bank"))
    assert len(index) == ROWS + 3
    assert {ROWS, 0} <= set(index.search(added[:1], 2).ids[0].tolist())


def test_an_index_is_found_at_an_address_with_escapes(tmp_path):
    bank = bank_of(tmp_path / "my notes")
    build_index(bank, "IVF16,SQ8")
    escaped = f"file://{tmp_path}/my%20notes/bank"
    assert isinstance(open_index(Bank.open(escaped)), ApproximateIndex)


def test_an_index_that_is_damaged_or_of_another_bank_is_not_used(tmp_path):
    bank = bank_of(tmp_path)
    build_index(bank, "IVF16,SQ8")
    (path,) = (tmp_path / "bank" / "index").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(BankError, match="damaged or missing; make the index again with `jaxlab m"):
        open_index(Bank.open(tmp_path / "bank"))
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(BankError, match="damaged or missing; make the index again with `jaxlab m"):
        open_index(Bank.open(tmp_path / "bank"))
    problems = Bank.open(tmp_path / "bank").verify().problems
    assert len(problems) == 1 and problems[0].startswith("index: index/")
    path.write_bytes(content)
    record = dataclasses.replace(bank.index_record, bank="0" * 64)
    bank.keep_index(content, record)
    with pytest.raises(BankError, match="its index is of other references"):
        open_index(bank)


def test_a_damaged_index_is_made_again_of_its_kind_though_the_bank_needs_none(tmp_path):
    bank = bank_of(tmp_path)
    build_index(bank, "IVF16,SQ8", probes=3)
    (path,) = (tmp_path / "bank" / "index").iterdir()
    path.write_bytes(b"damaged")
    again = build_index(Bank.open(tmp_path / "bank", write=True))
    assert (again.name, again.probes) == ("IVF16,SQ8", 3)
    assert isinstance(open_index(Bank.open(tmp_path / "bank")), ApproximateIndex)


def test_what_is_stored_as_an_index_and_is_none_is_an_error(tmp_path):
    bank = bank_of(tmp_path)
    build_index(bank, "IVF16,SQ8")
    bank.keep_index(b"no index", bank.index_record)
    with pytest.raises(BankError, match="its index is damaged"):
        open_index(bank)


@pytest.mark.parametrize("spoilt", [False, True])
def test_repair_takes_an_index_of_lost_rows_away_and_says_so(tmp_path, spoilt):
    bank = bank_of(tmp_path)
    memories, kept, _, references = contents(3, seed=9)
    bank.append(memories, kept, bank.embeddings()[:3], references)
    last = {"sound": tmp_path / "bank" / bank.shards[-1].folder}
    build_index(bank, "IVF16,SQ8")
    bank.append(memories, kept, bank.embeddings()[:3], references)
    last["later"] = tmp_path / "bank" / bank.shards[-1].folder
    if spoilt:
        (index,) = (tmp_path / "bank/index").iterdir()
        index.write_bytes(b"")
    for folder in (last["later"], last["sound"]):
        (folder / "references.jsonl").write_bytes(b"")
        done = Bank.open(tmp_path / "bank", write=True).repair(set_aside=True)
        gone = folder == last["sound"]
        assert len(done.set_aside) == 1 and done.index_gone == gone
        assert bool(done.problems) == (spoilt and not gone)
        after = Bank.open(tmp_path / "bank")
        if gone or not spoilt:
            assert after.verify().ok
            assert isinstance(open_index(after), FlatIndex if gone else ApproximateIndex)
    assert not list((tmp_path / "bank/index").iterdir())


def test_the_command_that_compacts_says_that_the_index_went(tmp_path, capsys):
    bank = bank_of(tmp_path)
    bank.compact()
    build_index(bank, "IVF16,SQ8")
    words = ["memory", "compact", "--bank", str(tmp_path / "bank")]
    assert main(words) == 0 and "index" not in capsys.readouterr().err
    Bank.open(tmp_path / "bank", write=True).delete(rows=[1])
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "its index was of other rows and is gone" in said
    _, cure, _ = said.split("`")
    assert main([*cure.split()[1:], "--bank", str(tmp_path / "bank")]) == 0
    assert Bank.open(tmp_path / "bank").index_record.name == "IVF16,SQ8"


def test_a_new_index_takes_the_place_of_the_old_and_compaction_takes_it_away(tmp_path):
    bank = bank_of(tmp_path)
    for kind in ("Flat", "SQ8"):
        build_index(bank, f"IVF16,{kind}")
        assert len(list((tmp_path / "bank" / "index").iterdir())) == 1
    bank.delete(rows=[1])
    assert bank.index_record.name == "IVF16,SQ8"
    bank.compact()
    assert bank.index_record is None and bank.verify().ok
    with pytest.raises(ConfigError, match="799 references are few enough .* --kind IVF16,SQ8 "):
        build_index(bank)
