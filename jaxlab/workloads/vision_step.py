"""One step of image classification: a pure function of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, PyTree, UInt8

from jaxlab.config import IREConfig
from jaxlab.data.augment import (
    CIFAR,
    IMAGENET,
    mixup,
    normalise,
    random_crop,
    random_flip,
    smooth_labels,
)
from jaxlab.data.autoaugment import auto_augment
from jaxlab.data.randaugment import rand_augment
from jaxlab.models.vision import VisionModel
from jaxlab.optim.curvature import random_ranks, sampled_label_gradient, sampled_label_root_fisher
from jaxlab.optim.flat_mask import flat_shares
from jaxlab.training.step import skip_unless_finite
from jaxlab.workloads.vision_config import VisionConfig

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
# Share of the past in the running mean of the training loss that starts IRE: some hundred steps.
_LOSS_MEMORY = 0.99
_NORMALISE = {"cifar": CIFAR, "imagenet": IMAGENET}
_SMALL_IMAGE = 64  # up to here windows are drawn on the device; larger ones are cut on the host


class VisionState(struct.PyTreeNode):
    """What a step carries to the next; ``ire_start`` is the step at which IRE started, or -1."""

    params: PyTree
    statistics: PyTree
    opt_state: PyTree
    key: PyTree
    step: PyTree
    mean_loss: PyTree
    ire_start: PyTree


def start_vision_state(
    params: PyTree, statistics: PyTree, optimizer: optax.GradientTransformation, *, seed: int
) -> VisionState:
    """The state before the first step."""
    return VisionState(
        params=params,
        statistics=statistics,
        opt_state=jax.jit(optimizer.init)(params),
        key=jax.random.key(seed, impl="rbg"),  # XLA compiles its draws several times faster
        step=jnp.zeros((), jnp.int32),
        mean_loss=jnp.full((), jnp.inf, jnp.float32),
        ire_start=jnp.full((), -1, jnp.int32),
    )


def model_input(config: VisionConfig, images: UInt8[Array, "B h w 3"]) -> Float[Array, "B h w 3"]:
    """What the model sees of images that are not augmented."""
    return normalise(images, _NORMALISE[config.data.normalise])


def augmented(
    config: VisionConfig, key: Array, images: UInt8[Array, "B h w 3"]
) -> Float[Array, "B h w 3"]:
    """What the model sees of training images, before any are mixed."""
    crop, flip, operations = jax.random.split(key, 3)
    if config.data.augment != "none":
        if config.data.image_size <= _SMALL_IMAGE:
            images = random_crop(crop, images)
        images = random_flip(flip, images)
    if config.data.augment == "randaugment":
        images = rand_augment(operations, images)
    if config.data.augment == "autoaugment":
        images = auto_augment(operations, images)
    return model_input(config, images)


def excess_cross_entropy(
    logits: Float[Array, "B classes"], targets: Float[Array, "B classes"]
) -> Float[Array, ""]:
    """Mean cross-entropy less the entropy of the targets, in nats.

    The gradient is that of the cross-entropy. Smoothed and mixed targets leave 0 as the smallest
    value, which is the loss whose 0.1 or 1.5 starts IRE in the paper.
    """
    divergence = optax.losses.kl_divergence(jax.nn.log_softmax(logits), targets)
    return jnp.mean(divergence)


def cross_entropy(
    logits: Float[Array, "B classes"], labels: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Cross-entropy of each image, in nats."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def image_curvature(config: IREConfig, model: VisionModel) -> Callable[..., PyTree]:
    """What ranks coordinates at a refresh: ``f(params, key, statistics, images, labels)``.

    Plain cross-entropy on the first ``batch_share`` of a batch. Batch norm takes the statistics of
    these images, as in training, and the running ones stay as they are: a curvature must not change
    what evaluation will use.
    """

    def curvature(
        params: PyTree, key: Array, statistics: PyTree, images: Array, labels: Array
    ) -> PyTree:
        def logits(params: PyTree, images: Array) -> Array:
            return model.apply(params, statistics, images, train=True)[0]

        if config.curvature == "random":
            return random_ranks(params, key)
        rows = max(1, round(config.batch_share * len(images)))
        images, labels = images[:rows], labels[:rows]
        if config.curvature == "empirical":
            return jax.grad(lambda p: jnp.mean(cross_entropy(logits(p, images), labels)))(params)
        if config.draws == 1:
            return sampled_label_gradient(logits, params, key, images)
        return sampled_label_root_fisher(logits, params, key, images, draws=config.draws)

    return curvature


def vision_step(
    state: VisionState,
    batch: Batch,
    *,
    config: VisionConfig,
    model: VisionModel,
    optimizer: optax.GradientTransformation,
) -> tuple[VisionState, Metrics]:
    """One optimizer step; batch statistics are those of the gradient at the parameters."""
    augment_key, mix_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    images = plain = augmented(config, augment_key, batch["images"])
    targets = smooth_labels(batch["labels"], model.classes, config.label_smoothing)
    if config.mixup is not None:
        images, targets = mixup(mix_key, images, targets, config.mixup)

    def loss_of(params: PyTree) -> tuple[Float[Array, ""], PyTree]:
        logits, statistics = model.apply(params, state.statistics, images, train=True)
        return excess_cross_entropy(logits, targets), statistics

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    (loss, statistics), gradients = gradient_of(state.params)
    extra: dict[str, Any] = {"grad_fn": lambda params: gradient_of(params)[1]}
    if (ire := config.optimizer.ire) is not None:
        curvature = image_curvature(ire, model)
        extra["curvature_fn"] = lambda params, key: curvature(
            params, key, state.statistics, plain, batch["labels"]
        )
    mean_loss, ire_start = _watched_loss(config, state, loss)
    if config.start_loss is not None:
        extra["refresh"] = _refreshes(ire, state.step, ire_start)
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, **extra)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients), **flat_shares(opt_state)}
    new = VisionState(
        params=optax.apply_updates(state.params, updates),
        statistics=statistics,
        opt_state=opt_state,
        key=state.key,
        step=state.step + 1,
        mean_loss=mean_loss,
        ire_start=ire_start,
    )
    skips = config.training.skip_nonfinite > 0
    return skip_unless_finite(new, state, metrics) if skips else (new, metrics)


def _watched_loss(
    config: VisionConfig, state: VisionState, loss: Float[Array, ""]
) -> tuple[Array, Array]:
    """Running mean of the loss, and the step at which it first fell to ``start_loss``."""
    kept = _LOSS_MEMORY * state.mean_loss + (1 - _LOSS_MEMORY) * loss
    mean_loss = jnp.where(state.step == 0, loss, kept)
    if config.start_loss is None:
        return mean_loss, state.ire_start
    starts = (state.ire_start < 0) & (mean_loss <= config.start_loss)
    return mean_loss, jnp.where(starts, state.step, state.ire_start)


def _refreshes(ire: IREConfig, step: Array, start: Array) -> Array:
    return (start >= 0) & ((step - start) % ire.update_interval == 0)


def compile_vision_step(
    **parts: Any,
) -> Callable[[VisionState, Batch], tuple[VisionState, Metrics]]:
    """:func:`vision_step` with its fixed parts bound, compiled; the state's buffers are reused."""

    def step(state: VisionState, batch: Batch) -> tuple[VisionState, Metrics]:
        return vision_step(state, batch, **parts)

    return jax.jit(step, donate_argnums=0)


def compile_logits(config: VisionConfig, model: VisionModel) -> Callable[..., Array]:
    """Compiled function of parameters, statistics and bytes: logits of evaluation, in float32."""

    def logits(params: PyTree, statistics: PyTree, images: Array) -> Array:
        return model.apply(params, statistics, model_input(config, images), train=False)[0]

    return jax.jit(logits)
