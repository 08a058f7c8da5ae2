"""What one checkpoint directory holds, how it is written and how it is verified."""

import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxlab.errors import CheckpointError
from jaxlab.sharding.processes import all_or_none, leads, one_line
from jaxlab.training.checksums import array_checksums, file_digest, json_digest
from jaxlab.typing import PyTree

T = TypeVar("T")

FORMAT = 1
# Files of the state up to this size (Orbax's bookkeeping) are hashed byte by byte; the large ones
# hold array data, which the arrays' own checksums cover without reading them back.
HASHED_BYTES = 1 << 20


class Damaged(Exception):
    """This checkpoint cannot be trusted; an earlier one may be."""


class Unwritten(Exception):
    """A part of a checkpoint could not be written, here or by another process."""


def write_checkpoint(
    directory: Path, state: PyTree, host_text: str, *, identity: Mapping[str, Any]
) -> None:
    """Write all files of a checkpoint; the manifest, which ``identity`` goes into, comes last.

    Raises Unwritten in every process where one cannot write its part.
    """
    arrays = _raw_arrays(named_leaves(state))
    # Orbax refuses arrays without elements; the template alone restores those.
    full = {name: array for name, array in arrays.items() if array.size}
    # Not its Checkpointer, whose barriers a process that fails does not come to.
    orbax, store = ocp.PyTreeCheckpointHandler(), epath.Path((directory / "state").absolute())

    def begin() -> None:
        if leads():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            store.mkdir()
            # Where the others wait ten minutes for process 0, which may not come that far.
            (store / "array_metadatas").mkdir()
        if lack := _lack_of_room(directory.parent, arrays):
            raise OSError(lack)

    def write() -> None:
        _write_synced(directory / f"host-{jax.process_index()}.json", host_text)
        orbax.save(store, args=ocp.args.PyTreeSave(full))

    def seal() -> None:
        if not leads():
            return
        orbax.finalize(store)
        kinds = {name: [*_kind(array), checksums[name]] for name, array in arrays.items()}
        _seal(directory, {**identity, "arrays": kinds})

    all_or_none(begin, failure=Unwritten)
    checksums = array_checksums(arrays)
    all_or_none(write, failure=Unwritten)
    all_or_none(seal, failure=Unwritten)


def _seal(directory: Path, manifest: Mapping[str, Any]) -> None:
    manifest = {
        **manifest,
        "format": FORMAT,
        "processes": jax.process_count(),
        "files": {
            path.relative_to(directory).as_posix(): file_digest(path)
            for path in _hashed_files(directory)
        },
    }
    # Through JSON once, so that the hash is of what will be read back.
    manifest = json.loads(json.dumps(manifest))
    sealed = {"manifest": manifest, "sha256": json_digest(manifest)}
    _write_synced(directory / "manifest.json", json.dumps(sealed, indent=1))


def _lack_of_room(directory: Path, arrays: Mapping[str, Any]) -> str | None:
    """Why the disk cannot hold what this process is about to write, or None.

    Asked before, because Orbax's threads print pages of tracebacks when a write fails.
    """
    shards = (shard for array in arrays.values() for shard in array.addressable_shards)
    needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)
    free = shutil.disk_usage(directory).free
    if needed <= free:
        return None
    return f"No space left on device: {needed:,} bytes are needed, {free:,} are free"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after its own hash and those of the files it lists were verified.

    Raises Damaged in every process when one finds it so, as the other readers here do.
    """
    return _agreed(functools.partial(_read_manifest, path))


def _agreed(work: Callable[[], T]) -> T:
    return all_or_none(work, catch=Damaged, failure=Damaged)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        sealed = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        manifest = sealed["manifest"]
        intact = sealed["sha256"] == json_digest(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"manifest.json cannot be read: {one_line(error)}") from None
    if not intact:
        raise Damaged("manifest.json does not match its own hash")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: written in format {manifest['format']}; this version reads format {FORMAT}"
        )
    for name, digest in manifest["files"].items():
        try:
            changed = file_digest(path / name) != digest
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from None
        if changed:
            raise Damaged(f"{name} does not match its hash")
    return manifest


def _hashed_files(directory: Path) -> list[Path]:
    state = [
        path
        for path in (directory / "state").rglob("*")
        if path.is_file() and path.stat().st_size <= HASHED_BYTES
    ]
    return sorted([*directory.glob("host-*.json"), *state])


def read_host(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The host state that this process saved; of another number of processes, what all saved.

    Raises CheckpointError when those saved different ones: none of them is that of this process.
    """
    return _agreed(functools.partial(_read_host, path, manifest["processes"]))


