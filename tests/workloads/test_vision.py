"""Laws of image classification: one step, its resumption, its evaluation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jaxlab.config import identity_hash, load_config
from jaxlab.errors import CheckpointError, ConfigError, DataError
from jaxlab.models.vision import PRESETS
from jaxlab.optim.factory import make_optimizer
from jaxlab.training.guards import InterruptGuard, NotFiniteError
from jaxlab.training.metrics import read_metrics
from jaxlab.workloads import vision, vision_config, vision_step
from jaxlab.workloads.vision import (
    evaluate_vision,
    load_vision,
    train_vision,
    vision_model,
    vision_problem,
)

CONFIG = """
workload: vision
name: tiny
model: {preset: resnet8, width: 2, compute_dtype: float32}
data: {source: "folder:FOLDER", image_size: 8}
label_smoothing: 0.1
optimizer:
  name: sgd
  clip_norm: null
  weight_decay: 1.0e-3
  sam_radius: 0.05
  ire: {kappa: 2.0, gamma: 0.8, start_step: 1, update_interval: 2}
stage: {steps: 4, batch_size: 4, learning_rate: 0.1, schedule: {name: constant}}
training: {evaluate_every: 3, save_every: 2}
"""
CLASSES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 2)):
        for name in ("ant", "bee", "cat"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def config(folder):
    (folder / "tiny.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    return load_config(folder / "tiny.yaml")


@pytest.fixture(scope="module", autouse=True)
def one_block():
    """ResNet-8 with one block in place of three: a third of the compilation."""
    with pytest.MonkeyPatch.context() as patch:
        shape = dataclasses.replace(PRESETS["resnet8"], blocks=(1,), factors=(2,))
        patch.setitem(PRESETS, "resnet8", shape)
        yield


def quick_jit(function, **settings):
    """Compiled in a hurry: these programs run a few times."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=options, **settings)


@pytest.fixture(scope="module")
def shared():
    """Compiled functions by configuration: several runs of one experiment share a program."""
    compiled, logits = {}, vision.compile_logits

    def shared_step(*, config, **parts):
        key = ("step", identity_hash(config))
        step = functools.partial(vision_step.vision_step, config=config, **parts)
        return compiled.setdefault(key, quick_jit(step, donate_argnums=0))

    def shared_logits(config, model):
        key = ("logits", identity_hash(config))
        return compiled.setdefault(key, logits(config, model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "compile_vision_step", shared_step)
        patch.setattr(vision, "compile_logits", shared_logits)
        yield shared_step


def batch_of(count=4):
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.integers(0, 256, (count, 8, 8, 3)), jnp.uint8)
    return {"images": images, "labels": jnp.asarray(rng.integers(0, CLASSES, count), jnp.int32)}


def fresh(config):
    model = vision_model(config, CLASSES)
    optimizer = make_optimizer(config.optimizer, config.stage, seed=config.seed)
    state = vision_step.start_vision_state(*model.initial(0), optimizer, seed=config.seed)
    return model, optimizer, state


def assert_trees(compare, ours, theirs):
    jax.tree.map(compare, ours, theirs)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# One step


def test_a_step_of_sam_and_ire_is_the_rule_by_hand_and_keeps_the_statistics_of_its_gradient(
    config, shared
):
    model, optimizer, state = fresh(config)
    # At the second step IRE starts.
    state = state.replace(
        step=jnp.ones((), jnp.int32), opt_state=optax.tree.set(state.opt_state, count=jnp.int32(1))
    )
    before, batch = state, batch_of()
    step = shared(config=config, model=model, optimizer=optimizer)
    after, numbers = step(jax.tree.map(jnp.copy, state), batch)  # the step takes its state over

    images = vision_step.augmented(
        config,
        jax.random.split(jax.random.fold_in(before.key, 1))[0],
        batch["images"],
    )
    targets = np.full((4, CLASSES), 0.05)
    targets[np.arange(4), batch["labels"]] = 0.9
    targets = jnp.asarray(targets, jnp.float32)

    def loss_of(params):
        logits, statistics = model.apply(params, before.statistics, images, train=True)
        return jnp.mean(optax.softmax_cross_entropy(logits, targets)), statistics

    gradient_of = quick_jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, statistics), gradient = gradient_of(before.params)
    entropy = -float(jnp.mean(jnp.sum(targets * jnp.log(targets), axis=1)))
    assert float(numbers["loss"]) == pytest.approx(float(loss) - entropy, rel=1e-4)
    assert_trees(close, after.statistics, statistics)

    radius = 0.05 / optax.tree.norm(gradient)
    climbed = jax.tree.map(lambda p, g: p + radius * g, before.params, gradient)
    there = gradient_of(climbed)[1]
    flat = optax.tree.get(after.opt_state, "flat_mask")
    share = sum(x.sum() for x in jax.tree.leaves(flat)) / model.parameter_count()
    assert float(share) == pytest.approx(0.8, abs=0.01)

    def moved(path, p, g, n):
        decay = 0.0 if path[-1].key in ("scale", "bias") else 1e-3
        return p - 0.1 * (g + decay * p) * (1 + 2.0 * n)

    expected = jax.tree_util.tree_map_with_path(moved, before.params, there, flat)
    assert_trees(close, after.params, expected)
    assert any(
        np.abs(a - b).max() > 1e-3
        for a, b in zip(*map(jax.tree.leaves, (after.params, before.params)), strict=True)
    )


