"""Lines that say how far a long work on a bank is, how fast it goes and when it will end."""

import time
from collections.abc import Callable


class Progress:
    """``progress(done)`` reports "WHAT: 12,288 of 1,000,000 references, 812/s, 20 min left".

    ``begun`` were done before this work began; ``clock`` gives seconds.
    """

    def __init__(
        self,
        report: Callable[[str], None],
        what: str,
        total: int,
        *,
        begun: int = 0,
        unit: str = "references",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report, self._what, self._total, self._unit = report, what, total, unit
        self._begun, self._clock, self._start = begun, clock, clock()

    def __call__(self, done: int) -> None:
        rate = (done - self._begun) / max(self._clock() - self._start, 1e-9)
        line = f"{self._what}: {done:,} of {self._total:,} {self._unit}, {_number(rate)}/s"
        if done < self._total and rate > 0:
            line += f", {_duration((self._total - done) / rate)} left"
        self._report(line)


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 90 * size:
            return f"{max(round(seconds / size), 1)} {unit}"
    return f"{seconds / 3600:.1f} h"
