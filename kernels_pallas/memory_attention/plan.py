"""What a block of queries visits: blocks of the context, and its window of memory slots.

Everything here is small and in plain JAX: one entry for each block or window, not for each score.
The gradient of the windows' keys and values flows back to preface and slots by autodiff.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.memory_attention.reference import ChunkGrid

LANES = 128
_ALWAYS = np.iinfo(np.int32).max


class Windows(NamedTuple):
    """Preface and slots that one unit of consecutive queries can see, padded to whole lanes.

    keys, values: (B, U, W, K, H); what is empty is zero. interval: (B, U, 2, W), the query indices
    [from, to) that see each entry.
    """

    keys: Float[Array, "B U W K H"]
    values: Float[Array, "B U W K H"]
    interval: Int[Array, "B U 2 W"]


def windows(
    start: Int[Array, " B"],
    units: int,
    unit: int,
    *,
    preface: tuple[Float[Array, "P K H"], Float[Array, "P K H"]] | None,
    slots: tuple[Float[Array, "B C M K H"], Float[Array, "B C M K H"]] | None,
    slot_valid: Bool[Array, "B C M"] | None,
    grid: ChunkGrid | None,
    dtype: jnp.dtype,
) -> Windows | None:
    """The window of each unit of ``unit`` queries; None without preface and slots."""
    if preface is None and slots is None:
        return None
    batch = start.shape[0]
    keys, values, interval = [], [], []
    if preface is not None:
        for part, into in zip(preface, (keys, values), strict=True):
            into.append(jnp.broadcast_to(part.astype(dtype), (batch, units, *part.shape)))
        always = jnp.array([[0], [_ALWAYS]], jnp.int32)
        interval.append(jnp.broadcast_to(always, (batch, units, 2, preface[0].shape[0])))
    if slots is not None:
        chunks = _chunks_seen(start, units, unit, slots[0].shape[1], grid)
        seen, visible = _slots_seen(chunks, slot_valid, grid)
        for part, into in zip(slots, (keys, values), strict=True):
            rows = _take(part.astype(dtype), chunks)
            into.append(
                jnp.where(seen[..., None, None], rows.reshape(*seen.shape, *part.shape[3:]), 0)
            )
        interval.append(visible)
    filled = sum(part.shape[2] for part in keys)
    padding = -filled % LANES
    pad_rows = ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0))
    return Windows(
        jnp.pad(jnp.concatenate(keys, axis=2), pad_rows),
        jnp.pad(jnp.concatenate(values, axis=2), pad_rows),
        jnp.pad(jnp.concatenate(interval, axis=3), ((0, 0), (0, 0), (0, 0), (0, padding))),
    )


def _take(per_chunk: Array, chunks: Int[Array, "B U N"]) -> Array:
    """Entries of (B, C, ...) by chunk number; numbers outside are clipped."""
    return jax.vmap(lambda rows, at: jnp.take(rows, at, axis=0, mode="clip"))(per_chunk, chunks)


def _chunks_seen(start, units: int, unit: int, chunks: int, grid: ChunkGrid | None):
    """Numbers of the chunks that a unit's queries may read; some lie outside the row."""
    shape = (start.shape[0], units)
    reach = chunks if grid is None else (unit - 1) // grid.length + 1 + grid.band
    if reach >= chunks:
        return jnp.broadcast_to(jnp.arange(chunks), (*shape, chunks))
    first = grid.chunk_of(start[:, None] + jnp.arange(units) * unit) - (grid.band - 1)
    return first[..., None] + jnp.arange(reach)


