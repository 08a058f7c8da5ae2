"""Timing of contestants in turns: loops on the device, medians, and errors that stop nothing."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Runs once and returns the seconds of one operation.
Timer = Callable[[], float]
MOST_OPERATIONS = 256


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to time: rounds of turns, seconds of a turn, and when (by the clock) nothing new begins.

    clock: seconds from any beginning; a test brings its own.
    """

    repetitions: int
    run_seconds: float
    deadline: float
    clock: Callable[[], float] = time.perf_counter

    def operations(self, guess: float, together: int = 1) -> int:
        """How many operations make a turn if one takes ``guess`` seconds: multiples."""
        wanted = min(self.run_seconds / guess, MOST_OPERATIONS)
        return together * max(1, round(wanted / together))


def error_text(error: Exception) -> str:
    """Kind and beginning of a message, which for compilers may be pages."""
    return f"{type(error).__name__}: {error}"[:600]


def jax_timer(
    step: Callable[[Any, Any], tuple[Any, Any]],
    variants: Sequence[Any],
    state: Any,
    *,
    guess: float,
    plan: Plan,
) -> Timer:
    """A timer of ``step(variant, state) -> (state, rest)``, run in a loop on the device.

    The loop is one launch, so that the host's part is not measured. Each step starts from the
    state that the last one computed, so none can be left out or run beside another; what else a
    step computes is carried out of the loop, so that nothing is dead code. The steps go through
    the variants in turn: several of them keep a cache from holding what is to be read from memory.
    """
    operations = plan.operations(guess, len(variants))
    empty = [jax.eval_shape(step, variant, state)[1] for variant in variants]
    rest = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), empty)

    def turn(_, carry, variants):
        state, rest = carry[0], []
        for variant in variants:
            state, more = step(variant, state)
            rest.append(more)
        return state, rest

    def loop(variants, carry):
        turns = operations // len(variants)
        return jax.lax.fori_loop(0, turns, lambda at, carry: turn(at, carry, variants), carry)

    run = jax.jit(loop).lower(variants, (state, rest)).compile()

    def timer() -> float:
        begin = plan.clock()
        jax.block_until_ready(run(variants, (state, rest)))
        return (plan.clock() - begin) / operations

    return timer


def contest(prepare: Mapping[str, Callable[[], Timer]], plan: Plan) -> dict[str, dict]:
    """Seconds of every contestant, which take turns (A B A B) after one run each to warm up.

    One that raises, before or while it is timed, is out with its error; the others go on.
    """
    timers, found, seconds = {}, {}, {}
    for name, make in prepare.items():
        if plan.clock() > plan.deadline:
            found[name] = {"error": "left out: the time for the whole run was over"}
            continue
        try:
            timers[name] = make()
            timers[name]()
        except Exception as error:  # whatever it is, it is this contestant's result
            timers.pop(name, None)
            found[name] = {"error": error_text(error)}
    for _ in range(plan.repetitions):
        for name in list(timers):
            try:
                seconds.setdefault(name, []).append(timers[name]())
            except Exception as error:
                del timers[name]
                found[name] = {"error": error_text(error)}
    for name in timers:
        found[name] = {
            "seconds": statistics.median(seconds[name]),
            "min": min(seconds[name]),
            "max": max(seconds[name]),
            "repetitions": len(seconds[name]),
        }
    return {name: found[name] for name in prepare}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to compute an op.

    whole: the op once, of ``arguments``: its result is compared, its memory told. loop: makes the
    step, variants and first state for :func:`jax_timer`.
    """

    whole: Callable[..., Any]
    arguments: tuple
    loop: Callable[[], tuple[Callable, Sequence[Any], Any]]


def compare(
    contestants: Mapping[str, Contestant],
    plan: Plan,
    guess: float,
    others: Mapping[str, Callable[[], Timer]] | None = None,
) -> dict[str, dict]:
    """Contest of jax contestants (and ``others``), with temporary memory and differences.

    difference: from what ``xla`` computes (or ``xla, ...`` for ``ours, ...``).
    """
    told, results = {}, {}

    def prepare(name: str, contestant: Contestant) -> Timer:
        compiled = jax.jit(contestant.whole).lower(*contestant.arguments).compile()
        told[name] = {"temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}
        results[name] = compiled(*contestant.arguments)
        return jax_timer(*contestant.loop(), guess=guess, plan=plan)

    makers = {
        name: functools.partial(prepare, name, contestant)
        for name, contestant in contestants.items()
    }
    found = contest({**makers, **(others or {})}, plan)
    for name, told_of in told.items():
        found[name] |= told_of
        plain = name.replace("ours", "xla")
        if plain != name and name in results and plain in results:
            found[name]["difference"] = difference(results[name], results[plain])
    return found


def difference(found: Any, wanted: Any) -> float:
    """Largest difference relative to the largest value; of integers the share that differs."""

    def of_arrays(a, b) -> float:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return float((a != b).mean())
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.abs(a - b).max() / jnp.abs(b).max())

    return max(jax.tree.leaves(jax.tree.map(of_arrays, found, wanted)))
