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
from jaxlab.training_config import (
    BlockwiseConfig,
    IREConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    TrainingConfig,
    fraction,
    ire_starts,
    not_negative,
    positive,
    require,
    with_learning_rate,
)
from jaxlab.workloads import WORKLOADS, config_class

__all__ = [
    "BlockwiseConfig",
    "DataConfig",
    "ExperimentConfig",
    "IREConfig",
    "MemoryConfig",
    "MeshConfig",
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
        positive(self, "layers", "heads", "kv_heads", "head_dim", "width", "ffn_width")
        positive(self, "rope_theta", "norm_eps", "max_context")
        not_negative(self, "vocab_size", "memory_layers")
        shared = f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
        require(self.heads % self.kv_heads == 0, "kv_heads", shared)
        odd = f"must be even, because rotary embedding turns pairs; got {self.head_dim}"
        require(self.head_dim % 2 == 0, "head_dim", odd)
        many = f"{self.memory_layers} memory layers in a model of {self.layers} layers"
        require(self.memory_layers <= self.layers, "memory_layers", many)

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
        positive(self, "reference_length", "tokens_kept", "chunk_length", "references_per_chunk")
        require(
            self.tokens_kept <= self.reference_length,
            "tokens_kept",
            f"{self.tokens_kept} tokens kept of a reference of {self.reference_length}",
        )
        require(
            self.candidates >= self.references_per_chunk,
            "candidates",
            f"{self.candidates} candidates cannot fill {self.references_per_chunk} references",
        )
        fraction(self, "overlap_limit")
        problem = embedder_problem(self.embedder)
        require(problem is None, "embedder", problem or "")


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
        positive(self, "vocab_size")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it is cut."""

    source: str
    references: str | None = None  # the knowledge base; None: the training documents
    sequence_length: int
    validation_fraction: float = 0.05
    limit_bytes: int | None = None
    seed: int | None = None  # of the split and the tokenizer; None: the experiment's
    facts_fraction: float = 0.0  # share of the continual stage's samples that are generated facts

    def __post_init__(self):
        positive(self, "sequence_length", "limit_bytes")
        fraction(self, "validation_fraction", "facts_fraction")
        require(self.validation_fraction < 1, "validation_fraction", "leaves nothing to train on")


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """The two stages of Memory³ training (§5): plain warmup, then continual training."""

    warmup: StageConfig | None = None
    continual: StageConfig | None = None

    def __post_init__(self):
        require(bool(self.warmup or self.continual), "warmup", "no stage given; give one at least")
        plain = "the warmup stage is plain pretraining; set it to false"
        require(not (self.warmup and self.warmup.memory), "warmup.memory", plain)

    def named(self) -> dict[str, StageConfig]:
        """The stages that are present, in the order in which they run."""
        both = {"warmup": self.warmup, "continual": self.continual}
        return {name: stage for name, stage in both.items() if stage is not None}


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment: everything that decides its numbers.

    ``init_from`` is a run directory whose latest weights start this run, or ``DIR@warmup`` for the
    last checkpoint of that stage.
    """

    workload: Literal["language-model"] = "language-model"
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
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        require(self.name != "", "name", "must not be empty")
        not_negative(self, "seed")
        self._fill_learning_rates()
        named = self.stages.named()
        ire_starts(self.optimizer, {f"stages.{name}": stage for name, stage in named.items()})
        length, chunk = self.data.sequence_length, self.memory.chunk_length
        grid = f"{length} is not a multiple of memory.chunk_length ({chunk})"
        reads = any(stage.memory for stage in self.stages.named().values())
        require(not reads or length % chunk == 0, "data.sequence_length", grid)
        long = f"{length} is longer than model.max_context ({self.model.max_context})"
        require(length <= self.model.max_context, "data.sequence_length", long)
        stage = self.stages.continual
        reads = "reading memory needs model.memory_layers > 0"
        require(
            not (stage and stage.memory and not self.model.memory_layers),
            "stages.continual.memory",
            reads,
        )
        searches = bool(stage and stage.memory) and self.data.facts_fraction < 1
        require(
            not (searches and self.memory.embedder == "model"),
            "memory.embedder",
            "model embeds with trained weights, and training on text searches before there are any",
        )
        facts = "facts are mixed into the continual stage; this run has none"
        require(not self.data.facts_fraction or stage is not None, "data.facts_fraction", facts)
        if self.tokenizer.path is None and self.model.vocab_size:
            small = f"{self.model.vocab_size} is less than tokenizer.vocab_size"
            fits = self.model.vocab_size >= self.tokenizer.vocab_size
            require(fits, "model.vocab_size", f"{small} ({self.tokenizer.vocab_size})")

    def _fill_learning_rates(self) -> None:
        """Give ``optimizer.learning_rate`` to the stages; their own may not differ from it."""
        filled = {
            name: with_learning_rate(stage, f"stages.{name}", self.optimizer)
            for name, stage in self.stages.named().items()
        }
        object.__setattr__(self, "stages", dataclasses.replace(self.stages, **filled))

    @property
    def data_seed(self) -> int:
        """Seed of the split into training and held-out documents, and of the tokenizer."""
        return self.seed if self.data.seed is None else self.data.seed


def load_config(
    path: str | os.PathLike, overrides: Sequence[str] = (), *, swept: Sequence[str] = ()
) -> Any:
    """Read a YAML file, lay ``a.b=value`` overrides on top and check the result.

    ``swept`` are the overrides of a sweep, which go over the others. Returns the configuration
    class of the file's ``workload``: ExperimentConfig for a language model. Raises ConfigError
    naming the file (or the override), the dotted key and what is known instead.
    """
    path = Path(path)
    raw = strict_yaml.read_mapping(path)
    source = strict_yaml.Source(str(path))
    strict_yaml.apply_overrides(raw, overrides, source)
    strict_yaml.apply_overrides(raw, swept, source, flag="--over")
    workload = raw.get("workload", "language-model")
    if not isinstance(workload, str) or workload not in WORKLOADS:
        raise source.error("workload", f"{workload!r} is none of {', '.join(WORKLOADS)}")
    if workload == "language-model" and isinstance(raw.get("model"), dict):
        raw["model"] = _with_preset(raw["model"], source)
    return strict_yaml.build(config_class(workload), raw, source)


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


def identity(config: Any) -> dict[str, Any]:
    """What decides a run's numbers: all but its name, mesh and how often it reports and saves."""
    values = to_dict(config)
    return {key: values[key] for key in values if key not in ("name", "training", "mesh")}


def identity_hash(config: Any) -> str:
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
