"""Memory decoding as a Pallas TPU kernel, bound by the copy of the cache.

The matrix unit is idle anyway, so it does the work of every relayout. The query of all heads is
spread over a block-diagonal matrix of N x (K H), whose row n holds query n in the columns of its
own kv head: one product with a block of the flat cache gives the scores of all heads, one more
adds all the weighted values; of the N x (K H) sums, every head keeps its own H columns. The rows of
the cache are never moved within a register, a head of 80 wastes nothing, and the exponentials fill
their lanes.

Blocks of the cache travel through a ring of buffers across sequences: while one is attended to,
the next ones, be they of the next sequence, are on their way. Slots and preface are a first small
block of each sequence, in the same running softmax.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dispatch
from kernels_pallas.memory_decode.plan import BUFFERS, LANES, Plan

# In place of minus infinity, so that the difference of two is 0 and not NaN.
MASKED = -1e30


def _dot(a, b, contract: tuple[int, int]):
    """A product in float32; float32 operands are not rounded."""
    if 1 in (*a.shape, *b.shape):  # The compiler has no bfloat16 product of a single row.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _parts(total, size: int):
    """How many parts of ``size`` hold ``total``, which is not negative."""
    return jax.lax.div(total + (size - 1), size)


class _Ring:
    """Blocks of the cache on their way to VMEM, in the order in which they are attended to.

    ``state`` in SMEM: the row and block to be sent for next, how many were sent for, how many were
    taken. Both counts go on from one grid step to the next.
    """

    ROW, BLOCK, SENT, TAKEN = range(4)

    def __init__(self, plan: Plan, lengths, hbm, buffers, semaphores, state):
        self.plan, self.lengths, self.hbm = plan, lengths, hbm
        self.buffers, self.semaphores, self.state = buffers, semaphores, state

    def visible(self, row):
        """Cache rows that are visible in a row of the grid."""
        plan = self.plan
        sequence, split = jax.lax.div(row, plan.splits), jax.lax.rem(row, plan.splits)
        length = jnp.minimum(self.lengths[jnp.minimum(sequence, plan.batch - 1)], plan.length)
        return jnp.clip(length - split * plan.span, 0, plan.span)

    def _first_with_any(self, row, end):
        """The first row from ``row`` on, before ``end``, that has visible cache rows."""

        def empty(row):
            return (row < end) & (self.visible(row) == 0)

        def step(carry):
            row = carry[0] + 1
            return row, empty(row)

        return jax.lax.while_loop(lambda carry: carry[1], step, (row, empty(row)))[0]

    def _transfer(self, row, block, slot, act):
        """``act`` on each copy of a block: one, or several where the block is not full."""
        plan = self.plan
        sequence, split = jax.lax.div(row, plan.splits), jax.lax.rem(row, plan.splits)
        first = split * plan.span + block * plan.block
        rows = self.visible(row) - block * plan.block

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
            @pl.loop(0, _parts(rows, plan.unit))
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
            over = (block + 1) * self.plan.block >= self.visible(row)
            self.state[self.BLOCK] = jnp.where(over, 0, block + 1)

            @pl.when(over)
            def _():
                self.state[self.ROW] = self._first_with_any(row + 1, end)

    def take(self, row, block):
        """Wait for a block; its keys, its values and how many of its rows are visible.

        The values behind are made zero: they may hold anything, and zero weight does not undo NaN.
        """
        slot = jax.lax.rem(self.state[self.TAKEN], BUFFERS)
        self.state[self.TAKEN] += 1
        self._transfer(row, block, slot, lambda copy: copy.wait())
        rows = self.visible(row) - block * self.plan.block
        keys, values = (buffer.at[slot] for buffer in self.buffers)

        @pl.when(rows < self.plan.block)
        def _():
            behind = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) >= rows
            values[...] = jnp.where(behind, 0, values[...])

        return keys[...], values[...], rows


def _constants(plan: Plan, spread, own):
    """spread: H x KH, the unit matrix beside itself K times. own: N x KH, 1 in a head's columns."""
    row = jax.lax.broadcasted_iota(jnp.int32, spread.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, spread.shape, 1)
    spread[...] = (jax.lax.rem(column, plan.head_dim) == row).astype(spread.dtype)
    group = plan.heads // plan.kv_heads
    head = jax.lax.broadcasted_iota(jnp.int32, (plan.heads, 1), 0)
    head = jax.lax.div(head, group) * plan.head_dim
    column = jax.lax.broadcasted_iota(jnp.int32, own.shape, 1)
    own[...] = ((column >= head) & (column < head + plan.head_dim)).astype(own.dtype)


def _one_hot(rows: int, columns: int, group: tuple[int, int], dtype):
    """1 where the kv head of a row is that of a column; ``group`` of either make up a kv head."""
    places = (jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in range(2))
    row, column = (jax.lax.div(place, size) for place, size in zip(places, group, strict=True))
    return (row == column).astype(dtype)


