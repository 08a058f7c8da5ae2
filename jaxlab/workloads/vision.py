"""Image classification: train, resume, evaluate, and load for whatever comes after."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from jaxlab.config import identity, identity_hash, load_config, save_yaml
from jaxlab.data.images import ImageData, batches_in_order, load_images
from jaxlab.data.pipeline import RandomAccess, Sample, training_iterator
from jaxlab.errors import CheckpointError, ConfigError, DataError
from jaxlab.evaluation.problems import Problem, classification_problem
from jaxlab.models.vision import PRESETS, VisionModel
from jaxlab.optim.factory import make_optimizer
from jaxlab.optim.schedules import make_schedule
from jaxlab.training.checkpoint import Checkpoints, read_weights, split_location
from jaxlab.training.folder import CONFIG_FILE, refuse_other_workload
from jaxlab.training.goodput import FILE, Goodput
from jaxlab.training.guards import InterruptGuard, divergence_advice
from jaxlab.training.loop import TrainResult
from jaxlab.training.metrics import MetricsWriter
from jaxlab.training.steps import Recorder, run_steps
from jaxlab.training.watchdog import Watchdog
from jaxlab.workloads.vision_config import VisionConfig
from jaxlab.workloads.vision_step import (
    VisionState,
    compile_logits,
    compile_vision_step,
    cross_entropy,
    start_vision_state,
)

_STAGE = "train"  # what the only stage is called in metrics and checkpoints
_DECODERS = 16  # threads that decode images which are not in memory


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats and share of right answers over ``n`` images."""

    loss: float
    accuracy: float
    n: int


def vision_model(config: VisionConfig, classes: int) -> VisionModel:
    """The model that a configuration names. Raises ConfigError where its sizes do not fit."""
    shape = PRESETS[config.model.preset]
    if config.model.width is not None:
        shape = dataclasses.replace(shape, width=config.model.width)
    model = VisionModel(shape, classes, config.data.image_size, config.model.compute_dtype)
    try:
        model.abstract()
    except ValueError as error:
        raise ConfigError(
            f"model.preset {config.model.preset}: {error}; change data.image_size or model.width"
        ) from None
    return model


def read_images(config: VisionConfig) -> ImageData:
    """The images of a configuration. Raises DataError."""
    data = config.data
    return load_images(
        data.source, image_size=data.image_size, limit=data.limit, test_limit=data.test_limit
    )


def _check_images(config: VisionConfig, data: ImageData) -> str:
    """What was found. Raises DataError where it does not fill a batch."""
    images, batch = len(data.train), config.stage.batch_size
    if images < batch:
        raise DataError(
            f"{config.data.source}: {images} training images do not fill stage.batch_size {batch}: "
            "lower it, raise data.limit or add images"
        )
    return f"{images} training and {len(data.test)} test images of {len(data.classes)} classes"


def train_vision(
    config: VisionConfig, run: str | Path, *, report: Callable[[str], None] = print
) -> TrainResult:
    """Train in the directory ``run``; goes on where a former call stopped.

    Raises JaxlabError for a folder, images or checkpoints that cannot be used and for a loss
    that is not finite.
    """
    run = Path(run)
    refuse_other_workload(config, run)
    with Watchdog(config.training.hang_seconds, run) as watchdog:
        goodput = Goodput(run / FILE, beat=watchdog.beat, report=report)
        return _train(config, run, goodput, report)


def _train(
    config: VisionConfig, run: Path, goodput: Goodput, report: Callable[[str], None]
) -> TrainResult:
    with goodput.measure("init"):
        data = read_images(config)
        report(f"{config.data.source}: {_check_images(config, data)}")
        model = vision_model(config, len(data.classes))
        checkpoints = Checkpoints(
            run,
            keep=config.training.keep,
            config_hash=identity_hash(config),
            config=identity(config),
            warn=report,
        )
        save_yaml(config, run / CONFIG_FILE)
        state, position = _start(config, model, checkpoints)
    goodput.sign_of_life()
    if position["step"]:
        report(f"resuming at step {position['step']}")
    with MetricsWriter(run) as metrics, InterruptGuard() as guard:
        metrics.truncate(position["step"])
        trainer = _Trainer(config, data, model, checkpoints, metrics, goodput, guard, report)
        result = trainer.run(state, position)
        result = dataclasses.replace(result, preempted=result.interrupted and guard.preempted)
    goodput.close()
    report(goodput.summary())
    return result


