"""Which directions are flat: the mask of IRE and its refresh (arXiv 2405.20763, equation 5).

Coordinates are ranked by magnitude of a curvature; a share of them, in all or in each group of
leaves, is flat. Everything here is pure and works on shards.
"""

from collections.abc import Callable
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32, PyTree

from jaxlab.optim.curvature import squared
from jaxlab.optim.threshold import (
    AxisName,
    Count,
    add,
    as_float,
    count_of,
    count_true,
    finite_bits,
    kth_smallest_bits,
    magnitude_bits,
    share_of,
    subtract,
)

Scalar = float | Callable[[Array], Any] | Array


class FlatDirectionsState(NamedTuple):
    """What the transformation remembers; one byte a parameter, four more with an average.

    ``flat_mask`` is sharded like the parameters and False until the first refresh. The diagnostics
    are those of the last refresh: share of coordinates that are flat, share of exact zeros, and the
    threshold of each group. ``optax.tree.map_params`` tells its parts when the scope is global.
    """

    count: Int32[Array, ""]
    flat_mask: PyTree
    curvature_average: PyTree
    curvature_key: Array
    flat_fraction: Float32[Array, ""]
    zero_fraction: Float32[Array, ""]
    flat_threshold: dict[str, Float32[Array, ""]]


class Ranking(NamedTuple):
    """How coordinates are ranked: the settings that a refresh needs."""

    gamma: Scalar
    scope: str | PyTree = "global"
    param_mask: PyTree | Callable[[PyTree], PyTree] | None = None
    rank_zeros: bool = True
    decay: float | Array | None = None
    axis_name: AxisName = None


def initial_state(params: PyTree, ranking: Ranking, seed: int | Array) -> FlatDirectionsState:
    """The state before the first refresh; parameters may be shapes alone."""
    average = None
    if ranking.decay is not None:
        average = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
    # The name of the one group is known without parameters: optax.tree.map_params gives none.
    scope = ranking.scope
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


def refreshed(
    state: FlatDirectionsState, curvature: PyTree, ranking: Ranking
) -> FlatDirectionsState:
    """The state with the mask of a new curvature; the old mask where there are no finite values."""
    values, average = _own_part(curvature, state.flat_mask), state.curvature_average
    groups = _groups(values, ranking, state.flat_mask)
    if ranking.decay is not None:
        values, average = _averaged(average, values, ranking.decay)
    bits = {i: magnitude_bits(values[i]) for members in groups.values() for i in members}
    if not bits:
        raise ValueError("no parameter takes part: param_mask leaves nothing to rank")
    old, structure = jax.tree.flatten(state.flat_mask)
    new, thresholds = [jnp.zeros_like(mask) for mask in old], dict(state.flat_threshold)
    gamma = value_at(ranking.gamma, state.count)
    for label, members in groups.items():
        tau = _threshold([bits[i] for i in members], gamma, ranking)
        thresholds[label] = jax.lax.bitcast_convert_type(tau, jnp.float32)
        for i in members:
            new[i] = jnp.where(finite_bits(tau), bits[i] <= tau, old[i])
    axes, sizes = ranking.axis_name, [part.size for part in bits.values()]
    # A Python integer beyond int32 cannot meet an array.
    total = float(_whole(sizes, axes))
    return state._replace(
        flat_mask=jax.tree.unflatten(structure, new),
        curvature_average=average,
        flat_fraction=as_float(count_true([new[i] for i in bits], axes)) / total,
        zero_fraction=as_float(count_true([part == 0 for part in bits.values()], axes)) / total,
        flat_threshold=thresholds,
    )


def _own_part(curvature: PyTree, mask: PyTree) -> list[Array]:
    """Leaves of a curvature that belong to a mask's. Raises ValueError where one does not fit."""

    def own(part: Any, given: PyTree) -> PyTree:
        # Within optax.masked and optax.partition only some leaves are this state's.
        return part if isinstance(part, optax.MaskedNode) else given

    def masked(part: Any) -> bool:
        return isinstance(part, optax.MaskedNode)

    try:
        mine = jax.tree.map(own, mask, curvature, is_leaf=masked)
    except ValueError:
        mine = None
    if jax.tree.structure(mine) != jax.tree.structure(mask):
        raise ValueError(
            f"curvature is not a tree like the parameters: {jax.tree.structure(curvature)}"
            f" in place of {jax.tree.structure(mask)}"
        )
    for (path, leaf), value in zip(
        jax.tree_util.tree_leaves_with_path(mask), jax.tree.leaves(mine), strict=True
    ):
        if jnp.shape(value) != leaf.shape:
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"curvature{where} has shape {jnp.shape(value)}: the parameter's is {leaf.shape}"
            )
    return jax.tree.leaves(mine)


def _averaged(
    average: PyTree, values: list[Array], decay: float | Array
) -> tuple[list[Array], PyTree]:
    """What ranks the coordinates, a leaf each, and the new average of squares.

    What is not finite is sharp this time and leaves its part of the average as it was.
    """
    kept, structure = jax.tree.flatten(average)
    ranked, new = [], []
    for old, value in zip(kept, values, strict=True):
        square = squared(value)
        known = jnp.isfinite(square)
        mean = decay * old + (1 - decay) * square
        ranked.append(jnp.where(known, mean, jnp.inf))
        new.append(jnp.where(known, mean, old).astype(old.dtype))
    return ranked, jax.tree.unflatten(structure, new)


