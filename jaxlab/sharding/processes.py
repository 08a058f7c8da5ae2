"""What the processes of a run do together: process 0 leads, and all agree before they go on.

Every function here is called by all processes in the same order, as the steps of training are.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlab.errors import ConfigError, JaxlabError, WorkerError

T = TypeVar("T")


def leads() -> bool:
    """Whether this process writes what a run has one of: its metrics, its reports, its corpus."""
    return jax.process_index() == 0


def reporter(report: Callable[[str], None]) -> Callable[[str], None]:
    """``report`` for process 0; the others keep silent."""
    return report if leads() else lambda _: None


def agree(problem: str | None) -> str | None:
    """Wait for all processes; the problem of this one, else that of the first other with one."""
    if jax.process_count() == 1:
        return problem
    with jax.transfer_guard("allow"):
        flags = multihost_utils.process_allgather(np.int32(problem is not None))
    if not flags.any():
        return None
    told = exchange(problem or "")
    first = int(np.flatnonzero(flags)[0])
    return problem or f"process {first}: {told[first]}"


def all_or_none(
    work: Callable[[], T], *, catch: type[Exception] = Exception, failure: type[Exception]
) -> T:
    """What ``work`` returns here, once it has returned in every process.

    ``work`` talks to no other process. Where it raises ``catch`` in one, all raise ``failure`` with
    the first line of that, so that none waits for what another will not do.
    """
    result, problem = None, None
    try:
        result = work()
    except catch as error:
        problem = error
    if reason := agree(problem and one_line(problem)):
        raise failure(reason) from problem
    return result


def same_everywhere(what: str, identity: Callable[[], Any]) -> None:
    """Raise WorkerError in every process unless ``identity``, as JSON, is the same in all."""
    if jax.process_count() == 1:
        return
    told = exchange(json.dumps(identity()))
    others = [str(number) for number, text in enumerate(told) if text != told[0]]
    if others:
        error = WorkerError(
            f"{what} of process {', '.join(others)} is not that of process 0: give all hosts the "
            "same files"
        )
        error.exit_code = 1  # it would be so again
        raise error


def refuse_several(what: str) -> None:
    """Raise ConfigError when ``what`` is run by several processes, which do not share it."""
    if jax.process_count() > 1:
        raise ConfigError(
            f"{what} runs in one process, and here are {jax.process_count()}: start it once"
        )


def one_line(error: BaseException) -> str:
    """First line of an error's message; both ends of a long one, as causes come last."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = text.partition(" [tensorstore_spec=")[0]
    return text if len(text) <= 200 else f"{text[:60]} … {text[-120:]}"


def leader_first(work: Callable[[], T]) -> T:
    """What ``work`` returns: process 0 does it, then the others, who find the files that it left.

    A JaxlabError of one is raised there, and word of it in the others.
    """
    first = _by(leads(), work)
    second = _by(not leads(), work)
    return first if leads() else second


def exchange(text: str) -> list[str]:
    """What every process says, in their order."""
    if jax.process_count() == 1:
        return [text]
    said = np.frombuffer(text.encode(), np.uint8)
    with jax.transfer_guard("allow"):
        lengths = multihost_utils.process_allgather(np.int32(len(said)))
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[: len(said)] = said
        rows = multihost_utils.process_allgather(padded)
    return [
        row[:length].tobytes().decode()
        for row, length in zip(np.asarray(rows), lengths, strict=True)
    ]


def raise_together(problem: JaxlabError | None) -> None:
    """Raise the problem of this process; where another one has one, word of it and its exit code.

    So all end alike, and who launched them hears of nothing else.
    """
    said = "" if problem is None else json.dumps([problem.exit_code, str(problem)])
    told = exchange(said)
    if problem is not None:
        raise problem
    for process, text in enumerate(told):
        if text:
            code, message = json.loads(text)
            error = WorkerError(f"process {process}: {message}")
            error.exit_code = code
            raise error


def _by(mine: bool, work: Callable[[], T]) -> T | None:
    result, problem = None, None
    try:
        result = work() if mine else None
    except JaxlabError as error:
        problem = error
    raise_together(problem)
    return result
