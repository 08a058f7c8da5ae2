"""The small parts of the image models: convolution, batch norm, layer norm, linear maps.

Parameters are float32; products are computed in the type of the input, normalisation in float32.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.models.layers import normal, project

_BATCH_NORM_DECAY = 0.9  # share of the running statistics that a training step keeps
_BATCH_NORM_EPS = 1e-5
_LAYER_NORM_EPS = 1e-6


class Convolution(nnx.Module):
    """Square kernel, no bias, padded so that stride 1 keeps the size of the image."""

    def __init__(self, size: int, inputs: int, outputs: int, *, stride: int = 1, rngs: nnx.Rngs):
        # He et al. (arXiv 1502.01852): keeps the variance of the backward pass through ReLUs.
        std = math.sqrt(2.0 / (size * size * outputs))
        self.kernel = normal(rngs, (size, size, inputs, outputs), (None,) * 4, std)
        self.stride, self.padding = stride, size // 2

    def __call__(self, x: Float[Array, "B _ _ inputs"]) -> Float[Array, "B _ _ outputs"]:
        return jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(self.stride, self.stride),
            padding=[(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class BatchNorm(nnx.Module):
    """Normalises each channel over batch and place (arXiv 1502.03167).

    In training by the batch, of which the module keeps running statistics; else by those.
    """

    def __init__(self, width: int):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.variance = nnx.BatchStat(jnp.ones(width))

    def __call__(
        self, x: Float[Array, "B h w channels"], *, train: bool
    ) -> Float[Array, "B h w channels"]:
        wide, mean, variance = x.astype(jnp.float32), self.mean[...], self.variance[...]
        if train:
            kept = _BATCH_NORM_DECAY
            mean, variance = jnp.mean(wide, axis=(0, 1, 2)), jnp.var(wide, axis=(0, 1, 2))
            self.mean[...] = kept * self.mean[...] + (1 - kept) * mean
            self.variance[...] = kept * self.variance[...] + (1 - kept) * variance
        factor = self.scale[...] * jax.lax.rsqrt(variance + _BATCH_NORM_EPS)
        return ((wide - mean) * factor + self.bias[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / standard deviation * scale + bias over the last axis."""

    def __init__(self, width: int, *, layers: int | None = None):
        shape = (width,) if layers is None else (layers, width)
        self.scale, self.bias = nnx.Param(jnp.ones(shape)), nnx.Param(jnp.zeros(shape))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + _LAYER_NORM_EPS)
        return (wide * inverse * self.scale[...] + self.bias[...]).astype(x.dtype)


class Linear(nnx.Module):
    """Product over the last axes of the input, with a bias; stacked along ``layers`` if given."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        std: float,
        layers: int | None = None,
        rngs: nnx.Rngs,
    ):
        stack = () if layers is None else (layers,)
        shape = (*stack, *inputs, *outputs)
        self.kernel = normal(rngs, shape, (None,) * len(shape), std)
        self.bias = nnx.Param(jnp.zeros((*stack, *outputs)))
        self.axes = len(inputs)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return project(x, self.kernel[...], inputs=self.axes) + self.bias[...].astype(x.dtype)
