"""Several processes train as one does, whatever dies on the way and however many go on."""

import json
import os
import random
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxlab.memory.store import Bank
from jaxlab.training.metrics import read_metrics
from launch.local import Local, LocalLauncher, free_address
from tests.integration.tiny_run import CONFIG, end_state, locked, numbers, pages, shared_folder

# Sums over devices come in another order, and two stages of two and three steps carry it on.
TOLERANCE = 1e-5
MESH = ("mesh.fsdp=4", "mesh.tensor=2")


def write_config(folder: Path) -> Path:
    """A tiny run whose sizes eight devices divide, as ``tiny.yaml`` in the folder."""
    (folder / "corpus.jsonl").write_text(pages(random.Random(0)))
    text = CONFIG.replace("CORPUS", str(folder / "corpus.jsonl"))
    text = text.replace("heads: 2\n  kv_heads: 1", "heads: 4\n  kv_heads: 2")
    text = text.replace("batch_size: 2", "batch_size: 8").replace("keep: 1", "keep: 3")
    text = text.replace("evaluate_every: 1", "evaluate_every: 0")
    (folder / "tiny.yaml").write_text(text)
    return folder


def train(folder: Path, out: Path, *, mesh=MESH, on_line=lambda line, pids: None, **options):
    """The launcher's exit code and what it and the workers said."""
    said, pids = [], []

    def say(line: str) -> None:
        said.append(line)
        if found := re.search(r"start \d+: processes ([\d ]+)$", line):
            pids[:] = map(int, found[1].split())
        on_line(line, pids)

    words = ("train", folder / "tiny.yaml", "--out", out, *(("--set", *mesh) if mesh else ()))
    command = (sys.executable, "-m", "jaxlab.cli", *map(str, words))
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run = Local(command, environment=cache, **options)
    return LocalLauncher(run, say=say).launch(), said


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Configuration and compiled programs, shared by all workers of the tests."""
    made = shared_folder(tmp_path_factory) / "processes"
    made.mkdir(exist_ok=True)
    with locked(made / "lock"):
        if not (made / "tiny.yaml").exists():
            write_config(made)
    return made


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    """A run that is left alone; whoever needs it first makes it, the others wait."""
    with locked(folder / "lock"):
        if not (folder / "undisturbed.done").exists():
            code, said = train(folder, folder / "undisturbed")
            assert code == 0, said[-20:]
            (folder / "undisturbed.done").touch()
    return folder / "undisturbed"


def losses(run: Path) -> list[float]:
    lines = read_metrics(run)
    return [line[key] for line in lines for key in ("loss", "validation_loss") if key in line]


def test_both_stages_with_ire_lose_on_eight_devices_of_two_processes_what_they_lose_on_one(
    folder, undisturbed
):
    code, said = train(folder, folder / "alone", mesh=(), processes=1, devices=1)
    assert code == 0, said[-20:]
    assert len(losses(undisturbed)) == 7
    np.testing.assert_allclose(losses(undisturbed), losses(folder / "alone"), rtol=TOLERANCE)


def test_what_is_killed_or_told_to_stop_goes_on_to_the_same_bits(folder, undisturbed):
    """A worker is killed in the warmup, and the launcher gets SIGTERM in the continual stage."""
    run, killed, told = folder / "disturbed", [], []

    def kill(line: str, pids: list[int]) -> None:
        if "warmup 1/2" in line and not killed:
            killed.append(random.SystemRandom().choice(pids))
            os.kill(killed[0], signal.SIGKILL)

    def stop(line: str, pids: list[int]) -> None:
        kill(line, pids)
        if "continual 1/3" in line and not told:
            told.append(line)
            # Steps are quick: without a pause the run might end before all have agreed on one.
            os.kill(pids[0], signal.SIGSTOP)
            threading.Timer(1.0, os.kill, (pids[0], signal.SIGCONT)).start()
            os.kill(os.getpid(), signal.SIGTERM)

    code, said = train(folder, run, on_line=stop)
    assert code == 75, said[-20:]
    assert sum("start again: worker" in line for line in said) == 1
    (saved,) = (line for line in said if "preempted: saved at step" in line)
    assert int(re.search(r"step (\d)", saved)[1]) in (4, 5)
    code, said = train(folder, run)
    assert code == 0, said[-20:]
    assert end_state(run) == end_state(undisturbed)
    assert numbers(run, evaluations=False) == numbers(undisturbed, evaluations=False)


def keep_checkpoints(run: Path, last: int) -> None:
    """Those up to a step; the labelled ones, too."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name[:9]) > last:
            shutil.rmtree(path)


