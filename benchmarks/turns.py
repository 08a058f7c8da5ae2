"""Contestants as processes that work only when it is their turn."""

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any


def _work(pipe, make: Callable[..., Callable[[Any], Any]], arguments: tuple) -> None:
    try:
        work = make(*arguments)
        pipe.send(("ready", None))
        while (order := pipe.recv()) is not None:
            pipe.send(("done", work(order)))
    except EOFError:  # the parent is gone
        pass
    except Exception:
        pipe.send(("failed", traceback.format_exc()))


class Contestant:
    """The parent's end of a process in which ``make(*arguments)`` gives the function that works."""

    def __init__(self, name: str, make: Callable[..., Callable[[Any], Any]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.name, (self._pipe, end) = name, context.Pipe()
        self._process = context.Process(target=_work, args=(end, make, arguments), daemon=True)
        self._process.start()
        end.close()
        self._receive()

    def turn(self, order: Any) -> Any:
        """Let it work, and wait for what comes of it. Raises RuntimeError with its traceback."""
        self._pipe.send(order)
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=30)
        self._process.kill()

    def _receive(self) -> Any:
        try:
            state, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}: the process ended") from None
        if state == "failed":
            raise RuntimeError(f"{self.name}:\n{answer}")
        return answer
