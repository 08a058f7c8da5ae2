"""A shard as bytes: its arrays in zarr3, its texts as lines of JSON with a table of the lines."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tensorstore as ts

from jaxlab.errors import BankError
from jaxlab.memory.header import BankSpec

REFERENCES = "references.jsonl"
SOURCES = "sources.json"
MEMORIES = ("memories", "codes")


@dataclass(frozen=True)
class StoredReference:
    """One reference as text: where it came from and how many tokens it has.

    ``ids`` are its tokens where they are known: a text that was cut between tokens need not give
    the same ones again.
    """

    text: str
    source: str
    tokens: int
    ids: tuple[int, ...] = ()

    def to_line(self) -> bytes:
        """One line of JSON."""
        values = asdict(self)
        if not self.ids:
            del values["ids"]
        # ASCII escapes: no text can then hold a line break or a lone surrogate.
        return json.dumps(values).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "StoredReference":
        """What :meth:`to_line` wrote."""
        values = json.loads(line)
        return cls(**{**values, "ids": tuple(values.get("ids", ()))})


def shard_arrays(
    spec: BankSpec, memories: Any, kept: Any, embeddings: Any, count: int, *, url: str
) -> dict[str, np.ndarray]:
    """The arrays of a shard, by name; raises BankError for one that does not fit the bank."""
    arrays = {
        spec.stored_name: memories,
        "embeddings": np.ascontiguousarray(embeddings, np.float32),
        "kept": np.ascontiguousarray(kept, np.int32),
    }
    shapes = {
        spec.stored_name: (count, *spec.stored_shape),
        "embeddings": (count, spec.embedding_dim),
        "kept": (count,),
    }
    if not count:
        raise BankError("nothing to append: the list of references is empty")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise BankError(
                f"append to {url}: {name} have shape {arrays[name].shape}, expected {shape}"
            )
    if memories.dtype != spec.stored_dtype:
        raise BankError(
            f"append to {url}: memories are {memories.dtype}, the bank holds {spec.stored_dtype}"
        )
    if arrays["kept"].min() < 0 or arrays["kept"].max() > spec.memory_shape[3]:
        raise BankError(f"append to {url}: kept must lie between 0 and {spec.memory_shape[3]}")
    if not np.isfinite(arrays["embeddings"]).all():
        raise BankError(f"append to {url}: an embedding is not finite")
    return arrays


def encode_shard(
    arrays: Mapping[str, np.ndarray], references: Sequence[StoredReference]
) -> dict[str, bytes]:
    """The objects of a shard as bytes, so that what is hashed is exactly what is written."""
    lines = [reference.to_line() for reference in references]
    sources = sorted({reference.source for reference in references})
    places = {source: place for place, source in enumerate(sources)}
    arrays = {
        **arrays,
        "lines": line_table(lines),
        "source": np.array([places[reference.source] for reference in references], np.int32),
    }
    objects = {}
    for name, values in arrays.items():
        objects |= encode_array(name, values)
    return {**objects, REFERENCES: b"".join(lines), SOURCES: json.dumps(sources).encode()}


def read_line(line: bytes, crc: int) -> StoredReference:
    """A reference from its line; raises ValueError when its checksum is another."""
    if zlib.crc32(line) != crc:
        raise ValueError(f"{REFERENCES} is damaged: a line has another checksum")
    return StoredReference.from_line(line)


def mend_line(line: bytes, crc: int) -> bytes:
    """The line with the one bit changed that gives it this checksum; as it is where none does."""
    size = len(line)
    if zlib.crc32(line) == crc:
        return line
    # CRC-32 is linear: a changed bit changes the sum in a way of its own, whatever the rest is.
    wanted, zeros = zlib.crc32(line) ^ crc, zlib.crc32(bytes(size))
    for place in range(size):
        for bit in range(8):
            changed = bytes(place) + bytes([1 << bit]) + bytes(size - place - 1)
            if zlib.crc32(changed) ^ zeros == wanted:
                return line[:place] + bytes([line[place] ^ 1 << bit]) + line[place + 1 :]
    return line


def line_table(lines: Sequence[bytes]) -> np.ndarray:
    """Start, length and CRC-32 of each line."""
    lengths = np.array([len(line) for line in lines], np.uint64)
    sums = np.array([zlib.crc32(line) for line in lines], np.uint64)
    return np.stack([np.cumsum(lengths) - lengths, lengths, sums], axis=1)


def marks_of(references: Sequence[StoredReference]) -> np.ndarray:
    """One number for each reference: equal for equal ones, and hardly ever for others."""
    return line_marks(line_table([reference.to_line() for reference in references]))


def line_marks(table: np.ndarray) -> np.ndarray:
    """Length and checksum of each line of a table as one number."""
    return table[:, 1] << np.uint64(32) | table[:, 2]


def encode_array(name: str, values: np.ndarray) -> dict[str, bytes]:
    """The objects of one array, under its name."""
    # One memory is one inner chunk; the small arrays are read whole.
    inner = (1, *values.shape[1:]) if name in MEMORIES else values.shape
    sharding = {"chunk_shape": list(inner), "codecs": _CODECS, "index_codecs": _CODECS}
    sharding["index_location"] = "end"
    codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return _encode(name, values, _zarr_spec(values, values.shape, codecs))


def encode_cold(name: str, memories: np.ndarray, cold: np.ndarray) -> dict[str, bytes]:
    """The objects of an array whose memories lie each alone, those that are not ``cold``."""
    spec = _zarr_spec(memories, (1, *memories.shape[1:]), _CODECS)
    objects = _encode(name, None, spec)
    for row in np.flatnonzero(~cold).tolist():
        objects[lone_key(name, row, memories.ndim)] = encode_lone(memories[row])
    return objects


def encode_lone(memory: np.ndarray) -> bytes:
    """One memory of a cold shard."""
    values = np.ascontiguousarray(memory)[None]
    objects = _encode("one", values, _zarr_spec(values, values.shape, _CODECS))
    return objects[lone_key("one", 0, values.ndim)]


def is_lone(content: bytes, spec: BankSpec) -> bool:
    """Whether these bytes are a memory as :func:`encode_lone` made it, with its checksum."""
    size = spec.bytes_per_reference
    if len(content) != size + CHECKSUM_BYTES:
        return False
    memory = np.frombuffer(content[:size], spec.stored_dtype).reshape(spec.stored_shape)
    return encode_lone(memory) == content


def lone_key(name: str, row: int, axes: int) -> str:
    """Where the memory of a row lies in a cold shard."""
    return "/".join([name, "c", str(row), *"0" * (axes - 1)])


# The checksum of each memory: one with a flipped bit is not read.
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
CHECKSUM_BYTES = 4


def _encode(name: str, values: np.ndarray | None, spec: dict[str, Any]) -> dict[str, bytes]:
    scratch = ts.KvStore.open("memory://", context=ts.Context()).result()
    array = ts.open(spec, kvstore=scratch / f"{name}/", create=True).result()
    if values is not None:
        array.write(values).result()
    return {key.decode(): scratch.read(key).result().value for key in scratch.list().result()}


def _zarr_spec(
    values: np.ndarray, chunk: Sequence[int], codecs: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        # Otherwise a memory of zeros is left out and sizes depend on the content.
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": list(values.shape),
            "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "codecs": codecs,
        },
    }
