"""The loss on eight devices is that of one, and sums its gradient once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.sharding.parts_on_eight_devices"],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_loss_gradients_and_log_probabilities_are_those_of_one_device(found):
    for mesh, differences in found.items():
        for name in ("loss", "hidden gradient", "weights gradient", "scores"):
            # Float32 sums in another order.
            assert differences[name] < 2e-6, (mesh, name)


def test_the_same_tokens_are_drawn_however_the_vocabulary_is_cut(found):
    assert [differences["draws"] for differences in found.values()] == [0, 0, 0]


def test_no_block_of_positions_sums_the_gradient_of_the_head_over_devices(found):
    assert [differences["reductions in loops"] for differences in found.values()] == [0, 0, 0]
