"""Laws of the mask and its refresh: sizes, groups, averages and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.optim import (
    flat_fractions,
    flat_shares,
    ire,
    refresh_flat_mask,
    scale_flat_directions,
)

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


# ---------------------------------------------------------------------------- part of the tree

NESTED = {"in": PARAMS, "out": {"w": jnp.ones((3, 2))}}
EVERYWHERE = jax.tree.map(lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), NESTED)
WITHIN = {
    "masked": lambda inner: optax.masked(
        inner, {"in": True, "out": False}, mask_compatible_extra_args=True
    ),
    "partition": lambda inner: optax.partition(
        {"mine": inner, "other": optax.identity()}, {"in": "mine", "out": "other"}
    ),
}
WHOLE = {"in": {"w": "a", "b": "b"}, "out": {"w": "c"}}
TAKES_PART = {"in": {"w": True, "b": False}, "out": {"w": True}}


@pytest.mark.parametrize("around", [*WITHIN, None])
@pytest.mark.parametrize(
    "settings, flat",
    [
        ({"scope": WHOLE}, {"w": 12, "b": 3}),
        ({"scope": {"in": "a", "out": "b"}}, {"w": 8, "b": 7}),
        ({"param_mask": TAKES_PART}, {"w": 12, "b": 0}),
        ({"param_mask": {"in": True, "out": False}}, {"w": 8, "b": 7}),
        ({"scope": WHOLE, "param_mask": TAKES_PART}, {"w": 12, "b": 0}),
    ],
)
def test_labels_and_masks_of_the_whole_tree_hold_for_a_part_of_it_too(around, settings, flat):
    """A label or a mask may stand for all that lies below it. 24 and 7 values of 0, 1, 2, ..."""
    if around is None and "scope" not in settings and settings["param_mask"] is TAKES_PART:
        flat = {"w": 9, "b": 0}  # the 15 smallest of both
    inner = scale_flat_directions(1.0, 0.5, update_interval=None, **settings)
    optimizer = inner if around is None else WITHIN[around](inner)
    state = refresh_flat_mask(optimizer.init(NESTED), EVERYWHERE, 0.5, **settings)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, NESTED), state, NESTED)
    found = {name: int((leaf == 2).sum()) for name, leaf in updates["in"].items()}
    assert found == flat


@pytest.mark.parametrize("keyword", ["scope", "param_mask"])
def test_a_tree_that_does_not_fit_the_parameters_is_named(keyword):
    optimizer = scale_flat_directions(1.0, 0.5, **{keyword: {"w": "a", "c": "b"}})
    with pytest.raises(ValueError, match=f"{keyword} .*parameters"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, curvature=PARAMS)


# ---------------------------------------------------------------------------- averages


def test_a_value_that_is_not_finite_is_sharp_once_and_leaves_the_average_alone():
    spoilt = CURVATURE | {"w": CURVATURE["w"].at[0].set(jnp.nan).at[1].set(jnp.inf)}
    optimizer = scale_flat_directions(1.0, 0.5, curvature_decay=0.7)

    def after(*trees):
        state = optimizer.init(PARAMS)
        for tree in trees:
            _, state = optimizer.update(PARAMS, state, PARAMS, curvature=tree, refresh=True)
        return state

    one, then = after(CURVATURE), after(CURVATURE, spoilt)
    same(then.curvature_average["w"][:2], one.curvature_average["w"][:2])
    assert not then.flat_mask["w"][:2].any() and int(then.flat_mask["w"].sum()) > 0
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(then.curvature_average))
    nothing = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    same(after(CURVATURE, nothing).flat_mask, one.flat_mask)
    same(after(nothing, CURVATURE).flat_mask, one.flat_mask)


@pytest.mark.parametrize(
    "made, given, message",
    [
        ({}, {"curvature_decay": 0.5}, "curvature_decay.*keeps no average"),
        ({"curvature_decay": 0.5}, {}, "curvature_decay.*keeps an average"),
        ({}, {"scope": "tensor"}, "scope.*global"),
        ({"scope": "tensor"}, {"scope": {"w": "x", "b": "x"}}, r"scope.*\['b'\], \['w'\]"),
    ],
)
def test_a_refresh_with_other_settings_than_the_transformations_is_refused(made, given, message):
    state = ire(optax.sgd(0.1), 1.0, update_interval=None, **made).init(PARAMS)
    with pytest.raises(ValueError, match=message):
        refresh_flat_mask(state, CURVATURE, **given)
    refresh_flat_mask(state, CURVATURE, **made)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"w": CURVATURE["w"], "b": jnp.ones(1)}, r"curvature\['b'\] has shape \(1,\).*\(7,\)"),
        ({"w": CURVATURE["w"], "b": jnp.ones(())}, r"curvature\['b'\] has shape \(\).*\(7,\)"),
        ({"w": CURVATURE["w"]}, "curvature is not a tree like the parameters"),
        (CURVATURE | {"c": jnp.ones(1)}, "curvature is not a tree like the parameters"),
        (CURVATURE | {"b": None}, "curvature is not a tree like the parameters"),
        (CURVATURE | {"b": {"x": jnp.ones(7)}}, "curvature is not a tree like the parameters"),
    ],
)
@pytest.mark.parametrize("decay", [None, 0.5])
def test_a_curvature_of_another_shape_is_refused_by_name_when_it_is_traced(wrong, message, decay):
    optimizer = scale_flat_directions(1.0, curvature_decay=decay)
    state = optimizer.init(PARAMS)
    for given in ({"curvature": wrong}, {"curvature_fn": lambda params, key: wrong}):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda g=given: optimizer.update(PARAMS, state, PARAMS, **g))


@pytest.mark.parametrize("gamma, size, flat", [(0.29, 100, 29), (0.57, 100, 57), (0.58, 50, 29)])
def test_a_share_is_the_decimal_number_that_is_written(gamma, size, flat):
    """In binary 0.29 * 100 is a little less than 29."""
    values = {"w": jnp.arange(1.0, size + 1)}
    optimizer = scale_flat_directions(1.0, gamma)
    _, state = optimizer.update(values, optimizer.init(values), values, curvature=values)
    assert int(state.flat_mask["w"].sum()) == flat


def test_two_transformations_in_one_partition_are_told_of_together():
    """Each with a share of its own, of leaves of 24 and 7."""
    pair = {"w": ire(optax.sgd(0.1), 1.0, 0.5), "b": ire(optax.adam(0.1), 1.0, 1.0)}
    optimizer = optax.partition(pair, {"w": "w", "b": "b"}, mask_compatible_extra_args=True)
    state = optimizer.init(PARAMS)
    _, state = optimizer.update(PARAMS, state, PARAMS, curvature=CURVATURE)
    assert flat_fractions(state) == {"['w']": 0.5, "['b']": 1.0}
    assert flat_fractions(state, lambda tree: jax.tree.map(lambda _: "all", tree)) == {
        "all": pytest.approx(19 / 31)
    }
    shares = flat_shares(state)
    assert float(shares["flat_fraction"]) == pytest.approx(19 / 31)
    assert float(shares["zero_fraction"]) == 0.0
    assert flat_shares(optax.adam(0.1).init(PARAMS)) == {}
