"""The loop over the steps of a stage, the same for every workload."""

import time
from collections.abc import Callable
from typing import Any

import jax

from jaxlab.config import TrainingConfig
from jaxlab.sharding.processes import leads
from jaxlab.training.goodput import Goodput
from jaxlab.training.guards import InterruptGuard, NotFiniteError, check_finite
from jaxlab.training.metrics import ProgressBar

# Steps done, and their last numbers on the device.
Pending = tuple[int, dict[str, jax.Array]]


class Recorder:
    """Fetches the numbers of a step once the next one is on its way.

    ``write(done, numbers, speed)`` gets them as floats; ``speed`` is ``units`` (tokens, images) a
    second, None for the first step of a call, which is compilation. ``advice`` says what to do when
    they are not finite. Steps that were skipped for that are reported; ``skip`` in a row may be.
    """

    def __init__(
        self,
        write: Callable[..., None],
        *,
        units: int,
        rows: int,
        advice: Callable[[], str],
        report: Callable[[str], None],
        offset: int = 0,
        skip: int = 0,
    ):
        self._write, self._units, self._rows, self._offset = write, units, rows, offset
        self._advice, self._report, self._skip = advice, report, skip
        self._mark: float | None = None
        self._skipped = 0

    def __call__(
        self, pending: Pending | None, bar: ProgressBar, *, then: Pending | None = None
    ) -> Pending | None:
        """Write the pending numbers; returns ``then``, the numbers that are pending now."""
        if pending is not None:
            done, numbers = pending
            numbers = {key: float(value) for key, value in jax.device_get(numbers).items()}
            self._check(done, numbers)
            now = time.perf_counter()
            speed = None if self._mark is None else self._units / (now - self._mark)
            self._mark = now
            self._write(done, numbers, speed)
            bar.update(done, loss=numbers["loss"])
        return then

    def _check(self, done: int, numbers: dict[str, float]) -> None:
        step = self._offset + done
        if not numbers.get("skipped"):
            self._skipped = 0
            check_finite(numbers, step, self._advice)
            return
        self._skipped += 1
        if self._skipped <= self._skip:
            self._report(
                f"step {step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}: "
                f"skipped ({self._skipped} of {self._skip} in a row)"
            )
            return
        first = done - self._skipped
        raise NotFiniteError(
            f"steps {step - self._skipped + 1} to {step} were not finite and "
            f"training.skip_nonfinite is {self._skip}; their batches are {first} to {done - 1} "
            f"of this stage's order, rows {first * self._rows} to {done * self._rows - 1}; "
            f"{self._advice()}"
        )


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
    place: Callable[[Any], Any] = jax.device_put,
) -> tuple[Any, bool]:
    """Steps up to ``steps``, or to an interruption: the state, and whether it was interrupted.

    The order is what makes resuming exact; do not change it: evaluate the current parameters, save
    state and data position together, take the next batch, dispatch the step, and only then fetch
    the numbers of the step before, so that the device never waits for the host. ``place`` puts
    a batch on the devices.
    """
    first = done = int(state.step)
    pending = None
    # Copies between host and device are explicit below; any other is a mistake.
    with (
        ProgressBar(title, steps, every=training.log_every * leads(), start=done) as bar,
        jax.transfer_guard("disallow"),
    ):
        while True:
            last, stop = done == steps, guard.stops()
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
                goodput.saved()
            if last or stop:
                record(pending, bar)
                return state, stop and not last
            with goodput.measure("data"):
                batch = place(next(batches))
            with goodput.measure("compile" if done == first else "step"):
                state, numbers = step_function(state, batch)
                if done == first:
                    jax.block_until_ready(numbers)
                done += 1
                goodput.sign_of_life()
                pending = record(pending, bar, then=(done, numbers))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
