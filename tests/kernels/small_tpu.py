"""Running the kernels for TPU on a CPU: the simulator of the chip, with everything it can find."""

import contextlib
from unittest import mock

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import blocks, dispatch


@contextlib.contextmanager
def simulated():
    """TPU memories, copies and semaphores: fresh memory is NaN, races and wrong reads raise."""
    strict = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
    with dispatch.lowering_for("tpu", "v5e"), pltpu.force_tpu_interpret_mode(strict):
        yield


@contextlib.contextmanager
def interpreted():
    """The kernel as plain JAX: quicker, for many shapes."""
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
