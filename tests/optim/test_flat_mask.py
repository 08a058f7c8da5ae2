"""Laws of the mask and its refresh: sizes, groups, averages and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.optim import flat_fractions, ire

DRAW = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(DRAW.standard_normal((4, 6)), jnp.float32),
    "b": jnp.asarray(DRAW.standard_normal(7), jnp.float32),
}
CURVATURE = jax.tree.map(lambda x: jnp.exp(3 * x), PARAMS)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("gamma", [0.6, lambda step: 0.6])
def test_more_parameters_than_an_int32_counts_are_traced(gamma):
    """In one group, as in a model of 2.8 billion parameters."""
    params = {f"w{n}": jax.ShapeDtypeStruct((3, 1 << 29), jnp.float32) for n in range(2)}
    optimizer = ire(optax.adamw(0.1), 1.0, gamma, rank_zeros=callable(gamma))
    state = jax.eval_shape(optimizer.init, params)
    _, after = jax.eval_shape(
        lambda *args: optimizer.update(*args, curvature_fn=lambda p, key: p), params, state, params
    )
    shares = jax.eval_shape(
        lambda state: flat_fractions(state, lambda t: t | {"w1": 0, "w0": 0}), after
    )
    assert shares[0].shape == after[1].flat_fraction.shape == ()
