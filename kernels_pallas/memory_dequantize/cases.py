"""Shapes that are compiled ahead of time and measured, with the bytes that must move at least."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.memory_dequantize.api import memory_dequantize
from kernels_pallas.memory_dequantize.reference import Codebook
from kernels_pallas.memory_dequantize.tpu import BLOCK


class Case(NamedTuple):
    """build: the function to compile and its arguments' shapes; visits: of each hot region."""

    build: Callable[[], tuple[Callable, tuple]]
    floor_bytes: int
    visits: tuple[int, ...]


def _case(index, *, slots=28160, head_dim=80, parts=8, dtype=jnp.bfloat16) -> Case:
    shapes = (2, 1 << 14, head_dim // 2), (parts, 1 << 10, head_dim // parts), (head_dim, head_dim)
    codebook = Codebook(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    width, count = sum(codebook.widths), math.prod(index)

    def dequantize(codes, codebook, index):
        with dispatch.lowering_for("tpu"):
            return memory_dequantize(codes, codebook, index=index, dtype=dtype)

    def build():
        codes = jax.ShapeDtypeStruct((slots, width), jnp.uint8)
        return dequantize, (codes, codebook, jax.ShapeDtypeStruct(index, jnp.int32))

    tables = 4 * sum(math.prod(shape) for shape in shapes)
    vector = width + 4 + head_dim * jnp.dtype(dtype).itemsize
    return Case(build, count * vector + tables, (-(-count // BLOCK),))


# The memories of one chunk: 5 references x 22 layers x keys and values x 8 tokens x 8 kv heads.
CASES = {
    "paper": _case((5, 44, 8, 8)),
    "paper float32": _case((5, 44, 8, 8), dtype=jnp.float32),
    "heads of 128": _case((5, 44, 8, 8), head_dim=128),
}
