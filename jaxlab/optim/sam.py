"""SAM: step with the gradient of a nearby point, around any optax chain (arXiv 2010.01412).

    optimizer = ire(sam(optax.sgd(0.1, momentum=0.9), rho=0.05), kappa=1.0, gamma=0.99)
    updates, state = optimizer.update(grads, state, params, grad_fn=fn, curvature_fn=...)

``fn(params)`` returns the gradient on this step's batch. The base steps from the original
parameters, so that its momentum and weight decay act there, and what stands behind SAM in a chain,
such as IRE, never multiplies the climb.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, UInt32

GradFn = Callable[[PyTree], PyTree]

# Keeps a vanishing gradient from being divided by 0; no other effect in float32.
_TINY = 1e-12


class AverageSamState(NamedTuple):
    """Key of the next perturbation, and the state of the base."""

    perturbation_key: UInt32[Array, "..."]
    base: PyTree


def sam(
    base: optax.GradientTransformation, rho: float | Array
) -> optax.GradientTransformationExtraArgs:
    """``base`` fed with the gradient at ``params + rho g/|g|``, one global norm (equation 2).

    The state is that of the base. ``update`` needs ``grad_fn``, a gradient as a function of the
    parameters, and costs one evaluation of it. Within ``optax.MultiSteps`` that is of the last
    micro-batch alone.

    Raises ValueError for a negative ``rho`` and, when ``update`` is traced, without ``grad_fn``.
    """
    _check_radius(rho)
    inner = optax.with_extra_args_support(base)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, PyTree]:
        there = _gradient_fn(grad_fn)(_moved(params, updates, rho))
        return inner.update(there, state, params, grad_fn=grad_fn, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def average_sam(
    base: optax.GradientTransformation, rho: float | Array, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """``base`` fed with the gradient at ``params + rho xi/|xi|`` with Gaussian xi.

    The average SAM of the paper of IRE (arXiv 2405.20763, section 5). The gradient passed to
    ``update`` gives shapes only: what is used is ``grad_fn`` at the moved parameters.

    Raises ValueError for a negative ``rho`` and, when ``update`` is traced, without ``grad_fn``.
    """
    _check_radius(rho)
    inner = optax.with_extra_args_support(base)

    def init(params: PyTree) -> AverageSamState:
        return AverageSamState(jax.random.key_data(jax.random.key(seed)), inner.init(params))

    def update(
        updates: PyTree,
        state: AverageSamState,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, AverageSamState]:
        following, now = jax.random.split(jax.random.wrap_key_data(state.perturbation_key))
        direction = optax.tree.random_like(now, jax.tree.map(_widened, updates))
        there = _gradient_fn(grad_fn)(_moved(params, direction, rho))
        out, base_state = inner.update(there, state.base, params, grad_fn=grad_fn, **extra_args)
        return out, AverageSamState(jax.random.key_data(following), base_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(params: PyTree | None, direction: PyTree, rho: float | Array) -> PyTree:
    """``params`` moved by ``rho`` along a direction, in the types of the parameters."""
    if params is None:
        raise ValueError("sam moves the parameters: pass params to update")
    # Squares of float16 gradients would be 0.
    direction = jax.tree.map(_widened, direction)
    scale = rho / (optax.tree.norm(direction) + _TINY)
    return jax.tree.map(lambda p, d: (p + scale * d).astype(p.dtype), params, direction)


def _widened(leaf: Array) -> Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _gradient_fn(grad_fn: GradFn | None) -> GradFn:
    if grad_fn is None:
        raise ValueError("sam needs a second gradient: pass grad_fn=f(params) to update")
    return grad_fn


def _check_radius(rho: float | Array) -> None:
    # Within optax.inject_hyperparams the radius is an array.
    if isinstance(rho, int | float) and rho < 0:
        raise ValueError(f"rho is {rho}: it must be at least 0")
