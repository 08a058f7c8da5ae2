"""Functions of whole arrays that every device computes for its own part of them.

XLA spreads what it can see into. A kernel it cannot; and where a loop adds up a gradient, it would
sum over all devices in every turn. Such functions are given to each device apart.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxlab.sharding.rules import axes_of, is_spread, parts_of
from jaxlab.typing import PyTree

Names = tuple[str | None, ...]


def cut_axes(**sizes: int) -> dict[str, tuple[str, ...]]:
    """The mesh axes that cut an axis of each logical name and size, under the mesh in use.

    Names that share an axis of the mesh, such as ``heads`` and ``kv_heads``, are cut together or,
    when one of the sizes does not divide, none of them: () for those.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not is_spread(mesh):
        return dict.fromkeys(sizes, ())
    whole = {axes_of(name) for name, size in sizes.items() if size % parts_of(mesh, name)}
    return {name: () if axes_of(name) in whole else axes_of(name) for name in sizes}


def by_device(
    function: Callable[..., Any],
    arguments: Mapping[str, PyTree],
    names: Mapping[str, Names],
    result: PyTree,
) -> Any:
    """``function(**arguments)``, on a mesh of several devices each of them for its part.

    ``names`` has the logical names of the axes of each argument, which all its leaves share;
    ``result`` those of what comes back: a tuple of names, or a list of such tuples. What is cut
    :func:`cut_axes` says; what it leaves whole is computed by all. An argument may be None.
    """
    if not is_spread(jax.sharding.get_abstract_mesh()):
        return function(**arguments)
    sizes: dict[str, int] = {}
    for argument, value in arguments.items():
        for leaf in jax.tree.leaves(value):
            for name, size in zip(names[argument], leaf.shape, strict=True):
                if name:
                    # What divides all sizes of a name divides their greatest common divisor.
                    sizes[name] = math.gcd(sizes.get(name, 0), size)
    # What only comes back has no size yet: the function has cut it.
    cut = cut_axes(**sizes)

    def partition(named: Names) -> PartitionSpec:
        return PartitionSpec(
            *((cut.get(name, axes_of(name)) or None) if name else None for name in named)
        )

    given = {name: value for name, value in arguments.items() if value is not None}
    absent = dict.fromkeys(arguments.keys() - given.keys())
    for_each = jax.shard_map(
        lambda given: function(**given, **absent),
        in_specs=({name: partition(names[name]) for name in given},),
        out_specs=jax.tree.map(partition, result, is_leaf=lambda part: isinstance(part, tuple)),
        check_vma=False,
    )
    return for_each(given)
