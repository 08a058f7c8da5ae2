"""Next-token cross-entropy without ever holding all logits.

The vocabulary is the widest axis of the model: logits of a whole batch would be its largest array
by far. The loss walks over blocks of positions and takes the gradient of each block where its
logits are at hand, so the backward pass neither stores nor recomputes them. On several devices each
walks over its own rows and its part of the vocabulary, and what they found is summed once.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.sharding.ops import by_device, cut_axes
from kernels_pallas.dispatch import target_platform

# Logits of one block: a million numbers stay in a CPU's cache; with a wide vocabulary at least so
# many positions, so that the matrix products stay large. Every block reads and writes the gradient
# of the head, which on an accelerator costs more than the memory of the logits.
BLOCK_LOGITS = 1 << 20
BLOCK_POSITIONS = {"cpu": 256, "gpu": 4096, "tpu": 2048}

ROWS = ("batch", None)
NAMES = {
    "hidden": ("batch", None, None),
    # Whole in the width: it is gathered once, not in every block.
    "weights": (None, "vocab"),
    "targets": ROWS,
    "mask": ROWS,
    "uniform": ROWS,
}


def _block_length(batch: int, length: int, vocab: int) -> int:
    """Positions of each sequence in one block: the largest allowed divisor of ``length``."""
    allowed = max(BLOCK_LOGITS // vocab, BLOCK_POSITIONS[target_platform()]) // batch
    return max(n for n in range(1, length + 1) if length % n == 0 and n <= max(allowed, 1))


def _blocks(x: Array, block: int) -> Array:
    batch, length = x.shape[:2]
    return x.reshape(batch, length // block, block, *x.shape[2:]).swapaxes(0, 1)


def _map_blocks(function: Callable[..., Array], vocab: int, *arrays: Array) -> Array:
    """``function`` of one block of positions after the other: a value for each position."""
    batch, length = arrays[0].shape[:2]
    block = _block_length(batch, length, vocab)
    out = jax.lax.map(lambda parts: function(*parts), tuple(_blocks(x, block) for x in arrays))
    return out.swapaxes(0, 1).reshape(batch, length)


def _vocabulary_axes(vocab: int) -> tuple[str, ...]:
    """Axes of the mesh over which the vocabulary is cut; asked outside of what each device does."""
    return cut_axes(vocab=vocab)["vocab"]


def _own(index: Int[Array, "*rows"], size: int, over: tuple[str, ...]) -> Int[Array, "*rows"]:
    """Indices into this device's part of the vocabulary; outside of 0 to size for the others'."""
    return index - jax.lax.axis_index(over) * size if over else index


def _log_probabilities(hidden, weights, targets, over):
    """Logits and own targets of this device's part, and over all parts normaliser and answer."""
    logits = jnp.matmul(hidden, weights, preferred_element_type=jnp.float32)
    top = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits, axis=-1)), over)
    mass = jax.lax.psum(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), over)
    normaliser = top + jnp.log(mass)
    own = _own(targets, logits.shape[-1], over)
    target = jax.lax.psum(_at(logits, own), over)
    return logits, own, normaliser, target - normaliser


def token_log_probabilities(
    hidden: Float[Array, "B T D"], weights: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Natural logarithm of the probability of each target, in float32."""
    over = _vocabulary_axes(weights.shape[1])

    def on_device(hidden, weights, targets):
        def one(rows, wanted):
            return _log_probabilities(rows, weights, wanted, over)[-1]

        return _map_blocks(one, weights.shape[1], hidden, targets)

    given = {"hidden": hidden, "weights": weights.astype(hidden.dtype), "targets": targets}
    return by_device(on_device, given, NAMES, ROWS)


def sampled_targets(
    hidden: Float[Array, "B T D"], weights: Float[Array, "D V"], key: Array
) -> Int[Array, "B T"]:
    """A token for each position, drawn from the model's own distribution; no gradient flows."""
    over = _vocabulary_axes(weights.shape[1])

    def on_device(hidden, weights, uniform):
        def one(rows, numbers):
            logits = jnp.matmul(rows, weights, preferred_element_type=jnp.float32)
            return _drawn(logits, numbers, over)

        return _map_blocks(one, weights.shape[1], hidden, uniform)

    hidden, weights = jax.lax.stop_gradient((hidden, weights.astype(hidden.dtype)))
    # Drawn for all positions at once: the same numbers however blocks and devices are cut.
    uniform = jax.random.uniform(key, hidden.shape[:2])
    given = {"hidden": hidden, "weights": weights, "uniform": uniform}
    return by_device(on_device, given, NAMES, ROWS)


def _drawn(
    logits: Float[Array, "*rows V"], uniform: Float[Array, "*rows"], over: tuple[str, ...] = ()
) -> Int[Array, "*rows"]:
    """An index of the last axis, drawn with probability softmax(logits) by a number in [0, 1).

    Inverts the cumulative sum, first over the devices that share the vocabulary, then over groups
    of it and then within one: a random number a row, where ``jax.random.categorical`` takes one for
    each logit and longer than the logits themselves.
    """
    vocab, rows = logits.shape[-1], logits.shape[:-1]
    width = math.isqrt(vocab - 1) + 1
    top = jax.lax.pmax(jnp.max(logits, axis=-1, keepdims=True), over)
    mass = jnp.pad(jnp.exp(logits - top), [(0, 0)] * len(rows) + [(0, -vocab % width)])
    groups = mass.reshape(*rows, -1, width)
    upto = jnp.cumsum(jnp.sum(groups, axis=-1), axis=-1)
    aim, device = _device_of(uniform, upto[..., -1], over)
    group, rest = _descend(upto, aim)
    chosen = jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :]
    inside, _ = _descend(jnp.cumsum(chosen, axis=-1), rest)
    index = jnp.minimum(group * width + inside, vocab - 1)
    if not over:
        return index
    number = jax.lax.axis_index(over)
    return jax.lax.psum(jnp.where(device == number, number * vocab + index, 0), over)


