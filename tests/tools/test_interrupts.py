"""Ctrl-C ends a command with one line, whatever it was doing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlab.tools.interrupts import interruptible

# A module that swallows what is raised while it loads, as a callback of the collector does.
MODULE = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    raise ImportError("the module failed to import")
"""
PROGRAM = """
from jaxlab.tools.interrupts import interruptible
with interruptible():
    import swallows
"""


def test_while_a_module_loads_the_process_ends_at_once(tmp_path):
    (tmp_path / "swallows.py").write_text(MODULE)
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "error: interrupted\n")


def test_else_it_raises_and_the_former_handler_comes_back():
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is former
