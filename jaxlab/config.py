"""Experiment configuration: frozen dataclasses, strict YAML, ``--set`` overrides, hashes.

Everything that can be wrong with a configuration is found here, before any device is touched: this
module imports neither jax nor numpy. Every class checks its own values when it is made, so
``dataclasses.replace`` is as strict as a file.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxlab import strict_yaml

__all__ = [
    "DataConfig",
    "ExperimentConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "StageConfig",
    "StagesConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "config_hash",
    "differences",
    "identity",
    "identity_hash",
    "load_config",
    "save_yaml",
    "to_dict",
]


def _require(condition: bool, key: str, problem: str) -> None:
    if not condition:
        raise strict_yaml.InvalidValue(key, problem)


def _positive(config: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        _require(value is None or value > 0, key, f"must be positive, got {value}")


def _not_negative(config: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        _require(value >= 0, key, f"must not be negative, got {value}")


def _fraction(config: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        _require(0 <= value <= 1, key, f"must lie between 0 and 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the decoder; a named preset supplies the values that the file leaves out."""

    preset: str | None = None
    vocab_size: int = 0  # 0: taken from the tokenizer
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int | None = None  # None: heads * head_dim
    ffn_width: int
    memory_layers: int = 0  # the first this many layers read explicit memory
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    max_context: int = 2048  # longest context at inference, in tokens
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self):
        _positive(self, "layers", "heads", "kv_heads", "head_dim", "width", "ffn_width")
        _positive(self, "rope_theta", "norm_eps", "max_context")
        _not_negative(self, "vocab_size", "memory_layers")
        shared = f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
        _require(self.heads % self.kv_heads == 0, "kv_heads", shared)
        odd = f"must be even, because rotary embedding turns pairs; got {self.head_dim}"
        _require(self.head_dim % 2 == 0, "head_dim", odd)
        many = f"{self.memory_layers} memory layers in a model of {self.layers} layers"
        _require(self.memory_layers <= self.layers, "memory_layers", many)

    @property
    def model_width(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim if self.width is None else self.width


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Explicit memory: what is written of a reference and when it is read (Memory³, §3)."""

    reference_length: int = 128
    tokens_kept: int = 8
    chunk_length: int = 64
    references_per_chunk: int = 5
    selection: Literal["exponential", "softmax"] = "exponential"
    pooling: Literal["sum", "mean", "max", "first"] = "sum"
    stop_gradient: bool = False
    retrieval_lag: Literal[0, 1] = 0
    embedder: str = "lsa"
    candidates: int = 10  # neighbours searched before filtering down to references_per_chunk
    overlap_limit: float = 0.9  # neighbours that overlap the text more than this are dropped

    def __post_init__(self):
        _positive(self, "reference_length", "tokens_kept", "chunk_length", "references_per_chunk")
        _require(
            self.tokens_kept <= self.reference_length,
            "tokens_kept",
            f"{self.tokens_kept} tokens kept of a reference of {self.reference_length}",
        )
        _require(
            self.candidates >= self.references_per_chunk,
            "candidates",
            f"{self.candidates} candidates cannot fill {self.references_per_chunk} references",
        )
        _fraction(self, "overlap_limit")
        problem = embedder_problem(self.embedder)
        _require(problem is None, "embedder", problem or "")


def embedder_problem(spec: str) -> str | None:
    """Why ``spec`` names no embedder, or None."""
    kind, _, name = spec.partition(":")
    if spec in ("lsa", "model") or (kind == "sentence-transformers" and name):
        return None
    return f"{spec!r} is unknown; choose lsa, model or sentence-transformers:NAME"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A sentencepiece model: loaded from ``path``, or trained to ``vocab_size`` pieces."""

    path: str | None = None
    vocab_size: int = 4096

    def __post_init__(self):
        _positive(self, "vocab_size")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it is cut."""

    source: str
    references: str | None = None  # the knowledge base; None: the training documents
    sequence_length: int
    validation_fraction: float = 0.05
    limit_bytes: int | None = None
    facts_fraction: float = 0.0  # share of the continual stage's samples that are generated facts

    def __post_init__(self):
        _positive(self, "sequence_length", "limit_bytes")
        _fraction(self, "validation_fraction", "facts_fraction")
        _require(self.validation_fraction < 1, "validation_fraction", "leaves nothing to train on")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The base optimizer; ``b1``, ``b2`` and ``eps`` belong to AdamW, ``momentum`` to the others.

    ``muon`` orthogonalises the updates of the layers' matrices, scaled to the size of AdamW's, and
    leaves embeddings, output head and norms to AdamW; both follow the stage's learning rate.
    """

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0  # global gradient norm; None: no clipping

    def __post_init__(self):
        _positive(self, "eps", "clip_norm")
        _not_negative(self, "weight_decay")
        for key in ("b1", "b2", "momentum"):
            value = getattr(self, key)
            _require(0 <= value < 1, key, f"must lie in [0, 1), got {value}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the steps of one stage, as shares of the stage's peak."""

    name: Literal["warmup-stable-decay", "warmup-cosine", "constant"] = "warmup-stable-decay"
    warmup_steps: int = 0
    decay_fraction: float = 0.1  # share of the stage spent in the final decay
    final_fraction: float = 0.0  # learning rate at the end, as a share of the peak

    def __post_init__(self):
        _not_negative(self, "warmup_steps")
        _fraction(self, "decay_fraction", "final_fraction")
        warm = self.name == "constant" and self.warmup_steps > 0
        _require(not warm, "warmup_steps", "a constant schedule has no warmup")

    def decay_steps(self, steps: int) -> int:
        """Steps of the final decay of warmup-stable-decay in a stage of ``steps`` steps."""
        return round(self.decay_fraction * steps)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training; ``memory`` says whether its samples carry references to read."""

    steps: int
    batch_size: int
    accumulation: int = 1  # micro-batches per step
    learning_rate: float
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    memory: bool = False

    def __post_init__(self):
        _positive(self, "steps", "batch_size", "accumulation", "learning_rate")
        parts = (
            f"batch_size {self.batch_size} does not split into {self.accumulation} micro-batches"
        )
        _require(self.batch_size % self.accumulation == 0, "accumulation", parts)
        used = self.schedule.warmup_steps
        if self.schedule.name == "warmup-stable-decay":
            used += self.schedule.decay_steps(self.steps)
        late = f"warmup and decay take {used} steps of a stage of {self.steps}"
        _require(used <= self.steps, "schedule.warmup_steps", late)


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """The two stages of Memory³ training (§5): plain warmup, then continual training."""

    warmup: StageConfig | None = None
    continual: StageConfig | None = None

    def __post_init__(self):
        _require(bool(self.warmup or self.continual), "warmup", "no stage given; give one at least")
        plain = "the warmup stage is plain pretraining; set it to false"
        _require(not (self.warmup and self.warmup.memory), "warmup.memory", plain)

    def named(self) -> dict[str, StageConfig]:
        """The stages that are present, in the order in which they run."""
        both = {"warmup": self.warmup, "continual": self.continual}
        return {name: stage for name, stage in both.items() if stage is not None}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How often the loop reports, evaluates and saves; 0 means only at the end of a stage."""

    log_every: int = 10
    evaluate_every: int = 0
    evaluate_rows: int = 64  # validation sequences per evaluation
    save_every: int = 0
    keep: int = 3  # newest checkpoints kept besides the permanent ones
    peak_flops: float | None = None  # of one device, per second: what MFU is a share of

    def __post_init__(self):
        _positive(self, "log_every", "evaluate_rows", "keep", "peak_flops")
        _not_negative(self, "evaluate_every", "save_every")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment: everything that decides its numbers.

    ``init_from`` is a run directory whose latest weights start this run, or ``DIR@warmup`` for the
    last checkpoint of that stage.
    """

    name: str
    seed: int = 0
    init_from: str | None = None
    model: ModelConfig
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stages: StagesConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self):
        _require(self.name != "", "name", "must not be empty")
        _not_negative(self, "seed")
        length, chunk = self.data.sequence_length, self.memory.chunk_length
        grid = f"{length} is not a multiple of memory.chunk_length ({chunk})"
        _require(length % chunk == 0, "data.sequence_length", grid)
        long = f"{length} is longer than model.max_context ({self.model.max_context})"
        _require(length <= self.model.max_context, "data.sequence_length", long)
        stage = self.stages.continual
        reads = "reading memory needs model.memory_layers > 0"
        _require(
            not (stage and stage.memory and not self.model.memory_layers),
            "stages.continual.memory",
            reads,
        )
        searches = bool(stage and stage.memory) and self.data.facts_fraction < 1
        _require(
            not (searches and self.memory.embedder == "model"),
            "memory.embedder",
            "model embeds with trained weights, and training on text searches before there are any",
        )
        facts = "facts are mixed into the continual stage; this run has none"
        _require(not self.data.facts_fraction or stage is not None, "data.facts_fraction", facts)
        if self.tokenizer.path is None and self.model.vocab_size:
            small = f"{self.model.vocab_size} is less than tokenizer.vocab_size"
            fits = self.model.vocab_size >= self.tokenizer.vocab_size
            _require(fits, "model.vocab_size", f"{small} ({self.tokenizer.vocab_size})")


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML file, lay ``a.b=value`` overrides on top and check the result.

    Raises ConfigError naming the file (or the override), the dotted key and what is known instead.
    """
    path = Path(path)
    raw = strict_yaml.read_mapping(path)
    source = strict_yaml.apply_overrides(raw, overrides, str(path))
    if isinstance(raw.get("model"), dict):
        raw["model"] = _with_preset(raw["model"], source)
    return strict_yaml.build(ExperimentConfig, raw, source)


def _with_preset(model: dict[str, Any], source: strict_yaml.Source) -> dict[str, Any]:
    """The preset's values with the file's own keys on top."""
    name = model.get("preset")
    if not isinstance(name, str):  # absent, or an error that build reports
        return model
    # Imported here: a configuration without a preset needs nothing of the models package.
    from jaxlab.models.presets import PRESETS

    if name not in PRESETS:
        known = ", ".join(sorted(PRESETS))
        raise source.error("model.preset", f"no preset is called {name!r}; known: {known}")
    return {**PRESETS[name], **model}


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration (or a part of it) as plain nested dictionaries."""
    return dataclasses.asdict(config)


def save_yaml(config: Any, path: str | os.PathLike) -> None:
    """Write the resolved configuration; ``load_config`` of the file gives an equal one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)


def config_hash(config: Any) -> str:
    """SHA-256 of the canonical JSON of a configuration or of any part of one (``config.model``)."""
    return _digest(to_dict(config))


def identity(config: ExperimentConfig) -> dict[str, Any]:
    """What decides a run's numbers: all but its name and how often it reports and saves."""
    values = to_dict(config)
    return {key: values[key] for key in values if key not in ("name", "training")}


def identity_hash(config: ExperimentConfig) -> str:
    """SHA-256 of the canonical JSON of ``identity(config)``."""
    return _digest(identity(config))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Dotted keys in which two configuration dictionaries differ, sorted."""
    left, right = _flatten(ours), _flatten(theirs)
    absent = object()
    keys = left.keys() | right.keys()
    return sorted(key for key in keys if left.get(key, absent) != right.get(key, absent))


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
