"""What is counted of programs that the TPU compiler made; nothing runs."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "collectives"
TINY = """
name: tiny
model:
  layers: 2
  heads: 4
  kv_heads: 4
  head_dim: 32
  ffn_width: 256
  memory_layers: 1
  remat: full
  max_context: 512
tokenizer: {vocab_size: 1024}
data: {source: corpus, sequence_length: 256}
optimizer: {ire: {kappa: 1.0, update_interval: 4}}
stages:
  warmup: {steps: 10, batch_size: 16, learning_rate: 1.0e-3}
  continual: {steps: 20, batch_size: 16, learning_rate: 1.0e-3, memory: true}
"""


def run(*words: str) -> subprocess.CompletedProcess:
    # The commands choose for themselves; what the tests' process was told is not passed on.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_loop_counts_what_its_layers_count_when_they_are_written_out():
    ended = run("tests.preflight.compiled")
    assert ended.returncode == 0, ended.stderr[-2000:]
    loop, unrolled, gradients, unrolled_gradients = json.loads(ended.stdout.splitlines()[-1])
    assert loop["loops"] > 0 == unrolled["loops"]
    assert loop["traced"] == loop["compiled"] == unrolled["compiled"]
    assert loop["sent"] == unrolled["sent"] > 0
    assert gradients["traced"] == gradients["compiled"] == unrolled_gradients["compiled"]
    assert gradients["compiled"] == 3 * loop["compiled"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("preflight") / "tiny.yaml"
    file.write_text(TINY)
    return file


def preflight(config: Path, *words: str) -> tuple[int, str, str]:
    ended = run("jaxlab.cli", "preflight", str(config), *words)
    return ended.returncode, ended.stdout, ended.stderr


def test_a_train_step_is_compiled_for_a_pod_and_read(config, tmp_path, request):
    prices, file = tmp_path / "prices.yaml", tmp_path / "found.json"
    prices.write_text("date: 2026-11-01\ncurrency: USD\nper_chip_hour: {v5e: 1.2}\n")
    options = ("--topology", "v5e-8", "--prices", str(prices), "--json", str(file))
    code, out, err = preflight(config, *options)
    assert code == 0, err
    found = json.loads(file.read_text())
    assert "fits" in out and "USD, prices of 2026-11-01" in out
    assert (found["program"], found["chips"], found["fits"]) == (
        "train step, continual stage",
        8,
        True,
    )
    assert found["mesh"] == {"replica": 1, "data": 1, "fsdp": 8, "tensor": 1}
    kinds = found["memory"]["kinds"]
    assert found["memory"]["bytes"] == sum(kinds.values())
    # Moments and mask beside float32 weights, all cut in eight: 2.25 times their bytes.
    assert kinds["optimizer"] == pytest.approx(2.25 * kinds["parameters"], rel=0.1)
    # A refresh in every fourth step is in the compiled count, a quarter of the times.
    assert found["flops"]["total"] == pytest.approx(8 * found["compiled_flops_of_a_chip"], rel=0.1)
    assert found["flops"]["most"] > found["flops"]["total"] > found["flops"]["model"]
    assert {one["axes"] for one in found["collectives"]} >= {"fsdp"}
    bounds = found["roofline"]
    assert bounds["least"] == max(bounds[k] for k in ("compute", "memory", "interconnect"))
    fast = found["speed"]["overlapped"]
    assert fast["tokens_per_second"] == pytest.approx(16 * 256 / bounds["least"])
    assert fast["cost"] == pytest.approx(20 * bounds["least"] / 3600 * 8 * 1.2)
    assert found["not_counted"] == []
    require_collectives(found, "tiny-ire-fsdp8", request)


def require_collectives(found: dict, name: str, request) -> None:
    """By kind and axes as they are kept; another compiler may choose others."""
    counts = {
        f"{one['kind']} over {one['axes']}": one["count"]
        for one in sorted(found["collectives"], key=str)
    }
    now = {"libtpu": metadata.version("libtpu"), "collectives": counts}
    golden = GOLDEN / f"{name}.json"
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(json.dumps(now, indent=1) + "\n")
    kept = json.loads(golden.read_text())
    if kept["libtpu"] == now["libtpu"]:
        assert counts == kept["collectives"]


def test_heads_are_summed_along_tensor_and_weights_gathered_along_fsdp(config, tmp_path, request):
    file = tmp_path / "found.json"
    changes = ("optimizer.ire=null", "mesh.fsdp=4", "mesh.tensor=2")
    options = ("--topology", "v5e-8", "--json", str(file), "--set", *changes)
    code, _, err = preflight(config, *options)
    assert code == 0, err
    found = json.loads(file.read_text())
    kinds = {(one["kind"], one["axes"]) for one in found["collectives"]}
    assert kinds >= {("all-reduce", "tensor"), ("all-gather", "fsdp")}
    require_collectives(found, "tiny-fsdp4-tensor2", request)


@pytest.mark.parametrize("mode", ["decode", "write"])
def test_decoding_and_writing_are_compiled_as_they_run(config, tmp_path, mode):
    file = tmp_path / "found.json"
    options = ("--topology", "v5e:2x2", "--mode", mode, "--rows", "8", "--json", str(file))
    code, _, err = preflight(config, *options, "--set", "model.remat=none")
    assert code == 0, err
    found = json.loads(file.read_text())
    assert found["program"].startswith(f"{mode} step, 8 ") and found["fits"]
    assert found["memory"]["kinds"]["memory slots"] > 0 or mode == "write"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--topology", "v9-8"), "--topology v9-8: unknown; known are v5e:2x2"),
        (
            ("--topology", "v5e-8", "--set", "mesh.fsdp=3"),
            "mesh: replica 1, data 1, fsdp 3, tensor 1 does not divide 8 devices",
        ),
        (
            ("--topology", "v5e-8", "--set", "mesh.fsdp=1", "mesh.tensor=8"),
            "mesh.tensor: 8 does not divide model.heads (4); of what divides 8 devices these do: 1",
        ),
        (
            ("--topology", "v5e-8", "--stage", "late"),
            "--stage late: the run has no such stage; it has warmup, continual",
        ),
        (
            ("--topology", "v5e-8", "--set", "stages.continual.batch_size=12"),
            "stages.continual.batch_size: a micro-batch of 12 rows does not spread over 8 groups",
        ),
    ],
)
def test_what_cannot_be_compiled_is_one_line_that_names_the_key(config, words, message):
    code, out, err = preflight(config, *words)
    assert code == 1 and out == ""
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_what_does_not_fit_says_so_and_what_would(config, tmp_path):
    """A batch whose logits and activations do not fit one group of chips."""
    file = tmp_path / "found.json"
    large = (
        "model.remat=none",
        "optimizer.ire=null",
        "stages.continual=null",
        "stages.warmup.batch_size=65536",
    )
    options = ("--topology", "v5e:2x2", "--minutes", "0.2", "--json", str(file))
    code, out, err = preflight(config, *options, "--set", *large)
    assert code == 1, err
    found = json.loads(file.read_text())
    assert not found["fits"] and "does not fit" in out
    assert found["cures"] and all(cure["fits"] for cure in found["cures"])
    assert all(len(cure["changes"]) >= 1 for cure in found["cures"])
