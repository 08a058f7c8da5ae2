"""Laws of the curvature that a training step hands to IRE, on the tiny decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlab.config import IREConfig, OptimizerConfig, ScheduleConfig, StageConfig
from jaxlab.models.decoder import abstract_decoder
from jaxlab.optim import curvature as estimators
from jaxlab.optim import make_optimizer
from jaxlab.training import curvature
from jaxlab.training.curvature import batch_curvature, share_of_rows, spread_rows
from jaxlab.training.state import start_state
from jaxlab.training.step import SequenceFormat, train_step
from tests.models.tiny import random_tokens, tiny_config, tiny_decoder

SMALL = tiny_config(layers=1, memory_layers=0)
FORM = SequenceFormat(bos_id=1)
PARTS = {"graphdef": abstract_decoder(SMALL)[0], "form": FORM}
PARAMS = nnx.to_pure_dict(nnx.split(tiny_decoder(SMALL))[1])
KEY = jax.random.key(0)
ROWS, LENGTH = 4, 8
BATCH = {
    "tokens": random_tokens(1, ROWS, LENGTH),
    "loss_mask": jnp.asarray(np.arange(LENGTH) < np.array([8, 5, 3, 6])[:, None], jnp.float32),
}
STAGE = StageConfig(
    steps=10, batch_size=ROWS, learning_rate=0.01, schedule=ScheduleConfig(warmup_steps=2)
)


def close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right)


def apart(left, right) -> bool:
    return any(
        not np.allclose(a, b, rtol=1e-3, atol=1e-7)
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


def logits(params, tokens):
    decoder = nnx.merge(PARTS["graphdef"], params)
    return (decoder(FORM.inputs(tokens))[0] @ decoder.unembedding()).astype(jnp.float32)


def test_the_mean_of_squares_over_draws_is_that_of_the_plain_estimator():
    """Labels are drawn in another way than by the estimator for any model, from the same law."""
    config = IREConfig(kappa=1.0, draws=2000)
    found = jax.jit(batch_curvature(config, **PARTS))(PARAMS, KEY, BATCH)
    plain = jax.jit(
        lambda key: estimators.sampled_label_root_fisher(
            logits, PARAMS, key, BATCH["tokens"], draws=2000, weights=BATCH["loss_mask"]
        )
    )(KEY)
    count = float(BATCH["loss_mask"].sum())
    ours = np.concatenate([np.ravel(x) ** 2 * count for x in jax.tree.leaves(found)])
    theirs = np.concatenate([np.ravel(x) ** 2 for x in jax.tree.leaves(plain)])
    assert np.corrcoef(ours, theirs)[0, 1] > 0.995
    assert ours.sum() == pytest.approx(theirs.sum(), rel=0.03)


def test_the_labels_of_the_data_give_the_gradient_of_training():
    config = IREConfig(kappa=1.0, curvature="empirical")
    found = batch_curvature(config, **PARTS)(PARAMS, KEY, BATCH)

    def loss(params):
        rows = jax.nn.log_softmax(logits(params, BATCH["tokens"]))
        chosen = jnp.take_along_axis(rows, BATCH["tokens"][..., None], -1)[..., 0]
        return -jnp.sum(chosen * BATCH["loss_mask"]) / jnp.sum(BATCH["loss_mask"])

    close(found, jax.grad(loss)(PARAMS), rtol=1e-4, atol=1e-7)


def test_micro_batches_add_up_to_the_whole_batch(monkeypatch):
    """With labels that do not depend on the key, parts give what the whole gives."""
    monkeypatch.setattr(
        curvature, "sampled_targets", lambda hidden, weights, key: jnp.argmax(hidden @ weights, -1)
    )
    config = IREConfig(kappa=1.0)
    whole = batch_curvature(config, **PARTS)(PARAMS, KEY, BATCH)
    parts = batch_curvature(config, **PARTS, accumulation=2)(PARAMS, KEY, BATCH)
    close(whole, parts, rtol=1e-4, atol=1e-7)


def test_a_share_of_the_batch_is_rows_at_even_distances():
    half = {name: value[::2] for name, value in BATCH.items()}
    config = IREConfig(kappa=1.0, curvature="empirical")
    found = batch_curvature(IREConfig(kappa=1.0, curvature="empirical", batch_share=0.5), **PARTS)
    close(found(PARAMS, KEY, BATCH), batch_curvature(config, **PARTS)(PARAMS, KEY, half), rtol=1e-6)
    assert apart(found(PARAMS, KEY, BATCH), batch_curvature(config, **PARTS)(PARAMS, KEY, BATCH))


@pytest.mark.parametrize(
    "rows, accumulation, share, groups, expected",
    [
        (8, 1, 1.0, 1, (8, 1)),
        (8, 1, 0.25, 1, (2, 1)),
        (8, 1, 0.01, 1, (1, 1)),
        (8, 4, 1.0, 1, (8, 4)),
        (8, 4, 0.5, 1, (4, 2)),
        (8, 4, 0.25, 1, (2, 1)),
        (8, 4, 0.4, 1, (4, 2)),  # whole micro-batches, rounded up
        (8, 1, 0.25, 4, (4, 1)),  # a row for each group of devices
        (512, 1, 0.25, 256, (256, 1)),
    ],
)
def test_a_share_keeps_the_size_of_micro_batches(rows, accumulation, share, groups, expected):
    assert share_of_rows(rows, accumulation, share, groups) == expected


def test_rows_are_spread_over_the_batch_also_where_they_do_not_divide_it():
    rows = jnp.arange(12).reshape(6, 2)
    assert spread_rows(rows, 3)[:, 0].tolist() == [0, 4, 8]
    assert spread_rows(rows, 4)[:, 0].tolist() == [0, 2, 6, 8]


def test_another_key_draws_other_labels_and_random_ranks_look_at_nothing():
    found = batch_curvature(IREConfig(kappa=1.0), **PARTS)
    other = jax.random.key(1)
    assert apart(found(PARAMS, KEY, BATCH), found(PARAMS, other, BATCH))
    random = batch_curvature(IREConfig(kappa=1.0, curvature="random"), **PARTS)
    spoilt = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    close(random(PARAMS, KEY, BATCH), random(spoilt, KEY, BATCH))
    assert apart(random(PARAMS, KEY, BATCH), random(PARAMS, other, BATCH))


@pytest.mark.parametrize("sam_radius", [None, 0.05])
def test_the_step_with_ire_moves_flat_coordinates_further_and_the_others_as_before(sam_radius):
    """From the end of warmup on, and by 1 + kappa times the base's step; SAM's included."""
    base = OptimizerConfig(sam_radius=sam_radius, clip_norm=1.0)
    with_ire = OptimizerConfig(
        sam_radius=sam_radius, clip_norm=1.0, ire=IREConfig(kappa=3.0, gamma=0.6)
    )
    moved, states = {}, {}
    for name, config in (("base", base), ("ire", with_ire)):
        optimizer = make_optimizer(config, STAGE, seed=5)
        found = config.ire and batch_curvature(config.ire, **PARTS)
        step = jax.jit(
            lambda state, o=optimizer, c=found: train_step(
                state, BATCH, optimizer=o, curvature=c, **PARTS
            )
        )
        state = start_state(PARAMS, optimizer, seed=0)
        for _ in range(2):
            state, numbers = step(state)
        before = state.params
        state, numbers = step(state)
        moved[name] = jax.tree.map(jnp.subtract, state.params, before)
        states[name] = (before, state, numbers)
    close(states["base"][0], states["ire"][0], rtol=1e-4, atol=1e-6)  # the warmup is the base's
    mask = optax.tree.get(states["ire"][1].opt_state, "flat_mask")
    assert float(states["ire"][2]["flat_fraction"]) == pytest.approx(0.6, abs=1e-3)
    expected = jax.tree.map(lambda u, flat: u * jnp.where(flat, 4.0, 1.0), moved["base"], mask)
    close(moved["ire"], expected, rtol=1e-2, atol=1e-5)
    assert "flat_fraction" not in states["base"][2]
