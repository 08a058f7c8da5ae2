"""Laws of what benchmarks tell about themselves."""

import sys

import pytest

from jaxlab.tools.output import percentiles, script_command


def test_a_script_is_told_without_the_folders_of_this_machine(monkeypatch):
    given = ["--out", "/tmp/a/x.json", "--source", "folder:/data/b/CIFAR10", "../c/d.xz"]
    kept = ["runs/demo", "gs://bucket/bank", "--set", "a.b=1,2", "two words"]
    monkeypatch.setattr(sys, "argv", ["/home/me/jaxlab/benchmarks/decode.py", *given, *kept])
    assert script_command() == (
        "python benchmarks/decode.py --out x.json --source folder:CIFAR10 d.xz"
        " runs/demo gs://bucket/bank --set a.b=1,2 'two words'"
    )


def test_percentiles_lie_between_the_values_around_them():
    found = percentiles([float(n) for n in range(1, 102)])
    assert found == pytest.approx({"p50": 51.0, "p99": 100.0})
