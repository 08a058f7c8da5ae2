"""Starting the processes of a run: each learns its place, and all wait until everyone is there.

A process finds its place in the environment:

======================  ==========================================================================
JAXLAB_COORDINATOR      host:port of process 0, with
JAXLAB_PROCESSES        how many there are, and
JAXLAB_PROCESS_ID       which one this is, from 0
JAXLAB_DISTRIBUTED      ``auto`` in place of those three: Cloud TPU, GKE or Slurm tell
JAXLAB_START_TIMEOUT    seconds to wait for all (300)
======================  ==========================================================================

JAX's own start ends the process without a word when one does not come. So there is a roll call
first, on the same address: process 0 counts, and everyone learns who is missing.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping

import jax

from jaxlab.errors import ConfigError, WorkerError

COORDINATOR, PROCESSES, PROCESS_ID = "JAXLAB_COORDINATOR", "JAXLAB_PROCESSES", "JAXLAB_PROCESS_ID"
DISTRIBUTED, START_TIMEOUT = "JAXLAB_DISTRIBUTED", "JAXLAB_START_TIMEOUT"
# How much longer the others wait for the answer of process 0, which waits for the last of them.
GRACE_SECONDS = 10.0
_LINE = 4096
# What the runtime says of errors that no other process has to do with: no memory, a bad program.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION")
_OWN_WORDS = ("compil", "mosaic", "lowering")
# The words of the collectives and of the coordination service, whatever error they come under.
_OTHERS_WORDS = ("gloo", "nccl", "heartbeat", "coordination", "agent must be", "connection", "peer")


@dataclasses.dataclass(frozen=True)
class Place:
    """One process of a run; ``timeout`` in seconds."""

    coordinator: str
    processes: int
    process: int
    timeout: int = 300


def start(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Join the other processes of this run; None when the environment names none.

    To be called before anything asks JAX for its devices. Raises ConfigError for an environment
    that cannot be, WorkerError naming the processes that did not come in time.
    """
    place = find_place(environment)
    if place is None:
        return None
    roll_call(place)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        # The place is known, and a detection would give a Slurm task one of its node's GPUs.
        cluster_detection_method="deactivate",
        initialization_timeout=place.timeout,
    )
    return place


@contextlib.contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Place | None]:
    """:func:`start`, and at the end the common end of all processes.

    Raises WorkerError for what the runtime says when another process is gone.
    """
    place = start(environment)
    if place is None:
        yield None
        return
    try:
        yield place
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as error:
        if place.processes == 1 or not others_fault(str(error)):
            raise
        text = str(error).strip().splitlines()[0][:300]
        raise WorkerError(
            f"process {place.process} of {place.processes}: another process or the connection to "
            f"it has failed ({text}); see the other logs, and start all again"
        ) from error


def others_fault(said: str) -> bool:
    """Whether an error of the runtime tells of another process, so that a new start may help."""
    words = said.lower()
    if any(word in words for word in _OTHERS_WORDS):
        return True
    return not (said.startswith(_OWN_FAULTS) or any(word in words for word in _OWN_WORDS))


def leave(run: Callable[[], int]) -> int:
    """The exit code of ``run``; where all did not come to a common end, the process ends at once.

    At exit JAX waits for the other processes, which may be waiting for this one.
    """
    try:
        code = run()
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def find_place(environment: Mapping[str, str]) -> Place | None:
    """The place that the environment gives, or None. Raises ConfigError."""
    timeout = _number(environment, START_TIMEOUT, default="300")
    if timeout < 1:
        raise ConfigError(f"{START_TIMEOUT} is {timeout}: give at least one second")
    named = [name for name in (COORDINATOR, PROCESSES, PROCESS_ID) if name in environment]
    how = environment.get(DISTRIBUTED)
    if how is not None and (how != "auto" or named):
        raise ConfigError(
            f"{DISTRIBUTED} is {how!r}{' beside ' * bool(named)}{', '.join(named)}: it is 'auto', "
            f"alone, or not set"
        )
    if how == "auto":
        return _detected(timeout)
    if not named:
        return None
    if len(named) < 3:
        lacking = {COORDINATOR, PROCESSES, PROCESS_ID} - set(named)
        raise ConfigError(f"{', '.join(sorted(lacking))} not set beside {', '.join(named)}")
    place = Place(
        environment[COORDINATOR],
        _number(environment, PROCESSES),
        _number(environment, PROCESS_ID),
        timeout,
    )
    _address(place)
    if not 0 <= place.process < place.processes:
        raise ConfigError(
            f"{PROCESS_ID} is {place.process} of {place.processes}: they count from 0"
        )
    return place


