"""Laws of document sources, and one folder on disk for every way in which a corpus can be wrong."""

import gzip
import json
import lzma
import sys

import pytest
import zstandard

from jaxlab.data import installed
from jaxlab.data.sources import Document, corpus_hash, load_documents, split_documents
from jaxlab.errors import DataError


def write_lines(path, records, compress=lambda data: data):
    path.write_bytes(compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    return str(path)


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("zed")
    (tmp_path / "a.jsonl").write_text('{"id": "one", "text": "1"}\n\n{"text": "3"}\n')
    (tmp_path / "ignored.png").write_bytes(b"\xff")
    expected = [Document("one", "1"), Document("a.jsonl:3", "3"), Document("b/z.txt", "zed")]
    assert load_documents(str(tmp_path)) == expected


def in_two_frames(compress):
    """What appending to a compressed file gives."""
    return lambda data: compress(data[:100]) + compress(data[100:])


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", in_two_frames(gzip.compress)),
        (".xz", in_two_frames(lzma.compress)),
        (".zst", in_two_frames(zstandard.compress)),
    ],
)
def test_compression_does_not_change_the_documents(tmp_path, suffix, compress):
    records = [{"id": str(i), "text": f"text é {i}\n"} for i in range(50)]
    path = write_lines(tmp_path / f"c.jsonl{suffix}", records, compress)
    assert load_documents(path) == [Document(r["id"], r["text"]) for r in records]


def test_text_is_kept_to_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b" \r\n two  spaces \t\n")
    assert load_documents(str(tmp_path))[0].text == " \r\n two  spaces \t\n"


def test_the_limit_gives_a_beginning_of_the_whole(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [{"text": "x" * 10}] * 9)
    whole = load_documents(path)
    assert load_documents(path, limit_bytes=35) == whole[:4]
    assert load_documents(path, limit_bytes=10**9) == whole


def test_documents_of_white_space_are_left_out(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [{"text": " \n"}, {"text": "a"}])
    assert [d.text for d in load_documents(path)] == ["a"]


def corrupt_gzip(data):
    return gzip.compress(data)[:-12]


def corrupt_zst(data):
    return zstandard.compress(data)[:9] + b"\0" * 20


