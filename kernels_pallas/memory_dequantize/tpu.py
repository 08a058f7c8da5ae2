"""Level 1 by row loads from a table on chip, level 2 by lane gathers, the rotation as a product.

A row of level 1 is long (half a head) and its table large (16384 rows): two dynamic loads a vector,
addressed from scalar memory. A row of level 2 is short (10 numbers) and its table small (1024): a
register gathers one number for each of 128 vectors and 8 dims at once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dispatch
from kernels_pallas.memory_dequantize.reference import Codebook, gather_codes, split_codes

LANES, SUBLANES = 128, 8
# Vectors decoded in a grid step.
BLOCK = 512
VMEM_BYTES = 48 * 2**20


def unsupported(codes, codebook: Codebook, *, index=None, **_) -> str | None:
    """Why this implementation does not take the arguments, or None when it does."""
    reason = dispatch.only_on("tpu")
    if reason is not None:
        return reason
    if not codes.size or (index is not None and not index.size):
        return "there is nothing to decode"
    if 2 * codebook.bits[0] > 32:
        return f"two codes of {codebook.bits[0]} bits do not fit a word of 32"
    head_dim = codebook.rotation.shape[0]
    if head_dim > LANES or head_dim % SUBLANES:
        return f"vectors of {head_dim}: a multiple of {SUBLANES} up to {LANES} is decoded"
    if 4 * LANES * codebook.level1.shape[1] > VMEM_BYTES // 2:
        return f"level 1 of {codebook.level1.shape[1]} entries does not fit on chip"
    return None


def _residuals(numbers_ref, table_ref, start, part):
    """(H, 128): the residuals of the vectors from ``start`` on, dims in rows."""
    dims, entries = table_ref.shape
    tiles = []
    for top in range(0, dims, SUBLANES):
        dim = top + jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
        number = None
        for p in range(top // part, (top + SUBLANES - 1) // part + 1):
            row = numbers_ref[p : p + 1, start : start + LANES]
            row = jnp.broadcast_to(row, dim.shape)
            number = row if number is None else jnp.where(dim >= p * part, row, number)
        lane, pages, found = number & (LANES - 1), number >> 7, None
        for page in range(entries // LANES):
            rows = table_ref[top : top + SUBLANES, page * LANES : (page + 1) * LANES]
            here = jnp.take_along_axis(rows, lane, axis=1, mode="promise_in_bounds")
            found = here if found is None else jnp.where(pages == page, here, found)
        tiles.append(found)
    return jnp.concatenate(tiles, axis=0)


def _kernel(
    halves_ref, numbers_ref, level1_ref, level2_ref, rotation_ref, out_ref, rows_ref, *, bits, part
):
    dims = out_ref.shape[1]
    first_half = jax.lax.broadcasted_iota(jnp.int32, (1, dims), 1) < dims // 2

    def look_up(v, _):
        word = halves_ref[0, 0, v]
        one = level1_ref[pl.ds(word & ((1 << bits) - 1), 1), :]
        two = level1_ref[pl.ds(jax.lax.shift_right_logical(word, bits), 1), :]
        rows_ref[pl.ds(v, 1), :] = jnp.where(first_half, one, two)
        return 0

    # Written out, so that the scalar unit's loads run beside the vector and matrix units' work.
    for start in range(0, out_ref.shape[0], LANES):
        jax.lax.fori_loop(start, start + LANES, look_up, 0, unroll=LANES)
        here = slice(start, start + LANES)
        rotated = rows_ref[here] + _residuals(numbers_ref, level2_ref, start, part).T
        out_ref[here] = jnp.dot(
            rotated,
            rotation_ref[...],
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        ).astype(out_ref.dtype)


def _tables(codebook: Codebook):
    """Level 1 with both halves of a row side by side; level 2 with entries on the lanes."""
    _, entries, _ = codebook.level1.shape
    level1 = codebook.level1.astype(jnp.float32).transpose(1, 0, 2).reshape(entries, -1)
    parts, entries, part = codebook.level2.shape
    level2 = codebook.level2.astype(jnp.float32).transpose(0, 2, 1).reshape(parts * part, entries)
    level2 = jnp.pad(level2, ((0, 0), (0, -entries % LANES)))
    return level1, level2, codebook.rotation.astype(jnp.float32)


def memory_dequantize(codes, codebook: Codebook, *, index, dtype):
    """As :func:`reference.memory_dequantize`."""
    codes = gather_codes(codes, index)
    halves, numbers = split_codes(codes.reshape(-1, codes.shape[-1]), codebook)
    count, bits = halves.shape[0], codebook.bits[0]
    block = min(BLOCK, -(-count // LANES) * LANES)
    steps = pl.cdiv(count, block)
    more = (0, steps * block - count)
    words = jnp.pad(halves[:, 0] | halves[:, 1] << bits, more).reshape(steps, 1, block)
    numbers = jnp.pad(numbers.T, ((0, 0), more))
    tables = _tables(codebook)
    dims = codebook.rotation.shape[0]

    def whole(table):
        return pl.BlockSpec(table.shape, lambda i: (0, 0), pipeline_mode=pl.Buffered(1))

    found = pl.pallas_call(
        functools.partial(_kernel, bits=bits, part=codebook.level2.shape[2]),
        grid=(steps,),
        in_specs=[
            pl.BlockSpec((1, 1, block), lambda i: (i, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((numbers.shape[0], block), lambda i: (0, i)),
            *map(whole, tables),
        ],
        out_specs=pl.BlockSpec((block, dims), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((count, dims), dtype),
        scratch_shapes=[pltpu.VMEM((block, dims), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        name="memory_dequantize",
    )(words, numbers, *tables)
    return found.reshape(*codes.shape[:-1], dims)
