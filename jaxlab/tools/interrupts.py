"""What Ctrl-C does to a command that has no better idea of its own."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from jaxlab.errors import Interrupted

_IMPORTING = "<frozen importlib"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, but while a module is loaded it ends the process at once.

    An exception in the midst of an import is lost in a callback that ignores it, or becomes an
    ImportError of the module. The former handler comes back on leaving; nothing is changed outside
    the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGINT, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _handle(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTING):
            os.write(2, b"error: interrupted\n")
            os._exit(Interrupted.exit_code)
        frame = frame.f_back
    raise KeyboardInterrupt
