"""The parts of a configuration that every workload shares: optimizer, schedule, stage, training.

Imports neither jax nor numpy, see ``jaxlab.config``.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxlab import strict_yaml


def require(condition: bool, key: str, problem: str) -> None:
    """Refuse the value of ``key``, saying what is wrong with it."""
    if not condition:
        raise strict_yaml.InvalidValue(key, problem)


def positive(config: Any, *keys: str) -> None:
    """Refuse values that are zero or less; None passes."""
    for key in keys:
        value = getattr(config, key)
        require(value is None or value > 0, key, f"must be positive, got {value}")


def not_negative(config: Any, *keys: str) -> None:
    """Refuse values below zero."""
    for key in keys:
        value = getattr(config, key)
        require(value >= 0, key, f"must not be negative, got {value}")


def fraction(config: Any, *keys: str) -> None:
    """Refuse values that are no share of one."""
    for key in keys:
        value = getattr(config, key)
        require(0 <= value <= 1, key, f"must lie between 0 and 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class IREConfig:
    """IRE (arXiv 2405.20763): the base's update times ``1 + kappa`` on the flattest coordinates.

    ``curvature`` ranks them: ``sampled-labels`` is the paper's; ``empirical`` takes the labels of
    the data and ``random`` is the control, a mask of equal density that knows nothing.
    """

    kappa: float  # 0: the base
    gamma: float = 0.8  # share of the coordinates that is flat
    update_interval: int = 10  # steps between two refreshes of the mask (K)
    start_step: int | None = None  # step of a stage with its first refresh; None: end of warmup
    curvature: Literal["sampled-labels", "empirical", "random"] = "sampled-labels"
    batch_share: float = 1.0  # share of the step's rows that a refresh looks at
    draws: int = 1  # sets of labels drawn for a refresh
    curvature_decay: float = 0.0  # weight of the past in a running average (0: the paper's)
    kappa_follows: Literal["nothing", "learning-rate"] = "nothing"  # what scales kappa down
    scope: Literal["global", "tensor"] = "global"  # one threshold for all, or for each tensor
    rank_zeros: bool = True  # whether exact zeros count in the share

    def __post_init__(self):
        not_negative(self, "kappa")
        positive(self, "gamma", "update_interval", "batch_share", "draws")
        fraction(self, "gamma", "batch_share")
        require(self.start_step is None or self.start_step >= 0, "start_step", "is negative")
        decay = f"must lie in [0, 1), got {self.curvature_decay}"
        require(0 <= self.curvature_decay < 1, "curvature_decay", decay)
        several = "several draws are of sampled labels; the other curvatures have none"
        require(self.draws == 1 or self.curvature == "sampled-labels", "draws", several)


@dataclass(frozen=True, kw_only=True)
class BlockwiseConfig:
    """Factors of the learning rate by kind of block (arXiv 2502.19002); norms keep 1."""

    embedding: float = 10.0
    head: float = 1.0  # an output head of its own; a tied one is the embedding
    query_key: float = 8.0
    feed_forward: float = 6.0
    value_output: float = 4.0

    def __post_init__(self):
        positive(self, "embedding", "head", "query_key", "feed_forward", "value_output")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The base optimizer; ``b1``, ``b2`` and ``eps`` belong to AdamW, ``momentum`` to the others.

    ``muon`` orthogonalises the updates of the layers' matrices, scaled to the size of AdamW's, and
    leaves embeddings, output head and norms to AdamW; both follow the stage's learning rate.
    ``lite-muon`` doubles the matrices' steps along their flat directions (arXiv 2602.22681).
    """

    name: Literal["adamw", "sgd", "muon", "lite-muon"] = "adamw"
    learning_rate: float | None = None  # of every stage that names none
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0  # global gradient norm; None: no clipping
    sam_radius: float | None = None  # rho of sharpness-aware minimisation; None: without
    gradient_power: float | None = None  # GradPower (arXiv 2505.24275), about 1.2; None: without
    blockwise: BlockwiseConfig | None = None
    ire: IREConfig | None = None

    def __post_init__(self):
        positive(self, "learning_rate", "eps", "clip_norm", "sam_radius", "gradient_power")
        not_negative(self, "weight_decay")
        for key in ("b1", "b2", "momentum"):
            value = getattr(self, key)
            require(0 <= value < 1, key, f"must lie in [0, 1), got {value}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the steps of one stage, as shares of the stage's peak."""

    name: Literal["warmup-stable-decay", "warmup-cosine", "constant"] = "warmup-stable-decay"
    warmup_steps: int = 0
    decay_fraction: float = 0.1  # share of the stage spent in the final decay
    final_fraction: float = 0.0  # learning rate at the end, as a share of the peak

    def __post_init__(self):
        not_negative(self, "warmup_steps")
        fraction(self, "decay_fraction", "final_fraction")
        warm = self.name == "constant" and self.warmup_steps > 0
        require(not warm, "warmup_steps", "a constant schedule has no warmup")

    def decay_steps(self, steps: int) -> int:
        """Steps of the final decay of warmup-stable-decay in a stage of ``steps`` steps."""
        return round(self.decay_fraction * steps)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training; ``memory`` says whether its samples carry references to read."""

    steps: int
    batch_size: int
    accumulation: int = 1  # micro-batches per step
    learning_rate: float | None = None  # peak; None: optimizer.learning_rate
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    memory: bool = False

    def __post_init__(self):
        positive(self, "steps", "batch_size", "accumulation", "learning_rate")
        parts = (
            f"batch_size {self.batch_size} does not split into {self.accumulation} micro-batches"
        )
        require(self.batch_size % self.accumulation == 0, "accumulation", parts)
        used = self.schedule.warmup_steps
        if self.schedule.name == "warmup-stable-decay":
            used += self.schedule.decay_steps(self.steps)
        late = f"warmup and decay take {used} steps of a stage of {self.steps}"
        require(used <= self.steps, "schedule.warmup_steps", late)


def with_learning_rate(stage: StageConfig, key: str, optimizer: OptimizerConfig) -> StageConfig:
    """The stage with the optimizer's learning rate if it has none; two may not differ."""
    own, rate, key = stage.learning_rate, optimizer.learning_rate, f"{key}.learning_rate"
    require(bool(own or rate), key, "missing; give it here or as optimizer.learning_rate")
    twice = f"is {own}, and optimizer.learning_rate is {rate}; give one of the two"
    require(rate is None or own in (None, rate), key, twice)
    return dataclasses.replace(stage, learning_rate=own or rate)


def ire_starts(optimizer: OptimizerConfig, stages: dict[str, StageConfig]) -> None:
    """Refuse IRE whose first refresh would come after the end of every stage (by their keys)."""
    if optimizer.ire is None:
        return
    given = optimizer.ire.start_step
    starts = {k: s.schedule.warmup_steps if given is None else given for k, s in stages.items()}
    if any(starts[key] < stage.steps for key, stage in stages.items()):
        return
    first = next(iter(stages))
    key = f"{first}.schedule.warmup_steps" if given is None else "optimizer.ire.start_step"
    ends = " and ".join(f"{name}.steps {stage.steps}" for name, stage in stages.items())
    never = f"is {starts[first]} and {ends}: IRE would never start"
    require(False, key, f"{never}; lower {key} or set optimizer.ire to null")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How often the loop reports, evaluates and saves; 0 means only at the end of a stage."""

    log_every: int = 10
    evaluate_every: int = 0
    evaluate_rows: int = 64  # validation sequences per evaluation
    save_every: int = 0
    keep: int = 3  # newest checkpoints kept besides the permanent ones
    peak_flops: float | None = None  # of one device, per second: what MFU is a share of
    # A step that is silent for so long hangs, and the process ends (other work: ten times as long):
    # no step of a sound run is near ten minutes. None: wait forever.
    hang_seconds: float | None = 600.0
    skip_nonfinite: int = 0  # steps in a row whose loss or gradient may be infinite or NaN

    def __post_init__(self):
        positive(self, "log_every", "evaluate_rows", "keep", "peak_flops", "hang_seconds")
        not_negative(self, "evaluate_every", "save_every", "skip_nonfinite")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh's axes; one may be -1 and takes the devices that the others leave.

    ``jaxlab.sharding.mesh`` says what each is for. It changes where a run computes and not what, so
    that a run may go on with another one.
    """

    replica: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        for key, value in vars(self).items():
            require(value == -1 or value > 0, key, f"must be positive or -1, got {value}")
        free = [key for key, value in vars(self).items() if value == -1]
        require(len(free) < 2, free[-1] if free else "fsdp", f"{' and '.join(free)} are both -1")
