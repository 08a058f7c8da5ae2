"""The loss on eight devices is that of one, and sums its gradient once."""

import pytest

from tests.eight_devices import run_module


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return run_module("tests.sharding.parts_on_eight_devices")


def test_loss_gradients_and_log_probabilities_are_those_of_one_device(found):
    for mesh, differences in found.items():
        for name in ("loss", "hidden gradient", "weights gradient", "scores"):
            # Float32 sums in another order.
            assert differences[name] < 2e-6, (mesh, name)


def test_the_training_state_lies_after_a_step_where_it_lay_before(found):
    """Or the next step would be compiled once more, which takes minutes on a pod."""
    assert [differences["moved"] for differences in found.values()] == [[], [], []]


def test_the_same_tokens_are_drawn_however_the_vocabulary_is_cut(found):
    assert [differences["draws"] for differences in found.values()] == [0, 0, 0]


def test_no_block_of_positions_sums_the_gradient_of_the_head_over_devices(found):
    assert [differences["reductions in loops"] for differences in found.values()] == [0, 0, 0]
