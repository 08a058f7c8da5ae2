"""The plots of an evaluation, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.evaluation.facts import Recall
from jaxlab.evaluation.perplexity import DocumentScores, Interval


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
    lines: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for group in result["groups"]:
        (first, *rest) = list(group["set"].items()) or [("", "all")]
        label = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in rest)
        lines.setdefault(label, []).append((first[1], group))
        axes.set_xlabel(first[0])
    xs = _positions([value for line in lines.values() for value, _ in line])
    for label, line in lines.items():
        kept = [(xs[value], group) for value, group in line if group["mean"] is not None]
        axes.errorbar(
            [x for x, _ in kept],
            [group["mean"] for _, group in kept],
            yerr=[group["std"] or 0.0 for _, group in kept],
            marker="o",
            capsize=3,
            label=label or None,
        )
    if xs and min(xs.values()) > 0 and max(xs.values()) >= 4 * min(xs.values()):
        axes.set_xscale("log")
    axes.set_ylabel(metric.replace("_", " "))
    if any(lines):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def _positions(values: Sequence[str]) -> dict[str, float]:
    """Where values stand on an axis: at themselves if all are numbers, else in order."""
    try:
        return {value: float(value) for value in values}
    except ValueError:
        return {value: float(number) for number, value in enumerate(dict.fromkeys(values))}
