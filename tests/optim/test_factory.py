"""One step of each chain against its rule in plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlab.config import (
    BlockwiseConfig,
    IREConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
)
from jaxlab.models.decoder import abstract_decoder
from jaxlab.optim import decay_mask, make_optimizer, make_schedule
from jaxlab.optim.blocks import matrix_axes
from tests.models.tiny import tiny_config

STAGE = StageConfig(
    steps=100, batch_size=1, learning_rate=0.5, schedule=ScheduleConfig(warmup_steps=5)
)
RATES = [0.1, 0.2, 0.3]


def make_params(seed: int) -> dict:
    """Three stacked layers: the norm's scale has two axes, like the output matrix."""
    draw = np.random.default_rng(seed)
    shapes = {"kernel": (3, 4, 5), "scale": (3, 4)}
    layers = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {"layers": layers, "head": draw.normal(size=(4, 7)).astype(np.float32)}


def clipped(grads: dict, norm: float) -> dict:
    total = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda g: g * min(1.0, norm / total), grads)


def run(optimizer: OptimizerConfig, params: dict, grads: list[dict]) -> dict:
    chain = make_optimizer(optimizer, STAGE)
    params = jax.tree.map(jnp.asarray, params)
    state = chain.init(params)
    for grad in grads:
        updates, state = chain.update(jax.tree.map(jnp.asarray, grad), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adamw_steps_equal_the_rule_with_scales_left_undecayed():
    config = OptimizerConfig(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3, clip_norm=2.0)
    params, grads = make_params(0), [make_params(seed) for seed in (1, 2, 3)]
    expected = jax.tree.map(np.float64, params)
    mu = nu = jax.tree.map(np.zeros_like, expected)
    decay = {"layers": {"kernel": 0.3, "scale": 0.0}, "head": 0.3}
    for t, (rate, grad) in enumerate(zip(RATES, grads, strict=True), start=1):
        grad = clipped(grad, 2.0)
        mu = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, mu, grad)
        nu = jax.tree.map(lambda n, g: 0.9 * n + 0.1 * g**2, nu, grad)

        def step(p, m, n, d, rate=rate, t=t):
            direction = (m / (1 - 0.8**t)) / (np.sqrt(n / (1 - 0.9**t)) + 1e-3)
            return p - rate * (direction + d * p)

        expected = jax.tree.map(step, expected, mu, nu, decay)
    # float32 against float64 over three steps
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
        run(config, params, grads),
        expected,
    )


def test_sgd_steps_equal_the_rule_without_clipping():
    config = OptimizerConfig(name="sgd", momentum=0.5, weight_decay=0.1, clip_norm=None)
    params, grads = make_params(0), [make_params(1), make_params(2)]
    expected, velocity = params, jax.tree.map(np.zeros_like, params)
    decay = {"layers": {"kernel": 0.1, "scale": 0.0}, "head": 0.1}
    for rate, grad in zip(RATES[:2], grads, strict=True):
        total = jax.tree.map(lambda g, p, d: g + d * p, grad, expected, decay)
        velocity = jax.tree.map(lambda v, g: 0.5 * v + g, velocity, total)
        expected = jax.tree.map(lambda p, v, rate=rate: p - rate * v, expected, velocity)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        run(config, params, grads),
        expected,
    )


def test_the_mask_goes_by_name_in_dictionaries_and_in_flax_states():
    class Norm(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones((3, 4)))

    class Model(nnx.Module):
        def __init__(self):
            self.norm, self.kernel = Norm(), nnx.Param(jnp.ones((3, 4)))

    state = nnx.state(Model())
    for params in (state, nnx.to_pure_dict(state)):
        mask = decay_mask(params)
        flat = jax.tree_util.tree_flatten_with_path(mask)[0]
        assert sorted(("scale" in jax.tree_util.keystr(k), v) for k, v in flat) == [
            (False, True),
            (True, False),
        ]


def test_the_second_update_compiles_nothing_new():
    chain = make_optimizer(OptimizerConfig(), STAGE)
    params = jax.tree.map(jnp.asarray, make_params(0))
    update = jax.jit(chain.update)
    state = jax.jit(chain.init)(params)
    for seed in (1, 2, 3):
        grads = jax.tree.map(jnp.asarray, make_params(seed))
        _, state = update(grads, state, params)
    assert update._cache_size() == 1


# ---------------------------------------------------------------------------- muon


def decoder_like(seed: int) -> dict:
    """Two stacked layers of 2 heads of 3 beside an embedding and a norm."""
    draw = np.random.default_rng(seed)
    shapes = {
        "query": (2, 4, 2, 3),
        "output": (2, 2, 3, 4),
        "up": (2, 4, 7),
        "down": (2, 7, 4),
        "embedding": (5, 4),
        "scale": (2, 4),
    }
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_muon_moves_each_layers_matrix_by_its_gradients_polar_factor():
    """Update P = U S' V' of gradient G = U S V': P G' is symmetric, S' nearly constant."""
    config = OptimizerConfig(name="muon", weight_decay=0.0, clip_norm=None)
    params, grad = decoder_like(0), decoder_like(1)
    moved = run(config, params, [grad])
    sides = {"query": (4, 6), "output": (6, 4), "up": (4, 7), "down": (7, 4)}
    for name, shape in sides.items():
        for layer in range(2):
            step = (np.asarray(moved[name]) - params[name])[layer].reshape(shape)
            product = -step @ grad[name][layer].reshape(shape).T
            np.testing.assert_allclose(product, product.T, atol=1e-4 * np.abs(product).max())
            assert np.linalg.eigvalsh(product).min() > -1e-5
            sizes = np.linalg.svd(step, compute_uv=False) / (RATES[0] * 0.2 * max(shape) ** 0.5)
            assert (sizes > 0.5).all() and (sizes < 1.5).all()


