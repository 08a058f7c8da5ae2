"""The public function: checks its arguments, flattens them, picks an implementation, calls it."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.memory_decode import blocked, gpu, reference, tpu

IMPLEMENTATIONS = (
    dispatch.Implementation("tpu", tpu.memory_decode, tpu.unsupported),
    dispatch.Implementation("gpu", gpu.memory_decode, gpu.unsupported),
    dispatch.Implementation("blocked", blocked.memory_decode, blocked.unsupported),
    dispatch.Implementation("xla", reference.memory_decode, dispatch.always_supported),
)

Rows = Float[Array, "B S W"] | Float[Array, "B S K H"]
Preface = Float[Array, "P K H"] | Float[Array, "P KH"]
Slots = Float[Array, "B M K H"] | Float[Array, "B M KH"]
Valid = Bool[Array, "B M"] | Bool[Array, "B M K"]


def _flat(name: str, pair, leading: int):
    """Keys and values with their heads, which come after ``leading`` axes, in one axis."""
    key, value = pair
    if key.shape != value.shape or key.dtype != value.dtype:
        raise ValueError(
            f"{name}: keys are {key.dtype}{list(key.shape)} and values {value.dtype}"
            f"{list(value.shape)}: they must agree"
        )
    return tuple(part.reshape(*part.shape[:leading], -1) for part in pair)


def _check_cache(query, key, lengths, tokens_per_row: int) -> int:
    """The number of kv heads."""
    batch, heads, head_dim = query.shape
    if key.ndim == 4 and key.shape[-1] != head_dim:
        raise ValueError(f"key has heads of {key.shape[-1]}, query of {head_dim}: they must agree")
    width = math.prod(key.shape[2:])
    if tokens_per_row < 1 or width % (tokens_per_row * head_dim):
        raise ValueError(
            f"key has rows of {width}, query has heads of {head_dim}: a row must be whole heads of "
            f"tokens_per_row={tokens_per_row} tokens"
        )
    kv_heads = width // (tokens_per_row * head_dim)
    if heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads and key has {kv_heads}: query heads must be a multiple"
        )
    if query.dtype != key.dtype:
        raise ValueError(f"query is {query.dtype}, the cache {key.dtype}: they must agree")
    for name, array in (("key", key), ("lengths", lengths)):
        if array.shape[0] != batch:
            raise ValueError(f"{name} has batch {array.shape[0]}, query has {batch}")
    return kv_heads


def _check_row(name: str, part, kv_heads: int, head_dim: int, dtype) -> None:
    if part.shape[-1] != kv_heads * head_dim or part.dtype != dtype:
        raise ValueError(
            f"{name} has {part.dtype} and rows of {part.shape[-1]}, the cache {dtype} and "
            f"{kv_heads} heads x {head_dim}: they must agree"
        )


def _check_slots(slots, slot_valid, batch: int, kv_heads: int):
    """Validity for each kv head."""
    if slots is None and slot_valid is not None:
        raise ValueError("slot_valid without slots: there is nothing for it to say")
    if slots is None:
        return None
    given = slots[0].shape[:2]
    if given[0] != batch:
        raise ValueError(f"slots has batch {given[0]}, query has {batch}")
    wanted = (*given, kv_heads)
    if slot_valid is None:
        return jnp.ones(wanted, bool)
    if slot_valid.shape not in (given, wanted):
        raise ValueError(
            f"slot_valid has shape {slot_valid.shape}, the slots need {given} or {wanted}"
        )
    if slot_valid.ndim == 2:
        slot_valid = slot_valid[..., None]
    return jnp.broadcast_to(slot_valid, wanted)


def memory_decode(
    query: Float[Array, "B N H"],
    key: Rows,
    value: Rows,
    *,
    lengths: Int[Array, " B"],
    preface: tuple[Preface, Preface] | None = None,
    slots: tuple[Slots, Slots] | None = None,
    slot_valid: Valid | None = None,
    tokens_per_row: int = 1,
    implementation: str | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one query per sequence in one softmax (Memory³ §3.2, eq. 4, while decoding).

    The arrays with their heads flat in the last axis are the fast ones: a TPU tiles the last two
    axes by 128 lanes, so that rows of 8 x 80 = 640 need no padding where 8 heads of 80 apart take
    1.6 times the bytes and are copied once more to be flattened. Zeros come out where nothing is
    visible. There is no gradient.

    Args:
      query: the queries of the tokens being decoded, rotated.
      key: caches of rotated context keys, flat (fast) or with their heads apart.
      value: caches of context values, likewise.
      lengths: tokens of each cache that are visible, from 0; those behind may hold anything.
      preface: keys and values of ``<s>Reference:``, visible to every query; flat or heads apart.
      slots: memory keys and values of each sequence; flat (fast) or heads apart.
      slot_valid: False where a slot is empty, for all kv heads or for each; an empty slot may
        hold anything. None when all are full.
      tokens_per_row: how many tokens lie side by side in a row of the cache, each with all its
        kv heads; the cache is then B x (S / tokens_per_row) x (tokens_per_row K H). For few and
        narrow kv heads: a row of 8 tokens with one head of 80 needs no padding, 80 alone would.
      implementation: a name of ``IMPLEMENTATIONS``; None picks the fastest that fits.

    Raises:
      ValueError: shapes or types that do not fit together; the message names argument and rule.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    kv_heads = _check_cache(query, key, lengths, tokens_per_row)
    key, value = _flat("key and value", (key, value), 2)
    preface = None if preface is None else _flat("preface", preface, 1)
    slots = None if slots is None else _flat("slots", slots, 2)
    for name, pair in (("preface", preface), ("slots", slots)):
        if pair is not None:
            _check_row(name, pair[0], kv_heads, query.shape[2], key.dtype)
    slot_valid = _check_slots(slots, slot_valid, query.shape[0], kv_heads)
    kwargs = dict(
        lengths=lengths,
        preface=preface,
        slots=slots,
        slot_valid=slot_valid,
        tokens_per_row=tokens_per_row,
    )
    chosen = dispatch.choose(
        "memory_decode", IMPLEMENTATIONS, implementation, (query, key, value), kwargs
    )
    return chosen.call(query, key, value, **kwargs)
