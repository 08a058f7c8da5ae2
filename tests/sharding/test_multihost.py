"""The processes of a run find their places, wait for each other and name who is missing."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxlab.errors import ConfigError, WorkerError
from jaxlab.sharding.multihost import Place, find_place, others_fault, roll_call
from tests.sharding.two_processes import end_two, free_address, run_two, start_two

GIVEN = {
    "JAXLAB_COORDINATOR": "pod-0:8476",
    "JAXLAB_PROCESSES": "4",
    "JAXLAB_PROCESS_ID": "3",
}
# Starts, puts its rows of a batch on a mesh that deals devices to processes in turn, and sums all.
BATCH = """
from jaxlab.sharding.multihost import start
place = start()
import jax
import numpy as np
from jaxlab.config import MeshConfig
from jaxlab.sharding.batches import BatchPlace
from jaxlab.sharding.mesh import make_mesh
first, second = jax.local_devices(process_index=0), jax.local_devices(process_index=1)
in_turn = [first[0], second[0], first[1], second[1]]
spread = BatchPlace(make_mesh(MeshConfig(data=2, fsdp=2), in_turn), 8)
whole = np.arange(16, dtype=np.int32).reshape(8, 2) ** 2
with jax.transfer_guard("disallow"):
    batch = spread({"tokens": whole[list(spread.rows)]})
weighted = jax.jit(lambda x: (x * np.arange(1, 17).reshape(8, 2)).sum())(batch["tokens"])
print(place.process, jax.device_count(), *spread.rows, int(weighted))
"""


def outcomes(*places: Place) -> list[str | None]:
    """What each process that came says: None, or its error."""

    def one(place: Place) -> str | None:
        try:
            roll_call(place)
        except WorkerError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(places)) as threads:
        return list(threads.map(one, places))


def test_the_environment_gives_the_place():
    assert find_place({}) is None
    assert find_place(GIVEN) == Place("pod-0:8476", 4, 3, 300)
    assert find_place(GIVEN | {"JAXLAB_START_TIMEOUT": "20"}).timeout == 20


def test_a_slurm_job_gives_the_place_by_itself():
    code = (
        "from jaxlab.sharding.multihost import find_place\n"
        "place = find_place({'JAXLAB_DISTRIBUTED': 'auto'})\n"
        "print(place.coordinator.rpartition(':')[0], place.processes, place.process)"
    )
    slurm = {
        "SLURM_JOB_ID": "12345",
        "SLURM_NTASKS": "6",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "gpu[07-12]",
    }
    environment = os.environ | slurm | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert ended.stdout.split() == ["gpu07", "6", "5"], ended.stderr


def test_a_process_of_a_slurm_job_keeps_all_gpus_of_its_node():
    """JAX's own detection gives each task one, the task's number on its node."""
    code = (
        "from jaxlab.sharding.multihost import start\n"
        "start()\n"
        "import jax\n"
        "from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES\n"
        "print(CUDA_VISIBLE_DEVICES.value, jax.local_device_count())"
    )
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost"}
    slurm |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    place = {"JAXLAB_DISTRIBUTED": "auto"}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | slurm | place
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert ended.stdout.split()[-2:] == ["all", "2"], ended.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAXLAB_PROCESS_ID": "4"}, "JAXLAB_PROCESS_ID is 4 of 4"),
        ({"JAXLAB_PROCESSES": "four"}, "JAXLAB_PROCESSES is 'four': a whole number"),
        ({"JAXLAB_COORDINATOR": "pod-0"}, "JAXLAB_COORDINATOR is 'pod-0': it must be host:port"),
        ({"JAXLAB_DISTRIBUTED": "auto"}, "'auto' beside JAXLAB_COORDINATOR"),
        ({"JAXLAB_START_TIMEOUT": "0"}, "at least one second"),
    ],
)
def test_an_environment_that_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        find_place(GIVEN | changes)


def test_a_part_of_the_environment_names_what_is_lacking():
    with pytest.raises(ConfigError, match="JAXLAB_PROCESS_ID not set beside"):
        find_place({name: GIVEN[name] for name in list(GIVEN)[:2]})


def test_all_go_on_when_all_are_there():
    address = free_address()
    assert outcomes(*(Place(address, 3, number, 20) for number in (2, 0, 1))) == [None] * 3


def test_everyone_learns_who_did_not_come():
    address = free_address()
    said = outcomes(*(Place(address, 4, number, 1) for number in (0, 2)))
    assert said[0] == said[1]
    assert "of 4 processes did not come within 1 s: 1, 3 (there are 0 on" in said[0]


def test_a_missing_process_0_is_named_by_the_others():
    address = free_address()
    (said,) = outcomes(Place(address, 2, 1, 1))
    assert f"process 0 at {address} did not answer process 1 within 1 s" in said


def test_one_number_taken_twice_is_refused():
    address = free_address()
    said = outcomes(*(Place(address, 3, number, 5) for number in (0, 1, 1)))
    assert all("process 1 came twice" in each for each in said)


def test_processes_that_count_differently_are_refused():
    address = free_address()
    said = outcomes(Place(address, 2, 0, 5), Place(address, 3, 1, 5))
    assert all("counts 3 processes, process 0 2" in each for each in said)


def test_a_stranger_on_the_port_does_not_stop_the_roll_call():
    address = free_address()
    host, _, port = address.rpartition(":")

    def stranger(_: object) -> None:
        for _ in range(100):
            try:
                with socket.create_connection((host, int(port)), timeout=1) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return
            except OSError:
                continue

    with ThreadPoolExecutor(1) as threads:
        visit = threads.submit(stranger, None)
        said = outcomes(Place(address, 2, 0, 20), Place(address, 2, 1, 20))
        visit.result()
    assert said == [None, None]


@pytest.mark.parametrize(
    ("said", "others"),
    [
        ("UNAVAILABLE: Connection reset by peer", True),
        ("FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed: timed out", True),
        ("FAILED_PRECONDITION: Agent must be in CONNECTED state. It is currently in ERROR", True),
        ("INTERNAL: an error that nobody has described", True),
        ("DEADLINE_EXCEEDED: Barrier timed out", True),
        ("INTERNAL: Mosaic failed to compile TPU kernel: not implemented", False),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes", False),
        ("FAILED_PRECONDITION: the buffer has been donated", False),
    ],
)
def test_errors_that_come_again_are_told_from_those_of_other_processes(said, others):
    assert others_fault(said) is others


# One process fails with what no command expects, while the other one waits for it.
UNEXPECTED = """
import sys
from jaxlab.sharding.multihost import joined, leave
def run():
    with joined() as place:
        import jax
        from jaxlab.sharding.processes import agree
        agree(None)
        if place.process == 1:
            raise ValueError("nobody expected this")
        agree(None)
    return 0