def _slots_seen(chunks, slot_valid, grid: ChunkGrid | None):
    """Which entries (B, U, N * M) hold a slot, and the query indices that see each."""
    slots, total = slot_valid.shape[2], slot_valid.shape[1]
    inside = (chunks >= 0) & (chunks < total)
    seen = (_take(slot_valid, chunks) & inside[..., None]).reshape(*chunks.shape[:2], -1)
    if grid is None:
        first, last = jnp.zeros_like(chunks), jnp.full_like(chunks, _ALWAYS)
    else:
        # The token before the grid, <s>, reads with chunk 0.
        first = jnp.where(chunks == 0, 0, grid.offset + chunks * grid.length)
        last = grid.offset + (chunks + grid.band) * grid.length
    each = [jnp.where(seen, jnp.repeat(bound, slots, axis=-1), 0) for bound in (first, last)]
    return seen, jnp.stack(each, axis=2).astype(jnp.int32)


class Visits(NamedTuple):
    """For each block of queries (B, Q) the blocks of keys [first, end) that it sees something of.

    [whole_first, whole_end) within are seen whole by every query; ``diagonal`` tells that the keys
    from the block's own first query on, ``block_q`` of them, are a plain causal square of one
    document; then ``end`` stops before them.
    """

    first: Int[Array, "B Q"]
    whole_first: Int[Array, "B Q"]
    whole_end: Int[Array, "B Q"]
    end: Int[Array, "B Q"]
    diagonal: Int[Array, "B Q"]


def visits(
    start: Int[Array, " B"],
    sizes: tuple[int, int, int],
    block_q: int,
    block_k: int,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
) -> Visits:
    """Which blocks are visited and how; blocks that the mask empties are outside every range.

    ``sizes`` are the real queries, the queries with their padding, and the real keys.
    """
    queries, padded_queries, keys = sizes
    rows, columns = padded_queries // block_q, -(-keys // block_k)
    low = start[:, None] + jnp.arange(rows) * block_q
    high = start[:, None] + jnp.minimum((jnp.arange(rows) + 1) * block_q, queries) - 1
    begin = jnp.arange(columns) * block_k
    seen = (begin <= high[..., None]) & (low <= high)[..., None]
    whole = (begin + block_k - 1 <= low[..., None]) & (begin + block_k <= keys)
    padded = columns * block_k
    diagonal = (low % block_k == 0) & (low + block_q <= padded) & (low <= high)
    # Behind the last query a cache may hold anything; padding is zero.
    ends = start[:, None] + queries
    diagonal &= (low + block_q <= ends) | (keys <= ends)
    if segments is not None:
        mine, theirs = (
            _block_range(part, size)
            for part, size in zip(segments, (block_q, block_k), strict=True)
        )
        seen &= (theirs[0][:, None] <= mine[1][..., None]) & (
            mine[0][..., None] <= theirs[1][:, None]
        )
        one = mine[0] == mine[1]
        same = one[..., None] & (theirs[0] == theirs[1])[:, None]
        same &= theirs[0][:, None] == mine[0][..., None]
        whole &= same
        own = (begin >= low[..., None]) & (begin < low[..., None] + block_q)
        diagonal &= jnp.all(same | ~own, axis=-1)
    # The keys of the diagonal are visited on their own.
    seen &= ~(diagonal[..., None] & (begin >= low[..., None]))
    first = jnp.argmax(seen, axis=-1)
    end = jnp.where(seen.any(-1), columns - jnp.argmax(seen[..., ::-1], axis=-1), first)
    whole &= seen
    whole_first = jnp.where(whole.any(-1), jnp.argmax(whole, axis=-1), first)
    # The first run of whole blocks; what else is whole is masked like any other block.
    stops = ~whole & (jnp.arange(columns) >= whole_first[..., None])
    whole_end = jnp.where(stops.any(-1), jnp.argmax(stops, axis=-1), columns)
    parts = (first, whole_first, jnp.minimum(whole_end, end), end, diagonal)
    return Visits(*(part.astype(jnp.int32) for part in parts))


def _block_range(numbers: Int[Array, "B L"], block: int) -> tuple[Array, Array]:
    """Smallest and largest number in each block; the last block holds what is left."""
    length = numbers.shape[1]
    edge = ((0, 0), (0, -length % block))
    blocks = jnp.pad(numbers, edge, mode="edge").reshape(numbers.shape[0], -1, block)
    return blocks.min(-1), blocks.max(-1)
