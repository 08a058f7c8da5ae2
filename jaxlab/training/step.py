"""The training step: a pure function of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from jaxlab.config import MemoryConfig
from jaxlab.memory.write import as_slots, encode_references
from jaxlab.models.decoder import Decoder, context_start, encode_preface
from jaxlab.optim.flat_mask import flat_shares
from jaxlab.training.losses import cross_entropy_sum
from jaxlab.training.state import TrainState
from kernels_pallas.memory_attention import ChunkGrid

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
# A training state of any workload: parameters, optimizer, and the number of its step.
State = TypeVar("State")
BatchCurvature = Callable[[PyTree, Array, Batch], PyTree]


@dataclasses.dataclass(frozen=True)
class SequenceFormat:
    """How a row of text becomes the model's input.

    Plain (``memory=None``): ``<s>`` and the text, positions from 0. With memory: the layout of
    inference, preface, references in parallel, ``<s>``, text (Memory³ §3.2); the references of the
    batch are encoded in the step and gradients flow through them (§3.6).
    """

    bos_id: int
    preface_ids: tuple[int, ...] = ()
    memory: MemoryConfig | None = None

    def inputs(self, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """``<s>`` followed by all tokens but the last: position i predicts token i."""
        first = jnp.full_like(tokens[:, :1], self.bos_id)
        return jnp.concatenate([first, tokens[:, :-1]], axis=1)

    def hidden(self, decoder: Decoder, batch: Batch) -> Float[Array, "B T D"]:
        """Final hidden states at the positions that predict ``batch["tokens"]``."""
        inputs, segments = self.inputs(batch["tokens"]), batch.get("segments")
        if segments is not None:
            # Input i holds token i - 1; <s> goes with the first text.
            segments = jnp.concatenate([segments[:, :1], segments[:, :-1]], axis=1)
        if self.memory is None:
            return decoder(inputs, segments=segments)[0]
        count, chunks, width = batch["references"].shape
        preface = encode_preface(decoder, jnp.asarray(self.preface_ids, jnp.int32))
        memories = encode_references(
            decoder,
            batch["references"].reshape(count * chunks, width),
            batch["reference_lengths"].reshape(count * chunks),
            preface=preface,
            memory=self.memory,
        )
        return decoder(
            inputs,
            preface=preface,
            slots=as_slots(memories, batch=count),
            grid=ChunkGrid(length=self.memory.chunk_length, band=self.memory.references_per_chunk),
            start=context_start(preface.length, self.memory.reference_length),
            segments=segments,
        )[0]


def loss_sum(params: PyTree, graphdef: Any, form: SequenceFormat, batch: Batch) -> Float[Array, ""]:
    """Sum of the next-token loss over the tokens that count."""
    decoder = nnx.merge(graphdef, params)
    hidden = form.hidden(decoder, batch)
    return cross_entropy_sum(hidden, decoder.unembedding(), batch["tokens"], batch["loss_mask"])


def _gradients(
    params: PyTree, graphdef: Any, form: SequenceFormat, batch: Batch, accumulation: int
) -> tuple[Float[Array, ""], PyTree]:
    """Mean of the loss over the tokens that count, and its gradients, by micro-batches."""

    def gradient_of(part: Batch):
        return jax.value_and_grad(loss_sum)(params, graphdef, form, part)

    total, gradients = sum_over_parts(gradient_of, batch, accumulation)
    weight = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)
    return total / weight, jax.tree.map(lambda g: g / weight, gradients)


def sum_over_parts(function: Callable[[PyTree], PyTree], batch: PyTree, parts: int) -> PyTree:
    """Sum of ``function`` over equal parts of a batch, one part at a time.

    A part has every so many-th row, so that each device of a mesh has its rows of it already.
    """
    if parts == 1:
        return function(batch)
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], split)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(add, zero, split)[0]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: Any,
    form: SequenceFormat,
    optimizer: optax.GradientTransformationExtraArgs,
    accumulation: int = 1,
    curvature: BatchCurvature | None = None,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on one batch; the loss is the mean over the tokens that count.

    The optimizer may ask for the gradient elsewhere (SAM) and for a curvature (IRE). With
    ``skip_nonfinite`` a step whose loss or gradient is not finite changes the count alone, and is
    told by the number ``skipped``.
    """

    def gradients_at(params: PyTree) -> tuple[Float[Array, ""], PyTree]:
        return _gradients(params, graphdef, form, batch, accumulation)

    extra = {"grad_fn": lambda params: gradients_at(params)[1]}
    if curvature is not None:
        extra["curvature_fn"] = lambda params, key: curvature(params, key, batch)
    loss, gradients = gradients_at(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, **extra)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients), **flat_shares(opt_state)}
    params = optax.apply_updates(state.params, updates)
    new = state.replace(params=params, opt_state=opt_state, step=state.step + 1)
    return skip_unless_finite(new, state, metrics) if skip_nonfinite else (new, metrics)


def skip_unless_finite(new: State, old: State, metrics: Metrics) -> tuple[State, Metrics]:
    """``old`` with the count of steps of ``new`` when the step's loss or gradient is not finite.

    A gradient that is not finite somewhere has a norm that is not.
    """
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return kept.replace(step=new.step), {**metrics, "skipped": 1.0 - finite}


def compile_train_step(
    *, shardings: TrainState | None = None, **parts: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """:func:`train_step` with its fixed parts bound, compiled; the state's buffers are reused.

    ``shardings`` of the state on a mesh of several devices, which it is given with and keeps: left
    to choose, XLA moves small parts of it, and the step after is another program.
    """

    def step(state, batch):
        return train_step(state, batch, **parts)

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def compile_loss(
    graphdef: Any, form: SequenceFormat
) -> Callable[[PyTree, Batch], tuple[Float[Array, ""], Float[Array, ""]]]:
    """Compiled function of parameters and batch: sum of the loss in nats, and tokens that count."""

    def loss(params, batch):
        return loss_sum(params, graphdef, form, batch), jnp.sum(batch["loss_mask"])

    return jax.jit(loss)
