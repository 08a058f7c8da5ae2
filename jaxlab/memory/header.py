"""The header of a memory bank: what was stored, by which model, and the checksum of every file."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import ml_dtypes
import numpy as np

from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.rate import Rate

FORMAT = "jaxlab-memory-bank"
VERSION = 3
HEADER_FILE = "header.json"
# Objects that the header lists by themselves, each in a folder of this name.
ALONE = ("embedder", "codec", "deleted", "index")
DTYPES = ("bfloat16", "float16", "float32")


def cure_of(owner: str) -> str:
    """What to do about a damaged header, or an object that it lists by itself."""
    if owner == "index":
        return "make the index again with `jaxlab memory index`"
    anew = "quantize again" if owner == "codec" else "write the bank anew"
    return f"restore it from a copy, or {anew} at another place"


@dataclass(frozen=True)
class BankIdentity:
    """What must be the same when a bank is read as when it was written."""

    model_hash: str
    tokenizer_hash: str
    config_hash: str

    def require(self, wanted: "BankIdentity", *, url: str) -> None:
        """Raise BankError naming both hashes of each part in which ``wanted`` differs."""
        differences = [
            f"the {field.name.removesuffix('_hash')} of the bank is {ours}, yours is {theirs}"
            for field in fields(self)
            if (ours := getattr(self, field.name)) != (theirs := getattr(wanted, field.name))
        ]
        if differences:
            raise BankError(
                f"bank {url} belongs to another model: {'; '.join(differences)}; load the model"
                " that wrote it, or write the bank with this one at another place"
            )


@dataclass(frozen=True)
class BankSpec:
    """What every reference of a bank has in common.

    ``memory_shape`` is (memory layers, 2, kv heads, tokens kept, head dim); axis 1 is key, value.
    With a ``codec`` (its name) each vector is stored as a code; ``dtype`` is then what the codes
    are decoded to. Raises BankError for a shape, dtype or codec no bank can have.
    """

    identity: BankIdentity
    memory_shape: tuple[int, int, int, int, int]
    embedder: str
    embedding_dim: int
    dtype: str = "bfloat16"
    chunk_length: int = 64
    references_per_chunk: int = 5
    reference_length: int = 128
    preface: tuple[int, ...] = ()
    codec: str | None = None

    def __post_init__(self) -> None:
        shape = tuple(int(size) for size in self.memory_shape)
        if len(shape) != 5 or min(shape) < 1 or shape[1] != 2:
            raise BankError(
                f"memory_shape is {shape}; expected (layers, 2, kv heads, tokens kept, head dim)"
            )
        if self.dtype not in DTYPES:
            raise BankError(f"dtype of a bank is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.embedding_dim < 1:
            raise BankError(f"embedding_dim is {self.embedding_dim}; it must be at least 1")
        if self.codec is not None and self._rate().dim != shape[-1]:
            raise BankError(
                f"codec {self.codec} is for vectors of {self._rate().dim} numbers, memory_shape"
                f" has {shape[-1]}"
            )
        object.__setattr__(self, "memory_shape", shape)
        object.__setattr__(self, "preface", tuple(int(token) for token in self.preface))

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of keys and values."""
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def stored_name(self) -> str:
        """The array that holds the memories: ``codes`` in a quantized bank."""
        return "codes" if self.codec else "memories"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one memory as stored."""
        return (*self.memory_shape[:-1], self._rate().bytes) if self.codec else self.memory_shape

    @property
    def stored_dtype(self) -> np.dtype:
        """Dtype of a memory as stored."""
        return np.dtype(np.uint8) if self.codec else self.numpy_dtype

    @property
    def bytes_per_reference(self) -> int:
        """Bytes of one memory: Memory³-2B has 450,560 in bfloat16, 39,424 quantized (§3.3)."""
        return math.prod(self.stored_shape) * self.stored_dtype.itemsize

    def _rate(self) -> Rate:
        try:
            return Rate(self.codec)
        except ConfigError as error:
            raise BankError(str(error)) from None


@dataclass(frozen=True)
class StoredFile:
    """Size and SHA-256 of one object."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "StoredFile":
        """The record of ``content``."""
        return cls(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    @classmethod
    def of_path(cls, path: str) -> "StoredFile":
        """The record of a local file, which need not fit into memory."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(bytes=file.tell(), sha256=digest)


@dataclass(frozen=True)
class Shard:
    """An immutable run of references: rows ``start`` to ``start + count - 1`` of the bank.

    Memories of a ``cold`` one are objects of their own, not in ``files``, written when first read.
    """

    name: str
    start: int
    count: int
    files: dict[str, StoredFile]
    cold: bool = False

    @property
    def folder(self) -> str:
        """Where its objects lie in the bank, with a slash at the end."""
        return f"shards/{self.name}/"

    def to_json(self) -> str:
        """As one line, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Shard":
        """What :meth:`to_json` said."""
        return cls.of(json.loads(text))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Shard":
        """From the plain values of a header's JSON."""
        files = {name: StoredFile(**file) for name, file in values["files"].items()}
        return cls(**{**values, "files": files})


@dataclass(frozen=True)
class PlacedFile:
    """An object that the header lists by itself, under a key that only its writer uses."""

    key: str
    file: StoredFile

    @classmethod
    def of_version_2(cls, name: str, file: StoredFile) -> "PlacedFile":
        """Where banks of version 2 have it."""
        fixed = {"embedder": "embedder/embedder.npz", "codec": "codec/codec.faiss"}
        return cls(fixed.get(name, f"{name}/{file.sha256[:16]}"), file)


@dataclass(frozen=True)
class LostShard:
    """Rows whose shard was damaged beyond repair; its objects lie where they lay, unread.

    ``living`` of its references had not been deleted (None: not known).
    """

    name: str
    start: int
    count: int
    living: int | None = None

    @property
    def references(self) -> int:
        """How many references were lost with it."""
        return self.count if self.living is None else self.living

    def __str__(self) -> str:
        return f"shard {self.name}: rows {self.start} to {self.start + self.count - 1}"


@dataclass(frozen=True)
class IndexRecord:
    """What a bank notes of its index: what it is of, and how much of an exact search it finds.

    ``bank`` is the fingerprint of the rows that are in it, ``recall_at_5`` the share of the five
    nearest that it found when it was built.
    """

    name: str
    rows: int
    probes: int
    recall_at_5: float
    bank: str


@dataclass(frozen=True)
class Header:
    """Everything in ``header.json``; a shard that is not listed here does not exist.

    ``writer`` changes whenever the bank is opened for writing, so that a former writer finds out.
    ``deleted_file`` lists the rows that were deleted, ``lost`` the shards that were set aside.
    """

    spec: BankSpec
    writer: str = ""
    embedder_file: PlacedFile | None = None
    codec_file: PlacedFile | None = None
    deleted_file: PlacedFile | None = None
    index_file: PlacedFile | None = None
    index: IndexRecord | None = None
    shards: tuple[Shard, ...] = ()
    lost: tuple[LostShard, ...] = ()

    @property
    def rows(self) -> int:
        """Row numbers in the bank, those of deleted references included."""
        return max((each.start + each.count for each in (*self.shards, *self.lost)), default=0)

    @property
    def names(self) -> set[str]:
        """Names of shards that are in use, or were and lie there still."""
        return {each.name for each in (*self.shards, *self.lost)}

    @property
    def next_number(self) -> int:
        """The number that the name of the next shard begins with."""
        return max((int(name.split("-")[0]) for name in self.names), default=-1) + 1

    def objects(self) -> list[tuple[str, str, StoredFile]]:
        """Every object but the header itself: whose it is, its key, its record."""
        found = [
            (f"shard {shard.name}", f"{shard.folder}{path}", record)
            for shard in self.shards
            for path, record in shard.files.items()
        ]
        alone = [(name, getattr(self, f"{name}_file")) for name in ALONE]
        return found + [(name, each.key, each.file) for name, each in alone if each is not None]

    def fingerprint(self, rows: int) -> str:
        """SHA-256 over the embeddings of the first ``rows``: what an index has to be of."""
        listed = [_embedded(shard) for shard in self.shards if shard.start < rows]
        listed += [(each.start, each.count) for each in self.lost if each.start < rows]
        return _sha256(json.dumps(listed))

    def continues(self, older: "Header") -> bool:
        """Whether the rows of ``older`` are the same here, but for those that were lost since."""
        lost = {(each.start, each.count) for each in self.lost}
        here = {json.dumps(_embedded(shard)) for shard in self.shards}
        return all((each.start, each.count) in lost for each in older.lost) and all(
            json.dumps(_embedded(shard)) in here or (shard.start, shard.count) in lost
            for shard in older.shards
        )

    def index_fits(self) -> bool:
        """Whether the index is of the rows that are here; True where there is none."""
        index = self.index
        if index is None:
            return True
        return index.rows <= self.rows and index.bank == self.fingerprint(index.rows)

    def with_shard(self, shard: Shard) -> "Header":
        """This header with one shard more."""
        return replace(self, shards=(*self.shards, shard))

    def to_bytes(self) -> bytes:
        """JSON, with a checksum of itself so that a damaged header cannot be believed."""
        # Every change writes all of it: ``asdict`` and an indent would take most of the time.
        text = _sorted({"format": FORMAT, "version": VERSION, **vars(self)})
        return f'{text[:-1]}, "checksum": "{_sha256(text)}"}}'.encode()

    @classmethod
    def from_bytes(cls, content: bytes, *, url: str) -> "Header":
        """Parse and check a header; raises one BankError for anything wrong with it."""
        try:
            body = json.loads(content)
            found = (body["format"], body["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(url, "it is not complete JSON") from error
        if found not in ((FORMAT, 2), (FORMAT, VERSION)):
            raise BankError(
                f"bank {url} has format {found[0]} version {found[1]}; this jaxlab reads {FORMAT}"
                f" versions 2 and {VERSION}: use the jaxlab that wrote it, or write the bank anew"
                " at another place"
            )
        if body.pop("checksum", None) != _sha256(_sorted(body)):
            raise _damaged(url, "its checksum does not match")
        try:
            return _parse(body)
        except (KeyError, TypeError) as error:
            raise _damaged(url, f"a field is missing or unknown: {error}") from error


def _embedded(shard: Shard) -> tuple[int, int, list[tuple[str, str]]]:
    """Which rows a shard has, and the checksums of their embeddings."""
    files = [(p, file.sha256) for p, file in shard.files.items() if p.startswith("embeddings/")]
    return shard.start, shard.count, sorted(files)


def _parse(body: dict[str, Any]) -> Header:
    spec = dict(body["spec"])
    spec["identity"] = BankIdentity(**spec["identity"])
    spec |= {name: tuple(spec[name]) for name in ("memory_shape", "preface")}
    files = {f"{name}_file": _placed(name, body[f"{name}_file"], body["version"]) for name in ALONE}
    index = body["index"]
    shards = [Shard.of(shard) for shard in body["shards"]]
    return Header(
        spec=BankSpec(**spec),
        writer=body["writer"],
        **files,
        index=IndexRecord(**index) if index else None,
        shards=tuple(shards),
        lost=tuple(LostShard(**each) for each in body["lost"]),
    )


def _placed(name: str, values: dict[str, Any] | None, version: int) -> PlacedFile | None:
    if values is None:
        return None
    if version == 2:
        return PlacedFile.of_version_2(name, StoredFile(**values))
    return PlacedFile(values["key"], StoredFile(**values["file"]))


def _sorted(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, default=vars)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(url: str, reason: str) -> BankError:
    return BankError(f"bank {url}: {HEADER_FILE} is damaged ({reason}); {cure_of('header')}")
