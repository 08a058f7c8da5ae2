"""Several processes of one run on this machine, started again when one of them dies."""

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.plan import LaunchError
from launch.policy import Decision, crashed, in_words, judge

_LOOK_SECONDS = 0.05
# So many crashes of one kind in a row are the program's own, and no trouble that passes.
_SAME_CRASHES = 3
_PLACE = ("JAXLAB_COORDINATOR", "JAXLAB_PROCESSES", "JAXLAB_PROCESS_ID")
# What the others are given when one has ended, by how it ended: they can do nothing without it.
_AFTER_FAILURE = 3.0
_MOST_DELAY = 60.0
# Becomes the worker, which the kernel then ends with the launcher (prctl's PR_SET_PDEATHSIG): one
# that was left behind would write into the run that a next launcher starts.
_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclasses.dataclass(frozen=True)
class Local:
    """A run of several processes here.

    devices: virtual CPU devices of each process; None: the machine's own devices. restarts: how
    often in a row it is started again; a start that lasted ``healthy`` seconds begins a new row,
    and one signal that the program sends itself (SIGABRT, SIGSEGV) ends a row after three.
    grace: seconds to save in after a signal, and to end in when others are done. log_dir: a file
    for each worker there; None: lines go to stdout, with the worker's number. again: what a worker
    tells its user to start the run with again.
    """

    command: Sequence[str]
    processes: int = 2
    devices: int | None = 4
    restarts: int = 10
    healthy: float = 600.0
    grace: float = 60.0
    log_dir: Path | None = None
    again: str | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def worker_environment(run: Local, worker: int, address: str) -> dict[str, str]:
    """What a worker finds in its environment beside what this process has.

    One process joins nobody: between the devices of one process gloo mixes messages up.
    """
    several, found = run.processes > 1, dict(run.environment)
    if several:
        place = (address, str(run.processes), str(worker))
        found = dict(zip(_PLACE, place, strict=True)) | found
    if run.devices is not None:
        found |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(run.devices),
            **({"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"} if several else {}),
            # Devices that wait for each other need a thread each, and one program at a time.
            "NPROC": str(max(32, 4 * run.devices)),
            "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
        }
    return found


def find_program(name: str, path: str) -> str:
    """The file of a program: beside this Python, where a venv has its own, or on the path.

    Raises LaunchError when there is none.
    """
    folder = str(Path(sys.executable).parent)
    if found := shutil.which(name, path=os.pathsep.join((folder, path))):
        return found
    raise LaunchError(
        f"{name}: no such program in {folder} nor on the PATH; install it there, or give its path"
    )


