"""The doctor's report."""

import os
import subprocess
import sys

from jaxlab.tools import doctor as module
from jaxlab.tools.doctor import doctor
from kernels_pallas.without_tpu import ENVIRONMENT


def test_the_report_names_versions_devices_and_the_machine():
    lines = doctor()
    for start in ("jaxlab ", "python 3.", "cores ", "jax 0.", "faiss-cpu ", "devices: "):
        assert any(line.startswith(start) for line in lines), start
    assert any("x cpu" in line for line in lines)
    assert not any("\n" in line for line in lines)


def test_a_missing_package_comes_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(module, "_version", lambda package: None)
    lines = doctor()
    assert "missing flax: pip install flax" in lines
    [line] = [line for line in lines if line.startswith("missing sentence-transformers")]
    assert line.endswith("pip install -e '.[eval]'")


def test_devices_that_cannot_be_used_are_reported(monkeypatch):
    import jax

    def broken():
        raise RuntimeError("no driver\nand a long story")

    monkeypatch.setattr(jax, "devices", broken)
    assert "devices: none can be used: no driver" in doctor()


def test_the_tpu_s_library_is_silent_on_a_machine_without_one():
    # As a user calls the command: nothing is set, and libtpu came with the dev extra.
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    ended = subprocess.run(
        [sys.executable, "-m", "jaxlab.cli", "doctor"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0 and "devices: " in ended.stdout
    assert "TPU" not in ended.stderr
