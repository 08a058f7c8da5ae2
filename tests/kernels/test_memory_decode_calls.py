"""Memory decoding as it is called: what is chosen, what is refused, and what copies are planned."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dispatch
from kernels_pallas.memory_decode import api, memory_decode, plan
from tests.kernels.test_memory_decode import arrays
from tests.kernels.users import spy_on, untyped


def test_the_target_decides_which_implementation_runs(monkeypatch):
    called = spy_on(api, monkeypatch)
    with untyped():
        memory_decode(**arrays())
        memory_decode(**arrays((3,), tokens=1024))
        with dispatch.lowering_for("tpu"):
            memory_decode(**arrays())
            memory_decode(**arrays(tokens=36))
            with pytest.raises(NotImplementedError, match="need a multiple of 8 rows, this has 36"):
                memory_decode(**arrays(tokens=36), implementation="tpu")
            wide = arrays((1,), tokens=256, kv_heads=40, group=1, head_dim=128, slots=0)
            with pytest.raises(NotImplementedError, match="rows of 5120 float32 need .* of VMEM"):
                memory_decode(**wide, implementation="tpu")
        with dispatch.lowering_for("gpu"):
            memory_decode(**arrays(tokens=64, dtype=jnp.bfloat16))
            for changes, message in (
                (dict(tokens=96), "multiples of 64 tokens, not 96"),
                (dict(group=9), "at most 8 query heads share a kv head, not 9"),
                (dict(head_dim=24), "multiples of 16 up to 256 wide, not 24"),
                (dict(dtype=np.float32), "bfloat16 here, not float32"),
            ):
                given = arrays(**{**dict(tokens=64, dtype=jnp.bfloat16), **changes})
                with pytest.raises(NotImplementedError, match=message):
                    memory_decode(**given, implementation="gpu")
    assert called == ["xla", "blocked", "tpu", "xla", "gpu"]


@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("length", [512, 4096])
def test_full_caches_move_at_most_a_twentieth_more_than_the_floor(batch, length):
    sizes = plan.Plan(
        batch, length, heads=40, kv_heads=8, head_dim=80, itemsize=2, slots=40, preface=3
    )
    assert sizes.copied_bytes([length] * batch) <= 1.05 * sizes.floor_bytes([length] * batch)


def test_of_a_short_sequence_only_its_units_are_copied():
    sizes = plan.Plan(2, 4096, heads=40, kv_heads=8, head_dim=80, itemsize=2, slots=0, preface=0)
    empty, one = (sizes.copied_bytes([n, 0]) for n in (0, 1))
    assert one - empty == 2 * sizes.unit * sizes.width * 2
    assert sizes.copied_bytes([513, 0]) - empty == 2 * (512 + sizes.unit) * sizes.width * 2


def changed(**changes):
    given = {**arrays(), **changes}
    return {name: part for name, part in given.items() if part is not None}


OTHER = arrays(head_dim=24)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            arrays(group=1) | {"query": OTHER["query"][:, :3, :16]},
            "query has 3 heads and key has 2",
        ),
        (changed(query=OTHER["query"]), "key has rows of 32, query has heads of 24"),
        (changed(tokens_per_row=3), "whole heads of tokens_per_row=3 tokens"),
        (changed(value=OTHER["value"]), "key and value: .*must agree"),
        (
            changed(
                key=OTHER["key"].reshape(3, 32, 2, 24), value=OTHER["key"].reshape(3, 32, 2, 24)
            ),
            "key has heads of 24, query of 16",
        ),
        (
            changed(query=jnp.zeros((3, 4, 16), jnp.bfloat16)),
            "query is bfloat16, the cache float32",
        ),
        (changed(lengths=jnp.zeros(2, jnp.int32)), "lengths has batch 2, query has 3"),
        (changed(preface=OTHER["preface"]), "preface has .*rows of 48, the cache .*2 heads x 16"),
        (changed(slots=OTHER["slots"]), "slots has .*rows of 48, the cache .*2 heads x 16"),
        (
            changed(slots=tuple(part.astype(jnp.bfloat16) for part in arrays()["slots"])),
            "slots has bfloat16 .*the cache float32",
        ),
        (changed(slots=tuple(part[:2] for part in arrays()["slots"])), "slots has batch 2"),
        (changed(slots=None), "slot_valid without slots"),
        (
            changed(slot_valid=jnp.ones((3, 4), bool)),
            r"slot_valid has shape \(3, 4\), the slots need",
        ),
        (changed(implementation="flash"), "no implementation named 'flash'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(given, message):
    with untyped(), pytest.raises(ValueError, match=message):
        memory_decode(**given)