def _device_of(
    uniform: Float[Array, "*rows"], mass: Float[Array, "*rows"], over: tuple[str, ...]
) -> tuple[Float[Array, "*rows"], Int[Array, "*rows"]]:
    """What to look for in this device's part, and the number of the device that has it."""
    if not over:
        return uniform * mass, jnp.zeros(mass.shape, jnp.int32)
    upto = jnp.cumsum(jax.lax.all_gather(mass, over, axis=-1), axis=-1)
    device, aim = _descend(upto, uniform * upto[..., -1])
    return aim, device


def _descend(
    rising: Float[Array, "*rows N"], aim: Float[Array, "*rows"]
) -> tuple[Int[Array, "*rows"], Float[Array, "*rows"]]:
    """Index of the first element above ``aim`` (the last where rounding leaves none), and what of
    ``aim`` is left beyond the element before."""
    below = jnp.sum(rising <= aim[..., None], axis=-1)
    index = jnp.minimum(below, rising.shape[-1] - 1)
    return index, aim - _at(rising, index - 1)


def _at(values: Float[Array, "*rows N"], index: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """The value at each index; 0 for one outside, such as an index that another device has."""
    inside = (index >= 0) & (index < values.shape[-1])
    found = jnp.take_along_axis(values, jnp.where(inside, index, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(inside, found, 0.0)


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
    axes = cut_axes(batch=len(targets), embed=weights.shape[0], vocab=weights.shape[1])
    over = axes["vocab"]
    # Devices with other rows each have a part of the gradient of the weights.
    scattered = tuple(axis for axis in axes["embed"] if axis in axes["batch"])
    summed = tuple(axis for axis in axes["batch"] if axis not in scattered)

    def on_device(hidden, weights, targets, mask):
        loss, rows, columns = _loss_and_gradients(hidden, weights, targets, mask, over)
        loss, columns = jax.lax.psum((loss, columns), summed)
        if scattered:
            loss = jax.lax.psum(loss, scattered)
            columns = jax.lax.psum_scatter(columns, scattered, scatter_dimension=0, tiled=True)
        return [loss, jax.lax.psum(rows, over), columns]

    loss, rows, columns = by_device(
        on_device,
        {
            "hidden": hidden,
            "weights": weights.astype(hidden.dtype),
            "targets": targets,
            "mask": mask,
        },
        NAMES,
        [(), NAMES["hidden"], ("embed" if scattered else None, "vocab")],
    )
    return loss, (rows, columns.astype(weights.dtype))


def _loss_and_gradients(hidden, weights, targets, mask, over):
    """One device's loss and its gradients to its rows and its columns of the weights."""
    batch, length = targets.shape
    block = _block_length(batch, length, weights.shape[1])

    def one(carry, args):
        loss, gradient = carry
        rows, wanted, share = args
        logits, own, normaliser, answer = _log_probabilities(rows, weights, wanted, over)
        probabilities = jnp.exp(logits - normaliser[..., None])
        hot = jax.nn.one_hot(own, logits.shape[-1], dtype=jnp.float32)
        slope = ((probabilities - hot) * share[..., None]).astype(rows.dtype)
        gradient += jnp.einsum("btd,btv->dv", rows, slope, preferred_element_type=jnp.float32)
        rows_gradient = jnp.einsum("btv,dv->btd", slope, weights)
        return (loss - jnp.sum(answer * share), gradient), rows_gradient

    start = (jnp.zeros((), jnp.float32), jnp.zeros(weights.shape, jnp.float32))
    args = tuple(_blocks(x, block) for x in (hidden, targets, mask))
    (loss, columns), rows = jax.lax.scan(one, start, args)
    return loss, rows.swapaxes(0, 1).reshape(hidden.shape), columns


def _backward(gradients, scale):
    hidden_gradient, weights_gradient = gradients
    return (
        hidden_gradient * scale.astype(hidden_gradient.dtype),
        weights_gradient * scale.astype(weights_gradient.dtype),
        None,
        None,
    )


cross_entropy_sum.defvjp(_forward, _backward)
