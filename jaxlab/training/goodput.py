"""Where the wall time of a run went, over all its starts, and the share of it that trained."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = "goodput.json"
# How old the last sign of life in the file may be, in seconds.
_SIGN_EVERY = 5.0


class Goodput:
    """Seconds by activity; with a ``file`` they go on from those of former starts of the run.

    >>> goodput = Goodput()
    >>> with goodput.measure("step"):
    ...     pass

    ``lost`` are steps that were done after the last checkpoint of a process that was killed, and
    are done again; ``down`` is the time between its last sign of life and the next start. Time
    outside every ``measure`` is reported as ``other``. Nested measures count once, for the inner
    activity. ``beat`` is told of every activity that begins. A start is written down by its first
    :meth:`sign_of_life`: one that was refused changes no file.
    """

    ACTIVITIES = ("init", "compile", "data", "step", "evaluate", "save")

    def __init__(
        self,
        file: str | os.PathLike | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
        beat: Callable[[str], None] = lambda _: None,
        report: Callable[[str], None] = print,
    ):
        self._clock, self._wall, self._beat = clock, wall, beat
        self._mark = clock()
        self._active = ["other"]
        self._seconds = dict.fromkeys((*self.ACTIVITIES, "lost", "down", "other"), 0.0)
        self._unsaved = 0.0
        self.starts = 1
        self._file = None if file is None else Path(file)
        self._written = float("-inf")
        if self._file is not None and self._file.exists():
            self._go_on(report)

    def _go_on(self, report: Callable[[str], None]) -> None:
        try:
            before = json.loads(self._file.read_text(encoding="utf-8"))
            seconds = {name: float(before["seconds"][name]) for name in self._seconds}
            starts, alive = int(before["starts"]), float(before["alive"])
            unsaved = float(before["unsaved"])
        except (OSError, ValueError, KeyError, TypeError):
            aside = self._file.with_name(f"{self._file.name}.damaged")
            os.replace(self._file, aside)
            report(f"{self._file}: cannot be read; moved to {aside.name}, times count from now")
            return
        self._seconds, self.starts = seconds, starts + 1
        self._seconds["step"] -= unsaved
        self._seconds["lost"] += unsaved
        self._seconds["down"] += max(self._wall() - alive, 0.0)

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Count the time inside the block towards ``activity``, one of ACTIVITIES."""
        if activity not in self.ACTIVITIES:
            raise ValueError(f"{activity!r} is none of {', '.join(self.ACTIVITIES)}")
        self._turn()
        self._active.append(activity)
        self._beat(activity)
        try:
            yield
        finally:
            self._turn()
            self._active.pop()
            self._beat(self._active[-1])

    def saved(self) -> None:
        """All steps up to now are in a checkpoint."""
        self._turn()
        self._unsaved = 0.0
        self._write()

    def sign_of_life(self) -> None:
        """Something was done: write the times down if that was not done lately."""
        self._beat(self._active[-1])
        if self._clock() - self._written >= _SIGN_EVERY:
            self._turn()
            self._write()

    def seconds(self) -> dict[str, float]:
        """Seconds by activity so far; they add up to the time since the run's first start."""
        self._turn()
        return dict(self._seconds)

    def share(self) -> float:
        """Goodput: seconds spent in steps that were kept, as a share of all."""
        seconds = self.seconds()
        total = sum(seconds.values())
        return seconds["step"] / total if total else 0.0

    def summary(self) -> str:
        """One line: the share, and the seconds of what took any."""
        spent = ", ".join(f"{name} {took:.1f}" for name, took in self.seconds().items() if took)
        starts = f" of {self.starts} starts" if self.starts > 1 else ""
        return f"goodput {self.share():.2f}; seconds{starts}: {spent}"

    def close(self) -> None:
        """Write the last times down."""
        self._turn()
        self._write()

    def _turn(self) -> None:
        now = self._clock()
        self._seconds[self._active[-1]] += now - self._mark
        if self._active[-1] == "step":
            self._unsaved += now - self._mark
        self._mark = now

    def _write(self) -> None:
        self._written = self._clock()
        if self._file is None:
            return
        values: dict[str, Any] = {
            "goodput": self.share(),
            "starts": self.starts,
            "alive": self._wall(),
            "unsaved": self._unsaved,
            "seconds": self._seconds,
        }
        temporary = self._file.with_name(f"{self._file.name}.tmp")
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._file)
