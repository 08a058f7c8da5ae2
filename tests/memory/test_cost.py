"""The paper's cost model of knowledge (Memory³ appendix A), at the size of its model."""

import dataclasses

import pytest

from jaxlab.config import MemoryConfig, ModelConfig
from jaxlab.memory.cost import knowledge_cost
from jaxlab.models.presets import PRESETS

PAPER = ModelConfig(**PRESETS["memory3-2b"])


def cost(model=PAPER, training_length=2048, **memory):
    return knowledge_cost(model, MemoryConfig(**memory), training_length=training_length)


def test_the_four_figures_of_the_paper():
    found = cost()
    assert found.parameters_write == pytest.approx(2.2385e12, rel=1e-4)
    assert found.memory_write == pytest.approx(3.0818e11, rel=1e-4)
    assert found.memory_read == pytest.approx(1.4418e8, rel=1e-4)
    assert found.text_read == pytest.approx(6.2422e11, rel=1e-4)


def test_memory_is_cheapest_from_half_a_use_to_thirteen_thousand():
    fewest, most = cost().uses
    assert fewest == pytest.approx(0.494, abs=5e-4)
    assert most == pytest.approx(13_400, rel=2e-3)


def test_at_both_ends_of_the_range_two_formats_cost_the_same():
    found = cost()
    fewest, most = found.uses
    assert found.memory_write + fewest * found.memory_read == pytest.approx(
        fewest * found.text_read
    )
    assert found.memory_write + most * found.memory_read == pytest.approx(found.parameters_write)


def test_each_cost_follows_what_it_depends_on_and_nothing_else():
    usual, fewer_kept = cost(), cost(tokens_kept=4)
    assert dataclasses.replace(fewer_kept, memory_read=usual.memory_read) == usual
    assert fewer_kept.memory_read == usual.memory_read / 2
    longer = cost(training_length=4096)
    assert longer.parameters_write > usual.parameters_write
    assert dataclasses.replace(longer, parameters_write=usual.parameters_write) == usual
