"""Shapes of memory attention that are compiled ahead of time and measured."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.blocks import AttentionBlocks
from kernels_pallas.cases import Case
from kernels_pallas.memory_attention.api import memory_attention
from kernels_pallas.memory_attention.reference import ChunkGrid

_PREFACE, _CHUNK = 3, 64
_BLOCKS = AttentionBlocks()  # sizes that all chips share; what differs does not change the visits


def _shapes(queries, heads, kv_heads, head_dim, slots_per_chunk, dtype):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    moving = {
        "query": array((1, queries, heads, head_dim)),
        "key": array((1, queries, kv_heads, head_dim)),
        "value": array((1, queries, kv_heads, head_dim)),
    }
    fixed = {"start": jax.ShapeDtypeStruct((1,), jnp.int32)}
    if slots_per_chunk:
        chunks = queries // _CHUNK
        moving["preface"] = (array((_PREFACE, kv_heads, head_dim)),) * 2
        moving["slots"] = (array((1, chunks, slots_per_chunk, kv_heads, head_dim)),) * 2
        fixed["slot_valid"] = jax.ShapeDtypeStruct((1, chunks, slots_per_chunk), jnp.bool_)
    return moving, fixed


def _bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _visits(queries: int, backward: bool) -> tuple[int, ...]:
    """Of the regions for one head: openings (diagonal and slots), whole blocks, others unused."""
    rows = _BLOCKS.backward_query if backward else _BLOCKS.query
    whole = [row * rows // _BLOCKS.key for row in range(queries // rows)]
    if backward:
        return len(whole), 0, 0, sum(whole), 0
    some = [count for count in whole if count]
    return len(whole), 0, 0, len(some), sum(some) - len(some), len(some), 0


def _case(
    queries=2048,
    *,
    heads=40,
    kv_heads=8,
    head_dim=80,
    slots=8,
    band=5,
    backward=False,
    dtype=jnp.bfloat16,
) -> Case:
    moving, fixed = _shapes(queries, heads, kv_heads, head_dim, slots, dtype)
    grid = ChunkGrid(_CHUNK, band) if slots else None

    def forward(moving, fixed):
        return memory_attention(**moving, **fixed, grid=grid, implementation="tpu")

    def gradients(moving, fixed):
        return jax.grad(lambda moving: forward(moving, fixed).astype(jnp.float32).sum())(moving)

    statistics = 4 * queries * heads
    inputs, out = _bytes_of((moving, fixed)), _bytes_of(moving["query"])
    # Backward reads inputs, the output's gradient and two statistics, and writes as many gradients.
    floor = 2 * inputs + out + 2 * statistics if backward else inputs + out + statistics
    visits = _visits(queries, backward)
    if not slots:
        # No window: neither its own region nor a part of the opening.
        visits = visits[:1] + visits[2:]
    return Case(
        lambda: (gradients if backward else forward, (moving, fixed)),
        floor,
        visits,
        _copied(queries, heads, kv_heads, head_dim, slots, band, backward, dtype),
        "memory_attention_backward" if backward else "memory_attention_forward",
    )


def _copied(queries, heads, kv_heads, head_dim, slots, band, backward, dtype) -> int:
    """Bytes that the kernel's copies move: arrays with the head last are padded to whole lanes."""
    item = jnp.dtype(dtype).itemsize
    lanes, rows = -(-head_dim // 128) * 128, -(-head_dim // 16) * 16
    unit = min(_BLOCKS.backward_query, queries)
    width = 0
    if slots:
        filled = _PREFACE + ((unit - 1) // _CHUNK + 1 + band) * slots
        width = queries // unit * -(-filled // 128) * 128
    # Statistics of a kv head's query heads take whole tiles of eight rows.
    statistics = 4 * queries * kv_heads * -(-(heads // kv_heads) // 8) * 8
    intervals = 4 * 8 * width * kv_heads
    entries = kv_heads * (queries + width)
    if not backward:
        # Queries and keys with the head last, values and outputs with it on the rows.
        moved = (heads * queries + entries) * (lanes + rows) * item
        return moved + statistics + intervals
    # Reads queries, the output's gradient, keys, keys across and values; writes the gradients of
    # queries (across), of keys and values, and in float32 of the window's.
    read = 2 * heads * queries * lanes + entries * (2 * lanes + rows)
    written = heads * queries * rows + 2 * kv_heads * queries * lanes
    window = 4 * 2 * kv_heads * width * lanes
    return (read + written) * item + window + 2 * statistics + intervals


CASES = {
    "paper": _case(),
    "paper backward": _case(backward=True),
    "paper prefill": _case(slots=40, band=1),
    "paper float32": _case(dtype=jnp.float32),
    "heads of 128": _case(head_dim=128),
    "heads of 128 backward": _case(head_dim=128, backward=True),
    "heads of 128, no memory": _case(head_dim=128, slots=0),
    "heads of 128, no memory, backward": _case(head_dim=128, slots=0, backward=True),
    "heads of 64": _case(head_dim=64),
    "heads of 96": _case(head_dim=96),
    "long heads of 128": _case(8192, head_dim=128),
}
