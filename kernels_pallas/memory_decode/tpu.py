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
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dispatch
from kernels_pallas.blocks import short_name
from kernels_pallas.memory_decode.heads import constants, dot, one_hot, own_columns, spread_out
from kernels_pallas.memory_decode.plan import BUFFERS, LANES, VMEM_BYTES, Plan
from kernels_pallas.memory_decode.ring import Ring

# In place of minus infinity, so that the difference of two is 0 and not NaN. Where nothing has been
# visible, weights are therefore 1, but of values that are 0; the first score that counts takes them
# away, in the running softmax as in the merges, and so need not be masked twice.
MASKED = -1e30


def _side_by_side(computations: Iterable[Iterator[None]]) -> None:
    """Emit the operations of several computations in turns.

    Each yields where it would wait for a matrix product or a reduction: the compiler keeps more or
    less to the order of the program, so another one has to come next there.
    """
    for _ in itertools.zip_longest(*computations):
        pass


def _lane_sums(weights):
    """Sums over the last axis that keep its 128 lanes apart: adding them up waits for the end."""
    parts = [weights[:, at : at + LANES] for at in range(0, weights.shape[1], LANES)]
    return functools.reduce(jnp.add, parts)


def _small_parts(plan: Plan, preface, slots, valid):
    """Keys, values and mask, RN x tokens, of preface and slots.

    They are for the scores of the first token of a cache row only, of which there are N.
    """
    if preface is not None:
        keys, values = (part[...] for part in preface)
        row = jax.lax.broadcasted_iota(jnp.int32, (plan.scores, plan.preface), 0)
        yield keys, values, row < plan.heads
    if slots is not None:
        keys, values = (part[...] for part in slots)
        of_head = one_hot(plan.scores, plan.kv_heads, (plan.group, 1), valid.dtype)
        of_column = one_hot(plan.kv_heads, plan.token_width, (1, plan.head_dim), valid.dtype)
        # An empty slot may hold NaN, which the zeros of the block-diagonal query do not undo.
        full = dot(valid[...], of_column, (0, 0)) > 0.5
        keys, values = (jnp.where(full, part, 0).astype(part.dtype) for part in (keys, values))
        yield keys, values, dot(of_head, valid[...], (1, 0)) > 0.5


def _attend_small(plan: Plan, spread_query, preface, slots, valid, running):
    """Begin the running softmax with the preface and the slots."""
    top, total, sums = running
    parts = list(_small_parts(plan, preface, slots, valid))
    yield
    highest, scores = jnp.full((plan.scores, 1), MASKED, jnp.float32), []
    for keys, _, mask in parts:
        score = dot(spread_query[:, : plan.token_width], keys, (1, 1)) * plan.head_dim**-0.5
        scores.append(jnp.where(mask, score, MASKED))
    yield
    for score in scores:
        highest = jnp.maximum(highest, score.max(axis=1, keepdims=True))
    yield
    ones = jnp.zeros((plan.scores, 1), jnp.float32)
    summed = jnp.zeros((plan.scores, plan.token_width), jnp.float32)
    for (_, values, _), score in zip(parts, scores, strict=True):
        weights = jnp.exp(score - highest)
        ones += weights.sum(axis=1, keepdims=True)
        summed += dot(weights.astype(values.dtype), values, (1, 0))
    yield
    top[...] = jnp.broadcast_to(highest, top.shape)
    # The total is the sum over its lanes.
    first = jax.lax.broadcasted_iota(jnp.int32, total.shape, 1) == 0
    total[...] = jnp.where(first, ones, 0)
    if plan.fold > 1:
        sums[...] = jnp.zeros_like(sums)
    sums[:, : plan.token_width] = summed


def _attend_block(plan: Plan, spread_query, keys, values, tokens, running):
    """Take a block of the cache, of which ``tokens`` are visible, into the running softmax."""
    top, total, sums = running
    scores = dot(spread_query, keys[...], (1, 1)) * plan.head_dim**-0.5
    row, place = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
    token = place * plan.fold + jax.lax.div(row, plan.heads) if plan.fold > 1 else place
    yield
    scores = jnp.where(token < tokens, scores, MASKED)
    before = top[:, :1]
    highest = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    yield
    weights = jnp.exp(scores - highest)
    decay = jnp.exp(before - highest)
    more = dot(weights.astype(values.dtype), values[...], (1, 0))
    yield
    top[...] = jnp.broadcast_to(highest, top.shape)
    total[...] = total[...] * decay + _lane_sums(weights)
    sums[...] = sums[...] * decay + more


def _not_zero(weight):
    return jnp.where(weight > 0, weight, 1)


