"""From a configuration to everything that training reads, kept in the run directory.

``RUN/data`` holds the tokenizer, the references and the neighbours of every chunk, each with a
header that ties it to what it was made from. A resumed run reads them; a corpus that changed in
between is an error, because the batches would not be those of the interrupted run.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.config import ExperimentConfig, differences, identity
from jaxlab.data.facts import FactSamples, draw_facts, prompt
from jaxlab.data.packing import Rows, pack, pack_by_document
from jaxlab.data.pipeline import RandomAccess, TextSamples
from jaxlab.data.references import References, load_neighbours, neighbours, save_neighbours
from jaxlab.data.sources import Document, corpus_hash, load_documents, split_documents
from jaxlab.data.tokenizer import Tokenizer, train_tokenizer
from jaxlab.errors import DataError
from jaxlab.memory.lsa import LsaEmbedder

TOKENIZER_FILE = "tokenizer.model"
# Facts shown to the tokenizer, so that names and questions are not spelt letter by letter; their
# seed is used nowhere else.
_TOKENIZER_FACTS = (0x70C, 20_000)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenizer, training rows and validation documents of a run."""

    folder: Path
    tokenizer: Tokenizer
    training_documents: list[Document]
    validation_documents: list[Document]
    rows: Rows
    validation_rows: Rows


@dataclasses.dataclass(frozen=True)
class Neighbourhood:
    """The knowledge base of training and the reference that each chunk of each row brings."""

    references: References
    training: np.ndarray
    validation: np.ndarray


