"""A trained model and some of its data as one loss, for what is measured at its weights."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from jaxlab.config import ModelConfig
from jaxlab.models.decoder import abstract_decoder
from jaxlab.training.checkpoint import split_location
from jaxlab.training.corpus import prepare_corpus
from jaxlab.training.curvature import sampled_loss_sum
from jaxlab.training.load import load_model
from jaxlab.training.step import SequenceFormat, loss_sum

LossFn = Callable[..., Float[Array, ""]]
Batches = Sequence[tuple[Any, ...]]
# Rows of text on the device at a time.
_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """A trained model and its data as a sharpness evaluation needs them.

    ``loss_fn(params, *batch)`` sums the loss over one batch and ``sampled_loss(params, key,
    *batch)`` does so at labels drawn from the model; ``n`` is the predictions of all batches.
    """

    params: PyTree
    loss_fn: LossFn
    sampled_loss: LossFn
    batches: Batches
    n: int


def language_problem(
    run: str | Path, *, examples: int, report: Callable[[str], None] = print
) -> Problem:
    """The plain next-token loss of a run on some of its training rows."""
    model = load_model(run, warn=report)
    folder = Path(split_location(run)[0])
    rows = prepare_corpus(model.config, folder, report=report).rows
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(examples, len(rows))).astype(int))
    return next_token_problem(
        model.config.model,
        model.params,
        rows.tokens[chosen],
        rows.mask[chosen],
        bos_id=model.tokenizer.bos_id,
    )


def classification_problem(
    params: PyTree,
    logits_fn: Callable[[PyTree, Any], Float[Array, "B classes"]],
    batches: Sequence[tuple[Any, Int[Array, " B"]]],
) -> Problem:
    """Plain cross-entropy of a classifier on batches of (inputs, labels)."""

    def loss(params: PyTree, inputs: Any, labels: Int[Array, " B"]) -> Float[Array, ""]:
        rows = jax.nn.log_softmax(logits_fn(params, inputs).astype(jnp.float32))
        return -jnp.sum(jnp.take_along_axis(rows, labels[:, None], axis=1))

    def sampled(params: PyTree, key: Array, inputs: Any, labels: Array) -> Float[Array, ""]:
        logits = jax.lax.stop_gradient(logits_fn(params, inputs).astype(jnp.float32))
        return loss(params, inputs, jax.random.categorical(key, logits))

    return Problem(params, loss, sampled, batches, n=sum(len(labels) for _, labels in batches))


def next_token_problem(
    config: ModelConfig,
    params: PyTree,
    tokens: Int[np.ndarray, "N T"],
    mask: Shaped[np.ndarray, "N T"],
    *,
    bos_id: int,
) -> Problem:
    """The next-token loss of a decoder on rows of tokens, of which those in the mask count.

    Computed in float32 whatever the training computed in: a product with the Hessian is a
    difference of gradients, and bfloat16 keeps three digits of them.
    """
    graphdef, _ = abstract_decoder(dataclasses.replace(config, compute_dtype="float32"))
    form = SequenceFormat(bos_id=bos_id)

    def loss(params: PyTree, tokens: Array, mask: Array) -> Float[Array, ""]:
        return loss_sum(params, graphdef, form, {"tokens": tokens, "loss_mask": mask})

    def sampled(params: PyTree, key: Array, tokens: Array, mask: Array) -> Float[Array, ""]:
        batch = {"tokens": tokens, "loss_mask": mask}
        return sampled_loss_sum(params, key, graphdef, form, batch)

    batches = []
    for start in range(0, len(tokens), _ROWS):
        part = slice(start, start + _ROWS)
        # The last batch is filled up with rows that weigh nothing: one program for all.
        blank = ((0, max(0, start + min(_ROWS, len(tokens)) - len(tokens))), (0, 0))
        rows = np.pad(tokens[part], blank), np.pad(mask[part].astype(np.float32), blank)
        batches.append(tuple(jnp.asarray(x) for x in rows))
    return Problem(jax.device_put(params), loss, sampled, batches, n=int(mask.sum()))
