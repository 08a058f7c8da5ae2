"""What a training step carries from one step to the next."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxlab.config import ModelConfig
from jaxlab.models.decoder import abstract_decoder, initial_parameters
from jaxlab.sharding.rules import is_spread, state_shardings


class TrainState(struct.PyTreeNode):
    """Parameters, optimizer state, random key and the number of steps taken in this stage."""

    params: PyTree
    opt_state: PyTree
    # A random key and a count; in a template for restoring they are shapes, not arrays.
    key: PyTree
    step: PyTree


def start_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state before the first step of a stage: given parameters, a fresh optimizer.

    On a mesh of several devices the optimizer's state is made where the parameters lie.
    """
    key, step = jax.random.key(seed), jnp.zeros((), jnp.int32)
    if not is_spread(mesh):
        return TrainState(params, jax.jit(optimizer.init)(params), key, step)
    lies = jax.tree.map(lambda x: x.sharding, params)
    shapes = jax.eval_shape(optimizer.init, params)
    opt_state = jax.jit(optimizer.init, out_shardings=state_shardings(mesh, shapes, lies))(params)
    whole = NamedSharding(mesh, PartitionSpec())
    return TrainState(params, opt_state, *jax.device_put((key, step), whole))


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    mesh: Mesh | AbstractMesh | None = None,
) -> TrainState:
    """Shapes of the state of a model, with their shardings on a mesh of several devices."""
    _, params = abstract_decoder(config, mesh)
    state = jax.eval_shape(lambda p: start_state(p, optimizer, seed=seed), params)
    if not is_spread(mesh):
        return state
    lies = state_shardings(mesh, state, jax.tree.map(lambda x: x.sharding, params))
    return jax.tree.map(lambda x, s: x.update(sharding=s), state, lies)


def fresh_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, *, seed: int
) -> TrainState:
    """The state of a new model."""
    return start_state(initial_parameters(config, seed), optimizer, seed=seed)
