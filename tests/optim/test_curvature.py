"""Estimates of the curvature's diagonal against the exact one of a small softmax model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.optim import curvature, scale_flat_directions

EXAMPLES, FEATURES, CLASSES = 6, 3, 4
INPUTS = jnp.asarray(np.random.default_rng(0).standard_normal((EXAMPLES, FEATURES)), jnp.float32)
PARAMS = {
    "w": jnp.asarray(np.random.default_rng(1).standard_normal((FEATURES, CLASSES)), jnp.float32),
    "b": jnp.zeros(CLASSES),
}
KEY = jax.random.key(0)


def logits(params, inputs):
    return inputs @ params["w"] + params["b"]


def gauss_newton_diagonal() -> dict:
    """Mean over examples of J' (diag(p) - p p') J, which for a linear model is x² p (1 - p)."""
    p = jax.nn.softmax(logits(PARAMS, INPUTS))
    spread = p * (1 - p)
    return {"w": jnp.mean(INPUTS[:, :, None] ** 2 * spread[:, None], 0), "b": jnp.mean(spread, 0)}


def distance(found) -> float:
    exact = gauss_newton_diagonal()
    gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), found, exact)
    return float(max(jax.tree.leaves(gaps)) / max(float(x.max()) for x in jax.tree.leaves(exact)))


def loss(params, inputs, labels):
    log_p = jax.nn.log_softmax(logits(params, inputs))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], 1))


@pytest.mark.parametrize(
    "estimator", [curvature.sampled_label_root_fisher, curvature.per_example_root_fisher]
)
def test_the_mean_over_draws_is_the_root_of_the_diagonal_of_gauss_newton(estimator):
    found = jax.jit(lambda key: estimator(logits, PARAMS, key, INPUTS, draws=6000))(KEY)
    assert distance(jax.tree.map(jnp.square, found)) < 0.06


ROOTS = {
    "gradient": lambda p, x: curvature.sampled_label_gradient(logits, p, KEY, x),
    "draws": lambda p, x: curvature.sampled_label_root_fisher(logits, p, KEY, x, draws=3),
    "per_example": lambda p, x: curvature.per_example_root_fisher(logits, p, KEY, x),
    "empirical": lambda p, x: curvature.empirical_root_fisher(loss, p, x, jnp.arange(6) % CLASSES),
}


@pytest.mark.parametrize("name", ROOTS)
def test_what_ranks_has_the_size_of_a_gradient_so_that_its_squares_can_be_averaged(name):
    """Inputs a thousandth as large make gradients so, and averaged squares a millionth."""
    at_zero = jax.tree.map(jnp.zeros_like, PARAMS)  # where inputs do not change the labels drawn
    optimizer = scale_flat_directions(1.0, curvature_decay=0.5)
    large, small = (
        optimizer.update(
            PARAMS, optimizer.init(PARAMS), PARAMS, curvature=ROOTS[name](at_zero, scale * INPUTS)
        )[1].curvature_average["w"]
        for scale in (1.0, 1e-3)
    )
    np.testing.assert_allclose(small, large * 1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ROOTS)
def test_float32_stays_float32_where_float64_is_enabled(name):
    with jax.enable_x64(True):
        found = ROOTS[name](PARAMS, INPUTS)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_the_labels_of_the_data_in_place_of_drawn_ones_are_something_else():
    labels = jnp.asarray([0, 1, 2, 3, 0, 1])
    found = curvature.empirical_root_fisher(loss, PARAMS, INPUTS, labels)
    assert distance(jax.tree.map(lambda x: x**2 * EXAMPLES, found)) > 0.3


def test_one_draw_squares_the_gradient_and_counts_the_labels():
    gradient = curvature.sampled_label_gradient(logits, PARAMS, KEY, INPUTS)
    (key,) = jax.random.split(KEY, 1)
    fisher = curvature.sampled_label_root_fisher(logits, PARAMS, KEY, INPUTS)
    again = curvature.sampled_label_gradient(logits, PARAMS, key, INPUTS)
    jax.tree.map(
        lambda f, g: np.testing.assert_allclose(f**2, EXAMPLES * g**2, rtol=1e-5), fisher, again
    )
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (gradient, again)), strict=True)
    )


def test_what_weighs_nothing_changes_nothing():
    weights = jnp.asarray([1.0, 1, 1, 0, 0, 0])
    spoilt = INPUTS.at[3:].set(100.0)
    ours, theirs = (
        curvature.sampled_label_gradient(logits, PARAMS, KEY, x, weights=weights)
        for x in (INPUTS, spoilt)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


def test_signs_give_the_diagonal_of_a_quadratic_exactly_and_of_any_loss_in_the_mean():
    lambdas = jnp.asarray([3.0, -1.0, 0.5])
    found = curvature.hutchinson_diagonal(lambda x: 0.5 * jnp.sum(lambdas * x**2), jnp.ones(3), KEY)
    np.testing.assert_allclose(found, lambdas, rtol=1e-6)
    matrix = jnp.asarray([[2.0, 1.0], [1.0, -1.0]])
    found = curvature.hutchinson_diagonal(
        lambda x: 0.5 * x @ matrix @ x, jnp.ones(2), KEY, draws=4000
    )
    np.testing.assert_allclose(found, jnp.diag(matrix), atol=0.06)
