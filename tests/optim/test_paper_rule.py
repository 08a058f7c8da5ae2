"""Ten steps of IRE in float64 against the published rule, written out in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.optim import ire, sam
from jaxlab.optim.curvature import sampled_label_gradient

EXAMPLES, FEATURES, WIDTH, CLASSES = 12, 5, 7, 3
KAPPA, GAMMA, INTERVAL, START, STEPS = 2.0, 0.6, 3, 2, 10
RATE, MOMENTUM, RHO = 0.1, 0.9, 0.05
B1, B2, EPS = 0.9, 0.95, 1e-8
DECAY = {"adamw": 0.1, "sgd": 0.02, "sam": 0.02}

DRAW = np.random.default_rng(0)
INPUTS = DRAW.standard_normal((EXAMPLES, FEATURES))
LABELS = DRAW.integers(0, CLASSES, EXAMPLES)
SHAPES = {"b1": (WIDTH,), "w1": (FEATURES, WIDTH), "w2": (WIDTH, CLASSES)}
BEGIN = {name: DRAW.standard_normal(shape) for name, shape in SHAPES.items()}

# ---------------------------------------------------------------------------- plain numpy


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(tree[name]) for name in SHAPES])


def parts(vector: np.ndarray) -> dict:
    ends = np.cumsum([np.prod(shape) for shape in SHAPES.values()])[:-1]
    pieces = np.split(vector, ends)
    return {n: x.reshape(s) for (n, s), x in zip(SHAPES.items(), pieces, strict=True)}


def forward(theta):
    p = parts(theta)
    hidden = np.tanh(INPUTS @ p["w1"] + p["b1"])
    return p, hidden, hidden @ p["w2"]


def mean_gradient(theta, labels):
    """Of the mean cross-entropy, by hand."""
    p, hidden, scores = forward(theta)
    error = np.exp(scores - scores.max(1, keepdims=True))
    error /= error.sum(1, keepdims=True)
    error[np.arange(EXAMPLES), labels] -= 1
    error /= EXAMPLES
    back = (error @ p["w2"].T) * (1 - hidden**2)
    return flat({"w2": hidden.T @ error, "w1": INPUTS.T @ back, "b1": back.sum(0)})


def drawn_labels(theta, step):
    """The labels that step's key draws; all that is not numpy here."""
    key = jax.random.fold_in(jax.random.key(0), step)
    return np.asarray(jax.random.categorical(key, jnp.float32(forward(theta)[2])))


def published_rule(base: str) -> tuple[list, list]:
    """Parameters after each step, and the mask in use."""
    theta, first, second = flat(BEGIN), 0.0, 0.0
    mask = np.zeros(len(theta), bool)
    trajectory, masks = [], []
    for t in range(STEPS):
        if t >= START and (t - START) % INTERVAL == 0:
            h = np.abs(mean_gradient(theta, drawn_labels(theta, t)))
            k = int(GAMMA * len(theta))
            mask = h <= np.partition(h, k - 1)[k - 1]
        g = mean_gradient(theta, LABELS)
        if base == "adamw":
            first = B1 * first + (1 - B1) * g
            second = B2 * second + (1 - B2) * g**2
            hat = first / (1 - B1 ** (t + 1)), second / (1 - B2 ** (t + 1))
            u = -RATE * (hat[0] / (np.sqrt(hat[1]) + EPS) + DECAY[base] * theta)
        else:
            if base == "sam":
                g = mean_gradient(theta + RHO * g / np.linalg.norm(g), LABELS)
            first = MOMENTUM * first + g + DECAY[base] * theta
            u = -RATE * first
        theta = theta + u * (1 + KAPPA * mask)
        trajectory.append(theta)
        masks.append(mask)
    return trajectory, masks


# ---------------------------------------------------------------------------- with optax


def logits(params):
    return jnp.tanh(INPUTS @ params["w1"] + params["b1"]) @ params["w2"]


def gradient(params):
    return jax.grad(
        lambda p: optax.losses.softmax_cross_entropy_with_integer_labels(logits(p), LABELS).mean()
    )(params)


def momentum(decay):
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(RATE, momentum=MOMENTUM))


BASES = {
    "adamw": lambda decay: optax.adamw(RATE, B1, B2, EPS, weight_decay=decay),
    "sgd": momentum,
    "sam": lambda decay: sam(momentum(decay), RHO),
}


@pytest.mark.parametrize("base", BASES)
def test_ten_steps_are_those_of_the_published_rule(base):
    expected, masks = published_rule(base)
    with jax.enable_x64(True):
        optimizer = ire(
            BASES[base](DECAY[base]), KAPPA, GAMMA, update_interval=INTERVAL, start_step=START
        )

        @jax.jit
        def step(params, state):
            updates, state = optimizer.update(
                gradient(params),
                state,
                params,
                grad_fn=gradient,
                curvature_fn=lambda p, key: sampled_label_gradient(logits, p, key),
            )
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.asarray, BEGIN)
        state = optimizer.init(params)
        for t in range(STEPS):
            params, state = step(params, state)
            np.testing.assert_array_equal(flat(state[-1].flat_mask), masks[t])
            np.testing.assert_allclose(flat(params), expected[t], rtol=1e-6, atol=1e-9)
        assert params["w1"].dtype == np.float64
    assert len({mask.tobytes() for mask in masks}) == 4  # none, and one for each refresh
