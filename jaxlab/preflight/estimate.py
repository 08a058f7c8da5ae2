"""A step's memory and time from shapes alone: to rank candidates before any is compiled.

Good to some ten per cent, and only for the train step; what is reported as a result was compiled.
"""

import dataclasses
import math

import jax

from jaxlab.config import ExperimentConfig
from jaxlab.models.decoder import abstract_decoder
from jaxlab.optim.factory import make_optimizer
from jaxlab.preflight.chips import Topology
from jaxlab.preflight.roofline import Roofline
from jaxlab.sharding.mesh import mesh_sizes
from jaxlab.training.metrics import memory_flops_per_token, train_flops_per_token

# Shares of the forward pass that are computed again: nothing, what elements are made of, all.
_AGAIN = {"none": 0.0, "dots": 0.05, "full": 1.0}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of one chip and seconds of one step, both estimated."""

    bytes: float
    roofline: Roofline


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the estimate depends on, for one chip and one micro-batch."""

    weights: float  # of the whole model, in numbers
    state: float  # bytes of parameters and optimizer of the whole model
    tokens: float  # of the text, in the rows of one group of devices
    references: float  # tokens of references likewise
    parts: int  # micro-batches


def estimate(config: ExperimentConfig, where: Topology, stage: str) -> Estimate:
    """Of the train step of a stage on so many chips, with the configuration's mesh."""
    replica, data, fsdp, tensor = mesh_sizes(config.mesh, where.chips)
    sizes = _sizes(config, stage, groups=replica * data * fsdp)
    memory = _bytes(config, sizes, cut=fsdp * tensor, tensor=tensor)
    compute = _flops(config, stage) / (where.chips * where.chip.flops)
    wires = _sent(config, sizes, (replica, data, fsdp, tensor))
    # Ideal rings: every axis of the mesh has a whole axis of the torus.
    interconnect = wires / (2 * where.chip.link)
    moved = _moved(config, sizes, cut=fsdp * tensor, tensor=tensor)
    return Estimate(memory, Roofline(compute, moved / where.chip.hbm_bandwidth, interconnect))


def _sizes(config: ExperimentConfig, name: str, *, groups: int) -> _Sizes:
    stage, length = config.stages.named()[name], config.data.sequence_length
    _, params = abstract_decoder(config.model)
    optimizer = make_optimizer(config.optimizer, stage, seed=0)
    state = jax.tree.leaves((params, jax.eval_shape(optimizer.init, params)))
    rows = stage.batch_size / stage.accumulation / groups
    memory = config.memory
    chunks = length / memory.chunk_length if stage.memory else 0.0
    return _Sizes(
        weights=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        state=sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize
            for leaf in state
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        ),
        tokens=rows * length,
        references=rows * chunks * memory.reference_length,
        parts=stage.accumulation,
    )


def _item(config: ExperimentConfig) -> int:
    return 2 if config.model.compute_dtype == "bfloat16" else 4


def _numbers_in_a_layer(config: ExperimentConfig, tensor: int) -> tuple[float, float]:
    """Per token: numbers that one layer's products make, and all that its backward may keep."""
    model = config.model
    inner = (2 * model.heads + 2 * model.kv_heads) * model.head_dim + 3 * model.ffn_width
    products = 2 * model.model_width + inner / tensor
    return products, products + 4 * model.model_width + 2 * inner / tensor


def _bytes(config: ExperimentConfig, sizes: _Sizes, *, cut: int, tensor: int) -> float:
    model, item = config.model, _item(config)
    products, everything = _numbers_in_a_layer(config, tensor)
    kept = {"full": model.model_width, "dots": model.model_width + products, "none": everything}
    per_layer = kept[model.remat]
    activations = item * per_layer * sizes.tokens * model.layers
    activations += item * per_layer * sizes.references * model.memory_layers
    # One layer at work, in the wider of the two streams.
    work = item * everything * max(sizes.tokens, sizes.references)
    slots = 0.0
    if sizes.references:
        kept_share = config.memory.tokens_kept / config.memory.reference_length
        slots = 2 * model.kv_heads * model.head_dim / tensor * model.memory_layers * item
        slots *= 2 * sizes.references * kept_share  # and their gradients
    head = model.vocab_size * model.model_width / tensor
    gradients = 4 * sizes.weights / cut
    return sizes.state / cut + gradients + activations + work + slots + head * (4 + 2 * item)


def _flops(config: ExperimentConfig, name: str) -> float:
    stage, length = config.stages.named()[name], config.data.sequence_length
    vocab = config.model.vocab_size
    plain = train_flops_per_token(config.model, vocab_size=vocab, sequence_length=length)
    if stage.memory:
        plain += memory_flops_per_token(config.model, config.memory)
    head = 6.0 * config.model.model_width * vocab
    again = (plain - head) / 3 * _AGAIN[config.model.remat]
    ire = config.optimizer.ire
    refreshes = ire.batch_share * ire.draws / ire.update_interval if ire else 0.0
    return (plain + again) * (1 + refreshes) * stage.batch_size * length


def _sent(config: ExperimentConfig, sizes: _Sizes, mesh: tuple[int, int, int, int]) -> float:
    """Bytes that a chip sends in a step."""
    replica, data, fsdp, tensor = mesh
    item, model = _item(config), config.model
    share = sizes.weights / tensor
    gathers = (2 if config.model.remat == "none" else 3) * item * sizes.parts
    total = share * (fsdp - 1) / fsdp * (gathers + item * sizes.parts)
    if replica * data > 1:
        copies = replica * data
        total += 2 * 4 * share / fsdp * (copies - 1) / copies
    streams = sizes.tokens * model.layers + sizes.references * model.memory_layers
    # Two sums forward and two backward in each layer.
    summed = 4 * item * model.model_width * streams * sizes.parts
    return total + 2 * summed * (tensor - 1) / tensor


def _moved(config: ExperimentConfig, sizes: _Sizes, *, cut: int, tensor: int) -> float:
    """Bytes of main memory read and written in a step."""
    item, model = _item(config), config.model
    _, everything = _numbers_in_a_layer(config, tensor)
    streams = sizes.tokens * model.layers + sizes.references * model.memory_layers
    passes = 6 + 3 * _AGAIN[model.remat]
    activations = passes * item * everything * streams * sizes.parts
    weights = 4 * item * sizes.weights / tensor * sizes.parts
    logits = 4 * 3 * model.vocab_size / tensor * sizes.tokens * sizes.parts
    return 3 * sizes.state / cut + activations + weights + logits
