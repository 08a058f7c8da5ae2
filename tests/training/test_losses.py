"""Laws of the block-wise cross-entropy: it is the plain definition, value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.training import losses
from jaxlab.training.losses import cross_entropy_sum, token_log_probabilities

BATCH, LENGTH, WIDTH, VOCAB = 2, 12, 8, 40


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Six blocks of two positions instead of one that holds everything."""
    monkeypatch.setattr(losses, "BLOCK_LOGITS", 4 * VOCAB)
    monkeypatch.setattr(losses, "BLOCK_POSITIONS", {"cpu": 4})
    assert losses._block_length(BATCH, LENGTH, VOCAB) == 2


def example(dtype=jnp.float32):
    """Hidden states, weights, targets, and a mask with zeros and with a fraction."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH), dtype)
    weights = jax.random.normal(keys[1], (WIDTH, VOCAB))
    targets = jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCAB)
    mask = jnp.ones((BATCH, LENGTH)).at[0, 3:7].set(0.0).at[1, -1].set(0.5)
    return hidden, weights, targets, mask


def plain(hidden, weights, targets, mask):
    """The definition, all logits at once."""
    logits = jnp.matmul(hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)
    log_probability = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_probability, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * mask)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


def both(*args):
    gradient_of = [jax.jit(jax.value_and_grad(f, (0, 1))) for f in (cross_entropy_sum, plain)]
    return tuple(function(*args) for function in gradient_of)


def test_loss_and_gradients_equal_the_plain_definition():
    ours, definition = both(*example())
    assert_close(ours, definition)


def test_a_scale_behind_the_loss_reaches_both_gradients():
    args = example()

    def scaled(function):
        return jax.jit(jax.grad(lambda *x: 0.25 * function(*x), (0, 1)))(*args)

    assert_close(scaled(cross_entropy_sum), scaled(plain))


def test_masked_positions_give_no_loss_and_no_gradient():
    hidden, weights, targets, mask = example()
    gradient_of = jax.jit(jax.value_and_grad(cross_entropy_sum, (0, 1)))
    before = gradient_of(hidden, weights, targets, mask)
    off = mask == 0
    changed = jnp.where(off[..., None], 7.0, hidden), weights, jnp.where(off, 1, targets), mask
    after = gradient_of(*changed)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1][1], after[1][1])
    assert not np.any(np.asarray(after[1][0])[np.asarray(off)])


def test_an_entirely_masked_batch_costs_nothing():
    hidden, weights, targets, mask = example()
    loss, gradients = jax.value_and_grad(cross_entropy_sum, (0, 1))(
        hidden, weights, targets, jnp.zeros_like(mask)
    )
    assert loss == 0.0
    assert not any(np.any(np.asarray(gradient)) for gradient in gradients)


def test_tied_weights_receive_the_gradients_of_both_uses():
    _, weights, targets, mask = example()
    inputs = jnp.roll(targets, 1, axis=1)

    def through(function):
        def loss(table):
            return function(jnp.tanh(table[inputs]), table.T, targets, mask)

        return jax.jit(jax.value_and_grad(loss))(weights.T)

    assert_close(through(cross_entropy_sum), through(plain))


def test_token_log_probabilities_sum_to_the_loss_and_are_log_softmax():
    hidden, weights, targets, mask = example()
    each = token_log_probabilities(hidden, weights, targets)
    assert each.shape == targets.shape
    np.testing.assert_allclose(
        -jnp.sum(each * mask), plain(hidden, weights, targets, mask), rtol=1e-5
    )
    one = plain(hidden, weights, targets, jnp.zeros_like(mask).at[1, 5].set(1.0))
    np.testing.assert_allclose(each[1, 5], -one, rtol=1e-5)


def test_bfloat16_hidden_states_keep_a_float32_loss_and_weight_gradient():
    hidden, weights, targets, mask = example(jnp.bfloat16)
    ours, definition = both(hidden, weights, targets, mask)
    assert ours[0].dtype == jnp.float32
    assert [x.dtype for x in ours[1]] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(ours[0], definition[0], rtol=1e-5)
    for a, b in zip(ours[1], definition[1], strict=True):
        # Slopes are rounded to 8 bits before the matrix products.
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0.05, atol=0.05)


def test_huge_logits_neither_overflow_nor_lose_the_loss():
    hidden, weights, targets, mask = example()
    loss, gradients = jax.value_and_grad(cross_entropy_sum, (0, 1))(
        hidden * 1e4, weights, targets, mask
    )
    np.testing.assert_allclose(loss, plain(hidden * 1e4, weights, targets, mask), rtol=1e-5)
    assert all(np.all(np.isfinite(np.asarray(gradient))) for gradient in gradients)


def test_tokens_are_drawn_as_often_as_the_model_says():
    """Also where the vocabulary is no square, so that the last group is filled up."""
    hidden, weights, _, _ = example()
    draw = jax.jit(lambda key: losses.sampled_targets(hidden, 3 * weights[:, :37], key))
    drawn = jax.vmap(draw)(jax.random.split(jax.random.key(1), 4000))
    expected = jax.nn.softmax(jnp.matmul(hidden, 3 * weights[:, :37]))
    counted = jnp.mean(jax.nn.one_hot(drawn, 37), axis=0)
    error = jnp.sqrt(expected * (1 - expected) / 4000)
    assert float(jnp.max(jnp.abs(counted - expected) / (error + 1e-4))) < 5.5
    assert int(drawn.min()) >= 0 and int(drawn.max()) < 37


def test_what_is_certain_is_drawn_always():
    hidden = jnp.eye(8)[None]
    weights = 200.0 * jnp.eye(8, VOCAB)
    drawn = losses.sampled_targets(hidden, weights, jax.random.key(0))
    np.testing.assert_array_equal(drawn, jnp.arange(8)[None])
