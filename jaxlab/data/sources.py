"""Documents from where they lie: files, folders, TFDS, invented facts, installed documentation."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlab.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tokens")
COMPRESSIONS = (".gz", ".xz", ".zst")
_SPEC_HELP = (
    "write 'installed-docs', a path to a file or folder, 'facts:SEED[:COUNT]' or "
    "'tfds:NAME[:SPLIT]'"
)


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the name by which it is split, cited and traced."""

    id: str
    text: str


def load_documents(spec: str, *, limit_bytes: int | None = None) -> list[Document]:
    """Read the documents that ``spec`` names, in an order that does not change between runs.

    ``spec`` is ``installed-docs``, ``facts:SEED[:COUNT]``, ``tfds:NAME[:SPLIT]``, or the path of a
    text file, of a ``.jsonl`` file (objects with ``text`` and optionally ``id``), or of a folder
    that holds such files at any depth; files may be compressed (``.gz``, ``.xz``, ``.zst``).
    Documents of white space alone are left out. With ``limit_bytes`` reading ends with the
    document that brings the total (UTF-8) to the limit. Raises DataError.
    """
    if limit_bytes is not None and limit_bytes <= 0:
        raise DataError(f"limit_bytes is {limit_bytes}: give a positive number of bytes or none")
    documents: list[Document] = []
    total = 0
    for document in _documents(spec):
        if not document.text.strip():
            continue
        documents.append(document)
        if limit_bytes is not None:
            total += len(document.text.encode())
            if total >= limit_bytes:
                break
    if not documents:
        raise DataError(f"corpus {spec!r} holds no text: check that its files are not empty")
    return documents


def split_documents(
    documents: Sequence[Document], *, validation_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split into (training, validation); the side of a document depends on its id and seed alone.

    Raises DataError when the fraction is not inside (0, 1) or one side would be empty.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise DataError(
            f"validation_fraction is {validation_fraction}: it must lie between 0 and 1"
        )
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        digest = hashlib.sha256(f"{seed}\0{document.id}".encode()).digest()
        sides[int.from_bytes(digest[:8]) < validation_fraction * 2**64].append(document)
    for side, name in zip(sides, ("training", "validation"), strict=True):
        if not side:
            raise DataError(
                f"no document of {len(documents)} falls on the {name} side with "
                f"validation_fraction={validation_fraction}, seed={seed}: "
                "use more documents, another fraction or another seed"
            )
    return sides


def corpus_hash(documents: Sequence[Document]) -> str:
    """SHA-256 (hex) over ids and texts in order; lengths are hashed too, so nothing can shift."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.id.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
    return digest.hexdigest()


def _documents(spec: str) -> Iterator[Document]:
    if spec == "installed-docs":
        from jaxlab.data import installed

        return installed.installed_documents()
    if spec.startswith("facts:"):
        return iter(_facts(spec))
    if spec.startswith("tfds:"):
        return _tfds(spec)
    return _files(spec)


def _facts(spec: str) -> list[Document]:
    numbers = spec.split(":")[1:]
    if len(numbers) not in (1, 2) or not all(n.isascii() and n.isdigit() for n in numbers):
        raise DataError(
            f"corpus {spec!r} is not understood: write 'facts:SEED' or 'facts:SEED:COUNT'"
        )
    from jaxlab.data import facts

    return facts.fact_documents(*map(int, numbers))


# Files and folders


def _files(spec: str) -> Iterator[Document]:
    path = Path(spec).expanduser()
    if path.is_file():
        if _kind(path) is None:
            known = ", ".join((*TEXT_SUFFIXES, ".jsonl"))
            raise DataError(f"{path}: unknown kind of file; known are {known}, also compressed")
        yield from _file(path, path.name)
    elif path.is_dir():
        found = sorted(
            (p.relative_to(path).as_posix(), p) for p in path.rglob("*") if p.is_file() and _kind(p)
        )
        if not found:
            known = ", ".join((*TEXT_SUFFIXES, ".jsonl"))
            raise DataError(f"{path}: the folder holds no corpus file ({known}): add one")
        for name, file in found:
            yield from _file(file, name)
    else:
        raise DataError(f"corpus {spec!r}: no such file or folder; {_SPEC_HELP}")


def _kind(path: Path) -> str | None:
    """``text`` or ``jsonl`` by the suffix that is left when a compression's is taken off."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    if name.endswith(".jsonl"):
        return "jsonl"
    return "text" if name.endswith(TEXT_SUFFIXES) else None


def _file(path: Path, name: str) -> Iterator[Document]:
    try:
        with _open(path) as stream:
            if _kind(path) == "jsonl":
                yield from _json_lines(stream, path, name)
            else:
                yield Document(name, _decode(stream.read(), path, offset=0))
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error}): replace the file") from error


