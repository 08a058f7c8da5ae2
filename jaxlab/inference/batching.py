"""Continuous batching: sequences come and go, each at its own place, in steps of fixed shape.

Every turn of the loop does four things, none of which waits for another sequence: rows that are
free go to those who wait; memories that have come are loaded, and some chunks of prompts are read;
a step of decoding is dispatched for the rows that are ready; and the tokens of the step before are
taken, so that the host works while the device does. What a chunk retrieves is searched while its
last token is still being written; a sequence whose memories are not there when the next chunk
begins sits out until they are (Memory³ §3.1), and the others go on.
"""

import threading
from collections import deque
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlab.errors import JaxlabError
from jaxlab.inference.programs import Programs, Said, State, say
from jaxlab.inference.requests import MOST_ALTERNATIVES, Finish, TokenLogprob
from jaxlab.inference.retrieval import Retrieval
from jaxlab.inference.sampling import Choices, Sampling
from jaxlab.inference.sequences import Phase, Sequence
from jaxlab.training.load import LoadedModel
from kernels_pallas.memory_dequantize import Codebook

_IDLE = Sampling()
# Chunks of prompts that are read between two steps of decoding: reading more at once keeps those
# who decode waiting, reading fewer lets steps go by with rows that have nothing to say yet.
_CHUNKS_AT_ONCE = 8


