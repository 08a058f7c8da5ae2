"""Laws of blockwise rates, powers of gradients, LITE and the random control."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.models.decoder import abstract_decoder
from jaxlab.optim import BLOCKWISE, block_labels, grad_power, ire, lite_muon, scale_by_block
from jaxlab.optim.blocks import matrix_axes
from jaxlab.optim.curvature import random_ranks
from jaxlab.optim.lite import POLAR_COEFFICIENTS, flat_part, sharp_factor
from tests.models.tiny import tiny_config

DRAW = np.random.default_rng(0)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


# ---------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_of_the_decoder_has_a_block(tied):
    _, params = abstract_decoder(tiny_config(tied_embeddings=tied))
    labels = block_labels(params)
    stack = {
        "attention": {
            "key": "query_key",
            "output": "value_output",
            "query": "query_key",
            "value": "value_output",
        },
        "attention_norm": {"scale": "norm"},
        "mlp": {"down": "feed_forward", "gate": "feed_forward", "up": "feed_forward"},
        "mlp_norm": {"scale": "norm"},
    }
    expected = {
        "embedding": "embedding",
        "final_norm": {"scale": "norm"},
        "stacks": {0: stack, 1: stack},
    }
    assert labels == (expected if tied else {**expected, "head": "head"})
    with pytest.raises(ValueError, match=r"\['kernel'\] is no parameter of the decoder"):
        block_labels({"kernel": jnp.ones(2)})


def test_each_block_moves_at_its_own_rate_decay_included():
    params = {name: jnp.ones(3) for name in ("embedding", "scale", "query", "up", "value", "head")}
    base = optax.adamw(0.01, weight_decay=0.3)
    chain = optax.chain(base, scale_by_block())
    ours, _ = chain.update(params, chain.init(params), params)
    theirs, _ = base.update(params, base.init(params), params)
    factors = dict(embedding=10.0, scale=1.0, query=8.0, up=6.0, value=4.0, head=1.0)
    same(ours, jax.tree.map(lambda u, f: u * f, theirs, factors))


def test_a_label_without_a_multiplier_is_named():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    some = scale_by_block({"a": 2.0}, labels=lambda tree: {name: name for name in tree})
    with pytest.raises(ValueError, match="no multiplier for b"):
        some.init(params)
    assert set(BLOCKWISE) >= {"norm", "embedding"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_power_of_the_gradient_keeps_sign_and_type(dtype):
    gradient = jnp.asarray([-4.0, 0.0, 0.25], dtype)
    found, _ = grad_power(1.5).update(gradient, optax.EmptyState())
    same(found, jnp.asarray([-8.0, 0.0, 0.125], dtype))
    same(grad_power(1.0).update(gradient, optax.EmptyState())[0], gradient)
    with pytest.raises(ValueError, match="power is 0"):
        grad_power(0.0)


def test_random_ranks_make_a_mask_of_equal_density_and_another_each_time():
    params = {"w": jnp.zeros((42, 50))}
    optimizer = ire(optax.sgd(0.1), 1.0, 0.7, curvature=random_ranks, update_interval=1)
    update = jax.jit(lambda state: optimizer.update(params, state, params)[1])
    first = update(optimizer.init(params))
    second = update(first)
    masks = [state[1].flat_mask["w"] for state in (first, second)]
    assert [int(mask.sum()) for mask in masks] == [1470, 1470]
    # Independent masks agree on .7 * .7 + .3 * .3 of the coordinates; five standard errors.
    assert np.mean(masks[0] == masks[1]) == pytest.approx(0.58, abs=5 * 0.011)


# ---------------------------------------------------------------------------- LITE


SHAPES = {"query": (2, 12, 2, 5), "output": (2, 2, 5, 12), "down": (2, 20, 12), "scale": (2, 12)}


def draw(seed: int, dtype=jnp.float32) -> dict:
    generator = np.random.default_rng(seed)
    return {k: jnp.asarray(generator.standard_normal(s), dtype) for k, s in SHAPES.items()}


def with_singular_values(values, inputs: int, outputs: int) -> np.ndarray:
    left = np.linalg.qr(DRAW.standard_normal((inputs, len(values))))[0]
    right = np.linalg.qr(DRAW.standard_normal((outputs, len(values))))[0]
    return (left * values) @ right.T


def test_the_factor_projects_on_the_singular_directions_above_the_threshold():
    """Against a decomposition; no singular value lies near the threshold."""
    values = np.array([8.0, 5.0, 3.0, 1.0, 0.7, 0.3])
    matrix = np.stack([with_singular_values(values, 9, 6), with_singular_values(values, 9, 6)])
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    ratio = np.array([2.0, 4.0]) / np.linalg.norm(values)
    factor, following = jax.jit(sharp_factor, static_argnums=3)(
        *(jnp.asarray(x, jnp.float32) for x in (matrix, left @ right, ratio)), 0.4
    )
    for layer, rank in enumerate((3, 2)):
        sharp = left[layer, :, :rank]
        np.testing.assert_allclose(factor[layer] @ factor[layer].T, sharp @ sharp.T, atol=0.03)
        step = jnp.asarray(DRAW.standard_normal((1, 9, 6)), jnp.float32)
        flat = flat_part(step, factor[layer][None])[0]
        np.testing.assert_allclose(flat, step[0] - sharp @ sharp.T @ step[0], atol=0.1)
    # floor(.4 * 6) + 1 = 3 directions are wanted: 3 stay about there, 2 are too few.
    np.testing.assert_allclose(following[1] / ratio[1], 0.95, rtol=1e-6)


def test_the_threshold_finds_the_wanted_number_of_directions():
    values = np.geomspace(10, 0.1, 12)
    matrix = jnp.asarray(with_singular_values(values, 30, 12)[None], jnp.float32)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    polar, ratio = jnp.asarray(left @ right), jnp.asarray([12**-0.5])
    advance = jax.jit(lambda r: sharp_factor(matrix, polar, r, 0.3))
    found = []
    for _ in range(80):
        factor, ratio = advance(ratio)
        found.append(round(float(jnp.sum(factor**2))))
    # floor(.3 * 12) + 1 = 4, around which the feedback swings by one.
    assert set(found[-30:]) <= {3, 4, 5} and found[0] != 4


@pytest.fixture(scope="module")
def two_steps():
    """Second update and last state of LITE by its gains in the two steps, and of Muon.

    ``still`` is a first update of LITE without a gradient.
    """
    others = optax.adamw(0.1, weight_decay=0.3)

    def lite(gains):
        return lite_muon(0.1, others, flat_gain=lambda count: gains[count], weight_decay=0.3)

    plain = optax.contrib.muon(
        0.1,
        POLAR_COEFFICIENTS,
        len(POLAR_COEFFICIENTS),
        weight_decay=0.3,
        muon_weight_dimension_numbers=matrix_axes,
        consistent_rms=0.2,
    )
    update = jax.jit(lambda gains, *rest: lite(gains).update(*rest))
    muon_update = jax.jit(lambda _, *rest: plain.update(*rest))
    runs = [("muon", (0.0, 0.0))] + [(gains, gains) for gains in ((1, 1), (2, 2), (3, 3), (1, 2))]
    out = {}
    for name, gains in runs:
        gains, step = jnp.asarray(gains, jnp.float32), muon_update if name == "muon" else update
        state = (plain if name == "muon" else lite(gains)).init(draw(0))
        for seed in (1, 2):
            updates, state = step(gains, draw(seed), state, draw(0))
        out[name] = updates, state
    nothing = jax.tree.map(jnp.zeros_like, draw(0))
    out["still"] = update(
        jnp.full(2, 3.0, jnp.float32), nothing, lite(gains).init(draw(0)), draw(0)
    )
    assert update._cache_size() == 1
    return out


def close(left, right):
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def test_with_gain_one_matrices_move_as_with_muon(two_steps):
    for name in ("query", "output", "down"):
        close(two_steps[1, 1][0][name], two_steps["muon"][0][name])


def test_the_gain_multiplies_the_flat_part_of_step_and_decay_and_no_other_parameter(two_steps):
    (one, _), (two, state), (three, _) = (two_steps[gain, gain] for gain in (1, 2, 3))
    for name in ("query", "output", "down"):
        extra = np.asarray(two[name] - one[name])
        np.testing.assert_allclose(three[name] - one[name], 2 * extra, rtol=1e-3, atol=1e-5)
        share = np.linalg.norm(extra) / np.linalg.norm(one[name])
        assert 0.7 < share < 1.0  # most directions are flat, not all
    np.testing.assert_array_equal(three["scale"], one["scale"])
    ratios = jax.tree.leaves(state.inner_states["matrix"].inner_state.sharp_ratio)
    assert [x.shape for x in ratios] == [(2,)] * 3


def test_without_gradient_all_is_flat_and_decays_as_much_faster(two_steps):
    for name in ("query", "output", "down"):
        close(two_steps["still"][0][name], -3.0 * 0.1 * 0.3 * draw(0)[name])


def test_a_gain_may_be_a_schedule(two_steps):
    """Neither momentum nor threshold knows the gain, so that the second step has its own."""
    jax.tree.map(close, two_steps[1, 2][0], two_steps[2, 2][0])


def test_a_step_keeps_the_type_of_the_parameters():
    chain = lite_muon(0.1, optax.sgd(0.1))
    small = draw(0, jnp.bfloat16)
    updates, _ = jax.eval_shape(lambda: chain.update(small, chain.init(small), small))
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "settings, message",
    [(dict(flat_gain=0.5), "flat_gain is 0.5"), (dict(sharp_share=1.0), "sharp_share is 1.0")],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        lite_muon(0.1, optax.sgd(0.1), **settings)
