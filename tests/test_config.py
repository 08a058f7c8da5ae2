"""Configuration: strict, resolved before any array is made, the same on every machine."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxlab.config import (
    ModelConfig,
    config_hash,
    differences,
    identity_hash,
    load_config,
    save_yaml,
    to_dict,
)
from jaxlab.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
EXPERIMENTS = sorted((REPOSITORY / "configs").glob("*.yaml"))

TINY = """
name: tiny
model: {layers: 2, heads: 4, kv_heads: 2, head_dim: 8, ffn_width: 32, memory_layers: 1}
data: {source: installed, sequence_length: 128}
stages:
  warmup: {steps: 10, batch_size: 4, learning_rate: 1e-3}
  continual: {steps: 10, batch_size: 4, learning_rate: 1e-4, memory: true}
"""


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_resolves_to_its_golden_file(path, update_golden):
    resolved = to_dict(load_config(path))
    golden = GOLDEN / path.name
    if update_golden:
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(yaml.safe_dump(resolved, sort_keys=False))
    again = "if that is meant: pytest tests/test_config.py --update-golden, and commit tests/golden"
    assert golden.exists(), f"{golden} is missing; {again}"
    changed = differences(yaml.safe_load(golden.read_text()), resolved)
    assert not changed, f"{path.name} resolves differently in {', '.join(changed)}; {again}"


def test_every_golden_file_has_its_experiment():
    assert {path.name for path in GOLDEN.glob("*.yaml")} <= {path.name for path in EXPERIMENTS}


def test_a_file_gives_typed_values_and_the_rest_are_defaults(tiny):
    config = load_config(tiny)
    assert config.stages.warmup.learning_rate == 1e-3  # which YAML 1.1 would call a string
    assert config.memory.tokens_kept == 8 and config.model.model_width == 32
    assert list(config.stages.named()) == ["warmup", "continual"]


def test_an_override_is_yaml_and_the_later_one_wins(tiny):
    overrides = ["seed=3", "stages.continual=null", "seed=4", "optimizer.clip_norm=null"]
    config = load_config(tiny, [*overrides, "optimizer.eps=1e-6", "data.references=docs"])
    assert (config.seed, config.stages.continual) == (4, None)
    assert (config.optimizer.clip_norm, config.optimizer.eps) == (None, 1e-6)
    assert config.data.references == "docs"


def test_an_override_can_make_a_section_that_the_file_has_not(tiny):
    assert load_config(tiny, ["training.keep=5"]).training.keep == 5


def test_an_unknown_key_names_file_key_and_the_closest_known_key(tiny):
    tiny.write_text(TINY.replace("kv_heads", "kv_hedas"))
    message = message_of(tiny)
    assert message == f"{tiny}: model.kv_hedas: unknown key; did you mean model.kv_heads?"


def test_a_key_of_another_section_is_pointed_to(tiny):
    message = message_of(tiny, "model.tokens_kept=3")
    assert message.startswith("--set model.tokens_kept=3: model.tokens_kept: unknown key")
    assert "did you mean memory.tokens_kept?" in message


def test_a_section_that_an_override_brings_is_the_overrides_and_not_the_files(tiny):
    message = message_of(tiny, "optimiser.ire.kappa=1")
    assert message.startswith("--set optimiser.ire.kappa=1: optimiser: unknown key; did you mean")
    message = message_of(REPOSITORY / "configs/flat_toys.yaml", "optimizer.ire.kappa=1")
    assert message == (
        "--set optimizer.ire.kappa=1: optimizer: unknown key; this workload has workload, name"
    )
    message = message_of(REPOSITORY / "configs/vision_small.yaml", "stages.warmup.steps=3")
    assert message == "--set stages.warmup.steps=3: stages: unknown key; did you mean stage?"
    message = message_of(tiny, "stages.continual.schedule.xyz=1")
    assert message.endswith(
        "unknown key; stages.continual.schedule has name, warmup_steps, decay_fraction, "
        "final_fraction"
    )


def test_a_swept_value_goes_over_the_others_and_is_named_as_given(tiny):
    assert load_config(tiny, ["seed=1"], swept=["seed=2"]).seed == 2
    with pytest.raises(ConfigError, match=r"^--over seed=x: seed: expected an integer, got 'x'"):
        load_config(tiny, ["seed=1"], swept=["seed=x"])
    with pytest.raises(ConfigError, match=r"^--over a=\[.*: not readable as YAML"):
        load_config(tiny, swept=["a=["])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed=1.0", "seed: expected an integer, got 1.0"),
        ("seed=true", "seed: expected an integer, got True"),
        ("name=60", "name: expected a string, got 60"),
        ("optimizer.b1=fast", "optimizer.b1: expected a number, got 'fast'"),
        ("optimizer.b1=.nan", "optimizer.b1: must be finite, got nan"),
        ("memory.stop_gradient=1", "memory.stop_gradient: expected true or false, got 1"),
        ("memory.retrieval_lag=false", "memory.retrieval_lag: must be one of 0, 1; got False"),
        ("memory.pooling=median", "memory.pooling: must be one of sum, mean, max, first"),
        ("data=docs", "data: expected a mapping of keys to values, got 'docs'"),
        ("data.source=null", "data.source: expected a string, got nothing (null)"),
        ("model.layers=[2]", "model.layers: expected an integer, got a list"),
    ],
)
def test_a_value_of_another_type_is_refused(tiny, override, problem):
    assert message_of(tiny, override).startswith(f"--set {override}: {problem}")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["model.heads=3"], "model.kv_heads: heads (3) must be a multiple of kv_heads (2)"),
        (["model.head_dim=7"], "model.head_dim: must be even"),
        (["model.memory_layers=3"], "model.memory_layers: 3 memory layers in a model of 2"),
        (["model.layers=0"], "model.layers: must be positive, got 0"),
        (["model.vocab_size=100"], "model.vocab_size: 100 is less than tokenizer.vocab_size"),
        (["memory.tokens_kept=200"], "memory.tokens_kept: 200 tokens kept of a reference of 128"),
        (["memory.embedder=lsaa"], "memory.embedder: 'lsaa' is unknown; choose lsa, model or"),
        (
            ["memory.embedder=sentence-transformers"],
            "memory.embedder: 'sentence-transformers' is",
        ),
        (
            ["memory.embedder=model", "stages.continual.memory=true"],
            "memory.embedder: model embeds with trained weights",
        ),
        (["memory.candidates=4"], "memory.candidates: 4 candidates cannot fill 5 references"),
        (["memory.chunk_length=96"], "data.sequence_length: 128 is not a multiple of memory.chunk"),
        (["data.sequence_length=4096"], "data.sequence_length: 4096 is longer than model.max_cont"),
        (["data.validation_fraction=1"], "data.validation_fraction: leaves nothing to train on"),
        (["data.validation_fraction=2"], "data.validation_fraction: must lie between 0 and 1"),
        (["optimizer.b2=1"], "optimizer.b2: must lie in [0, 1)"),
        (["stages.warmup.accumulation=3"], "stages.warmup.accumulation: batch_size 4 does not"),
        (["stages.warmup.memory=true"], "stages.warmup.memory: the warmup stage is plain"),
        (["stages.warmup.schedule={warmup_steps: 10}"], "stages.warmup.schedule.warmup_steps: "),
        (
            ["stages.warmup.schedule={name: constant, warmup_steps: 1}"],
            "stages.warmup.schedule.warmup_steps: a constant schedule has no warmup",
        ),
        (["model.memory_layers=0"], "stages.continual.memory: reading memory needs"),
        (["stages={}"], "stages.warmup: no stage given"),
        (["stages.continual=null", "data.facts_fraction=0.5"], "data.facts_fraction: facts are"),
        (["training.evaluate_rows=0"], "training.evaluate_rows: must be positive"),
        (["seed=-1"], "seed: must not be negative"),
    ],
)
def test_an_impossible_combination_is_refused(tiny, overrides, problem):
    assert problem in message_of(tiny, *overrides)


def test_a_class_made_by_hand_is_as_strict_as_a_file(tiny):
    config = load_config(tiny)
    with pytest.raises(ConfigError, match="head_dim: must be even"):
        dataclasses.replace(config.model, head_dim=9)


def test_a_missing_key_is_named(tiny):
    tiny.write_text(TINY.replace("layers: 2, ", ""))
    assert "model.layers: missing" in message_of(tiny)


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1", "model.=2"])
def test_a_malformed_override_is_refused(tiny, override):
    assert f"--set {override}: expected KEY=VALUE" in message_of(tiny, override)


def test_a_key_given_twice_is_refused_with_its_line(tiny):
    tiny.write_text(TINY + "name: again\n")
    assert message_of(tiny).startswith(f"{tiny}:8: not readable as YAML: the key 'name' is given")


def test_a_file_that_is_not_there_or_not_yaml_is_refused(tmp_path, tiny):
    assert "no such configuration file" in message_of(tmp_path / "none.yaml")
    assert "cannot be read" in message_of(tmp_path)
    for text, problem in [
        (b"a: [1", "not readable as YAML"),
        (b"", "expected a mapping"),
        (b"- 1", "got a list"),
        (b"\xff\xfe\xfa", "UTF-8"),
        (b"1: 2", "quote it"),
    ]:
        tiny.write_bytes(text)
        assert problem in message_of(tiny)


def test_a_preset_fills_what_the_file_leaves_out(tiny, monkeypatch):
    from jaxlab.models import presets

    shape = {"layers": 6, "heads": 2, "kv_heads": 1, "head_dim": 4, "ffn_width": 16}
    monkeypatch.setattr(presets, "PRESETS", {"small": {**shape, "memory_layers": 3}})
    tiny.write_text(TINY.replace("layers: 2, heads: 4, kv_heads: 2,", "preset: small, layers: 3,"))
    model = load_config(tiny).model
    assert model == ModelConfig(
        **{**shape, "layers": 3, "head_dim": 8, "ffn_width": 32}, preset="small", memory_layers=1
    )
    assert "no preset is called 'large'; known: small" in message_of(tiny, "model.preset=large")


def test_the_saved_configuration_loads_as_an_equal_one(tiny, tmp_path):
    config = load_config(tiny, ["data.limit_bytes=1000", "init_from=runs/a@warmup"])
    save_yaml(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_hash_is_of_the_values_and_not_of_how_they_were_written(tiny):
    config = load_config(tiny)
    assert config_hash(config) == config_hash(
        load_config(tiny, ["stages.warmup.learning_rate=.001"])
    )
    assert config_hash(config) != config_hash(load_config(tiny, ["seed=1"]))
    assert config_hash(config.model) == config_hash(load_config(tiny, ["seed=1"]).model)


def test_the_identity_leaves_out_what_does_not_change_the_numbers(tiny):
    identity = identity_hash(load_config(tiny))
    assert identity == identity_hash(load_config(tiny, ["name=other", "training.log_every=1"]))
    assert identity != identity_hash(load_config(tiny, ["optimizer.b1=0.8"]))


def test_differences_are_dotted_keys(tiny):
    ours, theirs = (to_dict(load_config(tiny, [f"memory.tokens_kept={n}"])) for n in (4, 8))
    assert differences(ours, theirs) == ["memory.tokens_kept"]


def test_reading_a_configuration_does_not_import_jax(tiny):
    code = f"import sys; from jaxlab.config import load_config; load_config({str(tiny)!r}); "
    code += "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_every_preset_is_a_model():
    from jaxlab.models.presets import PRESETS

    for name, values in PRESETS.items():
        assert ModelConfig(**values, preset=name).layers == values["layers"]


def test_the_optimizers_learning_rate_is_that_of_every_stage(tiny):
    text = TINY.replace(", learning_rate: 1e-3", "").replace(", learning_rate: 1e-4", "")
    tiny.write_text(text)
    config = load_config(tiny, ["optimizer.learning_rate=0.5"])
    assert config.stages.warmup.learning_rate == config.stages.continual.learning_rate == 0.5
    save_yaml(config, tiny.with_name("again.yaml"))
    assert load_config(tiny.with_name("again.yaml")) == config


def test_a_learning_rate_is_given_once(tiny):
    message = message_of(tiny, "optimizer.learning_rate=0.5")
    assert "stages.warmup.learning_rate: is 0.001, and optimizer.learning_rate is 0.5" in message
    tiny.write_text(TINY.replace(", learning_rate: 1e-3", ""))
    assert "stages.warmup.learning_rate: missing" in message_of(tiny)


def test_ire_that_would_never_start_is_refused_with_both_keys(tiny):
    late = "optimizer.ire={kappa: 1, start_step: 10}"
    assert message_of(tiny, late) == (
        f"--set {late}: optimizer.ire.start_step: is 10 and stages.warmup.steps 10 and "
        "stages.continual.steps 10: IRE would never start; lower optimizer.ire.start_step or set "
        "optimizer.ire to null"
    )
    assert load_config(tiny, [late, "stages.continual.steps=11"]).optimizer.ire.start_step == 10
    warm = "stages.warmup.schedule={warmup_steps: 10, decay_fraction: 0.0}"
    message = message_of(tiny, "optimizer.ire.kappa=1", "stages.continual=null", warm)
    assert "stages.warmup.schedule.warmup_steps: is 10 and stages.warmup.steps 10: IRE" in message


@pytest.mark.parametrize(
    "override, problem",
    [
        ("optimizer.ire={}", "optimizer.ire.kappa: missing"),
        ("optimizer.ire.kappa=-1", "kappa: must not be negative"),
        ("optimizer.ire={kappa: 1, gamma: 0}", "gamma: must be positive"),
        ("optimizer.ire={kappa: 1, gamma: 1.5}", "gamma: must lie between 0 and 1"),
        ("optimizer.ire={kappa: 1, draws: 2, curvature: random}", "draws: several draws are"),
        ("optimizer.ire={kappa: 1, curvature_decay: 1.0}", "curvature_decay: must lie in [0, 1)"),
        ("optimizer.blockwise={norm: 2.0}", "unknown key"),
        ("optimizer.sam_radius=0", "sam_radius: must be positive"),
        ("workload=[vision]", "workload: ['vision'] is none of language-model, vision"),
    ],
)
def test_settings_of_ire_that_cannot_be_are_refused(tiny, override, problem):
    assert problem in message_of(tiny, override)
