"""Generation with memory (Memory³ §3.1): many requests at once, each with its own references.

Each chunk of a prompt is read with the memories that it retrieves itself. Decoding goes on with
those of the prompt's last chunk; when a chunk of the chunk grid is complete, its text retrieves the
memories of the tokens that follow. Earlier keys and values stay as they are.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxlab.errors import ClosedError, DataError, JaxlabError
from jaxlab.inference.augment import augment, most_tokens
from jaxlab.inference.batching import Batch
from jaxlab.inference.programs import Programs, empty_state, serving_parameters
from jaxlab.inference.requests import Citation, Event, Request, TokenLogprob
from jaxlab.inference.retrieval import Retrieval, on_one_bank
from jaxlab.inference.sampling import Sampling
from jaxlab.inference.sequences import Sequence as Generated
from jaxlab.memory.library import open_reader
from jaxlab.memory.read import CACHE_BYTES, MemoryReader
from jaxlab.training.load import LoadedModel, load_model

# Tokens before the end of a chunk at which what it has so far is searched ahead. A CPU would search
# with the cores that decode, for nearly twice the work.
LEAD = 8
# The cache is a multiple of so many tokens long, which kernels like.
_CACHE_STEP = 128


@dataclasses.dataclass
class Generation:
    """What became of one prompt; ``finished``: by itself, and not because it was long enough."""

    tokens: list[int]
    text: str
    citations: list[Citation]
    finished: bool
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)


class Ticket:
    """A request that was submitted."""

    def __init__(self, sequence: Generated, woken: threading.Condition):
        self._sequence, self._woken = sequence, woken
        # What is read before the answer: with memory "text" the references as well.
        self.prompt_tokens = len(sequence.prompt)

    def cancel(self) -> None:
        """End it where it is, and free its row; nothing happens to one that has ended."""
        with self._woken:
            self._sequence.cancelled = True
            self._woken.notify_all()


class Engine:
    """A model, and a bank to read from or None, ready to continue texts.

    ``rows`` sequences are decoded at once, each of at most ``context`` tokens (None: what the model
    allows), ``<s>``, prompt and answer together. ``use_preface`` keeps preface and gap when there
    is no bank (Memory³ spec 10.6: "without memory" can mean that, or the plain language model).

    ``like``, another engine of the same model, shares its weights and compiled programs.

    What a request is answered does not depend on what else is under way: shapes are fixed, one
    program computes the logits, and search and sampling go by the request alone (but for an
    embedder of sentence-transformers, whose last bits vary with the texts that it embeds at once).
    """

    def __init__(
        self,
        model: LoadedModel,
        reader: MemoryReader | None = None,
        *,
        use_preface: bool = False,
        rows: int = 8,
        context: int | None = None,
        like: "Engine | None" = None,
    ):
        if reader is not None:
            model.require_memory()
        limit = model.config.model.max_context
        if rows < 1 or not 2 <= (context or limit) <= limit:
            raise DataError(
                f"an engine of {rows} rows and {context or limit} tokens: at least one row, and "
                f"from 2 to {limit} tokens, which the model was made for"
            )
        self.model, self.reader, self.rows = model, reader, rows
        self.context = context or limit
        self.alive, self.failure = False, None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._woken = threading.Condition()
        with_preface = reader is not None or use_preface
        self.programs, params = self._shared(like, with_preface)
        self._given = (params, model.preface if with_preface else None)
        self._batch = self._new_batch()

    def _shared(self, like: "Engine | None", with_preface: bool) -> tuple[Programs, Any]:
        start = self.model.context_start if with_preface else 0
        if like is None:
            model = self.model
            dtype = model.config.model.compute_dtype
            graphdef, params = serving_parameters(model.graphdef, model.params, dtype)
            return Programs(graphdef, start), params
        same = like.programs.start == start
        return like.programs if same else Programs(like.programs.graphdef, start), like._given[0]

    def _new_batch(self) -> Batch:
        config, chunk = self.model.config, self.model.config.memory.chunk_length
        # A prompt is read in whole chunks, the last of which may reach past the context.
        length = -(-(self.context + chunk + 1) // _CACHE_STEP) * _CACHE_STEP
        retrieval = codebook = None
        if self.reader is not None:
            ahead = self.reader.keeps and jax.default_backend() != "cpu"
            retrieval = Retrieval(self.reader, self._wake, lead=LEAD if ahead else 0)
            codebook = self.reader.codebook
        memory = None if self.reader is None else config.memory
        return Batch(
            self.model,
            self.programs,
            self._given,
            empty_state(config.model, memory, rows=self.rows, length=length),
            retrieval,
            codebook=codebook,
            rows=self.rows,
            group=_group(self.rows),
            woken=self._woken,
        )

    def encode(self, request: Request) -> list[int]:
        """The tokens of the prompt; raises DataError when it and its answer do not fit."""
        if request.memory in ("text", "shuffled") and self.reader is None:
            raise DataError(
                f'memory is "{request.memory}", but there is no bank to find references in'
            )
        tokenizer, before = self.model.tokenizer, 0
        if request.memory == "text":
            before = most_tokens(self.reader, tokenizer)
        # A long prompt takes seconds to encode: one that cannot fit is refused by its bytes first.
        size = len(request.prompt.encode("utf-8", "replace"))
        least = -(-size // int(tokenizer.byte_lengths.max()))
        self._require_room(least, request.max_tokens, before, about="at least ")
        prompt = tokenizer.encode(request.prompt)
        self._require_room(len(prompt), request.max_tokens, before)
        return prompt

    def _require_room(self, prompt: int, answer: int, before: int = 0, *, about: str = "") -> None:
        """Raise DataError when so many tokens, and ``before`` for references, are too many."""
        whole, rest = 1 + prompt + answer + before, f"{answer} to generate"
        if before:
            rest += f", and {before} kept free for references,"
        if whole > self.context:
            raise DataError(
                f"the prompt has {about}{prompt} tokens; with <s> and {rest} that is {whole}, the "
                f"context holds {self.context}: shorten the prompt or ask for fewer tokens"
            )

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        """Queue a request, from any thread; ``on_event`` is called from the engine's.

        It must not block, and if it raises the request ends; the last event has ``finish``. Raises
        DataError when the request does not fit, and ClosedError when the engine is closing.
        """
        return self._submit(request, self.encode(request), on_event)

    def _submit(
        self, request: Request, prompt: list[int], on_event: Callable[[Event], None]
    ) -> Ticket:
        cited = ()
        tokenizer = self.model.tokenizer
        if request.memory == "text":
            longer = functools.partial(augment, self.reader, tokenizer, prompt)
            prompt, cited = on_one_bank(self.reader, longer)
            self._require_room(len(prompt), request.max_tokens)
        sequence = Generated(
            request,
            prompt,
            on_event,
            tokenizer,
            chunk=self.model.config.memory.chunk_length,
            reads=self.reader is not None and request.memory in ("on", "shuffled"),
        )
        sequence.cite(cited)
        with self._woken:
            if self._closing or self.failure is not None:
                raise ClosedError("the engine takes no more requests: it is being closed")
            self._batch.add(sequence)
        return Ticket(sequence, self._woken)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] | None = None,
        on_token: Callable[[int, str], None] | None = None,
        memory: str = "on",
        logprobs: int | None = None,
    ) -> list[Generation]:
        """Continue each prompt by at most ``max_tokens`` tokens, to ``</s>`` or before ``stop``.

        ``on_token(row, text)`` receives the text as it grows. Raises DataError when a prompt and
        its answer do not fit in the context, what went wrong while memories were read, and what
        ``on_token`` raised, which ends that prompt.
        """
        requests = [
            Request(
                prompt,
                max_tokens=max_tokens,
                sampling=sampling or Sampling(),
                stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
                memory=memory,
                logprobs=logprobs,
            )
            for prompt in prompts
        ]
        encoded = []
        for number, request in enumerate(requests):
            try:
                encoded.append(self.encode(request))
            except DataError as error:
                raise DataError(f"prompt {number}: {error}") from None
        answers = [_Answer(number, on_token) for number in range(len(requests))]
        for request, tokens, answer in zip(requests, encoded, answers, strict=True):
            self._submit(request, tokens, answer.take)
        for answer in answers:
            while not self.alive and not answer.finished.is_set():
                self._turn()
            answer.finished.wait()
        return [answer.generation() for answer in answers]

    def warm(self) -> None:
        """Compile all that requests may need, so that none waits for it."""
        before = dict(self._batch.counts)
        drawn = Sampling(temperature=1.0)
        for sampling in (Sampling(), drawn, dataclasses.replace(drawn, top_p=0.5)):
            for logprobs in (None, 0):
                self.generate(
                    ["a b c"], max_tokens=1, sampling=sampling, memory="off", logprobs=logprobs
                )
        self._batch.counts.update(before)

    def start(self) -> None:
        """Work in a thread of its own from now on, until :meth:`close`."""
        self.alive = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Take no more requests, finish what is under way if time allows, cancel the rest."""
        with self._woken:
            self._closing = True
            self._woken.wait_for(lambda: self._batch.idle or not self.alive, drain_seconds)
            self._batch.cancel_all()
            self._woken.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._batch.close()

    def stats(self) -> dict[str, int | float]:
        """Counts since the start and what is under way now."""
        found = {
            "waiting": self._batch.waiting,
            "running": self._batch.running,
            **self._batch.counts,
        }
        if self.reader is not None:
            recent = self.reader.recent
            found |= {
                "references": len(self.reader.bank),
                "cache_hits": recent.hits,
                "cache_misses": recent.misses,
                "cache_bytes": recent.bytes,
            }
            found |= {f"seconds_{name}": value for name, value in self.reader.seconds.items()}
        return found

    def _wake(self) -> None:
        with self._woken:
            self._woken.notify_all()

    def _turn(self) -> None:
        if self._batch.turn():
            return
        with self._woken:
            self._woken.notify_all()  # who closes waits for this
            self._woken.wait_for(
                lambda: self._batch.stirred or (self._closing and self._batch.idle)
            )

    def _run(self) -> None:
        try:
            while not (self._closing and self._batch.idle):
                self._turn()
        except BaseException as error:  # told to all that wait, and by `failure`
            with self._woken:
                self.failure = error  # from here on nothing is queued
            self._batch.end_all("error", JaxlabError(f"the engine failed: {error!r}"))
        finally:
            self.alive = False
            self._wake()


