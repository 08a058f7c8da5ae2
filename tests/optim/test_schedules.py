"""Learning-rate schedules, written out by hand."""

import numpy as np

from jaxlab.config import ScheduleConfig, StageConfig
from jaxlab.optim import make_schedule


def rates(steps: int, **schedule) -> list[float]:
    stage = StageConfig(
        steps=steps, batch_size=1, learning_rate=2.0, schedule=ScheduleConfig(**schedule)
    )
    return [float(make_schedule(stage)(step)) for step in range(steps)]


def test_warmup_stable_decay_goes_up_stays_and_falls_in_the_last_share():
    got = rates(10, warmup_steps=4, decay_fraction=0.2)
    np.testing.assert_allclose(got, [0.5, 1, 1.5, 2, 2, 2, 2, 2, 2, 1], rtol=1e-6)


def test_decay_heads_for_the_final_share_of_the_peak():
    got = rates(5, decay_fraction=0.8, final_fraction=0.2)
    np.testing.assert_allclose(got, [2, 2, 1.6, 1.2, 0.8], rtol=1e-6)


def test_warmup_cosine_is_half_way_down_in_the_middle_of_the_rest():
    got = rates(10, name="warmup-cosine", warmup_steps=2, final_fraction=0.1)
    assert got[:3] == [1, 2, 2]
    np.testing.assert_allclose(got[6], 2 * (0.1 + 0.9 / 2), rtol=1e-6)
    assert np.all(np.diff(got[2:]) < 0) and got[-1] > 0.2


def test_constant_is_the_peak():
    assert rates(3, name="constant") == [2, 2, 2]


def test_no_warmup_starts_at_the_peak_and_no_decay_ends_there():
    assert rates(3, decay_fraction=0.0) == [2, 2, 2]