def test_the_curvature_is_that_of_the_plain_loss_on_the_first_share_of_the_batch(config):
    model, _, state = fresh(config)
    batch = batch_of()
    images = vision_step.model_input(config, batch["images"])
    half = dataclasses.replace(config.optimizer.ire, batch_share=0.5)

    @quick_jit
    def both(key, images):
        found = vision_step.image_curvature(half, model)(
            state.params, key, state.statistics, images, batch["labels"]
        )

        def loss(params):
            logits, _ = model.apply(params, state.statistics, images[:2], train=True)
            drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(2), drawn])

        return found, jax.grad(loss)(state.params)

    found, expected = both(jax.random.key(3), images)
    assert_trees(close, found, expected)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found)) > 1e-3


def test_the_excess_loss_is_cross_entropy_less_entropy_and_zero_at_the_targets():
    targets = jnp.array([[0.9, 0.05, 0.05], [0.0, 1.0, 0.0], [0.3, 0.7, 0.0]])
    logits = jnp.array([[0.3, -1.0, 2.0], [1.0, 0.0, -3.0], [0.0, 0.5, 1.0]])
    p = np.asarray(targets, np.float64)
    logs = np.log(np.where(p > 0, p, 1.0))
    entropies = -(p * logs).sum(1)
    expected = float(np.mean(np.asarray(optax.softmax_cross_entropy(logits, targets)) - entropies))
    assert float(vision_step.excess_cross_entropy(logits, targets)) == pytest.approx(expected, 1e-5)
    perfect = jnp.log(jnp.maximum(targets, 1e-30))
    assert float(vision_step.excess_cross_entropy(perfect, targets)) == pytest.approx(0, abs=1e-6)
    gradients = [
        jax.grad(lambda x, f=f: jnp.mean(f(x, targets)))(logits)
        for f in (vision_step.excess_cross_entropy, optax.softmax_cross_entropy)
    ]
    np.testing.assert_allclose(*gradients, atol=1e-6)


def test_ire_starts_where_the_running_mean_of_the_loss_falls_to_its_threshold(config):
    ire = dataclasses.replace(config.optimizer.ire, start_step=None)
    optimizer = dataclasses.replace(config.optimizer, ire=ire)
    watching = dataclasses.replace(config, start_loss=1.0, optimizer=optimizer)
    losses = np.linspace(2.0, 0.0, 300)
    mean, start, plain, refreshes = jnp.float32(jnp.inf), jnp.int32(-1), None, []
    state = vision_step.VisionState(*[None] * 4, jnp.int32(0), mean, start)
    follow = jax.jit(lambda s, loss: vision_step._watched_loss(watching, s, loss))
    expected = None
    for step, loss in enumerate(losses):
        plain = loss if plain is None else 0.99 * plain + 0.01 * loss
        if expected is None and plain <= 1.0:
            expected = step
        state = state.replace(step=jnp.int32(step))
        mean, start = follow(state, jnp.float32(loss))
        state = state.replace(mean_loss=mean, ire_start=start)
        refreshes.append(bool(vision_step._refreshes(ire, state.step, start)))
    assert int(start) == expected and 100 < expected < 300
    assert np.flatnonzero(refreshes).tolist() == list(range(expected, 300, 2))


# Runs


class StopsAt(InterruptGuard):
    """A guard that asks to stop before a step of this call, counted from 0."""

    def __init__(self, step):
        super().__init__()
        self._left = step

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def stops(self):
        self._left -= 1
        return self._left < 0


def final_state(config, run):
    model, optimizer, state = fresh(config)
    checkpoints = vision.Checkpoints(run, keep=3, config_hash=identity_hash(config))
    return checkpoints.restore(jax.eval_shape(lambda: state))


def without_times(run):
    timed = ("images_per_second", "goodput")
    lines = read_metrics(run)
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


@pytest.fixture(scope="module")
def unbroken(config, shared, tmp_path_factory):
    """A run of four steps: its folder, its result and the lines that it reported."""
    run, lines = tmp_path_factory.mktemp("run") / "unbroken", []
    return run, train_vision(config, run, report=lines.append), lines


