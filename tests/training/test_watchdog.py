"""A process that hangs is ended, and one that is merely slow is not."""

import threading

import pytest

from jaxlab.training.watchdog import Watchdog


class Ended:
    """Stands for the end of the process."""

    def __init__(self):
        self.codes, self.happened = [], threading.Event()

    def __call__(self, code):
        self.codes.append(code)
        self.happened.set()


@pytest.mark.parametrize(
    ("activity", "silent", "ends"),
    [
        ("step", 11, True),
        ("step", 9, False),
        ("compile", 99, False),
        ("compile", 101, True),
        ("init", 999, False),
        ("init", 1001, True),
    ],
)
def test_a_step_has_the_seconds_given_and_other_work_many_times_that(
    tmp_path, activity, silent, ends
):
    now, looks, ended = [0.0], threading.Event(), Ended()

    def clock():
        if threading.current_thread() is not threading.main_thread():
            looks.set()
        return now[0]

    with Watchdog(10.0, tmp_path, clock=clock, leave=ended, every=0.001) as watchdog:
        watchdog.beat(activity)
        now[0] = silent
        if ends:
            assert ended.happened.wait(30) and ended.codes == [76]
            text = (tmp_path / "hang-0.txt").read_text()
            assert f"nothing has happened for {silent} s in '{activity}'" in text
            assert "test_watchdog.py" in text  # where the main thread was
        else:
            for _ in range(2):  # the first look may have begun before
                looks.clear()
                assert looks.wait(30)
            assert not ended.codes


def test_without_a_limit_nothing_watches(tmp_path):
    before = threading.active_count()
    with Watchdog(None, tmp_path):
        assert threading.active_count() == before


def test_the_watch_ends_with_the_run(tmp_path):
    ended = Ended()
    with Watchdog(10.0, tmp_path, leave=ended, every=0.001) as watchdog:
        thread = watchdog._thread
    thread.join(30)
    assert not thread.is_alive() and not ended.codes
