"""One sequence while it is generated: its tokens, its place on the chunk grid, what it says."""

import dataclasses
import enum
import logging
from collections import deque
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Shaped

from jaxlab.data.tokenizer import Tokenizer
from jaxlab.errors import JaxlabError
from jaxlab.inference.requests import Citation, Event, Finish, Request, TokenLogprob
from jaxlab.inference.text import TextStream

log = logging.getLogger(__name__)


class Phase(enum.Enum):
    """What a sequence waits for."""

    ROW = "a row to be free"
    PROMPT = "its prompt to be read"
    TURN = "the next step of decoding"
    TOKEN = "a token on its way from the device, or the memories that follow it"
    NOTHING = "it has ended"


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What one chunk reads: memories as stored, their filled slots, and what to cite."""

    stored: Shaped[np.ndarray, "r ..."]
    valid: Bool[np.ndarray, "r m"]
    citations: tuple[Citation, ...] = ()


class Sequence:
    """A request under way. Its tokens are ``<s>``, the prompt and what was said."""

    def __init__(
        self,
        request: Request,
        prompt: list[int],
        on_event: Callable[[Event], None],
        tokenizer: Tokenizer,
        *,
        chunk: int,
        reads: bool,
    ):
        self.request, self.prompt, self.on_event = request, prompt, on_event
        self.reads, self.chunk = reads, chunk
        self.said: list[int] = []
        self.phase, self.row = Phase.ROW, -1
        self.cancelled = False
        # Tokens in the cache, and tokens asked of the device so far.
        self.written, self.asked = 0, 0
        self.prompt_chunks = max(1, -(-len(prompt) // chunk))
        self.next_chunk = 0
        # Memories that have come and are not loaded yet, in the order of their chunks.
        self.memories: deque[Chunk] = deque()
        self._untold: tuple[tuple[int, ...], tuple[TokenLogprob, ...]] = (), ()
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, request.stop)

    @property
    def ended(self) -> bool:
        """Whether it has said its last."""
        return self.phase is Phase.NOTHING

    @property
    def pending(self) -> int:
        """The last token that is known: the next to be written into the cache."""
        return (self.said or self.prompt or [self._tokenizer.bos_id])[-1]

    def prompt_texts(self) -> list[str]:
        """The text of each chunk of the prompt, which retrieves what that chunk reads."""
        starts = range(0, self.prompt_chunks * self.chunk, self.chunk)
        return [self._tokenizer.decode(self.prompt[i : i + self.chunk]) for i in starts]

    def last_text(self) -> str:
        """The text of the chunk that was completed last."""
        return self._tokenizer.decode([*self.prompt, *self.said][-self.chunk :])

    def begun_text(self) -> str:
        """The text of the chunk that is being written, as far as it is known."""
        tokens = [*self.prompt, *self.said]
        return self._tokenizer.decode(tokens[len(tokens) // self.chunk * self.chunk :])

    def left_of_chunk(self) -> int:
        """Tokens until the chunk is complete, those that were asked for counted as there."""
        return -(len(self.prompt) + self.asked) % self.chunk

    @property
    def begins_chunk(self) -> bool:
        """Whether the token asked for last is the first of a chunk that reads other memories.

        The first token behind the prompt is none: it reads on with the prompt's last chunk.
        """
        return self.reads and self.asked > 1 and self.left_of_chunk() == self.chunk - 1

    @property
    def completed_chunks(self) -> int | None:
        """The number of chunks that are complete, if one was completed by the last token.

        None also where no token will be written that would read what the chunk retrieves.
        """
        chunks, rest = divmod(len(self.prompt) + len(self.said), self.chunk)
        needed = self.reads and not rest and len(self.said) + 1 < self.request.max_tokens
        return chunks if needed else None

    def take_prompt(self) -> list[int]:
        """Tokens of the next chunk of the prompt, ``<s>`` before the first, without the last one.

        The last token is written by the first step of decoding, which needs its output.
        """
        tokens = [self._tokenizer.bos_id, *self.prompt]
        end = min(1 + (self.next_chunk + 1) * self.chunk, len(self.prompt))
        part = tokens[self.written : end]
        self.next_chunk += 1
        self.written += len(part)
        return part

    def accept(self, token: int, logprob: TokenLogprob | None) -> Finish | None:
        """Take the next token and tell of it; how the sequence ends with it, or None."""
        if token == self._tokenizer.eos_id:
            return "stop"
        self.said.append(token)
        self._untold = (token,), () if logprob is None else (logprob,)
        if self._stream.add(token):
            return "stop"
        if len(self.said) == self.request.max_tokens:
            return "length"
        self._tell(self._stream.fresh(final=False))
        return None

    def cite(self, citations: tuple[Citation, ...]) -> None:
        """Tell of references that are about to be read."""
        if citations:
            self._send(Event(tokens=len(self.said), citations=citations))

    def end(self, finish: Finish, error: JaxlabError | None = None) -> None:
        """Tell of the end."""
        self.phase = Phase.NOTHING
        self.memories.clear()
        self._tell(self._stream.fresh(final=True), finish=finish, error=error)

    def _tell(self, text: str, **end) -> None:
        said, logprobs = self._untold
        self._untold = (), ()
        self._send(Event(text, said, len(self.said), logprobs, **end))

    def _send(self, event: Event) -> None:
        try:
            self.on_event(event)
        except Exception as error:  # the others shall not suffer
            log.error("who asked could not be told; the request is cancelled", exc_info=error)
            self.cancelled = True
