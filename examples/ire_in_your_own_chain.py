"""AdamW with IRE on handwritten digits: optax, and one import from this package.

python examples/ire_in_your_own_chain.py
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from jaxlab.optim import ire

images, labels = (jnp.asarray(x) for x in load_digits(return_X_y=True))
images = images.astype(jnp.float32) / 16
cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


def logits(params):
    """Of two layers, for all images."""
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss(params, labels):
    """Mean cross-entropy."""
    return cross_entropy(logits(params), labels).mean()


def curvature(params, key):
    """The gradient at labels that the model draws itself: its magnitudes rank by curvature."""
    drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits(params)))
    return jax.grad(loss)(params, drawn)


optimizer = ire(optax.adamw(1e-3), kappa=2.0, gamma=0.6, start_step=20)


@jax.jit
def step(params, state):
    """One step on all images; the curvature is evaluated on every tenth alone."""
    value, grads = jax.value_and_grad(loss)(params, labels)
    updates, state = optimizer.update(grads, state, params, curvature_fn=curvature)
    return optax.apply_updates(params, updates), state, value


def main():
    """Train for 200 steps and print what happens."""
    first, second = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(first, (64, 128)) / 8,
        "b1": jnp.zeros(128),
        "w2": jax.random.normal(second, (128, 10)) / 11,
        "b2": jnp.zeros(10),
    }
    state = optimizer.init(params)
    for number in range(201):
        params, state, value = step(params, state)
        if number % 40 == 0:
            flat = float(optax.tree.get(state, "flat_fraction"))
            print(f"step {number:3d}  loss {float(value):.4f}  flat {flat:.3f}")


if __name__ == "__main__":
    main()
