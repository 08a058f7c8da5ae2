"""A TPU simulated on the CPU: fresh memory is NaN, races and reads out of bounds are found."""

import contextlib

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dispatch


@contextlib.contextmanager
def tpu():
    """Trace and run within; fails where kernels raced."""
    pltpu.reset_tpu_interpret_mode_state()
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
    with pltpu.force_tpu_interpret_mode(params), dispatch.lowering_for("tpu"):
        yield
    assert interpret_pallas_call.races is not None, "no kernel ran"
    assert not interpret_pallas_call.races.races_found
