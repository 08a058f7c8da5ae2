"""Estimates of the curvature's diagonal, up to a common factor, to rank coordinates with.

The paper of IRE (arXiv 2405.20763, equation 6) uses the Gauss-Newton-Bartlett estimator of Sophia
(arXiv 2305.14342): the squared gradient of the mean loss at labels that the model draws itself. Its
expectation over the draws is the diagonal of the Gauss-Newton matrix, which for cross-entropy over
softmax is that of the Fisher matrix.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

LogitsFn = Callable[..., Float[Array, "*batch classes"]]


def sampled_label_gradient(
    logits_fn: LogitsFn,
    params: PyTree,
    key: Array,
    *inputs: Any,
    weights: Float[Array, "*batch"] | None = None,
) -> PyTree:
    """Gradient of the mean cross-entropy at labels drawn from the model at ``params``.

    ``logits_fn(params, *inputs)`` gives logits; ``weights`` counts predictions (1) or leaves them,
    such as padding, out (0). Its magnitudes rank coordinates as its squares do, without underflow.
    """

    def loss(params: PyTree) -> Float[Array, ""]:
        logits = logits_fn(params, *inputs).astype(jnp.float32)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits), axis=-1)
        return _mean_cross_entropy(logits, drawn, weights)

    return jax.grad(loss)(params)


def sampled_label_fisher(
    logits_fn: LogitsFn,
    params: PyTree,
    key: Array,
    *inputs: Any,
    draws: int = 1,
    weights: Float[Array, "*batch"] | None = None,
) -> PyTree:
    """Diagonal of the Fisher matrix, from ``draws`` sets of labels: count of labels times ghat².

    Unbiased in each draw; one draw of a coordinate is chi-squared with one degree of freedom, so
    more draws rank better, at proportional cost.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: it must be at least 1")

    def add(total: PyTree, key: Array) -> tuple[PyTree, None]:
        found = sampled_label_gradient(logits_fn, params, key, *inputs, weights=weights)
        return jax.tree.map(lambda t, g: t + squared(g), total, found), None

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
    total, _ = jax.lax.scan(add, zeros, jax.random.split(key, draws))
    shape = jax.eval_shape(logits_fn, params, *inputs).shape[:-1]
    count = jnp.sum(jnp.ones(shape) if weights is None else weights)
    return jax.tree.map(lambda t: t * (count / draws), total)


def per_example_fisher(
    logits_fn: LogitsFn, params: PyTree, key: Array, *inputs: Any, draws: int = 1
) -> PyTree:
    """Diagonal of the Fisher matrix as the mean of squared gradients of single examples.

    Axis 0 of every input counts examples; the labels of one example are drawn together. Costs a
    gradient for each example: for models without batch statistics and small batches.
    """

    def of_one(key: Array, *one: Any) -> PyTree:
        alone = [jax.tree.map(lambda x: x[None], part) for part in one]
        return sampled_label_fisher(logits_fn, params, key, *alone, draws=draws)

    count = len(jax.tree.leaves(inputs)[0])
    keys = jax.random.split(key, count)
    squares = jax.lax.map(lambda part: of_one(*part), (keys, *inputs))
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), squares)


def hutchinson_diagonal(
    loss_fn: Callable[..., Float[Array, ""]],
    params: PyTree,
    key: Array,
    *inputs: Any,
    draws: int = 1,
) -> PyTree:
    """Diagonal of the Hessian of any loss, from ``draws`` random signs; it may be negative."""

    def add(total: PyTree, key: Array) -> tuple[PyTree, None]:
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        signs = [
            jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
        ]
        signs = jax.tree.unflatten(structure, signs)
        gradient = jax.grad(lambda p: loss_fn(p, *inputs))
        product = jax.jvp(gradient, (params,), (signs,))[1]
        return jax.tree.map(
            lambda t, v, h: t + (v * h).astype(t.dtype), total, signs, product
        ), None

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
    total, _ = jax.lax.scan(add, zeros, jax.random.split(key, draws))
    return jax.tree.map(lambda t: t / draws, total)


def empirical_fisher(
    loss_fn: Callable[..., Float[Array, ""]], params: PyTree, *inputs: Any
) -> PyTree:
    """Squared gradient of the mean training loss at the true labels.

    Named for what it is: not an estimate of the Fisher matrix away from convergence, and not the
    paper's curvature.
    """
    return jax.tree.map(squared, jax.grad(lambda p: loss_fn(p, *inputs))(params))


def random_ranks(params: PyTree, key: Array) -> PyTree:
    """A control, not a curvature: independent uniform numbers, so that a random share is flat.

    What IRE gains over a mask of equal density made from these is what it owes to curvature.
    """
    return optax.tree.random_like(key, params, jax.random.uniform, jnp.float32)


def squared(gradient: Array) -> Float[Array, "..."]:
    """|gradient|² in float32, for any type of number."""
    return jnp.square(jnp.abs(gradient).astype(jnp.float32))


def _mean_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    weights: Float[Array, "*batch"] | None,
) -> Float[Array, ""]:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    if weights is None:
        return -jnp.mean(chosen)
    return -jnp.sum(chosen * weights) / jnp.maximum(jnp.sum(weights), 1.0)
