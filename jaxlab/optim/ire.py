"""IRE: a larger step along flat directions, for any optax chain (arXiv 2405.20763).

    optimizer = ire(optax.adamw(3e-4), kappa=2.0, gamma=0.6, start_step=500)
    updates, state = optimizer.update(grads, state, params, curvature_fn=fn)

``fn(params, key)`` returns a pytree like the parameters whose magnitudes rank them by curvature,
such as ``jaxlab.optim.curvature.sampled_label_gradient``. The share ``gamma`` of coordinates with
the smallest magnitudes is flat, and there the update of the base is multiplied by ``1 + kappa``
(equations 4 and 5). What enters the moments of the base is not.
"""

import inspect
from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jaxlab.optim.flat_mask import (
    FlatDirectionsState,
    Ranking,
    Scalar,
    group_labels,
    initial_state,
    refreshed,
    value_at,
)
from jaxlab.optim.threshold import AxisName

CurvatureFn = Callable[..., PyTree]


def scale_flat_directions(
    kappa: Scalar,
    gamma: Scalar = 0.8,
    *,
    update_interval: int | Array | None = 10,
    start_step: int | Array = 0,
    curvature: CurvatureFn | None = None,
    curvature_decay: float | Array | None = None,
    scope: str | PyTree = "global",
    param_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    rank_zeros: bool = True,
    axis_name: AxisName = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by ``1 + kappa`` on the flat coordinates; belongs last in a chain.

    Args:
      kappa: strength, at least 0; a number or a schedule of the step.
      gamma: share of coordinates that is flat, in (0, 1]; a number or a schedule.
      update_interval: steps between two refreshes of the mask (K); None: only
        ``refresh_flat_mask`` or ``refresh`` renews it.
      start_step: step of the first refresh (T_w); before it the base is unchanged.
      curvature: estimator ``f(params, key, ...)`` for every refresh; it gets those of the extra
        arguments of ``update`` that it names, or all where it has a ``**parameter``.
      curvature_decay: weight of the past in a running average of squares, so that what is averaged
        should have the size of a gradient; None or 0: the paper's, without one.
      scope: one threshold for all (``global``), one for each ``tensor``, or a pytree of group
        labels, one for each label.
      param_mask: pytree of booleans (or a function of a tree like the parameters): leaves that take
        part; others are neither ranked nor boosted.
      rank_zeros: whether exact zeros (unseen embedding rows, dead units) count in the share.
      axis_name: axes of ``jax.shard_map`` along which every leaf is split, to find the threshold of
        the whole and not of each shard; a leaf that is not split counts once for each shard. Under
        plain ``jit`` None, however things are sharded.
      seed: of the keys that estimators get, a fresh one each refresh.

    ``update`` takes a curvature in one of three ways: the estimator above; ``curvature_fn(params,
    key)`` as an extra argument, evaluated on refresh steps only; or the tree itself as
    ``curvature``. ``refresh`` says when to take it instead of ``update_interval``.

    All numbers may be arrays, as within ``optax.inject_hyperparams``, which takes functions for
    schedules: name ``curvature`` and ``param_mask`` in its ``static_args``.

    Raises ValueError for settings that cannot be, and, when ``update`` is traced, for a refresh
    without any curvature.
    """
    _check_settings(
        kappa=kappa,
        gamma=gamma,
        update_interval=update_interval,
        start_step=start_step,
        curvature_decay=curvature_decay,
    )
    decay = None if _is_zero(curvature_decay) else curvature_decay
    ranking, estimator = Ranking(gamma, scope, param_mask, rank_zeros, decay, axis_name), curvature

    def init(params: PyTree) -> FlatDirectionsState:
        return initial_state(params, ranking, seed)

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
        following = optax.safe_increment(state.count)
        if _is_zero(kappa):
            return updates, state._replace(count=following)
        if update_interval is not None or refresh is not None:
            source = _source(curvature, curvature_fn, estimator, extra_args)
            if curvature is None:
                _check_whole(params)
            due = refresh if refresh is not None else _due(state.count, start_step, update_interval)
            state = jax.lax.cond(
                due,
                lambda old: refreshed(old, source(params, _refresh_key(old)), ranking),
                lambda old: old,
                state,
            )
        elif curvature is not None or curvature_fn is not None:
            raise ValueError(_NEVER_REFRESHED)
        # A mask may be there before its time: from ``refresh`` or ``refresh_flat_mask``.
        factor = 1 + jnp.where(state.count >= start_step, value_at(kappa, state.count), 0)
        boosted = jax.tree.map(lambda u, flat: _boost(u, flat, factor), updates, state.flat_mask)
        return boosted, state._replace(count=following)

    return optax.GradientTransformationExtraArgs(init, update)


def ire(
    base: optax.GradientTransformation,
    kappa: Scalar,
    gamma: Scalar = 0.8,
    *,
    update_interval: int | Array | None = 10,
    start_step: int | Array = 0,
    curvature: CurvatureFn | None = None,
    curvature_decay: float | Array | None = None,
    scope: str | PyTree = "global",
    param_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    rank_zeros: bool = True,
    axis_name: AxisName = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """``base`` with its update enlarged on flat coordinates; see :func:`scale_flat_directions`."""
    # Every keyword by its name: optax.inject_hyperparams reads them off the signature.
    boost = scale_flat_directions(
        kappa,
        gamma,
        update_interval=update_interval,
        start_step=start_step,
        curvature=curvature,
        curvature_decay=curvature_decay,
        scope=scope,
        param_mask=param_mask,
        rank_zeros=rank_zeros,
        axis_name=axis_name,
        seed=seed,
    )
    return optax.chain(base, boost)


def refresh_flat_mask(
    opt_state: PyTree,
    curvature: PyTree,
    gamma: Scalar = 0.8,
    *,
    curvature_decay: float | Array | None = None,
    scope: str | PyTree = "global",
    param_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    rank_zeros: bool = True,
    axis_name: AxisName = None,
) -> PyTree:
    """``opt_state`` with a new mask, wherever in it the transformation's state is.

    For transformations made with ``update_interval=None``: the curvature comes from a program of
    its own, over a batch of its own (accumulation, SAM, models that leave no room for a second
    backward pass in the step). The state does not hold the transformation's settings: give gamma,
    scope and the others again. Pure; may be jitted.

    Raises ValueError when there is no such state, or one that other settings have made.
    """
    decay = None if _is_zero(curvature_decay) else curvature_decay
    _check_settings(gamma=gamma, curvature_decay=curvature_decay)
    ranking = Ranking(gamma, scope, param_mask, rank_zeros, decay, axis_name)
    found = []

    def renewed(part: Any) -> Any:
        if not isinstance(part, FlatDirectionsState):
            return part
        _check_made_so(part, ranking)
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
_NEVER_REFRESHED = (
    "update_interval=None never takes the curvature given to update: say when with refresh=..., or "
    "give it to refresh_flat_mask between steps"
)
_PART_OF_THE_PARAMETERS = (
    "a curvature function sees only a part of the parameters within optax.masked or "
    "optax.partition: pass curvature=TREE with refresh=..., or call refresh_flat_mask between steps"
)


def _check_made_so(state: FlatDirectionsState, ranking: Ranking) -> None:
    averages = state.curvature_average is not None
    if averages != (ranking.decay is not None):
        kept = "keeps an average" if averages else "keeps no average"
        raise ValueError(f"curvature_decay must be the transformation's: its state {kept}")
    known, labels = set(state.flat_threshold), set(group_labels(ranking.scope, state.flat_mask))
    if known != labels:
        raise ValueError(
            "scope must be the transformation's: its state has thresholds of "
            f"{', '.join(sorted(known))}"
        )


def _boost(update: Array, flat: Array, factor: Any) -> Array:
    if not jnp.issubdtype(update.dtype, jnp.inexact):
        return update
    return update * jnp.where(flat, jnp.asarray(factor), 1).astype(update.dtype)


def _due(count: Array, start_step: int | Array, update_interval: int | Array) -> Array:
    since = count - start_step
    return (since >= 0) & (since % update_interval == 0)


def _source(
    tree: PyTree | None,
    given: CurvatureFn | None,
    estimator: CurvatureFn | None,
    extra_args: dict[str, Any],
) -> Callable[[PyTree, Array], PyTree]:
    """Where a refresh takes its curvature from: a function of parameters and key."""
    if tree is not None:
        return lambda params, key: tree
    if given is not None:
        return given
    if estimator is None:
        raise ValueError(_NO_CURVATURE)
    parameters = inspect.signature(estimator).parameters
    if all(each.kind is not each.VAR_KEYWORD for each in parameters.values()):
        # What is for others in the chain, such as SAM's grad_fn, is not for it.
        extra_args = {name: value for name, value in extra_args.items() if name in parameters}
    return lambda params, key: estimator(params, key, **extra_args)


def _refresh_key(state: FlatDirectionsState) -> Array:
    return jax.random.fold_in(jax.random.wrap_key_data(state.curvature_key), state.count)


def _is_zero(number: Any) -> bool:
    """Whether a setting is known to be nothing, so that what it needs is not needed."""
    return isinstance(number, Real) and number == 0


_RULES = {
    "kappa": (lambda x: x >= 0, "at least 0"),
    "gamma": (lambda x: 0 < x <= 1, "a share in (0, 1]"),
    "update_interval": (lambda x: x >= 1 and x == int(x), "a whole number of at least 1, or None"),
    "start_step": (lambda x: x >= 0, "at least 0"),
    "curvature_decay": (lambda x: 0 <= x < 1, "in [0, 1)"),
}


def _check_settings(**settings: Any) -> None:
    """Raises ValueError; arrays and schedules, whose values are not known, pass."""
    for name, value in settings.items():
        holds, what = _RULES[name]
        if value is None and name in ("update_interval", "curvature_decay"):
            continue
        if isinstance(value, Real):
            if not holds(value):
                raise ValueError(f"{name} is {value}: it must be {what}")
        elif not callable(value) and not isinstance(value, jax.Array | np.ndarray):
            raise ValueError(f"{name} is {value!r}: it must be a number, {what}")


def _check_whole(params: PyTree) -> None:
    """Raises ValueError where only a part of the parameters is given to a curvature function."""
    leaves = jax.tree.leaves(params, is_leaf=lambda part: isinstance(part, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(_PART_OF_THE_PARAMETERS)