def _read_host(path: Path, count: int) -> dict[str, Any]:
    if count == jax.process_count():
        return _read_host_file(path, jax.process_index())
    first, *others = (_read_host_file(path, number) for number in range(count))
    if any(other != first for other in others):
        raise CheckpointError(
            f"{path}: its {count} processes each saved a state of their own, and this run has "
            f"{jax.process_count()}: resume with {count}"
        )
    return first


def _read_host_file(path: Path, process: int) -> dict[str, Any]:
    try:
        return json.loads((path / f"host-{process}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"host state cannot be read: {one_line(error)}") from None


def read_state(
    path: Path, manifest: Mapping[str, Any], template: PyTree, *, part: bool = False
) -> PyTree:
    """The arrays that ``template`` names, verified; with ``part`` it may name only some of them."""
    leaves = named_leaves(template)
    wanted = {name: _raw_struct(leaf) for name, leaf in leaves.items()}
    saved = {name: (tuple(shape), dtype) for name, (shape, dtype, _) in manifest["arrays"].items()}
    _check_template(path, wanted, saved, part=part)
    full = {name: struct for name, struct in wanted.items() if struct.size}
    arrays = {}
    with jax.transfer_guard("allow"):
        if full:
            arrays = _agreed(functools.partial(_read_arrays, path / "state", full))
        for name, struct in wanted.items():
            if not struct.size:
                arrays[name] = jax.device_put(
                    jax.numpy.zeros(struct.shape, struct.dtype), struct.sharding
                )
        checksums = array_checksums(arrays)
        for name, checksum in checksums.items():
            if checksum != manifest["arrays"][name][2]:
                raise Damaged(f"array {name} does not match its checksum")
        restored = [_like(arrays[name], leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(template), restored)


def _read_arrays(directory: Path, structs: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    how = ocp.checkpoint_utils.construct_restore_args(structs)
    request = ocp.args.PyTreeRestore(item=structs, restore_args=how, partial_restore=True)
    try:
        # The handler alone talks to no other process.
        return ocp.PyTreeCheckpointHandler().restore(epath.Path(directory.absolute()), args=request)
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # the machine's trouble, not the checkpoint's
    except Exception as error:  # damage shows as whatever the reader trips over
        raise Damaged(f"the arrays cannot be read: {one_line(error)}") from error


def _check_template(
    path: Path,
    wanted: dict[str, jax.ShapeDtypeStruct],
    saved: dict[str, tuple[tuple[int, ...], str]],
    *,
    part: bool,
) -> None:
    problems = [f"{name} is not in it" for name in wanted if name not in saved]
    if not part:
        problems += [f"{name} is in it only" for name in saved if name not in wanted]
    for name, struct in wanted.items():
        if name in saved and _kind(struct) != saved[name]:
            shapes = [f"{dtype}{list(shape)}" for shape, dtype in (saved[name], _kind(struct))]
            problems.append(f"{name} is {shapes[0]} there and {shapes[1]} here")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path}: holds other arrays than this model: {'; '.join(problems[:3])}{more}"
        )


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted path; TypeError for what is not a jax array."""
    leaves = {}
    for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(key, simple=True, separator=".") or "state"
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            kind = type(leaf).__name__
            raise TypeError(f"{name}: a checkpoint holds jax arrays, got {kind}; use host_state")
        if name in leaves:
            raise ValueError(f"two leaves of the state are called {name!r}")
        leaves[name] = leaf
    return leaves


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw_arrays(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Typed random keys become the integers they are made of."""
    return {
        name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items()
    }


def _raw_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    raw = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def _like(array: jax.Array, leaf: Any) -> jax.Array:
    if not _is_key(leaf):
        return array
    found = []  # traced, because a ShapeDtypeStruct knows its implementation only as a tracer
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return jax.random.wrap_key_data(array, impl=found[0])


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), str(leaf.dtype)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
