"""Training a language model: stage after stage, from where a former call stopped."""

import contextlib
import dataclasses
import functools
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlab.config import ExperimentConfig, identity, identity_hash, save_yaml
from jaxlab.data.pipeline import TextSamples, training_iterator
from jaxlab.data.tokenizer import Tokenizer
from jaxlab.errors import CheckpointError, ConfigError, JaxlabError
from jaxlab.models.decoder import initial_parameters
from jaxlab.optim.blocks import block_labels
from jaxlab.optim.flat_mask import flat_fractions
from jaxlab.optim.schedules import make_schedule
from jaxlab.sharding.batches import BatchPlace
from jaxlab.sharding.mesh import check_batch_fits, check_model_fits, make_mesh
from jaxlab.sharding.processes import leader_first, leads, reporter
from jaxlab.sharding.rules import current_mesh
from jaxlab.training.checkpoint import Checkpoints, read_weights
from jaxlab.training.corpus import (
    Corpus,
    Neighbourhood,
    prepare_corpus,
    prepare_neighbourhood,
    stage_sources,
)
from jaxlab.training.folder import CONFIG_FILE, refuse_other_workload
from jaxlab.training.goodput import FILE, Goodput
from jaxlab.training.guards import InterruptGuard, divergence_advice
from jaxlab.training.metrics import (
    MetricsWriter,
    NoMetrics,
    model_flops_utilization,
    train_flops_per_token,
)
from jaxlab.training.program import TrainProgram, resolve_model, sequence_format
from jaxlab.training.state import TrainState, start_state
from jaxlab.training.step import compile_loss
from jaxlab.training.steps import Recorder, run_steps
from jaxlab.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of :func:`train` ended."""

    step: int
    stage: str
    interrupted: bool
    validation_loss: float | None
    # Interrupted because the machine is being taken away: whoever launched this starts it again.
    preempted: bool = False


@dataclasses.dataclass
class _Run:
    """What the stages of one run share."""

    config: ExperimentConfig
    corpus: Corpus
    neighbourhood: Neighbourhood | None
    mesh: Mesh
    checkpoints: Checkpoints
    metrics: MetricsWriter | NoMetrics
    goodput: Goodput
    guard: InterruptGuard
    report: Callable[[str], None]
    validation_loss: float | None = None

    def program(self, stage: str) -> TrainProgram:
        """What is trained in a stage."""
        return _program(self.config, self.corpus.tokenizer, stage, self.mesh)


def _program(config: ExperimentConfig, tokenizer: Tokenizer, name: str, mesh: Mesh) -> TrainProgram:
    stage = config.stages.named()[name]
    form = sequence_format(config, tokenizer, memory=stage.memory)
    return TrainProgram(config, name, mesh, form)


def train(
    config: ExperimentConfig, run: str | Path, *, report: Callable[[str], None] = print
) -> TrainResult:
    """Run the stages of ``config`` in the directory ``run``; goes on where a former call stopped.

    Raises JaxlabError for a folder, corpus, tokenizer or checkpoint that cannot be used, before
    or after any step, never in the middle of a save.
    """
    if "://" in str(run):
        raise ConfigError(
            f"{run}: is a URL, and a run lies on a file system that all its hosts share: mount the "
            "bucket and give the folder"
        )
    run, report = Path(run), reporter(report)
    refuse_other_workload(config, run)
    with Watchdog(config.training.hang_seconds, run) as watchdog:
        goodput = Goodput(run / FILE if leads() else None, beat=watchdog.beat, report=report)
        return _train(config, run, goodput, report)


def _train(
    config: ExperimentConfig, run: Path, goodput: Goodput, report: Callable[[str], None]
) -> TrainResult:
    with goodput.measure("init"), _all_or_nothing(run):
        checkpoints = Checkpoints(
            run,
            keep=config.training.keep,
            config_hash=identity_hash(config),
            config=identity(config),
            warn=report,
        )
        run_mesh(config)  # refuses what cannot be before the corpus is read
        corpus = leader_first(functools.partial(prepare_corpus, config, run, report=report))
        config = resolve_model(config, corpus.tokenizer.vocab_size)
        leader_first(functools.partial(_publish, config, run))
        neighbourhood = None
        reads = any(stage.memory for stage in config.stages.named().values())
        if reads and config.data.facts_fraction < 1:
            prepare = functools.partial(prepare_neighbourhood, config, corpus, report=report)
            neighbourhood = leader_first(prepare)
        mesh = run_mesh(config)
        state, position = _start(config, corpus.tokenizer, mesh, checkpoints, report=report)
    goodput.sign_of_life()
    written = MetricsWriter(run) if leads() else NoMetrics()
    with written as metrics, InterruptGuard() as guard, current_mesh(mesh):
        shared = _Run(
            config=config,
            corpus=corpus,
            neighbourhood=neighbourhood,
            mesh=mesh,
            checkpoints=checkpoints,
            metrics=metrics,
            goodput=goodput,
            guard=guard,
            report=report,
        )
        result = _run_stages(shared, state, position)
        result = dataclasses.replace(result, preempted=result.interrupted and guard.preempted)
    goodput.close()
    report(goodput.summary())
    return result


def _publish(config: ExperimentConfig, run: Path) -> None:
    """Process 0 writes the configuration down, and the others see it, or share no file system."""
    if leads():
        save_yaml(config, run / CONFIG_FILE)
    elif not (run / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{run}: {socket.gethostname()} does not see what process 0 wrote there: a run lies on "
            "a file system that all its hosts share"
        )


@contextlib.contextmanager
def _all_or_nothing(run: Path) -> Iterator[None]:
    """Take a new run directory away again when the run cannot begin."""
    existed = run.exists()
    try:
        yield
    except JaxlabError:
        if not existed and leads():
            shutil.rmtree(run, ignore_errors=True)
        raise


def _run_stages(run: _Run, state: TrainState, position: dict[str, Any]) -> TrainResult:
    stages = run.config.stages.named()
    names = list(stages)
    if position["step"]:
        run.report(f"resuming at step {position['step']} ({position['stage']})")
        run.report(run.goodput.summary())
    run.metrics.truncate(position["step"])
    offset = 0
    for number, name in enumerate(names):
        program, total = run.program(name), offset + stages[name].steps
        if number > names.index(position["stage"]):
            seed = run.config.seed
            state = start_state(state.params, program.optimizer, seed=seed, mesh=run.mesh)
            position = {"stage": name, "step": offset, "data": None}
        if name == position["stage"] and position["step"] < total:
            state, interrupted = run_stage(run, program, state, position, offset=offset)
            if interrupted:
                step = offset + int(state.step)
                return TrainResult(step, name, True, run.validation_loss)
        offset = total
    return TrainResult(offset, names[-1], False, run.validation_loss)


def run_mesh(config: ExperimentConfig) -> Mesh:
    """The mesh of a run over this machine's devices. Raises ConfigError for one that cannot be."""
    mesh = make_mesh(config.mesh)
    check_model_fits(mesh, config.model)
    for name, stage in config.stages.named().items():
        key = f"stages.{name}.batch_size"
        check_batch_fits(mesh, key, stage.batch_size // stage.accumulation)
    return mesh


def _start(
    config: ExperimentConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    checkpoints: Checkpoints,
    *,
    report: Callable[[str], None],
) -> tuple[TrainState, dict[str, Any]]:
    """State and position from the newest checkpoint, else from ``init_from``, else new."""
    first = next(iter(config.stages.named()))
    # Its shapes are those of every stage, which all use one optimizer.
    program = _program(config, tokenizer, first, mesh)
    if checkpoints.latest() is not None:
        return checkpoints.restore(program.state)
    if config.init_from is not None:
        params = read_weights(config.init_from, {"params": program.state.params}, warn=report)
        params = params["params"]
    else:
        params = initial_parameters(config.model, config.seed, mesh)
    state = start_state(params, program.optimizer, seed=config.seed, mesh=mesh)
    return state, {"stage": first, "step": 0, "data": None}


def run_stage(
    run: _Run, program: TrainProgram, state: TrainState, position: dict[str, Any], *, offset: int
) -> tuple[TrainState, bool]:
    """The steps of one stage. Returns the state and whether it was interrupted."""
    config, stage, name = run.config, program.stage, program.stage_name
    place = BatchPlace(run.mesh, stage.batch_size)
    batches = _batches(run, program, place.rows)
    if position["data"] is not None:
        batches.set_state(position["data"])
    score = _Evaluator(run, program)
    writer = _StageMetrics(run, program, offset)

    def evaluate(done: int, state: TrainState) -> None:
        run.validation_loss = score(state.params)
        writer.evaluation(done, run.validation_loss, state.opt_state)

    def save(done: int, state: TrainState, last: bool) -> None:
        place = {"stage": name, "step": offset + done, "data": batches.get_state()}
        run.checkpoints.save(offset + done, state, place, label=name if last else None)

    def advice() -> str:
        changes = divergence_advice(config.optimizer, stage, f"stages.{name}")
        # What was saved is finite; without a save there is nothing to start from.
        kept = run.checkpoints.latest() is not None
        return changes + "; init_from set to this directory keeps its last weights" * kept

    record = Recorder(
        writer.step,
        units=stage.batch_size * config.data.sequence_length,
        rows=stage.batch_size,
        offset=offset,
        advice=advice,
        report=run.report,
        skip=config.training.skip_nonfinite,
    )
    return run_steps(
        state,
        program.step,
        batches,
        title=name,
        steps=stage.steps,
        training=config.training,
        guard=run.guard,
        goodput=run.goodput,
        place=place,
        record=record,
        evaluate=evaluate,
        save=save,
    )


def _batches(run: _Run, program: TrainProgram, rows: tuple[int, ...]):
    stage = program.stage
    sources, weights = stage_sources(
        run.config, run.corpus, memory=stage.memory, neighbourhood=run.neighbourhood
    )
    size = stage.batch_size
    return training_iterator(sources, weights, batch_size=size, seed=program.seed, rows=rows)


class _Evaluator:
    """Mean validation loss in nats a token, in the format of the stage."""

    def __init__(self, run: _Run, program: TrainProgram):
        stage = program.stage
        self._loss = compile_loss(program.graphdef, program.form)
        rows, memory = run.corpus.validation_rows, run.config.memory
        samples = TextSamples(rows)
        if stage.memory and run.neighbourhood is not None:
            samples = TextSamples(
                rows,
                run.neighbourhood.references,
                run.neighbourhood.validation,
                chunk_length=memory.chunk_length,
                retrieval_lag=memory.retrieval_lag,
            )
        elif stage.memory:
            samples = None  # trained on facts alone: there is no text to evaluate with memory
        self._samples, self._goodput = samples, run.goodput
        self._batch = stage.batch_size // stage.accumulation
        self._place = BatchPlace(run.mesh, self._batch)
        self._count = min(run.config.training.evaluate_rows, len(rows))

    def __call__(self, params) -> float | None:
        if self._samples is None:
            return None
        total = weight = 0.0
        # Rows spread over all documents, always the same ones.
        chosen = np.linspace(0, len(self._samples) - 1, self._count).astype(int).tolist()
        for start in range(0, self._count, self._batch):
            part = chosen[start : start + self._batch]
            samples = [self._sample(part, row) for row in self._place.rows]
            batch = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
            sums = jax.device_get(self._loss(params, self._place(batch)))
            total, weight = total + float(sums[0]), weight + float(sums[1])
            self._goodput.sign_of_life()
        return total / max(weight, 1.0)

    def _sample(self, part: list[int], row: int) -> dict[str, np.ndarray]:
        """What is in one row of a batch; in the last ones, where text has ended, nothing counts."""
        if row < len(part):
            return self._samples[part[row]]
        blank = self._samples[part[0]]
        return {**blank, "loss_mask": np.zeros_like(blank["loss_mask"])}


class _StageMetrics:
    """Writes down the numbers of a stage."""

    def __init__(self, run: _Run, program: TrainProgram, offset: int):
        self._run, self._name, self._offset = run, program.stage_name, offset
        config = run.config
        self._flops = train_flops_per_token(
            config.model,
            vocab_size=config.model.vocab_size,
            sequence_length=config.data.sequence_length,
        )
        self._schedule = make_schedule(program.stage)

    def step(self, done: int, numbers: dict[str, float], speed: float | None) -> None:
        """The numbers of one step; ``speed`` in tokens a second."""
        run, mfu = self._run, None
        if speed is not None:
            mfu = model_flops_utilization(
                speed,
                self._flops,
                peak_flops=run.config.training.peak_flops,
                devices=jax.device_count(),
            )
        with jax.transfer_guard("allow"):
            rate = float(self._schedule(jnp.asarray(done - 1)))
        extra = {"learning_rate": rate, "tokens_per_second": speed, "mfu": mfu}
        extra["goodput"] = run.goodput.share()
        run.metrics.write(self._offset + done, {**numbers, **extra}, stage=self._name)

    def evaluation(self, done: int, loss: float | None, opt_state: Any) -> None:
        """Write a validation loss, and with IRE the flat share of each kind of block."""
        if loss is not None:
            shares = jax.device_get(_flat_fractions(opt_state))
            numbers = {f"flat_fraction/{name}": value for name, value in shares.items()}
            numbers = {"validation_loss": loss, **numbers}
            step = self._offset + done
            self._run.metrics.write(step, numbers, stage=self._name)
            self._run.report(f"{self._name} step {step}: validation loss {loss:.4f} nats a token")


@jax.jit
def _flat_fractions(opt_state: Any) -> dict[str, jax.Array]:
    return flat_fractions(opt_state, block_labels)


def load_run(run: str | Path) -> ExperimentConfig:
    """The resolved configuration of a run directory. Raises CheckpointError."""
    from jaxlab.config import load_config

    path = Path(run) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{run}: is not a run directory (it has no {CONFIG_FILE}); train one")
    config = load_config(path)
    if not isinstance(config, ExperimentConfig):
        raise CheckpointError(f"{run}: is a run of {config.workload}, not of a language model")
    return config
