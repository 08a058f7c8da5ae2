"""The train step of one stage: what a run executes, and what a preflight compiles for a pod."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlab.config import ExperimentConfig, StageConfig
from jaxlab.data.tokenizer import Tokenizer
from jaxlab.models.decoder import abstract_decoder
from jaxlab.optim.factory import make_optimizer
from jaxlab.sharding.rules import batch_sharding, is_spread
from jaxlab.training.curvature import batch_curvature
from jaxlab.training.state import TrainState, abstract_state
from jaxlab.training.step import Batch, Metrics, SequenceFormat, compile_train_step


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """A stage of a run, compiled when it is first called.

    ``config`` has a vocabulary (:func:`resolve_model`). Under
    ``jax.set_mesh(mesh)``, ``program.step.lower(program.state, program.batch)`` is the very step of
    a run.
    """

    config: ExperimentConfig
    stage_name: str
    mesh: Mesh
    form: SequenceFormat

    @property
    def stage(self) -> StageConfig:
        """The stage's part of the configuration."""
        return self.config.stages.named()[self.stage_name]

    @property
    def seed(self) -> int:
        """Of what is drawn in this stage and no other: the order of rows, a curvature's labels."""
        # By name, not by place: a control without warmup sees the rows in the same order.
        return self.config.seed * 1000 + ("warmup", "continual").index(self.stage_name)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer with the stage's schedule."""
        return make_optimizer(self.config.optimizer, self.stage, seed=self.seed)

    @functools.cached_property
    def graphdef(self) -> Any:
        """The model's structure, without its parameters."""
        return abstract_decoder(self.config.model)[0]

    @functools.cached_property
    def step(self) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """The jitted step, which reuses the buffers of the state that it is given."""
        parts = {"graphdef": self.graphdef, "form": self.form}
        parts["accumulation"] = self.stage.accumulation
        ire = self.config.optimizer.ire
        curvature = ire and batch_curvature(ire, **parts)
        lies = None
        if is_spread(self.mesh):
            lies = jax.tree.map(lambda x: x.sharding, self.state)
        return compile_train_step(
            shardings=lies,
            optimizer=self.optimizer,
            curvature=curvature,
            skip_nonfinite=self.config.training.skip_nonfinite > 0,
            **parts,
        )

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes of the state, with their shardings on a mesh of several devices."""
        return abstract_state(
            self.config.model, self.optimizer, seed=self.config.seed, mesh=self.mesh
        )

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch, with their sharding: what :class:`TextSamples` make."""
        rows, length = self.stage.batch_size, self.config.data.sequence_length
        shapes = {"tokens": (rows, length), "loss_mask": (rows, length)}
        if self.stage.memory:
            memory = self.config.memory
            chunks = length // memory.chunk_length
            shapes["segments"] = (rows, length)
            shapes["references"] = (rows, chunks, memory.reference_length)
            shapes["reference_lengths"] = (rows, chunks)
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(
                shape, jnp.float32 if name == "loss_mask" else jnp.int32, sharding=sharding
            )
            for name, shape in shapes.items()
        }


def sequence_format(
    config: ExperimentConfig, tokenizer: Tokenizer, *, memory: bool
) -> SequenceFormat:
    """How rows are read in a stage."""
    if not memory:
        return SequenceFormat(bos_id=tokenizer.bos_id)
    return SequenceFormat(
        bos_id=tokenizer.bos_id, preface_ids=tokenizer.preface_ids, memory=config.memory
    )


def resolve_model(config: ExperimentConfig, vocab_size: int) -> ExperimentConfig:
    """The configuration with the vocabulary of its tokenizer, if it names none itself."""
    if config.model.vocab_size:
        return config
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    return dataclasses.replace(config, model=model)