def prepare_corpus(config: ExperimentConfig, run: Path, *, report: Callable[[str], None]) -> Corpus:
    """Read and split the documents, load or train the tokenizer, pack the rows."""
    folder = run / "data"
    folder.mkdir(parents=True, exist_ok=True)
    documents = load_documents(config.data.source, limit_bytes=config.data.limit_bytes)
    _remember(folder / "corpus.json", config, documents)
    training, validation = split_documents(
        documents, validation_fraction=config.data.validation_fraction, seed=config.data_seed
    )
    tokenizer = _tokenizer(config, folder, training, report=report)
    length = config.data.sequence_length
    encoded = tokenizer.encode_batch([document.text for document in training])
    rows = pack(encoded, sequence_length=length, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    held_out = tokenizer.encode_batch([document.text for document in validation])
    validation_rows = pack_by_document(held_out, sequence_length=length, pad_id=tokenizer.pad_id)
    report(
        f"corpus {config.data.source}: {len(training)} + {len(validation)} documents, "
        f"{int(rows.mask.sum()):,} training tokens, {int(validation_rows.mask.sum()):,} held out"
    )
    return Corpus(
        folder=folder,
        tokenizer=tokenizer,
        training_documents=training,
        validation_documents=validation,
        rows=rows,
        validation_rows=validation_rows,
    )


def prepare_neighbourhood(
    config: ExperimentConfig, corpus: Corpus, *, report: Callable[[str], None]
) -> Neighbourhood:
    """References of the knowledge base and, for each chunk, its nearest allowed one (§3.6)."""
    memory, folder = config.memory, corpus.folder
    path = folder / "references.npz"
    if path.exists():
        references = References.load(path, tokenizer=corpus.tokenizer)
    else:
        documents = corpus.training_documents
        if config.data.references is not None:
            documents = load_documents(config.data.references)
        references = References.build(documents, corpus.tokenizer, length=memory.reference_length)
        references.save(path)
    settings = {
        "embedder": memory.embedder,
        "chunk_length": memory.chunk_length,
        "candidates": memory.candidates,
        "limit": memory.overlap_limit,
    }
    search = _Search(memory.embedder, references)
    found = []
    for name, rows in (("training", corpus.rows), ("validation", corpus.validation_rows)):
        file = folder / f"neighbours-{name}.npz"
        if not file.exists():
            report(f"searching {name} neighbours among {len(references):,} references")
            ids = neighbours(
                rows,
                references,
                tokenizer=corpus.tokenizer,
                search=search,
                chunk_length=memory.chunk_length,
                candidates=memory.candidates,
                limit=memory.overlap_limit,
            )
            save_neighbours(file, ids, rows=rows, references=references, settings=settings)
        found.append(load_neighbours(file, rows=rows, references=references, settings=settings))
    return Neighbourhood(references, *found)


class _Search:
    """Nearest references of texts; embedder and index are made when the first is asked for."""

    def __init__(self, embedder: str, references: References):
        self._spec, self._references, self._retriever = embedder, references, None

    def __call__(self, texts: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._retriever is None:
            from jaxlab.memory.retrieve import FlatIndex, Retriever

            embedder = fit_embedder(self._spec, self._references.texts)
            self._retriever = Retriever(embedder, FlatIndex(embedder.embed(self._references.texts)))
        hits = self._retriever.search(texts, k)
        return hits.ids, hits.scores


def fit_embedder(spec: str, texts: list[str], *, model_embed: Any = None):
    """The embedder of a new bank or neighbourhood: ``lsa`` is fitted on its references."""
    if spec == "lsa":
        return LsaEmbedder.fit(texts)
    from jaxlab.memory.embedders import open_embedder

    return open_embedder(spec, model_embed=model_embed)


def stage_sources(
    config: ExperimentConfig, corpus: Corpus, *, memory: bool, neighbourhood: Neighbourhood | None
) -> tuple[list[RandomAccess], list[float]]:
    """Sample sources of a stage and their shares: text, and generated facts in a memory stage."""
    if not memory:
        return [TextSamples(corpus.rows)], [1.0]
    text = TextSamples(
        corpus.rows,
        neighbourhood.references,
        neighbourhood.training,
        chunk_length=config.memory.chunk_length,
        retrieval_lag=config.memory.retrieval_lag,
    )
    share = config.data.facts_fraction
    if not share:
        return [text], [1.0]
    facts = FactSamples(
        corpus.tokenizer,
        seed=config.seed,
        sequence_length=config.data.sequence_length,
        chunk_length=config.memory.chunk_length,
        reference_length=config.memory.reference_length,
        references_per_chunk=config.memory.references_per_chunk,
    )
    return ([text, facts], [1.0 - share, share]) if share < 1 else ([facts], [1.0])


def load_tokenizer(run: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a run. Raises DataError."""
    return Tokenizer.load(Path(run) / "data" / TOKENIZER_FILE)


def _tokenizer(config, folder: Path, training: list[Document], *, report) -> Tokenizer:
    target = folder / TOKENIZER_FILE
    if config.tokenizer.path is not None:
        given = Tokenizer.load(config.tokenizer.path)
        if not target.exists():
            temporary = target.with_suffix(".tmp")
            temporary.write_bytes(Path(config.tokenizer.path).read_bytes())
            temporary.replace(target)
        elif Tokenizer.load(target).hash != given.hash:
            raise DataError(
                f"tokenizer {config.tokenizer.path} is not the one that {folder.parent} was begun "
                "with: restore the file or use another run directory"
            )
    if target.exists():
        tokenizer = Tokenizer.load(target)
    else:
        report(f"training a tokenizer of {config.tokenizer.vocab_size} pieces")
        texts = [document.text for document in training]
        if config.data.facts_fraction:
            facts = draw_facts(*_TOKENIZER_FACTS)
            texts += [f"{f.statement}\n{prompt(f.question)} {f.answer}\n" for f in facts]
        tokenizer = train_tokenizer(
            texts, vocab_size=config.tokenizer.vocab_size, path=target, seed=config.data_seed
        )
    size = config.model.vocab_size
    if size and tokenizer.vocab_size > size:
        raise DataError(
            f"tokenizer {config.tokenizer.path or target} has {tokenizer.vocab_size} pieces but "
            f"model.vocab_size is {size}: use the model's tokenizer or set model.vocab_size=0"
        )
    return tokenizer


def _remember(path: Path, config: ExperimentConfig, documents: list[Document]) -> None:
    """Write down what the files in ``data`` are made from, or check that it is still the same.

    Checkpoints know the whole configuration; a run that has none yet has these files already.
    """
    source, values = config.data.source, identity(config)
    settings = {key: values[key] for key in ("seed", "data", "tokenizer", "memory")}
    now = {"documents": len(documents), "hash": corpus_hash(documents), "settings": settings}
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(now, indent=1))
        temporary.replace(path)
        return
    before = json.loads(path.read_text())
    run = path.parent.parent
    if changed := differences(json.loads(json.dumps(settings)), before["settings"]):
        raise DataError(
            f"{run} was begun with another configuration (they differ in {', '.join(changed)}); "
            "use another run directory"
        )
    if before["hash"] != now["hash"]:
        raise DataError(
            f"corpus {source!r} has changed since {run} was begun "
            f"({before['hash'][:12]} then, {now['hash'][:12]} now): restore it or use another run "
            "directory"
        )
