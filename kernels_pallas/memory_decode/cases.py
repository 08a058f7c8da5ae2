"""Shapes that are compiled ahead of time and measured, with the bytes that must move at least."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case
from kernels_pallas.memory_decode import tpu


def _case(
    batch,
    length,
    *,
    heads=40,
    kv_heads=8,
    head_dim=80,
    preface=3,
    slots=40,
    dtype=jnp.bfloat16,
    splits=1,
    tokens_per_row=1,
) -> Case:
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    width = kv_heads * head_dim
    cache = array((batch, length // tokens_per_row, tokens_per_row * width))
    shapes = {
        "query": array((batch, heads, head_dim)),
        "key": cache,
        "value": cache,
        "lengths": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "preface": (array((preface, width)),) * 2,
        "slots": (array((batch, slots, width)),) * 2,
        "slot_valid": jax.ShapeDtypeStruct((batch, slots, kv_heads), jnp.bool_),
    }
    fixed = dict(tokens_per_row=tokens_per_row, splits=splits)

    def decode(arrays):
        return tpu.memory_decode(**arrays, **fixed)

    plan = tpu.plan_of(**shapes, **fixed)
    blocks = -(-plan.span // plan.block)
    begin = (plan.turns,) if splits == 1 else (batch, plan.rows - batch)
    visits = (*begin, plan.turns * blocks, plan.turns)
    full = [length] * batch
    moved = plan.floor_bytes(full), visits, plan.copied_bytes(full)
    return Case(lambda: (decode, (shapes,)), *moved, "memory_decode")


CASES = {
    "paper, 1 x 512": _case(1, 512),
    "paper, 1 x 4096": _case(1, 4096),
    "paper, 32 x 512": _case(32, 512),
    "paper, 32 x 4096": _case(32, 4096),
    "paper, 256 x 512": _case(256, 512),
    "paper, 256 x 4096": _case(256, 4096),
    # For the two cores of a v5p.
    "paper, 1 x 4096, split": _case(1, 4096, splits=2),
    "paper float32": _case(32, 512, dtype=jnp.float32),
    # One of eight tensor shards, a single kv head.
    "paper tensor shard, 32 x 512": _case(32, 512, heads=5, kv_heads=1, tokens_per_row=8),
    "paper tensor shard, 32 x 4096": _case(32, 4096, heads=5, kv_heads=1, tokens_per_row=8),
    "heads of 128": _case(32, 4096, head_dim=128),
}
