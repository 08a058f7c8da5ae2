"""Laws of the augmentations against slices, Pillow and sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from jaxlab.data import autoaugment, randaugment
from jaxlab.data import randaugment as ops  # as the policy names them
from jaxlab.data.augment import (
    CIFAR,
    mixup,
    normalise,
    random_crop,
    random_flip,
    smooth_labels,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (16, 10, 12, 3), np.uint8)
# Dark pictures of over 255 pixels: equalize leaves smaller ones as they are, and flat histograms.
PICTURES = (np.random.default_rng(1).random((4, 20, 24, 3)) ** 2 * 200 + 20).astype(np.uint8)
KEY = jax.random.key(5)
PADDING = 2
CROPS = jax.jit(lambda key, x: random_crop(key, x, padding=PADDING))
FLIPS = jax.jit(random_flip)
PLUS = jnp.float32(1)


def test_a_crop_is_a_window_of_the_padded_image_and_every_window_occurs():
    offsets = set()
    for seed in range(8):
        crops = np.asarray(CROPS(jax.random.key(seed), IMAGES))
        for image, crop in zip(IMAGES, crops, strict=True):
            padded = np.pad(image, ((PADDING,) * 2, (PADDING,) * 2, (0, 0)))
            places = np.ndindex(2 * PADDING + 1, 2 * PADDING + 1)
            found = [p for p in places if (padded[p[0] :, p[1] :][:10, :12] == crop).all()]
            assert len(found) == 1
            offsets.add(found[0])
    assert len(offsets) == (2 * PADDING + 1) ** 2


def test_a_flip_reverses_the_columns_of_about_half_of_the_images():
    flipped = 0
    for seed in range(8):
        for image, found in zip(IMAGES, FLIPS(jax.random.key(seed), IMAGES), strict=True):
            turned = (np.asarray(found) == image[:, ::-1]).all()
            assert turned or (np.asarray(found) == image).all()
            flipped += turned
    assert 40 < flipped < 88  # of 128: five standard deviations


@pytest.mark.parametrize("augment", [CROPS, FLIPS])
def test_what_happens_to_an_image_depends_on_the_key_and_its_place_alone(augment):
    first, same, other = (augment(jax.random.key(seed), IMAGES) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
    changed = IMAGES.copy()
    changed[1:] = 0
    np.testing.assert_array_equal(augment(jax.random.key(0), changed)[0], first[0])


def test_normalised_channels_have_mean_0_and_deviation_1_where_the_data_have_the_constants():
    mean, deviation = (255 * np.array(part) for part in CIFAR)
    two = np.stack([mean - deviation, mean + deviation])[None, None]
    found = normalise(jnp.asarray(np.round(two), jnp.uint8))
    np.testing.assert_allclose(found[0, 0], [[-1] * 3, [1] * 3], atol=0.01)


def test_smoothed_labels_sum_to_one_and_share_the_rest_equally():
    found = smooth_labels(jnp.array([2, 0]), 5, 0.1)
    expected = [[0.025, 0.025, 0.9, 0.025, 0.025], [0.9, 0.025, 0.025, 0.025, 0.025]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(smooth_labels(jnp.array([1]), 3, 0.0), [[0, 1, 0]])


def test_mixup_mixes_images_and_targets_with_the_same_partners_and_share():
    images = jnp.asarray(IMAGES, jnp.float32)
    # The image's own number is written into the targets, so that partner and share can be read.
    targets = jnp.eye(16)
    mixed, shares = jax.jit(lambda key: mixup(key, images, targets, 0.5))(KEY)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(mixed, np.einsum("bi,ihwc->bhwc", shares, images), atol=1e-3)
    assert ((np.asarray(shares) > 0).sum(axis=1) <= 2).all() and (shares != targets).any()


# RandAugment


def pillow(operation):
    return np.stack([np.asarray(operation(Image.fromarray(image))) for image in PICTURES])


def ours(operation, strength, sign=PLUS):
    run = jax.jit(jax.vmap(lambda x: operation(x, strength=strength, sign=sign)))
    return np.asarray(run(jnp.asarray(PICTURES, jnp.float32)))


@pytest.mark.parametrize(
    ("operation", "strength", "theirs", "tolerance"),
    [
        (randaugment.autocontrast, 0.5, ImageOps.autocontrast, 1),
        (randaugment.equalize, 0.5, ImageOps.equalize, 0),
        (randaugment.posterize, 0.5, lambda x: ImageOps.posterize(x, 6), 0),
        (randaugment.solarize, 0.5, lambda x: ImageOps.solarize(x, 128), 0),
        (randaugment.saturation, 0.5, lambda x: ImageEnhance.Color(x).enhance(1.45), 2),
        (randaugment.contrast, 0.5, lambda x: ImageEnhance.Contrast(x).enhance(1.45), 2),
        (randaugment.brightness, 0.5, lambda x: ImageEnhance.Brightness(x).enhance(1.45), 1),
        (randaugment.sharpness, 0.5, lambda x: ImageEnhance.Sharpness(x).enhance(1.45), 2),
    ],
)
def test_colour_operations_are_those_of_pillow(operation, strength, theirs, tolerance):
    gap = np.abs(ours(operation, strength) - pillow(theirs))
    assert gap.max() <= tolerance
    assert (pillow(theirs) != PICTURES).any()


@pytest.mark.parametrize("operation", randaugment.COLOURS[3:])
def test_a_colour_operation_without_strength_is_the_identity(operation):
    np.testing.assert_allclose(ours(operation, 0.0), PICTURES, atol=0.01)


@pytest.mark.parametrize("operation", randaugment.GEOMETRIC)
def test_a_geometric_operation_without_strength_stays_and_with_it_moves_whole_or_not(operation):
    matrix, shift = operation((10, 12, 3), strength=0.0, sign=PLUS)
    np.testing.assert_allclose(matrix, np.eye(2))
    np.testing.assert_allclose(shift, 0)
    there, back = (operation((10, 12, 3), strength=0.7, sign=sign * PLUS) for sign in (1, -1))
    # The opposite sign undoes it: inverse matrix, opposite shift.
    np.testing.assert_allclose(there[0] @ back[0], np.eye(2), atol=1e-6)
    np.testing.assert_allclose(there[1] + back[1], 0, atol=1e-6)
    assert np.abs(there[0] - np.eye(2)).max() + np.abs(there[1]).max() > 0.1


def test_a_warp_by_whole_pixels_is_a_slice_and_grey_where_nothing_was():
    image = jnp.asarray(IMAGES[0], jnp.float32)
    moved = jax.jit(randaugment.warp)(image, jnp.eye(2), jnp.array([2.0, -3.0]))
    expected = np.full((10, 12, 3), 128.0)
    expected[:8, 3:] = IMAGES[0, 2:, :9]
    np.testing.assert_allclose(moved, expected, atol=1e-3)
    quarter = jax.jit(randaugment.warp)(
        image[:, :10], jnp.array([[0.0, 1.0], [-1.0, 0.0]]), jnp.zeros(2)
    )
    np.testing.assert_allclose(quarter, np.rot90(IMAGES[0, :, :10]), atol=1e-3)


def test_rand_augment_depends_on_key_and_place_alone_and_reaches_every_operation():
    run = jax.jit(lambda key, x: randaugment.rand_augment(key, x, operations=1, magnitude=15.0))
    images = np.broadcast_to(PICTURES[:1], (256, 20, 24, 3))
    first = np.asarray(run(KEY, images))
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, run(KEY, images))
    changed = images.copy()
    changed[1:] = 0
    np.testing.assert_array_equal(run(KEY, changed)[0], first[0])
    # 14 operations, of which nine have a sign: 5 + 2 * 9 results of one image, all of them seen.
    assert len({image.tobytes() for image in first}) == 23


def test_auto_augment_takes_each_pair_of_its_policy_and_inverts_as_it_says(monkeypatch):
    """With one certain pair the result is that of its operations by hand."""
    pair = ((ops.invert, 1.0, 3), (ops.posterize, 1.0, 9))
    monkeypatch.setattr(autoaugment, "POLICY", (pair,))
    result = autoaugment.auto_augment(KEY, jnp.asarray(PICTURES))
    np.testing.assert_array_equal(result, (255 - PICTURES) // 16 * 16)
    monkeypatch.setattr(autoaugment, "POLICY", (tuple((op, 0.0, n) for op, _, n in pair),))
    np.testing.assert_array_equal(autoaugment.auto_augment(KEY, jnp.asarray(PICTURES)), PICTURES)


def test_the_policy_has_its_twenty_five_pairs():
    assert len(autoaugment.POLICY) == 25 and all(len(pair) == 2 for pair in autoaugment.POLICY)
    assert all(0 <= p <= 1 and 0 <= n <= 9 for pair in autoaugment.POLICY for _, p, n in pair)