def _lane_sums(weights):
    """Sums over the last axis that keep its 128 lanes apart: adding them up waits for the end."""
    parts = [weights[:, at : at + LANES] for at in range(0, weights.shape[1], LANES)]
    return functools.reduce(jnp.add, parts)


def _attend_small(plan: Plan, spread_query, preface, slots, valid, running):
    """Begin the running softmax with the preface and the slots."""
    top, total, sums = running
    parts, masks = [], []
    if preface is not None:
        parts.append(tuple(part[...] for part in preface))
        masks.append(None)
    if slots is not None:
        keys, values = (part[...] for part in slots)
        group = plan.heads // plan.kv_heads
        of_head = _one_hot(plan.heads, plan.kv_heads, (group, 1), valid.dtype)
        of_column = _one_hot(plan.kv_heads, plan.width, (1, plan.head_dim), valid.dtype)
        values = jnp.where(_dot(valid[...], of_column, (0, 0)) > 0.5, values, 0)
        parts.append((keys, values.astype(keys.dtype)))
        masks.append(_dot(of_head, valid[...], (1, 0)) > 0.5)
    highest, scores = jnp.full((plan.heads, 1), MASKED, jnp.float32), []
    for (keys, _), mask in zip(parts, masks, strict=True):
        score = _dot(spread_query, keys, (1, 1)) * plan.head_dim**-0.5
        scores.append(score if mask is None else jnp.where(mask, score, MASKED))
        highest = jnp.maximum(highest, scores[-1].max(axis=1, keepdims=True))
    top[...] = jnp.broadcast_to(highest, top.shape)
    ones, summed = jnp.zeros((plan.heads, 1), jnp.float32), jnp.zeros(sums.shape, jnp.float32)
    for (_, values), mask, score in zip(parts, masks, scores, strict=True):
        weights = jnp.exp(score - highest)
        weights = weights if mask is None else jnp.where(mask, weights, 0)
        ones += weights.sum(axis=1, keepdims=True)
        summed += _dot(weights.astype(values.dtype), values, (1, 0))
    # The total is the sum over its lanes.
    first = jax.lax.broadcasted_iota(jnp.int32, total.shape, 1) == 0
    total[...] = jnp.where(first, ones, 0)
    sums[...] = summed


def _attend_block(plan: Plan, spread_query, keys, values, rows, running):
    """Take a block of the cache into the running softmax."""
    top, total, sums = running
    scores = _dot(spread_query, keys, (1, 1)) * plan.head_dim**-0.5
    place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(place < rows, scores, MASKED)
    before = top[:, :1]
    highest = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    weights = jnp.exp(scores - highest)
    decay = jnp.exp(before - highest)
    top[...] = jnp.broadcast_to(highest, top.shape)
    total[...] = total[...] * decay + _lane_sums(weights)
    sums[...] = sums[...] * decay + _dot(weights.astype(values.dtype), values, (1, 0))


def _finish(running, spread, own, out, log_total):
    """Divide, keep each head's own columns; where nothing was visible, zeros."""
    top, total, sums = running
    weight = total[...].sum(axis=1, keepdims=True)
    mean = sums[...] / jnp.where(weight > 0, weight, 1)
    # Rounded to the output's type first, so that the product only moves it.
    mean = jnp.where(own[...] > 0, mean, 0).astype(out.dtype)
    out[...] = _dot(mean, spread[...].astype(out.dtype), (1, 1)).astype(out.dtype)
    if log_total is not None:
        log = top[:, :1] + jnp.log(jnp.where(weight > 0, weight, 1))
        log_total[...] = jnp.where(weight > 0, log, MASKED)


def _kernel(lengths, *refs, plan: Plan):
    refs = list(refs)
    query, hbm = refs.pop(0), (refs.pop(0), refs.pop(0))
    preface = (refs.pop(0), refs.pop(0)) if plan.preface else None
    slots, valid = ((refs.pop(0), refs.pop(0)), refs.pop(0)) if plan.slots else (None, None)
    out, log_total = refs.pop(0), refs.pop(0) if plan.splits > 1 else None
    spread, own, top, total, sums, *buffers, semaphores, state = refs
    ring = _Ring(plan, lengths, hbm, buffers, semaphores, state)
    running = top, total, sums
    first = pl.program_id(0) * plan.per_group
    end = jnp.minimum(first + plan.per_group, plan.rows)
    row = first + pl.program_id(1)

    @pl.when(pl.program_id(1) == 0)
    def _():
        ring.begin(first, end)
        _constants(plan, spread, own)

    @pl.when(row < end)
    def _():
        wide = _dot(query[...], spread[...], (1, 0))
        spread_query = jnp.where(own[...] > 0, wide, 0).astype(query.dtype)

        def small(*with_parts):
            _attend_small(plan, spread_query, *with_parts, running)

        if plan.splits == 1:
            small(preface, slots, valid)
        else:
            pl.when(jax.lax.rem(row, plan.splits) == 0)(lambda: small(preface, slots, valid))
            pl.when(jax.lax.rem(row, plan.splits) != 0)(lambda: small(None, None, None))

        @pl.loop(0, _parts(ring.visible(row), plan.block))
        def _(block):
            ring.send(end)
            keys, values, rows = ring.take(row, block)
            _attend_block(plan, spread_query, keys, values, rows, running)

        _finish(running, spread, own, out, log_total)


