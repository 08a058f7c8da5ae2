"""The public function: checks its arguments, picks an implementation, calls it."""

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


def _check(query, key, preface, slots, slot_valid, grid) -> None:
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads and key has {kv_heads}: query heads must be a multiple"
        )
    for name, part in (("preface", preface), ("slots", slots)):
        if part is None:
            continue
        if part[0].shape[-2:] != key.shape[-2:]:
            raise ValueError(
                f"{name} has heads x head_dim {part[0].shape[-2:]}, the context {key.shape[-2:]}"
            )
        if {x.dtype for x in part} != {key.dtype}:
            raise ValueError(f"{name} is {part[0].dtype}, the context {key.dtype}: cast it before")
    if (slots is None) != (slot_valid is None):
        raise ValueError("slots and slot_valid come together: one of the two is missing")
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
        it one by one, and each sees the keys up to its own place.
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
    _check(query, key, preface, slots, slot_valid, grid)
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
