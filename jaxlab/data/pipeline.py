"""What the training loop reads: samples by index, and an endless, resumable order of batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from jaxlab.data.packing import Rows
from jaxlab.data.references import References
from jaxlab.data.tokenizer import PAD_ID
from jaxlab.errors import DataError

Sample = dict[str, np.ndarray]
Transform = Callable[[Sample, np.random.Generator], Sample]


@runtime_checkable
class RandomAccess(Protocol):
    """Samples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True, slots=True, eq=False)
class TextSamples:
    """Samples of text rows, each chunk with its reference when there are references.

    A sample is ``tokens`` (T,), ``loss_mask`` (T,) and, with references, ``references`` (C, R) and
    ``reference_lengths`` (C,), 0 for a chunk without one. With ``retrieval_lag`` 1 chunk c reads
    what chunk c - 1 retrieved, as in decoding, and chunk 0 nothing (Memory³, §3.1). Raises
    DataError when the parts do not fit each other.
    """

    rows: Rows
    references: References | None = None
    neighbours: Int32[np.ndarray, "N C"] | None = None
    chunk_length: int = 64
    retrieval_lag: int = 0

    def __post_init__(self) -> None:
        if (self.references is None) != (self.neighbours is None):
            raise DataError("references and neighbours belong together: give both or none")
        if self.retrieval_lag not in (0, 1):
            raise DataError(f"retrieval_lag is {self.retrieval_lag}: it must be 0 or 1")
        if self.references is None or self.neighbours is None:
            return
        count, length = self.rows.tokens.shape
        expected = (count, length // self.chunk_length)
        if length % self.chunk_length or self.neighbours.shape != expected:
            raise DataError(
                f"neighbours are {self.neighbours.shape} but {count} rows of {length} tokens in "
                f"chunks of {self.chunk_length} need {expected}: find the neighbours anew"
            )
        if self.neighbours.max(initial=-1) >= len(self.references):
            raise DataError(
                f"a neighbour is reference {self.neighbours.max()} of {len(self.references)}: "
                "find the neighbours anew"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        sample = {
            "tokens": self.rows.tokens[index],
            "loss_mask": self.rows.mask[index].astype(np.float32),
        }
        if self.references is None or self.neighbours is None:
            return sample
        ids = self.neighbours[index]
        if self.retrieval_lag:
            ids = np.concatenate([np.array([-1], np.int32), ids[:-1]])
        has_reference = ids >= 0
        return sample | {
            "segments": np.zeros_like(sample["tokens"]),
            "references": np.where(has_reference[:, None], self.references.tokens[ids], PAD_ID),
            "reference_lengths": np.where(has_reference, self.references.lengths[ids], 0),
        }


def training_iterator(
    sources: Sequence[RandomAccess],
    weights: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    transform: Transform | None = None,
    threads: int = 0,
) -> Any:
    """An endless iterator over batches, as dicts of stacked arrays.

    Each source is shuffled anew in every epoch and the sources are mixed by ``weights``. ``rows``
    are the rows of each batch that are wanted, in that order: those of one process's devices; None:
    all. The iterator is Grain's ``DatasetIterator``: ``get_state()`` gives a small JSON-able dict
    and ``set_state(state)`` goes on from it exactly; it counts batches, and so is the same whatever
    the rows. ``transform`` changes samples with numbers drawn for their place in this order;
    ``threads`` read ahead, for samples that are not in memory. Raises DataError.
    """
    import grain

    rows = range(batch_size) if rows is None else rows
    _check(sources, weights, batch_size=batch_size, seed=seed, rows=rows)
    orders = [
        grain.MapDataset.source(_Epochs(source, (seed, number)))
        for number, source in enumerate(sources)
    ]
    mixture = grain.MapDataset.mix(orders, weights=list(weights))
    share = _Share(
        mixture if transform is None else _Drawn(mixture, transform, seed),
        batch_size=batch_size,
        rows=tuple(rows),
    )
    batches = grain.MapDataset.source(share).batch(len(share.rows), drop_remainder=True)
    # Of rows in memory threads would only add a delay between a state and what it stands for.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(batches.to_iter_dataset(options))


@dataclass(frozen=True, slots=True)
class _Epochs:
    """A source without end, in a new order each epoch.

    Grain's own shuffle was measured at 13 ms a sample where there are fewer than ten samples; this
    takes one sort an epoch. NumPy keeps raw Philox words, unlike ``permutation``, from version to
    version, so a restored run sees the same order.
    """

    source: RandomAccess
    seed: tuple[int, int]
    orders: dict[int, Any] = field(default_factory=dict)  # the last epochs asked for

    def __len__(self) -> int:
        return sys.maxsize // len(self.source) * len(self.source)

    def __getitem__(self, index: int) -> Sample:
        epoch, place = divmod(index, len(self.source))
        order = self.orders.get(epoch)
        if order is None:
            words = np.random.Philox((*self.seed, epoch)).random_raw(len(self.source))
            order = np.argsort(words, kind="stable")
            if len(self.orders) > 1:
                self.orders.clear()
            self.orders[epoch] = order
        return self.source[int(order[place])]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Samples changed at random, each by its place: the same in every run and after a resume."""

    mixture: Any
    transform: Transform
    seed: int

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.Generator(np.random.Philox((self.seed, index)))
        return self.transform(self.mixture[index], rng)


@dataclass(frozen=True, slots=True)
class _Share:
    """The samples of one process: some rows out of every ``batch_size`` of the mixture."""

    mixture: Any
    batch_size: int
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.mixture) // self.batch_size * len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        batch, place = divmod(index, len(self.rows))
        return self.mixture[batch * self.batch_size + self.rows[place]]


def _check(
    sources: Sequence[RandomAccess],
    weights: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int],
) -> None:
    if not sources or len(sources) != len(weights):
        raise DataError(f"{len(sources)} sources with {len(weights)} weights: give one for each")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise DataError(f"weights {list(weights)}: each must be positive and finite")
    empty = [number for number, source in enumerate(sources) if not len(source)]
    if empty:
        raise DataError(f"source {empty[0]} holds no samples: leave it out or fill it")
    kinds = [{name: array.shape for name, array in source[0].items()} for source in sources]
    for number, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise DataError(
                f"samples of source {number} are {kind}, those of source 0 {kinds[0]}: "
                "sources of one mixture must be alike"
            )
    if seed < 0:
        raise DataError(f"seed is {seed}: it must not be negative")
    if batch_size <= 0:
        raise DataError(f"batch_size is {batch_size}: it must be positive")
    if not len(rows) or not all(0 <= row < batch_size for row in rows):
        raise DataError(f"rows {list(rows)} of batches of {batch_size}: they count from 0")
