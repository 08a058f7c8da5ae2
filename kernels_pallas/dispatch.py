"""Which implementation of an op runs, and why: the first that can, the definition last."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

log = logging.getLogger(__name__)


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

    With ``requested=None`` the candidates are tried in order and the reason why one was passed over
    is logged. A requested implementation is never replaced by another.

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
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
        log.info("%s passes over %s", op, reasons[-1])
    raise NotImplementedError(
        f"{op}: no implementation takes these arguments: " + "; ".join(reasons)
    )
