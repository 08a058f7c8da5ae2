"""Modules of the tests that need eight devices, run in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Eight devices that wait for each other need as many threads, and one program at a time.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "NPROC": "32",
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
}


def run_module(module: str, *arguments: str) -> Any:
    """The JSON in the last line that ``python -m MODULE ARGUMENTS`` prints with eight devices."""
    ended = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])
