"""Train every combination of some values, each in a process of its own, and compare the ends."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxlab import strict_yaml
from jaxlab.config import identity_hash, load_config
from jaxlab.errors import ConfigError, Interrupted, JaxlabError
from jaxlab.tools.output import short_names, short_values, write_json
from jaxlab.training.guards import NotFiniteError
from jaxlab.training.metrics import read_metrics

SEED = "seed"
_METRIC = "validation_loss"
# Steps at the end whose mean is the training loss of a run.
_LAST_STEPS = 20
_NO_EDGE = 10_000
# Of a run's folder, so that an ending still fits what file systems allow.
_NAME_LENGTH = 150


class SweepError(JaxlabError):
    """A run of a sweep failed for another reason than divergence."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of values: a run directory of its own."""

    values: dict[str, str]

    @property
    def name(self) -> str:
        """Folder of the run: the values, and where a name cannot say them a hash of them too."""
        text = ",".join(f"{key}={value}" for key, value in self.values.items())
        name = "".join(c if c.isalnum() or c in "=,.-_" else "_" for c in text)[:_NAME_LENGTH]
        if name == text:
            return name
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def overrides(self) -> list[str]:
        """As ``--set`` takes them."""
        return [f"{key}={value}" for key, value in self.values.items()]

    @property
    def plain_values(self) -> dict[str, Any]:
        """As JSON files have them: numbers as numbers, anything else as it was given."""
        return {key: _plain(value) for key, value in self.values.items()}

    def record(self, out: Path) -> Path:
        """The file in ``out`` that is there once the cell is done."""
        return out / f"{self.name}.json"


