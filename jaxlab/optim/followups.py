"""Relatives of IRE that need no curvature: each is one link of an optax chain."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxlab.optim.blocks import block_labels
from jaxlab.training_config import BlockwiseConfig

# Larger steps for blocks with less sharpness (arXiv 2502.19002, equation 4). The paper has no
# number for an untied head; its code keeps it at the base rate.
BLOCKWISE: Mapping[str, float] = MappingProxyType(
    {"norm": 1.0, **dataclasses.asdict(BlockwiseConfig())}
)


def scale_by_block(
    multipliers: Mapping[str, float] = BLOCKWISE,
    labels: Callable[[PyTree], PyTree] = block_labels,
) -> optax.GradientTransformationExtraArgs:
    """A learning rate for each kind of block; belongs last in a chain (arXiv 2502.19002).

    ``labels`` maps parameters to a tree of the names that ``multipliers`` has. Decoupled weight
    decay in front of it is multiplied too, as with a learning rate of its own.

    Raises ValueError for a label without a multiplier.
    """

    def known(params: PyTree) -> PyTree:
        found = labels(params)
        missing = sorted(set(jax.tree.leaves(found)) - set(multipliers))
        if missing:
            raise ValueError(f"no multiplier for {', '.join(missing)}: add one to scale_by_block")
        return found

    return optax.partition(
        {name: optax.scale(factor) for name, factor in multipliers.items()}, known
    )


def grad_power(power: float) -> optax.GradientTransformation:
    """sign(g) |g|^power, in front of any base (GradPower, arXiv 2505.24275; power about 1.2).

    Raises ValueError for a power that is not positive.
    """
    if power <= 0:
        raise ValueError(f"power is {power}: it must be positive")

    def raised(gradient: Array) -> Array:
        return jnp.sign(gradient) * jnp.abs(gradient) ** power

    return optax.stateless(lambda updates, _: jax.tree.map(raised, updates))
