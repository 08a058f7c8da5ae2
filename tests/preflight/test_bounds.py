"""Topologies, wires, rooflines, prices, and the estimate of a bank."""

from types import SimpleNamespace

import pytest

from jaxlab.config import MemoryConfig, ModelConfig
from jaxlab.errors import ConfigError
from jaxlab.models.presets import PRESETS
from jaxlab.preflight import chips
from jaxlab.preflight.analysis import refused_memory
from jaxlab.preflight.bank import estimate_bank
from jaxlab.preflight.chips import CHIPS, topology, wires
from jaxlab.preflight.roofline import Roofline, read_prices, speed

PAPER = ModelConfig(**PRESETS["memory3-2b"])


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("v5p:8x8x8", "v5p:8x8x8", 512),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-64", "v5e:8x8", 64),
        ("v5p-128", "v5p:4x4x4", 64),  # counted by TensorCores
        ("v6e-64", "v6e:8x8", 64),
    ],
)
def test_a_topology_has_two_names(text, name, count):
    found = topology(text)
    assert (found.name, found.chips) == (name, count)
    assert topology(text, 3).chips == 3 * count


@pytest.mark.parametrize("text", ["v9:2x2", "v5p:4x4", "v5e:3x3", "v5e-48", "v5p-127", "cpu"])
def test_a_topology_that_is_unknown_lists_those_known(text):
    with pytest.raises(ConfigError, match=f"{text}: unknown; known are v5e:2x2, 2x4, .*v5p-128"):
        topology(text)


def test_without_libtpu_the_cure_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(chips.CompilerMissing, match=r"pip install 'jax\[tpu\]'"):
        chips.devices(topology("v5e-8"))


def at(*coords: int, slice_index: int = 0):
    return SimpleNamespace(coords=coords, slice_index=slice_index)


def test_a_ring_sends_both_ways_a_line_one_way_and_slices_by_the_network():
    whole, part = topology("v5p:4x4x4"), topology("v5e:4x4")
    ring = [at(x, 0, 0) for x in range(4)]
    assert wires(whole, ring).bandwidth == 2 * CHIPS["v5p"].link
    assert wires(whole, ring[:2]).bandwidth == CHIPS["v5p"].link
    cube = [at(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    assert wires(whole, cube).bandwidth == 6 * CHIPS["v5p"].link
    # A v5e closes its rings only where an axis is whole, 16 chips long.
    assert wires(part, [at(x, 0) for x in range(4)]).bandwidth == CHIPS["v5e"].link
    # Every second chip shares the links with those between.
    assert wires(part, [at(0, 0), at(2, 0)]).bandwidth == CHIPS["v5e"].link / 2
    thin = topology("v5p:2x2x4")  # no cube: its ends are not cabled to each other
    assert wires(thin, [at(0, 0, z) for z in range(4)]).bandwidth == CHIPS["v5p"].link
    apart = wires(topology("v5p:4x4x4", 2), [at(0, 0, 0), at(0, 0, 0, slice_index=1)])
    assert apart.network == "dcn" and apart.bandwidth == CHIPS["v5p"].dcn / 4


def test_bounds_are_the_longest_part_and_the_sum_of_all():
    found = Roofline(compute=3.0, memory=1.0, interconnect=0.5)
    assert (found.least, found.sum, found.limit) == (3.0, 4.5, "compute")
    where = topology("v5p-128")
    one = speed(
        2.0,
        where=where,
        model_flops=64 * 459e12,
        tokens=8192,
        steps=1800,
        chip_hour=2.0,
    )
    assert (one.mfu, one.tokens_per_second, one.run_hours, one.cost) == (0.5, 4096, 1.0, 128.0)


def test_prices_come_from_a_dated_file_of_the_users(tmp_path):
    file = tmp_path / "prices.yaml"
    file.write_text("date: 2026-11-01\ncurrency: USD\nper_chip_hour: {v5p: 4.2}\n")
    prices = read_prices(file)
    assert (prices.date, prices.currency, prices.of("v5p")) == ("2026-11-01", "USD", 4.2)
    with pytest.raises(ConfigError, match="per_chip_hour.v6e is missing"):
        prices.of("v6e")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("currency: USD\nper_chip_hour: {v5p: 4}\n", "date is missing; prices age"),
        ("date: 2026\ncurrency: USD\nper_chip_hour: {v5p: cheap}\n", "v5p: 'cheap' is no price"),
        ("date: 2026\ncurrency: USD\nper_chip_hour: {h100: 4}\n", "h100: 4 is no price of v5e"),
        ("[1", "cannot be read as YAML"),
        ("- 1", "holds no keys"),
    ],
)
def test_a_price_file_that_cannot_be_names_the_key(tmp_path, text, message):
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prices(file)


def test_a_bank_of_the_paper_has_the_papers_bytes():
    """450,560 bytes a reference raw and 39,424 quantized; about 45.9 and 4.02 TiB in all."""
    found = estimate_bank(
        PAPER, MemoryConfig(), references=112_000_000, dimension=1024, tokens_per_second=1131.0
    )
    assert (found.reference_bytes, found.quantized_reference_bytes) == (450_560, 39_424)
    assert found.bytes / 2**40 == pytest.approx(45.9, abs=0.05)
    assert found.quantized_bytes / 2**40 == pytest.approx(4.02, abs=0.005)
    assert found.index == "ivf-pq" and found.write_seconds is None
    # Five references every 64 tokens.
    assert found.read_bytes_per_second == pytest.approx(1131 / 64 * 5 * 450_560)


def test_a_small_bank_is_searched_exactly_and_its_writing_takes_its_flops():
    where = topology("v5p-128")
    options = {"dimension": 512, "tokens_per_second": 64.0, "mfu": 0.5}
    found = estimate_bank(PAPER, MemoryConfig(), references=1000, where=where, **options)
    assert (found.index, found.index_bytes, found.shards) == ("exact", 1000 * 512 * 4, 1)
    assert found.write_seconds == pytest.approx(found.write_flops / (64 * 459e12 * 0.5))
    other = ModelConfig(**PRESETS["memory3-0.9b"])
    assert estimate_bank(other, MemoryConfig(), references=9, **options).codec is None
    with pytest.raises(ConfigError, match="memory_layers is 0"):
        plain = ModelConfig(**PRESETS["llama-60m"])
        estimate_bank(plain, MemoryConfig(), references=9, **options)


def test_the_compilers_refusal_says_what_is_too_large():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.\n\n"
        "Largest program allocations in hbm:\n\n"
        "  1. Size: 2.00G\n"
        '     Operator: op_name="jit(step)/dot" source_file="/x/jaxlab/models/decoder.py" '
        "source_line=42\n     Shape: bf16[1024,1024]{1,0}\n"
    )
    found = refused_memory(message, {}, available=15.75 * 2**30)
    assert not found.fits and found.total == int(20.5 * 2**30)
    (largest,) = found.largest
    assert (largest.bytes, largest.source) == (2 * 2**30, "jaxlab/models/decoder.py:42")
