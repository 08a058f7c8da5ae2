"""Sizes of the TPU kernel, and the bytes that it copies with them."""

import dataclasses
import math
from collections.abc import Sequence

# Arrays in HBM are tiled by these, in either type.
SUBLANES, LANES = 8, 128
# Keys and values of a block: 512 rows of 640 in bfloat16. BUFFERS - 1 of them are on their way
# while one is attended to, so that the memory never idles between two copies.
BLOCK_BYTES = 1_310_720
MOST_BLOCK_ROWS = 1024
BUFFERS = 3
# Sequences in one grid step, where their caches are short: one waits for the results of its matrix
# products and reductions while another computes.
MOST_TOGETHER = 4
# The least that a chip's compiler lets a kernel use is 16 MiB.
VMEM_BYTES = 14 << 20
# A block that is not full is copied in units of at most this many rows.
UNIT = 64


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut into *rows* (a sequence, or one of its ``splits``) and blocks.

    length: rows of a cache array, of ``fold`` tokens each.
    itemsize: bytes of an element of the cache.
    slots: memory slots of a sequence, 0 for none.
    preface: tokens of the preface, 0 for none.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    slots: int
    preface: int
    splits: int = 1
    fold: int = 1

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads

    @property
    def scores(self) -> int:
        """Scores of a cache row: each query head with each of its tokens."""
        return self.fold * self.heads

    @property
    def token_width(self) -> int:
        """Elements of a token's keys."""
        return self.kv_heads * self.head_dim

    @property
    def width(self) -> int:
        """Elements of a cache row."""
        return self.fold * self.token_width

    @property
    def _row_bytes(self) -> int:
        return 2 * _up(self.width, LANES) * self.itemsize

    @property
    def block(self) -> int:
        """Cache rows of a block."""
        rows = min(MOST_BLOCK_ROWS, BLOCK_BYTES // self._row_bytes) // LANES * LANES
        return min(max(rows, LANES), _up(self.span, LANES))

    @property
    def unit(self) -> int:
        """Cache rows of the shortest copy."""
        return math.gcd(self.length, UNIT)

    @property
    def span(self) -> int:
        """Cache rows of a split: whole units."""
        return _up(-(-self.length // self.splits), self.unit)

    @property
    def rows(self) -> int:
        """Sequences times splits."""
        return self.batch * self.splits

    @property
    def together(self) -> int:
        """Rows of one grid step: as many short caches as make a block, a divisor of the batch."""
        if self.splits > 1 or self.length > self.block:
            return 1
        most = min(MOST_TOGETHER, BLOCK_BYTES // (self.block * self._row_bytes), self.batch)
        return max(n for n in range(1, max(most, 1) + 1) if self.batch % n == 0)

    @property
    def turns(self) -> int:
        """Grid steps."""
        return self.rows // self.together

    @property
    def groups(self) -> int:
        """Parts of the turns that two cores of a chip may work on side by side."""
        return min(2, self.turns)

    @property
    def per_group(self) -> int:
        """Turns of a group; the last group may have fewer."""
        return -(-self.turns // self.groups)

    @property
    def vmem_bytes(self) -> int:
        """What the kernel keeps in VMEM, without the compiler's own."""
        width = _up(self.width, LANES)
        ring = BUFFERS * self.together * self.block * self._row_bytes
        spread = self.head_dim * width * self.itemsize
        running = self.scores * width * (4 + self.together * (4 + self.itemsize))
        small = 2 * (self.together * self.slots + self.preface) * self._row_bytes // self.fold
        return ring + spread + running + small

    def floor_bytes(self, lengths: Sequence[int]) -> int:
        """Visible cache rows, slots, preface, query and output, each once."""
        tokens = sum(min(max(length, 0), self.length * self.fold) for length in lengths)
        tokens += self.batch * self.slots + self.preface
        queries = self.batch * self.heads * self.head_dim
        return 2 * self.itemsize * (tokens * self.token_width + queries)

    def copied_bytes(self, lengths: Sequence[int]) -> int:
        """What the kernel's copies move between HBM and VMEM, lane padding included."""
        width, head_dim = _up(self.token_width, LANES), _up(self.head_dim, LANES)
        split_starts = [split * self.span for split in range(self.splits)]
        cache = sum(
            self._rows_copied(n - start * self.fold) for n in lengths for start in split_starts
        )
        slots = self.batch * _up(self.slots, SUBLANES)
        validity = self.batch * _up(self.kv_heads, SUBLANES) * _up(self.slots, LANES)
        preface = self.groups * _up(self.preface, SUBLANES)
        heads = self.batch * _up(self.heads, SUBLANES)
        moved = 2 * cache * _up(self.width, LANES) + 2 * (slots + preface) * width
        moved += heads * head_dim
        moved += validity if self.slots else 0
        if self.splits == 1:
            return self.itemsize * (moved + heads * head_dim)
        # Results and log-sum-exps in float32, written, then read and merged.
        partial = self.splits * heads * (head_dim + LANES)
        return self.itemsize * (moved + heads * head_dim) + 2 * 4 * partial

    def _rows_copied(self, tokens: int) -> int:
        visible = min(-(-max(tokens, 0) // self.fold), self.span)
        return min(_up(visible, self.unit), self.length)
