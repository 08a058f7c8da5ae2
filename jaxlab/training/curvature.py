"""Curvature of the language model's loss on a batch, for the refreshes of IRE."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree, Shaped

from jaxlab.config import IREConfig
from jaxlab.optim.curvature import mean_over_draws, random_ranks, squared
from jaxlab.sharding.rules import groups_of_devices
from jaxlab.training.losses import cross_entropy_sum, sampled_targets
from jaxlab.training.step import (
    Batch,
    BatchCurvature,
    SequenceFormat,
    loss_sum,
    sum_over_parts,
)


def batch_curvature(
    config: IREConfig, *, graphdef: Any, form: SequenceFormat, accumulation: int = 1
) -> BatchCurvature:
    """What ranks the coordinates at a refresh: a function of parameters, key and batch.

    ``sampled-labels`` (IRE, equation 6): the gradient of the mean cross-entropy at tokens drawn
    from the model; with several draws the root of the mean square. A refresh looks at
    ``batch_share`` of the step's rows, or at one for each group of devices where that is more, in
    micro-batches of the step's size, so that it needs no more memory than the step.
    """
    if config.curvature == "random":
        return lambda params, key, batch: random_ranks(params, key)

    def gradient(params: PyTree, key: Array, batch: Batch) -> PyTree:
        total = len(batch["tokens"])
        rows, parts = share_of_rows(total, accumulation, config.batch_share, groups_of_devices())
        batch = {name: spread_rows(value, rows) for name, value in batch.items()}
        keys = jax.random.split(key, parts) if parts > 1 else key

        def of_part(part: tuple[Array, Batch]) -> PyTree:
            key, batch = part
            if config.curvature == "empirical":
                return jax.grad(loss_sum)(params, graphdef, form, batch)
            return jax.grad(sampled_loss_sum)(params, jnp.reshape(key, ()), graphdef, form, batch)

        total = sum_over_parts(of_part, (keys, batch), parts)
        weight = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)
        return jax.tree.map(lambda g: g / weight, total)

    def curvature(params: PyTree, key: Array, batch: Batch) -> PyTree:
        if config.draws == 1:
            return gradient(params, key, batch)

        def of_one(key: Array) -> PyTree:
            return jax.tree.map(squared, gradient(params, key, batch))

        return jax.tree.map(jnp.sqrt, mean_over_draws(of_one, params, key, config.draws))

    return curvature


def share_of_rows(rows: int, accumulation: int, share: float, groups: int = 1) -> tuple[int, int]:
    """How many of a step's rows a refresh takes, and in how many micro-batches.

    A micro-batch has a row for each of so many ``groups`` of devices, which would else be idle.
    """
    part = rows // accumulation
    wanted = -(-max(1, round(share * rows)) // groups) * groups
    if wanted <= part:
        return wanted, 1
    parts = -(-wanted // part)
    return parts * part, parts


def spread_rows(values: Shaped[Array, "B ..."], rows: int) -> Shaped[Array, "R ..."]:
    """So many rows at even distances: each device of a mesh gives as many of its own."""
    total = len(values)
    if total % rows:
        return values[np.arange(rows) * total // rows]
    return values.reshape(rows, total // rows, *values.shape[1:])[:, 0]


def sampled_loss_sum(
    params: PyTree, key: Array, graphdef: Any, form: SequenceFormat, batch: Batch
) -> Float[Array, ""]:
    """:func:`loss_sum` at tokens drawn from the model in place of the batch's."""
    decoder = nnx.merge(graphdef, params)
    hidden, weights = form.hidden(decoder, batch), decoder.unembedding()
    drawn = sampled_targets(hidden, weights, key)
    return cross_entropy_sum(hidden, weights, drawn, batch["loss_mask"])
