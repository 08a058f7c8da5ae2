"""A small untrained model whose tokens are single characters, and banks for it to read."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from jaxlab.config import (
    DataConfig,
    ExperimentConfig,
    MemoryConfig,
    ModelConfig,
    StageConfig,
    StagesConfig,
    TokenizerConfig,
)
from jaxlab.data.sources import Document
from jaxlab.data.tokenizer import Tokenizer, train_tokenizer
from jaxlab.memory import pipeline
from jaxlab.memory.pipeline import ReferenceEncoder, write_bank
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.store import Bank
from jaxlab.models.decoder import abstract_decoder
from jaxlab.training.load import LoadedModel

LETTERS = "abcdefgh"
CHARACTERS = "abcdefghijklmnopqrstuvwxyzR:"
CHUNK = 4
TEXTS = ("aaabca", "bbabcb", "ccdecc", "ddeedd", "eefgee", "ffghff", "gghagg", "hhabhh")


@functools.cache
def small_tokenizer() -> Tokenizer:
    """One token for each letter and for each byte of anything else."""
    text = " ".join(CHARACTERS)
    with tempfile.TemporaryDirectory() as folder:
        # 4 control ids, 7 symbols, 256 bytes, the characters and the space: no room for a merge.
        tokenizer = train_tokenizer(
            [text] * 20, vocab_size=267 + len(CHARACTERS) + 1, path=Path(folder) / "small.model"
        )
    assert len(tokenizer.encode("Reference: ab ba é")) == len("Reference: ab ba é") + 1
    return tokenizer


@functools.cache
def small_model(dtype: str = "float32") -> LoadedModel:
    """Three layers, two of them memory layers; mostly letters are what it likes to say."""
    tokenizer = small_tokenizer()
    config = ExperimentConfig(
        name="small",
        model=ModelConfig(
            vocab_size=tokenizer.vocab_size,
            layers=3,
            heads=4,
            kv_heads=2,
            head_dim=8,
            ffn_width=24,
            memory_layers=2,
            max_context=32,
            compute_dtype=dtype,
        ),
        memory=MemoryConfig(
            reference_length=12,
            tokens_kept=4,
            chunk_length=CHUNK,
            references_per_chunk=2,
            candidates=4,
            embedder="model",
        ),
        tokenizer=TokenizerConfig(vocab_size=tokenizer.vocab_size),
        data=DataConfig(source="none", sequence_length=4 * CHUNK, facts_fraction=1.0),
        stages=StagesConfig(
            continual=StageConfig(steps=1, batch_size=1, learning_rate=1.0, memory=True)
        ),
    )
    graphdef, shapes = abstract_decoder(config.model)
    generator = np.random.default_rng(0)
    liked = np.full(tokenizer.vocab_size, 0.05, np.float32)
    liked[tokenizer.encode(LETTERS)] = 1.0

    def draw(path, leaf):
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        values = generator.standard_normal(leaf.shape, np.float32) * 0.4
        return values * liked if path[-1].key == "head" else values

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return LoadedModel(config=config, tokenizer=tokenizer, graphdef=graphdef, params=params)


@functools.cache
def small_encoder(dtype: str = "float32") -> ReferenceEncoder:
    """One compiled encoder for all banks."""
    return ReferenceEncoder(small_model(dtype))


def letters(texts) -> np.ndarray:
    """How often each letter occurs: texts of like letters are neighbours."""
    return np.array([[text.count(letter) for letter in LETTERS] for text in texts], np.float32)


def documents(texts) -> list[Document]:
    return [Document(id=f"doc {number}", text=text) for number, text in enumerate(texts)]


class SpyReader(MemoryReader):
    """Remembers what was searched and which references were read."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.searched: list[list[str]] = []
        self.hits: list = []
        self.ids: list[np.ndarray] = []

    def search(self, texts, k=None):
        found = super().search(texts, k)
        self.searched.append(list(texts))
        self.hits.append(found)
        return found

    def fetch(self, ids):
        if np.any(ids >= 0):
            self.ids.append(np.array(ids))
        return super().fetch(ids)


def write_small_bank(folder, texts=TEXTS, *, dtype: str = "float32", **options):
    """Write a bank of one reference for each text; the report of the writer."""
    with (
        mock.patch.object(pipeline, "ReferenceEncoder", lambda model: small_encoder(dtype)),
        mock.patch.object(LoadedModel, "embed_texts", lambda self, texts: letters(texts)),
    ):
        return write_bank(
            small_model(dtype),
            documents(texts),
            str(Path(folder) / "bank"),
            report=lambda _: None,
            **options,
        )


def small_bank(folder, texts=TEXTS, *, dtype: str = "float32") -> Bank:
    write_small_bank(folder, texts, dtype=dtype)
    return Bank.open(str(Path(folder) / "bank"), identity=small_model(dtype).identity)


def small_reader(bank: Bank) -> SpyReader:
    return SpyReader.open(bank, model_embed=letters)


def losing_reader(bank: Bank) -> MemoryReader:
    """Loses what it finds first: somebody deletes it before it is read."""
    reader = MemoryReader.open(bank, model_embed=letters)
    search = reader.search

    def lose(*args, **options):
        hits = search(*args, **options)
        reader.search = search
        Bank.open(bank.url, write=True).delete(rows=[int(hits.ids[0, 0])])
        reader.refresh()
        return hits

    reader.search = lose
    return reader


def without_memory_layers(model: LoadedModel) -> LoadedModel:
    """The model under a configuration of plain layers and no memory stage."""
    stages = model.config.stages
    config = dataclasses.replace(
        model.config,
        model=dataclasses.replace(model.config.model, memory_layers=0),
        stages=dataclasses.replace(
            stages, continual=dataclasses.replace(stages.continual, memory=False)
        ),
    )
    return dataclasses.replace(model, config=config)
