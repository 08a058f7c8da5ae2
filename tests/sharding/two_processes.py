"""Starting two real processes that are one run."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# How long two processes may take before they count as hanging.
SECONDS = 180

# What the code prints alone goes to stdout: Gloo's threads write there too, in pieces of lines.
PRINTS_ALONE = """
import os, sys
sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
"""


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def start_two(code: str, *arguments: str) -> list[subprocess.Popen]:
    """Two processes of one run, with two devices each, that carry out Python code."""
    common = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAXLAB_COORDINATOR": free_address(),
        "JAXLAB_PROCESSES": "2",
        "JAXLAB_START_TIMEOUT": "60",
    }
    common.pop("XLA_FLAGS", None)
    return [
        subprocess.Popen(
            [sys.executable, "-c", PRINTS_ALONE + code, *arguments],
            env=common | {"JAXLAB_PROCESS_ID": str(number)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]


def end_two(children: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; those that wait for each other for ever are killed."""
    with ThreadPoolExecutor(len(children)) as readers:
        try:
            said = list(readers.map(lambda child: child.communicate(timeout=SECONDS), children))
        finally:
            for child in children:
                child.kill()
    return [(child.returncode, *each) for child, each in zip(children, said, strict=True)]


def run_two(code: str, *arguments: str) -> list[str]:
    """What two processes print that end well."""
    ended = end_two(start_two(code, *arguments))
    assert not any(code for code, _, _ in ended), ended
    return [out for _, out, _ in ended]
