"""What a run reports about itself: metrics.jsonl, TensorBoard, FLOPs, progress."""

import contextlib
import importlib.util
import io
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxlab.config import MemoryConfig, ModelConfig
from jaxlab.memory.cost import knowledge_cost


class MetricsWriter:
    """Appends one JSON object a line to ``RUN/metrics.jsonl``, and to TensorBoard if installed.

    Every line is flushed when it is written, so that a killed run loses none. TensorBoard files (in
    ``RUN/tensorboard``) come with the package tensorboardX.
    """

    def __init__(self, run_dir: str | os.PathLike):
        self.path = Path(run_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self, purge_step: int | None = None) -> None:
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._board = None
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            folder = str(self.path.with_name("tensorboard"))
            self._board = SummaryWriter(folder, purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, Any], *, stage: str) -> None:
        """Append the values of one step. Numbers that are not finite are written as null."""
        plain = {name: _plain(value) for name, value in values.items()}
        line = json.dumps({"step": step, "stage": stage, **plain}, allow_nan=False)
        self._file.write(f"{line}\n")
        self._file.flush()
        if self._board is not None:
            for name, value in plain.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{stage}/{name}", value, step)

    def truncate(self, step: int) -> None:
        """Drop the lines of steps after ``step``, and a last line that was cut short.

        Called on resume, so that the steps that are run again do not appear twice; steps count
        through the whole run, not by stage. The file is replaced in one piece.
        """
        self.close()
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(f"{line}\n")
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self._open(purge_step=step + 1)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoMetrics:
    """In place of a :class:`MetricsWriter` where another process writes."""

    def write(self, step: int, values: Mapping[str, Any], *, stage: str) -> None:
        """Nothing."""

    def truncate(self, step: int) -> None:
        """Nothing."""

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without one that was cut short."""
    lines = []
    for line in (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, np.integer):
        return int(value)
    if getattr(value, "ndim", 0) or isinstance(value, list | tuple | Mapping):
        raise TypeError(f"a metric is one number, got {type(value).__name__}")
    number = float(value)
    return number if math.isfinite(number) else None


def train_flops_per_token(model: ModelConfig, *, vocab_size: int, sequence_length: int) -> float:
    """Floating-point operations of one training step per token, forward and backward.

    ``6 N + 6 L A T``: N is the number of weights in matrix products (attention, feed-forward and
    output projection; the embedding look-up multiplies nothing), L layers, A = heads * head_dim and
    T the sequence length. Scores and their use cost 4 A T forward, half of it under the causal
    mask, and the backward pass costs twice the forward. Reading memory and recomputation under
    ``remat`` are left out, so that the figure compares runs with and without them.
    """
    width, attention = model.model_width, model.heads * model.head_dim
    key_value = model.kv_heads * model.head_dim
    layer = width * (2 * attention + 2 * key_value) + 3 * width * model.ffn_width
    weights = model.layers * layer + width * vocab_size
    return 6.0 * weights + 6.0 * model.layers * attention * sequence_length


def memory_flops_per_token(model: ModelConfig, memory: MemoryConfig) -> float:
    """What the continual stage adds to :func:`train_flops_per_token`, forward and backward.

    Each chunk writes one reference and reads those of its band; recomputation is left out, too.
    """
    cost = knowledge_cost(model, memory, training_length=memory.reference_length)
    chunk = cost.memory_write + memory.references_per_chunk * cost.memory_read
    return 3.0 * chunk / memory.chunk_length


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, *, peak_flops: float | None, devices: int
) -> float | None:
    """MFU: the share of the stated peak of all devices; None when no peak is stated."""
    if peak_flops is None:
        return None
    return tokens_per_second * flops_per_token / (peak_flops * devices)


class ProgressBar:
    """A bar on a terminal; elsewhere one line every ``every`` steps. With 0 nothing at all.

    >>> with ProgressBar("warmup", 2, every=1) as bar:
    ...     bar.update(1, loss=3.5)
    warmup 1/2  loss 3.5
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        every: int,
        start: int = 0,
        stream: io.TextIOBase | None = None,
    ):
        self._title, self._total, self._every = title, total, every
        self._stream = stream or sys.stdout
        self._bar = None
        if every and self._stream.isatty():
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
            columns += [TimeRemainingColumn(), TextColumn("{task.fields[numbers]}")]
            self._bar = Progress(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task(title, total=total, completed=start, numbers="")

    def __enter__(self) -> "ProgressBar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, **numbers: float) -> None:
        """Show that ``step`` steps are done, with the newest numbers."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=text)
        elif self._every and (step % self._every == 0 or step == self._total):
            print(f"{self._title} {step}/{self._total}  {text}", file=self._stream, flush=True)
