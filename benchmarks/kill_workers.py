"""Kill workers of a run at random moments, and compare its end with that of a run left alone.

    python benchmarks/kill_workers.py --out runs/kills --json FILE

Two processes of four virtual CPU devices (fsdp 4 x tensor 2) train both stages with IRE and save
after every step. In each start one of them, drawn at random, gets SIGKILL, in turn after a random
time and within a save; the launcher starts both again. At the end every array of the state has to
equal the undisturbed run's.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxlab.tools.output import machine, script_command, write_json

CONFIG = """
name: killed
model: {layers: 2, heads: 4, kv_heads: 2, head_dim: 8, ffn_width: 16, memory_layers: 1,
        tied_embeddings: true, max_context: 192, compute_dtype: float32}
memory: {reference_length: 16, tokens_kept: 2, references_per_chunk: 2, candidates: 4}
tokenizer: {vocab_size: 400}
data: {source: CORPUS, sequence_length: 128, validation_fraction: 0.2, facts_fraction: 0.5}
optimizer: {ire: {kappa: 1.0, start_step: 0, update_interval: 2, curvature_decay: 0.5}}
mesh: {fsdp: 4, tensor: 2}
stages:
  warmup: {steps: 4, batch_size: 8, learning_rate: 1.0e-2}
  continual: {steps: 8, batch_size: 8, learning_rate: 1.0e-2, memory: true}
training: {log_every: 1, save_every: 1, evaluate_rows: 2, keep: 3}
"""
TEXT = "the array axis returns a value of memory layers and reference chunks for every model"


def write_config(folder: Path) -> Path:
    """A corpus and the configuration that reads it."""
    draw, words = random.Random(0), TEXT.split()
    folder.mkdir(parents=True, exist_ok=True)
    pages = (
        json.dumps({"id": f"page {number}", "text": " ".join(draw.choices(words, k=60))})
        for number in range(40)
    )
    (folder / "corpus.jsonl").write_text("\n".join(pages))
    file = folder / "killed.yaml"
    file.write_text(CONFIG.replace("CORPUS", str(folder / "corpus.jsonl")))
    return file


class Killer:
    """Kills one worker of every start until it has killed enough.

    In turn at a random time after the start, and at a random one of the saves that follow, while
    its files are being written.
    """

    def __init__(self, run: Path, kills: int, seed: int, longest: float):
        self._folder, self._left, self._draw = run / "checkpoints", kills, random.Random(seed)
        self._longest, self.deaths = longest, []

    def started(self, workers: list[int]) -> None:
        """The launcher has started these processes."""
        if self._left:
            wait = self._into_a_save if self._left % 2 else self._a_while
            self._left -= 1
            number = self._draw.random()
            victim = self._draw.choice(workers)
            threading.Thread(target=self._kill, args=(victim, wait, number), daemon=True).start()

    def _saving(self) -> bool:
        return any(self._folder.glob("*.tmp"))

    def _a_while(self, number: float) -> None:
        time.sleep(number * self._longest)

    def _into_a_save(self, number: float) -> None:
        for _ in range(1 + round(2 * number)):
            while not self._saving():
                time.sleep(0.002)
            last = time.monotonic() + 0.25 * number
            while self._saving() and time.monotonic() < last:
                time.sleep(0.002)

    def _kill(self, victim: int, wait: Callable[[float], None], number: float) -> None:
        wait(number)
        saving = self._saving()
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.deaths.append({"in_a_save": saving, "wait": wait.__name__.strip("_")})


def launch(config: Path, run: Path, killer: Killer | None = None) -> tuple[int, int, float]:
    """Exit code, starts and seconds of a run."""
    command = [sys.executable, "-m", "jaxlab.cli", "train", str(config), "--out", str(run)]
    options = ["--processes", "2", "--devices", "4", "--restarts", "1000", "--healthy", "0"]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(config.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    begin, starts = time.monotonic(), 0
    with subprocess.Popen(
        [sys.executable, "-m", "launch.pod", "local", *options, "--", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as launched:
        for line in launched.stdout:
            print(f"{time.monotonic() - begin:7.1f}  {line}", end="", file=sys.stderr)
            if found := re.search(r"start \d+: processes ([\d ]+)$", line):
                starts += 1
                if killer is not None:
                    killer.started([int(number) for number in found[1].split()])
    return launched.returncode, starts, time.monotonic() - begin


def end_state(run: Path) -> dict[str, np.ndarray]:
    """Every array at the end of a run."""
    import jax

    from jaxlab.optim.factory import make_optimizer
    from jaxlab.training.checkpoint import read_weights
    from jaxlab.training.loop import load_run
    from jaxlab.training.state import abstract_state

    config = load_run(run)
    optimizer = make_optimizer(config.optimizer, config.stages.continual)
    template = abstract_state(config.model, optimizer, seed=config.seed)
    state = read_weights(f"{run}@continual", template)
    state = state.replace(key=jax.random.key_data(state.key))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def main() -> int:
    """Run, compare, write; 1 when the ends differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=25.0, help="seconds until a kill")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = write_config(args.out)
    alone = launch(config, args.out / "alone")
    killer = Killer(args.out / "killed", args.kills, args.seed, args.longest)
    killed = launch(config, args.out / "killed", killer)
    if alone[0] or killed[0]:
        print(f"error: the runs ended with exit codes {alone[0]} and {killed[0]}")
        return 1
    ours, theirs = end_state(args.out / "alone"), end_state(args.out / "killed")
    different = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    report = {
        "machine": machine(("jax", "jaxlib")),
        "command": script_command(),
        "kills": len(killer.deaths),
        "kills_in_a_save": sum(death["in_a_save"] for death in killer.deaths),
        "deaths": killer.deaths,
        "starts": killed[1],
        "seconds": {"alone": alone[2], "killed": killed[2]},
        "arrays": len(ours),
        "arrays_that_differ": different,
        "goodput": json.loads((args.out / "killed" / "goodput.json").read_text()),
    }
    print(
        f"{report['kills']} kills, {report['kills_in_a_save']} of them in a save, "
        f"{report['starts']} starts: {len(different)} of {len(ours)} arrays differ"
    )
    if args.json:
        write_json(args.json, report)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