def _group(rows: int) -> int:
    """Prompts of which a chunk is read at once: always as many, for what they say to be the same.

    A CPU is busy with one; reading four together saves a sixth, but a lone prompt pays for four.
    """
    return max(1, min(rows // 8, 4)) if jax.default_backend() == "cpu" else min(rows, 8)


class _Answer:
    """Gathers the events of one request."""

    def __init__(self, number: int, on_token: Callable[[int, str], None] | None):
        self._number, self._on_token = number, on_token
        self._events: list[Event] = []
        self._raised: Exception | None = None
        self.finished = threading.Event()

    def take(self, event: Event) -> None:
        self._events.append(event)
        try:
            if self._on_token is not None and event.text:
                self._on_token(self._number, event.text)
        except Exception as error:
            self._on_token, self._raised = None, error
            raise
        finally:
            if event.finish:
                self.finished.set()

    def generation(self) -> Generation:
        if self._raised is not None:
            raise self._raised
        last = self._events[-1]
        if last.finish == "error":
            raise last.error
        return Generation(
            [token for event in self._events for token in event.said],
            "".join(event.text for event in self._events),
            [citation for event in self._events for citation in event.citations],
            last.finish == "stop",
            [logprob for event in self._events for logprob in event.logprobs],
        )


def open_engine(
    run: str,
    bank: str | None = None,
    *,
    rows: int = 8,
    context: int | None = None,
    cache_bytes: int = CACHE_BYTES,
    grows: bool = False,
) -> Engine:
    """The engine of a run (``DIR`` or ``DIR@stage``), reading a bank or none.

    ``grows``: documents can be added to the bank, by ``reader.add``.

    Raises what loading the model and opening the bank raise.
    """
    model = load_model(run)
    if bank is None:
        return Engine(model, rows=rows, context=context)
    reader = open_reader(model, bank, grows=grows, cache_bytes=cache_bytes)
    return Engine(model, reader, rows=rows, context=context)
