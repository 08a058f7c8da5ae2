"""Which implementation of an op runs, and why: the first that can, the definition last."""

import contextlib
import contextvars
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from kernels_pallas.blocks import short_name

log = logging.getLogger(__name__)

_TARGET: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar(
    "target", default=None
)


@contextlib.contextmanager
def lowering_for(platform: str, chip: str = "") -> Iterator[None]:
    """Choose implementations for ``platform`` (tpu, gpu, cpu) within: for compiling ahead of time.

    ``chip`` names the kind, such as v5e, whose block sizes are taken. A function that is traced
    within must not be called afterwards on another platform: the choice is part of the trace.

    Raises ValueError for another platform, or a kind of TPU that is not known.
    """
    if platform not in ("tpu", "gpu", "cpu"):
        raise ValueError(f"platform is {platform!r}: there are tpu, gpu and cpu")
    if platform == "tpu" and chip and not short_name(chip):
        raise ValueError(f"chip is {chip!r}: v5e, v5p and v6e are known")
    token = _TARGET.set((platform, chip))
    try:
        yield
    finally:
        _TARGET.reset(token)


def target_platform() -> str:
    """The platform that implementations are chosen for: this machine's, unless told otherwise."""
    target = _TARGET.get()
    return target[0] if target else jax.default_backend()


def target_chip() -> str:
    """The kind of chip in the words of its maker (v5e, "TPU v5 lite", "NVIDIA H200"), or ""."""
    target = _TARGET.get()
    return target[1] if target else jax.devices()[0].device_kind


def only_on(platform: str) -> str | None:
    """The reason not to run when the target is another platform, or None."""
    target = target_platform()
    return None if target == platform else f"made for {platform}, the target is {target}"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``unsupported`` receives the op's arguments and says in words why this implementation cannot
    take them, or returns None when it can.
    """

    name: str
    call: Callable[..., Any]
    unsupported: Callable[..., str | None]


def always_supported(*_: Any, **__: Any) -> None:
    """For the definition in plain JAX, which takes every shape on every platform."""
    return None


def choose(
    op: str,
    candidates: Sequence[Implementation],
    requested: str | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Implementation:
    """Pick the implementation of ``op``.

    With ``requested=None`` the candidates are tried in order; what was chosen, and the reasons why
    others were passed over, are logged once. A requested implementation is never replaced by
    another.

    Raises:
      ValueError: the requested name does not exist.
      NotImplementedError: the requested implementation, or every one, cannot take the arguments;
        the message carries the reasons.
    """
    names = [candidate.name for candidate in candidates]
    if requested is not None and requested not in names:
        raise ValueError(f"{op}: no implementation named {requested!r}; there are {names}")
    reasons = []
    for candidate in candidates:
        if requested not in (None, candidate.name):
            continue
        reason = candidate.unsupported(*args, **kwargs)
        if reason is None:
            _log_once(op, candidate.name, tuple(reasons))
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    if requested is not None:
        raise NotImplementedError(
            f"{op}: asked for by name, {reasons[0]}; without implementation=... another is taken"
        )
    raise NotImplementedError(
        f"{op}: no implementation takes these arguments: " + "; ".join(reasons)
    )


@functools.cache
def _log_once(op: str, name: str, reasons: tuple[str, ...]) -> None:
    log.info("%s uses %s%s", op, name, "".join(f"; passed over {reason}" for reason in reasons))
