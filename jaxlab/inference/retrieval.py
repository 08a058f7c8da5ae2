"""Retrieval beside decoding: what sequences read next is searched and loaded by another thread."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from jaxlab.errors import BankError, JaxlabError, RewrittenError
from jaxlab.inference.requests import Citation
from jaxlab.inference.sequences import Chunk
from jaxlab.inference.sequences import Sequence as Generated
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.retrieve import Hits

log = logging.getLogger(__name__)
# The control "shuffled" exchanges memories in one way, the same for all requests.
_SHUFFLE_SEED = 0
_T = TypeVar("_T")


def on_one_bank(reader: Any, work: Callable[[], _T]) -> _T:
    """What ``work`` gives, which searches and then reads what was found.

    Done again where it failed and the bank was changed meanwhile: what was found may be deleted,
    or its shard made again by a repair. Raises RewrittenError when what was opened before is of no
    more use.
    """
    while True:
        bank = reader.bank
        try:
            return work()
        except BankError as error:
            if isinstance(error, RewrittenError):
                reader.refresh()
            if reader.bank is bank:
                raise


class Retrieval:
    """Searches for all that wait at once, and loads what was found.

    One thread: while it is at work, those that come wait together and go together next. ``woken``
    is called from it when something has come. ``lead`` tokens before the end of a chunk its text is
    likely to retrieve what the whole will, and is searched ahead; 0: never.
    """

    def __init__(self, reader: MemoryReader, woken: Callable[[], None], *, lead: int):
        self.reader, self.lead, self._woken = reader, lead, woken
        # What a chunk reads that reads nothing.
        nothing = reader.fetch(np.full((1, reader.per_chunk), -1))
        self.nothing = Chunk(*(part[0] for part in nothing))
        self._shuffled: MemoryReader | None = None
        self._waiting: list[tuple[Generated, int, list[str]]] = []
        self._likely: list[str] = []
        self._come: deque[tuple[Generated, list[Chunk] | JaxlabError]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="retrieval")
        self._busy = False

    def ask(self, sequence: Generated, first: int, texts: Sequence[str]) -> None:
        """What ``texts`` retrieve, for the chunks from number ``first`` on."""
        self._waiting.append((sequence, first, list(texts)))

    def expect(self, text: str) -> None:
        """A text that is likely to be asked for soon, with little added: bring it near."""
        self._likely.append(text)

    def begin(self) -> None:
        """Send off what waits, unless something is under way."""
        if self._busy or not (self._waiting or self._likely):
            return
        waiting, likely, self._waiting, self._likely = self._waiting, self._likely, [], []
        self._busy = True
        self._pool.submit(self._work, waiting, likely)

    def take(self) -> tuple[Generated, list[Chunk] | JaxlabError] | None:
        """A sequence with the chunks that it waited for, or with what went wrong."""
        return self._come.popleft() if self._come else None

    @property
    def stirred(self) -> bool:
        """Whether there is something to take, or to send off."""
        return bool(self._come) or (bool(self._waiting) and not self._busy)

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown()

    def _work(self, waiting: list[tuple[Generated, int, list[str]]], likely: list[str]) -> None:
        try:
            if waiting:
                self._come.extend(self._found(waiting))
            if likely:
                self._bring_near(likely)
        finally:
            self._busy = False
            self._woken()

    def _found(self, waiting) -> list[tuple[Generated, list[Chunk] | JaxlabError]]:
        try:
            return on_one_bank(self.reader, lambda: self._chunks(waiting))
        except Exception as error:
            if len(waiting) == 1:
                if not isinstance(error, JaxlabError):
                    log.error("what a request reads could not be retrieved", exc_info=error)
                    error = JaxlabError(repr(error))
                elif not isinstance(error, BankError):
                    error = JaxlabError(str(error))  # no fault of the request, which was accepted
                return [(waiting[0][0], error)]
        # One of them is at fault; the others shall not suffer.
        return [self._found([one])[0] for one in waiting]

    def _chunks(self, waiting) -> list[tuple[Generated, list[Chunk] | JaxlabError]]:
        hits = self.reader.search([text for *_, texts in waiting for text in texts])
        # Where each sequence's own chunks lie among all that were searched.
        ends = np.cumsum([len(texts) for *_, texts in waiting])
        places = [
            slice(end - len(texts), end) for end, (*_, texts) in zip(ends, waiting, strict=True)
        ]
        ids = np.empty_like(hits.ids)
        for (sequence, *_), place in zip(waiting, places, strict=True):
            ids[place] = self._reader_of(sequence).exchanged(hits.ids[place])
        stored, valid = self.reader.fetch(ids)
        numbers = [first + n for _, first, texts in waiting for n in range(len(texts))]
        chunks = list(map(Chunk, stored, valid, self._citations(numbers, hits)))
        return [
            (sequence, chunks[place]) for (sequence, *_), place in zip(waiting, places, strict=True)
        ]

    def _reader_of(self, sequence: Generated) -> MemoryReader:
        if sequence.request.memory != "shuffled":
            return self.reader
        if self._shuffled is None or self._shuffled.bank is not self.reader.bank:
            self._shuffled = self.reader.shuffled(seed=_SHUFFLE_SEED)
        return self._shuffled

    def _citations(self, numbers: Sequence[int], hits: Hits) -> list[tuple[Citation, ...]]:
        """What the chunks with these numbers have to cite."""
        found = np.unique(hits.ids[hits.ids >= 0]).tolist()
        texts = dict(zip(found, self.reader.bank.references(found), strict=True))
        return [
            tuple(
                Citation(number, hit, score, texts[hit].source, texts[hit].text)
                for hit, score in zip(ids.tolist(), scores.tolist(), strict=True)
                if hit >= 0
            )
            for number, ids, scores in zip(numbers, hits.ids, hits.scores, strict=True)
        ]

    def _bring_near(self, texts: list[str]) -> None:
        try:
            self.reader.fetch(self.reader.exchanged(self.reader.search(texts).ids))
        except Exception as error:  # only a guess: what is wrong will show when it is needed
            log.warning("what may be read next could not be brought near: %r", error)
