"""Bodies of requests, checked: the OpenAI fields that mean something here, and this server's own.

A field that would change the answer and cannot be honoured is refused, unless it has the value that
changes nothing, and so is one that nobody knows; the OpenAI fields that change nothing (``user``,
``metadata`` …) may hold anything.
"""

import reprlib
import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from jaxlab.inference.requests import MOST_ALTERNATIVES, Request
from jaxlab.inference.sampling import Sampling
from jaxlab.serving.errors import UNSUPPORTED

_MOST_TOKENS = 1 << 20


def _is_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no text") from None
    return text


def _is_one_text(given: Any) -> Any:
    texts = given if isinstance(given, list) else [given]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise ValueError("a prompt is text, one in each request; ids of tokens are not taken")
    return given


Text = Annotated[str, AfterValidator(_is_unicode)]
# Every token said is compared with each beginning of it.
StopText = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_is_unicode)]


def _describe(schema: dict[str, Any], body: type["_Body"]) -> None:
    neutral = {name: {"enum": [None, *values]} for name, values in body.neutral.items()}
    schema["properties"] |= neutral | {name: {} for name in sorted(body.ignored)}
    schema["additionalProperties"] = False


def _describe_chat(schema: dict[str, Any], body: type["_Body"]) -> None:
    _describe(schema, body)
    schema["anyOf"] = [
        {"properties": {"top_logprobs": {"enum": [None, 0]}}},
        {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
    ]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, json_schema_extra=_describe)
    # Fields that change nothing.
    ignored: ClassVar[frozenset[str]] = frozenset()
    # Fields that are refused, and the values besides null with which they change nothing.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="after")
    def _honoured(self):
        for name, value in (self.model_extra or {}).items():
            if name in self.ignored:
                continue
            if name not in self.neutral:
                raise ValueError(f"{reprlib.repr(name)} is not a field that this server knows")
            if value is not None and value not in self.neutral[name]:
                said = "is not supported by this server"
                raise PydanticCustomError(UNSUPPORTED, said, {"field": name})
        return self


class StreamOptions(_Body):
    """How a stream is sent."""

    ignored = frozenset({"include_obfuscation"})
    include_usage: bool = False


class _Generation(_Body):
    ignored = frozenset(
        {
            "metadata",
            "parallel_tool_calls",
            "prediction",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        }
    )
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "moderation": (),
        "web_search_options": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        # Of other servers.
        "repetition_penalty": (1,),
        "min_p": (0,),
        "min_tokens": (0,),
        "ignore_eos": (False,),
        "stop_token_ids": ([],),
    }
    model: Text
    max_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=_MOST_TOKENS)
    # All of 64 bits. The description of the API writes bounds as floats, rounded if not round.
    seed: int | None = Field(None, ge=-(10**19), le=10**19)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    memory: Literal["on", "off", "shuffled", "text"] = "on"

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def _request(self, prompt: str, max_tokens: int, logprobs: int | None, *stop: str) -> Request:
        def or_default(value, default):
            return default if value is None else value

        return Request(
            prompt,
            max_tokens=max_tokens,
            sampling=Sampling(
                temperature=float(or_default(self.temperature, 1.0)),
                top_k=or_default(self.top_k, 0),
                top_p=float(or_default(self.top_p, 1.0)),
                # Who asks without a seed wants an answer of its own each time.
                seed=secrets.randbits(32) if self.seed is None else self.seed,
            ),
            stop=(*stop, *self.stops),
            memory=self.memory,
            logprobs=logprobs,
        )


class CompletionBody(_Generation):
    """A text to continue."""

    prompt: Annotated[
        Text | Annotated[list[Text], Field(min_length=1, max_length=1)],
        BeforeValidator(_is_one_text),
    ]
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    def request(self) -> Request:
        """What the engine is asked."""
        prompt = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return self._request(prompt, self.max_tokens or 16, self.logprobs)


class Part(_Body):
    """A part of a message; others than text are not understood."""

    ignored = frozenset({"prompt_cache_breakpoint"})
    type: Literal["text"]
    text: Text


class Message(_Body):
    """What somebody said."""

    ignored = frozenset({"name", "refusal", "annotations"})
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tool_calls": ([],),
        "function_call": (),
        "audio": (),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(_Generation):
    """A conversation to continue.

    The models are base models, without a template of their own: what a user says becomes
    "Question: …", what the assistant says "Answer: …", a line each, and what the system says stands
    before them. The answer ends where the model begins another question.
    """

    model_config = ConfigDict(json_schema_extra=_describe_chat)
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    @model_validator(mode="after")
    def _asks_for_all_of_it(self):
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError(
                UNSUPPORTED, "needs logprobs: true", {"field": "top_logprobs"}
            )
        return self

    @property
    def prompt(self) -> str:
        """The conversation as one text."""
        heads = {"user": "Question: ", "assistant": "Answer: "}
        lines = [heads.get(each.role, "") + each.text for each in self.messages]
        return "\n".join([*lines, "Answer:"])

    def request(self) -> Request:
        """What the engine is asked."""
        count = self.max_completion_tokens or self.max_tokens or 64
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._request(self.prompt, count, logprobs, "\nQuestion:")


class SearchBody(_Body):
    """What to look for in the bank."""

    query: Text
    top: int = Field(5, ge=1, le=100)
    sources: list[Text] | None = Field(None, min_length=1, max_length=100)


class Reference(_Body):
    """A text to add to the bank, under the name of its source."""

    text: Text = Field(min_length=1)
    source: Text = Field(min_length=1, max_length=1000)


class AddBody(_Body):
    """Texts to add to the bank."""

    references: list[Reference] = Field(min_length=1, max_length=1000)
