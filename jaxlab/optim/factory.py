"""From configuration to one optax chain."""

from collections.abc import Callable

import jax
import optax

from jaxlab.config import OptimizerConfig, StageConfig
from jaxlab.optim.schedules import make_schedule
from jaxlab.typing import PyTree

# Vectors that set a level rather than mix features. They are told by name: layers are stacked, so
# that a norm's scale has two axes like a matrix.
UNDECAYED = frozenset({"scale", "bias"})


def decay_mask(params: PyTree) -> PyTree:
    """True for the parameters that weight decay shrinks: all but norm scales and biases."""

    def decays(path: tuple, _) -> bool:
        return not any(getattr(key, "key", getattr(key, "name", None)) in UNDECAYED for key in path)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(optimizer: OptimizerConfig, stage: StageConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then the base optimizer with the stage's schedule.

    Weight decay is decoupled in ``adamw`` and added to the gradient in ``sgd``; both use
    ``decay_mask``.
    """
    clip = optimizer.clip_norm
    links = [] if clip is None else [optax.clip_by_global_norm(clip)]
    return optax.chain(*links, _BASES[optimizer.name](optimizer, make_schedule(stage)))


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def _sgd(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.sgd(schedule, momentum=config.momentum),
    )


_BASES: dict[str, Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "sgd": _sgd,
}
