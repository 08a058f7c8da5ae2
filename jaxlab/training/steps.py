"""The loop over the steps of a stage, the same for every workload."""

import time
from collections.abc import Callable
from typing import Any

import jax

from jaxlab.config import TrainingConfig
from jaxlab.training.guards import InterruptGuard, check_finite
from jaxlab.training.metrics import Goodput, ProgressBar

# Steps done, and their last numbers on the device.
Pending = tuple[int, dict[str, jax.Array]]


class Recorder:
    """Fetches the numbers of a step once the next one is on its way.

    ``write(done, numbers, speed)`` gets them as floats; ``speed`` is ``units`` (tokens, images) a
    second, None for the first step of a call, which is compilation. ``advice`` says what to do when
    they are not finite.
    """

    def __init__(
        self,
        write: Callable[..., None],
        *,
        units: int,
        advice: Callable[[], str],
        offset: int = 0,
    ):
        self._write, self._units, self._offset = write, units, offset
        self._advice = advice
        self._mark: float | None = None

    def __call__(
        self, pending: Pending | None, bar: ProgressBar, *, then: Pending | None = None
    ) -> Pending | None:
        """Write the pending numbers; returns ``then``, the numbers that are pending now."""
        if pending is not None:
            done, numbers = pending
            numbers = {key: float(value) for key, value in jax.device_get(numbers).items()}
            check_finite(numbers, self._offset + done, self._advice)
            now = time.perf_counter()
            speed = None if self._mark is None else self._units / (now - self._mark)
            self._mark = now
            self._write(done, numbers, speed)
            bar.update(done, loss=numbers["loss"])
        return then


def run_steps(
    state: Any,
    step_function: Callable[..., Any],
    batches: Any,
    *,
    title: str,
    steps: int,
    training: TrainingConfig,
    guard: InterruptGuard,
    goodput: Goodput,
    record: Recorder,
    evaluate: Callable[[int, Any], None],
    save: Callable[[int, Any, bool], None],
    place: Any = None,
) -> tuple[Any, bool]:
    """Steps up to ``steps``, or to an interruption: the state, and whether it was interrupted.

    The order is what makes resuming exact; do not change it: evaluate the current parameters, save
    state and data position together, take the next batch, dispatch the step, and only then fetch
    the numbers of the step before, so that the device never waits for the host. ``place`` is the
    sharding of a batch; None: the default device.
    """
    first = done = int(state.step)
    pending = None
    # Copies between host and device are explicit below; any other is a mistake.
    with (
        ProgressBar(title, steps, every=training.log_every, start=done) as bar,
        jax.transfer_guard("disallow"),
    ):
        while True:
            last, stop = done == steps, guard.requested
            new = done > first
            evaluates = new and (last or _due(done, training.evaluate_every))
            saves = new and (last or stop or _due(done, training.save_every))
            if evaluates or saves:
                # What is not finite is found here, before it is evaluated or saved.
                pending = record(pending, bar)
            if evaluates:
                with goodput.measure("evaluate"):
                    evaluate(done, state)
            if saves:
                with goodput.measure("save"):
                    save(done, state, last)
            if last or stop:
                record(pending, bar)
                return state, stop and not last
            with goodput.measure("data"):
                batch = jax.device_put(next(batches), place)
            with goodput.measure("compile" if done == first else "step"):
                state, numbers = step_function(state, batch)
                if done == first:
                    jax.block_until_ready(numbers)
                done += 1
                pending = record(pending, bar, then=(done, numbers))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
