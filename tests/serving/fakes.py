"""An engine that echoes its prompt by rule, a bank beside it, and a server around both."""

import collections
import contextlib
import dataclasses
import threading
import time
import types

import numpy as np
import uvicorn

from jaxlab.errors import BankError, DataError, RewrittenError
from jaxlab.inference.requests import Citation, Event, TokenLogprob
from jaxlab.memory.retrieve import Hits
from jaxlab.serving.app import create_app
from jaxlab.serving.run import listen
from jaxlab.serving.settings import Settings

SECONDS = 30.0
BODY = {"model": "echo", "prompt": "one two", "max_tokens": 3}
KEY = "a key of the tests"
TEXTS = ["The fox is red.", "The house stands in Oslo.", "<img src=x onerror=alert(1)>"]


@dataclasses.dataclass(frozen=True)
class Stored:
    text: str
    source: str
    tokens: int = 3


class FakeReader:
    """Finds references in their order; what is added comes behind them.

    ``broken`` is what is wrong with the bank; ``deleted`` are texts, and ``rewritten`` is whether
    rows were numbered anew, which it finds out when it looks again.
    """

    def __init__(self):
        self.stored = [Stored(text, f"source {n}") for n, text in enumerate(TEXTS)]
        self.bank = self
        self.broken, self.rewritten, self.deleted = None, False, set()

    def __len__(self):
        return len(self.stored)

    def refresh(self):
        if self.rewritten:
            raise RewrittenError("bank /srv/b was rewritten")
        self._work()
        self.stored = [one for one in self.stored if one.text not in self.deleted]

    def references(self, rows):
        return [self.stored[row] for row in rows]

    def sources(self):
        return collections.Counter(one.source for one in self.stored)

    def search(self, texts, k=None, *, sources=None):
        self._work()
        rows = [n for n, one in enumerate(self.stored) if sources is None or one.source in sources]
        rows = (rows[:k] + [-1] * k)[:k]
        scores = [1.0 / (1 + n) if row >= 0 else -np.inf for n, row in enumerate(rows)]
        return Hits(np.array([rows] * len(texts)), np.array([scores] * len(texts), np.float32))

    def add(self, documents):
        self._work()
        before = len(self.stored)
        self.stored += [Stored(one.text, one.id) for one in documents]
        return range(before, len(self.stored))

    def _work(self):
        if self.broken:
            raise BankError(self.broken)


class FakeTicket:
    def __init__(self, prompt_tokens):
        self.prompt_tokens = prompt_tokens
        self.cancelled = threading.Event()

    def cancel(self):
        self.cancelled.set()


class FakeEngine:
    """Says the words of the prompt again and again, one a token, in a thread for each request.

    ``gate`` closed holds every token back; ``broken`` is what every request then ends with.
    """

    def __init__(self, *, context=1000):
        self.model = types.SimpleNamespace(config=types.SimpleNamespace(name="echo"))
        self.reader, self.context, self.rows = FakeReader(), context, 2
        self.alive, self.failure, self.broken = True, None, None
        self.gate = threading.Event()
        self.gate.set()
        self.requests, self.tickets, self.running = [], [], 0
        self.submitted = threading.Condition()

    def encode(self, request):
        count = len(request.prompt.split())
        if count + request.max_tokens > self.context:
            raise DataError(f"the prompt has {count} tokens: shorten it")
        request.prompt.encode()
        return count

    def submit(self, request, on_event):
        self.encode(request)
        ticket = FakeTicket(len(request.prompt.split()))
        with self.submitted:
            self.requests.append(request)
            self.tickets.append(ticket)
            self.running += 1
            self.submitted.notify_all()
        threading.Thread(target=self._say, args=(request, ticket, on_event), daemon=True).start()
        return ticket

    def stats(self):
        return {
            "waiting": max(0, self.running - self.rows),
            "running": min(self.rows, self.running),
            "generated_tokens": 7,
            "cache_bytes": 12,
        }

    def close(self, *, drain_seconds=0.0):
        for ticket in self.tickets:
            ticket.cancel()
        with self.submitted:
            assert self.submitted.wait_for(lambda: not self.running, SECONDS)
        self.alive = False

    def wait_for(self, count):
        with self.submitted:
            assert self.submitted.wait_for(lambda: len(self.tickets) >= count, SECONDS)
        return self.tickets[count - 1]

    def _say(self, request, ticket, on_event):
        words, said, finish = request.prompt.split() or ["nothing"], 0, "length"
        if self.broken:
            finish = "error"
        elif request.memory != "off":
            on_event(Event(citations=tuple(self._cite(0))))
        while finish != "error" and said < request.max_tokens:
            while not self.gate.wait(0.01) and not ticket.cancelled.is_set():
                pass
            if ticket.cancelled.is_set():
                finish = "cancelled"
                break
            text = " " + words[said % len(words)]
            said += 1
            logprobs = ()
            if request.logprobs is not None:
                others = ((1, text.encode(), -0.5), (2, b"\xc3", -1.5))
                others = others[: request.logprobs]
                logprobs = (TokenLogprob(1, text.encode(), -0.5, others),)
            if text.strip() in request.stop:
                finish, text = "stop", ""
            last = finish == "stop" or said == request.max_tokens
            on_event(Event(text, (said,), said, logprobs, finish=finish if last else None))
            if last:
                break
        else:
            said = -1
        if finish in ("cancelled", "error"):
            on_event(Event(finish=finish, error=self.broken))
        with self.submitted:
            self.running -= 1
            self.submitted.notify_all()

    def _cite(self, chunk):
        for row, one in enumerate(self.reader.stored[:3]):
            yield Citation(chunk, row, 0.5, one.source, one.text)


@contextlib.contextmanager
def served(engine, **limits):
    """The address of a real server around ``engine``, and its application."""
    app = create_app(engine, Settings(**limits))
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        listener.close()


def said(response) -> dict:
    """The error of an answer."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "Traceback" not in response.text
    return error


def until(condition) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
