"""From configuration to one optax chain."""

import dataclasses
from collections.abc import Callable

import jax
import optax
import optax.contrib

from jaxlab.config import IREConfig, OptimizerConfig, StageConfig
from jaxlab.optim.blocks import ADAMW_RMS, MATRICES, matrix_axes, step_name
from jaxlab.optim.followups import grad_power, scale_by_block
from jaxlab.optim.ire import scale_flat_directions
from jaxlab.optim.lite import lite_muon
from jaxlab.optim.sam import sam
from jaxlab.optim.schedules import make_schedule
from jaxlab.typing import PyTree

# Vectors that set a level rather than mix features. They are told by name: layers are stacked, so
# that a norm's scale has two axes like a matrix.
UNDECAYED = frozenset({"scale", "bias"})


def decay_mask(params: PyTree) -> PyTree:
    """True for the parameters that weight decay shrinks: all but norm scales and biases."""

    def decays(path: tuple, _) -> bool:
        return not any(step_name(key) in UNDECAYED for key in path)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    optimizer: OptimizerConfig, stage: StageConfig, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then the base optimizer with the stage's schedule, then IRE.

    Weight decay is decoupled in ``adamw`` and ``muon`` and added to the gradient in ``sgd``; norms
    and biases are left out (``decay_mask``). ``update`` takes ``grad_fn`` where there is a SAM
    radius and ``curvature_fn`` where there is IRE; ``seed`` is of the keys that the latter gets.
    """
    schedule = make_schedule(stage)
    links = []
    if optimizer.clip_norm is not None:
        links.append(optax.clip_by_global_norm(optimizer.clip_norm))
    if optimizer.gradient_power is not None:
        links.append(grad_power(optimizer.gradient_power))
    links.append(_BASES[optimizer.name](optimizer, schedule))
    if optimizer.blockwise is not None:
        links.append(scale_by_block(dataclasses.asdict(optimizer.blockwise) | {"norm": 1.0}))
    if optimizer.sam_radius is not None:
        links = [sam(optax.chain(*links), optimizer.sam_radius)]
    if optimizer.ire is not None:
        links.append(_flat_directions(optimizer.ire, stage, schedule, seed))
    return optax.chain(*links)


def _flat_directions(
    config: IREConfig, stage: StageConfig, schedule: optax.Schedule, seed: int
) -> optax.GradientTransformationExtraArgs:
    kappa = config.kappa
    if config.kappa_follows == "learning-rate":

        def kappa(step):
            return config.kappa * schedule(step) / stage.learning_rate

    warm = stage.schedule.warmup_steps
    return scale_flat_directions(
        kappa,
        config.gamma,
        update_interval=config.update_interval,
        start_step=warm if config.start_step is None else config.start_step,
        curvature_decay=config.curvature_decay,
        scope=config.scope,
        rank_zeros=config.rank_zeros,
        seed=seed,
    )


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


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    matrices = optax.contrib.muon(
        schedule,
        beta=config.momentum,
        eps=config.eps,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=matrix_axes,
        consistent_rms=ADAMW_RMS,
    )

    def labels(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "muon" if step_name(path[-1]) in MATRICES else "adamw", params
        )

    return optax.partition({"muon": matrices, "adamw": _adamw(config, schedule)}, labels)


def _lite_muon(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    return lite_muon(
        schedule,
        _adamw(config, schedule),
        beta=config.momentum,
        weight_decay=config.weight_decay,
    )


_BASES: dict[str, Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "muon": _muon,
    "lite-muon": _lite_muon,
}