def told():
    from jaxlab.errors import WorkerError
    try:
        return run()
    except WorkerError as error:
        print(error)
        return error.exit_code
sys.exit(leave(told))
"""


def test_whatever_one_process_dies_of_none_waits_for_it():
    first, second = end_two(start_two(UNEXPECTED))
    assert (first[0], second[0]) == (77, 1)
    assert "process 0 of 2: another process or the connection to it has failed" in first[1]
    assert "ValueError: nobody expected this" in second[2]


# Each process has a source of its own; both must hear of it.
DIFFERENT = """
from jaxlab.sharding.multihost import start
place = start()
from jaxlab.errors import JaxlabError
from jaxlab.sharding.processes import same_everywhere
from jaxlab.workloads import trainer
same_everywhere("the model", lambda: {"hash": "a"})
for check in (lambda: same_everywhere("the source", lambda: place.process),
              lambda: trainer("vision")):
    try:
        check()
    except JaxlabError as error:
        print(error.exit_code, error)
"""


def test_processes_that_found_other_sources_or_cannot_share_say_so():
    for out in run_two(DIFFERENT):
        assert "1 the source of process 1 is not that of process 0" in out
        assert "1 workload vision runs in one process, and here are 2" in out


def test_two_real_processes_become_one_run_with_one_batch():
    last = [out.splitlines()[-1].split() for out in run_two(BATCH)]
    weighted = str(sum(n**2 * (n + 1) for n in range(16)))
    assert last == [
        ["0", "4", "0", "1", "4", "5", weighted],
        ["1", "4", "2", "3", "6", "7", weighted],
    ]
