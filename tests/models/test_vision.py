"""Laws of the image models: sizes, batch norm, shortcuts, patches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlab.models.vision import PRESETS, VisionModel
from jaxlab.models.vision.layers import BatchNorm, Convolution
from jaxlab.models.vision.resnet import BasicBlock, BottleneckBlock, WideBlock, _max_pool
from jaxlab.models.vision.vit import patches

# Parameters as the papers state them, in millions, with classes and image size.
PUBLISHED = {
    "resnet56": (0.85, 10, 32),
    "wrn-16-8": (11.0, 10, 32),
    "wrn-28-10": (36.5, 10, 32),
    "resnet50": (25.6, 1000, 224),
    "vit-s-16": (22.0, 1000, 224),
}
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.standard_normal((4, 8, 8, 3)), jnp.float32)


def rngs():
    """Random keys of the generator that compiles quickly."""
    return nnx.Rngs(params=jax.random.key(0, impl="rbg"))


def tiny(preset, **changes):
    """A narrow model of a family and its variables, statistics away from where they start."""
    shape = dataclasses.replace(PRESETS[preset], **changes)
    model = VisionModel(shape, classes=5, image_size=8)
    params, statistics = model.initial(0)
    shifted = jax.tree.map(lambda s: s + jnp.arange(s.size) / s.size, statistics)
    return model, params, shifted


def with_kernel_zero(kind, inputs, outputs, stride, kernel):
    """A fresh block's output in evaluation when one of its convolutions is zero, and its kernels.

    One program: the block is made inside.
    """

    def run(x):
        block = kind(inputs, outputs, stride=stride, rngs=rngs())
        weights = getattr(block, kernel).kernel
        weights[...] = jnp.zeros_like(weights[...])
        kernels = {k: v.kernel[...] for k, v in vars(block).items() if isinstance(v, Convolution)}
        return block(x, train=False), kernels

    return jax.jit(run)(IMAGES)


@pytest.fixture(scope="module")
def resnet():
    model, params, statistics = tiny("resnet8", width=4)
    train, evaluate = (
        jax.jit(lambda p, s, x, train=train: model.apply(p, s, x, train=train))
        for train in (True, False)
    )
    return model, params, statistics, train, evaluate


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameters_count_what_the_papers_say(preset):
    millions, classes, size = PUBLISHED[preset]
    model = VisionModel(PRESETS[preset], classes, size)
    assert round(model.parameter_count() / 1e6, 2 if millions < 1 else 1) == millions


def test_a_convolution_is_the_sum_over_its_window():
    def run(x):
        conv = Convolution(3, 3, 2, stride=2, rngs=rngs())
        return conv(x), conv.kernel[...]

    found, kernel = jax.jit(run)(IMAGES)
    padded = np.pad(np.asarray(IMAGES), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((4, 4, 4, 2), np.float32)
    for row in range(4):
        for column in range(4):
            window = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            expected[:, row, column] = np.einsum("bijc,ijco->bo", window, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_batch_norm_standardises_by_the_batch_and_remembers_a_tenth_of_it():
    norm, x = BatchNorm(3), np.asarray(IMAGES)
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(
        norm(IMAGES, train=True), (x - mean) / np.sqrt(variance + 1e-5), atol=1e-5
    )
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(norm.variance[...], 0.9 + 0.1 * variance, atol=1e-6)


def test_training_gives_new_statistics_and_evaluation_the_old_ones(resnet):
    _, params, statistics, train, evaluate = resnet
    changed = jax.tree.map(
        lambda a, b: bool((a != b).all()), train(params, statistics, IMAGES)[1], statistics
    )
    assert all(jax.tree.leaves(changed))
    jax.tree.map(np.testing.assert_array_equal, evaluate(params, statistics, IMAGES)[1], statistics)


def test_evaluation_of_an_image_does_not_depend_on_its_batch(resnet):
    _, params, statistics, train, evaluate = resnet
    other = IMAGES.at[1:].set(7.0)
    ours, theirs = (evaluate(params, statistics, x)[0][0] for x in (IMAGES, other))
    np.testing.assert_array_equal(ours, theirs)
    ours, theirs = (train(params, statistics, x)[0][0] for x in (IMAGES, other))
    assert np.abs(ours - theirs).max() > 1e-3


def test_training_does_not_read_the_statistics(resnet):
    _, params, statistics, train, _ = resnet
    zeros = jax.tree.map(jnp.zeros_like, statistics)
    ours, theirs = (train(params, s, IMAGES)[0] for s in (statistics, zeros))
    np.testing.assert_array_equal(ours, theirs)


def test_a_basic_block_of_zeros_subsamples_and_pads_with_zero_channels():
    found, _ = with_kernel_zero(BasicBlock, 3, 6, 2, "conv2")
    expected = np.zeros((4, 4, 4, 6), np.float32)
    expected[..., :3] = np.maximum(np.asarray(IMAGES)[:, ::2, ::2], 0)
    np.testing.assert_array_equal(found, expected)


def test_a_wide_block_of_zeros_is_the_identity():
    found, _ = with_kernel_zero(WideBlock, 3, 3, 1, "conv2")
    np.testing.assert_array_equal(found, IMAGES)


def test_a_bottleneck_of_zeros_is_its_shortcut():
    found, kernels = with_kernel_zero(BottleneckBlock, 3, 8, 2, "conv3")
    shortcut = np.asarray(IMAGES)[:, ::2, ::2] @ np.asarray(kernels["shortcut"][0, 0])
    norm = np.sqrt(1 + 1e-5)  # of the statistics that batch norm starts with
    np.testing.assert_allclose(found, np.maximum(shortcut / norm, 0), atol=1e-6)


def test_pooling_takes_the_largest_of_nine_places():
    padded = np.pad(np.asarray(IMAGES), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
    np.testing.assert_array_equal(_max_pool(IMAGES), windows.max((-1, -2)))


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("wrn-16-8", dict(width=2, factors=(1, 2, 4), blocks=(1, 1, 1))),
        ("resnet50", dict(width=2, blocks=(1, 1, 1, 1))),
        ("vit-t-4", dict(width=12, depth=2)),
    ],
)
def test_every_family_gives_logits_and_keeps_the_tree_of_statistics(preset, changes):
    shape = dataclasses.replace(PRESETS[preset], **changes)
    model = VisionModel(shape, classes=5, image_size=8, compute_dtype="bfloat16")
    _, params, statistics = model.abstract()
    logits, after = jax.eval_shape(
        lambda p, s, x: model.apply(p, s, x, train=True), params, statistics, IMAGES
    )
    assert logits.shape == (4, 5) and logits.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), statistics
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, statistics)))


def test_patches_are_slices_of_the_image():
    found = np.asarray(patches(IMAGES, 4)).reshape(4, 2, 2, -1)
    for row in range(2):
        for column in range(2):
            part = IMAGES[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            np.testing.assert_array_equal(found[:, row, column], part.reshape(4, -1))


def test_without_positions_a_transformer_does_not_notice_the_order_of_patches():
    model, params, statistics = tiny("vit-t-4", width=12, depth=2)
    logits = jax.jit(lambda p, x: model.apply(p, statistics, x, train=False)[0])
    swapped = jnp.concatenate([IMAGES[:, 4:], IMAGES[:, :4]], axis=1)
    assert np.abs(logits(params, IMAGES) - logits(params, swapped)).max() > 1e-5
    blind = params | {"positions": jnp.zeros_like(params["positions"])}
    np.testing.assert_allclose(logits(blind, IMAGES), logits(blind, swapped), atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    shape = PRESETS["vit-t-4"]
    with pytest.raises(ValueError, match="images of 30 pixels do not split into 4"):
        VisionModel(shape, 10, 30).abstract()
    with pytest.raises(ValueError, match="a width of 10 does not split into 3 heads"):
        VisionModel(dataclasses.replace(shape, width=10), 10, 32).abstract()
