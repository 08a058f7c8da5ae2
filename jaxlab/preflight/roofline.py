"""Bounds on the time of a step: compute, main memory, interconnect; and what they cost in money."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxlab.errors import ConfigError
from jaxlab.preflight.chips import CHIPS, Topology, wires
from jaxlab.preflight.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step by what they are spent on, if nothing else took any.

    A step takes at least ``least`` (everything overlaps) and, if nothing overlaps, ``sum``: both
    suppose that each part runs at its stated peak.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def least(self) -> float:
        """The longest of the three."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def sum(self) -> float:
        """All three one after the other."""
        return self.compute + self.memory + self.interconnect

    @property
    def limit(self) -> str:
        """Which of the three is the longest."""
        names = {"compute": self.compute, "HBM": self.memory, "interconnect": self.interconnect}
        return max(names, key=names.get)


def interconnect_seconds(
    where: Topology, devices: Sequence[Any], found: Sequence[Collective]
) -> dict[str, float]:
    """Seconds of all collectives, one after the other, by the axes they run over.

    ``devices`` are in the order of the mesh. A group that is wired worse than others counts.
    """
    seconds: dict[str, float] = {}
    for one in found:
        groups = [[devices[number] for number in group] for group in one.groups]
        slowest = min(wires(where, group).bandwidth for group in groups)
        seconds[one.axes] = seconds.get(one.axes, 0.0) + one.sent / slowest
    return seconds


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a pod does at one step time."""

    step_seconds: float
    tokens_per_second: float
    mfu: float
    run_hours: float
    cost: float | None


def speed(
    step_seconds: float,
    *,
    where: Topology,
    model_flops: float,
    tokens: int,
    steps: int,
    chip_hour: float | None,
) -> Speed:
    """Of steps of so many tokens: MFU counts ``model_flops`` a step, without recomputation."""
    hours = steps * step_seconds / 3600
    return Speed(
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        mfu=model_flops / (step_seconds * where.chips * where.chip.flops),
        run_hours=hours,
        cost=None if chip_hour is None else hours * where.chips * chip_hour,
    )


@dataclasses.dataclass(frozen=True)
class Prices:
    """A price file of the user's: none come with the program, because they age."""

    date: str
    currency: str
    per_chip_hour: dict[str, float]

    def of(self, kind: str) -> float:
        """Of one chip for an hour. Raises ConfigError naming the key that is missing."""
        if kind not in self.per_chip_hour:
            known = ", ".join(self.per_chip_hour)
            raise ConfigError(f"--prices: per_chip_hour.{kind} is missing (there are {known})")
        return self.per_chip_hour[kind]


def read_prices(path: str | os.PathLike) -> Prices:
    """Read ``{date: 2026-11-01, currency: USD, per_chip_hour: {v5p: 4.2}}``.

    Raises ConfigError for a file that cannot be read, without a date or with a price that is none.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path}: cannot be read as YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no keys; give date, currency and per_chip_hour")
    for key in ("date", "currency", "per_chip_hour"):
        if not values.get(key):
            aged = "; prices age, so say when they were true" if key == "date" else ""
            raise ConfigError(f"{path}: {key} is missing{aged}")
    prices = values["per_chip_hour"]
    if not isinstance(prices, dict):
        raise ConfigError(f"{path}: per_chip_hour is no mapping such as {{v5p: 4.2}}")
    for kind, price in prices.items():
        number = isinstance(price, int | float) and not isinstance(price, bool)
        if kind not in CHIPS or not number or not math.isfinite(price) or price < 0:
            known = ", ".join(CHIPS)
            raise ConfigError(f"{path}: per_chip_hour.{kind}: {price!r} is no price of {known}")
    return Prices(str(values["date"]), str(values["currency"]), prices)
