"""Estimates of the curvature's diagonal, up to a common factor, to rank coordinates with.

The paper of IRE (arXiv 2405.20763, equation 6) uses the Gauss-Newton-Bartlett estimator of Sophia
(arXiv 2305.14342): the squared gradient of the mean loss at labels that the model draws itself. Its
expectation over the draws is the diagonal of the Gauss-Newton matrix, which for cross-entropy over
softmax is that of the Fisher matrix.

What ranks has the size of a gradient, a *root* of that diagonal: it ranks as its square does
without underflow, and squares are what ``curvature_decay`` averages over refreshes.
"""

import math
from collections.abc import Callable, Sequence
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


def sampled_label_root_fisher(
    logits_fn: LogitsFn,
    params: PyTree,
    key: Array,
    *inputs: Any,
    draws: int = 1,
    weights: Float[Array, "*batch"] | None = None,
) -> PyTree:
    """Root of the Fisher matrix's diagonal from ``draws`` sets of labels: of mean count * ghat².

    The square is unbiased; one draw of a coordinate is chi-squared with one degree of freedom, so
    more draws rank better, at proportional cost.
    """
    fisher = _sampled_label_fisher(logits_fn, params, key, inputs, draws, weights)
    return jax.tree.map(jnp.sqrt, fisher)


def per_example_root_fisher(
    logits_fn: LogitsFn, params: PyTree, key: Array, *inputs: Any, draws: int = 1
) -> PyTree:
    """Root of the Fisher matrix's diagonal from gradients of single examples: of mean ghat².

    Axis 0 of every input counts examples; the labels of one example are drawn together. Costs a
    gradient for each example: for models without batch statistics and small batches.
    """

    def of_one(key: Array, *one: Any) -> PyTree:
        alone = [jax.tree.map(lambda x: x[None], part) for part in one]
        return _sampled_label_fisher(logits_fn, params, key, alone, draws, None)

    count = len(jax.tree.leaves(inputs)[0])
    keys = jax.random.split(key, count)
    squares = jax.lax.map(lambda part: of_one(*part), (keys, *inputs))
    return jax.tree.map(lambda x: jnp.sqrt(jnp.mean(x, axis=0)), squares)


def hutchinson_diagonal(
    loss_fn: Callable[..., Float[Array, ""]],
    params: PyTree,
    key: Array,
    *inputs: Any,
    draws: int = 1,
) -> PyTree:
    """Diagonal of the Hessian of any loss, from ``draws`` random signs; it may be negative."""

    def of_one(key: Array) -> PyTree:
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        signs = [
            jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
        ]
        signs = jax.tree.unflatten(structure, signs)
        gradient = jax.grad(lambda p: loss_fn(p, *inputs))
        product = jax.jvp(gradient, (params,), (signs,))[1]
        return jax.tree.map(jnp.multiply, signs, product)

    return mean_over_draws(of_one, params, key, draws)


def empirical_root_fisher(
    loss_fn: Callable[..., Float[Array, ""]], params: PyTree, *inputs: Any
) -> PyTree:
    """Size of the gradient of the mean training loss at the true labels.

    Named for what it is: not an estimate of the Fisher matrix away from convergence, and not the
    paper's curvature.
    """
    return jax.tree.map(jnp.abs, jax.grad(lambda p: loss_fn(p, *inputs))(params))


def random_ranks(params: PyTree, key: Array) -> PyTree:
    """A control, not a curvature: independent uniform numbers, so that a random share is flat.

    What IRE gains over a mask of equal density made from these is what it owes to curvature.
    """
    return optax.tree.random_like(key, params, jax.random.uniform, jnp.float32)


def mean_over_draws(
    function: Callable[[Array], PyTree], params: PyTree, key: Array, draws: int
) -> PyTree:
    """Mean in float32 of a tree like the parameters over ``draws`` keys, one at a time."""
    if draws < 1:
        raise ValueError(f"draws is {draws}: it must be at least 1")

    def add(total: PyTree, key: Array) -> tuple[PyTree, None]:
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, function(key)), None

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
    total, _ = jax.lax.scan(add, zeros, jax.random.split(key, draws))
    return jax.tree.map(lambda t: t / draws, total)


def squared(gradient: Array) -> Float[Array, "..."]:
    """|gradient|² in float32, for any type of number."""
    return jnp.square(jnp.abs(gradient).astype(jnp.float32))


def _sampled_label_fisher(
    logits_fn: LogitsFn,
    params: PyTree,
    key: Array,
    inputs: Sequence[Any],
    draws: int,
    weights: Float[Array, "*batch"] | None,
) -> PyTree:
    def of_one(key: Array) -> PyTree:
        found = sampled_label_gradient(logits_fn, params, key, *inputs, weights=weights)
        return jax.tree.map(squared, found)

    shape = jax.eval_shape(logits_fn, params, *inputs).shape[:-1]
    count = float(math.prod(shape)) if weights is None else jnp.sum(weights, dtype=jnp.float32)
    return jax.tree.map(lambda t: t * count, mean_over_draws(of_one, params, key, draws))


def _mean_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    weights: Float[Array, "*batch"] | None,
) -> Float[Array, ""]:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    if weights is None:
        return -jnp.mean(chosen)
    return -jnp.sum(chosen * weights) / jnp.maximum(jnp.sum(weights), 1.0)
