"""Running the kernels for TPU on a CPU: as plain JAX, and on a simulator that finds mistakes."""

import contextlib
from unittest import mock

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import blocks, dispatch


@contextlib.contextmanager
def tpu():
    """Trace and run within: memory begins as NaN, wrong reads raise, races fail at the end."""
    pltpu.reset_tpu_interpret_mode_state()
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
    with pltpu.force_tpu_interpret_mode(params), dispatch.lowering_for("tpu", "v5e"):
        yield
    assert interpret_pallas_call.races is not None, "no kernel ran"
    assert not interpret_pallas_call.races.races_found


@contextlib.contextmanager
def interpreted():
    """The kernel as plain JAX."""
    call = pl.pallas_call

    def interpret(*args, **kwargs):
        return call(*args, **{**kwargs, "interpret": True})

    with dispatch.lowering_for("tpu", "v5e"), mock.patch.object(pl, "pallas_call", interpret):
        yield


@contextlib.contextmanager
def small_blocks():
    """Attention blocks so small that a short row has every kind of them."""
    tiny = blocks.AttentionBlocks(query=256, key=128, backward_query=128, triangle=128)
    with mock.patch.dict(blocks._ATTENTION, {"v5e": tiny}):
        yield
