"""Vision transformers with mean pooling (arXiv 2010.11929)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.models.layers import normal
from jaxlab.models.vision.layers import LayerNorm, Linear

_STD = 0.02  # of all initial weights
_FFN = 4  # width of the feed-forward layer, in widths of the model


@dataclass(frozen=True, kw_only=True)
class ViTShape:
    """A vision transformer: patches of ``patch`` x ``patch`` pixels as tokens."""

    patch: int
    width: int
    depth: int
    heads: int

    def build(self, *, classes: int, image_size: int, rngs: nnx.Rngs) -> nnx.Module:
        """The module with fresh parameters.

        Raises ValueError when patches do not tile the image or heads do not divide the width.
        """
        if image_size % self.patch:
            raise ValueError(f"images of {image_size} pixels do not split into {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} does not split into {self.heads} heads")
        return ViT(self, classes=classes, image_size=image_size, rngs=rngs)


class EncoderBlock(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); parameters of all layers stacked."""

    def __init__(self, shape: ViTShape, *, rngs: nnx.Rngs):
        width, heads = shape.width, (shape.heads, shape.width // shape.heads)
        settings = dict(std=_STD, layers=shape.depth, rngs=rngs)
        self.norm1 = LayerNorm(width, layers=shape.depth)
        self.query = Linear((width,), heads, **settings)
        self.key = Linear((width,), heads, **settings)
        self.value = Linear((width,), heads, **settings)
        self.output = Linear(heads, (width,), **settings)
        self.norm2 = LayerNorm(width, layers=shape.depth)
        self.up = Linear((width,), (_FFN * width,), **settings)
        self.down = Linear((_FFN * width,), (width,), **settings)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = self.norm1(x)
        x = x + self.output(jax.nn.dot_product_attention(self.query(y), self.key(y), self.value(y)))
        y = self.norm2(x)
        return x + self.down(jax.nn.gelu(self.up(y), approximate=False))


class ViT(nnx.Module):
    """Patches, learned positions, blocks, norm, mean over the patches, linear classifier."""

    def __init__(self, shape: ViTShape, *, classes: int, image_size: int, rngs: nnx.Rngs):
        self.patch = shape.patch
        tokens = (image_size // shape.patch) ** 2
        self.embedding = Linear((3 * shape.patch**2,), (shape.width,), std=_STD, rngs=rngs)
        self.positions = normal(rngs, (tokens, shape.width), (None, None), _STD)
        self.blocks = EncoderBlock(shape, rngs=rngs)
        self.norm = LayerNorm(shape.width)
        self.head = Linear((shape.width,), (classes,), std=_STD, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B h w channels"], *, train: bool
    ) -> Float[Array, "B classes"]:
        del train  # no dropout and no batch statistics
        x = self.embedding(patches(x, self.patch))
        x = x + self.positions[...].astype(x.dtype)
        graphdef, stack = nnx.split(self.blocks)

        def layer(x: Array, params: dict) -> tuple[Array, None]:
            return nnx.merge(graphdef, params)(x), None

        x, _ = jax.lax.scan(layer, x, nnx.to_pure_dict(stack))
        return self.head(jnp.mean(self.norm(x), axis=1))


def patches(x: Float[Array, "B h w channels"], size: int) -> Float[Array, "B T D"]:
    """The pixels of each square of ``size`` pixels as one vector, row by row."""
    count, height, width, channels = x.shape
    x = x.reshape(count, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1, size * size * channels)