def _detected(timeout: int) -> Place:
    """What the cluster that runs this process says; it must be one that JAX knows."""
    # Not public: jax.distributed.initialize finds these and does not tell them.
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(
        coordinator_address=None,
        num_processes=None,
        process_id=None,
        local_device_ids=None,
        cluster_detection_method=None,
        initialization_timeout=timeout,
    )
    coordinator, processes, process = found[:3]
    if coordinator is None or processes is None or process is None:
        raise ConfigError(
            f"{DISTRIBUTED}: this is no Cloud TPU, GKE or Slurm job that can be recognised; set "
            f"{COORDINATOR}, {PROCESSES} and {PROCESS_ID} instead"
        )
    return Place(coordinator, processes, process, timeout)


def roll_call(place: Place) -> None:
    """Return when all processes are there. Raises WorkerError naming those that are not."""
    if place.processes == 1:
        return
    if place.process == 0:
        _count(place)
    else:
        _report(place)


def _count(place: Place) -> None:
    """Process 0: hear everyone, then tell all what became of it."""
    deadline = time.monotonic() + place.timeout
    host, port = _address(place)
    hosts: dict[int, str] = {0: socket.gethostname()}
    heard: list[socket.socket] = []
    try:
        listener = socket.create_server(("", port), backlog=place.processes)
    except OSError as error:
        raise WorkerError(
            f"process 0 cannot listen on port {port} of {host}: {error.strerror}; choose another "
            f"port in {COORDINATOR}"
        ) from None
    with contextlib.ExitStack() as opened, listener:
        problem = None
        while len(hosts) < place.processes and problem is None:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                problem = _missing(place, hosts)
                break
            heard.append(opened.enter_context(connection))
            problem = _hear(connection, place, hosts)
        answer = json.dumps({"problem": problem}).encode() + b"\n"
        for connection in heard:
            with contextlib.suppress(OSError):
                connection.sendall(answer)
    if problem is not None:
        raise WorkerError(problem)


def _hear(connection: socket.socket, place: Place, hosts: dict[int, str]) -> str | None:
    """Take down who called; the problem when two have one number or count differently."""
    connection.settimeout(GRACE_SECONDS)
    try:
        said = json.loads(_line(connection))
        process, processes, host = int(said["process"]), int(said["processes"]), str(said["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not one of ours, or it died; its number will be missing
    if processes != place.processes:
        return (
            f"process {process} on {host} counts {processes} processes, process 0 {place.processes}"
        )
    if process in hosts:
        return (
            f"process {process} came twice, from {hosts[process]} and {host}: each needs its own "
            f"{PROCESS_ID}"
        )
    hosts[process] = host
    return None


def _missing(place: Place, hosts: Mapping[int, str]) -> str:
    missing = ", ".join(str(n) for n in range(place.processes) if n not in hosts)
    here = ", ".join(f"{number} on {hosts[number]}" for number in sorted(hosts))
    return (
        f"of {place.processes} processes did not come within {place.timeout} s: {missing} (there "
        f"are {here}); see their logs, start them again, or wait longer with {START_TIMEOUT}"
    )


def _report(place: Place) -> None:
    """The others: tell process 0 who is here, and wait for its word."""
    said = {"process": place.process, "processes": place.processes, "host": socket.gethostname()}
    deadline = time.monotonic() + place.timeout
    while True:
        try:
            with socket.create_connection(_address(place), timeout=GRACE_SECONDS) as connection:
                connection.sendall(json.dumps(said).encode() + b"\n")
                connection.settimeout(max(deadline - time.monotonic(), 0) + GRACE_SECONDS)
                problem = json.loads(_line(connection))["problem"]
            break
        except (OSError, ValueError) as error:
            # Process 0 may not be up yet, or what answers there may be about to go.
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"process 0 at {place.coordinator} did not answer process {place.process} "
                    f"within {place.timeout} s ({error}): see its log, or start it again"
                ) from None
            time.sleep(min(0.2, place.timeout / 10))
    if problem is not None:
        raise WorkerError(problem)


def _line(connection: socket.socket) -> bytes:
    """One line, without its end. Raises OSError, and ValueError for one that does not end."""
    said = b""
    while not said.endswith(b"\n"):
        part = connection.recv(_LINE)
        if not part or len(said) > _LINE:
            raise ValueError("the connection ended")
        said += part
    return said


def _address(place: Place) -> tuple[str, int]:
    host, _, port = place.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"{COORDINATOR} is {place.coordinator!r}: it must be host:port")
    return host.strip("[]"), int(port)


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not text.isdigit():
        raise ConfigError(f"{name} is {text!r}: a whole number is needed")
    return int(text)
