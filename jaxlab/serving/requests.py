"""A request on its way through the engine, as a stream of events that ends when its client goes."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest

from jaxlab.errors import ClosedError
from jaxlab.inference.requests import Event, Request
from jaxlab.serving.errors import TOO_MANY, ApiError
from jaxlab.serving.metrics import Metrics
from jaxlab.serving.settings import Settings
from jaxlab.serving.threads import Threads


class ClientGone(Exception):
    """Whoever asked has closed the connection."""


class Runner:
    """Hands requests to the engine, within the limits."""

    def __init__(self, engine: Any, settings: Settings, metrics: Metrics):
        self._engine, self._settings, self._metrics = engine, settings, metrics
        # Where requests are that were let in and that the engine does not have yet.
        self._submitting = Threads(engine.rows, settings.max_waiting)

    @property
    def under_way(self) -> int:
        """Requests that were let in and have not ended."""
        stats = self._engine.stats()
        return self._submitting.inside + stats["waiting"] + stats["running"]

    async def start(self, request: Request) -> "Running":
        """Submit a request. Raises ApiError when the engine has enough, or is gone."""
        if not self._engine.alive:
            raise ApiError(503, "the engine has stopped; the server has to be started again")
        if self.under_way >= self._engine.rows + self._settings.max_waiting:
            raise ApiError(429, TOO_MANY)
        running = Running(self._settings.request_seconds, self._metrics)
        await self._submitting.run(self._submit, request, running)
        return running

    def _submit(self, request: Request, running: "Running") -> None:
        try:
            running.ticket = self._engine.submit(request, running.take)
        except ClosedError as error:
            raise ApiError(503, str(error)) from None


class Running:
    """One request that was submitted; made in the thread of the event loop."""

    def __init__(self, seconds: float, metrics: Metrics):
        self._metrics = metrics
        self.ticket: Any = None
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._begin = self._last = time.perf_counter()
        self._seconds, self._deadline = seconds, self._loop.time() + seconds
        self._late = self._loop.create_future()

    def take(self, event: Event) -> None:
        """Called by the engine's thread."""
        # A loop that is closed has nobody left who waits.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def events(self, http: HttpRequest | None = None) -> AsyncIterator[Event]:
        """The events to the last; whoever stops listening cancels the request.

        With ``http`` ClientGone is raised when its client goes. Raises ApiError when it takes
        longer than allowed, and what kept the engine from ending it.
        """
        gone = [] if http is None else [asyncio.ensure_future(http.receive())]
        # Frees the row in time, even while a client that reads slowly is waited for.
        timer = self._loop.call_at(self._deadline, self._end_late)
        try:
            finish = None
            while not finish:
                event = await self._next(gone)
                self._note(event)
                finish = event.finish
                if event.error is not None:
                    raise event.error
                if finish == "cancelled":
                    raise ApiError(503, "the request was cancelled: the server is going down")
                yield event
        finally:
            timer.cancel()
            self.ticket.cancel()
            for one in gone:
                one.cancel()

    def _end_late(self) -> None:
        self._late.set_result(None)
        self.ticket.cancel()

    async def _next(self, gone: list[asyncio.Future]) -> Event:
        coming = asyncio.ensure_future(self._queue.get())
        try:
            await asyncio.wait([coming, self._late, *gone], return_when=asyncio.FIRST_COMPLETED)
            if self._late.done():
                raise ApiError(504, f"no whole answer within {self._seconds:g} seconds")
            if not coming.done():
                raise ClientGone
            return coming.result()
        finally:
            coming.cancel()

    def _note(self, event: Event) -> None:
        if not event.said:
            return
        now = time.perf_counter()
        if event.tokens == len(event.said):
            self._metrics.first_token.observe(now - self._begin)
        else:
            self._metrics.between_tokens.observe(now - self._last)
        self._last = now
