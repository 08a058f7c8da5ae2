"""The k-th smallest magnitude of a whole pytree, exactly, without sorting or gathering it.

Non-negative floats are ordered like their bit patterns. So the value is found digit by digit: eight
passes, each of which counts, for the sixteen values of the next four bits, how many elements lie
below. Only counts cross devices: a sharded tree costs scalar reductions and no gather.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

_DIGIT_BITS = 4
_DIGITS = 1 << _DIGIT_BITS
_LIMB_BITS = 16  # counts are pairs (high, low) of which low < 2^16: up to 2^48 elements
_INFINITY = np.uint32(0x7F800000)

AxisName = str | tuple[str, ...] | None
Count = tuple[UInt32[Array, "*digits"], UInt32[Array, "*digits"]]


def magnitude_bits(leaf: Array) -> UInt32[Array, "..."]:
    """Bit patterns of |leaf| in float32, which sort like the magnitudes; NaN sorts last."""
    magnitude = jnp.abs(leaf).astype(jnp.float32)
    return jax.lax.bitcast_convert_type(magnitude, jnp.uint32)


def count_of(number: int) -> Count:
    """A Python integer as a count."""
    return jnp.uint32(number >> _LIMB_BITS), jnp.uint32(number & ((1 << _LIMB_BITS) - 1))


def share_of(share: Float[Array, ""], total: Count) -> Count:
    """floor(share * total), at least 1, for a traced share: exact up to float32's rounding."""
    whole = jnp.maximum(jnp.floor(share * as_float(total)), 1.0)
    high = jnp.floor(whole / (1 << _LIMB_BITS))
    low = whole - high * (1 << _LIMB_BITS)
    rank = high.astype(jnp.uint32), low.astype(jnp.uint32)
    # The total itself may have been rounded up.
    beyond = _less(total, rank)
    return jnp.where(beyond, total[0], rank[0]), jnp.where(beyond, total[1], rank[1])


def as_float(count: Count) -> Float[Array, ""]:
    """A count as a float32."""
    high, low = (part.astype(jnp.float32) for part in count)
    return high * (1 << _LIMB_BITS) + low


def add(left: Count, right: Count) -> Count:
    """The sum of two counts."""
    return _carried(left[0] + right[0], left[1] + right[1])


def subtract(left: Count, right: Count) -> Count:
    """``left - right``, which must not be negative."""
    borrow = (left[1] < right[1]).astype(jnp.uint32)
    return left[0] - right[0] - borrow, left[1] + (borrow << _LIMB_BITS) - right[1]


def count_true(parts: Sequence[Bool[Array, "..."]], axis_name: AxisName = None) -> Count:
    """How many elements of some arrays are True, over all shards of the named axes."""
    return _total([_count(part) for part in parts], axis_name)


def kth_smallest_bits(
    bits: Sequence[UInt32[Array, "..."]], rank: Count, axis_name: AxisName = None
) -> UInt32[Array, ""]:
    """Bits of the ``rank``-th smallest (from 1) of all elements of some arrays, as if sorted.

    Within ``jax.shard_map`` the arrays are shards of the whole along the named axes.
    """

    def next_digit(number: Array, prefix: UInt32[Array, ""]) -> UInt32[Array, ""]:
        shift = (jnp.uint32(32 // _DIGIT_BITS - 1) - number.astype(jnp.uint32)) * _DIGIT_BITS
        bounds = prefix + (jnp.arange(1, _DIGITS, dtype=jnp.uint32) << shift)
        parts = [_counts_below(part, bounds) for part in bits]
        counts = [_total(of_one_bound, axis_name) for of_one_bound in zip(*parts, strict=True)]
        # The digit is the number of bounds with too few elements below.
        digit = sum(_less(count, rank).astype(jnp.uint32) for count in counts)
        return prefix + (digit << shift)

    return jax.lax.fori_loop(0, 32 // _DIGIT_BITS, next_digit, jnp.uint32(0))


def finite_bits(bits: UInt32[Array, ""]) -> Bool[Array, ""]:
    """Whether a bit pattern is that of a finite number."""
    return bits < _INFINITY


def _counts_below(part: UInt32[Array, "..."], bounds: UInt32[Array, " bounds"]) -> list[Count]:
    """For each bound, how many elements of one array are smaller."""
    if jax.device_count() > 1 or part.size >= 1 << 32:
        return _in_reductions(part, bounds)
    # What counts is the platform that is compiled for: from here it may be a pod of TPUs.
    return jax.lax.platform_dependent(part, bounds, cpu=_in_one_reduction, default=_in_reductions)


def _in_reductions(part: UInt32[Array, "..."], bounds: UInt32[Array, " bounds"]) -> list[Count]:
    """A reduction for each bound, which TPU and GPU compilers join into one pass."""
    return [_count(part < bound) for bound in bounds]


def _in_one_reduction(part: UInt32[Array, "..."], bounds: UInt32[Array, " bounds"]) -> list[Count]:
    """On a CPU fifty times as fast; but partitioned over devices it gathers."""
    below = tuple((part < bound).astype(jnp.uint32) for bound in bounds)
    zeros = tuple(jnp.uint32(0) for _ in below)
    axes = tuple(range(part.ndim))
    totals = jax.lax.reduce(
        below, zeros, lambda left, right: tuple(map(jnp.add, left, right)), axes
    )
    return [_limbs(total) for total in totals]


def _count(part: Bool[Array, "..."]) -> Count:
    """True elements of one array; the rows are counted first so that no sum can overflow."""
    if part.size < 1 << 32:
        return _limbs(jnp.sum(part, dtype=jnp.uint32))
    rows = jnp.sum(part, axis=tuple(range(1, part.ndim)), dtype=jnp.uint32)
    if math.prod(part.shape[1:]) >= 1 << 32 or part.shape[0] > 1 << _LIMB_BITS:
        raise ValueError(f"an array of shape {part.shape} is too large to be counted by rows")
    high, low = rows >> _LIMB_BITS, rows & ((1 << _LIMB_BITS) - 1)
    return _carried(jnp.sum(high, dtype=jnp.uint32), jnp.sum(low, dtype=jnp.uint32))


def _limbs(total: UInt32[Array, ""]) -> Count:
    return total >> _LIMB_BITS, total & ((1 << _LIMB_BITS) - 1)


def _total(counts: Sequence[Count], axis_name: AxisName) -> Count:
    # Fewer than 2^16 arrays, so the low limbs cannot overflow; and then fewer than 2^16 shards.
    zero = jnp.uint32(0)
    high = sum((count[0] for count in counts), start=zero)
    low = sum((count[1] for count in counts), start=zero)
    total = _carried(high, low)
    return total if axis_name is None else _carried(*jax.lax.psum(total, axis_name))


def _carried(high: Array, low: Array) -> Count:
    return high + (low >> _LIMB_BITS), low & ((1 << _LIMB_BITS) - 1)


def _less(left: Count, right: Count) -> Bool[Array, ""]:
    return (left[0] < right[0]) | ((left[0] == right[0]) & (left[1] < right[1]))
