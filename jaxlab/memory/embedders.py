"""Embedders: texts to unit vectors whose inner product says how related two texts are.

Memory³ (arXiv 2407.01178, §3.1) searches references by the cosine of sentence embeddings. Three
kinds serve here: ``lsa`` (fitted on the references, no download, no accelerator),
``sentence-transformers:NAME`` (BGE-M3, MiniLM …) and ``model`` (the language model's own states).
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32

from jaxlab.config import embedder_problem
from jaxlab.errors import ConfigError
from jaxlab.memory.lsa import LsaEmbedder, unit_rows

__all__ = [
    "Embedder",
    "LsaEmbedder",
    "ModelEmbedder",
    "SentenceTransformersEmbedder",
    "open_embedder",
    "unit_rows",
]

ModelEmbed = Callable[[Sequence[str]], Float[np.ndarray, "n dim"]]
_SENTENCE_TRANSFORMERS = "sentence-transformers:"


@runtime_checkable
class Embedder(Protocol):
    """Texts to rows of unit length (a row of zeros where nothing in the text is known)."""

    name: str
    dim: int

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dim"]:
        """Embed each text, in order."""
        ...

    def to_bytes(self) -> bytes:
        """State that ``open_embedder(name, state=...)`` needs; empty when the name says it all."""
        ...


class _Stateless:
    """An embedder that its name (and the running model) describe completely."""

    def to_bytes(self) -> bytes:
        """No state of its own."""
        return b""


class SentenceTransformersEmbedder(_Stateless):
    """A sentence-transformers model by name or local path (BGE-M3 in Memory³, §3.1).

    Raises ConfigError when the package is missing or the model cannot be loaded.
    """

    def __init__(self, model: str, *, batch_size: int = 32) -> None:
        self.name = _SENTENCE_TRANSFORMERS + model
        self._batch_size = batch_size
        self._model = _load_sentence_transformer(model)
        self.dim = len(self._model.encode("width", show_progress_bar=False))

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dim"]:
        """Embed texts with no instruction prefix; blank texts give zeros."""
        out = np.zeros((len(texts), self.dim), np.float32)
        said = [row for row, text in enumerate(texts) if text.strip()]
        if said:
            out[said] = self._model.encode(
                [texts[row] for row in said],
                batch_size=self._batch_size,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        return unit_rows(out)


def _load_sentence_transformer(model: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            f"embedder {_SENTENCE_TRANSFORMERS}{model} needs the package sentence-transformers:"
            " pip install 'jaxlab[eval]' (or choose the embedder lsa, which needs nothing)"
        ) from error
    # A path that does not exist would otherwise be taken for a name and asked of a server.
    looks_local = model.startswith((".", "~", os.sep)) or model.count("/") > 1
    path = Path(model).expanduser()
    if looks_local and not path.is_dir():
        raise ConfigError(f"embedder {_SENTENCE_TRANSFORMERS}{model}: no such directory")
    try:
        return SentenceTransformer(str(path) if path.is_dir() else model)
    except Exception as error:  # the loaders below it raise without a common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConfigError(
            f"embedder {_SENTENCE_TRANSFORMERS}{model} cannot be loaded ({reason}); without a"
            " network give the path of a downloaded model, or choose the embedder lsa"
        ) from error


class ModelEmbedder(_Stateless):
    """The language model's own hidden states, computed by the caller and normalised here."""

    name = "model"

    def __init__(self, model_embed: ModelEmbed) -> None:
        self._model_embed = model_embed
        # The callable alone knows its width, and a bank must record it before the first text.
        self.dim = int(np.shape(model_embed(["width"]))[-1])

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dim"]:
        """Embed texts; blank texts give zeros."""
        out = np.zeros((len(texts), self.dim), np.float32)
        said = [row for row, text in enumerate(texts) if text.strip()]
        if said:
            out[said] = np.asarray(self._model_embed([texts[row] for row in said]), np.float32)
        return unit_rows(out)


def open_embedder(
    spec: str,
    *,
    state: bytes | None = None,
    model_embed: ModelEmbed | None = None,
) -> Embedder:
    """The embedder called ``spec``; ``lsa`` is restored from ``state``.

    Raises ConfigError for an unknown name or a missing part, BankError for damaged state.
    """
    if problem := embedder_problem(spec):
        raise ConfigError(f"embedder {problem}")
    if spec == "lsa":
        if state is None:
            raise ConfigError("embedder lsa has to be fitted first: LsaEmbedder.fit(texts)")
        return LsaEmbedder.from_bytes(state)
    if spec == "model":
        if model_embed is None:
            raise ConfigError(
                "embedder model needs the language model that computes it: give --run RUN (in"
                " Python model_embed=)"
            )
        return ModelEmbedder(model_embed)
    return SentenceTransformersEmbedder(spec.removeprefix(_SENTENCE_TRANSFORMERS))
