"""The programs that a pod would run, as functions of shapes: a step of train, decode or write."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from jaxlab.config import ExperimentConfig
from jaxlab.errors import ConfigError
from jaxlab.inference.programs import Programs, State
from jaxlab.memory.write import compile_encode
from jaxlab.models.attention import KeyValues, Slots
from jaxlab.models.cache import empty_cache
from jaxlab.models.decoder import Prefix, abstract_decoder, context_start
from jaxlab.sharding.mesh import check_batch_fits, check_model_fits
from jaxlab.sharding.rules import spec
from jaxlab.training.metrics import memory_flops_per_token, train_flops_per_token
from jaxlab.training.program import TrainProgram
from jaxlab.training.step import SequenceFormat

MODES = ("train", "decode", "write")
# ``<s>Reference:`` in the tokens of some tokenizer: a few, whose number changes nothing of note.
PREFACE_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function of a run and what it is called with.

    given: the arguments by kind, shapes with shardings. tokens: of one call. steps: calls of the
    whole run, 0 where there is no such number. model_flops: of one call, without recomputation;
    0 where nothing is said of it. rare: how often the dearest branch of a conditional runs.
    slot_axes: see :func:`memory.read_memory`.
    """

    name: str
    step: Any
    arguments: tuple[Any, ...]
    given: dict[str, PyTree]
    tokens: int
    steps: int = 0
    model_flops: float = 0.0
    rare: float = 1.0
    slot_axes: tuple[int, ...] = ()


def build(
    config: ExperimentConfig, mesh: Mesh, *, mode: str, stage: str, rows: int | None = None
) -> Program:
    """The program of a mode (one of MODES) of a run on a mesh.

    ``rows`` counts sequences that are decoded at once, or references encoded. Raises ConfigError
    for a stage that the run lacks, a model without memory and sizes that the mesh does not divide.
    """
    check_model_fits(mesh, config.model)
    if mode == "train":
        return _train(config, mesh, stage)
    groups = mesh.size // mesh.shape["tensor"]
    rows = rows or 32 * groups
    check_batch_fits(mesh, "--rows", rows)
    return _decode(config, mesh, rows) if mode == "decode" else _write(config, mesh, rows)


def stage_of(config: ExperimentConfig, name: str | None) -> str:
    """The stage of that name, or the last one. Raises ConfigError naming those there are."""
    known = list(config.stages.named())
    if name is not None and name not in known:
        raise ConfigError(f"--stage {name}: the run has no such stage; it has {', '.join(known)}")
    return name or known[-1]


