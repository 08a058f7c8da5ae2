"""Shapes that are compiled ahead of time and measured, with the bytes that must move at least."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case
from kernels_pallas.memory_select.api import memory_select


def _case(
    references=64,
    heads=40,
    kv_heads=8,
    head_dim=80,
    dtype=jnp.bfloat16,
    selection="exponential",
    kept=8,
) -> Case:
    tokens = 128

    def select(query, key, valid):
        return memory_select(
            query, key, valid, kept=kept, selection=selection, implementation="tpu"
        )

    def build():
        array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
        return select, (
            array((references, tokens, heads, head_dim)),
            array((references, tokens, kv_heads, head_dim)),
            jax.ShapeDtypeStruct((references, tokens), jnp.bool_),
        )

    rows = tokens * (heads + kv_heads) * head_dim * jnp.dtype(dtype).itemsize
    floor = references * (rows + tokens + 4 * kv_heads * kept)
    # Validity travels as float32.
    copied = floor + 3 * references * tokens
    # A grid step takes eight kv heads: one reference of the paper's, eight of a shard's.
    return Case(build, floor, (references * kv_heads // 8,), copied, "memory_select")


# The paper's 64 references (a training step's shard), its other form, one of eight tensor shards.
CASES = {
    "paper": _case(),
    "paper softmax": _case(selection="softmax"),
    "paper float32": _case(dtype=jnp.float32),
    "paper tensor shard": _case(heads=5, kv_heads=1),
    "heads of 128": _case(head_dim=128),
}
