"""Next-token cross-entropy without ever holding all logits.

The vocabulary is the widest axis of the model: logits of a whole batch would be its largest array
by far. The loss walks over blocks of positions and takes the gradient of each block where its
logits are at hand, so the backward pass neither stores nor recomputes them.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.sharding.rules import rows_on_a_device

# Logits of one block: a million numbers stay in a CPU's cache; with a wide vocabulary at least this
# many positions, so that the matrix products stay large.
BLOCK_LOGITS = 1 << 20
BLOCK_POSITIONS = 256


def _block_length(batch: int, length: int, vocab: int) -> int:
    """Positions of each sequence in one block: the largest allowed divisor of ``length``."""
    allowed = max(BLOCK_LOGITS // vocab, BLOCK_POSITIONS) // rows_on_a_device(batch)
    return max(n for n in range(1, length + 1) if length % n == 0 and n <= max(allowed, 1))


def _blocks(x: Array, block: int) -> Array:
    batch, length = x.shape[:2]
    return x.reshape(batch, length // block, block, *x.shape[2:]).swapaxes(0, 1)


def _log_probabilities(hidden, weights, targets):
    logits = jnp.matmul(hidden, weights, preferred_element_type=jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    target = _at(logits, targets)
    return logits, normaliser, target - normaliser


def token_log_probabilities(
    hidden: Float[Array, "B T D"], weights: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Natural logarithm of the probability of each target, in float32."""
    batch, length = targets.shape
    weights = weights.astype(hidden.dtype)
    block = _block_length(batch, length, weights.shape[1])

    def one(args):
        return _log_probabilities(args[0], weights, args[1])[2]

    out = jax.lax.map(one, (_blocks(hidden, block), _blocks(targets, block)))
    return out.swapaxes(0, 1).reshape(batch, length)


def sampled_targets(
    hidden: Float[Array, "B T D"], weights: Float[Array, "D V"], key: Array
) -> Int[Array, "B T"]:
    """A token for each position, drawn from the model's own distribution; no gradient flows."""
    batch, length = hidden.shape[:2]
    hidden, weights = jax.lax.stop_gradient((hidden, weights.astype(hidden.dtype)))
    blocks = _blocks(hidden, _block_length(batch, length, weights.shape[1]))

    def one(args):
        rows, key = args
        logits = jnp.matmul(rows, weights, preferred_element_type=jnp.float32)
        return _drawn(logits, key)

    out = jax.lax.map(one, (blocks, jax.random.split(key, len(blocks))))
    return out.swapaxes(0, 1).reshape(batch, length)


def _drawn(logits: Float[Array, "*rows V"], key: Array) -> Int[Array, "*rows"]:
    """An index of the last axis, drawn with probability softmax(logits).

    Inverts the cumulative sum, first over groups and then within one: a random number a row, where
    ``jax.random.categorical`` takes one for each logit and longer than the logits themselves.
    """
    vocab, rows = logits.shape[-1], logits.shape[:-1]
    width = math.isqrt(vocab - 1) + 1
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    mass = jnp.pad(mass, [(0, 0)] * len(rows) + [(0, -vocab % width)])
    groups = mass.reshape(*rows, -1, width)
    upto = jnp.cumsum(jnp.sum(groups, axis=-1), axis=-1)
    aim = jax.random.uniform(key, rows) * upto[..., -1]
    group = _first_above(upto, aim)
    before = jnp.where(group > 0, _at(upto, jnp.maximum(group - 1, 0)), 0.0)
    chosen = jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :]
    inside = _first_above(jnp.cumsum(chosen, axis=-1), aim - before)
    return jnp.minimum(group * width + inside, vocab - 1)


def _first_above(
    rising: Float[Array, "*rows N"], aim: Float[Array, "*rows"]
) -> Int[Array, "*rows"]:
    """Index of the first element above ``aim``; the last where rounding leaves none."""
    below = jnp.sum(rising <= aim[..., None], axis=-1)
    return jnp.minimum(below, rising.shape[-1] - 1)


def _at(values: Float[Array, "*rows N"], index: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


@jax.custom_vjp
def cross_entropy_sum(
    hidden: Float[Array, "B T D"],
    weights: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Sum over positions of mask * (-log p(target)), in nats; float32 softmax and sum."""
    return -jnp.sum(token_log_probabilities(hidden, weights, targets) * mask)


def _forward(hidden, weights, targets, mask):
    batch, length = targets.shape
    block = _block_length(batch, length, weights.shape[1])
    cast = weights.astype(hidden.dtype)

    def one(carry, args):
        loss, weights_gradient = carry
        rows, wanted, share = args
        logits, normaliser, log_probability = _log_probabilities(rows, cast, wanted)
        probabilities = jnp.exp(logits - normaliser[..., None])
        hot = jax.nn.one_hot(wanted, logits.shape[-1], dtype=jnp.float32)
        slope = ((probabilities - hot) * share[..., None]).astype(rows.dtype)
        weights_gradient += jnp.einsum(
            "btd,btv->dv", rows, slope, preferred_element_type=jnp.float32
        )
        rows_gradient = jnp.einsum("btv,dv->btd", slope, cast)
        return (loss - jnp.sum(log_probability * share), weights_gradient), rows_gradient

    start = (jnp.zeros((), jnp.float32), jnp.zeros(weights.shape, jnp.float32))
    args = tuple(_blocks(x, block) for x in (hidden, targets, mask))
    (loss, weights_gradient), rows_gradient = jax.lax.scan(one, start, args)
    hidden_gradient = rows_gradient.swapaxes(0, 1).reshape(hidden.shape)
    return loss, (hidden_gradient, weights_gradient.astype(weights.dtype))


def _backward(gradients, scale):
    hidden_gradient, weights_gradient = gradients
    return (
        hidden_gradient * scale.astype(hidden_gradient.dtype),
        weights_gradient * scale.astype(weights_gradient.dtype),
        None,
        None,
    )


cross_entropy_sum.defvjp(_forward, _backward)