BROKEN = {
    "missing": (None, None, ["nowhere", "installed-docs"]),
    "empty": ("a.txt", b" \n", ["holds no text"]),
    "unknown_file": ("a.png", b"x", ["a.png", "unknown kind", ".jsonl"]),
    "not_utf8_text": ("a.txt", b"good\xff", ["a.txt", "byte 4", "UTF-8"]),
    "not_utf8_line": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ["a.jsonl", "byte 24"]),
    "broken_json": ("a.jsonl", b'{"text": "a"}\n\n{"text": ', ["a.jsonl", "line 3", "JSON"]),
    "no_text": ("a.jsonl", b'{"id": "a"}\n', ["a.jsonl", "line 1", "'text'"]),
    "text_not_a_string": ("a.jsonl", b'{"text": 3}\n', ["line 1", "'text'"]),
    "not_an_object": ("a.jsonl", b"[1]\n", ["line 1", "'text'"]),
    "bad_id": ("a.jsonl", b'{"text": "a", "id": null}\n', ["line 1", "'id'"]),
    "half_surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', ["line 1", "surrogate"]),
    "truncated_gzip": ("a.txt.gz", corrupt_gzip(b"text" * 99), ["a.txt.gz", "cannot be read"]),
    "not_xz": ("a.txt.xz", b"not compressed", ["a.txt.xz", "cannot be read"]),
    "not_zst": ("a.txt.zst", corrupt_zst(b"text" * 99), ["a.txt.zst", "cannot be read"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_corpus_is_one_line_that_says_where_and_what(tmp_path, case):
    name, data, fragments = BROKEN[case]
    path = tmp_path / (name or "nowhere")
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_documents(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert all(fragment in message for fragment in fragments), message


def test_a_folder_without_corpus_files_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no corpus file"):
        load_documents(str(tmp_path))


@pytest.mark.parametrize("spec", ["facts:", "facts:x", "facts:1:2:3", "tfds:", "no-such-thing"])
def test_a_spec_that_is_not_understood_is_an_error_that_shows_the_right_form(spec):
    with pytest.raises(DataError, match=r"write '|no such file"):
        load_documents(spec)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_is_not_positive_is_an_error(limit):
    with pytest.raises(DataError, match="limit_bytes"):
        load_documents("installed-docs", limit_bytes=limit)


def test_an_absent_zstandard_is_an_error_that_names_it(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "c.jsonl.zst", [{"text": "a"}], zstandard.compress)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"c\.jsonl\.zst.*zstandard"):
        load_documents(path)


# Installed documentation


def test_installed_documentation_begins_the_same_and_mixes_its_sources():
    part = load_documents("installed-docs", limit_bytes=150_000)
    more = load_documents("installed-docs", limit_bytes=300_000)
    assert more[: len(part)] == part
    origins = {document.id.split(".")[0].split(":")[0] for document in more}
    assert {"topic", "numpy"} <= origins
    assert len(origins) > 5
    assert len({document.id for document in more}) == len(more)


def test_docstrings_are_read_without_importing_and_copies_come_once(tmp_path):
    long = "Long words of documentation. " * 20
    (tmp_path / "m.py").write_text(
        f'raise SystemExit\nclass A:\n    """{long}"""\n    def f(self):\n        """{long}"""\n'
        '    def g(self):\n        """'
        + "A short one. " * 20
        + '"""\nasync def h():\n    """tiny"""\n'
    )
    (tmp_path / "bad.py").write_text("def (")
    seen = set()
    documents = installed._module("m", tmp_path / "m.py", seen)
    assert [d.id for d in documents] == ["m.A", "m:short"]
    assert "m.A.g\n\nA short one." in documents[1].text
    assert "tiny" not in documents[1].text
    assert installed._module("n", tmp_path / "m.py", seen) == []
    assert installed._module("bad", tmp_path / "bad.py", seen) == []


def test_tests_and_private_copies_are_not_documentation(tmp_path):
    for name in (
        "a.py",
        "__init__.py",
        "tests/b.py",
        "_vendor/c.py",
        "sub/d.py",
        "not-a-name/e.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert set(installed._modules_under(tmp_path, prefix="p.")) == {"p", "p.a", "p.sub.d"}


# Splitting and hashing


def numbered(count):
    return [Document(f"d{i}", f"text {i}") for i in range(count)]


def test_split_keeps_every_document_once_and_its_order():
    documents = numbered(300)
    train, validation = split_documents(documents, validation_fraction=0.2, seed=1)
    assert sorted(train + validation, key=documents.index) == documents
    assert train == [d for d in documents if d in train]
    assert 30 < len(validation) < 90


def test_the_side_of_a_document_does_not_depend_on_the_others():
    documents = numbered(300)
    _, validation = split_documents(documents, validation_fraction=0.2, seed=1)
    _, of_half = split_documents(documents[::2], validation_fraction=0.2, seed=1)
    assert of_half == [d for d in documents[::2] if d in validation]


def test_another_seed_gives_another_split():
    documents = numbered(300)
    assert (
        split_documents(documents, validation_fraction=0.2, seed=1)[1]
        != split_documents(documents, validation_fraction=0.2, seed=2)[1]
    )


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan"), 1e-9, 1 - 1e-9])
def test_a_split_with_an_empty_side_is_an_error(fraction):
    with pytest.raises(DataError, match="fraction"):
        split_documents(numbered(20), validation_fraction=fraction, seed=0)


def test_the_corpus_hash_sees_order_and_every_boundary():
    base = [Document("a", "bc"), Document("d", "e")]
    others = [base[::-1], base[:1], [Document("ab", "c"), base[1]], [base[0], Document("d", "f")]]
    hashes = [corpus_hash(documents) for documents in (base, *others)]
    assert len(set(hashes)) == len(hashes)
    assert corpus_hash(list(base)) == hashes[0]


# TFDS


def test_tfds_specs_are_read_as_name_version_and_split():
    from jaxlab.data.sources import _tfds_name

    assert _tfds_name("tfds:wiki") == ("wiki", "train")
    assert _tfds_name("tfds:wiki/en:test[:10%]") == ("wiki/en", "test[:10%]")
    name = "huggingface:wikitext/wikitext-103-raw-v1"
    assert _tfds_name(f"tfds:{name}") == (name, "train")
    assert _tfds_name(f"tfds:{name}:test") == (name, "test")
    assert _tfds_name("tfds:wiki:1.0.0") == ("wiki:1.0.0", "train")
    assert _tfds_name("tfds:wiki/en:1.0.0:test") == ("wiki/en:1.0.0", "test")


def test_an_absent_tfds_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match="tensorflow-datasets"):
        load_documents("tfds:ag_news_subset")


def test_tfds_gives_the_text_of_a_prepared_dataset(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class JaxlabToy(tfds.core.GeneratorBasedBuilder):
        """Two fields of text, of which one is called text."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = tfds.core.Path(__file__)

        def _info(self):
            text = tfds.features.Text()
            features = tfds.features.FeaturesDict({"title": text, "text": text})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {"title": "no", "text": f"body é {i}"}) for i in range(2))

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="tfds build jaxlab_toy"):
        load_documents("tfds:jaxlab_toy:test")
    JaxlabToy(file_format="array_record").download_and_prepare()
    texts = sorted(document.text for document in load_documents("tfds:jaxlab_toy:test"))
    assert texts == ["body é 0", "body é 1"]
    assert "tensorflow" not in sys.modules
    with pytest.raises(DataError, match=r"tfds:jaxlab_toy:train.*train") as caught:
        load_documents("tfds:jaxlab_toy:train")
    assert "\n" not in str(caught.value)
