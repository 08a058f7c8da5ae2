"""The plots of an evaluation, as PNG files."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.evaluation.facts import Recall
from jaxlab.evaluation.perplexity import DocumentScores, Interval
from jaxlab.tools.output import short_names, short_values

_COLORS = ("#8a8f98", "#2a7f62", "#3b6ea5", "#c26a3d")
_LINE_COLORS = ("#2a7f62", "#3b6ea5", "#c26a3d", "#8a8f98", "#7b5aa6", "#b0892e", "#4f9fb0")


def _figure(width: float = 6.0, height: float = 3.6):
    # No pyplot: it keeps global state and looks for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def plot_recall(recall: Recall, path: Path, *, chance: float) -> Path:
    """Bars of exact-match recall with memory, without and shuffled."""
    figure, axes = _figure()
    names = ["memory", "memory off", "memory shuffled"]
    values = [recall.memory, recall.off, recall.shuffled]
    bars = axes.bar(names, values, color=["#2a7f62", "#8a8f98", "#c26a3d"])
    axes.bar_label(bars, fmt="%.3f")
    axes.axhline(chance, color="black", linewidth=0.8, linestyle=":", label="guessing")
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("exact match")
    axes.set_title(f"Recall of {recall.n} facts that only the bank holds")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return path


def plot_gain(
    gains: Sequence[tuple[str, Interval]],
    off: DocumentScores,
    with_memory: DocumentScores,
    path: Path,
) -> Path:
    """Bits per byte saved: overall with intervals, and document by document."""
    figure, axes = _figure(height=4.2)
    sizes = off.bytes.astype(float)
    saved = (off.nats - with_memory.nats) / np.log(2) / sizes
    axes.scatter(sizes, saved, s=9, alpha=0.5, color="#2a7f62", label="one document")
    for (name, interval), style in zip(gains, ("-", "--", ":"), strict=False):
        label = f"{name}: {interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
        axes.axhline(interval.value, linestyle=style, color="#c26a3d", label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("bytes of the document")
    axes.set_ylabel("bits per byte saved by memory")
    axes.set_title("Held-out text, memory against none (lag 1)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def plot_sweep(result: Mapping[str, Any], path: Path, *, metric: str) -> Path:
    """A sweep's metric over its first key, a line for each combination of the others."""
    figure, axes = _figure()
    draw_sweep(axes, result, metric=metric)
    figure.savefig(path, dpi=120)
    return path


def draw_sweep(axes: Any, result: Mapping[str, Any], *, metric: str) -> None:
    """What ``plot_sweep`` shows; a cross at the top stands where runs diverged."""
    groups = result["groups"]
    names = short_names(list(groups[0]["set"]))
    texts = {key: short_values([group["set"][key] for group in groups]) for key in names}
    values = [next(iter(group["set"].values()), "all") for group in groups]
    xs = _sweep_axis(axes, list(dict.fromkeys(values)))
    # Names have no order: what lies between two of them means nothing.
    joined = "-" if all(isinstance(value, int | float) for value in values) else "none"
    lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for value, group in zip(values, groups, strict=True):
        rest = list(group["set"].items())[1:]
        label = ", ".join(f"{names[key]} {texts[key][other]}" for key, other in rest)
        lines.setdefault(label, []).append((xs[value], group))
    for (label, line), color in zip(lines.items(), itertools.cycle(_LINE_COLORS)):
        kept = [(x, group) for x, group in line if group["mean"] is not None]
        axes.errorbar(
            [x for x, _ in kept],
            [group["mean"] for _, group in kept],
            yerr=[group["std"] or 0.0 for _, group in kept],
            marker="o",
            linestyle=joined,
            color=color,
            capsize=3,
            label=label or None,
        )
        _mark_diverged(axes, [x for x, group in line if group["diverged"]], color)
    axes.set_xlabel(next(iter(names.values()), ""))
    axes.set_ylabel(metric.replace("_", " "))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)


def _mark_diverged(axes: Any, xs: Sequence[float], color: str) -> None:
    if xs:
        height = axes.get_xaxis_transform()  # shares of the axis: a diverged run has no value
        label = None if "diverged" in axes.get_legend_handles_labels()[1] else "diverged"
        place = {"transform": height, "clip_on": False, "zorder": 3}
        axes.plot(xs, [1.0] * len(xs), "x", color=color, markersize=8, label=label, **place)


def _sweep_axis(axes: Any, values: Sequence[Any]) -> dict[Any, float]:
    """Where values stand: numbers at themselves, with names among them all in order."""
    if not all(isinstance(value, int | float) for value in values):
        axes.set_xticks(range(len(values)), list(short_values(values).values()))
        axes.margins(x=0.2)
        return {value: float(place) for place, value in enumerate(values)}
    if min(values) > 0 and max(values) >= 4 * min(values):
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(values, [f"{value:g}" for value in values])
    return {value: float(value) for value in values}


def plot_paths(paths: Mapping[float, np.ndarray], path: Path) -> Path:
    """Paths of IRE in the plane of a flat u and a sharp v, by strength (arXiv 2405.20763, fig. 1).

    Every second point is shown: v changes its sign with each step.
    """
    figure, axes = _figure()
    for (kappa, points), color in zip(paths.items(), _COLORS, strict=False):
        shown = points[::2]
        axes.plot(shown[:, 0], shown[:, 1], ".-", color=color, label=f"kappa {kappa:g}")
        axes.plot(*points[-1], "o", color=color, markerfacecolor="white")
    axes.set_xlabel("u (flat; sharpness is 1 + u²)")
    axes.set_ylabel("v (sharp)")
    axes.set_title("Gradient descent with IRE on (1 + u²) v²/2, learning rate 1")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return path


def plot_collapse(rows: Sequence[Mapping[str, Any]], path: Path, *, fall: float) -> Path:
    """Where u is when log u should have fallen by ``fall``, over 1 + kappa, for each rule."""
    figure, axes = _figure(width=7.0)
    lines: dict[str, list] = {}
    for row in rows:
        label = f"{row['rule']} ({row['problem']}), eta {row['eta']:g}, rho {row['rho']:g}"
        lines.setdefault(label, []).append((1 + row["kappa"], row["u"]))
    for label, points in lines.items():
        axes.plot(*np.transpose(points), "o-", markersize=4, label=label)
    theory = f"theory for small eta: exp(-{fall:g}) = {math.exp(-fall):.4f}"
    axes.axhline(math.exp(-fall), color="black", linewidth=0.8, linestyle=":", label=theory)
    axes.set_xscale("log")
    axes.set_ylim(0.5, 0.65)
    axes.set_xlabel("1 + kappa")
    axes.set_ylabel("u after T/(1 + kappa) steps")
    axes.set_title("IRE takes 1 + kappa times fewer steps to the same sharpness")
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)
    return path
