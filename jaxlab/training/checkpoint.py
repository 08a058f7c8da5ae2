"""Checkpoints that are whole or absent, verified when read, and tied to one configuration.

``RUN/checkpoints/000000100/`` (``000000100-warmup/`` when labelled) holds ``state/`` (arrays,
written by Orbax), ``host-0.json`` (one per process) and ``manifest.json``: format version, step,
configuration, and the checksums of all of it. It is written under a temporary name and renamed, on
a file system that all processes share.
"""

import functools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxlab.config import differences
from jaxlab.errors import CheckpointError
from jaxlab.sharding.processes import all_or_none, exchange, leader_first, leads
from jaxlab.training.checkpoint_files import (
    Damaged,
    Unwritten,
    named_leaves,
    read_host,
    read_manifest,
    read_state,
    write_checkpoint,
)
from jaxlab.typing import PyTree

# Seconds in which a host must see what process 0 sees; NFS keeps a listing for one minute.
_SEEN_WITHIN = 90.0


@dataclass(frozen=True)
class _Entry:
    step: int
    label: str | None
    path: Path


class Checkpoints:
    """The checkpoints of one run directory.

    Opening removes what an interrupted save left behind, and raises CheckpointError when the run
    belongs to another configuration. ``config`` (a dictionary) is stored so that the message can
    name the keys that differ. ``warn`` receives one line per damaged checkpoint set aside.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int,
        config_hash: str,
        config: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = print,
    ):
        self._root = Path(directory) / "checkpoints"
        self._keep, self._config_hash, self._config, self._warn = keep, config_hash, config, warn
        leader_first(self._make)
        for entry in _entries(self._root):
            try:
                manifest = read_manifest(entry.path)
            except Damaged:
                continue  # restore sets it aside, with a message
            self._check_config(entry.path, manifest)

    def _make(self) -> None:
        if not leads():
            return
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            _clean(self._root)
        except OSError as error:
            raise CheckpointError(f"{self._root}: cannot be made: {error.strerror}") from None

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None in a fresh run directory.

        Raises CheckpointError when all that is left are damaged ones: to start over silently would
        mix two runs in one directory.
        """
        entries = _entries(self._root)
        if entries:
            return entries[-1].step
        if json.loads(exchange(json.dumps(any(self._root.glob("*.damaged*"))))[0]):
            raise CheckpointError(
                f"{self._root}: every checkpoint is damaged; start again in another run directory"
            )
        return None

    def find(self, label: str) -> Path | None:
        """Directory of the newest checkpoint saved under ``label``, or None."""
        return next((e.path for e in reversed(_entries(self._root)) if e.label == label), None)

    def save(
        self,
        step: int,
        state: PyTree,
        host_state: Mapping[str, Any],
        *,
        label: str | None = None,
    ) -> Path:
        """Write arrays and JSON-able host state as one checkpoint; returns when it is on disk.

        A labelled checkpoint (the end of a stage) is permanent; of the others the ``keep`` newest
        stay. Raises CheckpointError when it cannot be written; earlier checkpoints are untouched.
        """
        if label is not None and not label.isidentifier():
            raise ValueError(f"a label is one word of letters, digits and underscores: {label!r}")
        target = self._root / (f"{step:09d}-{label}" if label else f"{step:09d}")
        temporary = target.with_name(f"{target.name}.tmp")
        named_leaves(state)  # what cannot be saved is the caller's mistake, not the disk's
        host_text = json.dumps(host_state)
        identity = {
            "step": step,
            "label": label,
            "config_hash": self._config_hash,
            "config": self._config,
        }
        try:
            with jax.transfer_guard("allow"):
                write_checkpoint(temporary, state, host_text, identity=identity)
            all_or_none(lambda: leads() and _publish(temporary, target), failure=Unwritten)
        except Unwritten as error:
            if leads():
                shutil.rmtree(temporary, ignore_errors=True)
            cure = ""
            if isinstance(error.__cause__, PermissionError):
                cure = f"; let this account write to {self._root}, or train into another directory"
            raise CheckpointError(
                f"{target}: the checkpoint was not written: {error}; earlier ones are untouched"
                + cure
            ) from error.__cause__
        all_or_none(self._prune, failure=CheckpointError)
        return target

    def restore(self, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The newest checkpoint that is whole, as ``(state, host_state)``.

        ``template`` (arrays or ShapeDtypeStructs) gives tree, shapes, dtypes and shardings. Damaged
        checkpoints are renamed to ``NAME.damaged``. Raises CheckpointError when none is left, and
        when the template asks for other arrays than were saved.
        """
        while entries := _entries(self._root):
            path = entries[-1].path
            try:
                manifest = read_manifest(path)
                self._check_config(path, manifest)
                return read_state(path, manifest, template), read_host(path, manifest)
            except Damaged as error:
                move = functools.partial(self._set_aside, path, str(error))
                all_or_none(move, failure=CheckpointError)
        raise CheckpointError(f"{self._root}: there is no checkpoint that can be restored")

    def _check_config(self, path: Path, manifest: Mapping[str, Any]) -> None:
        theirs = manifest["config_hash"]
        if theirs == self._config_hash:
            return
        keys = ""
        if self._config is not None and manifest["config"] is not None:
            # Through JSON and back, as the stored one went.
            ours = json.loads(json.dumps(self._config))
            keys = f" (they differ in {', '.join(differences(ours, manifest['config']))})"
        raise CheckpointError(
            f"{path}: belongs to configuration {theirs[:12]}, this run has "
            f"{self._config_hash[:12]}{keys}; use another run directory"
        )

    def _set_aside(self, path: Path, problem: str) -> None:
        if not leads():
            return
        aside, count = path.with_name(f"{path.name}.damaged"), 1
        while aside.exists():
            count += 1
            aside = path.with_name(f"{path.name}.damaged-{count}")
        os.rename(path, aside)
        self._warn(f"{path}: damaged ({problem}); moved to {aside.name}, trying the one before")

    def _prune(self) -> None:
        if not leads():
            return
        unlabelled = [entry for entry in _list(self._root) if entry.label is None]
        for entry in unlabelled[: -self._keep]:
            # Renamed first: killed half way, it is a leftover and not a damaged checkpoint.
            doomed = entry.path.with_name(f"{entry.path.name}.tmp")
            os.rename(entry.path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def split_location(location: str | Path) -> tuple[str, str]:
    """Run directory and label of ``RUN@LABEL``; the label of ``RUN`` is empty."""
    text = str(location)
    run, _, label = text.rpartition("@") if "@" in Path(text).name else (text, "", "")
    return run, label


def read_weights(location: str, template: PyTree, *, warn: Callable[[str], None] = print) -> PyTree:
    """The part of a saved state that ``template`` names, from another run, which stays untouched.

    ``location`` is a run directory (its newest whole checkpoint) or ``RUN@LABEL``. Of states saved
    as ``{"params": ..., "opt_state": ...}`` the template ``{"params": ...}`` reads the weights.
    Raises CheckpointError when there is no such checkpoint or it holds other arrays.
    """
    run, label = split_location(location)
    root = Path(run) / "checkpoints"
    entries = [entry for entry in _entries(root) if not label or entry.label == label]
    for entry in reversed(entries):
        try:
            return read_state(entry.path, read_manifest(entry.path), template, part=True)
        except Damaged as error:
            warn(f"{entry.path}: damaged ({error}); trying the one before")
    if not root.is_dir():
        raise CheckpointError(f"{run}: is not a run directory (it has no checkpoints folder)")
    labels = sorted({entry.label for entry in _entries(root) if entry.label}) or ["none"]
    wanted = f"labelled {label!r} (labels there: {', '.join(labels)})" if label else "to read"
    raise CheckpointError(f"{root}: there is no whole checkpoint {wanted}")


def _entries(root: Path) -> list[_Entry]:
    """The checkpoints that process 0 sees under their final names, oldest first.

    Raises CheckpointError in a process that does not see them, too, after a while.
    """
    names = [entry.path.name for entry in _list(root)] if leads() else []
    told = json.loads(exchange(json.dumps(names))[0])
    if not leads():
        _wait_for(root, told)
    return [_entry(root / name) for name in told]


def _wait_for(root: Path, names: Sequence[str]) -> None:
    """A network file system shows other hosts what is new there with a delay."""
    deadline = time.monotonic() + _SEEN_WITHIN
    while unseen := [name for name in names if not (root / name).exists()]:
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{root}: {socket.gethostname()} does not see {', '.join(unseen)}, which process 0 "
                "sees: a run lies on a file system that all its hosts share"
            )
        list(root.glob("*"))  # which asks the file system anew
        time.sleep(1.0)


def _list(root: Path) -> list[_Entry]:
    found = [entry for path in root.glob("*") if (entry := _entry(path))]
    return sorted(found, key=lambda entry: (entry.step, entry.label or ""))


def _entry(path: Path) -> _Entry | None:
    digits, _, label = path.name.partition("-")
    if digits.isdigit() and "." not in label:
        return _Entry(int(digits), label or None, path)
    return None


def _clean(root: Path) -> None:
    """Remove what an interrupted save left; finish the exchange of a checkpoint for a newer one."""
    for replaced in root.glob("*.replaced.tmp"):
        target = replaced.with_name(replaced.name.removesuffix(".replaced.tmp"))
        if not target.exists():
            os.rename(replaced, target)
    for leftover in root.glob("*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _publish(temporary: Path, target: Path) -> None:
    """Give a finished checkpoint its name; the rename is on disk when this returns."""
    if target.exists():
        replaced = target.with_name(f"{target.name}.replaced.tmp")
        os.rename(target, replaced)
    os.rename(temporary, target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    shutil.rmtree(target.with_name(f"{target.name}.replaced.tmp"), ignore_errors=True)
