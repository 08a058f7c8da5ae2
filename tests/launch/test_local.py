"""Processes on this machine: started, watched, started again, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local
from launch.local import Local, LocalLauncher, delay, worker_environment

ROOT = Path(__file__).parents[2]

# A worker: what it does depends on its number and on how many starts there were.
WORKER = """
import os, signal, sys, time
me = int(os.environ["JAXLAB_PROCESS_ID"])
folder = sys.argv[1]
starts = len([name for name in os.listdir(folder) if name.startswith(f"{me}-")])
open(f"{folder}/{me}-{starts}", "w").close()
print("hello", me, os.environ["JAXLAB_COORDINATOR"].split(":")[0], flush=True)
"""


def launch(folder: Path, code: str, **options) -> tuple[int, list[str]]:
    (folder / "starts").mkdir(exist_ok=True)
    said = []
    run = Local((sys.executable, "-c", WORKER + code, str(folder / "starts")), **options)
    launcher = LocalLauncher(run, say=said.append, sleep=lambda _: None)
    return launcher.launch(), said


def starts_of(folder: Path) -> int:
    return len(list((folder / "starts").glob("0-*")))


def test_all_done_is_done_and_every_line_has_its_worker(tmp_path):
    code, said = launch(tmp_path, "", processes=3)
    assert code == 0
    assert said[0].startswith("[launch] start 1: processes ")
    assert sorted(said[1:-1]) == [f"[worker {n}] hello {n} 127.0.0.1" for n in range(3)]
    assert said[-1] == "[launch] start 1: done: all workers are done"


def test_what_a_worker_leaves_behind_does_not_keep_the_launcher(tmp_path):
    left = 'import subprocess; subprocess.Popen(["sleep", "600"]); sys.exit(me)'
    begun = time.monotonic()
    code, _ = launch(tmp_path, left, grace=1.0)
    assert code == 1 and time.monotonic() - begun < 60


def test_a_killed_worker_ends_the_others_and_all_start_again(tmp_path):
    code, said = launch(
        tmp_path,
        "if me == 1 and starts < 2: time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)\n"
        "elif starts < 2: time.sleep(600)",
    )
    assert code == 0
    assert starts_of(tmp_path) == 3
    told = [line for line in said if "start again" in line]
    reason = "start again: worker 1: ended by signal 9"
    assert told == [f"[launch] start {n}: {reason}" for n in (1, 2)]


def test_an_error_that_would_come_again_stops_and_its_code_is_the_launchers(tmp_path):
    code, said = launch(tmp_path, "if me: sys.exit(3)\ntime.sleep(600)")
    assert (
        code == 3
        and said[-1] == "[launch] start 1: stop: worker 1: training diverged (exit code 3)"
    )


def test_restarts_in_a_row_are_counted_and_then_given_up(tmp_path):
    code, said = launch(tmp_path, "sys.exit(77)", restarts=2)
    assert code == 77 and starts_of(tmp_path) == 3
    assert said[-1].startswith("[launch] given up: 2 restarts in a row that lasted less than 600 s")


def test_one_crash_again_and_again_is_given_up_soon_with_its_log(tmp_path):
    logs = tmp_path / "logs"
    abort = "if me: os.abort()\ntime.sleep(600)"
    code, said = launch(tmp_path, abort, log_dir=logs)
    assert code == 134 and starts_of(tmp_path) == 3
    assert said[-1] == (
        "[launch] given up: ended by signal 6 3 times in a row without progress (each start lasted "
        f"less than 600 s); the log is {logs / 'worker-1.log'}"
    )


@pytest.mark.parametrize(
    "ends",
    [
        # By another signal in between, killed from outside, and after long enough.
        ("os.kill(os.getpid(), 11 if starts % 2 else 6)", {}),
        ("os.kill(os.getpid(), 9)", {}),
        ("os.abort()", {"healthy": 0.0}),
    ],
)
def test_ends_that_may_pass_have_all_their_restarts(tmp_path, ends):
    code, options = ends
    ended, said = launch(
        tmp_path, f"if starts == 4: sys.exit(0)\n{code}", processes=2, restarts=4, **options
    )
    assert ended == 0 and starts_of(tmp_path) == 5, said


def test_a_start_that_lasted_begins_a_new_row(tmp_path):
    code, _ = launch(tmp_path, "sys.exit(77 if starts < 4 else 0)", restarts=1, healthy=0.0)
    assert code == 0 and starts_of(tmp_path) == 5


def test_a_worker_that_does_not_end_when_the_others_are_done_is_no_success(tmp_path):
    code, said = launch(tmp_path, "if me: time.sleep(600)", grace=0.5, restarts=0)
    assert code == 137 and "worker 1: ended by signal 9" in said[-2]


def test_logs_go_to_a_file_for_each_worker(tmp_path):
    code, said = launch(tmp_path, "", log_dir=tmp_path / "logs")
    assert code == 0 and len(said) == 2
    for worker in (0, 1):
        lines = (tmp_path / "logs" / f"worker-{worker}.log").read_text().splitlines()
        assert lines == ["[launch] start 1", f"hello {worker} 127.0.0.1"]


def test_how_it_ended_names_the_log_and_its_last_line(tmp_path):
    logs = tmp_path / "logs"
    code, said = launch(tmp_path, "if me: sys.exit('error: no')\ntime.sleep(600)", log_dir=logs)
    assert code == 1 and said[-1] == f"[launch] {logs / 'worker-1.log'}: error: no"


def pod_local(*words: str) -> subprocess.CompletedProcess:
    """The launcher of a shell in which no environment is activated."""
    return subprocess.run(
        [sys.executable, "-m", "launch.pod", "local", "--processes", "1", *words],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "."},
        cwd=ROOT,
    )


def test_a_program_beside_this_python_needs_no_activated_environment():
    ended = pod_local("--", "pytest", "--version")
    assert ended.returncode == 0 and "[worker 0] pytest " in ended.stdout


def test_a_program_that_is_nowhere_is_one_line_and_nothing_starts():
    ended = pod_local("--", "no-such-program")
    assert ended.returncode == 1 and not ended.stdout
    assert ended.stderr.startswith("error: no-such-program: no such program in ")
    assert ended.stderr.count("\n") == 1


def test_a_worker_is_told_what_starts_all_again():
    ended = pod_local("--env", "A=b c", "--", "sh", "-c", "echo $JAXLAB_AGAIN")
    again = "local --processes 1 --env 'A=b c' -- sh -c 'echo $JAXLAB_AGAIN'"
    assert f"[worker 0] python -m launch.pod {again}\n" in ended.stdout


def test_the_pause_grows_to_a_minute():
    assert [delay(row) for row in (1, 2, 3, 5, 20)] == [0, 1, 2, 8, 60]


def test_the_machines_own_devices_are_left_alone_where_none_are_asked_for():
    found = worker_environment(Local(("a",), devices=None), 1, "h:1")
    assert found == {
        "JAXLAB_COORDINATOR": "h:1",
        "JAXLAB_PROCESSES": "2",
        "JAXLAB_PROCESS_ID": "1",
    }


def test_one_process_joins_nobody(monkeypatch, tmp_path):
    """Neither by what it is given nor by what was there already."""
    monkeypatch.setenv("JAXLAB_COORDINATOR", "h:1")
    script = "import os; print(*sorted(k for k in os.environ if k.startswith('JAX')))"
    said = []
    run = Local((sys.executable, "-c", script), processes=1, devices=2)
    assert LocalLauncher(run, say=said.append).launch() == 0
    found = said[1].removeprefix("[worker 0] ").split()
    assert "JAX_NUM_CPU_DEVICES" in found and "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in found
    assert not {"JAXLAB_COORDINATOR", "JAXLAB_PROCESSES", "JAXLAB_PROCESS_ID"} & set(found)


def launcher_of(folder: Path, code: str) -> subprocess.Popen:
    worker = (sys.executable, "-c", WORKER + code, str(folder))
    return subprocess.Popen(
        [sys.executable, "-m", "launch.pod", "local", "--devices", "0", "--", *worker],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize(("number", "ends_with"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_are_passed_on_and_nothing_starts_again(tmp_path, number, ends_with):
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    launched = launcher_of(tmp_path, code)
    ready = 0
    while ready < 2:
        ready += "ready" in launched.stdout.readline()
    launched.send_signal(number)
    out, _ = launched.communicate(timeout=60)
    assert launched.returncode == ends_with
    assert "start 2" not in out


# Its killed workers take two seconds to go, as one does whose memory is given back.
SLOW_TO_GO = """
import os, sys, threading
from launch.local import Local, LocalLauncher
kill = os.killpg
os.killpg = lambda *words: threading.Timer(2.0, kill, words).start()
worker = "import signal, time; signal.signal(2, signal.SIG_IGN); print('ready', flush=True)"
command = (sys.executable, "-c", worker + "; time.sleep(600)")
sys.exit(LocalLauncher(Local(command, processes=1, devices=None)).launch())
"""


@pytest.mark.parametrize("presses", [2, 3])
def test_a_second_ctrl_c_does_not_wait_and_a_third_does_not_hang(presses):
    """Though a killed worker takes its time to go."""
    launched = subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_GO], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    while "ready" not in launched.stdout.readline():
        pass
    for _ in range(presses):
        launched.send_signal(signal.SIGINT)
        time.sleep(0.3)
    try:
        out, _ = launched.communicate(timeout=30)
    finally:
        launched.kill()
    assert launched.returncode == 137 and "told to stop (SIGINT)" in out


def test_a_signal_in_the_pause_between_starts_ends_it_and_nothing_starts_again(tmp_path):
    """At the next look, and not after the whole pause."""
    (tmp_path / "starts").mkdir()
    slept, said = [], []

    def sleep(seconds: float) -> None:
        if seconds:
            slept.append(seconds)
            signal.raise_signal(signal.SIGTERM)

    worker = (sys.executable, "-c", WORKER + "sys.exit(77)", str(tmp_path / "starts"))
    code = LocalLauncher(Local(worker), say=said.append, sleep=sleep).launch()
    assert code == 77 and starts_of(tmp_path) == 2
    assert sum(slept) < 0.5
    assert said[-1] == "[launch] told to stop (SIGTERM); not started again"


def test_who_saves_keeps_the_grace_when_the_others_end_by_the_signal(tmp_path, monkeypatch):
    """What is left for those that lost a partner is much shorter."""
    monkeypatch.setattr(local, "_AFTER_FAILURE", 0.1)
    ready = []

    def say(line: str) -> None:
        if "ready" in line:
            ready.append(line)
            if len(ready) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    saves = """
def save(*_):
    time.sleep(1.5)
    open(f"{folder}/saved", "w").close()
    sys.exit(75)
if me == 0:
    signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""
    worker = (sys.executable, "-c", WORKER + saves, str(tmp_path))
    LocalLauncher(Local(worker, grace=30.0), say=say).launch()
    assert (tmp_path / "saved").exists()


def test_workers_do_not_outlive_a_launcher_that_was_killed(tmp_path):
    launched = launcher_of(tmp_path, "print('ready', flush=True); time.sleep(600)")
    numbers = [int(word) for word in launched.stdout.readline().split("processes ")[1].split()]
    ready = 0
    while ready < 2:
        ready += "ready" in launched.stdout.readline()
    launched.kill()
    launched.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(alive(number) for number in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
