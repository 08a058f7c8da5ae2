"""The shapes at which every op is compiled ahead of time and measured."""

import importlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

OPS = ("memory_attention", "memory_decode", "memory_select", "memory_dequantize")


class Case(NamedTuple):
    """What to compile, and what it is to be measured by.

    build: the function to compile and the shapes of its arguments, within
      ``dispatch.lowering_for``.
    floor_bytes: what must move at least between the chip and its memory, each thing once.
    visits: how often each hot region of the machine code runs, in program order.
    copied_bytes: what the kernel's copies move.
    kernel: part of the kernel's name.
    """

    build: Callable[[], tuple[Callable, tuple]]
    floor_bytes: int
    visits: tuple[int, ...]
    copied_bytes: int
    kernel: str


def cases_of(op: str) -> Mapping[str, Case]:
    """The cases of an op by name."""
    return importlib.import_module(f"kernels_pallas.{op}.cases").CASES
