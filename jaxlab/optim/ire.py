"""IRE: a larger step along flat directions, for any optax chain (arXiv 2405.20763).

    optimizer = ire(optax.adamw(3e-4), kappa=2.0, gamma=0.6, start_step=500)
    updates, state = optimizer.update(grads, state, params, curvature_fn=fn)

``fn(params, key)`` returns a pytree like the parameters whose magnitudes rank them by curvature,
such as ``jaxlab.optim.curvature.sampled_label_gradient``. The share ``gamma`` of coordinates with
the smallest magnitudes is flat, and there the update of the base is multiplied by ``1 + kappa``
(equations 4 and 5). What enters the moments of the base is not.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxlab.optim.flat_mask import (
    FlatDirectionsState,
    Ranking,
    Scalar,
    group_labels,
    refreshed,
    value_at,
)

CurvatureFn = Callable[..., PyTree]


def scale_flat_directions(
    kappa: Scalar,
    gamma: Scalar = 0.8,
    *,
    update_interval: int | None = 10,
    start_step: int = 0,
    curvature: CurvatureFn | None = None,
    curvature_decay: float = 0.0,
    scope: str | PyTree = "global",
    param_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    rank_zeros: bool = True,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by ``1 + kappa`` on the flat coordinates; belongs last in a chain.

    Args:
      kappa: strength, at least 0; a number or a schedule of the step.
      gamma: share of coordinates that is flat, in (0, 1]; a number or a schedule.
      update_interval: steps between two refreshes of the mask (K); None: only
        ``refresh_flat_mask`` or ``refresh`` renews it.
      start_step: step of the first refresh (T_w); before it the base is unchanged.
      curvature: estimator ``f(params, key, **extra_args)`` for every refresh.
      curvature_decay: weight of the past in a running average of squares (0: the paper's).
      scope: one threshold for all (``global``), one for each ``tensor``, or a pytree of group
        labels, one for each label.
      param_mask: pytree of booleans (or a function of a tree like the parameters): leaves that take
        part; others are neither ranked nor boosted.
      rank_zeros: whether exact zeros (unseen embedding rows, dead units) count in the share.
      seed: of the keys that estimators get, a fresh one each refresh.

    ``update`` takes a curvature in one of three ways: the estimator above; ``curvature_fn(params,
    key)`` as an extra argument, evaluated on refresh steps only; or the tree itself as
    ``curvature``. ``refresh`` says when to take it instead of ``update_interval``.

    Raises ValueError for settings that cannot be, and, when ``update`` is traced, for a refresh
    without any curvature.
    """
    if not callable(kappa) and not isinstance(kappa, jax.Array) and kappa < 0:
        raise ValueError(f"kappa is {kappa}: it must be at least 0")
    if not callable(gamma) and not isinstance(gamma, jax.Array) and not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}: it is a share in (0, 1]")
    if update_interval is not None and update_interval < 1:
        raise ValueError(f"update_interval is {update_interval}: it must be at least 1, or None")
    if not 0 <= curvature_decay < 1:
        raise ValueError(f"curvature_decay is {curvature_decay}: it must be in [0, 1)")
    ranking, estimator = Ranking(gamma, scope, param_mask, rank_zeros, curvature_decay), curvature

    def init(params: PyTree) -> FlatDirectionsState:
        average = None
        if curvature_decay:
            average = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        # The name of the one group is known without parameters: optax.tree.map_params gives none.
        labels = ["global"] if scope == "global" else sorted(set(group_labels(scope, params)))
        return FlatDirectionsState(
            count=jnp.zeros((), jnp.int32),
            # zeros_like keeps the sharding, also of abstract parameters and on explicit meshes.
            flat_mask=jax.tree.map(lambda x: jnp.zeros_like(x, bool), params),
            curvature_average=average,
            curvature_key=jax.random.key_data(jax.random.key(seed)),
            flat_fraction=jnp.zeros((), jnp.float32),
            zero_fraction=jnp.zeros((), jnp.float32),
            flat_threshold={label: jnp.zeros((), jnp.float32) for label in labels},
        )

    def update(
        updates: PyTree,
        state: FlatDirectionsState,
        params: PyTree | None = None,
        *,
        curvature_fn: CurvatureFn | None = None,
        curvature: PyTree | None = None,
        refresh: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, FlatDirectionsState]:
        never = update_interval is None and refresh is None
        if not never and not _is_zero(kappa):

            def source() -> PyTree:
                key = jax.random.wrap_key_data(state.curvature_key)
                key = jax.random.fold_in(key, state.count)
                if curvature is not None:
                    return curvature
                if curvature_fn is not None:
                    return curvature_fn(params, key)
                return estimator(params, key, **extra_args)

            if curvature is None and curvature_fn is None and estimator is None:
                raise ValueError(_NO_CURVATURE)
            due = refresh if refresh is not None else _due(state.count, start_step, update_interval)
            state = jax.lax.cond(
                due, lambda old: refreshed(old, source(), ranking), lambda old: old, state
            )
        factor = 1 + value_at(kappa, state.count)
        boosted = jax.tree.map(lambda u, flat: _boost(u, flat, factor), updates, state.flat_mask)
        return boosted, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def ire(
    base: optax.GradientTransformation, kappa: Scalar, gamma: Scalar = 0.8, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """``base`` with its update enlarged on flat coordinates; see :func:`scale_flat_directions`."""
    return optax.chain(base, scale_flat_directions(kappa, gamma, **settings))


def refresh_flat_mask(
    opt_state: PyTree,
    curvature: PyTree,
    gamma: Scalar = 0.8,
    *,
    curvature_decay: float = 0.0,
    scope: str | PyTree = "global",
    param_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    rank_zeros: bool = True,
) -> PyTree:
    """``opt_state`` with a new mask, wherever in it the transformation's state is.

    For transformations made with ``update_interval=None``: the curvature comes from a program of
    its own, over a batch of its own (accumulation, SAM, models that leave no room for a second
    backward pass in the step). The settings are those of the transformation. Pure; may be jitted.

    Raises ValueError when there is no such state.
    """
    ranking = Ranking(gamma, scope, param_mask, rank_zeros, curvature_decay)
    found = []

    def renewed(part: Any) -> Any:
        if not isinstance(part, FlatDirectionsState):
            return part
        found.append(part)
        return refreshed(part, curvature, ranking)

    out = jax.tree.map(
        renewed, opt_state, is_leaf=lambda part: isinstance(part, FlatDirectionsState)
    )
    if not found:
        raise ValueError("this optimizer state has no flat directions: chain scale_flat_directions")
    return out


_NO_CURVATURE = (
    "a refresh of the flat directions needs a curvature: pass curvature_fn=f(params, key) or "
    "curvature=TREE to update, make the transformation with curvature=f, or with "
    "update_interval=None and call refresh_flat_mask"
)


def _boost(update: Array, flat: Array, factor: Any) -> Array:
    if not jnp.issubdtype(update.dtype, jnp.inexact):
        return update
    return update * jnp.where(flat, jnp.asarray(factor), 1).astype(update.dtype)


def _due(count: Array, start_step: int, update_interval: int) -> Array:
    since = count - start_step
    return (since >= 0) & (since % update_interval == 0)


def _is_zero(kappa: Scalar) -> bool:
    """Whether the strength is known to be nothing: then no curvature is needed at all."""
    return isinstance(kappa, int | float) and kappa == 0
