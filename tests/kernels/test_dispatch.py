"""Laws of the choice between implementations."""

import logging

import pytest

from kernels_pallas import blocks
from kernels_pallas.dispatch import (
    Implementation,
    always_supported,
    choose,
    lowering_for,
    only_on,
    target_chip,
)


def named(name, reason=None):
    return Implementation(name, lambda: name, lambda *args, **kwargs: reason)


FAST, SECOND = named("fast", "needs another chip"), named("second")
LAST = Implementation("last", lambda: "last", always_supported)


def test_the_first_that_can_is_chosen_and_the_log_says_why_others_were_passed(caplog):
    with caplog.at_level(logging.INFO, logger="kernels_pallas.dispatch"):
        for _ in range(2):
            assert choose("one op", [FAST, SECOND, LAST], None, (), {}) is SECOND
    assert caplog.messages == ["one op uses second; passed over fast: needs another chip"]


def test_a_target_other_than_this_machine_is_chosen_for_within_only():
    assert only_on("cpu") is None
    with lowering_for("tpu", "v5e"):
        assert (only_on("tpu"), target_chip()) == (None, "v5e")
        assert only_on("cpu") == "made for cpu, the target is tpu"
    assert only_on("tpu") == "made for tpu, the target is cpu"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("v6e", "v6e"),
        ("NVIDIA H200", ""),
    ],
)
def test_chips_are_known_by_the_names_that_jax_gives_them(kind, name):
    assert blocks.short_name(kind) == name


def test_a_named_implementation_is_taken_even_behind_others_that_could():
    assert choose("op", [FAST, SECOND, LAST], "last", (), {}) is LAST


def test_a_named_implementation_is_never_replaced():
    with pytest.raises(NotImplementedError, match="op: .*fast: needs another chip") as caught:
        choose("op", [FAST, SECOND, LAST], "fast", (), {})
    assert "second" not in str(caught.value)


def test_an_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(ValueError, match=r"named 'quick'; there are \['fast', 'second', 'last'\]"):
        choose("op", [FAST, SECOND, LAST], "quick", (), {})


def test_when_none_can_every_reason_is_given():
    other = named("other", "too wide")
    with pytest.raises(NotImplementedError, match="fast: needs another chip; other: too wide"):
        choose("op", [FAST, other], None, (), {})


def test_the_arguments_decide():
    wide = Implementation("wide", lambda x: x, lambda x, *, limit: "no" if x > limit else None)
    assert choose("op", [wide, LAST], None, (3,), {"limit": 5}) is wide
    assert choose("op", [wide, LAST], None, (7,), {"limit": 5}) is LAST


@pytest.mark.parametrize("target", [("cuda", ""), ("tpu", "v99")])
def test_a_target_that_is_not_known_is_refused(target):
    with pytest.raises(ValueError, match="are known|there are tpu"), lowering_for(*target):
        pass
