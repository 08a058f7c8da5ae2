"""What the exit codes of a run's workers mean: done, start again, or stop.

One function for every launcher: here, on TPU machines, under Kubernetes and under Slurm.
"""

import dataclasses
import enum
from collections.abc import Mapping

# What `jaxlab` ends with (jaxlab/errors.py); 128 + N and -N are the end by signal N.
MEANINGS = {
    0: "done",
    1: "an error that a repetition would meet again",
    2: "a wrong command line",
    3: "training diverged",
    75: "preempted, and saved",
    76: "hung, and ended by its watchdog",
    77: "another worker or the runtime between them failed",
    130: "interrupted by the user",
}
STOP = (1, 2, 3, 130)
AGAIN = (75, 76, 77)
_SIGINT = 2
# Which a program gets for what itself does: ILL, ABRT, BUS, FPE, SEGV.
_OWN_SIGNALS = (4, 6, 7, 8, 11)
# The codes of ends that may pass, for who is to be given a list: signals but SIGINT, too.
PASSING = (*AGAIN, 129, *range(131, 160))


class Decision(enum.Enum):
    """What a launcher does next."""

    DONE = "done"
    AGAIN = "start again"
    STOP = "stop"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A decision, the exit code that it is told with, and why, in words; whose code it is."""

    decision: Decision
    code: int
    reason: str
    worker: int | None = None


def judge(codes: Mapping[int, int]) -> Verdict:
    """Of workers by number with their exit codes, less those that the launcher ended itself.

    One worker whose error would come again outweighs all others: they only lost their partner.
    A code that is not known (a shell's 127, say) stops, because nothing says that it would pass.
    """
    if not codes:
        raise ValueError("no worker ended by itself")
    for worker, code in sorted(codes.items()):
        if not _passes(code):
            reason = f"worker {worker}: {in_words(code)}"
            return Verdict(Decision.STOP, _as_code(code), reason, worker)
    ended = [(worker, code) for worker, code in sorted(codes.items()) if code]
    if not ended:
        return Verdict(Decision.DONE, 0, "all workers are done")
    # Who was killed or hung is the cause; who lost a partner or was asked to save is not.
    order = {77: 2, 75: 1}
    worker, code = min(ended, key=lambda one: order.get(one[1], 0))
    return Verdict(Decision.AGAIN, _as_code(code), f"worker {worker}: {in_words(code)}", worker)


def crashed(codes: Mapping[int, int]) -> bool:
    """Whether all that ended did so by one signal of their own doing, or for want of a partner."""
    ends = {_as_code(code) for code in codes.values()} - {77}
    return len(ends) == 1 and ends <= {128 + number for number in _OWN_SIGNALS}


def in_words(code: int) -> str:
    """What an exit code says."""
    code = _as_code(code)
    if code in MEANINGS:
        return f"{MEANINGS[code]} (exit code {code})"
    if code > 128:
        return f"ended by signal {code - 128}"
    return f"exit code {code}, which jaxlab does not use"


def _as_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _passes(code: int) -> bool:
    code = _as_code(code)
    return code == 0 or code in AGAIN or (code > 128 and code != 128 + _SIGINT)
