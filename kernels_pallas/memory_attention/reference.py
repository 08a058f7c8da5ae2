"""The definition of memory attention in plain JAX, to which every kernel is held.

Memory³ (arXiv 2407.01178), section 3.2, equation 4, with the preface of the text added: the query
of a context token attends, in one joint softmax, to the preface, to the memory slots of its chunk
and to the context up to itself. No gate, no extra bias, no second attention.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class ChunkGrid:
    """Which chunk's memories a context token reads.

    Context index 0 is the separator ``<s>``; the chunks of ``length`` tokens are counted from
    ``offset`` (1: the token after it), and ``<s>`` itself reads with chunk 0. A token in chunk c
    reads the slots of chunks c - band + 1 ... c: ``band`` is the number of references per chunk
    while training, where each chunk brings one reference, and 1 where each chunk brings its own.
    """

    length: int = 64
    band: int = 1
    offset: int = 1

    def __post_init__(self):
        if self.length < 1 or self.band < 1 or self.offset < 0:
            raise ValueError(f"{self}: length and band must be at least 1, offset at least 0")

    def chunk_of(self, index: Int[Array, "..."]) -> Int[Array, "..."]:
        """The chunk in which each context index lies."""
        return jnp.maximum(index - self.offset, 0) // self.length

    def visible(self, index: Int[Array, "B T"], chunks: int) -> Bool[Array, "B T C"]:
        """For each query, which chunks' slots it may read."""
        behind = self.chunk_of(index)[..., None] - jnp.arange(chunks)
        return (behind >= 0) & (behind < self.band)


def _visible_slots(
    slot_valid: Bool[Array, "B C M"], index: Int[Array, "B T"], grid: ChunkGrid | None
) -> Bool[Array, "B T CM"]:
    batch, chunks, slots = slot_valid.shape
    queries = index.shape[1]
    mask = jnp.broadcast_to(slot_valid[:, None], (batch, queries, chunks, slots))
    if grid is not None:
        mask = mask & grid.visible(index, chunks)[..., None]
    return mask.reshape(batch, queries, chunks * slots)


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
) -> Float[Array, "B T N H"]:
    """Concatenate all keys, mask, softmax in float32, weigh all values.

    Query t of sequence b has the context index start[b] + t. Context key j is visible to a query of
    context index i where j <= i, and, when segment numbers are given, where both lie in the same
    segment. Every query sees itself, so no row is empty.
    """
    batch, queries, heads, head_dim = query.shape
    query_index = start.astype(jnp.int32)[:, None] + jnp.arange(queries, dtype=jnp.int32)
    kv_heads, length = key.shape[2], key.shape[1]
    keys, values, masks = [], [], []
    if preface is not None:
        for part, into in zip(preface, (keys, values), strict=True):
            into.append(jnp.broadcast_to(part.astype(key.dtype), (batch, *part.shape)))
        masks.append(jnp.ones((batch, queries, preface[0].shape[0]), bool))
    if slots is not None:
        for part, into in zip(slots, (keys, values), strict=True):
            into.append(part.astype(key.dtype).reshape(batch, -1, kv_heads, head_dim))
        masks.append(_visible_slots(slot_valid, query_index, grid))
    causal = jnp.arange(length) <= query_index[..., None]
    if segments is not None:
        causal = causal & (segments[0][..., None] == segments[1][:, None, :])
    keys, values = jnp.concatenate([*keys, key], axis=1), jnp.concatenate([*values, value], axis=1)
    mask = jnp.concatenate([*masks, causal], axis=-1)

    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32) * (
        head_dim**-0.5
    )
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, values)
    return out.reshape(batch, queries, heads, head_dim)