def _train(config: ExperimentConfig, mesh: Mesh, name: str) -> Program:
    stage = config.stages.named()[name]
    check_batch_fits(mesh, f"stages.{name}.batch_size", stage.batch_size // stage.accumulation)
    form = SequenceFormat(
        bos_id=1,
        preface_ids=tuple(range(PREFACE_TOKENS)) if stage.memory else (),
        memory=config.memory if stage.memory else None,
    )
    program = TrainProgram(config, name, mesh, form)
    tokens = stage.batch_size * config.data.sequence_length
    length = config.data.sequence_length
    vocab = config.model.vocab_size
    flops = train_flops_per_token(config.model, vocab_size=vocab, sequence_length=length)
    if stage.memory:
        flops += memory_flops_per_token(config.model, config.memory)
    ire = config.optimizer.ire
    return Program(
        name=f"train step, {name} stage",
        step=program.step,
        arguments=(program.state, program.batch),
        given={
            "parameters": program.state.params,
            "optimizer": program.state.opt_state,
            "batch": program.batch,
        },
        tokens=tokens,
        steps=stage.steps,
        model_flops=flops * tokens,
        rare=1 / ire.update_interval if ire else 1.0,
        slot_axes=_slot_axes(config, mesh) if stage.memory else (),
    )


def _slot_axes(config: ExperimentConfig, mesh: Mesh) -> tuple[int, ...]:
    model = config.model
    kept = min(config.memory.tokens_kept, config.memory.reference_length)
    return kept, model.kv_heads // mesh.shape["tensor"], model.head_dim


def _placed(mesh: Mesh, tree: PyTree, *names: str | None) -> PyTree:
    """Shapes that are cut by the logical names of their axes; axes without a name are whole."""
    sharding = NamedSharding(mesh, spec(*names))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _require_memory(config: ExperimentConfig, mode: str) -> None:
    if not config.model.memory_layers:
        raise ConfigError(
            f"--mode {mode}: model.memory_layers is 0, so there is no memory to {mode}"
        )


def _preface(config: ExperimentConfig, mesh: Mesh) -> Prefix:
    model = config.model
    counts = (model.memory_layers, model.layers - model.memory_layers)
    parts = []
    for count in filter(None, counts):
        shape = (count, PREFACE_TOKENS, model.kv_heads, model.head_dim)
        one = jax.ShapeDtypeStruct(shape, jnp.dtype(model.compute_dtype))
        one = _placed(mesh, one, None, None, "kv_heads")
        parts.append(KeyValues(one, one))
    return Prefix(tuple(parts))


def _decode(config: ExperimentConfig, mesh: Mesh, rows: int) -> Program:
    """One token of each sequence, with a full cache, and with memory where the model has some."""
    model, memory = config.model, config.memory
    graphdef, params = abstract_decoder(model, mesh)
    cache = jax.eval_shape(lambda: empty_cache(model, batch=rows, length=model.max_context))
    cache = _placed(mesh, cache.layers, None, "batch", None, "kv_heads")
    numbers = _placed(mesh, jax.ShapeDtypeStruct((rows,), jnp.int32), "batch")
    preface = slots = None
    start, slot_axes = 0, ()
    if model.memory_layers:
        count = memory.references_per_chunk * memory.tokens_kept
        shape = (model.memory_layers, rows, 1, count, model.kv_heads, model.head_dim)
        names = (None, "batch", None, None, "kv_heads")
        one = _placed(mesh, jax.ShapeDtypeStruct(shape, jnp.dtype(model.compute_dtype)), *names)
        valid = _placed(mesh, jax.ShapeDtypeStruct((rows, 1, count), jnp.bool_), "batch")
        slots, preface = Slots(one, one, valid), _preface(config, mesh)
        start = context_start(PREFACE_TOKENS, memory.reference_length)
        slot_axes = (count, model.kv_heads // mesh.shape["tensor"], model.head_dim)
    return Program(
        name=f"decode step, {rows} sequences of {model.max_context} tokens",
        # The layers scanned, not one by one, which takes many times as long to compile: what is
        # computed, held and sent is the same.
        step=Programs(graphdef, start).decode,
        arguments=(params, preface, State(cache, slots), numbers, numbers, numbers),
        given={
            "parameters": params,
            "memory slots": (preface, slots),
            "cache": cache,
            "batch": numbers,
        },
        tokens=rows,
        slot_axes=slot_axes,
    )


def _write(config: ExperimentConfig, mesh: Mesh, rows: int) -> Program:
    """One batch of references into memories."""
    _require_memory(config, "write")
    memory = config.memory
    graphdef, params = abstract_decoder(config.model, mesh)
    tokens = jax.ShapeDtypeStruct((rows, memory.reference_length), jnp.int32)
    tokens = _placed(mesh, tokens, "batch")
    lengths = _placed(mesh, jax.ShapeDtypeStruct((rows,), jnp.int32), "batch")
    preface = _preface(config, mesh)
    return Program(
        name=f"write step, {rows} references of {memory.reference_length} tokens",
        step=compile_encode(graphdef, memory),
        arguments=(params, preface, tokens, lengths),
        given={"parameters": params, "batch": (preface, tokens, lengths)},
        tokens=rows * memory.reference_length,
        slot_axes=_slot_axes(config, mesh),
    )