def _open(path: Path) -> io.BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)
    if suffix == ".xz":
        return lzma.open(path)
    if suffix == ".zst":
        return _open_zst(path)
    return path.open("rb")


def _open_zst(path: Path) -> io.BufferedIOBase:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path}: reading .zst needs the package zstandard: install it") from error

    class Reader(io.RawIOBase):
        """The package's reader with its own exception turned into an OSError."""

        def __init__(self) -> None:
            self.file = path.open("rb")
            self.inner = zstandard.ZstdDecompressor().stream_reader(
                self.file, read_across_frames=True, closefd=True
            )

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                return self.inner.readinto(buffer)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error

        def close(self) -> None:
            self.inner.close()
            super().close()

    return io.BufferedReader(Reader())


def _decode(data: bytes, path: Path, *, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {offset + error.start}: convert the file to UTF-8"
        ) from error


def _json_lines(stream: io.BufferedIOBase, path: Path, name: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        text = _decode(line, path, offset=offset)
        offset += len(line)
        if text.strip():
            yield _json_document(text, f"{path}, line {number}", f"{name}:{number}")


def _json_document(line: str, where: str, default_id: str) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: broken JSON ({error.msg}, column {error.colno}): repair or remove the line"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f"{where}: 'text' is missing or not a string: give each object a 'text'")
    identity = record.get("id", default_id)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise DataError(f"{where}: 'id' is neither a string nor a whole number: change or drop it")
    document = Document(str(identity), record["text"])
    try:
        f"{document.id}{document.text}".encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a surrogate pair in a string: repair the \\u escape"
        ) from error
    return document


# TensorFlow Datasets, without TensorFlow


def _tfds(spec: str) -> Iterator[Document]:
    name, split = _tfds_name(spec)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"corpus {spec!r} needs tensorflow-datasets: install it") from error
    try:
        builder = tfds.builder(name, file_format="array_record")
        source = builder.as_data_source(split=split)
    except Exception as error:  # TFDS raises many kinds here, most of them several lines long
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"corpus {spec!r}: TFDS cannot give it ({reason}): prepare it with "
            f"`tfds build {name} --file_format=array_record`, or correct the name or the split"
        ) from error
    key = _text_feature(builder.info.features, spec)
    for index in range(len(source)):
        text = source[index][key]
        text = _decode(text, Path(spec), offset=0) if isinstance(text, bytes) else str(text)
        yield Document(f"{name}/{split}:{index}", text)


def _tfds_name(spec: str) -> tuple[str, str]:
    match = re.fullmatch(r"tfds:((?:huggingface:)?[^:]+(?::\d+\.\d+\.\d+)?)(?::([^:].*))?", spec)
    if match is None:
        raise DataError(f"corpus {spec!r} is not understood: write 'tfds:NAME[:SPLIT]'")
    return match[1], match[2] or "train"


def _text_feature(features: Any, spec: str) -> str:
    names = [k for k, f in dict(features).items() if type(f).__name__ == "Text"]
    if "text" in names:
        return "text"
    if len(names) == 1:
        return names[0]
    found = f"has several ({', '.join(names)})" if names else "has none"
    raise DataError(f"corpus {spec!r}: one text feature is needed, the dataset {found}")