def free_address() -> str:
    """An address of this machine that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


class LocalLauncher:
    """Starts the workers of a run, watches them, and starts them again."""

    def __init__(
        self,
        run: Local,
        *,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._run, self._say, self._clock, self._sleep = run, say, clock, sleep
        self._workers: dict[int, subprocess.Popen] = {}
        self._pumps: list[threading.Thread] = []
        self._signal: int | None = None
        self._at_once = False  # a second Ctrl-C does not wait

    def launch(self) -> int:
        """Run to the end; the exit code that says how it ended."""
        former = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._launch()
        finally:
            self._end_all()
            for number, handler in former.items():
                signal.signal(number, handler)

    def _launch(self) -> int:
        start, row, crashes = 0, 0, []
        while True:
            start += 1
            begun = self._clock()
            self._start(start)
            codes = self._wait()
            verdict = judge(codes)
            self._workers.clear()  # their numbers are free for processes that are not ours
            how = verdict.decision.value if self._signal is None else self._told()
            self._say(f"[launch] start {start}: {how}: {verdict.reason}")
            if self._run.log_dir is not None and verdict.worker is not None:
                log = self._log_file(verdict.worker)
                *_, last = log.read_text(errors="replace").splitlines()
                self._say(f"[launch] {log}: {last}")
            if verdict.decision is not Decision.AGAIN or self._signal is not None:
                return verdict.code
            if self._clock() - begun >= self._run.healthy:
                row, crashes = 0, []
            row += 1
            crashes.append(verdict.code if crashed(codes) else None)
            if len(crashes) >= _SAME_CRASHES and set(crashes[-_SAME_CRASHES:]) == {verdict.code}:
                self._say(
                    f"[launch] given up: {in_words(verdict.code)} {_SAME_CRASHES} times in a row "
                    f"without progress (each start lasted less than {self._run.healthy:g} s); "
                    f"{self._log(verdict.worker)}"
                )
                return verdict.code
            if row > self._run.restarts:
                self._say(
                    f"[launch] given up: {self._run.restarts} restarts in a row that lasted less "
                    f"than {self._run.healthy:g} s"
                )
                return verdict.code
            self._pause(delay(row))
            if self._signal is not None:
                self._say(f"[launch] {self._told()}; not started again")
                return verdict.code

    def _start(self, start: int) -> None:
        address = free_address()
        if self._run.log_dir is not None:
            self._run.log_dir.mkdir(parents=True, exist_ok=True)
        for worker in range(self._run.processes):
            self._workers[worker] = self._spawn(worker, start, address)
        numbers = " ".join(str(child.pid) for child in self._workers.values())
        self._say(f"[launch] start {start}: processes {numbers}")

    def _spawn(self, worker: int, start: int, address: str) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if key not in _PLACE}
        environment |= worker_environment(self._run, worker, address)
        if self._run.again is not None:
            environment["JAXLAB_AGAIN"] = self._run.again
        environment.pop("XLA_FLAGS", None)  # it may count virtual devices, too
        output: Any = subprocess.PIPE
        if self._run.log_dir is not None:
            output = open(self._log_file(worker), "ab")  # noqa: SIM115
            output.write(f"[launch] start {start}\n".encode())
            output.flush()
        child = subprocess.Popen(
            [sys.executable, "-c", _WITH_PARENT, str(os.getpid()), *self._run.command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,  # a terminal's Ctrl-C comes to the launcher alone, which passes it on
        )
        if output is subprocess.PIPE:
            self._pumps.append(threading.Thread(target=self._pump, args=(worker, child)))
            self._pumps[-1].start()
        else:
            output.close()
        return child

    def _log_file(self, worker: int) -> Path:
        return self._run.log_dir / f"worker-{worker}.log"

    def _log(self, worker: int | None) -> str:
        """Where a worker's lines are."""
        return "see above" if self._run.log_dir is None else f"the log is {self._log_file(worker)}"

    def _pump(self, worker: int, child: subprocess.Popen) -> None:
        for line in child.stdout:
            if line.startswith(b"[Gloo]"):
                continue  # a library's greeting, several a process
            self._say(f"[worker {worker}] {line.decode(errors='replace').rstrip()}")
        child.stdout.close()

    def _wait(self) -> dict[int, int]:
        """Until all have ended; the exit codes, without those that ended here after a failure."""
        codes: dict[int, int] = {}
        deadline, told = float("inf"), None
        while len(codes) < len(self._workers):
            for worker, child in self._workers.items():
                if worker not in codes and child.poll() is not None:
                    codes[worker] = child.returncode
                    patience = self._run.grace if child.returncode in (0, 75) else _AFTER_FAILURE
                    if told is None:  # else all have the grace, however the others end
                        deadline = min(deadline, self._clock() + patience)
            if self._signal not in (None, told):
                told = self._signal
                self._tell(told)
                deadline = self._clock() + self._run.grace
            if self._at_once or self._clock() > deadline:
                break
            time.sleep(_LOOK_SECONDS)
        late = dict.fromkeys(self._workers.keys() - codes.keys(), -signal.SIGKILL)
        self._end_all()
        for pump in self._pumps:
            pump.join()
        self._pumps.clear()
        # Of some that failed the others are no news; of some that are done they are.
        return codes if any(codes.values()) else codes | late

    def _tell(self, number: int) -> None:
        for child in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    def _note(self, number: int, _: Any) -> None:
        """No more than that: this thread may be waiting for a child, and hold its lock."""
        self._at_once |= self._signal == number == signal.SIGINT
        self._signal = number

    def _told(self) -> str:
        return f"told to stop ({signal.Signals(self._signal).name})"

    def _pause(self, seconds: float) -> None:
        """In short sleeps: a signal does not end one."""
        for _ in range(math.ceil(seconds / _LOOK_SECONDS)):
            if self._signal is not None:
                return
            self._sleep(_LOOK_SECONDS)

    def _end_all(self) -> None:
        """With what they have started, which may hold their output open."""
        for child in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def delay(row: int) -> float:
    """Seconds before the next start: none at first, then twice as long each time, to a minute."""
    return 0.0 if row < 2 else min(2.0 ** (row - 2), _MOST_DELAY)
