"""Residual networks for images: CIFAR's ResNets, wide ones, and those of ImageNet."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.models.vision.layers import BatchNorm, Convolution, Linear

# Batch, rows, columns, channels; blocks change the last three.
Images = Float[Array, "B _ _ _"]
_BOTTLENECK = 4  # a bottleneck block gives this many times the channels it computes with


class BasicBlock(nnx.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), two 3 x 3 convolutions (arXiv 1512.03385).

    Where the shape changes, x is subsampled and padded with zero channels (option A of section
    4.2): no weights.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, rngs: nnx.Rngs):
        self.conv1 = Convolution(3, inputs, outputs, stride=stride, rngs=rngs)
        self.norm1 = BatchNorm(outputs)
        self.conv2 = Convolution(3, outputs, outputs, rngs=rngs)
        self.norm2 = BatchNorm(outputs)
        self.stride, self.added = stride, outputs - inputs

    def __call__(self, x: Images, *, train: bool) -> Images:
        y = jax.nn.relu(self.norm1(self.conv1(x), train=train))
        y = self.norm2(self.conv2(y), train=train)
        x = x[:, :: self.stride, :: self.stride]
        return jax.nn.relu(y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.added))))


class BottleneckBlock(nnx.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions; a 1 x 1 one beside them where the shape changes.

    The stride lies in the 3 x 3 convolution.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, rngs: nnx.Rngs):
        inner = outputs // _BOTTLENECK
        self.conv1, self.norm1 = Convolution(1, inputs, inner, rngs=rngs), BatchNorm(inner)
        self.conv2 = Convolution(3, inner, inner, stride=stride, rngs=rngs)
        self.norm2 = BatchNorm(inner)
        self.conv3, self.norm3 = Convolution(1, inner, outputs, rngs=rngs), BatchNorm(outputs)
        self.projects = stride > 1 or inputs != outputs
        if self.projects:
            self.shortcut = Convolution(1, inputs, outputs, stride=stride, rngs=rngs)
            self.shortcut_norm = BatchNorm(outputs)

    def __call__(self, x: Images, *, train: bool) -> Images:
        y = jax.nn.relu(self.norm1(self.conv1(x), train=train))
        y = jax.nn.relu(self.norm2(self.conv2(y), train=train))
        y = self.norm3(self.conv3(y), train=train)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x), train=train)
        return jax.nn.relu(x + y)


class WideBlock(nnx.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))): normalised first (arXiv 1605.07146).

    Where the channels change, the normalised input goes through a 1 x 1 convolution instead of x.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, rngs: nnx.Rngs):
        self.norm1 = BatchNorm(inputs)
        self.conv1 = Convolution(3, inputs, outputs, stride=stride, rngs=rngs)
        self.norm2 = BatchNorm(outputs)
        self.conv2 = Convolution(3, outputs, outputs, rngs=rngs)
        self.projects = stride > 1 or inputs != outputs
        if self.projects:
            self.shortcut = Convolution(1, inputs, outputs, stride=stride, rngs=rngs)

    def __call__(self, x: Images, *, train: bool) -> Images:
        y = jax.nn.relu(self.norm1(x, train=train))
        if self.projects:
            x = self.shortcut(y)
        y = jax.nn.relu(self.norm2(self.conv1(y), train=train))
        return x + self.conv2(y)


@dataclass(frozen=True, kw_only=True)
class ResNetShape:
    """A residual network: ``blocks`` of one kind in each stage, the first of a stage with a stride.

    ``width`` is the number of channels behind the stem and ``widths`` those of the stages. The stem
    is a 3 x 3 convolution, or with ``pools`` ImageNet's of 7 x 7 and a pooling, which together
    shrink the image by four.
    """

    block: type[BasicBlock] | type[BottleneckBlock] | type[WideBlock]
    blocks: tuple[int, ...]
    width: int
    factors: tuple[int, ...]  # channels of each stage, as multiples of the width
    pools: bool = False

    def build(self, *, classes: int, image_size: int, rngs: nnx.Rngs) -> nnx.Module:
        """The module with fresh parameters; the size of the images does not matter to it."""
        del image_size
        return ResNet(self, classes=classes, rngs=rngs)


def cifar_resnet(depth: int) -> ResNetShape:
    """ResNet-``depth`` for CIFAR, depth 6n + 2 (arXiv 1512.03385, section 4.2)."""
    count = (depth - 2) // 6
    return ResNetShape(block=BasicBlock, blocks=(count,) * 3, width=16, factors=(1, 2, 4))


def wide_resnet(depth: int, widen: int) -> ResNetShape:
    """WRN-``depth``-``widen``, depth 6n + 4, without dropout (arXiv 1605.07146, table 1)."""
    count = (depth - 4) // 6
    factors = (widen, 2 * widen, 4 * widen)
    return ResNetShape(block=WideBlock, blocks=(count,) * 3, width=16, factors=factors)


def imagenet_resnet(blocks: tuple[int, ...]) -> ResNetShape:
    """The bottleneck networks of ImageNet (arXiv 1512.03385, table 1)."""
    factors = tuple(_BOTTLENECK * 2**stage for stage in range(len(blocks)))
    return ResNetShape(block=BottleneckBlock, blocks=blocks, width=64, factors=factors, pools=True)


class ResNet(nnx.Module):
    """Stem, stages of blocks, mean over the image, linear classifier."""

    def __init__(self, shape: ResNetShape, *, classes: int, rngs: nnx.Rngs):
        channels = shape.width
        size, stride = (7, 2) if shape.pools else (3, 1)
        self.stem = Convolution(size, 3, channels, stride=stride, rngs=rngs)
        self.pools, self.normalises_last = shape.pools, shape.block is WideBlock
        self.names = []
        for stage, (count, factor) in enumerate(zip(shape.blocks, shape.factors, strict=True)):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                outputs = shape.width * factor
                self.names.append(f"stage{stage + 1}_block{number + 1}")
                block = shape.block(channels, outputs, stride=stride, rngs=rngs)
                setattr(self, self.names[-1], block)
                channels = outputs
        self.norm = BatchNorm(channels if self.normalises_last else shape.width)
        self.head = Linear((channels,), (classes,), std=channels**-0.5, rngs=rngs)

    def __call__(self, x: Images, *, train: bool) -> Float[Array, "B classes"]:
        x = self.stem(x)
        if not self.normalises_last:
            x = jax.nn.relu(self.norm(x, train=train))
        if self.pools:
            x = _max_pool(x)
        for name in self.names:
            x = getattr(self, name)(x, train=train)
        if self.normalises_last:
            x = jax.nn.relu(self.norm(x, train=train))
        return self.head(jnp.mean(x, axis=(1, 2)))


def _max_pool(x: Images) -> Images:
    """Largest value of 3 x 3 places, every second row and column."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    lowest = jnp.array(-jnp.inf, x.dtype)
    return jax.lax.reduce_window(x, lowest, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
