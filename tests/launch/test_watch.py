"""A watched run on Cloud TPU comes up again, against a gcloud that is played by a script."""

import os
import subprocess

import pytest

from launch import cloud_tpu
from launch.accelerators import accelerator
from launch.cloud_tpu import Pod
from launch.plan import LaunchError, Plan
from launch.watch import Watched, Watcher

POD = Pod("a-run", "us-east5-a")
TRAIN = ("jaxlab", "train", "c")
# What is said at the end, whatever the end.
LEFT = (
    "a-run: its chips stay yours, and paid for, until: "
    "python -m launch.pod delete --name a-run --zone=us-east5-a"
)


def workers(*codes) -> str:
    """What the workers say; noise of ssh is between."""
    lines = [f"worker host-{n} {n} {code}" for n, code in enumerate(codes)]
    return "\n".join(["SSH: Attempting to connect to worker 0...", *lines]) + "\n"


def watch(
    answers: list[str | LaunchError], restarts: int = 20
) -> tuple[int, list[str], list[str], list[float]]:
    """Exit code, titles of the plans that were carried out, what was said, and the pauses.

    The answers come in order: those without "worker" are states, errors are raised.
    """
    done, said, pauses = [], [], []
    left = list(answers)

    def ask(step):
        answer = left.pop(0)
        if isinstance(answer, LaunchError):
            raise answer
        if answer:
            assert (step == cloud_tpu.state(POD)) == ("worker" not in answer)
        return answer

    watched = Watched(
        pod=POD,
        chips=accelerator("v5p-16"),  # two hosts
        create=Plan("create", ()),
        run=Plan("run", ()),
        command=TRAIN,
        restarts=restarts,
        poll_seconds=1.0,
    )
    watcher = Watcher(
        watched,
        say=said.append,
        sleep=pauses.append,
        ask=ask,
        act=lambda plan: done.append(plan.title),
    )
    code = watcher.watch()
    assert not left
    assert said.pop() == LEFT
    return code, done, said, pauses


def test_a_run_that_ends_is_left_alone():
    code, done, _, _ = watch(
        ["ACTIVE\n", workers("running", "running"), "ACTIVE\n", workers("0", "0")]
    )
    assert (code, done) == (0, [])


def test_chips_that_were_taken_away_are_asked_for_again_and_the_run_goes_on():
    code, done, said, pauses = watch(
        [
            "ACTIVE",
            workers("running", "running"),
            "SUSPENDED",
            "",
            "",
            "WAITING_FOR_RESOURCES",
            "PROVISIONING",
            "ACTIVE",
            workers("idle", "idle"),
            "ACTIVE",
            workers("0", "0"),
        ]
    )
    assert (code, done) == (0, ["delete a-run", "create", "run"])
    assert said[0] == "a-run: the chips are SUSPENDED; restart 1 of 20 in 10 s"
    assert pauses.count(10.0) == 1


def test_a_lost_worker_is_waited_for_once_and_then_all_start_again():
    answers = ["ACTIVE", workers("137", "running")] * 2 + ["ACTIVE", workers("0", "0")]
    code, done, said, _ = watch(answers)
    assert (code, done) == (0, ["stop on a-run", "start again on a-run"])
    assert said[0] == "a-run: start again: worker 0: ended by signal 9"


def test_an_error_that_would_come_again_stops():
    code, done, said, _ = watch(["ACTIVE", workers("77", "1")])
    assert (code, done) == (1, [])
    assert said[-1].startswith("a-run: stop: worker 1: an error that a repetition would meet")


def test_it_is_given_up_after_so_many_restarts_with_longer_and_longer_pauses():
    code, done, said, pauses = watch(["FAILED", "", "FAILED", "", "FAILED"], restarts=2)
    assert code == 77 and done == ["delete a-run", "create"] * 2
    assert said[-1] == "a-run: the chips are FAILED; given up after 2 restarts"
    assert [pause for pause in pauses if pause > 1] == [10.0, 20.0]


def test_a_state_that_is_not_known_is_said_and_looked_at_again():
    code, _, said, _ = watch(["DREAMING", "ACTIVE", workers("0", "0")])
    assert code == 0 and said[0] == "a-run: state DREAMING; looking again"


def test_what_is_not_there_yet_is_created_and_started():
    code, done, said, _ = watch(
        ["", "ACCEPTED", "ACTIVE", workers("idle", "idle"), "ACTIVE", workers("0", "0")]
    )
    assert (code, done) == (0, ["create", "run"])
    assert said == ["a-run: done: all workers are done"]


def test_a_worker_that_comes_back_empty_gets_the_code_again():
    code, done, said, _ = watch(
        ["ACTIVE", workers("running", "running"), "ACTIVE", workers("running", "idle")]
        + ["ACTIVE", workers("0", "0")]
    )
    assert (code, done) == (0, ["run"])
    assert said[0].startswith("a-run: a worker was replaced by an empty one; restart 1 of 20")


def test_chips_that_somebody_else_gave_back_are_not_asked_for_again():
    code, done, said, _ = watch(["ACTIVE", workers("running", "running"), "", "", ""])
    assert (code, done) == (77, [])
    assert said == ["a-run: was deleted by somebody else; not watched any more"]


OUTAGE = LaunchError("gcloud ...: ended with exit code 1")


def test_an_outage_of_the_network_is_lived_through():
    there = ["ACTIVE", workers("running", "running")]
    code, _, said, _ = watch([*there, OUTAGE, OUTAGE, "ACTIVE", "", "ACTIVE", workers("0", "0")])
    assert code == 0
    assert said[:3] == [f"a-run: {OUTAGE}; trying again"] * 2 + [
        "a-run: no worker answered; trying again"
    ]


def test_a_first_question_that_fails_is_a_mistake_and_told_at_once():
    with pytest.raises(LaunchError, match="exit code 1"):
        watch([OUTAGE])


def test_an_outage_without_end_ends_the_watch():
    with pytest.raises(LaunchError, match="exit code 1"):
        watch(["CREATING"] + [OUTAGE] * 31)


def test_a_worker_says_how_it_is(tmp_path):
    """What is asked of every worker, in a shell of this machine."""
    (tmp_path / "curl").write_text("#!/bin/sh\necho 3\n")
    (tmp_path / "curl").chmod(0o755)
    script = cloud_tpu.codes(POD).argv[-1].removeprefix("--command=")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def says() -> str:
        words = ("bash", "-c", script)
        ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return ended.stdout.split()[2:]

    assert says() == ["3", "idle"]
    process = subprocess.Popen(("sleep", "60"), start_new_session=True)
    (tmp_path / cloud_tpu.PID).write_text(f"{process.pid}\n")
    assert says() == ["3", "running"]
    process.kill()
    process.wait()
    assert says() == ["3", "137"]
    (tmp_path / cloud_tpu.EXIT).write_text("75\n")
    assert says() == ["3", "75"]
