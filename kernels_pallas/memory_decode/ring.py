"""The copies of the TPU kernel: blocks of the cache through a ring of buffers."""

import functools

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

    ``state`` in SMEM: the turn and block to be sent for next, how many were sent for, how many were
    taken. Both counts go on from one grid step to the next.
    """

    TURN, BLOCK, SENT, TAKEN = range(4)

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

    def blocks(self, turn):
        """Blocks of the longest cache of a turn that hold visible tokens."""
        rows = (turn * self.plan.together + member for member in range(self.plan.together))
        longest = functools.reduce(jnp.maximum, map(self.tokens, rows))
        return parts(longest, self.plan.block * self.plan.fold)

    def _first_with_any(self, turn, end):
        """The first turn from ``turn`` on, before ``end``, that has visible tokens."""

        def empty(turn):
            return (turn < end) & (self.blocks(turn) == 0)

        def step(carry):
            turn = carry[0] + 1
            return turn, empty(turn)

        return jax.lax.while_loop(lambda carry: carry[1], step, (turn, empty(turn)))[0]

    def _transfer(self, turn, block, slot, act):
        """``act`` on each copy of a block for every member of a turn."""
        for member in range(self.plan.together):
            row = turn * self.plan.together + member
            self._transfer_row(row, block, slot * self.plan.together + member, slot, act)

    def _transfer_row(self, row, block, place, slot, act):
        """``act`` on each copy of a block: one, or several where the block is not full."""
        plan = self.plan
        sequence, split = jax.lax.div(row, plan.splits), jax.lax.rem(row, plan.splits)
        first = split * plan.span + block * plan.block
        rows = parts(self.tokens(row), plan.fold) - block * plan.block

        def copy(which, offset, size):
            start = pl.multiple_of(first + offset, plan.unit)
            return pltpu.make_async_copy(
                self.hbm[which].at[sequence, pl.ds(start, size)],
                self.buffers[which].at[place, pl.ds(pl.multiple_of(offset, plan.unit), size)],
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

    def begin(self, turn, end):
        """Send for the first blocks of the turns from ``turn`` to ``end``."""
        self.state[self.TURN] = self._first_with_any(turn, end)
        for at in (self.BLOCK, self.SENT, self.TAKEN):
            self.state[at] = 0
        for _ in range(BUFFERS - 1):
            self.send(end)

    def send(self, end):
        """Send for the next block, if one is left, into the buffer that was taken last."""
        turn, block = self.state[self.TURN], self.state[self.BLOCK]

        @pl.when(turn < end)
        def _():
            slot = jax.lax.rem(self.state[self.SENT], BUFFERS)
            self._transfer(turn, block, slot, lambda copy: copy.start())
            self.state[self.SENT] += 1
            over = block + 1 >= self.blocks(turn)
            self.state[self.BLOCK] = jnp.where(over, 0, block + 1)

            @pl.when(over)
            def _():
                self.state[self.TURN] = self._first_with_any(turn + 1, end)

    def take(self, turn, block):
        """Wait for a block; for each member its keys, values and how many tokens are visible."""
        slot = jax.lax.rem(self.state[self.TAKEN], BUFFERS)
        self.state[self.TAKEN] += 1
        self._transfer(turn, block, slot, lambda copy: copy.wait())
        members = []
        for member in range(self.plan.together):
            before = block * self.plan.block * self.plan.fold
            tokens = self.tokens(turn * self.plan.together + member) - before
            place = slot * self.plan.together + member
            keys, values = (buffer.at[place] for buffer in self.buffers)
            self._clear_behind(keys, values, tokens)
            members.append((keys, values, tokens))
        return members

    def _clear_behind(self, keys, values, tokens):
        """Zeros for what is behind the visible tokens, which may hold anything.

        Zero weight does not undo the NaN of a value. Keys need it where a visible token shares
        their row, since the zeros of the block-diagonal query do not undo it either.
        """
        plan = self.plan

        @pl.when(tokens < plan.block * plan.fold)
        def _():
            place, column = (jax.lax.broadcasted_iota(jnp.int32, values.shape, a) for a in (0, 1))
            token = place * plan.fold + jax.lax.div(column, plan.token_width)
            for part in (keys, values) if plan.fold > 1 else (values,):
                part[...] = jnp.where(token < tokens, part[...], 0)
