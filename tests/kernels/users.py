"""Calling the ops as a user does."""

import contextlib

import jaxtyping

from kernels_pallas import dispatch


@contextlib.contextmanager
def untyped():
    """Without the type checks that the tests install."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def spy_on(api, monkeypatch) -> list[str]:
    """From now on the names of the implementations that an op calls, which compute nothing."""
    called = []
    spies = [
        dispatch.Implementation(
            one.name, lambda *_, _name=one.name, **__: called.append(_name), one.unsupported
        )
        for one in api.IMPLEMENTATIONS
    ]
    monkeypatch.setattr(api, "IMPLEMENTATIONS", tuple(spies))
    return called
