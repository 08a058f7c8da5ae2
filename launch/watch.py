"""Watching a run on Cloud TPU: chips that were taken away are asked for again, and it goes on."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence

from launch import cloud_tpu
from launch.accelerators import Accelerator
from launch.cloud_tpu import Pod
from launch.plan import Command, Plan, carry_out, run_command
from launch.policy import Decision, judge

_GONE = ("SUSPENDED", "SUSPENDING", "FAILED")
_COMING = ("WAITING_FOR_RESOURCES", "ACCEPTED", "CREATING", "PROVISIONING", "DELETING")
_MOST_DELAY = 600.0


@dataclasses.dataclass(frozen=True)
class Watched:
    """A run and what brings it up again: the plans to create its chips and to run it."""

    pod: Pod
    chips: Accelerator
    create: Plan
    run: Plan
    command: Sequence[str]
    restarts: int = 20
    poll_seconds: float = 60.0


class Watcher:
    """Looks after a run until it is done, or cannot go on."""

    def __init__(
        self,
        watched: Watched,
        *,
        say: Callable[[str], None] = print,
        sleep: Callable[[float], None] = time.sleep,
        ask: Callable[[Command], str] = lambda step: run_command(step, capture=True),
        act: Callable[[Plan], None] = carry_out,
    ):
        self._watched, self._say, self._sleep = watched, say, sleep
        self._ask, self._act = ask, act
        self._left = watched.restarts

    def watch(self) -> int:
        """The exit code of the run, or 77 when it was given up."""
        pod, missing = self._watched.pod, 0
        started = True  # whoever watches has started it; a watcher that recreates it starts it
        while True:
            state = self._ask(cloud_tpu.state(pod)).strip()
            if state in _GONE:
                if not self._may_restart(f"the chips are {state}"):
                    return 77
                self._act(cloud_tpu.delete(pod))
                self._act(self._watched.create)
                started = False
            elif state == "ACTIVE" and not started:
                self._act(self._watched.run)
                started = True
            elif state == "ACTIVE":
                found = self._codes()
                # One that failed leaves the others waiting for it: they are given one more look.
                missing = missing + 1 if any(found.values()) else 0
                if found and (len(found) == self._workers or missing > 1):
                    missing = 0
                    code = self._judged(found)
                    if code is not None:
                        return code
            elif state not in _COMING:
                self._say(f"{pod.name}: state {state or 'unknown'}; looking again")
            self._sleep(self._watched.poll_seconds)

    @property
    def _workers(self) -> int:
        chips = self._watched.chips
        return chips.hosts * chips.where.slices

    def _codes(self) -> dict[int, int]:
        """Exit codes of the workers that have ended, numbered through all slices."""
        said = self._ask(cloud_tpu.codes(self._watched.pod))
        rows = sorted(set(re.findall(r"^worker (\S+) (\d+) (\w+)$", said, re.MULTILINE)))
        return {n: int(code) for n, (_, _, code) in enumerate(rows) if code.isdigit()}

    def _judged(self, found: dict[int, int]) -> int | None:
        """The exit code when it is over; None when it was started again."""
        verdict = judge(found)
        self._say(f"{self._watched.pod.name}: {verdict.decision.value}: {verdict.reason}")
        if verdict.decision is not Decision.AGAIN:
            return verdict.code
        if not self._may_restart(verdict.reason):
            return 77
        self._act(cloud_tpu.stop(self._watched.pod))
        self._act(cloud_tpu.start(self._watched.pod, self._watched.command))
        return None

    def _may_restart(self, reason: str) -> bool:
        if not self._left:
            self._say(
                f"{self._watched.pod.name}: {reason}; given up after "
                f"{self._watched.restarts} restarts"
            )
            return False
        self._left -= 1
        done = self._watched.restarts - self._left
        wait = min(10.0 * 2 ** (done - 1), _MOST_DELAY)
        self._say(
            f"{self._watched.pod.name}: {reason}; restart {done} of {self._watched.restarts} "
            f"in {wait:.0f} s"
        )
        self._sleep(wait)
        return True
