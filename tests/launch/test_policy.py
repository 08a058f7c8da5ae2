"""What exit codes mean, the same for every launcher."""

import pytest

from jaxlab.errors import ConfigError, Interrupted, Preempted, WorkerError
from jaxlab.training.guards import NotFiniteError
from jaxlab.training.watchdog import EXIT_CODE
from launch.policy import AGAIN, MEANINGS, STOP, Decision, crashed, in_words, judge


@pytest.mark.parametrize(
    ("codes", "decision", "code", "reason"),
    [
        ({0: 0, 1: 0}, Decision.DONE, 0, "all workers are done"),
        ({0: 77, 1: -9}, Decision.AGAIN, 137, "worker 1: ended by signal 9"),
        ({0: 137}, Decision.AGAIN, 137, "worker 0: ended by signal 9"),
        ({0: 75, 1: 75}, Decision.AGAIN, 75, "worker 0: preempted, and saved"),
        ({0: 0, 1: 76}, Decision.AGAIN, 76, "worker 1: hung"),
        ({0: 77, 1: 1}, Decision.STOP, 1, "worker 1: an error that a repetition"),
        ({0: -9, 1: 3}, Decision.STOP, 3, "worker 1: training diverged"),
        ({0: 130, 1: 75}, Decision.STOP, 130, "worker 0: interrupted by the user"),
        ({0: -2}, Decision.STOP, 130, "worker 0: interrupted by the user"),
        ({0: 127}, Decision.STOP, 127, "worker 0: exit code 127, which jaxlab does not use"),
    ],
)
def test_one_error_that_would_come_again_outweighs_all_else(codes, decision, code, reason):
    verdict = judge(codes)
    assert (verdict.decision, verdict.code) == (decision, code)
    assert verdict.reason.startswith(reason)


def test_the_codes_are_those_of_the_program():
    assert Preempted.exit_code in AGAIN and WorkerError.exit_code in AGAIN and EXIT_CODE in AGAIN
    assert {ConfigError.exit_code, NotFiniteError.exit_code, Interrupted.exit_code} < set(STOP)
    assert set(MEANINGS) == {0, *STOP, *AGAIN}
    assert in_words(77).endswith("(exit code 77)")


@pytest.mark.parametrize(
    ("codes", "own"),
    [
        ({0: -6}, True),
        ({0: 77, 1: 139}, True),
        ({0: -6, 1: -11}, False),
        ({0: -6, 1: -9}, False),  # that aborted because the other was killed
        ({0: -9}, False),
        ({0: -15}, False),
        ({0: 77}, False),
    ],
)
def test_a_crash_is_a_signal_of_ones_own_doing_and_the_only_end(codes, own):
    assert crashed(codes) is own


def test_a_verdict_needs_a_worker_that_ended_by_itself():
    with pytest.raises(ValueError, match="no worker"):
        judge({})
