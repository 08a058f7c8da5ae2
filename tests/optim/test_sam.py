"""Laws of SAM: where the gradient is taken, and what the base and IRE see of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.optim import average_sam, ire, sam

DRAW = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(DRAW.standard_normal((3, 4)), jnp.float32),
    "b": jnp.asarray(DRAW.standard_normal(5), jnp.float32),
}
LAMBDAS = jax.tree.map(lambda x: jnp.exp(x), PARAMS)
RATE, RHO = 0.05, 0.3


def gradient(params):
    """Of sum(lambda x**4)/4, which is not linear, so that the radius matters."""
    return jax.tree.map(lambda h, x: h * x**3, LAMBDAS, params)


def steps(optimizer, count, *, start=PARAMS, **extra):
    update = jax.jit(lambda g, s, p: optimizer.update(g, s, p, grad_fn=gradient, **extra))
    params, state = start, optimizer.init(start)
    for _ in range(count):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    return params, state


def close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right)


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(tree))))


def test_each_step_uses_the_gradient_at_the_end_of_a_climb_of_length_rho():
    ours, state = steps(sam(optax.sgd(RATE, momentum=0.9), RHO), 3)
    expected, velocity = PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(3):
        here = gradient(expected)
        length = norm(here)
        there = gradient(jax.tree.map(lambda p, g, n=length: p + RHO * g / n, expected, here))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, there)
        expected = jax.tree.map(lambda p, v: p - RATE * v, expected, velocity)
    close(ours, expected, rtol=1e-5)
    close(state[0].trace, velocity, rtol=1e-5)


def test_without_radius_it_is_the_base_bit_for_bit_and_the_state_is_the_bases():
    # Not compiled: the compiler may round a climb of length 0 differently.
    base = optax.adamw(RATE, weight_decay=0.2)
    grads = gradient(PARAMS)
    ours = sam(base, 0.0).update(grads, base.init(PARAMS), PARAMS, grad_fn=gradient)
    theirs = base.update(grads, base.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_weight_decay_acts_at_the_original_parameters():
    decayed = optax.chain(optax.add_decayed_weights(0.2), optax.sgd(RATE))
    ours, plain = (steps(sam(base, RHO), 1)[0] for base in (decayed, optax.sgd(RATE)))
    close(ours, jax.tree.map(lambda x, p: x - RATE * 0.2 * p, plain, PARAMS), rtol=1e-5)


def test_ire_around_it_boosts_the_whole_step_and_never_the_climb():
    fixed = lambda params, key: LAMBDAS  # noqa: E731
    ours, state = steps(ire(sam(optax.sgd(RATE), RHO), 3.0, 0.5), 1, curvature_fn=fixed)
    plain, _ = steps(sam(optax.sgd(RATE), RHO), 1)
    close(
        ours,
        jax.tree.map(lambda p, x, n: p + (x - p) * (1 + 3 * n), PARAMS, plain, state[1].flat_mask),
        rtol=1e-5,
        atol=1e-7,
    )


def test_average_sam_takes_the_gradient_on_a_sphere_anew_each_step():
    seen = []

    def watched(params):
        seen.append(norm(jax.tree.map(jnp.subtract, params, PARAMS)))
        return jax.tree.map(jnp.subtract, params, PARAMS)

    optimizer = average_sam(optax.identity(), RHO, seed=3)
    state, moves = optimizer.init(PARAMS), []
    for _ in range(400):
        move, state = optimizer.update(PARAMS, state, PARAMS, grad_fn=watched)
        moves.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(move)]) / RHO)
    np.testing.assert_allclose(seen, RHO, rtol=1e-5)
    moves = np.stack(moves)
    # 17 coordinates of mean 0 and mean square 1/17 on the unit sphere: five standard errors.
    assert np.abs(moves.mean(0)).max() < 5 / np.sqrt(17 * 400)
    np.testing.assert_allclose((moves**2).mean(0), 1 / 17, atol=5 * np.sqrt(2) / 17 / 20)


@pytest.mark.parametrize("make", [sam, average_sam])
def test_it_works_within_other_transformations(make):
    plain, _ = steps(make(optax.sgd(RATE), RHO), 2)
    # The unknown argument goes through to a base that takes none.
    chained = optax.chain(make(optax.sgd(RATE), RHO), optax.identity())
    close(steps(chained, 2, curvature=None, loss=jnp.ones(()))[0], plain, rtol=1e-6)
    injected = optax.inject_hyperparams(lambda rho: make(optax.sgd(RATE), rho))(rho=RHO)
    close(steps(injected, 2)[0], plain, rtol=1e-5)
    accumulated, _ = steps(optax.MultiSteps(make(optax.sgd(RATE), RHO), 2), 4)
    close(accumulated, plain, rtol=1e-5)


@pytest.mark.parametrize("make", [sam, average_sam])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_types_are_kept_and_small_gradients_climb_as_far(make, dtype):
    params = {"w": jnp.ones(4, dtype)}
    seen = []

    def watched(params):
        seen.append(params["w"])
        return params

    optimizer = make(optax.sgd(RATE), 0.5)
    small = {"w": jnp.full(4, 1e-6, dtype)}
    updates, _ = optimizer.update(small, optimizer.init(params), params, grad_fn=watched)
    assert updates["w"].dtype == seen[0].dtype == dtype
    assert float(jnp.linalg.norm(seen[0].astype(jnp.float32) - 1)) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("make", [sam, average_sam])
def test_what_is_missing_or_impossible_is_named(make):
    optimizer = make(optax.sgd(RATE), RHO)
    with pytest.raises(ValueError, match="grad_fn=f"):
        jax.jit(optimizer.update)(PARAMS, optimizer.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="pass params"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), grad_fn=gradient)
    with pytest.raises(ValueError, match="rho is -0.1"):
        make(optax.sgd(RATE), -0.1)
