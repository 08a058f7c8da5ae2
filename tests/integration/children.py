"""Command lines in processes of their own that die, or are interrupted, at a chosen moment.

Importing JAX and its company takes longer than a tiny run. So one server process imports everything
once, and forks a process for each command line before any backend or thread is started.
"""

import atexit
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
_TIMEOUT = 300


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (a signal's number negated) and what it printed."""

    code: int
    out: str
    err: str


def run_child(folder: Path, *argv: str | Path, before: Sequence[Sequence[Any]] = ()) -> Ended:
    """``jaxlab ARGV`` in a process of its own; ``before`` names functions of this module to call.

    ``folder`` receives what is printed, and ``folder.parent`` the cache of compiled programs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.out")))
    files = [folder / f"{number}.{kind}" for kind in ("out", "err")]
    request = {
        "argv": [str(word) for word in argv],
        "before": [list(call) for call in before],
        "files": [str(file) for file in files],
    }
    server = _server()
    server.stdin.write(f"{json.dumps(request)}\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the server of child processes has ended"
    return Ended(int(answer), *(file.read_text() for file in files))


def share_compiled(folder: Path) -> None:
    """Where the children keep compiled programs; to be called before the first one runs."""
    os.environ["JAXLAB_TEST_COMPILED"] = str(folder)


@functools.cache
def _server() -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": os.environ["JAXLAB_TEST_COMPILED"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # No pools of threads before the fork.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.children"],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def end():
        server.stdin.close()
        server.stdout.close()
        server.wait(_TIMEOUT)

    atexit.register(end)
    return server


# What follows runs in the children.


def die_at(event: str, path: str, count: int = 1) -> None:
    """SIGKILL before the ``count``-th operation (an audit event) on a path that ``path`` matches.

    ``event`` is a regular expression, such as ``open`` or ``os.rename``, whose new name counts.
    """
    seen = 0

    def hook(name: str, arguments: tuple) -> None:
        nonlocal seen
        if not arguments or not re.fullmatch(event, name):
            return
        place = arguments[1] if name == "os.rename" else arguments[0]
        if isinstance(place, str | os.PathLike) and re.search(path, os.fspath(place)):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_after_save(count: int) -> None:
    """SIGKILL when the ``count``-th save has returned."""
    _after_save(count, lambda: os.kill(os.getpid(), signal.SIGKILL))


def interrupt_after_save(count: int) -> None:
    """SIGINT when the ``count``-th save has returned."""
    _after_save(count, lambda: os.kill(os.getpid(), signal.SIGINT))


def fill_disk_after_save(count: int, free: int) -> None:
    """The disk says that ``free`` bytes are left once the ``count``-th save has returned."""
    usage = shutil.disk_usage

    def nearly_full(path):
        return usage(path)._replace(free=free)

    _after_save(count, lambda: setattr(shutil, "disk_usage", nearly_full))


def deny_after_save(count: int) -> None:
    """Nothing may be made below ``checkpoints`` once the ``count``-th save has returned."""
    make = Path.mkdir

    def denied(self, *arguments, **options):
        if "checkpoints" in self.parent.parts:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        make(self, *arguments, **options)

    _after_save(count, lambda: setattr(Path, "mkdir", denied))


def terminate_after_save(count: int) -> None:
    """SIGTERM when the ``count``-th save has returned."""
    _after_save(count, lambda: os.kill(os.getpid(), signal.SIGTERM))


def log_compiles() -> None:
    """JAX says what it compiles."""
    import jax

    jax.config.update("jax_log_compiles", True)


def hang_at_step(step: int) -> None:
    """The ``step``-th step of a stage never returns."""

    def hanging(function, call, state, batch):
        if call == step:
            threading.Event().wait()
        return function(state, batch)

    _in_place_of_steps(hanging)


def spoil_losses(*steps: int) -> None:
    """The losses of these steps of a stage, counted from 1, are NaN; their gradients are not."""
    import jax
    import numpy as np

    from jaxlab.training import step as training_step

    gradients = training_step._gradients

    def spoilt_gradients(params, graphdef, form, batch, accumulation):
        loss, found = gradients(params, graphdef, form, batch, accumulation)
        return loss * batch["factor"][0], found

    def spoilt(function, call, state, batch):
        factor = np.full(len(batch["tokens"]), np.nan if call in steps else 1.0, np.float32)
        return function(state, {**batch, "factor": jax.device_put(factor)})

    training_step._gradients = spoilt_gradients
    _in_place_of_steps(spoilt)


def _in_place_of_steps(act: Callable[..., Any]) -> None:
    """``act(step, call, state, batch)`` for the ``call``-th step of a stage, from 1."""
    from jaxlab.training import program

    compile_step = program.compile_train_step

    def compiled(**parts):
        function, calls = compile_step(**parts), itertools.count(1)
        return lambda state, batch: act(function, next(calls), state, batch)

    program.compile_train_step = compiled


def _after_save(count: int, act: Callable[[], None]) -> None:
    from jaxlab.training.checkpoint import Checkpoints

    save, saved = Checkpoints.save, []

    def saving(self, *arguments, **options):
        save(self, *arguments, **options)
        saved.append(True)
        if len(saved) == count:
            act()

    Checkpoints.save = saving


def interrupt_before_training() -> None:
    """SIGINT once the loop listens for it and before its first step."""
    from jaxlab.training import loop

    make = loop.training_iterator

    def making(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return make(*arguments, **options)

    loop.training_iterator = making


def log_batches(file: str) -> None:
    """Append a digest of every batch, and the names of its arrays, to ``file``."""
    from jaxlab.training import loop

    make = loop.training_iterator

    class Logging:
        def __init__(self, *arguments, **options):
            self._inner = make(*arguments, **options)
            self.get_state, self.set_state = self._inner.get_state, self._inner.set_state

        def __next__(self):
            batch = next(self._inner)
            digest = hashlib.sha256()
            for name in sorted(batch):
                digest.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode())
                digest.update(batch[name].tobytes())
            with open(file, "a") as log:
                log.write(f"{' '.join(sorted(batch))} {digest.hexdigest()}\n")
            return batch

    loop.training_iterator = Logging


def poison(step: int) -> None:
    """Make every parameter NaN before the ``step``-th step of a stage."""
    import jax

    def poisoned(function, call, state, batch):
        if call == step:
            nothing = jax.tree.map(lambda x: (x - x) / (x - x), state.params)
            state = state.replace(params=nothing)
        return function(state, batch)

    _in_place_of_steps(poisoned)


def die_after_append(count: int) -> None:
    """SIGKILL when the ``count``-th shard has been appended to a bank."""
    from jaxlab.memory.store import Bank

    add, added = Bank.add, []

    def adding(self, shards):
        add(self, shards)
        added.append(True)
        if len(added) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    Bank.add = adding


def die_at_object(count: int) -> None:
    """SIGKILL before the ``count``-th object of a bank is written."""
    from jaxlab.memory import writing

    write, written = writing.write_object, []

    def dying(*arguments, **options):
        written.append(True)
        if len(written) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments, **options)

    writing.write_object = dying


def small_shards(references: int) -> None:
    """Shards of a few references, so that a tiny bank has several."""
    from jaxlab.memory.pipeline import write_bank

    write_bank.__kwdefaults__["shard_references"] = references


def limit_files(size: int) -> None:
    """No file may grow beyond ``size`` bytes: what a full disk does to whoever writes."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _serve() -> None:
    _preload()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _child(request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _preload() -> None:
    # Not scikit-learn: some of its company starts a thread.
    import faiss  # noqa: F401
    import grain  # noqa: F401
    import sentencepiece  # noqa: F401
    import tensorboardX  # noqa: F401

    import jaxlab.inference.engine
    import jaxlab.memory.pipeline
    import jaxlab.training.loop  # noqa: F401


def _child(request: dict[str, Any]) -> None:
    code = 70
    try:
        signal.alarm(_TIMEOUT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(request["files"], start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout.reconfigure(line_buffering=True)
        from jaxlab.cli import main

        for name, *arguments in request["before"]:
            globals()[name](*arguments)
        code = main(request["argv"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
