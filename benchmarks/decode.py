"""Generation with memory beside generation without, RAG with the same model, and transformers.

    PYTHONPATH=. python benchmarks/decode.py --json benchmarks/results/decode_cpu.json

Throughput is that of the paper's table 21: all tokens of the answers over the time from the prompts
to the last token, retrieval included (prompt 128, answer 128: memory is retrieved three times).
"worst" is the paper's worst case: every retrieval is made to bring references that no other brings,
nothing is kept in RAM, and the files of the bank are dropped from the page cache before each turn.
Weights are random and the bank's memories as well: neither changes what has to be done. Contestants
are processes that take turns, forwards and backwards by rounds; ratios are of the same round.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.decode_inputs import PROMPT, Settings, prepare, random_model
from benchmarks.turns import Contestant
from jaxlab.tools.output import machine, script_command, write_json

ANSWER = 128
PACKAGES = ("jax", "jaxlib", "flax", "faiss-cpu", "tensorstore", "torch", "transformers")
OFF, PEER = "no memory", "transformers"
# Name: bank, whether the worst case, and how references are read.
MODES = {
    OFF: (None, False, "on"),
    "memory": ("raw", False, "on"),
    "memory, worst": ("raw", True, "on"),
    "memory quantized": ("quantized", False, "on"),
    "memory quantized, worst": ("quantized", True, "on"),
    "RAG text": ("raw", False, "text"),
}


def _drop_pages(folder: Path) -> None:
    """Let the next read of a bank come from the drive."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _require_drive(folder: str) -> None:
    """The worst case is read from a drive, which a file system in RAM has not."""
    kind = subprocess.check_output(["stat", "-f", "-c", "%T", folder], text=True).strip()
    if kind in ("tmpfs", "ramfs"):
        raise SystemExit(f"{folder} lies in RAM ({kind}): set BANK_FOLDER to a folder on a drive")


class Jaxlab:
    """The engines of all modes, one after the other."""

    def __init__(self, settings: Settings):
        self._settings, self._model, self._engines = settings, random_model(settings), {}

    def __call__(self, order: tuple[str, int, int]) -> dict:
        mode, rows, number = order
        engine = self._engine(mode, rows)
        bank, worst, how = MODES[mode]
        if worst:
            _drop_pages(Path(self._settings.folder) / bank)
        tokens = self._settings.prompts(rows, number)
        prompts = [self._model.tokenizer.decode(row) for row in tokens]
        before = dict(engine.reader.seconds) if engine.reader else {}
        begin = time.perf_counter()
        found = engine.generate(prompts, max_tokens=ANSWER, memory=how)
        seconds = time.perf_counter() - begin
        assert all(len(one.tokens) == ANSWER for one in found)
        after = engine.reader.seconds if engine.reader else {}
        return {
            "seconds": seconds,
            "stages": {name: after[name] - before[name] for name in before},
            "answers": [one.tokens for one in found],
        }

    def _engine(self, mode: str, rows: int):
        from jaxlab.inference.engine import Engine

        if (mode, rows) not in self._engines:
            like = next(iter(self._engines.values()), None)
            text = MODES[mode][2] == "text"
            references = 5 * (PROMPT + 8) if text else 0
            self._engines[mode, rows] = Engine(
                self._model,
                self._reader(mode),
                rows=rows,
                context=1 + PROMPT + ANSWER + references,
                like=like,
            )
        return self._engines[mode, rows]

    def _reader(self, mode: str):
        from jaxlab.memory.read import CACHE_BYTES, MemoryReader
        from jaxlab.memory.store import Bank

        name, worst, _ = MODES[mode]
        if name is None:
            return None
        bank = Bank.open(Path(self._settings.folder) / name, identity=self._model.identity)
        reader = MemoryReader.open(bank, cache_bytes=0 if worst else CACHE_BYTES)
        if worst:
            _make_unique(reader)
        return reader


def _make_unique(reader) -> None:
    """Search as ever, but give every hit another reference that was not given lately, anywhere."""
    search = reader.search
    following = itertools.cycle(np.random.default_rng(0).permutation(reader.bank.rows).tolist())

    def unique(texts, k=None):
        hits = search(texts, k)
        for place in np.ndindex(hits.ids.shape):
            hits.ids[place] = next(following)
        return hits

    reader.search = unique


