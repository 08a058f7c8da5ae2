"""Watching a run on Cloud TPU: chips, code or process, it gets what it lacks until it is done."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence

from launch import cloud_tpu
from launch.accelerators import Accelerator
from launch.cloud_tpu import Pod
from launch.plan import Command, LaunchError, Plan, carry_out, run_command
from launch.policy import Decision, judge

_GONE = ("SUSPENDED", "SUSPENDING", "FAILED")
_COMING = ("WAITING_FOR_RESOURCES", "ACCEPTED", "CREATING", "PROVISIONING", "DELETING")
_MOST_DELAY = 600.0
_MOST_FAILURES = 30  # of gcloud, in a row: half an hour of looks a minute apart
_LOOKS = 3  # a list may be a little behind


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
        self._may_ask = False  # until a first question is answered
        self._may_create = True  # nobody has asked for the chips, or they were taken away
        self._runs = False  # was seen running, or started
        self._looks_without_chips = self._looks_at_a_loss = 0  # in a row

    def watch(self) -> int:
        """The exit code of the run, or 77 when it was given up.

        Raises LaunchError when the first question fails (a wrong zone, no gcloud), or so many in a
        row that it is no passing trouble of the network.
        """
        failed = 0
        while True:
            try:
                code = self._look()
                failed = 0
            except LaunchError as error:
                failed += 1
                if not self._may_ask or failed > _MOST_FAILURES:
                    raise
                self._say(f"{self._watched.pod.name}: {error}; trying again")
                code = None
            if code is not None:
                self._say_what_is_left()
                return code
            self._sleep(self._watched.poll_seconds)

    def _say_what_is_left(self) -> None:
        pod = self._watched.pod
        words = ("python -m launch.pod delete --name", pod.name, *pod.place)
        self._say(f"{pod.name}: its chips stay yours, and paid for, until: {' '.join(words)}")

    def _look(self) -> int | None:
        """Look once and do what is needed; the exit code when it is over."""
        pod = self._watched.pod
        state = self._ask(cloud_tpu.state(pod)).strip()
        self._may_ask = True
        if not state:
            return self._absent()
        self._looks_without_chips = 0
        if state in _GONE:
            if not self._may_restart(f"the chips are {state}"):
                return 77
            self._act(cloud_tpu.delete(pod))
            self._may_create = True
            return None
        self._may_create = False
        if state == "ACTIVE":
            return self._active()
        if state not in _COMING:
            self._say(f"{pod.name}: state {state}; looking again")
        return None

    def _absent(self) -> int | None:
        """Ask for the chips, unless it was somebody else who has given them back."""
        if self._may_create:
            self._act(self._watched.create)
            self._may_create = False
            return None
        self._looks_without_chips += 1
        if self._looks_without_chips < _LOOKS:
            return None
        self._say(f"{self._watched.pod.name}: was deleted by somebody else; not watched any more")
        return 77

    def _active(self) -> int | None:
        """Start what does not run yet, and judge what has ended."""
        said = self._ask(cloud_tpu.codes(self._watched.pod))
        # Numbered through all slices.
        rows = sorted(set(re.findall(r"^worker (\S+) (\d+) (\w+)$", said, re.MULTILINE)))
        if not rows:
            raise LaunchError("no worker answered")
        if any(state == "idle" for *_, state in rows):
            if self._runs and not self._may_restart("a worker was replaced by an empty one"):
                return 77
            self._act(self._watched.run)
            self._runs = True
            return None
        self._runs = True
        found = {n: int(code) for n, (*_, code) in enumerate(rows) if code.isdigit()}
        # One that failed leaves the others waiting for it: they are given one more look.
        self._looks_at_a_loss = self._looks_at_a_loss + 1 if any(found.values()) else 0
        if found and (len(found) == self._workers or self._looks_at_a_loss > 1):
            self._looks_at_a_loss = 0
            return self._judged(found)
        return None

    @property
    def _workers(self) -> int:
        chips = self._watched.chips
        return chips.hosts * chips.where.slices

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
