"""Training a language model: stage after stage, from where a former call stopped."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlab.config import ExperimentConfig, StageConfig, identity, identity_hash, save_yaml
from jaxlab.data.pipeline import TextSamples, training_iterator
from jaxlab.errors import CheckpointError, JaxlabError
from jaxlab.models.decoder import abstract_decoder, initial_parameters
from jaxlab.optim.blocks import block_labels
from jaxlab.optim.factory import make_optimizer
from jaxlab.optim.flat_mask import flat_fractions
from jaxlab.optim.schedules import make_schedule
from jaxlab.sharding.mesh import check_batch_fits, check_model_fits, make_mesh
from jaxlab.sharding.rules import batch_sharding
from jaxlab.training.checkpoint import Checkpoints, read_weights
from jaxlab.training.corpus import (
    Corpus,
    Neighbourhood,
    prepare_corpus,
    prepare_neighbourhood,
    stage_sources,
)
from jaxlab.training.curvature import batch_curvature
from jaxlab.training.guards import InterruptGuard, divergence_advice
from jaxlab.training.metrics import (
    Goodput,
    MetricsWriter,
    model_flops_utilization,
    train_flops_per_token,
)
from jaxlab.training.state import TrainState, abstract_state, start_state
from jaxlab.training.step import SequenceFormat, compile_score, compile_train_step
from jaxlab.training.steps import Recorder, run_steps

CONFIG_FILE = "config.yaml"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of :func:`train` ended."""

    step: int
    stage: str
    interrupted: bool
    validation_loss: float | None


@dataclasses.dataclass
class _Run:
    """What the stages of one run share."""

    config: ExperimentConfig
    corpus: Corpus
    neighbourhood: Neighbourhood | None
    graphdef: Any
    mesh: Mesh
    checkpoints: Checkpoints
    metrics: MetricsWriter
    goodput: Goodput
    guard: InterruptGuard
    report: Callable[[str], None]
    validation_loss: float | None = None


def resolve_model(config: ExperimentConfig, vocab_size: int) -> ExperimentConfig:
    """The configuration with the vocabulary of its tokenizer, if it names none itself."""
    if config.model.vocab_size:
        return config
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    return dataclasses.replace(config, model=model)


def train(
    config: ExperimentConfig, run: str | Path, *, report: Callable[[str], None] = print
) -> TrainResult:
    """Run the stages of ``config`` in the directory ``run``; goes on where a former call stopped.

    Raises JaxlabError for a corpus, tokenizer or checkpoint that cannot be used, before or after
    any step, never in the middle of a save.
    """
    run = Path(run)
    goodput = Goodput()
    with goodput.measure("init"), _all_or_nothing(run):
        checkpoints = Checkpoints(
            run,
            keep=config.training.keep,
            config_hash=identity_hash(config),
            config=identity(config),
            warn=report,
        )
        corpus = prepare_corpus(config, run, report=report)
        config = resolve_model(config, corpus.tokenizer.vocab_size)
        save_yaml(config, run / CONFIG_FILE)
        neighbourhood = None
        reads = any(stage.memory for stage in config.stages.named().values())
        if reads and config.data.facts_fraction < 1:
            neighbourhood = prepare_neighbourhood(config, corpus, report=report)
        mesh = run_mesh(config)
        state, position = _start(config, mesh, checkpoints, report=report)
        graphdef, _ = abstract_decoder(config.model)
    with MetricsWriter(run) as metrics, InterruptGuard() as guard, jax.set_mesh(mesh):
        shared = _Run(
            config=config,
            corpus=corpus,
            neighbourhood=neighbourhood,
            graphdef=graphdef,
            mesh=mesh,
            checkpoints=checkpoints,
            metrics=metrics,
            goodput=goodput,
            guard=guard,
            report=report,
        )
        result = _run_stages(shared, state, position)
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in goodput.seconds().items())
    report(f"goodput {goodput.share():.2f}; seconds: {spent}")
    return result


@contextlib.contextmanager
def _all_or_nothing(run: Path) -> Iterator[None]:
    """Take a new run directory away again when the run cannot begin."""
    existed = run.exists()
    try:
        yield
    except JaxlabError:
        if not existed and jax.process_index() == 0:
            shutil.rmtree(run, ignore_errors=True)
        raise


