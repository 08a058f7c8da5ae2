"""The one table from logical names of axes to axes of the mesh, and what is derived from it.

Parameters carry their logical names (``nnx.Param(..., out_sharding=...)``); optimizer state, flat
mask and curvature lie as the parameter does that they belong to; everything else has its name here.
"""

import contextlib
import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxlab.typing import Array, PyTree

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Rows of a batch; references and their memories come with the rows that read them.
    "batch": ("replica", "data", "fsdp"),
    # Parameters. Layers are scanned one by one, and a head is never cut.
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "head_dim": None,
    # Activations keep whole rows: weights are gathered, not activations.
    "length": None,
    "width": None,
}


def spec(*names: str | None) -> PartitionSpec:
    """The partition of an array whose axes have these logical names; None is never cut."""
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def parameter_shardings(mesh: Mesh | AbstractMesh, abstract: PyTree) -> PyTree:
    """The sharding of each parameter: ``abstract`` is an nnx state with its metadata."""
    logical = nnx.to_pure_dict(nnx.get_partition_spec(abstract))
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(*names)),
        logical,
        is_leaf=lambda part: isinstance(part, PartitionSpec),
    )


def state_shardings(mesh: Mesh | AbstractMesh, state: PyTree, parameters: PyTree) -> PyTree:
    """The sharding of each leaf of a training state, or of any tree that repeats the parameters.

    A leaf whose path ends like a parameter's lies as that one does; others are whole on all
    devices.
    """
    by_path = dict(jax.tree.leaves_with_path(parameters))
    whole = NamedSharding(mesh, PartitionSpec())

    def of(path: tuple, leaf: Any) -> NamedSharding:
        found = (by_path.get(path[start:]) for start in range(len(path)))
        # What a parameter is scaled by may be a single number.
        return next((s for s in found if s is not None and len(s.spec) == leaf.ndim), whole)

    return jax.tree_util.tree_map_with_path(of, state)


def batch_sharding(mesh: Mesh) -> NamedSharding | None:
    """Of every array of a batch, whose first axis counts rows; None on one device."""
    return NamedSharding(mesh, spec("batch")) if is_spread(mesh) else None


def is_spread(mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether there is a mesh and it has several devices: on one, nothing needs a sharding."""
    return mesh is not None and mesh.size > 1


def current_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """``jax.set_mesh`` of a mesh of several devices.

    Not of one device: there a state that was made without a mesh has another type than what a step
    under it gives, and the step would be compiled a second time for its own results.
    """
    return jax.set_mesh(mesh) if is_spread(mesh) else contextlib.nullcontext()


def axes_of(name: str) -> tuple[str, ...]:
    """The axes of the mesh that cut an axis of this logical name."""
    axes = RULES[name]
    return (axes,) if isinstance(axes, str) else axes or ()


def parts_of(mesh: Mesh | AbstractMesh, name: str) -> int:
    """Into how many parts a mesh cuts the axis of this logical name."""
    return math.prod(mesh.shape[axis] for axis in axes_of(name))


def groups_of_devices() -> int:
    """Into how many parts the current mesh cuts a batch; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return parts_of(mesh, "batch") if is_spread(mesh) else 1


def constrain(x: Array, *names: str | None) -> Array:
    """``x`` with its partition fixed by the names of its axes, under a mesh of several devices.

    An axis that the mesh does not divide (a batch of one) is left whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not is_spread(mesh):
        return x
    fitting = (
        None if name is None or size % parts_of(mesh, name) else name
        for name, size in zip(names, x.shape, strict=True)
    )
    return jax.lax.with_sharding_constraint(x, spec(*fitting))
