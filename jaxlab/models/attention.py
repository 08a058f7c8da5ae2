"""Grouped-query attention: projections here, the softmax in ``kernels_pallas.memory_attention``."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.models.layers import join, normal, project, rotate
from jaxlab.sharding.ops import by_device
from kernels_pallas.memory_attention import ChunkGrid, memory_attention
from kernels_pallas.memory_decode import memory_decode

# Axes of what the kernels read. Rows and kv heads need nothing of each other, so that on a mesh
# each device calls the kernel, which XLA cannot cut, for those it has.
READ_NAMES = {
    "query": ("batch", None, "heads", None),
    "key": ("batch", None, "kv_heads", None),
    "value": ("batch", None, "kv_heads", None),
    "start": ("batch",),
    "preface": (None, "kv_heads", None),
    "slots": ("batch", None, None, "kv_heads", None),
    "slot_valid": ("batch", None, None),
    "segments": ("batch", None),
}
# The cache is flat: a head of it is ``head_dim`` numbers of the last axis.
DECODE_NAMES = {
    "query": ("batch", "heads", None),
    "key": ("batch", None, "kv_heads"),
    "value": ("batch", None, "kv_heads"),
    "lengths": ("batch",),
    "preface": (None, "kv_heads", None),
    "slots": ("batch", None, "kv_heads", None),
    "slot_valid": ("batch", None),
}


class KeyValues(NamedTuple):
    """Keys (rotated) and values; leading axes depend on where they come from."""

    keys: Float[Array, "..."]
    values: Float[Array, "..."]


class Slots(NamedTuple):
    """Memory slots of every memory layer and chunk, the pytree that the decoder reads.

    keys, values: (memory layers, B, C, M, K, H), keys rotated at their in-reference positions.
    valid: (B, C, M), False where a slot is empty; the same for all layers and heads.
    """

    keys: Float[Array, "L B C M K H"]
    values: Float[Array, "L B C M K H"]
    valid: Bool[Array, "B C M"]


@dataclasses.dataclass(frozen=True)
class ReadingPlan:
    """What every layer of one forward pass shares: where the queries stand, who reads what."""

    index: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None = None
    grid: ChunkGrid | None = None
    slot_valid: Bool[Array, "B C M"] | None = None


class Projected(NamedTuple):
    """Queries and keys before rotation, and values."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K H"]


class Attention(nnx.Module):
    """The four projections of one stack of layers."""

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        theta: float,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
    ):
        self.theta = theta
        self.kv_shape = (kv_heads, head_dim)
        into = ("layers", "embed", "heads", "head_dim")
        into_kv = ("layers", "embed", "kv_heads", "head_dim")
        out = ("layers", "heads", "head_dim", "embed")
        self.query = normal(rngs, (layers, width, heads, head_dim), into, std)
        self.key = normal(rngs, (layers, width, kv_heads, head_dim), into_kv, std)
        self.value = normal(rngs, (layers, width, kv_heads, head_dim), into_kv, std)
        self.output = normal(rngs, (layers, heads, head_dim, width), out, out_std)

    def project(self, x: Float[Array, "B T D"]) -> Projected:
        """Queries, keys (neither rotated) and values of one layer."""
        weights = (self.query[...], self.key[...], self.value[...])
        return Projected(*(project(x, w) for w in weights))

    def rotate(self, x: Float[Array, "B T K H"], positions: Int[Array, "B T"]):
        """Rotary embedding with this model's base."""
        return rotate(x, positions, theta=self.theta)

    def read(
        self,
        query: Float[Array, "B T N H"],
        context: KeyValues,
        plan: ReadingPlan,
        *,
        preface: KeyValues | None,
        slots: KeyValues | None,
    ) -> Float[Array, "B T D"]:
        """Joint softmax over preface, slots and context, then the output projection."""
        preface, slots = (_of_dtype(part, query.dtype) for part in (preface, slots))
        out = by_device(
            functools.partial(memory_attention, grid=None if slots is None else plan.grid),
            {
                "query": query,
                "key": context.keys,
                "value": context.values,
                "start": plan.index[:, 0],
                "preface": preface,
                "slots": slots,
                "slot_valid": None if slots is None else plan.slot_valid,
                "segments": None if plan.segments is None else (plan.segments, plan.segments),
            },
            READ_NAMES,
            READ_NAMES["query"],
        )
        return project(out, self.output[...], inputs=2)

    def read_cached(
        self,
        query: Float[Array, "B T N H"],
        cache: KeyValues,
        plan: ReadingPlan,
        *,
        preface: KeyValues | None,
        slots: KeyValues | None,
    ) -> Float[Array, "B T D"]:
        """The same from a flat cache; a single token by the op that is made for decoding.

        With a grid, a token reads the slots of its own chunk among several: not that op's work.
        """
        if query.shape[1] > 1 or plan.grid is not None:
            apart = (part.reshape(*part.shape[:2], *self.kv_shape) for part in cache)
            apart = KeyValues(*apart)
            return self.read(query, apart, plan, preface=preface, slots=slots)
        preface, slots = (_of_dtype(part, query.dtype) for part in (preface, slots))
        out = by_device(
            memory_decode,
            {
                "query": query[:, 0],
                "key": cache.keys,
                "value": cache.values,
                "lengths": plan.index[:, 0] + 1,
                "preface": preface,
                "slots": None if slots is None else tuple(part[:, 0] for part in slots),
                "slot_valid": None if slots is None else plan.slot_valid[:, 0],
            },
            DECODE_NAMES,
            DECODE_NAMES["query"],
        )
        return project(out[:, None], self.output[...], inputs=2)


class JoinedAttention(Attention):
    """The same of one layer with its three inner projections in one, made of :class:`Attention`."""

    def __init__(self, apart: Attention):
        self.theta, self.kv_shape, self.output = apart.theta, apart.kv_shape, apart.output
        self.inner = join(apart.query, apart.key, apart.value)

    def project(self, x: Float[Array, "B T D"]) -> Projected:
        """Queries, keys (neither rotated) and values of one layer."""
        heads = project(x, self.inner[...])
        count, kv_heads = heads.shape[2], self.kv_shape[0]
        return Projected(*jnp.split(heads, (count - 2 * kv_heads, count - kv_heads), axis=2))


def _of_dtype(part: KeyValues | None, dtype) -> KeyValues | None:
    return None if part is None else KeyValues(*(x.astype(dtype) for x in part))


def write_into(cache: KeyValues, new: KeyValues, start: Int[Array, " B"]) -> KeyValues:
    """Write the keys and values of this call into each sequence's cache from its own ``start``.

    The cache is flat, (B, S, K H); what is new is (B, T, K, H).
    """

    def one(buffer, rows, at):
        rows = rows.reshape(rows.shape[0], -1).astype(buffer.dtype)
        return jax.lax.dynamic_update_slice_in_dim(buffer, rows, at, axis=0)

    return KeyValues(*(jax.vmap(one)(b, n, start) for b, n in zip(cache, new, strict=True)))
