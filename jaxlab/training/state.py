"""What a training step carries from one step to the next."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import PyTree

from jaxlab.config import ModelConfig
from jaxlab.models.decoder import initial_parameters


class TrainState(struct.PyTreeNode):
    """Parameters, optimizer state, random key and the number of steps taken in this stage."""

    params: PyTree
    opt_state: PyTree
    # A random key and a count; in a template for restoring they are shapes, not arrays.
    key: PyTree
    step: PyTree


def start_state(
    params: PyTree, optimizer: optax.GradientTransformation, *, seed: int
) -> TrainState:
    """The state before the first step of a stage: given parameters, a fresh optimizer."""
    return TrainState(
        params=params,
        opt_state=jax.jit(optimizer.init)(params),
        key=jax.random.key(seed),
        step=jnp.zeros((), jnp.int32),
    )


def fresh_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, *, seed: int
) -> TrainState:
    """The state of a new model."""
    return start_state(initial_parameters(config, seed), optimizer, seed=seed)
