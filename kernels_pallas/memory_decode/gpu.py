"""Memory decoding for Hopper GPUs in Mosaic: many blocks of threads share each cache.

A block of threads takes one kv head of one split of one sequence. Its query heads fill the first
rows of a 64-row tensor-core product, whose other rows cost nothing that is short here: the kernel
waits for memory. Blocks of the cache come through a ring of shared-memory buffers. The splits, the
preface and the slots (in XLA: they are few) are merged by their log-sum-exp.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import dispatch
from kernels_pallas.memory_decode import blocked
from kernels_pallas.memory_decode.reference import unfold

# Rows of a tensor-core product, of a block of the cache, and of the tile that the query fills.
MATRIX, BLOCK, TILE = 64, 64, 8
BUFFERS = 4
# Enough blocks of threads for every multiprocessor of an H100 or H200 to have two.
WANTED = 264
MASKED = blocked.MASKED


def unsupported(query, key, value, *, tokens_per_row=1, **_) -> str | None:
    """Why this implementation does not take the arguments, or None when it does."""
    reason = dispatch.only_on("gpu")
    if reason is not None:
        return reason
    if key.dtype != jnp.bfloat16:
        return f"the tensor cores are fed with bfloat16 here, not {key.dtype}"
    (_, heads, head_dim), length = query.shape, key.shape[1] * tokens_per_row
    group = heads * head_dim * tokens_per_row // key.shape[2]
    if head_dim % 16 or head_dim > 256:
        return f"heads are multiples of 16 up to 256 wide, not {head_dim}"
    if group > TILE:
        return f"at most {TILE} query heads share a kv head, not {group}"
    if length % BLOCK or not length:
        return f"caches hold multiples of {BLOCK} tokens, not {length}"
    return None


def _splits(batch: int, kv_heads: int, length: int) -> int:
    """Parts of each cache: a divisor of its blocks that gives about as many as are wanted."""
    blocks = length // BLOCK
    divisors = [number for number in range(1, blocks + 1) if blocks % number == 0]
    return next((n for n in divisors if n * batch * kv_heads >= WANTED), blocks)


def _scores(query, keys):
    """Queries times keys, both in shared memory."""

    def product(out):
        plgpu.wgmma(out, query, plgpu.transpose_ref(keys, (1, 0)))
        return out[...]

    return pl.run_scoped(product, plgpu.ACC((MATRIX, BLOCK), jnp.float32))


def _weigh(weights, values):
    """Weights in registers times values in shared memory."""

    def product(out):
        plgpu.wgmma(out, weights, values)
        return out[...]

    return pl.run_scoped(product, plgpu.ACC((MATRIX, values.shape[1]), jnp.float32))


def _attend(scale, tokens, query, keys, values, first, running):
    """Take a block of the cache that begins at token ``first`` into the running softmax."""
    top, total, sums = running
    key_block, key_here = keys
    value_block, value_here = values
    plgpu.barrier_wait(key_here)

    scores = _scores(query, key_block) * scale
    place = plgpu.broadcasted_iota(jnp.int32, (MATRIX, BLOCK), 1, layout=plgpu.Layout.WGMMA)
    scores = jnp.where(place + first < tokens, scores, MASKED)
    highest = jnp.maximum(top, scores.max(axis=1))
    weights = jnp.exp(scores - jax.lax.broadcast_in_dim(highest, scores.shape, [0]))
    decay = jnp.exp(top - highest)
    total = total * decay + weights.sum(axis=1)
    sums = sums * jax.lax.broadcast_in_dim(decay, sums.shape, [0])
    plgpu.barrier_wait(value_here)

    @pl.when(first + BLOCK > tokens)
    def _():  # What is behind may hold anything, and zero weight does not undo NaN.
        shape = value_block.shape
        place = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        value_block[...] = jnp.where(place + first < tokens, value_block[...], 0)
        plgpu.commit_smem()

    return highest, total, sums + _weigh(weights.astype(value_block.dtype), value_block)


def _kernel(lengths, query, key, value, out, log_total, scratch, *, splits, head_dim):
    query_tile, key_blocks, value_blocks, out_tile, log_tile, key_here, value_here, query_here = (
        scratch
    )
    sequence, head, split = (jax.lax.axis_index(name) for name in ("sequence", "head", "split"))
    span = key.shape[1] // splits
    begin = split * span
    tokens = jnp.minimum(lengths[sequence], begin + span)
    blocks = jax.lax.div(jnp.maximum(tokens - begin, 0) + (BLOCK - 1), BLOCK)
    columns = pl.ds(head * head_dim, head_dim)

    def fetch(number):
        slot = jax.lax.rem(number, BUFFERS)
        rows = pl.ds(begin + number * BLOCK, BLOCK)
        for source, blocks_of, here in (
            (key, key_blocks, key_here),
            (value, value_blocks, value_here),
        ):
            plgpu.copy_gmem_to_smem(
                source.at[sequence, rows, columns], blocks_of.at[slot], here.at[slot]
            )

    plgpu.copy_gmem_to_smem(query.at[sequence, head], query_tile.at[pl.ds(0, TILE)], query_here)
    for number in range(BUFFERS - 1):
        pl.when(number < blocks)(functools.partial(fetch, jnp.int32(number)))
    plgpu.barrier_wait(query_here)

    def step(number, running):
        slot = jax.lax.rem(number, BUFFERS)
        plgpu.commit_smem()  # Every warp is done with the buffer that is filled next.
        pl.when(number + BUFFERS - 1 < blocks)(lambda: fetch(number + BUFFERS - 1))
        keys, values = (
            (parts.at[slot], here.at[slot])
            for parts, here in ((key_blocks, key_here), (value_blocks, value_here))
        )
        first = begin + number * BLOCK
        return _attend(head_dim**-0.5, tokens, query_tile, keys, values, first, running)

    def constant(shape, number, layout):
        return plgpu.layout_cast(jnp.full(shape, number, jnp.float32), layout)

    of_row = plgpu.Layout.WGMMA.reduce(1)
    start = (
        constant((MATRIX,), MASKED, of_row),
        constant((MATRIX,), 0, of_row),
        constant((MATRIX, head_dim), 0, plgpu.Layout.WGMMA),
    )
    top, total, sums = jax.lax.fori_loop(0, blocks, step, start)
    weight = jnp.where(total > 0, total, 1)
    out_tile[...] = sums / jax.lax.broadcast_in_dim(weight, sums.shape, [0])
    log_tile[...] = jnp.where(total > 0, top + jnp.log(weight), MASKED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(0, TILE)], out.at[sequence, split, head])
    plgpu.copy_smem_to_gmem(log_tile.at[pl.ds(0, TILE)], log_total.at[sequence, split, head])
    plgpu.wait_smem_to_gmem(0)


def _scratch(head_dim: int, dtype):
    """Buffers in shared memory, tiled and swizzled as the tensor cores read them."""
    swizzle = math.gcd(head_dim * dtype.itemsize, 128)
    transforms = (
        plgpu.TilingTransform((8, swizzle // dtype.itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )
    blocks = plgpu.SMEM((BUFFERS, BLOCK, head_dim), dtype, transforms=transforms)
    return (
        plgpu.SMEM((MATRIX, head_dim), dtype, transforms=transforms),
        blocks,
        blocks,
        plgpu.SMEM((MATRIX, head_dim), jnp.float32),
        plgpu.SMEM((MATRIX,), jnp.float32),
        plgpu.Barrier(num_barriers=BUFFERS),
        plgpu.Barrier(num_barriers=BUFFERS),
        plgpu.Barrier(),
    )


def over_cache(query, key, value, lengths, splits: int):
    """The cache's part: results B x splits x K x 8 x H and log-sum-exps, in float32."""
    batch, kv_heads, _, head_dim = query.shape

    def entry(*refs):
        body = functools.partial(_kernel, splits=splits, head_dim=head_dim)
        pl.run_scoped(lambda *scratch: body(*refs, scratch), *_scratch(head_dim, key.dtype))

    shape = batch, splits, kv_heads, TILE
    return plgpu.kernel(
        entry,
        out_type=(
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        grid=(splits, kv_heads, batch),
        grid_names=("split", "head", "sequence"),
    )(lengths, query, key, value)


def memory_decode(
    query, key, value, *, lengths, preface=None, slots=None, slot_valid=None, tokens_per_row=1
):
    """As :func:`reference.memory_decode`."""
    key, value = (unfold(rows, tokens_per_row) for rows in (key, value))
    (batch, heads, head_dim), length = query.shape, key.shape[1]
    kv_heads = key.shape[2] // head_dim
    group = heads // kv_heads
    tile = query.reshape(batch, kv_heads, group, head_dim)
    tile = jnp.pad(tile, ((0, 0), (0, 0), (0, TILE - group), (0, 0)))
    limits = jnp.minimum(lengths, length).astype(jnp.int32)
    splits = _splits(batch, kv_heads, length)
    out, log_total = (
        part[:, :, :, :group] for part in over_cache(tile, key, value, limits, splits)
    )
    top, total, sums = blocked.begin(query, preface, slots, slot_valid, kv_heads)
    return _merge(out, log_total, top, total, sums).reshape(query.shape).astype(query.dtype)


def _merge(out, log_total, top, total, sums):
    """Splits (axis 1) and the running softmax of preface and slots in one."""
    log_total = log_total[..., None]
    highest = jnp.maximum(log_total.max(axis=1), top)
    # Of a split without a visible token, the result is 0 and counts for nothing.
    share = jnp.where(log_total > MASKED, jnp.exp(log_total - highest[:, None]), 0)
    decay = jnp.exp(top - highest)
    weight = share.sum(axis=1) + total * decay
    return ((share * out).sum(axis=1) + sums * decay) / jnp.where(weight > 0, weight, 1)