def cells_of(over: Sequence[str]) -> list[Cell]:
    """All combinations of ``KEY=a,b,c`` texts, the last key turning fastest. Raises ConfigError."""
    axes: dict[str, list[str]] = {}
    for text in over:
        key, equals, values = text.partition("=")
        parts = split_values(values)
        if not (key.strip() and equals and all(parts)):
            raise ConfigError(f"--over {text}: expected KEY=a,b,c, such as --over seed=0,1,2")
        if key.strip() in axes:
            raise ConfigError(f"--over {text}: {key.strip()} is swept twice")
        axes[key.strip()] = list(dict.fromkeys(parts))
    return [
        Cell(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]


def split_values(text: str) -> list[str]:
    """The parts of ``a,b,c``; a comma within brackets, braces or quotes parts nothing."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and parts[-1].rstrip()[-1:] in ("", *"[{,:"):
            quote = letter  # within a word it is an apostrophe
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _plain(text: str) -> int | float | str:
    value = strict_yaml.parse(text, text)
    return value if type(value) in (int, float) and math.isfinite(value) else text


def run_sweep(
    config: str,
    over: Sequence[str],
    *,
    json_file: Path,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    workers: int = 1,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train all cells, write ``json_file`` after each, a plot beside it, and print a table.

    Runs lie in ``out`` (default: ``json_file`` without its ending). What is done is not done again,
    and a run that was interrupted goes on. Raises ConfigError for any cell before the first one is
    trained, SweepError when one fails, Interrupted with the number of cells that are done; a run
    that diverges is a result.
    """
    out = out or json_file.with_suffix("")
    if out == json_file:
        raise ConfigError(f"--json {json_file}: give the file an ending, such as {json_file}.json")
    cells = cells_of(over)
    rows = []
    found = run_cells(config, cells, out=out, overrides=overrides, workers=workers)
    try:
        with closing(found):
            for number, (cell, row) in enumerate(zip(cells, found, strict=True), start=1):
                rows.append(row)
                result = _result(config, over, overrides, rows)
                write_json(json_file, result)
                ended = row["status"] if _METRIC not in row else f"{_METRIC} {row[_METRIC]:.4f}"
                report(f"{number}/{len(cells)}  {' '.join(cell.overrides)}  {ended}")
    except KeyboardInterrupt:
        done = sum(cell.record(out).is_file() for cell in cells)
        raise Interrupted(f"{done} of {len(cells)} cells are done") from None
    _print_table(result)
    from jaxlab.tools.plots import plot_sweep

    plot = plot_sweep(result, json_file.with_suffix(".png"), metric=_METRIC)
    report(f"{json_file}  {plot}")
    return result


def run_cells(
    config: str,
    cells: Sequence[Cell],
    *,
    out: Path,
    overrides: Sequence[str] = (),
    workers: int = 1,
) -> Generator[dict[str, Any], None, None]:
    """The results of cells in their order, ``workers`` at once, each with its share of the cores.

    Raises as ``run_sweep`` does; what already runs beside a cell that fails is waited for and kept,
    and none is started after it. Close it when interrupted: that waits for what runs.
    """
    # Every mistake is found now and not hours later.
    names = [cell.name for cell in cells]
    for cell in cells:
        if names.count(cell.name) > 1:
            raise ConfigError(f"{' '.join(cell.overrides)} is in the sweep twice")
    hashes = [identity_hash(load_config(config, overrides, swept=c.overrides)) for c in cells]

    ended = threading.Event()

    def one(cell: Cell, identity: str) -> dict[str, Any]:
        if ended.is_set():
            raise CancelledError  # which nobody sees: a cell before this one says why
        try:
            return run_cell(config, cell, out=out, overrides=overrides, identity=identity)
        except BaseException:
            ended.set()
            raise

    shares = iter(_shares_of_cores(workers))
    # A child inherits the cores of the thread that starts it.
    with ThreadPoolExecutor(workers, initializer=lambda: _use_cores(next(shares))) as pool:
        try:
            yield from pool.map(one, cells, hashes)
        finally:
            ended.set()


def _shares_of_cores(workers: int) -> list[set[int]]:
    """Disjoint sets of this process's cores where there are enough of them, else all for each."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(cores[n::workers] if len(cores) >= workers else cores) for n in range(workers)]


def _use_cores(cores: set[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)


def run_cell(
    config: str, cell: Cell, *, out: Path, overrides: Sequence[str], identity: str
) -> dict[str, Any]:
    """The result of one cell, trained now unless ``out`` has it already. Raises SweepError."""
    run, log = out / cell.name, out / f"{cell.name}.log"
    done = cell.record(out)
    if done.is_file():
        known = json.loads(done.read_text(encoding="utf-8"))
        if known["identity"] != identity:
            raise SweepError(
                f"{done}: was trained with another configuration; use another --out or remove it"
            )
        return {**known["row"], "set": cell.plain_values}
    out.mkdir(parents=True, exist_ok=True)
    settings = [*overrides, *cell.overrides]
    command = [sys.executable, "-m", "jaxlab.cli", "train", config, "--out", str(run)]
    command += ["--set", *settings] if settings else []
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    row: dict[str, Any] = {"set": cell.plain_values, "status": "done"}
    if code == NotFiniteError.exit_code:
        row["status"] = "diverged"
    elif code != 0:
        lines = log.read_text(encoding="utf-8").splitlines() or ["no output"]
        raise SweepError(f"{' '.join(cell.overrides)}: ended with {code}: {lines[-1]} (see {log})")
    else:
        row |= last_numbers(run)
    write_json(done, {"identity": identity, "row": row})
    return row


def last_numbers(run: Path) -> dict[str, float]:
    """The last evaluation of a run, and its training loss as the mean of the last steps."""
    lines = read_metrics(run)
    evaluations = [line for line in lines if line.get(_METRIC) is not None]
    if not evaluations:
        raise SweepError(f"{run}: has no {_METRIC} to compare; this workload cannot be swept")
    last = evaluations[-1]
    numbers = {k: v for k, v in last.items() if isinstance(v, float)}
    losses = [line["loss"] for line in lines if "loss" in line][-_LAST_STEPS:]
    return {**numbers, "training_loss": statistics.fmean(losses)} if losses else numbers


def interval(values: Sequence[float], *, level: float = 0.95) -> dict[str, Any]:
    """Mean over seeds and half the width of its Student-t interval (None for one seed)."""
    half = None
    if len(values) > 1:
        from scipy.stats import t

        quantile = t.ppf((1 + level) / 2, len(values) - 1)
        half = float(quantile) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "half_width": half, "values": list(values)}


def _result(config: str, over, overrides, rows: list[dict]) -> dict[str, Any]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple((k, v) for k, v in row["set"].items() if k != SEED)
        groups.setdefault(key, []).append(row)
    summary = [_summary(dict(key), members) for key, members in groups.items()]
    whole = [group for group in summary if group["diverged"] == 0]
    best = min(whole, key=lambda group: group["mean"], default=None)
    return {
        "config": config,
        "over": list(over),
        "set": list(overrides),
        "rows": rows,
        "groups": summary,
        "best": best and best["set"],
    }


def _summary(values: dict[str, Any], members: list[dict]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of the runs that did not diverge."""
    ends = [row[_METRIC] for row in members if row["status"] == "done"]
    return {
        "set": values,
        "mean": statistics.fmean(ends) if ends else None,
        "std": statistics.stdev(ends) if len(ends) > 1 else None,
        "runs": len(members),
        "diverged": len(members) - len(ends),
    }


def _print_table(result: dict[str, Any]) -> None:
    keys = list(result["groups"][0]["set"])
    texts = {key: short_values([group["set"][key] for group in result["groups"]]) for key in keys}
    table = Table()
    for name in (*short_names(keys).values(), _METRIC, "runs", "diverged"):
        table.add_column(name, overflow="fold")
    for group in result["groups"]:
        mean, std = group["mean"], group["std"]
        text = "-" if mean is None else f"{mean:.4f}"
        text += "" if std is None else f" ± {std:.4f}"
        text += " *" if group["set"] == result["best"] else ""
        values = [texts[key][value] for key, value in group["set"].items()]
        table.add_row(*values, text, str(group["runs"]), str(group["diverged"]))
    # A file has no edge at which a line would have to be folded.
    Console(width=None if sys.stdout.isatty() else _NO_EDGE).print(table)
