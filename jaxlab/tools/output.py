"""What commands, workloads and benchmarks have in common when they tell their results."""

import contextlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON file in one piece, its folder included."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def one_line(text: str, width: int = 160) -> str:
    """A text without line breaks, cut to ``width`` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """For each dotted key its last parts, as many as tell it from the others."""

    def end(key: str, count: int) -> str:
        return ".".join(key.split(".")[-count:])

    def short(key: str) -> str:
        counts = range(1, 2 + key.count("."))
        alone = (n for n in counts if [end(k, n) for k in keys].count(end(key, n)) == 1)
        return end(key, next(alone, len(counts)))

    return {key: short(key) for key in keys}


def short_values(values: Sequence[Any]) -> dict[Any, str]:
    """For each value its text, less the folders that all of them begin with."""
    texts = {value: str(value) for value in values}
    shared = os.path.commonprefix(list(texts.values())) if len(texts) > 1 else ""
    folders = shared.rpartition("/")[0]
    if not folders:
        return texts
    return {value: f"…{text[len(folders) :]}" for value, text in texts.items()}


def print_citations(citations: Sequence[Any]) -> None:
    """The references read for each chunk, with their scores."""
    if not citations:
        print("no reference was read")
    for cited in citations:
        print(
            f"chunk {cited.chunk}  {cited.score:.4f}  [{cited.reference}] {cited.source}: "
            f"{one_line(cited.text)}"
        )


def machine(packages: Sequence[str] = ("jax", "jaxlib")) -> dict[str, Any]:
    """The processor, how much of it there is, and versions: what a measurement depends on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    versions = {package: metadata.version(package) for package in packages}
    return {"cpu": cpu, "cores": cores(), "python": sys.version.split()[0], **versions}


def script_command() -> str:
    """How this script of ``benchmarks/`` was called, without the folders of this machine."""
    said = [re.sub(r"(^|[:=])(\.\.)?/(?!/)\S*/", r"\1", word) for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *said])


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    import numpy as np

    p50, p99 = np.percentile(seconds, [50, 99])
    return {"p50": float(p50), "p99": float(p99)}


def cores() -> int:
    """The cores this process may use: a container often has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
