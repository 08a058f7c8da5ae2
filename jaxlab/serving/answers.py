"""Answers in the forms of the OpenAI protocol, whole or in pieces as they come."""

import codecs
import dataclasses
import json
import time
import uuid
from typing import Any

from jaxlab.inference.requests import Event, TokenLogprob

# A token, and where its text begins in that of the answer.
_Placed = tuple[int, TokenLogprob]


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
        self._tokens, self._beside = 0, _Beside()
        self._frame = {
            "id": f"{form.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._events: list[Event] = []
        # With each event, the tokens whose text it begins to show.
        self._said: list[list[_Placed]] = []

    def add(self, event: Event) -> None:
        """Take note of what came."""
        self._events.append(event)
        self._said.append(self._beside.add(event))
        self._tokens = event.tokens

    def whole(self) -> dict[str, Any]:
        """All of it, once it has ended."""
        text = "".join(event.text for event in self._events)
        citations = [one for event in self._events for one in event.citations]
        content = {"message": {"role": "assistant", "content": text}} if self._form.chat else {}
        choice = {
            "index": 0,
            **(content or {"text": text}),
            "logprobs": self._logprobs([one for some in self._said for one in some]),
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

    def piece(self) -> str:
        """What a stream says of the event that came last."""
        event = self._events[-1]
        content = {"delta": {"content": event.text} if event.text else {}}
        choice: dict[str, Any] = {
            "index": 0,
            **(content if self._form.chat else {"text": event.text}),
            "logprobs": self._logprobs(self._said[-1]),
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

    def _logprobs(self, said: list[_Placed]) -> dict[str, Any] | None:
        if not said:
            return None
        return _of_chat(said) if self._form.chat else _of_completion(said)


class _Beside:
    """Holds a token back until some of its text is shown: a stop string may cut it off."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._said = self._shown = 0  # characters
        self._held: list[_Placed] = []

    def add(self, event: Event) -> list[_Placed]:
        """The tokens whose text begins to be shown with ``event``."""
        for one in event.logprobs:
            self._held.append((self._said, one))
            self._said += len(self._decoder.decode(one.bytes))
        self._shown += len(event.text)
        count = sum(place < self._shown for place, _ in self._held)
        if event.finish and self._shown >= self._said:  # nothing was cut off: also what has no text
            count = len(self._held)
        shown, self._held = self._held[:count], self._held[count:]
        return shown


def _of_completion(said: list[_Placed]) -> dict[str, Any]:
    return {
        "tokens": [_named(one.bytes) for _, one in said],
        "token_logprobs": [one.logprob for _, one in said],
        "top_logprobs": [{_named(said): p for _, said, p in one.alternatives} for _, one in said],
        "text_offset": [place for place, _ in said],
    }


def _of_chat(said: list[_Placed]) -> dict[str, Any]:
    def entry(said: bytes, value: float) -> dict[str, Any]:
        return {"token": _named(said), "logprob": value, "bytes": list(said)}

    return {
        "content": [
            {
                **entry(one.bytes, one.logprob),
                "top_logprobs": [entry(said, value) for _, said, value in one.alternatives],
            }
            for _, one in said
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
