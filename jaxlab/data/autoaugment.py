"""AutoAugment's policy for CIFAR, on the device (arXiv 1805.09501, table 7)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from jaxlab.data import randaugment as ops
from jaxlab.data.randaugment import Pixels, apply_operation, each_image

_LEVELS = 9  # magnitude at which an operation has its full strength
# Twenty-five pairs of operation, probability and magnitude. Inverting is solarizing all values.
POLICY = (
    ((ops.invert, 0.1, 7), (ops.contrast, 0.2, 6)),
    ((ops.rotate, 0.7, 2), (ops.translate_x, 0.3, 9)),
    ((ops.sharpness, 0.8, 1), (ops.sharpness, 0.9, 3)),
    ((ops.shear_y, 0.5, 8), (ops.translate_y, 0.7, 9)),
    ((ops.autocontrast, 0.5, 8), (ops.equalize, 0.9, 2)),
    ((ops.shear_y, 0.2, 7), (ops.posterize, 0.3, 7)),
    ((ops.saturation, 0.4, 3), (ops.brightness, 0.6, 7)),
    ((ops.sharpness, 0.3, 9), (ops.brightness, 0.7, 9)),
    ((ops.equalize, 0.6, 5), (ops.equalize, 0.5, 1)),
    ((ops.contrast, 0.6, 7), (ops.sharpness, 0.6, 5)),
    ((ops.saturation, 0.7, 7), (ops.translate_x, 0.5, 8)),
    ((ops.equalize, 0.3, 7), (ops.autocontrast, 0.4, 8)),
    ((ops.translate_y, 0.4, 3), (ops.sharpness, 0.2, 6)),
    ((ops.brightness, 0.9, 6), (ops.saturation, 0.2, 8)),
    ((ops.solarize, 0.5, 2), (ops.invert, 0.0, 3)),
    ((ops.equalize, 0.2, 0), (ops.autocontrast, 0.6, 0)),
    ((ops.equalize, 0.2, 8), (ops.equalize, 0.6, 4)),
    ((ops.saturation, 0.9, 9), (ops.equalize, 0.6, 6)),
    ((ops.autocontrast, 0.8, 4), (ops.solarize, 0.2, 8)),
    ((ops.brightness, 0.1, 3), (ops.saturation, 0.7, 0)),
    ((ops.solarize, 0.4, 5), (ops.autocontrast, 0.9, 3)),
    ((ops.translate_y, 0.9, 9), (ops.translate_y, 0.7, 9)),
    ((ops.autocontrast, 0.9, 2), (ops.solarize, 0.8, 3)),
    ((ops.equalize, 0.8, 8), (ops.invert, 0.1, 3)),
    ((ops.translate_y, 0.7, 9), (ops.autocontrast, 0.9, 1)),
)
_ORDER = (*ops.GEOMETRIC, *ops.COLOURS)


def auto_augment(key: Array, images: UInt8[Array, "B h w 3"]) -> UInt8[Array, "B h w 3"]:
    """A random pair of the policy on each image; directions take a random sign."""
    numbers, chances, strengths = _tables()

    def one(key: Array, image: Pixels) -> Pixels:
        pair, happens, sign = jax.random.split(key, 3)
        pair = jax.random.randint(pair, (), 0, len(POLICY))
        happens = jax.random.uniform(happens, (2,)) < chances[pair]
        sign = jax.random.rademacher(sign, (2,), jnp.float32)
        for i in range(2):
            changed = apply_operation(numbers[pair, i], image, strengths[pair, i], sign[i])
            image = jnp.where(happens[i], changed, image)
        return image

    return each_image(one, key, images)


def _tables() -> tuple[Array, Array, Array]:
    """Operation, probability and strength of both halves of each pair: (25, 2) each."""

    def of(read) -> Array:
        return jnp.asarray(np.array([[read(*half) for half in pair] for pair in POLICY]))

    numbers = of(lambda op, chance, level: _ORDER.index(_plain(op)))
    chances = of(lambda op, chance, level: np.float32(chance))
    strengths = of(
        lambda op, chance, level: np.float32(1.0 if op is ops.invert else level / _LEVELS)
    )
    return numbers, chances, strengths


def _plain(operation):
    """The operation that does the work: full solarizing inverts."""
    return ops.solarize if operation is ops.invert else operation