def test_muon_leaves_everything_but_the_layers_matrices_to_adamw():
    params, grads = decoder_like(0), [decoder_like(1), decoder_like(2)]
    shared = dict(weight_decay=0.3, clip_norm=2.0, b1=0.8, b2=0.9)
    muon = run(OptimizerConfig(name="muon", **shared), params, grads)
    adamw = run(OptimizerConfig(name="adamw", **shared), params, grads)
    for name in ("embedding", "scale"):
        np.testing.assert_allclose(muon[name], adamw[name], rtol=1e-6)
    assert np.abs(muon["query"] - adamw["query"]).max() > 1e-3


def test_muon_knows_every_matrix_of_the_decoder_and_nothing_else():
    _, params = abstract_decoder(tiny_config())
    axes = jax.tree_util.tree_leaves_with_path(
        matrix_axes(params), is_leaf=lambda x: x is None or hasattr(x, "reduction_axis")
    )
    for (path, leaf), (_, found) in zip(
        jax.tree_util.tree_leaves_with_path(params), axes, strict=True
    ):
        assert (found is not None) == ("stacks" in str(path) and "scale" not in str(path))
        if found is not None:
            flat = np.r_[0, found.reduction_axis, found.output_axis]
            assert sorted(flat) == list(range(leaf.ndim))


# ---------------------------------------------------------------------------- around the base


def moved_by(config: OptimizerConfig, params: dict, grad: dict, **extra) -> dict:
    """The first step's change of each leaf."""
    chain = make_optimizer(config, STAGE)
    update, _ = chain.update(
        jax.tree.map(jnp.asarray, grad),
        chain.init(params),
        jax.tree.map(jnp.asarray, params),
        **extra,
    )
    return update


def test_blockwise_rates_multiply_the_whole_step_of_each_kind_of_block():
    params, grad = decoder_like(0), decoder_like(1)
    plain = moved_by(OptimizerConfig(), params, grad)
    ours = moved_by(OptimizerConfig(blockwise=BlockwiseConfig(query_key=3.0)), params, grad)
    factors = {"query": 3.0, "output": 4.0, "up": 6.0, "down": 6.0, "embedding": 10.0, "scale": 1.0}
    for name, factor in factors.items():
        np.testing.assert_allclose(ours[name], factor * plain[name], rtol=1e-6)


def test_powers_are_taken_of_the_clipped_gradient():
    params, grad = make_params(0), make_params(1)
    config = OptimizerConfig(name="sgd", momentum=0.0, weight_decay=0.0, clip_norm=1.0)
    ours = moved_by(dataclasses.replace(config, gradient_power=1.2), params, grad)
    raised = jax.tree.map(lambda g: np.sign(g) * np.abs(g) ** 1.2, clipped(grad, 1.0))
    expected = moved_by(dataclasses.replace(config, clip_norm=None), params, raised)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, expected)


def test_sam_clips_and_steps_with_the_gradient_of_the_climbed_point():
    params, grad, there = make_params(0), make_params(1), make_params(2)
    config = OptimizerConfig(name="sgd", momentum=0.0, weight_decay=0.0, clip_norm=1.0)
    climbed = {}

    def grad_fn(at):
        climbed["point"] = at
        return there

    ours = moved_by(dataclasses.replace(config, sam_radius=0.5), params, grad, grad_fn=grad_fn)
    expected = moved_by(config, params, there)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, expected)
    total = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in jax.tree.leaves(grad)))
    jax.tree.map(
        lambda at, p, g: np.testing.assert_allclose(at, p + 0.5 * g / total, rtol=1e-5),
        *(climbed["point"], params, grad),
    )


@pytest.mark.parametrize("follows", ["nothing", "learning-rate"])
def test_ire_starts_when_warmup_ends_and_its_strength_may_follow_the_rate(follows):
    schedule = ScheduleConfig(name="warmup-cosine", warmup_steps=2)
    stage = StageConfig(steps=6, batch_size=1, learning_rate=0.5, schedule=schedule)
    ire = IREConfig(kappa=3.0, gamma=1.0, kappa_follows=follows)
    config = OptimizerConfig(name="sgd", momentum=0.0, weight_decay=0.0, clip_norm=None)
    chain = make_optimizer(dataclasses.replace(config, ire=ire), stage)
    base = make_optimizer(config, stage)
    params = {"scale": jnp.ones(3)}
    state, base_state, rate = chain.init(params), base.init(params), make_schedule(stage)
    for step in range(6):
        ours, state = chain.update(params, state, params, curvature_fn=lambda p, key: p)
        plain, base_state = base.update(params, base_state, params)
        share = 1.0 if follows == "nothing" else float(rate(step)) / 0.5
        factor = 1.0 if step < 2 else 1 + 3 * share
        np.testing.assert_allclose(ours["scale"], factor * plain["scale"], rtol=1e-5)


def test_lite_leaves_everything_but_the_layers_matrices_to_adamw():
    params, grads = decoder_like(0), [decoder_like(1), decoder_like(2)]
    lite = run(OptimizerConfig(name="lite-muon", weight_decay=0.3), params, grads)
    adamw = run(OptimizerConfig(weight_decay=0.3), params, grads)
    for name in ("embedding", "scale"):
        np.testing.assert_allclose(lite[name], adamw[name], rtol=1e-6)
    assert np.abs(lite["query"] - adamw["query"]).max() > 1e-3
