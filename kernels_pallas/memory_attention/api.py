"""The public function: checks its arguments, picks an implementation, calls it."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.memory_attention import blocked, gpu, reference, tpu
from kernels_pallas.memory_attention.reference import ChunkGrid

IMPLEMENTATIONS = (
    dispatch.Implementation("tpu", tpu.memory_attention, tpu.unsupported),
    dispatch.Implementation("gpu", gpu.memory_attention, gpu.unsupported),
    dispatch.Implementation("blocked", blocked.memory_attention, blocked.unsupported),
    dispatch.Implementation("xla", reference.memory_attention, dispatch.always_supported),
)


def _check(query, key, value, preface, slots, slot_valid, grid) -> None:
    for name, array in (("query", query), ("key", key)):
        if array.ndim != 4:
            raise ValueError(f"{name} has {array.ndim} axes: batch, tokens, heads and head_dim")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query has batch x head_dim {query.shape[::3]}, key {key.shape[::3]}: they must agree"
        )
    heads, kv_heads = query.shape[2], key.shape[2]
    if query.shape[1] > key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} tokens and key {key.shape[1]}: every query's own key must "
            "be among them"
        )
    if value.shape != key.shape:
        raise ValueError(f"value has shape {value.shape}, key {key.shape}: they must agree")
    if heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads and key has {kv_heads}: query heads must be a multiple"
        )
    for name, part in (("preface", preface), ("slots", slots)):
        if part is None:
            continue
        for array in part:
            if array.shape != part[0].shape:
                raise ValueError(f"{name}: keys are {part[0].shape} and values {array.shape}")
            if array.shape[-2:] != key.shape[-2:]:
                raise ValueError(
                    f"{name} has heads x head_dim {array.shape[-2:]}, the context {key.shape[-2:]}"
                )
            if array.dtype != key.dtype:
                raise ValueError(
                    f"{name} is {array.dtype}, the context {key.dtype}: cast it before"
                )
    if (slots is None) != (slot_valid is None):
        raise ValueError("slots and slot_valid come together: one of the two is missing")
    if slots is not None and slots[0].shape[0] != query.shape[0]:
        raise ValueError(f"slots has batch {slots[0].shape[0]}, query {query.shape[0]}")
    if slots is not None and slot_valid.shape != slots[0].shape[:3]:
        raise ValueError(
            f"slot_valid has shape {slot_valid.shape}, the slots need {slots[0].shape[:3]}"
        )
    if slots is not None and grid is None and slots[0].shape[1] != 1:
        raise ValueError(
            f"slots of {slots[0].shape[1]} chunks need grid=ChunkGrid(...) to say who reads which"
        )
    if slots is not None and grid is not None and query.shape[1] == key.shape[1]:
        # Behind a cache the first query's place is not known here.
        needed = (max(query.shape[1] - 1 - grid.offset, 0)) // grid.length + 1
        if slots[0].shape[1] < needed:
            raise ValueError(
                f"slots of {slots[0].shape[1]} chunks do not cover the {query.shape[1]} queries: "
                f"chunks of {grid.length} tokens from {grid.offset} on make {needed}"
            )


def _check_places(query, key, start, segments) -> None:
    wanted = {"start": (start, query.shape[:1])}
    if segments is not None:
        wanted["segments of the queries"] = segments[0], query.shape[:2]
        wanted["segments of the keys"] = segments[1], key.shape[:2]
    for name, (array, shape) in wanted.items():
        if jnp.shape(array) != shape or not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            raise ValueError(
                f"{name}: {jnp.result_type(array)} of shape {jnp.shape(array)}, integers of shape "
                f"{shape} are needed"
            )


def memory_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    start: Int[Array, " B"],
    preface: tuple[Float[Array, "P K H"], Float[Array, "P K H"]] | None = None,
    slots: tuple[Float[Array, "B C M K H"], Float[Array, "B C M K H"]] | None = None,
    slot_valid: Bool[Array, "B C M"] | None = None,
    grid: ChunkGrid | None = None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention over preface, memory slots and context in one softmax (Memory³ §3.2, eq. 4).

    Args:
      query: context queries, rotated.
      key: context keys, rotated: those of this call, or a whole decode cache.
      value: context values.
      start: place in the context of each sequence's first query (0 is ``<s>``); the others follow
        it one by one, and each sees the keys up to its own place, which must be among the keys:
        start + T <= S.
      preface: keys and values of ``<s>Reference:``, visible to every query.
      slots: memory keys and values, one group of M for each chunk.
      slot_valid: False where a slot is empty (short or missing reference).
      grid: who reads which chunk's slots; None with a single group that every query reads.
      segments: numbers of packed documents for queries and keys; None when all is one document.
      implementation: a name of ``IMPLEMENTATIONS``; None picks the fastest that fits.

    Raises:
      ValueError: shapes that do not fit together; the message names the argument and the rule.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    _check(query, key, value, preface, slots, slot_valid, grid)
    _check_places(query, key, start, segments)
    kwargs = dict(
        start=start,
        preface=preface,
        slots=slots,
        slot_valid=slot_valid,
        grid=grid,
        segments=segments,
    )
    chosen = dispatch.choose(
        "memory_attention", IMPLEMENTATIONS, implementation, (query, key, value), kwargs
    )
    return chosen.call(query, key, value, **kwargs)
