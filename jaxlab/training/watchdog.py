"""A thread that ends a process which hangs, after it has said where."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

EXIT_CODE = 76
# Compiling, evaluating and saving take many times as long as a step may; a corpus that is read and
# searched for neighbours by one process, while the others wait, takes hours.
_PATIENCE = {"step": 1.0, "data": 1.0, "init": 100.0}
_ELSE = 10.0


class Watchdog:
    """Ends the process with exit code 76 when no activity begins for ``seconds``.

    >>> with Watchdog(None, Path("run")) as watchdog:
    ...     watchdog.beat("step")

    A collective whose partner is gone waits forever, and whoever launched the run sees a process
    that is alive. Before the end the stacks of all threads go to stderr and to
    ``RUN/hang-PROCESS.txt``. Steps and batches have ``seconds``, preparation a hundred times that
    and everything else ten times; None: no watch. ``clock``, ``leave`` and ``every`` (seconds
    between two looks) are for tests.
    """

    def __init__(
        self,
        seconds: float | None,
        run: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], Any] = os._exit,
        every: float | None = None,
    ):
        self._seconds, self._clock, self._leave = seconds, clock, leave
        # Asked here: in the thread it might wait for what hangs.
        self._file = run / f"hang-{jax.process_index()}.txt"
        self._every = every or min((seconds or 0.0) / 4, 5.0)
        self._last = ("start", clock())
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, activity: str) -> None:
        """The process is alive and begins an activity."""
        self._last = (activity, self._clock())

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            activity, since = self._last
            silent = self._clock() - since
            if silent > self._seconds * _PATIENCE.get(activity, _ELSE):
                self._end(activity, silent)
                return

    def _end(self, activity: str, silent: float) -> None:
        said = (
            f"error: nothing has happened for {silent:.0f} s in {activity!r} "
            f"(training.hang_seconds is {self._seconds:g}): the process ends; threads:\n"
        )
        try:
            with open(self._file, "w", encoding="utf-8") as written:
                written.write(said)
                written.flush()
                faulthandler.dump_traceback(written, all_threads=True)
        finally:
            sys.stderr.write(said)
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            self._leave(EXIT_CODE)
