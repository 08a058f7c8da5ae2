"""Does IRE train a Llama faster than a tuned AdamW? Every row at its best rate, with controls.

    python benchmarks/llama_ire.py --source DOCUMENTS --out runs/llama_ire --json FILE

AdamW is swept over the learning rate at two schedule lengths, then IRE over (kappa, gamma) at the
shorter one and AdamW's best rate, as the paper does (arXiv 2405.20763, §4.3). Controls: a random
mask of equal density, AdamW with the rate times 1 + kappa gamma. Further rows: IRE with the
curvature averaged over refreshes or a threshold per tensor, and on Muon with its control; blockwise
rates, Muon and LITE, each with a sweep of its own. The best cells of rows near each other get the
other seeds. All cells are runs of configs/llama_ire_small.yaml, one to a core and as many at once
as --workers says; what is done is not done again.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from jaxlab.config import load_config
from jaxlab.data.sources import load_documents, split_documents
from jaxlab.data.tokenizer import train_tokenizer
from jaxlab.evaluation.sharpness import evaluate_fisher_trace
from jaxlab.tools.output import machine, script_command, write_json
from jaxlab.tools.sweep import Cell, interval, run_cells
from jaxlab.training.metrics import read_metrics

CONFIG = "configs/llama_ire_small.yaml"
ADAMW, TWICE, IRE, RANDOM = "AdamW", "AdamW, twice the steps", "AdamW + IRE", "AdamW + random mask"
LARGER = "AdamW, rate x (1 + kappa gamma)"
MUON, ON_MUON, RANDOM_ON_MUON = "Muon", "Muon + IRE", "Muon + random mask"
BLOCKWISE = "AdamW, blockwise rates"
# Squares averaged over about twenty refreshes: what IRE gives where its mask is less of a draw.
AVERAGED, DECAY = "AdamW + IRE, averaged curvature", "0.95"
# The same share of every tensor: where the global threshold boosts some blocks more than others.
PER_TENSOR = "AdamW + IRE, a threshold per tensor"
RATES = ("7e-4", "1e-3", "1.4e-3", "2e-3")
GRID = ((1.0, 0.6), (2.0, 0.6), (4.0, 0.6), (2.0, 0.8))
# Rows that a reader will compare, each with rates of its own.
PEERS = {
    BLOCKWISE: ({"optimizer.blockwise": "{}"}, ("1.25e-4", "2.5e-4", "5e-4")),
    MUON: ({"optimizer.name": "muon", "optimizer.momentum": "0.95"}, ("2e-3", "4e-3")),
    "LITE on Muon": ({"optimizer.name": "lite-muon", "optimizer.momentum": "0.95"}, ("2e-3",)),
}
# Rows near enough to each other that one seed would not tell them apart.
SEVERAL_SEEDS = (ADAMW, IRE, AVERAGED, RANDOM, MUON, ON_MUON, RANDOM_ON_MUON, BLOCKWISE)
Settings = dict[str, str]


class Study:
    """Runs cells, several at once, and remembers which row each belongs to."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows, self._settings = args, {}, {}
        tokenizer = args.out / "tokenizer.model"
        self.fixed = [f"data.source={args.source}", f"tokenizer.path={tokenizer}"]
        if not tokenizer.exists():
            args.out.mkdir(parents=True, exist_ok=True)
            _train_tokenizer(args.source, tokenizer)

    def run(self, wanted: list[tuple[str, Settings, int]], *, seed: int) -> None:
        """Cells given as (row, settings, steps), all at one seed."""
        cells = [
            Cell(
                {
                    **settings,
                    "stages.warmup.steps": str(steps),
                    "stages.warmup.schedule.warmup_steps": str(steps // 10),
                    "seed": str(seed),
                }
            )
            for _, settings, steps in wanted
        ]
        out, workers = self.args.out, self.args.workers
        found = run_cells(CONFIG, cells, out=out, overrides=self.fixed, workers=workers)
        for (row, settings, steps), cell, result in zip(wanted, cells, found, strict=True):
            self._settings[cell.name] = settings
            loss = result.get("validation_loss", math.inf)
            print(f"{row}  {' '.join(cell.overrides)}  {loss:.4f}", flush=True)
            entry = {**result, "run": cell.name, "steps": steps, "seed": seed}
            if result["status"] == "done":
                entry["tokens_per_second"] = _speed(out / cell.name)
            self.rows.setdefault(row, []).append(entry)

    def best(self, row: str) -> Settings:
        """The optimizer's settings in the best cell of a row, as they were written."""
        return self._settings[at_best(self.rows[row], self.args.seeds[0])[0]["run"]]


def _train_tokenizer(source: str, path: Path) -> None:
    config = load_config(CONFIG, [f"data.source={source}"])
    documents = load_documents(source, limit_bytes=config.data.limit_bytes)
    training, _ = split_documents(
        documents, validation_fraction=config.data.validation_fraction, seed=config.data_seed
    )
    texts = [document.text for document in training]
    size = config.tokenizer.vocab_size
    train_tokenizer(texts, vocab_size=size, path=path, seed=config.data_seed)


def _speed(run: Path) -> float:
    """Tokens a second over a run, refreshes included, less the slowest hundredth of its steps.

    Those are pauses of the machine; refreshes are a tenth.
    """
    speeds = sorted(x["tokens_per_second"] for x in read_metrics(run) if x.get("tokens_per_second"))
    return statistics.harmonic_mean(speeds[len(speeds) // 100 :])


def run_study(args: argparse.Namespace) -> dict[str, Any]:
    """Sweeps of the bases; what needs their best rate; the best cells with the other seeds."""
    study, steps, first = Study(args), args.steps, args.seeds[0]
    plain = {"optimizer.ire": "null"}

    def at(rates: tuple[str, ...], settings: Settings) -> list[Settings]:
        return [{"optimizer.learning_rate": rate, **settings} for rate in rates]

    # The long ones first, so that no core is idle at the end.
    wanted = [(TWICE, one, 2 * steps) for one in at(RATES, plain)]
    wanted += [(ADAMW, one, steps) for one in at(RATES, plain)]
    for name, (settings, rates) in PEERS.items():
        wanted += [(name, one, steps) for one in at(rates, {**plain, **settings})]
    study.run(wanted, seed=first)

    _boosted(study, steps, first)
    for seed in args.seeds[1:]:
        study.run([(row, study.best(row), steps) for row in SEVERAL_SEEDS], seed=seed)
    return summarise(study, args)


def _boosted(study: Study, steps: int, seed: int) -> None:
    """IRE at its bases' best rates, then the controls of its best cells."""
    rate = study.best(ADAMW)["optimizer.learning_rate"]
    muon = {key: value for key, value in study.best(MUON).items() if key != "optimizer.ire"}

    def ire(kappa: float, gamma: float, **more: str) -> Settings:
        mask = {"kappa": f"{kappa:g}", "gamma": f"{gamma:g}", **more}
        settings = {f"optimizer.ire.{key}": value for key, value in mask.items()}
        return {"optimizer.learning_rate": rate, **settings}

    wanted = [(IRE, ire(*pair), steps) for pair in GRID]
    wanted += [(AVERAGED, ire(*pair, curvature_decay=DECAY), steps) for pair in GRID]
    wanted += [(PER_TENSOR, ire(*pair, scope="tensor"), steps) for pair in GRID[:2]]
    wanted += [(ON_MUON, {**ire(*pair), **muon}, steps) for pair in GRID[:2]]
    study.run(wanted, seed=seed)

    chosen, random = study.best(IRE), {"optimizer.ire.curvature": "random"}
    kappa, gamma = (float(chosen[f"optimizer.ire.{key}"]) for key in ("kappa", "gamma"))
    larger = f"{float(rate) * (1 + kappa * gamma):.3g}"
    wanted = [(RANDOM, {**chosen, **random}, steps)]
    wanted += [(LARGER, {"optimizer.learning_rate": larger, "optimizer.ire": "null"}, steps)]
    wanted += [(RANDOM_ON_MUON, {**study.best(ON_MUON), **random}, steps)]
    study.run(wanted, seed=seed)


def summarise(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """Rows at their best settings: losses, differences by seed, speed-ups, sharpness."""
    best = {name: at_best(cells, args.seeds[0]) for name, cells in study.rows.items()}
    base, twice, muon = (best[name] for name in (ADAMW, TWICE, MUON))
    traces = {name: _fisher(args, mine) for name, mine in best.items()}
    table = []
    for name, cells in study.rows.items():
        mine = best[name]
        row = {"row": name, "diverged": sum(cell["status"] != "done" for cell in cells)}
        table.append(row)
        if not mine:
            continue
        row |= {
            "set": _optimizer(mine[0]),
            "validation_loss": interval([c["validation_loss"] for c in mine]),
            "over_adamw": _paired(mine, base),
            "over_muon": _paired(mine, muon) if name in (ON_MUON, RANDOM_ON_MUON) else None,
            "steps": mine[0]["steps"],
            "tokens_per_second": statistics.fmean(c["tokens_per_second"] for c in mine),
            "speed_up": None if name == TWICE else _speed_up(mine, base, twice),
            "flat_fraction": {k: v for k, v in mine[0].items() if k.startswith("flat")},
            "fisher_trace": traces[name],
            "adamw_trace_at_this_loss": _at_equal_loss(traces, name),
        }
    return {
        "machine": machine(),
        "command": script_command(),
        "steps": args.steps,
        "seeds": args.seeds,
        "table": table,
        "cells": study.rows,
    }


def at_best(cells: list[dict], first: int) -> list[dict]:
    """The cells of a row with the settings that are best at the first seed; diverged: none."""
    done = [cell for cell in cells if cell["status"] == "done"]
    swept = [cell for cell in done if cell["seed"] == first]
    if not swept:
        return []
    best = min(swept, key=lambda cell: cell["validation_loss"])
    return [cell for cell in done if _optimizer(cell) == _optimizer(best)]


def _optimizer(cell: dict) -> dict[str, Any]:
    return {key: value for key, value in cell["set"].items() if key.startswith("optimizer.")}


def _paired(mine: list[dict], base: list[dict]) -> dict[str, Any]:
    """Difference of losses seed by seed: same rows, same order, same initial weights."""
    of_seed = {cell["seed"]: cell["validation_loss"] for cell in base}
    gaps = [c["validation_loss"] - of_seed[c["seed"]] for c in mine if c["seed"] in of_seed]
    return interval(gaps)


def _speed_up(mine: list[dict], base: list[dict], twice: list[dict]) -> dict[str, float]:
    """Steps that AdamW would need for this loss over the steps taken, and the same in seconds.

    Between the two lengths, and a little beyond, AdamW's loss is taken as linear in log(steps).
    """
    ours, short, long = (
        statistics.fmean(c["validation_loss"] for c in cells) for cells in (mine, base, twice)
    )
    steps = 2 ** ((short - ours) / (short - long))
    times = [statistics.fmean(c["tokens_per_second"] for c in cells) for cells in (mine, base)]
    return {"steps": steps, "seconds": steps * times[0] / times[1]}


def _fisher(args: argparse.Namespace, mine: list[dict]) -> dict[str, float] | None:
    """Trace of the first seed's weights."""
    if not (args.sharpness and mine):
        return None
    run = args.out / mine[0]["run"]
    trace, loss = evaluate_fisher_trace(run, examples=args.sharpness, draws=8)
    return {"value": trace.value, "error": trace.error, "loss": loss}


def _at_equal_loss(traces: dict[str, dict | None], name: str) -> float | None:
    """AdamW's trace where its loss is this row's: log-linear between its two schedule lengths.

    The losses are those of the rows that the traces were measured on.
    """
    mine, base, twice = traces[name], traces[ADAMW], traces[TWICE]
    if mine is None:
        return None
    place = (mine["loss"] - base["loss"]) / (twice["loss"] - base["loss"])
    return base["value"] * (twice["value"] / base["value"]) ** place


def plot(report: dict[str, Any], path: Path) -> None:
    """Differences to AdamW at the same steps, with their intervals."""
    from matplotlib.figure import Figure

    rows = [r for r in report["table"] if r["row"] not in (ADAMW, TWICE) and "over_adamw" in r]
    figure = Figure(figsize=(7.0, 0.45 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        gap = row["over_adamw"]
        axes.errorbar(
            gap["mean"], place, xerr=gap["half_width"] or 0.0, fmt="o", color="#2a7f62", capsize=3
        )
    axes.set_yticks(range(len(rows)), [row["row"] for row in reversed(rows)])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("validation loss minus AdamW's, nats a token")
    figure.savefig(path, dpi=120)


def _print(report: dict[str, Any]) -> None:
    for row in report["table"]:
        if "over_adamw" not in row:
            print(f"{row['row']:<34} diverged")
            continue
        gap, speed = row["over_adamw"], row["speed_up"]
        text = f"{row['row']:<34} {row['validation_loss']['mean']:.4f}  {gap['mean']:+.4f}"
        text += f" ± {gap['half_width']:.4f}" if gap["half_width"] is not None else ""
        text += f"  x{speed['steps']:.2f} steps, x{speed['seconds']:.2f} time" if speed else ""
        print(text + _trace(row))


def _trace(row: dict[str, Any]) -> str:
    if row["fisher_trace"] is None:
        return ""
    value, at_equal = row["fisher_trace"]["value"], row["adamw_trace_at_this_loss"]
    return f"  tr F {value:.1f}, AdamW's at this loss {at_equal:.1f}"


def main() -> None:
    """Run what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="documents, as for jaxlab train")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sharpness", type=int, default=64, help="rows for the trace; 0: none")
    parser.add_argument("--json", required=True, type=Path)
    args = parser.parse_args()
    report = run_study(args)
    _print(report)
    write_json(args.json, report)
    plot(report, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
