"""Batches on a mesh: which rows a process reads, and how they become arrays of all processes."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab.config import MeshConfig
from jaxlab.sharding.mesh import make_mesh
from jaxlab.sharding.rules import batch_sharding, is_spread
from jaxlab.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class BatchPlace:
    """Where batches of ``size`` rows lie on a mesh."""

    mesh: Mesh
    size: int

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """The rows that devices of this process hold, in rising order; each once."""
        sharding = batch_sharding(self.mesh)
        if sharding is None:
            return tuple(range(self.size))
        held = sharding.addressable_devices_indices_map((self.size,)).values()
        return tuple(sorted({row for (part,) in held for row in range(self.size)[part]}))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """The batch on the devices, from the arrays of this process's :attr:`rows`."""
        sharding, rows = batch_sharding(self.mesh), self.rows
        if sharding is None or sharding.is_fully_addressable:
            return jax.device_put(batch, sharding)
        at = {row: place for place, row in enumerate(rows)}

        def spread(local: np.ndarray) -> Array:
            shape = (self.size, *local.shape[1:])
            parts = [
                jax.device_put(local[[at[row] for row in range(self.size)[index[0]]]], device)
                for device, index in sharding.addressable_devices_indices_map(shape).items()
            ]
            return jax.make_array_from_single_device_arrays(shape, sharding, parts)

        return {name: spread(local) for name, local in batch.items()}

    def whole(self, tree: PyTree) -> PyTree:
        """A copy on every device of a mesh that is this process's own."""
        if not is_spread(self.mesh):
            return tree
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))


def local_place(rows: int) -> BatchPlace:
    """So many rows on each device of this process, whatever the others do."""
    devices = jax.local_devices()
    mesh = make_mesh(MeshConfig(data=len(devices), fsdp=1), devices)
    return BatchPlace(mesh, rows * len(devices))
