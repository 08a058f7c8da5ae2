"""Checksums of arrays, taken on the devices that hold them, and of files.

An array's checksum does not depend on how it is sharded, so a checkpoint written on one mesh is
verified on another, and no process needs to see the whole array.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlab.typing import Array, Shaped


def array_checksums(leaves: Mapping[str, Shaped[Array, "..."]]) -> dict[str, str]:
    """64-bit checksums of arrays by name, as 16 hexadecimal digits; any flipped bit changes one."""
    pairs = jax.device_get({name: _checksum(leaf) for name, leaf in leaves.items()})
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in pairs.items()}


@jax.jit
def _checksum(x: Array) -> tuple[Array, Array]:
    # Each word is mixed with its position by a one-to-one function, then all are added modulo
    # 2**32: a change of one word always shows, and words that change places show as well.
    words = _words(x)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    salts = (jnp.uint32(2654435761), jnp.uint32(2246822519))
    return tuple(jnp.sum(_mix(words + index * salt), dtype=jnp.uint32) for salt in salts)


def _mix(words: Array) -> Array:
    """A one-to-one map of 32-bit words (the final steps of MurmurHash3)."""
    words = (words ^ (words >> 16)) * jnp.uint32(2246822507)
    words = (words ^ (words >> 13)) * jnp.uint32(3266489909)
    return words ^ (words >> 16)


def _words(x: Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_ or (
        jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8
    ):
        x = x.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(x, word).astype(jnp.uint32)


def texts_digest(texts: Iterable[str]) -> str:
    """SHA-256 of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def json_digest(values: Any) -> str:
    """SHA-256 of the canonical JSON of plain values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