def _finish(plan: Plan, running, spread, own, out, log_total):
    """Divide, keep each head's own columns; where nothing was visible, zeros.

    The tokens of a cache row have each their own running softmax, merged here.
    """
    top, total, sums = running
    mean = sums[...] / _not_zero(total[...].sum(axis=1, keepdims=True))
    wanted = out.dtype if plan.fold == 1 else jnp.float32
    moved = own_columns(jnp.where(own[...] > 0, mean, 0), spread, wanted)
    yield
    highest, weight = top[:, :1], total[...].sum(axis=1, keepdims=True)
    if plan.fold > 1:
        tokens = [pl.ds(number * plan.heads, plan.heads) for number in range(plan.fold)]
        highest = functools.reduce(jnp.maximum, [top[rows, :1] for rows in tokens])
        weights = [
            jnp.exp(top[rows, :1] - highest) * total[rows].sum(axis=1, keepdims=True)
            for rows in tokens
        ]
        weight = sum(weights)
        parts = [moved[rows.start : rows.start + rows.size] for rows in tokens]
        moved = sum(w * part for w, part in zip(weights, parts, strict=True)) / _not_zero(weight)
    yield
    out[...] = moved.astype(out.dtype)
    if log_total is not None:
        log_total[...] = jnp.where(weight > 0, highest + jnp.log(_not_zero(weight)), MASKED)


class _Refs(NamedTuple):
    """What the kernel reads and writes; None what the call does not have."""

    query: Any
    cache: tuple
    preface: tuple | None
    slots: tuple | None
    valid: Any
    out: Any
    log_total: Any
    spread: Any
    own: Any
    spread_query: Any
    running: tuple
    ring: tuple

    @classmethod
    def sort(cls, plan: Plan, refs):
        """From the order of :func:`_specs`."""
        refs = iter(refs)

        def take(number, wanted=True):
            return tuple(next(refs) for _ in range(number)) if wanted else None

        (query,), cache, preface = take(1), take(2), take(2, plan.preface > 0)
        slots, valid = take(2, plan.slots > 0), take(1, plan.slots > 0)
        (out,), log_total = take(1), take(1, plan.splits > 1)
        return cls(
            query, cache, preface, slots, valid and valid[0], out, log_total and log_total[0],
            *take(3), take(3), take(4)
        )  # fmt: skip

    def of(self, member: int):
        """The running softmax of a member of the turn."""
        return tuple(part.at[member] for part in self.running)


def _begin(plan: Plan, refs: _Refs, with_small: bool):
    """Block-diagonal queries, and the running softmax of a turn's preface and slots."""

    def small(member):
        if not with_small:
            return None, None, None
        slots = None if refs.slots is None else tuple(part.at[member] for part in refs.slots)
        return refs.preface, slots, None if refs.valid is None else refs.valid.at[member]

    members = range(plan.together)
    _side_by_side(
        spread_out(plan, refs.query.at[m], refs.spread, refs.own, refs.spread_query.at[m])
        for m in members
    )
    _side_by_side(_attend_small(plan, refs.spread_query[m], *small(m), refs.of(m)) for m in members)


def _end(plan: Plan, refs: _Refs):
    """The results of a turn."""
    members = range(plan.together)
    logs = [None if refs.log_total is None else refs.log_total.at[m] for m in members]
    _side_by_side(
        _finish(plan, refs.of(m), refs.spread, refs.own, refs.out.at[m], logs[m]) for m in members
    )


def _kernel(lengths, *refs, plan: Plan):
    refs = _Refs.sort(plan, refs)
    *buffers, semaphores, state = refs.ring
    ring = Ring(plan, lengths, refs.cache, buffers, semaphores, state)
    first = pl.program_id(0) * plan.per_group
    end = jnp.minimum(first + plan.per_group, plan.turns)
    turn = first + pl.program_id(1)

    @pl.when(pl.program_id(1) == 0)
    def _():
        ring.begin(first, end)
        constants(plan, refs.spread, refs.own)

    @pl.when(turn < end)
    def _():
        if plan.splits == 1:
            _begin(plan, refs, True)
        else:  # A turn is one row: the first split has the preface and the slots.
            pl.when(jax.lax.rem(turn, plan.splits) == 0)(lambda: _begin(plan, refs, True))
            pl.when(jax.lax.rem(turn, plan.splits) != 0)(lambda: _begin(plan, refs, False))

        @pl.loop(0, ring.blocks(turn))
        def _(block):
            ring.send(end)
            taken = ring.take(turn, block)
            _side_by_side(
                _attend_block(plan, refs.spread_query[member], *part, refs.of(member))
                for member, part in enumerate(taken)
            )

        _end(plan, refs)