class Profile(Jaxlab):
    """The same with a wait behind every program, to say where the time goes."""

    def __call__(self, order: tuple[str, int, int]) -> dict:
        import jax

        from jaxlab.inference import batching

        mode, rows, number = order
        super().__call__(order)  # compiles
        engine, stages = self._engine(mode, rows), {}

        def timed(stage, program):
            def run(*given, **options):
                begin = time.perf_counter()
                out = jax.block_until_ready(program(*given, **options))
                stages[stage] = stages.get(stage, 0.0) + time.perf_counter() - begin
                return out

            return run

        compiled, say = engine.programs, batching.say
        quantized = engine.reader is not None and engine.reader.codebook is not None
        engine._batch._programs = programs = dataclasses.replace(compiled)
        programs.__dict__.update(
            load=timed("dequantize" if quantized else "slots", compiled.load),
            prefill=timed("prefill", compiled.prefill),
            decode=timed("decode", compiled.decode),
        )
        batching.say = timed("choose", say)
        try:
            # Other prompts: what those before retrieved may lie in the cache, as in any turn.
            found = super().__call__((mode, rows, number + 1))
        finally:
            batching.say = say
        return {**found["stages"], **stages, "whole": found["seconds"]}


class Transformers:
    """Hugging Face's generation with the same weights, without memory."""

    def __init__(self, settings: Settings):
        import torch
        from transformers import LlamaForCausalLM

        dtype = getattr(torch, settings.dtype)
        self._settings, self._torch = settings, torch
        self._model = LlamaForCausalLM.from_pretrained(
            Path(settings.folder) / "weights", attn_implementation="sdpa", dtype=dtype
        )
        self._model = self._model.eval().to(settings.device)

    def __call__(self, order: tuple[str, int, int]) -> dict:
        _, rows, number = order
        tokens = self._settings.prompts(rows, number).astype(np.int64)
        tokens = np.concatenate([np.full((rows, 1), 1), tokens], axis=1)
        given = self._torch.from_numpy(tokens).to(self._settings.device)
        begin = time.perf_counter()
        with self._torch.inference_mode():
            out = self._model.generate(
                given,
                attention_mask=self._torch.ones_like(given),
                max_new_tokens=ANSWER,
                min_new_tokens=ANSWER,
                do_sample=False,
                pad_token_id=0,
            )
        answers = out[:, tokens.shape[1] :].tolist()
        return {"seconds": time.perf_counter() - begin, "answers": answers}


def _measure(contestants: dict[str, Contestant], rows: int, rounds: int) -> dict[str, list[dict]]:
    names = [*MODES, *([PEER] if PEER in contestants else [])]
    turns: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names[:: 1 if number % 2 else -1]:
            answer = contestants[name if name == PEER else "jaxlab"].turn((name, rows, number))
            if number:  # the first compiles and fills caches
                turns[name].append(answer)
        print(f"{rows} rows: round {number} of {rounds}", file=sys.stderr, flush=True)
    return turns


def _summary(turns: dict[str, list[dict]], rows: int, profile) -> dict:
    out = {}
    for name, each in turns.items():
        seconds = [turn["seconds"] for turn in each]
        ratios = [
            base["seconds"] / turn["seconds"] for base, turn in zip(turns[OFF], each, strict=True)
        ]
        out[name] = {
            "tokens_per_second": rows * ANSWER / statistics.median(seconds),
            "seconds_per_turn": seconds,
            "speed_over_no_memory": {
                "median": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            },
        }
        if name != PEER:
            out[name]["stages_seconds"] = profile.turn((name, rows, 1))
        else:
            same = [
                sum(a == b for a, b in zip(one["answers"], base["answers"], strict=True))
                for one, base in zip(each, turns[OFF], strict=True)
            ]
            out[name]["answers_equal_to_ours"] = sum(same) / (rows * len(same))
    return out


def _print(report: dict) -> None:
    for key, value in report["machine"].items():
        print(f"{key:14} {value}")
    for rows, result in report["results"].items():
        print(f"\n{report['preset']}, {rows} sequences, prompt {PROMPT}, answer {ANSWER}")
        for name, row in result.items():
            ratio = row["speed_over_no_memory"]
            stages = ", ".join(
                f"{stage} {1000 * value:.0f}"
                for stage, value in row.get("stages_seconds", {}).items()
            )
            print(
                f"{name:24}{row['tokens_per_second']:9.1f} tokens/s  "
                f"{ratio['median']:.3f} ({ratio['min']:.3f} .. {ratio['max']:.3f})  ms: {stages}"
            )


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="memory3-60m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--references", type=int, default=4000)
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with tempfile.TemporaryDirectory(dir=os.environ.get("BANK_FOLDER")) as folder:
        _require_drive(folder)
        settings = Settings(args.preset, args.device, args.references, folder)
        Contestant("preparation", prepare, settings).close()
        contestants = {"jaxlab": Contestant("jaxlab", Jaxlab, settings)}
        if not args.no_peer:
            contestants[PEER] = Contestant(PEER, Transformers, settings)
        profile = Contestant("profile", Profile, settings)
        try:
            results = {
                str(rows): _summary(_measure(contestants, rows, args.rounds), rows, profile)
                for rows in args.rows
            }
        finally:
            for each in (*contestants.values(), profile):
                each.close()
    report = {
        "machine": machine(PACKAGES),
        "command": script_command(),
        "preset": args.preset,
        "references": args.references,
        "results": results,
    }
    _print(report)
    if args.json:
        write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