def _groups(values: list[Array], ranking: Ranking, tree: PyTree) -> dict[str, list[int]]:
    """Numbers of the leaves that share a threshold, by label; only of leaves that take part."""
    groups: dict[str, list[int]] = {}
    takes_part = _taking_part(ranking.param_mask, tree)
    for index, label in enumerate(group_labels(ranking.scope, tree)):
        if takes_part[index] and jnp.issubdtype(values[index].dtype, jnp.inexact):
            groups.setdefault(label, []).append(index)
    return groups


def _threshold(bits: list[Array], gamma: Any, ranking: Ranking) -> Array:
    """Bits of the largest magnitude that is flat: the floor(gamma p)-th smallest (eq. 5)."""
    axes = ranking.axis_name
    size = _whole([part.size for part in bits], axes)
    if not ranking.rank_zeros:
        zeros = count_true([part == 0 for part in bits], axes)
        others: Count = subtract(count_of(size), zeros)
        rank = add(zeros, share_of(jnp.float32(gamma), others))
    elif isinstance(gamma, Real):
        # The decimal as it is written: in binary .29 * 100 is less than 29.
        rank = count_of(max(1, int(Fraction(str(gamma)) * size)))
    else:
        rank = share_of(jnp.float32(gamma), count_of(size))
    return kth_smallest_bits(bits, rank, axes)


def _whole(sizes: list[int], axis_name: AxisName) -> int:
    """Elements of all shards of arrays that have these sizes on each."""
    return sum(sizes) * (1 if axis_name is None else jax.lax.axis_size(axis_name))


def flat_states(opt_state: PyTree) -> list[FlatDirectionsState]:
    """All states of the transformation within an optimizer's; two parts of a partition have two."""

    def one(part: Any) -> bool:
        return isinstance(part, FlatDirectionsState)

    return [part for part in jax.tree.leaves(opt_state, is_leaf=one) if one(part)]


def flat_shares(opt_state: PyTree) -> dict[str, Array]:
    """Shares of flat coordinates and of exact zeros at the last refresh, by parameters' mean.

    An empty dictionary when there is no mask. Pure; may be jitted.
    """
    states = flat_states(opt_state)
    sizes = [float(sum(x.size for x in jax.tree.leaves(state.flat_mask))) for state in states]

    def mean(values: list[Array]) -> Array:
        return sum(n / sum(sizes) * x for n, x in zip(sizes, values, strict=True))

    if not states:
        return {}
    return {
        "flat_fraction": mean([state.flat_fraction for state in states]),
        "zero_fraction": mean([state.zero_fraction for state in states]),
    }


def flat_fractions(opt_state: PyTree, labels: Callable[[PyTree], PyTree] | None = None) -> dict:
    """Share of flat coordinates in each group of parameters, wherever in a state the mask is.

    ``labels`` maps a tree like the parameters to one of group names; None: each leaf by its path.
    An empty dictionary when there is no mask. Pure; may be jitted.
    """
    flat: dict[str, list[Array]] = {}
    for state in flat_states(opt_state):
        mask = state.flat_mask
        names = group_labels("tensor", mask) if labels is None else jax.tree.leaves(labels(mask))
        for name, leaf in zip(names, jax.tree.leaves(mask), strict=True):
            flat.setdefault(name, []).append(leaf)
    return {
        name: as_float(count_true(leaves)) / float(sum(leaf.size for leaf in leaves))
        for name, leaves in flat.items()
    }


def value_at(value: Scalar, count: Array) -> Any:
    """A number, or what a schedule says at a step."""
    return value(count) if callable(value) else value


def group_labels(scope: str | PyTree, tree: PyTree) -> list[str]:
    """The group of each leaf."""
    if scope == "global":
        return ["global"] * len(jax.tree.leaves(tree))
    if scope == "tensor":
        return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    if isinstance(scope, str):
        raise ValueError(f"scope is {scope!r}: choose global, tensor or a pytree of labels")
    return [str(label) for label in _for_each_leaf(scope, tree, "scope")]


def _taking_part(param_mask: Any, tree: PyTree) -> list[bool]:
    if param_mask is None:
        return [True] * len(jax.tree.leaves(tree))
    mask = param_mask(tree) if callable(param_mask) else param_mask
    return [bool(x) for x in _for_each_leaf(mask, tree, "param_mask")]


def _for_each_leaf(prefix: PyTree, tree: PyTree, keyword: str) -> list[Any]:
    """What a tree like the parameters, or a prefix of it, says of each leaf.

    Found by path: within ``optax.masked`` and ``optax.partition`` a node without leaves stands in
    ``tree`` for a leaf, or for a whole branch, of the parameters that is not this state's.
    """
    said = dict(jax.tree_util.tree_leaves_with_path(prefix))
    out = []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        above = [path[:depth] for depth in range(len(path) + 1) if path[:depth] in said]
        if len(above) != 1:
            where = jax.tree_util.keystr(path)
            raise ValueError(f"{keyword} is not a tree like the parameters: it has no {where}")
        out.append(said[above[0]])
    return out
