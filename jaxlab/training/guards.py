"""Guards around the loop: a polite stop on signals, and numbers that must be finite."""

import math
import os
import signal
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxlab.errors import JaxlabError
from jaxlab.training_config import OptimizerConfig, StageConfig


class NotFiniteError(JaxlabError):
    """A loss or a gradient norm is NaN or infinite: the run has diverged."""

    exit_code = 3


class InterruptGuard:
    """Turns SIGINT and SIGTERM into an answer, so that the loop stops between steps and saves.

    >>> with InterruptGuard() as guard:
    ...     while not guard.stops():
    ...         break

    Several processes stop at the same step, whichever got the signal: JAX's preemption service
    catches SIGTERM and finds that step. A second SIGINT raises KeyboardInterrupt. The former
    handlers come back on leaving. Signals can only be caught in the main thread; elsewhere the
    guard never asks to stop.
    """

    def __init__(self) -> None:
        # The first signal that came to this process, if any.
        self.received: int | None = None
        self._former: dict[int, Any] = {}
        self._together = jax.process_count() > 1
        self._asked, self._told = 0, False

    def stops(self) -> bool:
        """Whether to stop here; of several processes each asks before every step."""
        if not self._together:
            return self.received is not None
        if not self._told:
            self._asked += 1
            # True once, at the step that all processes stop at, and never again.
            self._told = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._told

    @property
    def preempted(self) -> bool:
        """Whether the machine is being taken away, rather than the user interrupting."""
        return self.received != signal.SIGINT

    def __enter__(self) -> "InterruptGuard":
        # A handler of ours for SIGTERM would take the preemption service its own.
        numbers = (signal.SIGINT,) if self._together else (signal.SIGINT, signal.SIGTERM)
        try:
            for number in numbers:
                self._former[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread
            self._former.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)


def check_finite(metrics: Mapping[str, Any], step: int, advice: Callable[[], str]) -> None:
    """Raise NotFiniteError naming the first metric of ``step`` that is NaN or infinite.

    ``advice`` says what the user can do about it.
    """
    for name, value in metrics.items():
        if isinstance(value, str | int) or value is None:
            continue
        if not math.isfinite(value):  # NumPy and JAX scalars count as well
            raise NotFiniteError(
                f"{name} is {value} at step {step}: training has diverged; {advice()}"
            )


def divergence_advice(optimizer: OptimizerConfig, stage: StageConfig, stage_key: str) -> str:
    """What to change in a run that diverged: only what it has, and what can be changed."""
    rate = "optimizer" if optimizer.learning_rate is not None else stage_key
    changes = [f"a lower {rate}.learning_rate"]
    if optimizer.ire is not None and optimizer.ire.kappa > 0:
        changes.insert(0, "a lower optimizer.ire.kappa")
    if stage.schedule.name != "constant":
        changes.append(f"a longer {stage_key}.schedule.warmup_steps")
    clips = optimizer.clip_norm is not None
    changes.append("a smaller optimizer.clip_norm" if clips else "optimizer.clip_norm=1")
    *others, last = changes
    return f"train into another directory with {', '.join(others)} or {last}"
