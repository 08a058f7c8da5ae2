"""Where a run's time went, over all its starts."""

import json

import pytest

from jaxlab.training.goodput import Goodput


def test_goodput_adds_up_and_nested_time_counts_for_the_inner_activity():
    now = [0.0]
    goodput = Goodput(clock=lambda: now[0])
    now[0] = 1
    with goodput.measure("step"):
        now[0] = 4
        with goodput.measure("compile"):
            now[0] = 6
        now[0] = 9
    now[0] = 10
    seconds = goodput.seconds()
    assert (seconds["step"], seconds["compile"], seconds["other"]) == (6, 2, 2)
    assert sum(seconds.values()) == 10 and goodput.share() == 0.6
    with (
        pytest.raises(ValueError, match="'lunch' is none of init, compile"),
        goodput.measure("lunch"),
    ):
        pass


class Clocks:
    """A clock of the process and one of the wall, moved by hand together."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def start(file, clock, **options):
    return Goodput(file, clock=clock, wall=clock, **options)


def spend(goodput, clock, activity, seconds):
    with goodput.measure(activity):
        clock.now += seconds


def test_a_killed_start_loses_the_steps_after_its_last_save_and_the_time_until_the_next(tmp_path):
    clock, file = Clocks(), tmp_path / "goodput.json"
    first = start(file, clock)
    spend(first, clock, "step", 10)
    spend(first, clock, "save", 2)
    first.saved()
    spend(first, clock, "step", 7)
    first.sign_of_life()
    clock.now += 30  # killed
    second = start(file, clock)
    assert second.starts == 2
    assert {n: s for n, s in second.seconds().items() if s} == {
        "step": 10,
        "save": 2,
        "lost": 7,
        "down": 30,
    }
    spend(second, clock, "step", 31)
    assert second.share() == 41 / 80 and sum(second.seconds().values()) == 80
    assert second.summary().startswith("goodput 0.51; seconds of 2 starts: step 41.0, save 2.0")


def test_a_start_that_dies_before_its_first_step_counts_with_its_time(tmp_path):
    clock, file = Clocks(), tmp_path / "goodput.json"
    first = start(file, clock)
    spend(first, clock, "step", 5)
    first.saved()
    for number in (2, 3):
        clock.now += 10
        refused = start(file, clock)
        with pytest.raises(RuntimeError), refused.measure("init"):
            raise RuntimeError
        assert json.loads(file.read_text())["starts"] == number - 1
        dies = start(file, clock)
        spend(dies, clock, "init", 3)
        dies.sign_of_life()
        assert json.loads(file.read_text())["starts"] == dies.starts == number
    seconds = start(file, clock).seconds()
    assert (seconds["init"], seconds["down"], seconds["step"], seconds["lost"]) == (6, 20, 5, 0)


def test_a_run_that_cannot_begin_leaves_no_file(tmp_path):
    clock, file = Clocks(), tmp_path / "goodput.json"
    spend(start(file, clock), clock, "init", 3)
    assert not file.exists()


def test_a_start_that_ends_by_itself_loses_nothing(tmp_path):
    clock, file = Clocks(), tmp_path / "goodput.json"
    first = start(file, clock)
    spend(first, clock, "step", 5)
    first.saved()
    first.close()
    clock.now += 4
    seconds = start(file, clock).seconds()
    assert (seconds["step"], seconds["lost"], seconds["down"]) == (5, 0, 4)


def test_signs_of_life_are_written_every_few_seconds_only(tmp_path):
    clock, file = Clocks(), tmp_path / "goodput.json"
    goodput = start(file, clock)
    written = set()
    for _ in range(20):
        spend(goodput, clock, "step", 1)
        goodput.sign_of_life()
        written.add(json.loads(file.read_text())["seconds"]["step"])
    assert written == {1, 6, 11, 16}


def test_a_damaged_file_is_set_aside_with_a_message(tmp_path):
    file, said = tmp_path / "goodput.json", []
    file.write_text('{"seconds": {"step": ')
    goodput = start(file, Clocks(), report=said.append)
    assert goodput.starts == 1 and sum(goodput.seconds().values()) == 0
    assert said == [f"{file}: cannot be read; moved to goodput.json.damaged, times count from now"]
    assert (tmp_path / "goodput.json.damaged").exists()


def test_every_activity_that_begins_is_a_beat():
    beats = []
    goodput = Goodput(beat=beats.append)
    with goodput.measure("evaluate"), goodput.measure("step"):
        pass
    assert beats == ["evaluate", "step", "evaluate", "other"]
