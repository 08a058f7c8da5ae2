"""A request on its way through the engine, as a stream of events that ends when its client goes."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool

from jaxlab.errors import DataError
from jaxlab.inference.requests import Event, Request
from jaxlab.serving.errors import ApiError
from jaxlab.serving.metrics import Metrics
from jaxlab.serving.settings import Settings


class ClientGone(Exception):
    """Whoever asked has closed the connection."""


class Runner:
    """Hands requests to the engine, within the limits."""

    def __init__(self, engine: Any, settings: Settings, metrics: Metrics):
        self._engine, self._settings, self._metrics = engine, settings, metrics
        # Requests that were let in and that the engine does not have yet.
        self._coming = 0

    @property
    def under_way(self) -> int:
        """Requests that were let in and have not ended."""
        stats = self._engine.stats()
        return self._coming + stats["waiting"] + stats["running"]

    async def start(self, request: Request) -> "Running":
        """Submit a request. Raises ApiError when the engine has enough, or is gone."""
        if not self._engine.alive:
            raise ApiError(503, "the engine has stopped; the server has to be started again")
        if self.under_way >= self._engine.rows + self._settings.max_waiting:
            raise ApiError(429, "too many requests are waiting: try again later")
        running = Running(self._settings.request_seconds, self._metrics)
        self._coming += 1
        try:
            await run_in_threadpool(self._submit, request, running)
        finally:
            self._coming -= 1
        return running

    def _submit(self, request: Request, running: "Running") -> None:
        running.prompt_tokens = self._engine.check(request)
        try:
            running.ticket = self._engine.submit(request, running.take)
        except DataError as error:  # it fits, so the engine is closing
            raise ApiError(503, str(error)) from None


class Running:
    """One request that was submitted; made in the thread of the event loop."""

    def __init__(self, seconds: float, metrics: Metrics):
        self._metrics = metrics
        self.prompt_tokens = 0
        self.ticket: Any = None
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._begin = self._last = time.perf_counter()
        self._deadline = self._loop.time() + seconds
        self._seconds = seconds

    def take(self, event: Event) -> None:
        """Called by the engine's thread."""
        # A loop that is closed has nobody left who waits.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def events(self, http: HttpRequest | None = None) -> AsyncIterator[Event]:
        """The events to the last; whoever stops listening cancels the request.

        With ``http`` ClientGone is raised when its client goes. Raises ApiError when it takes
        longer than allowed, and when the engine could not do it.
        """
        gone = None if http is None else asyncio.ensure_future(http.receive())
        try:
            async with asyncio.timeout_at(self._deadline):
                while True:
                    event = await self._next(gone)
                    self._note(event)
                    if event.finish == "error":
                        raise ApiError(500, event.error or "the engine failed")
                    if event.finish == "cancelled":
                        raise ApiError(503, "the request was cancelled: the server is going down")
                    yield event
                    if event.finish:
                        return
        except TimeoutError:
            raise ApiError(504, f"no whole answer within {self._seconds:g} seconds") from None
        finally:
            self.ticket.cancel()
            if gone is not None:
                gone.cancel()

    async def _next(self, gone: asyncio.Future | None) -> Event:
        coming = asyncio.ensure_future(self._queue.get())
        await asyncio.wait(
            [coming] if gone is None else [coming, gone], return_when=asyncio.FIRST_COMPLETED
        )
        if not coming.done():
            coming.cancel()
            raise ClientGone
        return coming.result()

    def _note(self, event: Event) -> None:
        if not event.said:
            return
        now = time.perf_counter()
        if event.tokens == len(event.said):
            self._metrics.first_token.observe(now - self._begin)
        else:
            self._metrics.between_tokens.observe(now - self._last)
        self._last = now
