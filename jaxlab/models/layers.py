"""The small parts of the decoder: parameters, projection, RMSNorm, rotary embedding, SwiGLU.

Modules hold parameters only. The layers of one kind are stacked: every parameter carries a leading
axis ``layers``, and a module is called on one layer's slice of it inside a ``lax.scan``.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float):
    """A float32 parameter drawn from a normal distribution, with the logical name of each axis."""
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * std
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, *, layers: int | None, width: int, eps: float):
        stacked = layers is not None
        shape = (layers, width) if stacked else (width,)
        axes = ("layers", None) if stacked else (None,)
        self.scale = nnx.Param(
            jnp.ones(shape, jnp.float32), out_sharding=axes, eager_sharding=False
        )
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * self.scale[...]).astype(x.dtype)


def rotate(
    x: Float[Array, "B T K H"], positions: Int[Array, "B T"], *, theta: float
) -> Float[Array, "B T K H"]:
    """Rotary position embedding, halves rotated (channel i with i + H/2), angles in float32."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def join(*weights: nnx.Param) -> nnx.Param:
    """Weights side by side, so that one product does what several did: for inference."""
    return nnx.Param(jnp.concatenate([one[...] for one in weights], axis=1))


def project(x: Float[Array, "... _"], weights: Float[Array, "..."], *, inputs: int = 1):
    """Matrix product of the last ``inputs`` axes of x with as many leading axes of the weights.

    Both are flattened to matrices first: through three axes JAX writes the gradient of the weights
    as a product of transposed copies, which takes XLA twice the time on a CPU.
    """
    rows, summed = x.shape[: x.ndim - inputs], math.prod(weights.shape[:inputs])
    matrix = weights.astype(x.dtype).reshape(summed, -1)
    return (x.reshape(-1, summed) @ matrix).reshape(*rows, *weights.shape[inputs:])


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(
        self, *, layers: int, width: int, ffn_width: int, std: float, out_std: float, rngs: nnx.Rngs
    ):
        into, out = (layers, width, ffn_width), (layers, ffn_width, width)
        self.gate = normal(rngs, into, ("layers", "embed", "ffn"), std)
        self.up = normal(rngs, into, ("layers", "embed", "ffn"), std)
        self.down = normal(rngs, out, ("layers", "ffn", "embed"), out_std)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = self._gate_and_up(x)
        return project(jax.nn.silu(gate) * up, self.down[...])

    def _gate_and_up(self, x):
        return project(x, self.gate[...]), project(x, self.up[...])


class JoinedSwiGLU(SwiGLU):
    """The same of one layer with gate and up in one matrix, made of a :class:`SwiGLU`."""

    def __init__(self, apart: SwiGLU):
        self.gate_up, self.down = join(apart.gate, apart.up), apart.down

    def _gate_and_up(self, x):
        return jnp.split(project(x, self.gate_up[...]), 2, axis=-1)