def test_one_process_and_then_four_on_other_meshes_go_on_as_the_two_did(folder, undisturbed):
    run = shutil.copytree(undisturbed, folder / "changed")
    keep_checkpoints(run, 1)
    mesh = ("mesh.replica=2", "mesh.fsdp=2", "mesh.tensor=2")
    code, said = train(folder, run, mesh=mesh, processes=1, devices=8)
    assert code == 0 and any("resuming at step 1 (warmup)" in line for line in said), said[-20:]
    np.testing.assert_allclose(losses(run), losses(undisturbed), rtol=TOLERANCE)
    before = losses(run)
    keep_checkpoints(run, 4)
    code, said = train(folder, run, mesh=("mesh.fsdp=8",), processes=4, devices=2)
    assert code == 0 and any("resuming at step 4 (continual)" in line for line in said), said[-20:]
    np.testing.assert_allclose(losses(run)[:-1], before[:-1], rtol=TOLERANCE)
    # A coordinate at the threshold of IRE's mask may fall to either side of it on another mesh.
    np.testing.assert_allclose(losses(run)[-1], before[-1], rtol=1e-3)


def test_a_worker_that_never_came_is_named_within_the_timeout(folder):
    """The second of two is not started; the first says so and asks to be started again."""
    run = Local(
        (sys.executable, "-m", "jaxlab.cli", "train", str(folder / "tiny.yaml"), "--out", "none"),
        processes=1,
        restarts=0,
        environment={
            "JAXLAB_COORDINATOR": free_address(),
            "JAXLAB_PROCESSES": "2",
            "JAXLAB_PROCESS_ID": "0",
            "JAXLAB_START_TIMEOUT": "2",
        },
    )
    said = []
    assert LocalLauncher(run, say=said.append).launch() == 77
    assert any("of 2 processes did not come within 2 s: 1 (there are 0 on" in line for line in said)
    assert not Path("none").exists()


def test_a_bank_and_scores_are_those_of_one_process(folder, undisturbed):
    """Two processes of two devices write shards in turn and score batches in turn."""
    corpus, found = str(folder / "corpus.jsonl"), []
    for name, processes, devices in (("one", 1, 1), ("two", 2, 2)):
        words = (str(undisturbed), corpus, str(folder / name))
        command = (sys.executable, "-m", "tests.sharding.bank_by_all", *words)
        said = []
        run = Local(command, processes=processes, devices=devices, restarts=0)
        assert LocalLauncher(run, say=said.append).launch() == 0, said[-20:]
        answers = [line.partition("] ")[2] for line in said if '"references"' in line]
        found.append([json.loads(answer) for answer in answers])
    (one,), (first, second) = found
    assert one["sound"] and one["shards"] > 3 and one["shards"] % 2
    for name in ("references", "shards", "sound"):
        assert first[name] == second[name] == one[name]
    # Only process 0 reports, and what is new since its last report is what all wrote.
    assert len(first["said"]) + len(second["said"]) == -(-one["shards"] // 2)
    banks = [Bank.open(folder / name) for name in ("one", "two")]
    rows = list(range(len(banks[0])))
    assert banks[0].references(rows) == banks[1].references(rows)
    np.testing.assert_array_equal(*(bank.embeddings() for bank in banks))
    ours, theirs = (bank.read(rows) for bank in banks)
    np.testing.assert_array_equal(ours.kept, theirs.kept)
    np.testing.assert_allclose(ours.memories, theirs.memories, rtol=1e-5, atol=1e-6)
    for name in ("on", "off"):
        assert first[name] == second[name]
        np.testing.assert_allclose(first[name], one[name], rtol=1e-6)