def _specs(plan: Plan, dtype):
    """Specs of the inputs and outputs; shapes of the outputs and of the scratch memory."""

    def turn(group, step):
        return jnp.minimum(group * plan.per_group + step, plan.turns - 1)

    def of_sequence(*shape):
        def sequence(group, step, _):
            return jax.lax.div(turn(group, step), plan.splits), 0, 0

        return pl.BlockSpec((plan.together, *shape), sequence)

    def of_row(*shape):
        return pl.BlockSpec((plan.together, *shape), lambda g, j, _: (turn(g, j), 0, 0))

    inputs = [of_sequence(plan.heads, plan.head_dim), *[pl.BlockSpec(memory_space=pltpu.HBM)] * 2]
    if plan.preface:
        inputs += [pl.BlockSpec((plan.preface, plan.token_width), lambda g, j, _: (0, 0))] * 2
    if plan.slots:
        inputs += [of_sequence(plan.slots, plan.token_width)] * 2
        inputs += [of_sequence(plan.kv_heads, plan.slots)]
    outputs = [of_row(plan.heads, plan.head_dim)]
    shapes = [jax.ShapeDtypeStruct((plan.rows, plan.heads, plan.head_dim), dtype)]
    if plan.splits > 1:
        outputs += [of_row(plan.heads, 1)]
        shapes = [
            jax.ShapeDtypeStruct(shapes[0].shape, jnp.float32),
            jax.ShapeDtypeStruct((plan.rows, plan.heads, 1), jnp.float32),
        ]
    wide = plan.together, plan.scores, plan.width
    scratch = [
        pltpu.VMEM((plan.head_dim, plan.width), dtype),
        pltpu.VMEM(wide[1:], jnp.float32),
        pltpu.VMEM(wide, dtype),
        *[pltpu.VMEM((*wide[:2], LANES), jnp.float32)] * 2,
        pltpu.VMEM(wide, jnp.float32),
        *[pltpu.VMEM((BUFFERS * plan.together, plan.block, plan.width), dtype)] * 2,
        pltpu.SemaphoreType.DMA((2, BUFFERS)),
        pltpu.SMEM((4,), jnp.int32),
    ]
    return inputs, outputs, shapes, scratch


def _cost(plan: Plan) -> pl.CostEstimate:
    """Of full caches: their lengths are not known while compiling."""
    scores = plan.rows * plan.span * plan.scores
    return pl.CostEstimate(
        flops=4 * scores * plan.width,
        transcendentals=scores,
        bytes_accessed=plan.copied_bytes([plan.length * plan.fold] * plan.batch),
    )


def plan_of(query, key, *, preface=None, slots=None, splits=None, tokens_per_row=1, **_) -> Plan:
    """The sizes of a call."""
    return Plan(
        batch=query.shape[0],
        length=key.shape[1],
        heads=query.shape[1],
        kv_heads=key.shape[2] // (tokens_per_row * query.shape[2]),
        head_dim=query.shape[2],
        itemsize=key.dtype.itemsize,
        slots=0 if slots is None else slots[0].shape[1],
        preface=0 if preface is None else preface[0].shape[0],
        splits=splits or _splits(query.shape[0], key.shape[1]),
        fold=tokens_per_row,
    )


def _splits(batch: int, length: int) -> int:
    """Two for a single long cache on a chip whose two cores work as one, otherwise one."""
    if batch > 1 or length < 2048 or dispatch.target_platform() != "tpu":
        return 1
    chip = dispatch.target_chip()
    return 2 if short_name(chip) == "v5p" or chip == "TPU v4" else 1


def unsupported(query, key, value, **kwargs) -> str | None:
    """Why this implementation does not take the arguments, or None when it does."""
    reason = dispatch.only_on("tpu")
    if reason is not None:
        return reason
    if key.dtype not in (jnp.bfloat16, jnp.float32):
        return f"caches are bfloat16 or float32, not {key.dtype}"
    tile = 32 // key.dtype.itemsize
    if key.shape[1] % tile or not key.shape[1]:
        return f"caches of {key.dtype} need a multiple of {tile} rows, this has {key.shape[1]}"
    needed = plan_of(query, key, **kwargs).vmem_bytes
    if needed > VMEM_BYTES:
        return f"rows of {key.shape[2]} {key.dtype} need {needed} bytes of VMEM"
    return None


def memory_decode(
    query,
    key,
    value,
    *,
    lengths,
    preface=None,
    slots=None,
    slot_valid=None,
    tokens_per_row=1,
    splits=None,
):
    """As :func:`reference.memory_decode`, each cache in ``splits`` parts (None: as suits)."""
    kwargs = dict(preface=preface, slots=slots, tokens_per_row=tokens_per_row, splits=splits)
    plan = plan_of(query, key, **kwargs)
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
        cost_estimate=_cost(plan),
        name="memory_decode",
    )(lengths.astype(jnp.int32), *operands)
    return found[0] if plan.splits == 1 else _merge(plan, *found).astype(query.dtype)


def _merge(plan: Plan, out, log_total):
    """The splits of each sequence weighted by their share of its softmax."""
    parts = (x.reshape(plan.batch, plan.splits, *x.shape[1:]) for x in (out, log_total))
    out, log_total = parts
    return (jax.nn.softmax(log_total, axis=1) * out).sum(axis=1)
