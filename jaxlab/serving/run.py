"""Running the application, and ending it without cutting off an answer."""

import asyncio
import contextlib
import socket
import time
from typing import Any

import uvicorn
from fastapi import FastAPI

from jaxlab.errors import ConfigError

_LOOK_EVERY = 0.05


class _Uvicorn(uvicorn.Server):
    """Ends when what is under way has been answered, or when there is no more time for it.

    What is cut off is told so: the engine ends before the connections do.

    The first signal closes the door: requests that come are told so (503), and so is whoever asks
    after the health of the server. The second ends it at once.
    """

    def handle_exit(self, sig: int, frame: Any) -> None:
        server = self.config.app.state.server
        if server.draining:
            self.should_exit = self.force_exit = True
        server.draining = True

    async def on_tick(self, counter: int) -> bool:
        server = self.config.app.state.server
        if server.draining and not self.should_exit:
            deadline = time.monotonic() + server.settings.drain_seconds
            while time.monotonic() < deadline and not self.force_exit and self._busy(server):
                await asyncio.sleep(_LOOK_EVERY)
            await asyncio.to_thread(server.engine.close)
            self.should_exit = True
        return await super().on_tick(counter)

    def _busy(self, server: Any) -> bool:
        return bool(server.engine.alive and server.runner.under_way)


def run_app(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; closes the engine, and returns when all is answered."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # requests are counted; their texts are nobody's business
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    with contextlib.suppress(KeyboardInterrupt):
        _Uvicorn(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve at; raises ConfigError when the place is taken or is none."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen at {host}:{port} ({reason}): give another --port"
        ) from None
