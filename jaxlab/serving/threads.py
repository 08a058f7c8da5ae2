"""Threads for one kind of call, so that no other waits behind it."""

from collections.abc import Callable
from typing import Any

from anyio import CapacityLimiter, to_thread

from jaxlab.serving.errors import TOO_MANY, ApiError


class Threads:
    """Runs calls in ``count`` threads, while at most ``waiting`` more wait for one.

    ``inside`` is how many run and wait.
    """

    def __init__(self, count: int, waiting: int):
        self._limiter = CapacityLimiter(count)
        self._most, self.inside = count + waiting, 0

    async def run(self, call: Callable, *given: Any) -> Any:
        """What ``call`` gives. Raises ApiError when enough are waiting."""
        if self.inside >= self._most:
            raise ApiError(429, TOO_MANY)
        self.inside += 1
        try:
            return await to_thread.run_sync(call, *given, limiter=self._limiter)
        finally:
            self.inside -= 1
