"""Augmentation of image batches on the device: pure functions of a key.

Each image has a key of its own, drawn for its place in the batch, so that no image changes what
happens to another (``mixup`` apart, whose purpose that is).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

Batch = UInt8[Array, "B h w 3"]

# Mean and standard deviation of the channels, as shares of 255.
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def random_crop(key: Array, images: Batch, *, padding: int = 4) -> Batch:
    """A window of the images' own size out of each image padded with black on all sides."""
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.vmap(lambda k: jax.random.randint(k, (2,), 0, 2 * padding + 1))(
        jax.random.split(key, len(images))
    )

    def window(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

    return jax.vmap(window)(padded, corners)


def random_flip(key: Array, images: Batch) -> Batch:
    """Left and right exchanged in half of the images."""
    flips = jax.vmap(jax.random.bernoulli)(jax.random.split(key, len(images)))
    return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def normalise(
    images: Batch, statistics: tuple[tuple[float, ...], tuple[float, ...]] = CIFAR
) -> Float[Array, "B h w 3"]:
    """(pixel / 255 - mean) / standard deviation in float32."""
    mean, deviation = (jnp.asarray(part, jnp.float32) for part in statistics)
    return (images.astype(jnp.float32) / 255 - mean) / deviation


def smooth_labels(
    labels: Int[Array, " B"], classes: int, smoothing: float
) -> Float[Array, "B classes"]:
    """``1 - smoothing`` for the label, the rest shared by the other classes."""
    others = smoothing / (classes - 1)
    return jax.nn.one_hot(labels, classes) * (1 - smoothing - others) + others


def mixup(
    key: Array, images: Float[Array, "B h w 3"], targets: Float[Array, "B classes"], alpha: float
) -> tuple[Float[Array, "B h w 3"], Float[Array, "B classes"]]:
    """Each image mixed with another, and their targets alike (arXiv 1710.09412).

    One share of the batch, drawn from Beta(alpha, alpha), as in the authors' experiments.
    """
    share_key, order_key = jax.random.split(key)
    share = jax.random.beta(share_key, alpha, alpha)
    order = jax.random.permutation(order_key, len(images))

    def mixed(x: Array) -> Array:
        return share * x + (1 - share) * x[order]

    return mixed(images), mixed(targets)
