"""Laws of sharded parameters, found out once on eight devices in a process of its own."""

import pytest

from tests.eight_devices import run_module


@pytest.fixture(scope="module")
def against() -> dict[str, str]:
    """What speaks against each statement."""
    return run_module("tests.optim.on_eight_devices")


@pytest.mark.parametrize("settings", ["global", "tensor", "rank_zeros"])
def test_mask_and_threshold_of_sharded_parameters_are_those_of_replicated_ones(against, settings):
    assert against[settings] == ""


def test_a_refresh_gathers_nothing(against):
    assert against["no_gather"] == ""


def test_the_mask_lies_like_the_parameters(against):
    assert against["lies_alike"] == ""


@pytest.mark.parametrize("which", ["ire", "average", "sam", "average_sam"])
def test_on_a_mesh_with_explicit_axes_an_update_keeps_every_type(against, which):
    assert against[f"explicit_{which}"] == ""


@pytest.mark.parametrize("settings", ["shard_map", "shard_map_rank_zeros", "shard_map_average"])
def test_shards_that_know_their_axes_find_the_threshold_of_the_whole(against, settings):
    assert against[settings] == ""
