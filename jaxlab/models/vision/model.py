"""An image model as pure functions over two plain trees: parameters and batch statistics."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from jaxlab.models.vision.presets import VisionShape


@dataclass(frozen=True)
class VisionModel:
    """A shape for given classes and images.

    ``statistics`` are the running statistics of batch norm; a model without it has an empty tree.
    """

    shape: VisionShape
    classes: int
    image_size: int
    compute_dtype: str = "float32"

    def initial(self, seed: int) -> tuple[dict, dict]:
        """Fresh float32 parameters and statistics, made by one compiled program."""

        def make(key: Array) -> tuple[dict, dict]:
            return _split(self._module(nnx.Rngs(params=key)))[1:]

        # The generator with the shortest compilation, as for the decoder.
        return jax.jit(make)(jax.random.key(seed, impl="rbg"))

    def abstract(self) -> tuple[Any, dict, dict]:
        """Graph definition, and shapes of parameters and statistics: nothing is allocated."""
        return _split(nnx.eval_shape(lambda: self._module(nnx.Rngs(0))))

    def parameter_count(self) -> int:
        """Parameters of the model, counted from shapes."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract()[1]))

    def apply(
        self,
        params: PyTree,
        statistics: PyTree,
        images: Float[Array, "B h w channels"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "B classes"], PyTree]:
        """Logits in float32, and the statistics after them: the same ones unless ``train``."""
        module = nnx.merge(self._graphdef, params, statistics)
        logits = module(images.astype(self.compute_dtype), train=train)
        # Batch norm writes into this private copy of the module alone.
        return logits.astype(jnp.float32), _split(module)[2]

    @functools.cached_property
    def _graphdef(self) -> Any:
        return self.abstract()[0]

    def _module(self, rngs: nnx.Rngs) -> nnx.Module:
        return self.shape.build(classes=self.classes, image_size=self.image_size, rngs=rngs)


def _split(module: nnx.Module) -> tuple[Any, dict, dict]:
    graphdef, params, statistics = nnx.split(module, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)
