"""Living with libtpu, the TPU's runtime and compiler, on a machine that has no TPU.

Imports no jax: what is set here has to be set before jax is first imported.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

# Quiet libtpu's search for a host, and let several processes compile at once.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def choose_cpu(
    environment: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> None:
    """Name the CPU as jax's platform where it is the only one, so that libtpu is not asked.

    Otherwise jax, finding libtpu installed, looks for a TPU and libtpu complains on stderr. Nothing
    is set where the user has chosen, where there are a TPU's device files (or any that might be),
    or where a plugin for another accelerator is installed.
    """
    chosen = "JAX_PLATFORMS" in environment
    tpu = any(devices.glob("accel*")) or any(devices.glob("vfio/*"))
    if not (chosen or tpu or _other_plugins()) and importlib.util.find_spec("libtpu"):
        environment["JAX_PLATFORMS"] = "cpu"


def _other_plugins() -> bool:
    found = importlib.metadata.entry_points(group="jax_plugins")
    return bool(found) or importlib.util.find_spec("jax_plugins") is not None
