"""The copies of the TPU kernel: blocks of the cache through a ring of buffers."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.memory_decode.plan import BUFFERS, Plan


def parts(total, size: int):
    """How many parts of ``size`` hold ``total``, which is not negative."""
    return jax.lax.div(total + (size - 1), size)


class Ring:
    """Blocks of the cache on their way to VMEM, in the order in which they are attended to.

    ``state`` in SMEM: the row and block to be sent for next, how many were sent for, how many were
    taken. Both counts go on from one grid step to the next.
    """

    ROW, BLOCK, SENT, TAKEN = range(4)

    def __init__(self, plan: Plan, lengths, hbm, buffers, semaphores, state):
        self.plan, self.lengths, self.hbm = plan, lengths, hbm
        self.buffers, self.semaphores, self.state = buffers, semaphores, state

    def tokens(self, row):
        """Visible tokens of a row of the grid."""
        plan = self.plan
        sequence, split = jax.lax.div(row, plan.splits), jax.lax.rem(row, plan.splits)
        length = self.lengths[jnp.minimum(sequence, plan.batch - 1)]
        length = jnp.minimum(length, plan.length * plan.fold)
        return jnp.clip(length - split * plan.span * plan.fold, 0, plan.span * plan.fold)

    def blocks(self, row):
        """Blocks of the cache that hold visible tokens of a row of the grid."""
        return parts(self.tokens(row), self.plan.block * self.plan.fold)

    def _first_with_any(self, row, end):
        """The first row from ``row`` on, before ``end``, that has visible tokens."""

        def empty(row):
            return (row < end) & (self.tokens(row) == 0)

        def step(carry):
            row = carry[0] + 1
            return row, empty(row)

        return jax.lax.while_loop(lambda carry: carry[1], step, (row, empty(row)))[0]

    def _transfer(self, row, block, slot, act):
        """``act`` on each copy of a block: one, or several where the block is not full."""
        plan = self.plan
        sequence, split = jax.lax.div(row, plan.splits), jax.lax.rem(row, plan.splits)
        first = split * plan.span + block * plan.block
        rows = parts(self.tokens(row), plan.fold) - block * plan.block

        def copy(which, offset, size):
            start = pl.multiple_of(first + offset, plan.unit)
            return pltpu.make_async_copy(
                self.hbm[which].at[sequence, pl.ds(start, size)],
                self.buffers[which].at[slot, pl.ds(pl.multiple_of(offset, plan.unit), size)],
                self.semaphores.at[which, slot],
            )

        if plan.block <= plan.length:

            @pl.when(rows >= plan.block)
            def _():
                for which in range(2):
                    act(copy(which, 0, plan.block))

        @pl.when(rows < plan.block)
        def _():
            @pl.loop(0, parts(rows, plan.unit))
            def _(number):
                for which in range(2):
                    act(copy(which, number * plan.unit, plan.unit))

    def begin(self, row, end):
        """Send for the first blocks of the rows from ``row`` to ``end``."""
        self.state[self.ROW] = self._first_with_any(row, end)
        for at in (self.BLOCK, self.SENT, self.TAKEN):
            self.state[at] = 0
        for _ in range(BUFFERS - 1):
            self.send(end)

    def send(self, end):
        """Send for the next block, if one is left, into the buffer that was taken last."""
        row, block = self.state[self.ROW], self.state[self.BLOCK]

        @pl.when(row < end)
        def _():
            slot = jax.lax.rem(self.state[self.SENT], BUFFERS)
            self._transfer(row, block, slot, lambda copy: copy.start())
            self.state[self.SENT] += 1
            over = block + 1 >= self.blocks(row)
            self.state[self.BLOCK] = jnp.where(over, 0, block + 1)

            @pl.when(over)
            def _():
                self.state[self.ROW] = self._first_with_any(row + 1, end)

    def take(self, row, block):
        """Wait for a block; its keys, its values and how many of its tokens are visible.

        What is behind may hold anything. The values there are made zero, since zero weight does
        not undo NaN, and so are the keys where a visible token shares their row.
        """
        plan = self.plan
        slot = jax.lax.rem(self.state[self.TAKEN], BUFFERS)
        self.state[self.TAKEN] += 1
        self._transfer(row, block, slot, lambda copy: copy.wait())
        tokens = self.tokens(row) - block * plan.block * plan.fold
        keys, values = (buffer.at[slot] for buffer in self.buffers)

        @pl.when(tokens < plan.block * plan.fold)
        def _():
            place, column = (jax.lax.broadcasted_iota(jnp.int32, values.shape, a) for a in (0, 1))
            token = place * plan.fold + jax.lax.div(column, plan.token_width)
            for part in (keys, values) if plan.fold > 1 else (values,):
                part[...] = jnp.where(token < tokens, part[...], 0)

        return keys[...], values[...], tokens
