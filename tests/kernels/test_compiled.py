"""Every kernel goes through the real TPU compiler, which comes with libtpu and needs no TPU."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas import dispatch, tpu_compiler
from kernels_pallas.cases import OPS, cases_of
from kernels_pallas.memory_attention import ChunkGrid, memory_attention
from kernels_pallas.memory_decode import memory_decode

CHIPS = sorted(tpu_compiler.TOPOLOGIES)
# Of attention, whose compilation takes seconds, the other cases go to one chip each.
ON_ALL_CHIPS = ("paper", "paper backward", "heads of 128", "heads of 128 backward")
COLLECTIVES = re.compile(
    r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
)


def every_kernel():
    turn = itertools.cycle(CHIPS)
    for op in OPS:
        for name in cases_of(op):
            everywhere = op != "memory_attention" or name in ON_ALL_CHIPS
            for chip in CHIPS if everywhere else [next(turn)]:
                yield pytest.param(chip, op, name, id=f"{chip}-{op}-{name}")


def compiled(chip, function, *shapes, devices=1):
    with dispatch.lowering_for("tpu", chip):
        return tpu_compiler.compile_for(chip, function, *shapes, devices=devices)


@pytest.mark.parametrize(("chip", "op", "name"), list(every_kernel()))
def test_kernel_compiles(chip, op, name):
    with dispatch.lowering_for("tpu", chip):
        function, shapes = cases_of(op)[name].build()
    assert cases_of(op)[name].kernel in compiled(chip, function, *shapes).as_text()


def sharded(chip, function, arrays, specs, out_specs):
    """``function`` over eight chips, each with its heads; the text of what was compiled."""
    mesh = tpu_compiler.mesh_of(chip, 8)

    def placed(array, spec):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

    # Kernels say nothing of what varies over which axis.
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=False
    )
    return compiled(chip, mapped, jax.tree.map(placed, arrays, specs), devices=8).as_text()


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def over(axis, rank):
    return PartitionSpec(*("tensor" if place == axis else None for place in range(rank)))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_attention_over_eight_shards_of_heads_needs_no_collective(chip, backward):
    context = array(1, 2048, 8, 80)
    arrays = {
        "query": array(1, 2048, 40, 80),
        "key": context,
        "value": context,
        "preface": (array(3, 8, 80),) * 2,
        "slots": (array(1, 32, 8, 8, 80),) * 2,
    }
    fixed = {"start": array(1, dtype=jnp.int32), "slot_valid": array(1, 32, 8, dtype=jnp.bool_)}
    heads = jax.tree.map(lambda x: over(len(x.shape) - 2, len(x.shape)), arrays)
    everywhere = jax.tree.map(lambda _: PartitionSpec(), fixed)

    def forward(arrays, fixed):
        return memory_attention(**arrays, **fixed, grid=ChunkGrid(64, 5), implementation="tpu")

    def run(given):
        if not backward:
            return forward(*given)
        return jax.grad(lambda arrays: forward(arrays, given[1]).astype(jnp.float32).sum())(
            given[0]
        )

    outs = heads if backward else heads["query"]
    text = sharded(chip, run, (arrays, fixed), (heads, everywhere), outs)
    assert f"memory_attention_{'backward' if backward else 'forward'}" in text
    assert not COLLECTIVES.findall(text)


@pytest.mark.parametrize("chip", CHIPS)
def test_decoding_over_eight_shards_of_heads_needs_no_collective(chip):
    # A row of a shard holds eight tokens of its one kv head.
    cache = array(32, 512 // 8, 8 * 8 * 80)
    last = over(2, 3)
    arrays = {
        "query": array(32, 40, 80),
        "key": cache,
        "value": cache,
        "preface": (array(3, 8 * 80),) * 2,
        "slots": (array(32, 40, 8 * 80),) * 2,
        "slot_valid": array(32, 40, 8, dtype=jnp.bool_),
        "lengths": array(32, dtype=jnp.int32),
    }
    specs = {
        "query": over(1, 3),
        "key": last,
        "value": last,
        "preface": (over(1, 2),) * 2,
        "slots": (last,) * 2,
        "slot_valid": last,
        "lengths": PartitionSpec(),
    }

    def run(given):
        return memory_decode(**given, tokens_per_row=8, implementation="tpu")

    text = sharded(chip, run, arrays, specs, specs["query"])
    assert "memory_decode" in text
    assert not COLLECTIVES.findall(text)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    def missing(**_):
        raise ModuleNotFoundError("No module named 'libtpu'")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(RuntimeError, match=r"pip install 'jax\[tpu\]'"):
        tpu_compiler.mesh_of("v5e")


def test_an_unknown_chip_is_named():
    with pytest.raises(ValueError, match="unknown chip 'v9': there are"):
        tpu_compiler.mesh_of("v9")
