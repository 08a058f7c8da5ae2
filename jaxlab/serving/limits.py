"""What stands before the application: its name, the length of a body, the count of requests."""

import re
from collections.abc import Callable
from typing import Any

from prometheus_client import Counter
from starlette.routing import Match

from jaxlab.serving.errors import ApiError


class CheckHost:
    """Refuses who asks for another host than these; None: nobody."""

    def __init__(self, app: Callable, *, hosts: frozenset[str] | None):
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """An ASGI call."""
        if scope["type"] == "http" and self._hosts is not None:
            asked = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            if re.sub(r":\d*$", "", asked) not in self._hosts:
                error = ApiError(
                    421,
                    "this server answers as localhost alone: let a proxy set the Host, or listen "
                    "at an address with --host",
                )
                return await error.response()(scope, receive, send)
        return await self._app(scope, receive, send)


class LimitBody:
    """Refuses a body as soon as it is too long, whatever its headers say; and one that is no JSON.

    The body is read whole before the application sees the request.
    """

    def __init__(self, app: Callable, *, limit: int):
        self._app, self._limit = app, limit

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """An ASGI call."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            error = ApiError(415, "the body has to be JSON: Content-Type: application/json")
            return await error.response()(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit:
                error = ApiError(413, f"the body is longer than {self._limit:,} bytes")
                return await error.response()(scope, receive, send)
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> dict[str, Any]:
            return next(given, None) or await receive()

        return await self._app(scope, again, send)


class CountRequests:
    """Counts answers by endpoint and status; what matches no route is one endpoint, "other"."""

    def __init__(self, app: Callable, *, counter: Counter, routes: Callable[[], list]):
        self._app, self._counter, self._routes = app, counter, routes

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """An ASGI call."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def counted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._counter.labels(self._endpoint(scope), str(message["status"])).inc()
            await send(message)

        return await self._app(scope, receive, counted)

    def _endpoint(self, scope: dict[str, Any]) -> str:
        for route in self._routes():
            if route.matches(scope)[0] is not Match.NONE:
                return route.path
        return "other"
