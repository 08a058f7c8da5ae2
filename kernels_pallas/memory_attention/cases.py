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
        floor + _repeated_bytes(queries, heads, kv_heads, head_dim, slots, band, backward, dtype),
        "memory_attention_backward" if backward else "memory_attention_forward",
    )


def _repeated_bytes(queries, heads, kv_heads, head_dim, slots, band, backward, dtype) -> int:
    """What is copied beyond the floor: slots that lie in the windows of several units."""
    if not slots:
        return 0
    unit = min(_BLOCKS.backward_query, queries)
    filled = _PREFACE + ((unit - 1) // _CHUNK + 1 + band) * slots
    rows = -(-filled // 128) * 128
    entry = kv_heads * head_dim * jnp.dtype(dtype).itemsize
    held = _PREFACE + queries // _CHUNK * slots
    extra = 2 * entry * (queries // unit * rows - held)
    # The backward kernel reads the keys twice, once transposed, and writes float32 gradients.
    across = (queries + held) * entry
    return 3 * extra + across if backward else extra


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