def _optimizer(config: VisionConfig) -> Any:
    return make_optimizer(config.optimizer, config.stage, seed=config.seed)


def _start(
    config: VisionConfig, model: VisionModel, checkpoints: Checkpoints
) -> tuple[VisionState, dict[str, Any]]:
    """State and position from the newest checkpoint, or new."""
    optimizer = _optimizer(config)
    if checkpoints.latest() is None:
        params, statistics = model.initial(config.seed)
        state = start_vision_state(params, statistics, optimizer, seed=config.seed)
        return state, {"step": 0, "data": None}
    _, params, statistics = model.abstract()
    template = jax.eval_shape(
        lambda p, s: start_vision_state(p, s, optimizer, seed=config.seed), params, statistics
    )
    return checkpoints.restore(template)


@dataclasses.dataclass
class _Trainer:
    """The loop and what it needs."""

    config: VisionConfig
    data: ImageData
    model: VisionModel
    checkpoints: Checkpoints
    metrics: MetricsWriter
    goodput: Goodput
    guard: InterruptGuard
    report: Callable[[str], None]
    validation_loss: float | None = None

    def run(self, state: VisionState, position: dict[str, Any]) -> TrainResult:
        """Steps up to the end, or to an interruption."""
        config, stage = self.config, self.config.stage
        step_function = compile_vision_step(
            config=config, model=self.model, optimizer=_optimizer(config)
        )
        logits = compile_logits(config, self.model)
        batches = self._batches(position)

        def save(done: int, state: VisionState, last: bool) -> None:
            place = {"step": done, "data": batches.get_state()}
            self.checkpoints.save(done, state, place, label=_STAGE if last else None)

        state, interrupted = run_steps(
            state,
            step_function,
            batches,
            title=_STAGE,
            steps=stage.steps,
            training=config.training,
            guard=self.guard,
            goodput=self.goodput,
            record=Recorder(
                self._write,
                units=stage.batch_size,
                rows=stage.batch_size,
                report=self.report,
                skip=config.training.skip_nonfinite,
                advice=lambda: divergence_advice(config.optimizer, stage, "stage"),
            ),
            evaluate=functools.partial(self._evaluate, logits),
            save=save,
        )
        return TrainResult(int(state.step), _STAGE, interrupted, self.validation_loss)

    def _batches(self, position: dict[str, Any]) -> Any:
        transform = self.data.train_transform
        batches = training_iterator(
            [self.data.train],
            [1.0],
            batch_size=self.config.stage.batch_size,
            seed=self.config.seed,
            transform=transform,
            threads=0 if transform is None else min(_DECODERS, os.cpu_count() or 1),
        )
        if position["data"] is not None:
            batches.set_state(position["data"])
        return batches

    @functools.cached_property
    def _schedule(self) -> Callable[[Array], Array]:
        return make_schedule(self.config.stage)

    def _write(self, done: int, numbers: dict[str, float], speed: float | None) -> None:
        with jax.transfer_guard("allow"):
            rate = float(self._schedule(jnp.asarray(done - 1)))
        extra = {"learning_rate": rate, "images_per_second": speed}
        extra["goodput"] = self.goodput.share()
        self.metrics.write(done, {**numbers, **extra}, stage=_STAGE)

    def _evaluate(self, logits: Callable[..., Array], step: int, state: VisionState) -> None:
        found = _evaluation(
            functools.partial(logits, state.params, state.statistics),
            self.data.test,
            self.config.stage.batch_size,
        )
        self.validation_loss = found.loss
        values = {"validation_loss": found.loss, "accuracy": found.accuracy}
        self.metrics.write(step, values, stage=_STAGE)
        self.report(f"step {step}: accuracy {found.accuracy:.4f}, test loss {found.loss:.4f} nats")


@jax.jit
def _scores(logits: Array, labels: Array, weights: Array) -> Float[Array, "2"]:
    """Sums of the cross-entropy and of right answers over the images that count."""
    right = jnp.argmax(logits, axis=-1) == labels
    losses = cross_entropy(logits, labels)
    return jnp.stack([jnp.sum(losses * weights), jnp.sum(right * weights)])


