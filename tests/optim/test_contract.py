"""What optax asks of every transformation, asked of ours. Shapes alone where shapes suffice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.optim import (
    average_sam,
    grad_power,
    ire,
    lite_muon,
    sam,
    scale_by_block,
    scale_flat_directions,
)
from jaxlab.optim.curvature import random_ranks

DRAW = np.random.default_rng(0)
PARAMS = {
    "query": jnp.asarray(DRAW.standard_normal((2, 4, 2, 3)), jnp.float32),
    "scale": jnp.asarray(DRAW.standard_normal((2, 4)), jnp.float32),
}
# Of every kind: with state and without, around a base and behind it.
MAKERS = {
    "ire": lambda rate: ire(optax.adamw(rate), 2.0, 0.6),
    "ire_average": lambda rate: ire(optax.lion(rate), 2.0, 0.6, curvature_decay=0.5),
    "sam": lambda rate: sam(optax.sgd(rate, momentum=0.9), 0.1),
    "average_sam": lambda rate: average_sam(optax.adamw(rate), 0.1),
    "sam_ire": lambda rate: ire(sam(optax.sgd(rate), 0.1), 2.0, 0.6),
    "lite_muon": lambda rate: lite_muon(rate, optax.adamw(rate)),
    "blockwise": lambda rate: optax.chain(optax.adamw(rate), scale_by_block()),
    "grad_power": lambda rate: optax.chain(grad_power(1.2), optax.adamw(rate)),
}
EXTRA = dict(
    curvature_fn=random_ranks, grad_fn=lambda params: params, value=1.0, something_else=jnp.ones(3)
)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_an_update_keeps_types_and_takes_arguments_that_it_does_not_know(name, dtype):
    optimizer = MAKERS[name](0.01)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), PARAMS)
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(
        lambda *args: optimizer.update(*args, **EXTRA), params, state, params
    )
    assert types(after) == types(state)
    assert types(updates) == types(params)


@pytest.mark.parametrize("name", MAKERS)
def test_the_parts_of_a_state_that_are_like_the_parameters_can_be_told(name):
    optimizer = MAKERS[name](0.01)
    state = jax.eval_shape(optimizer.init, PARAMS)
    marked = optax.tree.map_params(optimizer, lambda _: "like", state)
    found = [x for x in jax.tree.leaves(marked) if isinstance(x, str)]
    # Of each parameter; with LITE a matrix has momentum and ratio, any other AdamW's two moments.
    parts = dict(
        ire=3,
        ire_average=3,
        sam=1,
        average_sam=2,
        sam_ire=1,
        blockwise=2,
        grad_power=2,
        lite_muon=2,
    )
    assert len(found) == parts[name] * len(PARAMS)


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_traced_within_multi_steps_and_with_injected_rates(name):
    inner = optax.inject_hyperparams(lambda rate: MAKERS[name](rate))(rate=0.01)
    optimizer = optax.MultiSteps(inner, 2)
    state = jax.eval_shape(optimizer.init, PARAMS)
    _, after = jax.eval_shape(lambda *args: optimizer.update(*args, **EXTRA), PARAMS, state, PARAMS)
    assert types(after) == types(state)


def test_a_step_that_is_not_finite_freezes_mask_count_and_moments():
    optimizer = optax.apply_if_finite(
        ire(optax.adam(0.01), 2.0, 0.6, update_interval=1), max_consecutive_errors=5
    )
    update = jax.jit(lambda g, s, h: optimizer.update(g, s, PARAMS, curvature=h))
    _, state = update(PARAMS, optimizer.init(PARAMS), PARAMS)
    spoilt = {**PARAMS, "scale": PARAMS["scale"].at[0, 0].set(jnp.nan)}
    other = jax.tree.map(lambda x: 1 / x, PARAMS)
    updates, after = update(spoilt, state, other)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    assert not any(x.any() for x in jax.tree.leaves(updates))
    _, later = update(PARAMS, after, other)
    assert (
        later.inner_state[1].flat_mask["query"] != state.inner_state[1].flat_mask["query"]
    ).any()


def test_within_schedule_free_the_fast_iterate_is_boosted():
    """z moves by (1 + kappa n) times the base's step; the average is not touched otherwise."""
    rate, kappa = 0.1, 2.0

    def step(base):
        optimizer = optax.contrib.schedule_free(base, learning_rate=rate, b1=0.9)
        return optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, curvature=PARAMS)[1]

    plain = step(optax.with_extra_args_support(optax.sgd(rate)))
    ours = step(ire(optax.sgd(rate), kappa, 0.6))
    mask = ours.base_optimizer_state[1].flat_mask
    assert 0 < mask["query"].sum() < mask["query"].size
    jax.tree.map(
        lambda z, y, n, p: np.testing.assert_allclose(z - p, (y - p) * (1 + kappa * n), rtol=1e-5),
        ours.z,
        plain.z,
        mask,
        PARAMS,
    )


def test_under_a_mask_that_leaves_leaves_out_the_tree_given_is_the_whole_one():
    inner = ire(optax.sgd(1.0), 1.0, 0.5, update_interval=1)
    optimizer = optax.masked(
        inner, {"query": True, "scale": False}, mask_compatible_extra_args=True
    )
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, curvature=PARAMS)
    ratio = np.asarray(updates["query"] / PARAMS["query"])
    assert sorted(set(ratio.ravel())) == [-2.0, -1.0]
    assert (ratio == -2.0).sum() == PARAMS["query"].size // 2
    np.testing.assert_array_equal(updates["scale"], PARAMS["scale"])


def ranks(params, key, **_):
    return random_ranks(params, key)


def everything(tree):
    return jax.tree.map(lambda _: True, tree)


HYPERPARAMETERS = {
    "one_link": lambda **given: optax.chain(
        optax.sgd(0.01), optax.inject_hyperparams(scale_flat_directions)(**given)
    ),
    "around_a_base": lambda **given: optax.inject_hyperparams(ire)(optax.sgd(0.01), **given),
    "given_estimator": lambda **given: optax.inject_hyperparams(
        ire, static_args=("curvature", "param_mask")
    )(optax.sgd(0.01), curvature=ranks, param_mask=everything, **given),
}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize("more", [{}, {"curvature_decay": 0.5, "start_step": 1}])
def test_every_setting_may_be_a_hyperparameter_in_the_state(name, more):
    """optax turns all numbers into arrays, traced ones within jit; defaults too."""
    given = dict(kappa=2.0, gamma=0.6, update_interval=2, **more)
    optimizer, plain = HYPERPARAMETERS[name](**given), ire(optax.sgd(0.01), **given)
    trajectories = []
    for one in (optimizer, plain):
        update = jax.jit(lambda state, o=one: o.update(PARAMS, state, PARAMS, **EXTRA))
        state, updates = jax.jit(one.init)(PARAMS), []
        for _ in range(4):
            update_, state = update(state)
            updates.append(update_)
        trajectories.append(updates)
    ours, theirs = trajectories
    assert (ours[-1]["query"] != ours[0]["query"]).any() or not more
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)
