"""A tiny run of two stages and a tiny bank, made once for all tests and all workers."""

import contextlib
import dataclasses
import fcntl
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlab.optim.factory import make_optimizer
from jaxlab.training.checkpoint import read_weights
from jaxlab.training.loop import load_run
from jaxlab.training.metrics import read_metrics
from jaxlab.training.state import abstract_state
from tests.integration.children import Ended, run_child, share_compiled

CONFIG = """
name: tiny
model:
  layers: 2
  heads: 2
  kv_heads: 1
  head_dim: 8
  ffn_width: 16
  memory_layers: 1
  tied_embeddings: true
  max_context: 192
  compute_dtype: float32
memory: {reference_length: 16, tokens_kept: 2, references_per_chunk: 2, candidates: 4}
tokenizer: {vocab_size: 400}
data: {source: CORPUS, sequence_length: 128, validation_fraction: 0.2, facts_fraction: 0.5}
optimizer: {ire: {kappa: 1.0, start_step: 0, update_interval: 2, curvature_decay: 0.5}}
stages:
  warmup: {steps: 2, batch_size: 2, learning_rate: 1.0e-2}
  continual: {steps: 3, batch_size: 2, learning_rate: 1.0e-2, memory: true}
training: {log_every: 1, save_every: 1, evaluate_every: 1, evaluate_rows: 2, keep: 1}
"""
END = "000000005-continual"
WORDS = "the array axis returns a value of memory layers and reference chunks for every model"
TIMINGS = ("tokens_per_second", "mfu", "goodput")
SMALL_SHARDS = ("small_shards", 8)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """Where everything lies; what is shared is for reading only."""

    folder: Path

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.folder / "tiny.yaml"

    @property
    def run(self) -> Path:
        """The directory of the unbroken run."""
        return self.folder / "run"

    @property
    def batches(self) -> list[str]:
        """A digest of each batch of the unbroken run."""
        return (self.folder / "batches.log").read_text().splitlines()

    @property
    def notes(self) -> Path:
        """What a bank is written from."""
        return self.folder / "notes"

    @property
    def bank(self) -> Path:
        """A bank of several shards, written without a break."""
        return self.folder / "bank"

    def child(self, folder: Path, *argv: str | Path, before=()) -> Ended:
        """``jaxlab ARGV`` in a process of its own."""
        return run_child(folder / "printed", *argv, before=before)

    def copy_run(self, folder: Path) -> Path:
        """A copy of the finished run, to be changed."""
        return Path(shutil.copytree(self.run, folder / "run"))

    def copy_bank(self, folder: Path) -> Path:
        """A copy of the bank, to be changed."""
        return Path(shutil.copytree(self.bank, folder / "bank"))


def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The shared run and bank; whoever needs them first makes them, the others wait."""
    made = Tiny(shared_folder(tmp_path_factory) / "tiny")
    made.folder.mkdir(exist_ok=True)
    share_compiled(made.folder / "compiled")
    with locked(made.folder / "lock"):
        if not made.config.exists():
            _write_corpora(made)
            log = made.folder / "batches.log"
            text = CONFIG.replace("CORPUS", str(made.folder / "corpus.jsonl"))
            (made.folder / "making.yaml").write_text(text)
            train = ("train", made.folder / "making.yaml", "--out", made.run)
            _succeeds(made.child(made.folder, *train, before=[("log_batches", str(log))]))
            write = ("memory", "write", "--run", made.run, "--data", made.notes)
            _succeeds(made.child(made.folder, *write, "--bank", made.bank, before=[SMALL_SHARDS]))
            (made.folder / "making.yaml").rename(made.config)  # all is there
    return made


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder that all workers of one call of pytest have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def _succeeds(ended: Ended) -> None:
    assert ended.code == 0, ended.err


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process at a time has this file."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pages(draw: random.Random) -> str:
    """The documents that a tiny run is trained on, as lines of JSON."""
    words = WORDS.split()
    return "\n".join(
        json.dumps({"id": f"page {number}", "text": " ".join(draw.choices(words, k=60))})
        for number in range(40)
    )


def _write_corpora(made: Tiny) -> None:
    draw, words = random.Random(0), WORDS.split()
    (made.folder / "corpus.jsonl").write_text(pages(draw))
    made.notes.mkdir(exist_ok=True)
    for number in range(10):
        text = f"Note {number}: " + " ".join(draw.choices(words, k=12))
        (made.notes / f"{number}.txt").write_text(text)


def end_state(run: Path) -> dict[str, tuple]:
    """Every array at the end of a run: parameters, optimizer state, key and step, to the bit."""
    config = load_run(run)
    optimizer = make_optimizer(config.optimizer, config.stages.continual)
    template = abstract_state(config.model, optimizer, seed=config.seed)
    state = read_weights(f"{run}@continual", template)
    state = state.replace(key=jax.random.key_data(state.key))
    return {
        jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


def numbers(run: Path, *, evaluations: bool = True) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [line for line in read_metrics(run) if evaluations or "loss" in line]
    return [{key: line[key] for key in line if key not in TIMINGS} for line in lines]


def host_state(run: Path) -> dict:
    """Stage, step and data position at the end of a run."""
    return json.loads((run / "checkpoints" / END / "host-0.json").read_text())


def require_equal_runs(run: Path, other: Path) -> None:
    """Bit-equal end states and equal metrics, line by line."""
    assert end_state(run) == end_state(other)
    assert host_state(run) == host_state(other)
    assert numbers(run) == numbers(other)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