def _evaluation(
    logits: Callable[[Array], Array], source: RandomAccess, batch_size: int
) -> Evaluation:
    total = np.zeros(2)
    for batch in batches_in_order(source, batch_size):
        batch = jax.device_put(batch)
        scores = _scores(logits(batch["images"]), batch["labels"], batch["weights"])
        total += jax.device_get(scores)
    loss, right = total / len(source)
    return Evaluation(float(loss), float(right), len(source))


@dataclasses.dataclass(frozen=True)
class LoadedVision:
    """A trained model with its images: what evaluations of any kind need."""

    config: VisionConfig
    model: VisionModel
    data: ImageData
    params: PyTree
    statistics: PyTree

    @functools.cached_property
    def _logits(self) -> Callable[..., Array]:
        return compile_logits(self.config, self.model)

    def logits_fn(
        self,
        params: PyTree,
        images: UInt8[Array, "B h w 3"] | UInt8[np.ndarray, "B h w 3"],
    ) -> Float[Array, "B classes"]:
        """Logits at any parameters for images as bytes, with the trained batch statistics."""
        return self._logits(params, self.statistics, images)

    def batches(self, split: str, batch_size: int) -> Iterator[Sample]:
        """Images of ``train`` or ``test`` in order, not augmented.

        Dictionaries of ``images``, ``labels`` and ``weights``, which are 0 where the last batch is
        filled up. Training images of different sizes are cut as in the test.
        """
        sources = {"train": self.data.train_in_order, "test": self.data.test}
        return batches_in_order(sources[split], batch_size)


def load_vision(run: str | Path, *, warn: Callable[[str], None] = print) -> LoadedVision:
    """The newest weights of a run (``DIR``), or those of its end (``DIR@train``), with its images.

    Raises CheckpointError when there are none, DataError when the images are gone.
    """
    folder, _ = split_location(run)
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{run}: is not a run directory (it has no {CONFIG_FILE}); train one")
    config = load_config(path)
    if not isinstance(config, VisionConfig):
        raise CheckpointError(f"{run}: is a run of {config.workload}, not of vision")
    data = read_images(config)
    model = vision_model(config, len(data.classes))
    _, params, statistics = model.abstract()
    template = {"params": params, "statistics": statistics}
    weights = read_weights(str(run), template, warn=warn)
    return LoadedVision(config, model, data, weights["params"], weights["statistics"])


def evaluate_vision(
    run: str | Path, *, split: str = "test", warn: Callable[[str], None] = print
) -> Evaluation:
    """Loss and accuracy of a run's newest weights on the images of a split."""
    loaded = load_vision(run, warn=warn)
    sources = {"train": loaded.data.train_in_order, "test": loaded.data.test}
    return _evaluation(
        functools.partial(loaded.logits_fn, loaded.params),
        sources[split],
        loaded.config.stage.batch_size,
    )


def vision_problem(
    run: str | Path, *, examples: int, batch_size: int = 128, warn: Callable[[str], None] = print
) -> Problem:
    """The plain cross-entropy of a run on ``examples`` training images, spread over all of them.

    In float32 and with the trained batch statistics, so that the loss is a sum over images;
    ``examples`` is rounded down to whole batches.
    """
    loaded = load_vision(run, warn=warn)
    exact = dataclasses.replace(loaded.model, compute_dtype="float32")
    logits = compile_logits(loaded.config, exact)
    source = loaded.data.train_in_order
    count = min(examples, len(source))
    size = min(batch_size, count)
    # Rounded before images are chosen: they are in order of class, and the last would be missing.
    chosen = np.linspace(0, len(source) - 1, count // size * size).astype(int)
    samples = [source[int(index)] for index in chosen]
    parts = [samples[i : i + size] for i in range(0, len(samples), size)]
    batches = [
        tuple(jnp.stack([sample[key] for sample in part]) for key in ("images", "labels"))
        for part in parts
    ]
    return classification_problem(
        loaded.params, lambda params, images: logits(params, loaded.statistics, images), batches
    )
