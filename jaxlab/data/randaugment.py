"""RandAugment on the device (arXiv 1909.13719).

Each operation is drawn for each image from the paper's fourteen, at one magnitude. All geometric
ones are one warp with another matrix.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Int, UInt8

Pixels = Float[Array, "h w 3"]  # whole numbers from 0 to 255, in float32
Shape = tuple[int, ...]
Strength = float | Float[Array, ""]  # share of an operation's full range
Move = tuple[Float[Array, "2 2"], Float[Array, "2"]]  # matrix and shift of a warp

_LARGEST = 30  # magnitude at which an operation has its full strength
_GREY = 128.0  # what a warp uncovers
_PART = 128  # images at a time
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey (ITU-R 601)


def rand_augment(
    key: Array, images: UInt8[Array, "B h w 3"], *, operations: int = 2, magnitude: float = 15.0
) -> UInt8[Array, "B h w 3"]:
    """``operations`` random operations on each image, one after the other.

    ``magnitude`` runs from 0 to 30; operations with a direction take it with a random sign.
    """
    strength = magnitude / _LARGEST

    def one(key: Array, image: Pixels) -> Pixels:
        for step_key in jax.random.split(key, operations):
            image = _random_operation(step_key, image, strength)
        return image

    return each_image(one, key, images)


def each_image(
    change: Callable[[Array, Pixels], Pixels], key: Array, images: UInt8[Array, "B h w 3"]
) -> UInt8[Array, "B h w 3"]:
    """``change(key, image)`` of each image, with a key of its own."""

    def one(item: tuple[Array, Array]) -> Array:
        return jnp.round(change(*item)).astype(jnp.uint8)

    keys = jax.random.split(key, len(images))
    # In parts: of every image in a part all colour operations are computed and one is taken.
    return jax.lax.map(one, (keys, images.astype(jnp.float32)), batch_size=_PART)


def _random_operation(key: Array, image: Pixels, strength: float) -> Pixels:
    which, sign = jax.random.split(key)
    sign = jax.random.rademacher(sign, (), jnp.float32)
    number = jax.random.randint(which, (), 0, len(GEOMETRIC) + len(COLOURS))
    return apply_operation(number, image, strength, sign)


def apply_operation(
    number: Int[Array, ""], image: Pixels, strength: Strength, sign: Float[Array, ""]
) -> Pixels:
    """The operation at a place of ``(*GEOMETRIC, *COLOURS)``, on one image."""
    placed = _geometric(jnp.minimum(number, len(GEOMETRIC)), image, strength, sign)
    branches = [lambda x, m, s, op=op: op(x, strength=m, sign=s) for op in COLOURS]
    place = jnp.maximum(number - len(GEOMETRIC), 0)
    coloured = jax.lax.switch(place, branches, image, jnp.asarray(strength, jnp.float32), sign)
    return jnp.where(number < len(GEOMETRIC), placed, coloured)


def _geometric(number: Array, image: Pixels, strength: Strength, sign: Array) -> Pixels:
    moves = [op(image.shape, strength=strength, sign=sign) for op in (*GEOMETRIC, _stay)]
    matrices, shifts = (jnp.stack(part) for part in zip(*moves, strict=True))
    return warp(image, matrices[number], shifts[number])


# Geometry: where each pixel of the result comes from, seen from the middle of the image.


def warp(image: Pixels, matrix: Float[Array, "2 2"], shift: Float[Array, "2"]) -> Pixels:
    """``result[p] = image[matrix p + shift]`` in (row, column) from the middle, bilinear."""
    height, width = image.shape[:2]
    middle = jnp.array([(height - 1) / 2, (width - 1) / 2])
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    places = jnp.stack([rows, columns], axis=-1) - middle
    source = places @ matrix.T + shift + middle

    def channel(plane: Array) -> Array:
        where = [source[..., 0], source[..., 1]]
        return map_coordinates(plane, where, order=1, mode="constant", cval=_GREY)

    return jnp.stack([channel(image[..., c]) for c in range(3)], axis=-1)


def rotate(shape: Shape, *, strength: Strength, sign: Array) -> Move:
    """Up to 30 degrees."""
    angle = sign * jnp.deg2rad(30.0 * strength)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[cos, -sin], [sin, cos]]), jnp.zeros(2)


def shear_x(shape: Shape, *, strength: Strength, sign: Array) -> Move:
    """Rows shifted by up to 0.3 of their distance from the middle."""
    return jnp.eye(2).at[1, 0].set(0.3 * strength * sign), jnp.zeros(2)


def shear_y(shape: Shape, *, strength: Strength, sign: Array) -> Move:
    """Columns shifted by up to 0.3 of their distance from the middle."""
    return jnp.eye(2).at[0, 1].set(0.3 * strength * sign), jnp.zeros(2)


def translate_x(shape: Shape, *, strength: Strength, sign: Array) -> Move:
    """Sideways by up to 0.45 of the width."""
    return jnp.eye(2), jnp.zeros(2).at[1].set(0.45 * shape[1] * strength * sign)


def translate_y(shape: Shape, *, strength: Strength, sign: Array) -> Move:
    """Up or down by up to 0.45 of the height."""
    return jnp.eye(2), jnp.zeros(2).at[0].set(0.45 * shape[0] * strength * sign)


def _stay(shape: Shape, *, strength: Strength, sign: Array) -> Move:
    return jnp.eye(2), jnp.zeros(2)


# Colours


def identity(image: Pixels, *, strength: Strength, sign: Array) -> Pixels:
    """The image as it is."""
    return image


def autocontrast(image: Pixels, *, strength: Strength, sign: Array) -> Pixels:
    """Each channel stretched from 0 to 255."""
    low, high = image.min((0, 1)), image.max((0, 1))
    scale = 255 / jnp.where(high > low, high - low, 1)
    return jnp.where(high > low, jnp.floor((image - low) * scale + 1e-3), image)


def equalize(image: Pixels, *, strength: Strength, sign: Array) -> Pixels:
    """Each channel's histogram flattened."""

    def channel(plane: Array) -> Array:
        values = plane.astype(jnp.int32)
        counts = jnp.zeros(256, jnp.int32).at[values.ravel()].add(1)
        last = counts[jnp.max(values)]
        step = (values.size - last) // 255
        before = jnp.cumsum(counts) - counts
        table = jnp.clip((before + step // 2) // jnp.maximum(step, 1), 0, 255)
        return jnp.where(step > 0, table[values].astype(jnp.float32), plane)

    return jnp.stack([channel(image[..., c]) for c in range(3)], axis=-1)


def posterize(image: Pixels, *, strength: Strength, sign: Array) -> Pixels:
    """The lowest bits of each value dropped, up to 4 of 8."""
    step = 2.0 ** jnp.floor(4 * strength)
    return jnp.floor(image / step) * step


def solarize(image: Pixels, *, strength: Strength, sign: Array) -> Pixels:
    """Values from a threshold on inverted; the threshold falls from 256 to 0."""
    return jnp.where(image >= 256 - jnp.floor(256 * strength), 255 - image, image)


def invert(image: Pixels, *, strength: Strength, sign: Array) -> Pixels:
    """Every value taken from 255: solarizing at full strength."""
    return solarize(image, strength=1.0, sign=sign)


def saturation(image: Pixels, *, strength: Strength, sign: Array) -> Pixels:
    """Towards grey, or away from it, by up to 0.9."""
    return _blended(_grey(image)[..., None], image, 1 + 0.9 * strength * sign)


def contrast(image: Pixels, *, strength: Strength, sign: Array) -> Pixels:
    """Towards the mean grey, or away from it, by up to 0.9."""
    return _blended(jnp.floor(jnp.mean(_grey(image)) + 0.5), image, 1 + 0.9 * strength * sign)


def brightness(image: Pixels, *, strength: Strength, sign: Array) -> Pixels:
    """Towards black, or away from it, by up to 0.9."""
    return _blended(jnp.zeros(()), image, 1 + 0.9 * strength * sign)


def sharpness(image: Pixels, *, strength: Strength, sign: Array) -> Pixels:
    """Towards a smoothed image, or away from it, by up to 0.9; the border stays."""
    weights = jnp.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], jnp.float32) / 13
    planes = jnp.moveaxis(image, -1, 0)[:, None]
    smooth = jax.lax.conv_general_dilated(planes, weights[None, None], (1, 1), "VALID")
    smooth = jnp.moveaxis(jnp.round(smooth[:, 0]), 0, -1)
    return _blended(image.at[1:-1, 1:-1].set(smooth), image, 1 + 0.9 * strength * sign)


def _grey(image: Pixels) -> Float[Array, "h w"]:
    return jnp.round(image @ jnp.array(_LUMA))


def _blended(base: Array, image: Pixels, share: Array) -> Pixels:
    return jnp.floor(jnp.clip(base + share * (image - base), 0, 255))


GEOMETRIC = (rotate, shear_x, shear_y, translate_x, translate_y)
COLOURS = (
    *(identity, autocontrast, equalize, posterize, solarize),
    *(saturation, contrast, brightness, sharpness),
)
