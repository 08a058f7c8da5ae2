"""Laws of IRE: what is boosted, when, and what stays what the base makes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.optim import FlatDirectionsState, ire, refresh_flat_mask, sam, scale_flat_directions
from jaxlab.optim.ire import _check_settings

BASES = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.1),
    "lion": lambda rate: optax.lion(rate),
    "muon": lambda rate: optax.contrib.muon(rate),
    "schedule_free": lambda rate: optax.contrib.schedule_free_sgd(rate),
}
PARAMS = {
    "w": jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)), jnp.float32),
    "b": jnp.asarray(np.random.default_rng(1).standard_normal(7), jnp.float32),
}
CURVATURE = jax.tree.map(lambda x: jnp.exp(3 * x), PARAMS)
SIZE = 31


def gradient(params):
    """Of a quadratic whose curvature is the fixed tree."""
    return jax.tree.map(jnp.multiply, CURVATURE, params)


def fixed(params, key):
    return CURVATURE


def trajectory(optimizer, *, steps=6, jit=True, start=PARAMS, **extra):
    """Parameters after each step of an optimizer, and its last state."""

    def step(params, state):
        updates, state = optimizer.update(gradient(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    params, state, out = start, optimizer.init(start), []
    for _ in range(steps):
        params, state = step(params, state)
        out.append(params)
    return out, state


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right)


def ranked(tree) -> np.ndarray:
    return np.sort(np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kappa", [0.0, lambda step: 0.0 * step])
def test_without_strength_it_is_the_base_bit_for_bit(base, kappa):
    # Not compiled: the compiler may round update and sum together for the base alone.
    ours, _ = trajectory(ire(BASES[base](0.01), kappa), jit=False, steps=3, curvature_fn=fixed)
    same(ours, trajectory(BASES[base](0.01), jit=False, steps=3)[0])


@pytest.mark.parametrize("base", BASES)
def test_with_the_constant_zero_the_compiled_program_is_the_base_too(base):
    ours, _ = trajectory(ire(BASES[base](0.01), 0.0))
    same(ours, trajectory(BASES[base](0.01))[0])


@pytest.mark.parametrize("base", ["sgd", "momentum", "adamw", "lion"])
def test_where_all_is_flat_it_is_a_larger_learning_rate(base):
    ours, _ = trajectory(ire(BASES[base](0.01), 3.0, 1.0), curvature_fn=fixed)
    close(ours, trajectory(BASES[base](0.04))[0], rtol=2e-5, atol=1e-6)


def test_before_the_first_refresh_it_is_the_base():
    optimizer = ire(optax.adamw(0.01), 5.0, start_step=6)
    ours, state = trajectory(optimizer, jit=False, curvature_fn=fixed)
    same(ours, trajectory(optax.adamw(0.01), jit=False)[0])
    assert not any(leaf.any() for leaf in jax.tree.leaves(state[1].flat_mask))


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.8, 1.0])
def test_the_mask_is_the_share_of_smallest_curvature(gamma):
    _, state = trajectory(ire(optax.sgd(0.01), 1.0, gamma), curvature_fn=fixed, steps=1)
    tau = ranked(CURVATURE)[int(gamma * SIZE) - 1]
    same(state[1].flat_mask, jax.tree.map(lambda h: h <= tau, CURVATURE))
    assert float(state[1].flat_threshold["global"]) == tau
    assert float(state[1].flat_fraction) == pytest.approx(int(gamma * SIZE) / SIZE)


def test_a_coordinate_of_a_diagonal_quadratic_moves_at_its_own_rate():
    """x_i after t steps is (1 - eta (1 + kappa n_i) lambda_i)^t x_i."""
    rate, kappa, steps = 0.005, 4.0, 6
    ours, state = trajectory(ire(optax.sgd(rate), kappa, 0.6), steps=steps, curvature_fn=fixed)
    expected = jax.tree.map(
        lambda x, h, n: x * (1 - rate * (1 + kappa * n) * h) ** steps,
        PARAMS,
        CURVATURE,
        state[1].flat_mask,
    )
    close(ours[-1], expected, rtol=1e-5)


def test_moments_are_those_of_the_base_and_decay_is_boosted():
    """One step of AdamW: the boost multiplies the whole update, decay included, and no moment."""
    base, kappa = optax.adamw(0.01, weight_decay=0.3), 2.0
    ours, state = trajectory(ire(base, kappa, 0.6), steps=1, curvature_fn=fixed)
    plain, base_state = trajectory(base, steps=1)
    same(state[0], base_state)
    close(
        jax.tree.map(jnp.subtract, ours[0], PARAMS),
        jax.tree.map(
            lambda new, old, n: (new - old) * (1 + kappa * n), plain[0], PARAMS, state[1].flat_mask
        ),
        rtol=1e-4,
        atol=1e-7,
    )


def test_the_mask_is_renewed_from_the_first_step_on_every_so_many():
    seen = []

    def watched(params, key):
        jax.debug.callback(
            lambda k: seen.append(tuple(np.asarray(k).tolist())), jax.random.key_data(key)
        )
        return CURVATURE

    optimizer = scale_flat_directions(1.0, update_interval=3, start_step=2)
    state, calls = optimizer.init(PARAMS), []
    update = jax.jit(lambda state: optimizer.update(PARAMS, state, PARAMS, curvature_fn=watched)[1])
    for _ in range(10):
        before = len(seen)
        state = jax.block_until_ready(update(state))
        jax.effects_barrier()
        calls.append(len(seen) - before)
    assert calls == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert len(set(seen)) == 3  # a key of its own for each refresh


def test_accumulated_micro_steps_count_as_one():
    optimizer = optax.MultiSteps(ire(optax.sgd(0.01), 2.0, 0.5, start_step=1, update_interval=2), 4)
    params, state = PARAMS, optimizer.init(PARAMS)
    masks = []
    for _ in range(12):
        updates, state = optimizer.update(gradient(params), state, params, curvature_fn=fixed)
        params = optax.apply_updates(params, updates)
        masks.append(bool(optax.tree.get(state, "flat_mask")["w"].any()))
    assert masks == [False] * 7 + [True] * 5
    assert int(optax.tree.get(state.inner_opt_state[1], "count")) == 3


@pytest.mark.parametrize("scope", ["tensor", {"w": "a", "b": "b"}])
def test_groups_have_thresholds_of_their_own(scope):
    optimizer = ire(optax.sgd(0.01), 1.0, 0.5, scope=scope)
    _, state = trajectory(optimizer, steps=1, curvature_fn=fixed)
    assert [int(state[1].flat_mask[name].sum()) for name in ("w", "b")] == [12, 3]
    assert len(state[1].flat_threshold) == 2


def test_what_takes_no_part_is_neither_ranked_nor_boosted():
    optimizer = ire(optax.sgd(0.01), 1.0, 0.5, param_mask={"w": True, "b": False})
    _, state = trajectory(optimizer, steps=1, curvature_fn=fixed)
    assert [int(state[1].flat_mask[name].sum()) for name in ("w", "b")] == [12, 0]


def test_zeros_fill_the_share_unless_they_are_not_counted():
    """The trap of large vocabularies: rows that no token of the batch touched."""
    curvature = {"w": CURVATURE["w"].at[:3].set(0.0), "b": CURVATURE["b"]}
    for rank_zeros, flat in ((True, 18), (False, 18 + int(0.5 * 13))):
        optimizer = ire(optax.sgd(0.01), 1.0, 0.5, rank_zeros=rank_zeros)
        _, state = trajectory(optimizer, steps=1, curvature_fn=lambda p, k: curvature)
        assert sum(int(x.sum()) for x in jax.tree.leaves(state[1].flat_mask)) == flat
        assert float(state[1].zero_fraction) == pytest.approx(18 / SIZE)


def test_nan_is_sharp_and_too_few_finite_values_keep_the_mask():
    optimizer = scale_flat_directions(1.0, 0.5)
    state = optimizer.init(PARAMS)
    spoilt = {"w": CURVATURE["w"].at[0].set(jnp.nan), "b": CURVATURE["b"]}
    _, state = optimizer.update(PARAMS, state, PARAMS, curvature=spoilt, refresh=True)
    assert not state.flat_mask["w"][0].any() and int(state.flat_mask["w"].sum()) > 0
    nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), PARAMS)
    _, after = optimizer.update(PARAMS, state, PARAMS, curvature=nothing, refresh=True)
    same(after.flat_mask, state.flat_mask)


def test_an_average_of_refreshes_ranks_by_the_mean_of_squares():
    trees = [jax.tree.map(lambda x, k=k: jnp.roll(x, k), CURVATURE) for k in range(3)]
    optimizer = scale_flat_directions(1.0, 0.5, curvature_decay=0.7)
    state, mean = optimizer.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    for tree in trees:
        _, state = optimizer.update(PARAMS, state, PARAMS, curvature=tree, refresh=True)
        mean = jax.tree.map(lambda m, h: 0.7 * m + 0.3 * h**2, mean, tree)
    close(state.curvature_average, mean, rtol=1e-6)
    tau = ranked(mean)[int(0.5 * SIZE) - 1]
    same(state.flat_mask, jax.tree.map(lambda m: m <= tau * (1 + 1e-6), mean))


def test_a_mask_renewed_out_of_band_is_the_one_renewed_in_the_step():
    inside, state = trajectory(ire(optax.sgd(0.01), 2.0, 0.6), steps=1, curvature_fn=fixed)
    optimizer = ire(optax.sgd(0.01), 2.0, 0.6, update_interval=None)
    begun = refresh_flat_mask(optimizer.init(PARAMS), CURVATURE, 0.6)
    same(begun[1].flat_mask, state[1].flat_mask)
    updates, _ = optimizer.update(gradient(PARAMS), begun, PARAMS)
    same(optax.apply_updates(PARAMS, updates), inside[0])
    with pytest.raises(ValueError, match="no flat directions"):
        refresh_flat_mask(optax.adam(1e-3).init(PARAMS), CURVATURE)


def test_a_refresh_without_curvature_is_an_error_that_names_the_keyword():
    optimizer = ire(optax.sgd(0.1), 1.0)
    with pytest.raises(ValueError, match="curvature_fn=f"):
        jax.jit(optimizer.update)(PARAMS, optimizer.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kappa=-1.0), "kappa is -1.0"),
        (dict(kappa=1.0, gamma=0.0), "gamma is 0.0"),
        (dict(kappa=1.0, gamma=1.5), "gamma is 1.5"),
        (dict(kappa=1.0, update_interval=0), "update_interval is 0"),
        (dict(kappa=1.0, start_step=-1), "start_step is -1"),
        (dict(kappa=1.0, curvature_decay=1.0), "curvature_decay is 1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        scale_flat_directions(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kappa="2"), "kappa is '2': it must be a number"),
        (dict(kappa=None), "kappa is None"),
        (dict(kappa=float("nan")), "kappa is nan"),
        (dict(update_interval=2.5), "update_interval is 2.5"),
    ],
)
def test_without_type_checks_the_same_place_refuses_what_is_no_number(settings, message):
    with pytest.raises(ValueError, match=message):
        _check_settings(**settings)


def test_a_refresh_out_of_band_holds_the_share_to_the_same_rule():
    state = ire(optax.sgd(0.1), 1.0, update_interval=None).init(PARAMS)
    with pytest.raises(ValueError, match=r"gamma is 0\.0"):
        refresh_flat_mask(state, CURVATURE, 0.0)


def test_a_curvature_that_is_never_taken_is_an_error():
    optimizer = ire(optax.sgd(0.1), 1.0, update_interval=None)
    for given in (dict(curvature_fn=fixed), dict(curvature=CURVATURE)):
        with pytest.raises(ValueError, match=r"say when with refresh=\.\.\."):
            optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, **given)


def test_a_curvature_function_that_would_see_a_part_is_refused_by_name():
    mask = jax.tree.map(lambda _: True, PARAMS)
    mask[next(iter(mask))] = False
    optimizer = optax.masked(ire(optax.sgd(0.1), 1.0), mask)
    with pytest.raises(ValueError, match=r"pass curvature=TREE with refresh"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, curvature_fn=fixed)


def test_strength_and_share_may_be_hyperparameters_in_the_state():
    optimizer = optax.inject_hyperparams(
        lambda kappa, gamma: ire(optax.sgd(0.01), kappa, gamma), static_args=()
    )(kappa=2.0, gamma=0.6)
    ours, _ = trajectory(optimizer, curvature_fn=fixed)
    close(ours, trajectory(ire(optax.sgd(0.01), 2.0, 0.6), curvature_fn=fixed)[0], rtol=1e-6)


def test_within_a_partition_only_its_own_leaves_count():
    inner = scale_flat_directions(1.0, 0.5, update_interval=None)
    optimizer = optax.partition({"in": inner, "out": optax.identity()}, {"w": "in", "b": "out"})
    state = refresh_flat_mask(optimizer.init(PARAMS), CURVATURE, 0.5)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    assert int((updates["w"] == 2).sum()) == 12 and (updates["b"] == 1).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_keep_their_type_and_what_is_no_float_passes(dtype):
    params = {"w": PARAMS["w"].astype(dtype), "n": jnp.arange(3)}
    optimizer = scale_flat_directions(lambda step: jnp.float32(1.5), 1.0)
    updates, _ = optimizer.update(params, optimizer.init(params), params, curvature=params)
    assert updates["w"].dtype == dtype
    same(updates["w"], params["w"] * jnp.asarray(2.5, dtype))
    same(updates["n"], params["n"])


def test_the_state_is_made_from_shapes_alone_and_costs_a_byte_a_parameter():
    optimizer = scale_flat_directions(1.0)
    state = jax.eval_shape(optimizer.init, PARAMS)
    assert isinstance(state, FlatDirectionsState)
    bytes_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    assert bytes_of(state.flat_mask) == SIZE and bytes_of(state) < SIZE + 64


def test_nothing_is_compiled_again():
    optimizer = ire(optax.adamw(0.01), 2.0, 0.6, update_interval=2)
    step = jax.jit(
        lambda params, state: optimizer.update(gradient(params), state, params, curvature_fn=fixed)
    )
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(5):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert step._cache_size() == 1


@pytest.mark.parametrize("way", ["refresh", "out_of_band"])
def test_before_its_start_no_step_is_enlarged_however_the_mask_came(way):
    interval = None if way == "out_of_band" else 10
    optimizer = ire(optax.sgd(0.01), 5.0, 0.5, start_step=2, update_interval=interval)
    base, state = optax.sgd(0.01), optimizer.init(PARAMS)
    if way == "out_of_band":
        state = refresh_flat_mask(state, CURVATURE, 0.5)
    plain, _ = base.update(PARAMS, base.init(PARAMS))
    for step in range(4):
        extra = {} if interval is None else {"curvature": CURVATURE, "refresh": step == 0}
        updates, state = optimizer.update(PARAMS, state, PARAMS, **extra)
        assert state[1].flat_mask["w"].any()
        expected = jax.tree.map(
            lambda u, n, s=step: u * (1 + 5 * n * (s >= 2)), plain, state[1].flat_mask
        )
        close(updates, expected, rtol=1e-6)


def test_an_estimator_is_given_those_extra_arguments_that_it_names():
    """And all of them where it takes any."""
    seen = {}

    def plain(params, key):
        return CURVATURE

    def naming(params, key, *, batch):
        seen["naming"] = batch
        return CURVATURE

    def any_of_them(params, key, **extra):
        seen["any"] = sorted(extra)
        return CURVATURE

    extra = {"batch": 3, "grad_fn": gradient}
    for estimator in (plain, naming, any_of_them):
        optimizer = ire(sam(optax.sgd(0.01), 0.1), 1.0, curvature=estimator)
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, **extra)
    assert seen == {"naming": 3, "any": ["batch", "grad_fn"]}
