"""Generation with memory: prefill by chunk, decode, refresh the memory every chunk (Memory³ §3.1).

Each chunk of the prompt is read with the memories that it retrieves itself. Decoding goes on with
those of the prompt's last chunk; when a chunk of the chunk grid is complete, its text retrieves the
memories of the tokens that follow. Earlier keys and values stay as they are.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlab.errors import DataError
from jaxlab.inference.sampling import Sampling, sample
from jaxlab.memory.read import MemoryReader
from jaxlab.memory.retrieve import Hits
from jaxlab.models.attention import Slots
from jaxlab.models.cache import Cache, empty_cache
from jaxlab.training.load import LoadedModel
from kernels_pallas.memory_attention import ChunkGrid


@dataclasses.dataclass(frozen=True)
class Citation:
    """One reference read for a chunk of the text."""

    chunk: int
    reference: int
    score: float
    source: str
    text: str


@dataclasses.dataclass
class Generation:
    """What became of one prompt."""

    tokens: list[int]
    text: str
    citations: list[Citation]
    finished: bool


@dataclasses.dataclass
class _Sequences:
    """Host-side book-keeping of a batch while it is generated."""

    prompts: list[list[int]]
    generated: list[list[int]]
    citations: list[list[Citation]]
    done: list[bool]


class Engine:
    """A model, and a bank to read from or None, ready to continue texts.

    ``use_preface`` keeps preface and gap when there is no bank (Memory³ spec 10.6: "without memory"
    can mean that, or the plain language model).
    """

    def __init__(
        self,
        model: LoadedModel,
        reader: MemoryReader | None = None,
        *,
        use_preface: bool = False,
    ):
        if reader is not None:
            model.require_memory()
        self.model, self.reader = model, reader
        self._chunk = model.config.memory.chunk_length
        self._preface = model.preface if reader is not None or use_preface else None
        self._start = model.context_start if self._preface is not None else 0

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop: str | None = None,
        on_token: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Continue each prompt by at most ``max_tokens`` tokens, to ``</s>`` or before ``stop``.

        ``on_token(row, text)`` receives the text as it grows. Raises DataError when a prompt and
        its answer do not fit in the context.
        """
        sampling = sampling or Sampling()
        tokenizer = self.model.tokenizer
        encoded = [tokenizer.encode(prompt) for prompt in prompts]
        self._check(encoded, max_tokens)
        rows = len(encoded)
        batch = _Sequences(encoded, [[] for _ in encoded], [[] for _ in encoded], [False] * rows)
        streams = [_Stream(tokenizer, stop) for _ in encoded]
        for step, tokens in enumerate(self._tokens(batch, max_tokens, sampling)):
            for row in range(rows):
                if batch.done[row]:
                    continue
                token = int(tokens[row])
                if token == tokenizer.eos_id:
                    batch.done[row] = True
                else:
                    batch.generated[row].append(token)
                    batch.done[row] = streams[row].add(token)
                fresh = streams[row].fresh(final=batch.done[row] or step + 1 == max_tokens)
                if on_token is not None and fresh:
                    on_token(row, fresh)
            if all(batch.done):
                break
        return [
            Generation(
                batch.generated[row], streams[row].text, batch.citations[row], batch.done[row]
            )
            for row in range(rows)
        ]

    def _check(self, encoded: list[list[int]], max_tokens: int) -> None:
        limit = self.model.config.model.max_context
        if max_tokens < 1:
            raise DataError(f"max_tokens is {max_tokens}: ask for at least one token")
        for row, ids in enumerate(encoded):
            if 1 + len(ids) + max_tokens > limit:
                raise DataError(
                    f"prompt {row} has {len(ids)} tokens; with <s> and {max_tokens} to generate "
                    f"that is {1 + len(ids) + max_tokens}, the context of the model holds {limit}: "
                    "shorten the prompt or ask for fewer tokens"
                )

    def _tokens(
        self, batch: _Sequences, max_tokens: int, sampling: Sampling
    ) -> Iterator[np.ndarray]:
        """The next token of every sequence, again and again."""
        # One compiled sampler for each kind of request; keys differ by step.
        choose = functools.partial(_choose, sampling=sampling)
        key = jax.random.key(sampling.seed)
        logits, cache, current = self._prefill(batch, max_tokens)
        for step in range(max_tokens):
            tokens = choose(logits, jax.random.fold_in(key, step))
            host = np.asarray(tokens)
            yield host
            if step + 1 == max_tokens:
                return
            logits, cache = self._decode(
                self.model.params, self._preface, current, cache, tokens[:, None]
            )
            current = self._refresh(batch, current)

    def _prefill(self, batch: _Sequences, max_tokens: int):
        """Run all prompts at once; each chunk reads what its own text retrieves."""
        bos, pad = self.model.tokenizer.bos_id, self.model.tokenizer.pad_id
        lengths = np.array([1 + len(ids) for ids in batch.prompts], np.int32)
        chunks = max(1, -(-int(lengths.max() - 1) // self._chunk))
        width = 1 + chunks * self._chunk
        tokens = np.full((len(lengths), width), pad, np.int32)
        for row, ids in enumerate(batch.prompts):
            tokens[row, : lengths[row]] = [bos, *ids]
        # Room for the answer in whole chunks, so that few cache lengths are ever compiled.
        room = width + -(-max_tokens // self._chunk) * self._chunk
        cache = empty_cache(self.model.config.model, batch=len(lengths), length=room)
        slots, current = self._prompt_slots(batch, chunks)
        return *self._run_prefill(
            self.model.params, self._preface, slots, cache, tokens, lengths
        ), current

    def _prompt_slots(self, batch: _Sequences, chunks: int) -> tuple[Slots | None, Slots | None]:
        """Slots of every prompt chunk, and those of each prompt's last chunk."""
        if self.reader is None:
            return None, None
        texts, last = [], []
        for ids in batch.prompts:
            parts = [ids[i : i + self._chunk] for i in range(0, len(ids), self._chunk)] or [[]]
            last.append(len(parts) - 1)
            parts += [[]] * (chunks - len(parts))
            texts += [self.model.tokenizer.decode(part) for part in parts]
        hits = self.reader.search(texts)
        shape = (len(batch.prompts), chunks, -1)
        ids, scores = hits.ids.reshape(shape), hits.scores.reshape(shape)
        for row in range(len(batch.prompts)):
            for chunk in range(last[row] + 1):
                self._cite(batch, row, chunk, Hits(ids[row, chunk], scores[row, chunk]))
        slots = self.reader.slots(ids)
        rows, at = np.arange(len(last)), np.array(last)
        current = Slots(
            slots.keys[:, rows, at][:, :, None],
            slots.values[:, rows, at][:, :, None],
            slots.valid[rows, at][:, None],
        )
        return slots, current

    def _refresh(self, batch: _Sequences, current: Slots | None) -> Slots | None:
        """New slots for the sequences whose last token completed a chunk."""
        if self.reader is None:
            return current
        due, texts = [], []
        for row, (prompt, generated) in enumerate(zip(batch.prompts, batch.generated, strict=True)):
            whole = [*prompt, *generated]
            if not batch.done[row] and len(whole) % self._chunk == 0:
                due.append(row)
                texts.append(self.model.tokenizer.decode(whole[-self._chunk :]))
        if not due:
            return current
        hits = self.reader.search(texts)
        for place, row in enumerate(due):
            chunk = (len(batch.prompts[row]) + len(batch.generated[row])) // self._chunk
            self._cite(batch, row, chunk, Hits(hits.ids[place], hits.scores[place]))
        fresh = self.reader.slots(hits.ids[:, None])
        rows = np.array(due)
        return Slots(
            current.keys.at[:, rows].set(fresh.keys),
            current.values.at[:, rows].set(fresh.values),
            current.valid.at[rows].set(fresh.valid),
        )

    def _cite(self, batch: _Sequences, row: int, chunk: int, hits: Hits) -> None:
        for hit, score in zip(hits.ids.tolist(), hits.scores.tolist(), strict=True):
            if hit >= 0:
                stored = self.reader.bank.reference(hit)
                batch.citations[row].append(Citation(chunk, hit, score, stored.source, stored.text))

    @functools.cached_property
    def _run_prefill(self) -> Callable[..., Any]:
        grid = ChunkGrid(length=self._chunk, band=1)

        def prefill(params, preface, slots, cache: Cache, tokens, lengths):
            decoder = nnx.merge(self.model.graphdef, params)
            hidden, cache = decoder(
                tokens,
                preface=preface,
                slots=slots,
                grid=None if slots is None else grid,
                cache=cache,
                start=self._start,
            )
            last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
            # What was written for the padding behind a shorter prompt will be overwritten.
            return decoder.logits(last), cache._replace(lengths=lengths)

        return jax.jit(prefill, donate_argnums=3)

    @functools.cached_property
    def _decode(self) -> Callable[..., Any]:
        return compile_decode(self.model.graphdef, start=self._start)


def compile_decode(graphdef: Any, *, start: int) -> Callable[..., tuple[Any, Cache]]:
    """Compiled step of decoding: the next token of each sequence, (B, 1), to logits and cache.

    Its arguments are parameters, preface, slots, cache (whose buffers are reused) and tokens;
    ``start`` is the position of the context's ``<s>``.
    """

    def decode(params, preface, slots, cache: Cache, tokens):
        decoder = nnx.merge(graphdef, params)
        hidden, cache = decoder(tokens, preface=preface, slots=slots, cache=cache, start=start)
        return decoder.logits(hidden[:, 0]), cache

    return jax.jit(decode, donate_argnums=3)


@functools.partial(jax.jit, static_argnames="sampling")
def _choose(logits, key, *, sampling: Sampling):
    return sample(logits, key, sampling)


class _Stream:
    """Text of one sequence as it grows; holds back what is not yet certain.

    A character may take several byte tokens, and the start of ``stop`` may become all of it.
    """

    def __init__(self, tokenizer, stop: str | None):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._shown = 0
        self.text = ""

    def add(self, token: int) -> bool:
        """Append a token; True when the stop string has appeared."""
        self._ids.append(token)
        self.text = self._tokenizer.decode(self._ids)
        if self._stop and self._stop in self.text:
            self.text = self.text.split(self._stop, 1)[0]
            return True
        return False

    def fresh(self, *, final: bool) -> str:
        """Text that has become certain since the last call."""
        end = len(self.text)
        if not final:
            while end > self._shown and self.text[end - 1] == "\ufffd":
                end -= 1
            for size in range(min(len(self._stop or "") - 1, end), 0, -1):
                if self.text.endswith(self._stop[:size], 0, end):
                    end -= size
                    break
        part, self._shown = self.text[self._shown : end], max(end, self._shown)
        return part
