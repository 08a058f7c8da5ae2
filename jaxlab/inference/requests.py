"""What the engine is asked, and what it answers while it works."""

import dataclasses
from typing import Literal, NamedTuple

from jaxlab.errors import ConfigError, JaxlabError
from jaxlab.inference.sampling import Sampling

MEMORY_MODES = ("on", "off", "shuffled", "text")
MOST_ALTERNATIVES = 20

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class Citation:
    """One reference read for a chunk of the text."""

    chunk: int
    reference: int
    score: float
    source: str
    text: str


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to continue.

    ``memory`` "shuffled" reads, for every reference found, another's memory (a control), "off"
    reads the preface alone, and "text" reads references as text before the prompt (a baseline).
    ``logprobs`` asks for the log-probability of each token said and for so many of the likeliest
    tokens beside it. Raises ConfigError for values that mean nothing.
    """

    prompt: str
    max_tokens: int = 64
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    memory: Literal["on", "off", "shuffled", "text"] = "on"
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}: ask for at least one token")
        if self.memory not in MEMORY_MODES:
            raise ConfigError(f"memory is {self.memory!r}: one of {', '.join(MEMORY_MODES)}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_ALTERNATIVES:
            raise ConfigError(
                f"logprobs is {self.logprobs}: give a number from 0 to {MOST_ALTERNATIVES}"
            )
        if "" in self.stop:
            raise ConfigError("stop holds an empty string, which would end every answer at once")


class TokenLogprob(NamedTuple):
    """Natural log-probability of one token under the model (before temperature and limits).

    ``bytes`` is what it adds to the UTF-8 of the text, maybe a part of a character; the
    alternatives are (token, bytes, log-probability), the likeliest first.
    """

    token: int
    bytes: bytes
    logprob: float
    alternatives: tuple[tuple[int, bytes, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Event:
    """What is new about a request.

    ``text`` is the text that became certain since the last event, ``said`` the tokens since then
    and ``tokens`` how many there are so far, ``citations`` the references found for a chunk that
    begins. The last event has ``finish``, and ``error`` where that is "error".
    """

    text: str = ""
    said: tuple[int, ...] = ()
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    citations: tuple[Citation, ...] = ()
    finish: Finish | None = None
    error: JaxlabError | None = None
