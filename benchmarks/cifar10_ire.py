"""IRE on CIFAR-10: accuracy of SGD and SAM with and without it, and the paper's trend of the trace.

    python benchmarks/cifar10_ire.py --source folder:CIFAR10 --out runs/cifar10_ire --json FILE

Two tables (arXiv 2405.20763, table 8 and figure 2), all cells runs of one configuration, resumable:

* ``accuracy``: SGD and SAM with momentum and a cosine, each without IRE, with the paper's untuned
  gamma 0.99 and kappa 1, and with a random mask of that density; all seeds.
* ``trace``: SAM without momentum at a constant rate, gamma by kappa, and the controls: a random
  mask and the rate times 1 + kappa; the first seed.

The defaults fit two CPU cores: a small network on a tenth of the images. For the paper's size:
``--preset resnet56 --images 50000 --steps 39063 --ire-from 23438``.
"""

import argparse
from pathlib import Path
from typing import Any

from jaxlab.evaluation.sharpness import evaluate_fisher_trace
from jaxlab.tools.output import machine, script_command, write_json
from jaxlab.tools.sweep import Cell, interval, run_cells

CONFIG = "configs/vision_small.yaml"
GAMMAS, KAPPAS = ("0.8", "0.95"), ("2", "10")


def ire(kappa: str, gamma: str, args: argparse.Namespace, **more: str) -> dict[str, str]:
    """Overrides that switch IRE on at the given step."""
    settings = {"kappa": kappa, "gamma": gamma, "start_step": str(args.ire_from), **more}
    return {f"optimizer.ire.{key}": value for key, value in settings.items()}


