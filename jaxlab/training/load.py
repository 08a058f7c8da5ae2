"""A trained model as everything after training needs it: weights, tokenizer, formats, identity."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from jaxlab.config import ExperimentConfig, config_hash
from jaxlab.data.tokenizer import Tokenizer
from jaxlab.errors import ConfigError, DataError
from jaxlab.memory.header import BankIdentity
from jaxlab.models.decoder import Prefix, abstract_decoder, context_start, encode_preface
from jaxlab.training.checkpoint import read_weights, split_location
from jaxlab.training.corpus import load_tokenizer
from jaxlab.training.loop import load_run

# Texts that the model embeds at a time, and their longest length in tokens.
_EMBED_BATCH, _EMBED_TOKENS = 32, 128


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Weights and what belongs to them."""

    config: ExperimentConfig
    tokenizer: Tokenizer
    graphdef: Any
    params: PyTree

    @functools.cached_property
    def preface(self) -> Prefix:
        """Keys and values of ``<s>Reference:`` in every layer: a constant of the weights."""

        def encode(params, ids):
            return encode_preface(nnx.merge(self.graphdef, params), ids)

        return jax.jit(encode)(self.params, jnp.asarray(self.tokenizer.preface_ids, jnp.int32))

    @property
    def context_start(self) -> int:
        """Position of the context's ``<s>`` when the preface is used."""
        return context_start(len(self.tokenizer.preface_ids), self.config.memory.reference_length)

    @functools.cached_property
    def identity(self) -> BankIdentity:
        """Hashes of weights, tokenizer and of the configuration that decides what is written."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_flatten_with_path(self.params)[0]:
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
        memory = self.config.memory
        written = (self.config.model, memory.reference_length, memory.tokens_kept)
        written += (memory.selection, memory.pooling)
        parts = [config_hash(written[0]), *(str(value) for value in written[1:])]
        return BankIdentity(
            model_hash=digest.hexdigest(),
            tokenizer_hash=self.tokenizer.hash,
            config_hash=hashlib.sha256("|".join(parts).encode()).hexdigest(),
        )

    def require_memory(self) -> None:
        """Raise ConfigError when the model has no memory layers."""
        if not self.config.model.memory_layers:
            raise ConfigError(
                f"model {self.config.name} has no memory layers (model.memory_layers is 0): it can "
                "neither write nor read a bank"
            )

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Mean final hidden state of each text, plain format: the embedder ``model``."""
        out = np.zeros((len(texts), self.config.model.model_width), np.float32)
        for start in range(0, len(texts), _EMBED_BATCH):
            part = list(texts[start : start + _EMBED_BATCH])
            out[start : start + len(part)] = self._embed_batch(part)
        return out

    def _embed_batch(self, texts: list[str]) -> np.ndarray:
        tokens = np.full((_EMBED_BATCH, _EMBED_TOKENS), self.tokenizer.pad_id, np.int32)
        tokens[:, 0] = self.tokenizer.bos_id
        lengths = np.zeros(_EMBED_BATCH, np.int32)
        for row, ids in enumerate(self.tokenizer.encode_batch(texts)):
            ids = ids[: _EMBED_TOKENS - 1]
            tokens[row, 1 : 1 + len(ids)] = ids
            lengths[row] = 1 + len(ids)
        return np.asarray(self._pool(self.params, tokens, lengths))[: len(texts)]

    @functools.cached_property
    def _pool(self) -> Callable[..., jax.Array]:
        def pool(params, tokens, lengths):
            hidden = nnx.merge(self.graphdef, params)(tokens)[0].astype(jnp.float32)
            real = (jnp.arange(tokens.shape[1]) < lengths[:, None])[..., None]
            return jnp.sum(hidden * real, axis=1) / jnp.maximum(lengths[:, None], 1)

        return jax.jit(pool)


def load_model(location: str | Path, *, warn: Callable[[str], None] = print) -> LoadedModel:
    """The newest weights of a run (``DIR``), or those of the end of a stage (``DIR@warmup``).

    Raises CheckpointError when there are none, DataError when the tokenizer is another one.
    """
    location = str(location)
    run, _ = split_location(location)
    config = load_run(run)
    tokenizer = load_tokenizer(run)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{run}: the tokenizer has {tokenizer.vocab_size} pieces but the model's vocabulary is "
            f"{config.model.vocab_size}: it belongs to another model; restore the run's own"
        )
    graphdef, shapes = abstract_decoder(config.model)
    params = read_weights(location, {"params": shapes}, warn=warn)["params"]
    return LoadedModel(config=config, tokenizer=tokenizer, graphdef=graphdef, params=params)