class Batch:
    """The rows of an engine and all that is under way in them; one thread turns the loop."""

    def __init__(
        self,
        model: LoadedModel,
        programs: Programs,
        given: tuple[Any, Any],
        state: State,
        retrieval: Retrieval | None,
        *,
        codebook: Codebook | None,
        rows: int,
        group: int,
        woken: threading.Condition,
    ):
        self._tokenizer, self._chunk = model.tokenizer, model.config.memory.chunk_length
        self._programs, self._given, self._state = programs, given, state
        self._retrieval, self._codebook = retrieval, codebook
        self._group, self._woken = group, woken
        self._rows: list[Sequence | None] = [None] * rows
        self._said = jnp.zeros(rows, jnp.int32)  # what each row said last, on the device
        self._queue: deque[Sequence] = deque()
        self._sent: tuple[Said, list[Sequence]] | None = None
        self.counts = dict.fromkeys(
            ("requests", "prompt_tokens", "generated_tokens", "refreshes", "steps"), 0
        )

    @property
    def waiting(self) -> int:
        """Sequences without a row."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Sequences with a row."""
        return sum(one is not None for one in self._rows)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; any thread may."""
        with self._woken:
            self._queue.append(sequence)
            self.counts["requests"] += 1
            self._woken.notify_all()

    def turn(self) -> bool:
        """Once round; False when there was nothing to do and something else has to happen."""
        self._sweep()
        came = self._admit() | self._take_memories()
        self._retrieve()
        read = self._load_and_read()
        sent, self._sent = self._sent, self._dispatch()
        if sent is not None:
            self._accept(*sent)
            self._retrieve()
        return came or read or sent is not None or self._sent is not None

    @property
    def idle(self) -> bool:
        """Whether nothing is under way; call with the lock."""
        return not (self._queue or self.running or self._sent)

    @property
    def stirred(self) -> bool:
        """Whether a turn would find something that came from another thread; with the lock."""
        free = any(one is None for one in self._rows)
        return (
            (bool(self._queue) and free)
            or any(one.cancelled for one in self._all())
            or (self._retrieval is not None and self._retrieval.stirred)
        )

    def cancel_all(self) -> None:
        """Cancel whatever is under way; call with the lock."""
        for sequence in self._all():
            sequence.cancelled = True

    def close(self) -> None:
        """Wait for what the other thread is at."""
        if self._retrieval is not None:
            self._retrieval.close()

    def end_all(self, finish: Finish, error: JaxlabError | None = None) -> None:
        """End whatever is under way."""
        for sequence in self._all():
            self._end(sequence, finish, error)
        self._queue.clear()

    def _all(self) -> list[Sequence]:
        return [*self._queue, *(one for one in self._rows if one is not None)]

    def _sweep(self) -> None:
        for sequence in self._all():
            if sequence.cancelled:
                self._end(sequence, "cancelled")
        with self._woken:
            self._queue = deque(one for one in self._queue if not one.ended)

    def _end(self, sequence: Sequence, finish: Finish, error: JaxlabError | None = None) -> None:
        if sequence.row >= 0:
            self._rows[sequence.row] = None
        sequence.end(finish, error)

    def _admit(self) -> bool:
        """Give free rows to those who have waited longest, and ask for what their prompts read."""
        came = False
        for row, holder in enumerate(self._rows):
            if holder is None and self._queue:
                with self._woken:  # for both: who cancels all looks in the queue and in the rows
                    sequence = self._queue.popleft()
                    self._rows[row], sequence.row, sequence.phase = sequence, row, Phase.PROMPT
                self.counts["prompt_tokens"] += len(sequence.prompt)
                if sequence.reads:
                    self._retrieval.ask(sequence, 0, sequence.prompt_texts())
                elif self._state.slots is not None:
                    sequence.memories.extend([self._retrieval.nothing] * sequence.prompt_chunks)
                came = True
        return came

    def _retrieve(self) -> None:
        if self._retrieval is not None:
            self._retrieval.begin()

    def _take_memories(self) -> bool:
        came = False
        while self._retrieval is not None and (found := self._retrieval.take()):
            sequence, chunks = found
            came = True
            if sequence.ended:
                continue
            if isinstance(chunks, JaxlabError):
                self._end(sequence, "error", chunks)
                continue
            sequence.memories.extend(chunks)
            for chunk in chunks:
                sequence.cite(chunk.citations)
        return came

    def _load_and_read(self) -> bool:
        """Load memories that came for the next chunks, and read some chunks of prompts."""
        some = self._state.slots is not None
        refreshed = [one for one in self._rows if one and self._is_refreshed(one)]
        for start in range(0, len(refreshed), self._group):
            part = refreshed[start : start + self._group]
            self._load(part)
            for sequence in part:
                sequence.phase = Phase.TURN
        read = 0
        while read < _CHUNKS_AT_ONCE:
            reading = [one for one in self._rows if one and one.phase is Phase.PROMPT]
            reading = [one for one in reading if one.memories or not some][: self._group]
            if not reading:
                break
            if some:
                self._load(reading)
            self._read(reading)
            read += len(reading)
        return bool(refreshed or read)

    def _is_refreshed(self, sequence: Sequence) -> bool:
        """Whether the next token can be written: it is known, or the device said it last."""
        known = sequence.asked == len(sequence.said)
        known = known or (self._sent is not None and sequence in self._sent[1])
        return sequence.phase is Phase.TOKEN and bool(sequence.memories) and known

    def _load(self, sequences: list[Sequence]) -> None:
        chunks = [sequence.memories.popleft() for sequence in sequences]
        chunks += [self._retrieval.nothing] * (self._group - len(chunks))
        self._state = self._programs.load(
            self._state,
            self._rows_of(sequences),
            np.stack([chunk.stored for chunk in chunks]),
            np.stack([chunk.valid for chunk in chunks]),
            self._codebook,
        )

    def _read(self, sequences: list[Sequence]) -> None:
        # One token more than a chunk: <s> is read with the first.
        tokens = np.full((self._group, 1 + self._chunk), self._tokenizer.pad_id, np.int32)
        lengths = np.zeros(self._group, np.int32)
        for place, sequence in enumerate(sequences):
            lengths[place] = sequence.written
            part = sequence.take_prompt()
            tokens[place, : len(part)] = part
            if sequence.next_chunk == sequence.prompt_chunks:
                sequence.phase = Phase.TURN
        if not any(sequence.written > 0 for sequence in sequences):
            return  # prompts of one token or none: decoding reads it
        self._state = self._programs.prefill(
            *self._given, self._state, self._rows_of(sequences), lengths, tokens
        )

    def _rows_of(self, sequences: list[Sequence]) -> np.ndarray:
        rows = np.full(self._group, len(self._rows), np.int32)
        rows[: len(sequences)] = [sequence.row for sequence in sequences]
        return rows

    def _dispatch(self) -> tuple[Said, list[Sequence]] | None:
        """Ask for the next token of every row that is ready."""
        ready = [one for one in self._rows if one and one.phase is Phase.TURN]
        if not ready:
            return None
        lengths = np.zeros(len(self._rows), np.int32)
        given = np.full(len(self._rows), -1, np.int32)
        samplings, said = [_IDLE] * len(self._rows), [0] * len(self._rows)
        for sequence in self._rows:
            if sequence is not None:
                # Also of rows that sit out: what is written there is written again in its time.
                lengths[sequence.row] = sequence.written
        for sequence in ready:
            row = sequence.row
            if sequence.asked == len(sequence.said):
                given[row] = sequence.pending
            samplings[row], said[row] = sequence.request.sampling, sequence.asked
        asked = any(one.request.logprobs is not None for one in ready)
        self._state, logits = self._programs.decode(
            *self._given, self._state, lengths, given, self._said
        )
        answer = say(
            logits,
            Choices.of(samplings, said),
            drawn=any(one.temperature > 0 for one in samplings),
            limited=any(one.limited for one in samplings),
            # As many as anyone can ask for: each number would be a program of its own.
            alternatives=MOST_ALTERNATIVES if asked else None,
        )
        self._said = answer.tokens
        self.counts["steps"] += 1
        for sequence in ready:
            self._asked(sequence)
        return answer, ready

    def _asked(self, sequence: Sequence) -> None:
        sequence.written += 1
        sequence.asked += 1
        if sequence.asked == sequence.request.max_tokens or sequence.begins_chunk:
            sequence.phase = Phase.TOKEN
        elif sequence.reads and sequence.left_of_chunk() == self._retrieval.lead > 0:
            self._retrieval.expect(sequence.begun_text())

    def _accept(self, answer: Said, sequences: list[Sequence]) -> None:
        """Take the tokens of a step; those of sequences that ended meanwhile are nobody's."""
        host = Said(*(None if part is None else np.asarray(part) for part in answer))
        for sequence in sequences:
            if sequence.ended:
                continue
            token = int(host.tokens[sequence.row])
            logprob = None if token == self._tokenizer.eos_id else self._logprob(sequence, host)
            finish = sequence.accept(token, logprob)
            self.counts["generated_tokens"] += 1
            if finish is not None:
                self._end(sequence, finish)
            elif (chunks := sequence.completed_chunks) is not None:
                self.counts["refreshes"] += 1
                self._retrieval.ask(sequence, chunks, [sequence.last_text()])

    def _logprob(self, sequence: Sequence, host: Said) -> TokenLogprob | None:
        count, row = sequence.request.logprobs, sequence.row
        if count is None:
            return None
        token, bytes_of = int(host.tokens[row]), self._tokenizer.bytes_of
        alternatives = [
            (int(other), bytes_of(int(other)), float(value))
            for other, value in zip(
                host.top[row, :count], host.top_logprobs[row, :count], strict=True
            )
        ]
        own = float(host.logprobs[row])
        return TokenLogprob(token, bytes_of(token), own, tuple(alternatives))