def _specs(plan: Plan, dtype):
    """Specs of the inputs and outputs; shapes of the outputs and of the scratch memory."""

    def row(group, step):
        return jnp.minimum(group * plan.per_group + step, plan.rows - 1)

    def of_sequence(*shape):
        return pl.BlockSpec((None, *shape), lambda g, j, _: (jax.lax.div(row(g, j), plan.splits), 0, 0))

    def of_row(*shape):
        return pl.BlockSpec((None, *shape), lambda g, j, _: (row(g, j), 0, 0))

    inputs = [of_sequence(plan.heads, plan.head_dim), *[pl.BlockSpec(memory_space=pltpu.HBM)] * 2]
    if plan.preface:
        inputs += [pl.BlockSpec((plan.preface, plan.width), lambda g, j, _: (0, 0))] * 2
    if plan.slots:
        inputs += [of_sequence(plan.slots, plan.width)] * 2
        inputs += [of_sequence(plan.kv_heads, plan.slots)]
    outputs = [of_row(plan.heads, plan.head_dim)]
    shapes = [jax.ShapeDtypeStruct((plan.rows, plan.heads, plan.head_dim), dtype)]
    if plan.splits > 1:
        outputs += [of_row(plan.heads, 1)]
        shapes = [
            jax.ShapeDtypeStruct(shapes[0].shape, jnp.float32),
            jax.ShapeDtypeStruct((plan.rows, plan.heads, 1), jnp.float32),
        ]
    scratch = [
        pltpu.VMEM((plan.head_dim, plan.width), dtype),
        pltpu.VMEM((plan.heads, plan.width), jnp.float32),
        *[pltpu.VMEM((plan.heads, LANES), jnp.float32)] * 2,
        pltpu.VMEM((plan.heads, plan.width), jnp.float32),
        *[pltpu.VMEM((BUFFERS, plan.block, plan.width), dtype)] * 2,
        pltpu.SemaphoreType.DMA((2, BUFFERS)),
        pltpu.SMEM((4,), jnp.int32),
    ]
    return inputs, outputs, shapes, scratch


def plan_of(query, key, *, preface=None, slots=None, splits=None, **_) -> Plan:
    """The sizes of a call."""
    return Plan(
        batch=query.shape[0],
        length=key.shape[1],
        heads=query.shape[1],
        kv_heads=key.shape[2] // query.shape[2],
        head_dim=query.shape[2],
        itemsize=key.dtype.itemsize,
        slots=0 if slots is None else slots[0].shape[1],
        preface=0 if preface is None else preface[0].shape[0],
        splits=splits or _splits(query.shape[0], key.shape[1]),
    )


def _splits(batch: int, length: int) -> int:
    """Two for a single long cache on a chip whose two cores work as one, otherwise one."""
    if batch > 1 or length < 2048 or jax.default_backend() != "tpu":
        return 1
    return 2 if jax.devices()[0].device_kind in ("TPU v4", "TPU v5", "TPU v5p") else 1


def unsupported(query, key, value, **_) -> str | None:
    """Why this implementation does not take the arguments, or None when it does."""
    reason = dispatch.only_on("tpu")
    if reason is not None:
        return reason
    if key.dtype not in (jnp.bfloat16, jnp.float32):
        return f"caches are bfloat16 or float32, not {key.dtype}"
    tile = 32 // key.dtype.itemsize
    if key.shape[1] % tile or not key.shape[1]:
        return f"caches of {key.dtype} need a multiple of {tile} rows, this has {key.shape[1]}"
    return None


def memory_decode(
    query, key, value, *, lengths, preface=None, slots=None, slot_valid=None, splits=None
):
    """As :func:`reference.memory_decode`, each cache in ``splits`` parts (None: as suits)."""
    plan = plan_of(query, key, preface=preface, slots=slots, splits=splits)
    inputs, outputs, shapes, scratch = _specs(plan, query.dtype)
    operands = [query, key, value]
    if plan.preface:
        operands += preface
    if plan.slots:
        operands += [*slots, slot_valid.swapaxes(1, 2).astype(query.dtype)]
    found = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(plan.groups, plan.per_group),
            in_specs=inputs,
            out_specs=outputs,
            scratch_shapes=scratch,
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
        ),
        name="memory_decode",
    )(lengths.astype(jnp.int32), *operands)
    return found[0] if plan.splits == 1 else _merge(plan, *found).astype(query.dtype)


def _merge(plan: Plan, out, log_total):
    """The splits of each sequence weighted by their share of its softmax."""
    parts = (x.reshape(plan.batch, plan.splits, *x.shape[1:]) for x in (out, log_total))
    out, log_total = parts
    return (jax.nn.softmax(log_total, axis=1) * out).sum(axis=1)