def test_two_steps_and_two_after_an_interruption_equal_four(
    config, shared, unbroken, tmp_path, monkeypatch
):
    run, result, lines = unbroken
    assert lines[0] == f"{config.data.source}: 15 training and 6 test images of 3 classes"
    assert (result.step, result.interrupted) == (4, False)
    with monkeypatch.context() as patch:
        patch.setattr(vision, "InterruptGuard", lambda: StopsAt(2))
        stopped = train_vision(config, tmp_path / "broken", report=lambda _: None)
    assert (stopped.step, stopped.interrupted) == (2, True)
    resumed = train_vision(config, tmp_path / "broken", report=lambda _: None)
    assert resumed == result
    (ours, place), (theirs, other) = (
        final_state(config, folder) for folder in (run, tmp_path / "broken")
    )
    assert place == other
    bits = [
        [
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in jax.tree.leaves(state)
        ]
        for state in (ours, theirs)
    ]
    assert_trees(np.testing.assert_array_equal, *bits)
    assert without_times(run) == without_times(tmp_path / "broken")


def test_a_run_is_evaluated_as_it_was_at_its_end_and_by_a_plain_loop(unbroken):
    run, *_ = unbroken
    found, loaded = evaluate_vision(run), load_vision(run)
    last = [line for line in read_metrics(run) if "accuracy" in line][-1]
    assert (last["step"], found.n) == (4, 6)
    assert (found.loss, found.accuracy) == (last["validation_loss"], last["accuracy"])
    losses, right = [], []
    for i in range(6):
        sample = loaded.data.test[i]
        logits = np.asarray(loaded.logits_fn(loaded.params, np.stack([sample["images"]] * 4)))[0]
        losses.append(np.log(np.exp(logits).sum()) - logits[sample["labels"]])
        right.append(logits.argmax() == sample["labels"])
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.accuracy == np.mean(right)
    problem = vision_problem(run, examples=20)
    total = sum(float(jax.jit(problem.loss_fn)(loaded.params, *batch)) for batch in problem.batches)
    trained = evaluate_vision(run, split="train")
    assert (problem.n, trained.n) == (15, 15)
    assert total / problem.n == pytest.approx(trained.loss, rel=1e-5)
    # The images of the folder are in order of class; 14 examples are rounded down to one batch.
    labels = [labels for _, labels in vision_problem(run, examples=14, batch_size=8).batches]
    assert np.bincount(np.concatenate(labels)).tolist() == [3, 2, 3]
    batches = list(loaded.batches("train", 8))
    assert [int(batch["weights"].sum()) for batch in batches] == [8, 7]


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(config, tmp_path, monkeypatch):
    def spoilt(**parts):
        def step(state, batch):
            return state, {"loss": jax.device_put(np.float32(np.nan))}

        return step

    monkeypatch.setattr(vision, "compile_vision_step", spoilt)
    with pytest.raises(
        NotFiniteError, match="loss is nan at step 1: .* lower .*ire.kappa"
    ) as caught:
        train_vision(config, tmp_path, report=lambda _: None)
    assert "init_from" not in str(caught.value)  # which this workload has not
    assert not list((tmp_path / "checkpoints").iterdir())


def test_fewer_images_than_a_batch_are_refused_before_anything_is_made(config, tmp_path):
    stage = dataclasses.replace(config.stage, batch_size=16)
    with pytest.raises(
        DataError, match="15 training images do not fill stage.batch_size 16: lower"
    ):
        train_vision(dataclasses.replace(config, stage=stage), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run directory"):
        load_vision(tmp_path)


# Configuration


def test_the_configuration_knows_the_presets_that_there_are():
    assert set(vision_config.PRESET_NAMES) == set(PRESETS)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.preset=resnet9", "model.preset: no preset is called 'resnet9'; known: resnet8"),
        ("optimizer.name=muon", "optimizer.name: muon is for the decoder's matrices"),
        ("stage.accumulation=2", "stage.accumulation: batch norm needs the batch in one piece"),
        ("start_loss=0.1", "optimizer.ire.start_step: start_loss decides when IRE starts"),
        ("stage.steps=1", "ire.start_step: is 1 and stage.steps 1: IRE would never start;"),
        ("optimizer.learning_rate=0.2", "stage.learning_rate: is 0.1, and optimizer"),
        ("data.augmen=none", "data.augmen: unknown key; did you mean data.augment"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(config, folder, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(folder / "tiny.yaml", [override])
    assert "\n" not in str(caught.value)


def test_patches_that_do_not_fit_are_refused_with_the_cure(config):
    model = dataclasses.replace(config.model, preset="vit-t-4", width=192)
    data = dataclasses.replace(config.data, image_size=30)
    with pytest.raises(ConfigError, match="vit-t-4: images of 30 pixels .* change data.image_size"):
        vision_model(dataclasses.replace(config, model=model, data=data), CLASSES)