def accuracy_rows(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Name and overrides of each row of the first table."""
    rows = {}
    for base, radius in (("SGD", "null"), ("SAM", "0.05")):
        common = {"optimizer.sam_radius": radius, "optimizer.momentum": "0.9"}
        common["stage.schedule.name"] = "warmup-cosine"
        rows[base] = {**common, "optimizer.ire": "null"}
        rows[f"{base} + IRE"] = {**common, **ire("1", "0.99", args)}
        rows[f"{base} + random mask"] = {**common, **ire("1", "0.99", args, curvature="random")}
    return rows


def trace_rows(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Name and overrides of each cell of the second table."""
    common = {"optimizer.sam_radius": "0.05", "optimizer.momentum": "0.0"}
    common["stage.schedule.name"] = "constant"
    rows = {"kappa 0": {**common, "optimizer.ire": "null"}}
    for gamma in GAMMAS:
        for kappa in KAPPAS:
            rows[f"gamma {gamma}, kappa {kappa}"] = {**common, **ire(kappa, gamma, args)}
    for kappa in KAPPAS:
        random = ire(kappa, GAMMAS[-1], args, curvature="random")
        rows[f"random mask {GAMMAS[-1]}, kappa {kappa}"] = {**common, **random}
        larger = ire(kappa, "1.0", args)  # all is flat: the rate times 1 + kappa from then on
        rows[f"rate x (1 + {kappa})"] = {**common, **larger}
    return rows


def run(
    rows: dict[str, dict[str, str]], seeds: list[int], args: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Each row trained with each seed, and the trace at its end."""
    fixed = [
        f"data.source={args.source}",
        f"data.limit={args.images}",
        f"data.test_limit={args.test_images}",
        f"model.preset={args.preset}",
        f"stage.steps={args.steps}",
        "training.evaluate_every=0",
    ]
    keys = [(name, seed) for name in rows for seed in seeds]
    cells = [Cell({**rows[name], "seed": str(seed)}) for name, seed in keys]
    results = run_cells(CONFIG, cells, out=args.out, overrides=fixed, workers=args.workers)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for (name, seed), cell, result in zip(keys, cells, results, strict=True):
        entry = {"row": name, "seed": seed, **result}
        found[name].append(entry)
        if result["status"] != "done":
            print(name, seed, result["status"], flush=True)
            continue
        run_dir = args.out / cell.name
        trace, loss = evaluate_fisher_trace(run_dir, examples=args.trace_images, draws=8)
        entry |= {"fisher_trace": trace.value, "fisher_trace_error": trace.error}
        entry["clean_loss"] = loss
        print(
            f"{name}, seed {seed}: accuracy {entry['accuracy']:.4f}, trace "
            f"{entry['fisher_trace']:.1f} ± {entry['fisher_trace_error']:.1f}",
            flush=True,
        )
    return found


def summarise(cells: dict[str, list[dict]], base_of: dict[str, str]) -> list[dict[str, Any]]:
    """Rows with mean, interval and the difference to their base, seed by seed."""
    table = []
    for name, runs in cells.items():
        done = [r for r in runs if r["status"] == "done"]
        base = {r["seed"]: r for r in cells[base_of[name]] if r["status"] == "done"}
        row = {"row": name, "diverged": len(runs) - len(done)}
        for key in ("accuracy", "training_loss", "fisher_trace"):
            row[key] = interval([r[key] for r in done]) if done else None
            gaps = [r[key] - base[r["seed"]][key] for r in done if r["seed"] in base]
            row[f"{key}_over_base"] = interval(gaps) if gaps else None
        table.append(row)
    return table


def show(table: list[dict[str, Any]]) -> None:
    """A line a row."""
    for row in table:
        if row["accuracy"] is None:
            print(f"{row['row']:<34} diverged")
            continue
        gap = row["accuracy_over_base"]
        half = "" if gap["half_width"] is None else f" ± {gap['half_width']:.4f}"
        print(
            f"{row['row']:<34} accuracy {row['accuracy']['mean']:.4f} ({gap['mean']:+.4f}{half})  "
            f"training loss {row['training_loss']['mean']:.3f}  "
            f"trace {row['fisher_trace']['mean']:.0f}  diverged {row['diverged']}"
        )


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """Trace over kappa, a line for each gamma and control."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    axes = figure.subplots()
    means = {r["row"]: r["fisher_trace"]["mean"] for r in table if r["fisher_trace"]}
    lines = {f"gamma {gamma}": f"gamma {gamma}, kappa {{}}" for gamma in GAMMAS}
    lines["random mask"] = f"random mask {GAMMAS[-1]}, kappa {{}}"
    lines["larger rate"] = "rate x (1 + {})"
    for label, form in lines.items():
        points = [(0.0, means["kappa 0"])]
        points += [(float(k), means[form.format(k)]) for k in KAPPAS if form.format(k) in means]
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=label)
    axes.set(xlabel="kappa", ylabel="trace of the Fisher matrix")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="folder:PATH or tfds:cifar10")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--preset", default="resnet8")
    parser.add_argument("--images", type=int, default=5000, help="of training")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ire-from", type=int, default=100, help="step at which IRE starts")
    parser.add_argument("--trace-images", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="trainings at once")
    parser.add_argument("--tables", nargs="+", choices=("accuracy", "trace"))
    parser.add_argument("--json", required=True, type=Path)
    args = parser.parse_args()
    report = {"machine": machine(), "command": script_command()}
    report |= {"preset": args.preset, "images": args.images, "steps": args.steps}
    tables = args.tables or ["accuracy", "trace"]
    if "accuracy" in tables:
        cells = run(accuracy_rows(args), args.seeds, args)
        report["accuracy"] = summarise(cells, {name: name[:3] for name in cells})
        show(report["accuracy"])
    if "trace" in tables:
        cells = run(trace_rows(args), args.seeds[:1], args)
        report["trace"] = summarise(cells, dict.fromkeys(cells, "kappa 0"))
        show(report["trace"])
        plot(report["trace"], args.json.with_suffix(".png"))
    write_json(args.json, report)


if __name__ == "__main__":
    main()
