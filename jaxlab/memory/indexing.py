"""The index of a bank: made once, stored with it, opened by whoever reads it."""

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.errors import BankError, ConfigError
from jaxlab.memory.approximate import (
    FLAT,
    ApproximateIndex,
    exact_hits,
    fitting_name,
    index_name,
    recall,
)
from jaxlab.memory.embedders import ModelEmbed
from jaxlab.memory.header import IndexRecord, cure_of
from jaxlab.memory.retrieve import FlatIndex
from jaxlab.memory.store import Bank

_AT_RECALL = 5


@dataclasses.dataclass(frozen=True)
class IndexReport:
    """What :func:`build_index` made, how large it is and how long it took."""

    name: str
    rows: int
    bytes: int
    probes: int
    recall_at_5: float
    seconds: float


def build_index(
    bank: Bank,
    name: str | None = None,
    *,
    probes: int | None = None,
    queries: int = 200,
    seed: int = 0,
    model_embed: ModelEmbed | None = None,
) -> IndexReport:
    """Make an approximate index of all rows and store it with the bank, open for writing.

    ``name`` None takes :func:`index_name`'s choice, and where that needs no index the kind of the
    one that the bank has: it is made again. recall@5 is over the second halves of
    ``queries`` references, drawn by ``seed``. Raises ConfigError for a name that does not suit the
    bank, and where exact search does (``Flat``), which needs no index.
    """
    if name is None:
        name, before = index_name(bank.rows, bank.spec.embedding_dim), bank.index_record
        if name == FLAT and before is not None:
            name, probes = before.name, probes or before.probes
    if name == FLAT:
        raise ConfigError(
            f"bank {bank.url}: its {bank.rows:,} references are few enough to be searched exactly "
            f"and need no index; {_all_the_same(bank.rows)}"
        )
    begin = time.perf_counter()
    dim = bank.spec.embedding_dim
    index = ApproximateIndex.fit(
        bank.embedding_blocks, name, rows=bank.rows, dim=dim, seed=seed, probes=probes
    )
    asked = _questions(bank, queries, seed, model_embed)
    exact = exact_hits(bank.embedding_blocks, asked, _AT_RECALL)
    share = recall(index.search(asked, _AT_RECALL), exact)
    record = IndexRecord(name, bank.rows, index.probes, share, bank.fingerprint())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        index.to_file(path)
        content = path.read_bytes()
    bank.keep_index(content, record)
    seconds = time.perf_counter() - begin
    return IndexReport(name, bank.rows, len(content), index.probes, share, seconds)


def _all_the_same(rows: int) -> str:
    name = fitting_name(rows)
    return f"--kind {name} makes one all the same" if name else "they are too few for one"


def open_index(bank: Bank, *, grows: bool = False) -> FlatIndex | ApproximateIndex:
    """The index of a bank, or exact search where it has none; ``grows``: rows will be added.

    Rows that were appended since are added in RAM. Raises BankError when the index is damaged, or
    of other references than the bank's.
    """
    record = bank.index_record
    if record is None:
        return FlatIndex.of(bank.embedding_blocks(), bank.spec.embedding_dim)
    if not bank.index_fits():
        raise BankError(f"bank {bank.url}: its index is of other references; {cure_of('index')}")
    if bank.rows == record.rows:
        return _opened(bank, record, grows=grows)
    index = _opened(bank, record, grows=True)
    for first, block in bank.embedding_blocks():
        if first + len(block) > record.rows:
            index.add(block[max(0, record.rows - first) :])
    return index


def _opened(bank: Bank, record: IndexRecord, *, grows: bool) -> ApproximateIndex:
    place, content = bank.index_object()
    if content is None:
        return ApproximateIndex.from_file(place, record, url=bank.url, grows=grows)
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(content)
    try:
        return ApproximateIndex.from_file(file.name, record, url=bank.url, grows=True)
    finally:
        os.unlink(file.name)


def _questions(bank: Bank, count: int, seed: int, model_embed: ModelEmbed | None) -> np.ndarray:
    alive = bank.alive()
    living = np.arange(bank.rows) if alive is None else np.flatnonzero(alive)
    draws = np.random.default_rng(seed)
    rows = draws.choice(living, min(count, len(living)), replace=False)
    texts = [reference.text for reference in bank.references(rows)]
    halves: Any = [text[len(text) // 2 :] for text in texts]
    return bank.embedder(model_embed=model_embed).embed(halves)
