"""Answers in the forms of the OpenAI protocol, whole or in pieces as they come."""

import codecs
import dataclasses
import json
import time
import uuid
from typing import Any

from jaxlab.inference.requests import Event, TokenLogprob


@dataclasses.dataclass(frozen=True)
class Form:
    """How one endpoint says things: its names, and where a text goes."""

    prefix: str
    whole: str
    piece: str
    chat: bool


COMPLETION = Form("cmpl", "text_completion", "text_completion", chat=False)
CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", chat=True)


class Answer:
    """One answer, put together from the events of its request."""

    def __init__(self, form: Form, model: str, prompt_tokens: int):
        self._form, self._prompt_tokens = form, prompt_tokens
        self._tokens, self._places = 0, _Places()
        self._frame = {
            "id": f"{form.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._events: list[Event] = []

    def add(self, event: Event) -> None:
        """Take note of what came."""
        self._events.append(event)
        self._tokens = event.tokens

    def whole(self) -> dict[str, Any]:
        """All of it, once it has ended."""
        text = "".join(event.text for event in self._events)
        logprobs = [one for event in self._events for one in event.logprobs]
        if self._events[-1].finish == "stop":
            logprobs = _within(text, logprobs)
        citations = [one for event in self._events for one in event.citations]
        content = {"message": {"role": "assistant", "content": text}} if self._form.chat else {}
        choice = {
            "index": 0,
            **(content or {"text": text}),
            "logprobs": self._logprobs(logprobs),
            "finish_reason": self._events[-1].finish,
            "citations": [dataclasses.asdict(one) for one in citations],
        }
        return self._body(self._form.whole, [choice], usage=self._usage())

    def first(self) -> str | None:
        """What a stream begins with."""
        if not self._form.chat:
            return None
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return _sent(self._body(self._form.piece, [choice]))

    def piece(self, event: Event) -> str:
        """What a stream says of one event."""
        content = {"delta": {"content": event.text} if event.text else {}}
        choice: dict[str, Any] = {
            "index": 0,
            **(content if self._form.chat else {"text": event.text}),
            "logprobs": self._logprobs(event.logprobs),
            "finish_reason": event.finish,
        }
        if event.citations:
            choice["citations"] = [dataclasses.asdict(one) for one in event.citations]
        return _sent(self._body(self._form.piece, [choice]))

    def last(self, *, usage: bool) -> str:
        """What a stream ends with."""
        body = self._body(self._form.piece, [], usage=self._usage())
        return (_sent(body) if usage else "") + "data: [DONE]\n\n"

    def _body(self, kind: str, choices: list, **more: Any) -> dict[str, Any]:
        return {**self._frame, "object": kind, "choices": choices, **more}

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
        }

    def _logprobs(self, said: Any) -> dict[str, Any] | None:
        if not said:
            return None
        return _of_chat(said) if self._form.chat else self._of_completion(said)

    def _of_completion(self, said: list[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [_named(one.bytes) for one in said],
            "token_logprobs": [one.logprob for one in said],
            "top_logprobs": [{_named(said): p for _, said, p in one.alternatives} for one in said],
            "text_offset": [self._places.next(one) for one in said],
        }


class _Places:
    """Where tokens begin in the text that they make up, asked for one after the other."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._place = 0

    def next(self, said: TokenLogprob) -> int:
        begin, self._place = self._place, self._place + len(self._decoder.decode(said.bytes))
        return begin


def _within(text: str, said: list[TokenLogprob]) -> list[TokenLogprob]:
    """Those that the text has a part of: not what a stop string cut off."""
    places = _Places()
    return [one for one in said if places.next(one) < len(text)]


def _of_chat(said: list[TokenLogprob]) -> dict[str, Any]:
    def entry(said: bytes, value: float) -> dict[str, Any]:
        return {"token": _named(said), "logprob": value, "bytes": list(said)}

    return {
        "content": [
            {
                **entry(one.bytes, one.logprob),
                "top_logprobs": [entry(said, value) for _, said, value in one.alternatives],
            }
            for one in said
        ],
        "refusal": None,
    }


def _named(said: bytes) -> str:
    """A token's text, or what OpenAI writes for one that is a part of a character."""
    try:
        return said.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in said)


def _sent(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def error_piece(body: dict[str, Any]) -> str:
    """What a stream says when it cannot go on."""
    return _sent(body) + "data: [DONE]\n\n"