def _run_stages(run: _Run, state: TrainState, position: dict[str, Any]) -> TrainResult:
    stages = run.config.stages.named()
    names = list(stages)
    if position["step"]:
        run.report(f"resuming at step {position['step']} ({position['stage']})")
    run.metrics.truncate(position["step"])
    offset = 0
    for number, name in enumerate(names):
        stage, total = stages[name], offset + stages[name].steps
        if number > names.index(position["stage"]):
            optimizer = _optimizer(run.config, name)
            state = start_state(state.params, optimizer, seed=run.config.seed, mesh=run.mesh)
            position = {"stage": name, "step": offset, "data": None}
        if name == position["stage"] and position["step"] < total:
            state, interrupted = run_stage(run, name, stage, state, position, offset=offset)
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
    config: ExperimentConfig, mesh: Mesh, checkpoints: Checkpoints, *, report: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]]:
    """State and position from the newest checkpoint, else from ``init_from``, else new."""
    first = next(iter(config.stages.named()))
    optimizer, seed = _optimizer(config, first), config.seed
    # The same in every stage, which all use one optimizer.
    template = abstract_state(config.model, optimizer, seed=seed, mesh=mesh)
    if checkpoints.latest() is not None:
        return checkpoints.restore(template)
    if config.init_from is not None:
        weights = read_weights(config.init_from, {"params": template.params}, warn=report)
        params = weights["params"]
    else:
        params = initial_parameters(config.model, seed, mesh)
    state = start_state(params, optimizer, seed=seed, mesh=mesh)
    return state, {"stage": first, "step": 0, "data": None}


def _optimizer(config: ExperimentConfig, stage: str):
    seed = _stage_seed(config, stage)
    return make_optimizer(config.optimizer, config.stages.named()[stage], seed=seed)


def _stage_seed(config: ExperimentConfig, stage: str) -> int:
    """Of what is drawn in a stage and no other: the order of rows, the labels of a curvature."""
    # By name, not by place: a control without warmup sees the rows in the same order.
    return config.seed * 1000 + ("warmup", "continual").index(stage)


def sequence_format(config: ExperimentConfig, corpus_tokenizer, *, memory: bool) -> SequenceFormat:
    """How rows are read in a stage."""
    if not memory:
        return SequenceFormat(bos_id=corpus_tokenizer.bos_id)
    return SequenceFormat(
        bos_id=corpus_tokenizer.bos_id,
        preface_ids=corpus_tokenizer.preface_ids,
        memory=config.memory,
    )


def run_stage(
    run: _Run,
    name: str,
    stage: StageConfig,
    state: TrainState,
    position: dict[str, Any],
    *,
    offset: int,
) -> tuple[TrainState, bool]:
    """The steps of one stage. Returns the state and whether it was interrupted."""
    config, training = run.config, run.config.training
    form = sequence_format(config, run.corpus.tokenizer, memory=stage.memory)
    parts = {"graphdef": run.graphdef, "form": form, "accumulation": stage.accumulation}
    ire = config.optimizer.ire
    step_function = compile_train_step(
        optimizer=_optimizer(config, name),
        curvature=ire and batch_curvature(ire, **parts),
        **parts,
    )
    batches = _batches(run, name, stage)
    if position["data"] is not None:
        batches.set_state(position["data"])
    score = _Evaluator(run, form, stage)
    writer = _StageMetrics(run, name, stage, offset)

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

    tokens = stage.batch_size * config.data.sequence_length
    return run_steps(
        state,
        step_function,
        batches,
        title=name,
        steps=stage.steps,
        training=training,
        guard=run.guard,
        goodput=run.goodput,
        place=batch_sharding(run.mesh),
        record=Recorder(writer.step, units=tokens, offset=offset, advice=advice),
        evaluate=evaluate,
        save=save,
    )


def _batches(run: _Run, name: str, stage: StageConfig):
    sources, weights = stage_sources(
        run.config, run.corpus, memory=stage.memory, neighbourhood=run.neighbourhood
    )
    order = _stage_seed(run.config, name)
    return training_iterator(sources, weights, batch_size=stage.batch_size, seed=order)


class _Evaluator:
    """Mean validation loss in nats a token, in the format of the stage."""

    def __init__(self, run: _Run, form: SequenceFormat, stage: StageConfig):
        self._score = compile_score(run.graphdef, form)
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
        self._samples = samples
        self._batch = stage.batch_size // stage.accumulation
        self._place = batch_sharding(run.mesh)
        self._count = min(run.config.training.evaluate_rows, len(rows))

    def __call__(self, params) -> float | None:
        if self._samples is None:
            return None
        total = weight = 0.0
        # Rows spread over all documents, always the same ones.
        chosen = np.linspace(0, len(self._samples) - 1, self._count).astype(int).tolist()
        for start in range(0, self._count, self._batch):
            part = [self._samples[i] for i in chosen[start : start + self._batch]]
            blank = self._batch - len(part)
            part += [{**part[0], "loss_mask": np.zeros_like(part[0]["loss_mask"])}] * blank
            batch = {key: np.stack([sample[key] for sample in part]) for key in part[0]}
            scores = jax.device_get(self._score(params, jax.device_put(batch, self._place)))
            total -= float((scores * batch["loss_mask"]).sum())
            weight += float(batch["loss_mask"].sum())
        return total / max(weight, 1.0)


class _StageMetrics:
    """Writes down the numbers of a stage."""

    def __init__(self, run: _Run, name: str, stage: StageConfig, offset: int):
        self._run, self._name, self._offset = run, name, offset
        config = run.config
        self._flops = train_flops_per_token(
            config.model,
            vocab_size=config.model.vocab_size,
            sequence_length=config.data.sequence_length,
        )
        self._schedule = make_schedule(stage)

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
