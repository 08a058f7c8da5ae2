"""Shapes that are compiled ahead of time and measured, with the bytes that must move at least."""

import math

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case
from kernels_pallas.memory_dequantize.api import memory_dequantize
from kernels_pallas.memory_dequantize.reference import Codebook
from kernels_pallas.memory_dequantize.tpu import BLOCK


def _case(index, *, slots=28160, head_dim=80, parts=8, dtype=jnp.bfloat16) -> Case:
    shapes = (2, 1 << 14, head_dim // 2), (parts, 1 << 10, head_dim // parts), (head_dim, head_dim)
    codebook = Codebook(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    width, count = sum(codebook.widths), math.prod(index)

    def dequantize(codes, codebook, index):
        return memory_dequantize(codes, codebook, index=index, dtype=dtype, implementation="tpu")

    def build():
        codes = jax.ShapeDtypeStruct((slots, width), jnp.uint8)
        return dequantize, (codes, codebook, jax.ShapeDtypeStruct(index, jnp.int32))

    tables = 4 * sum(math.prod(shape) for shape in shapes)
    vector = width + 4 + head_dim * jnp.dtype(dtype).itemsize
    # Rows of what is written and of the first table are padded to whole lanes in memory; the codes
    # travel as numbers of four bytes.
    lanes = -(-head_dim // 128) * 128
    written = lanes * jnp.dtype(dtype).itemsize
    read = 4 * (1 + parts)
    padded = tables + 4 * (lanes - head_dim) * (shapes[0][1] + head_dim)
    copied = count * (written + read) + padded
    visits = (-(-count // BLOCK),)
    return Case(build, count * vector + tables, visits, copied, "memory_dequantize")


# The memories of one chunk: 5 references x 22 layers x keys and values x 8 tokens x 8 kv heads.
CASES = {
    "paper": _case((5, 44, 8, 8)),
    "paper float32": _case((5, 44, 8, 8), dtype=jnp.float32),
    "heads of 128": _case((5, 44, 8, 8), head_dim=128),
}
