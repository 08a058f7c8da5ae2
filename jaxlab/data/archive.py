"""One ``.npz`` file of arrays with a header: what it is, what it was made from, a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.errors import DataError

VERSION = 1


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes of the arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.data)
    return digest.hexdigest()


def write_archive(
    path: str | Path, arrays: Mapping[str, np.ndarray], *, kind: str, origin: Mapping[str, Any]
) -> None:
    """Write the arrays with a header that names ``kind`` and everything in ``origin``."""
    header = {"kind": kind, "version": VERSION, "sha256": checksum(arrays), "origin": dict(origin)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("wb") as stream:
        np.savez(stream, header=_bytes_array(json.dumps(header)), **arrays)
    temporary.replace(path)


def read_archive(
    path: str | Path, *, kind: str, origin: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Read what ``write_archive`` wrote, if it is of this ``kind``, whole, and of this ``origin``.

    Raises DataError that names the file and both values otherwise.
    """
    try:
        with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
        found = (header["kind"], header["version"])
        stored, expected_sum = header["origin"], header["sha256"]
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{path}: cannot be read ({reason}): build it first") from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged, or no {kind} file: build it anew") from error
    if found != (kind, VERSION):
        raise DataError(
            f"{path}: holds {found[0]} in format {found[1]}, not {kind} in format {VERSION}: "
            "build it anew"
        )
    if checksum(arrays) != expected_sum:
        raise DataError(f"{path}: its checksum does not match its contents: build it anew")
    for key in sorted({*origin, *stored}):
        if stored.get(key) != origin.get(key):
            raise DataError(
                f"{path}: made with {key}={stored.get(key)!r} but {key}={origin.get(key)!r} "
                "is in use: build it anew"
            )
    return arrays


def texts_to_arrays(texts: list[str], name: str) -> dict[str, np.ndarray]:
    """Strings as one array of UTF-8 bytes and one of the ends."""
    parts = [text.encode() for text in texts]
    return {
        name: _bytes_array(b"".join(parts)),
        f"{name}_ends": np.cumsum([len(part) for part in parts], dtype=np.int64),
    }


def texts_from_arrays(arrays: Mapping[str, np.ndarray], name: str) -> list[str]:
    """The strings that ``texts_to_arrays`` took."""
    data, ends = arrays[name].tobytes(), arrays[f"{name}_ends"].tolist()
    return [data[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]


def _bytes_array(data: str | bytes) -> np.ndarray:
    return np.frombuffer(data.encode() if isinstance(data, str) else data, np.uint8)
