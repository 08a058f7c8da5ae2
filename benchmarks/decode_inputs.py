"""What the contestants of ``decode.py`` are given: weights, a tokenizer, prompts and two banks."""

import dataclasses
from pathlib import Path

import numpy as np

PROMPT = 128


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all contestants share; ``folder`` holds weights, tokenizer, texts and banks."""

    preset: str
    device: str
    references: int
    folder: str

    @property
    def dtype(self) -> str:
        """The compute dtype."""
        return "float32" if self.device == "cpu" else "bfloat16"

    def prompts(self, rows: int, number: int) -> np.ndarray:
        """Tokens of the prompts of one turn (rows, PROMPT)."""
        every = np.load(Path(self.folder) / "prompts.npy")
        places = (np.arange(rows) + number * rows) % len(every)
        return every[places]


def _config(settings: Settings, vocab: int):
    from jaxlab.config import (
        DataConfig,
        ExperimentConfig,
        MemoryConfig,
        ModelConfig,
        StageConfig,
        StagesConfig,
        TokenizerConfig,
    )
    from jaxlab.models.presets import PRESETS

    shape = PRESETS[settings.preset] | {"compute_dtype": settings.dtype}
    return ExperimentConfig(
        name=settings.preset,
        model=ModelConfig(**shape),
        memory=MemoryConfig(),
        tokenizer=TokenizerConfig(vocab_size=vocab),
        data=DataConfig(source="installed-docs", sequence_length=512, facts_fraction=1.0),
        stages=StagesConfig(
            continual=StageConfig(steps=1, batch_size=1, learning_rate=1e-3, memory=True)
        ),
    )


def random_model(settings: Settings):
    """Random weights, with a tokenizer that knows no end of the text."""
    from jaxlab.data.tokenizer import Tokenizer
    from jaxlab.models.decoder import abstract_decoder
    from jaxlab.models.interop import load_llama
    from jaxlab.training.load import LoadedModel

    folder = Path(settings.folder)
    tokenizer = dataclasses.replace(Tokenizer.load(folder / "tokenizer.model"), eos_id=-1)
    config = _config(settings, tokenizer.vocab_size)
    _, params = load_llama(folder / "weights")
    return LoadedModel(config, tokenizer, abstract_decoder(config.model)[0], params)


def prepare(settings: Settings):
    """Write weights, prompts and the two banks (in a process of its own: JAX keeps its memory)."""
    import jax

    from jaxlab.config import ModelConfig
    from jaxlab.data.references import References
    from jaxlab.data.sources import load_documents
    from jaxlab.data.tokenizer import train_tokenizer
    from jaxlab.models.decoder import initial_parameters
    from jaxlab.models.interop import save_llama
    from jaxlab.models.presets import PRESETS

    folder = Path(settings.folder)
    texts = load_documents("installed-docs", limit_bytes=4_000_000)
    vocab = min(PRESETS[settings.preset]["vocab_size"], 8192)
    tokenizer = train_tokenizer(
        [document.text for document in texts], vocab_size=vocab, path=folder / "tokenizer.model"
    )
    config = ModelConfig(**PRESETS[settings.preset])
    save_llama(config, jax.device_get(initial_parameters(config, 0)), folder / "weights")
    references = References.build(texts, tokenizer, length=PROMPT)
    np.save(folder / "prompts.npy", _stable(references, tokenizer))
    _write_banks(random_model(settings), references, settings)
    return lambda _: None


def _stable(references, tokenizer) -> np.ndarray:
    """Full references whose text gives the same tokens again."""
    out = []
    for row in references.tokens[references.lengths == PROMPT][::7]:
        if tokenizer.encode(tokenizer.decode(row)) == row.tolist():
            out.append(row)
    return np.array(out[:512])


def _write_banks(model, references, settings: Settings) -> None:
    from jaxlab.memory.lsa import LsaEmbedder
    from jaxlab.memory.pipeline import bank_spec
    from jaxlab.memory.requantize import quantize_bank
    from jaxlab.memory.store import Bank, StoredReference

    count = min(settings.references, len(references))
    embedder = LsaEmbedder.fit(references.texts[:count])
    spec = bank_spec(model, embedder)
    path = Path(settings.folder)
    bank = Bank.create(path / "raw", spec=spec, embedder_state=embedder.to_bytes())
    draws = np.random.default_rng(0)
    for start in range(0, count, 512):
        part = slice(start, min(start + 512, count))
        texts = references.texts[part]
        memories = draws.standard_normal((len(texts), *spec.memory_shape), np.float32)
        kept = np.full(len(texts), spec.memory_shape[3], np.int32)
        told = [StoredReference(text, "docs", PROMPT) for text in texts]
        bank.append(memories.astype(spec.numpy_dtype), kept, embedder.embed(texts), told)
    # Few rounds: how good the codec is changes nothing here.
    quantize_bank(bank, path / "quantized", sample=20_000, seed=0, rounds=(2, 2), report=_quiet)


def _quiet(_: str) -> None:
    pass
