"""Checkpoints: bit-equal, whole or absent, verified, tied to one configuration."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import CheckpointError
from jaxlab.training import checkpoint_files
from jaxlab.training.checkpoint import Checkpoints, read_weights
from jaxlab.training.checksums import array_checksums

REPOSITORY = Path(__file__).parents[2]


def make_state(step: int) -> dict:
    values = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4) * 0.1 + step
    return {
        "params": {"kernel": values.astype(jnp.bfloat16), "scale": jnp.ones(4) / (step + 3)},
        "opt_state": (jnp.int32(step), {"nu": values**2}),
        "rng": jax.random.key(step),
        "flag": jnp.array([True, False]),
        "empty": jnp.zeros((0, 3)),
    }


def raw_bytes(tree) -> list[tuple]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    numbers = [
        (key, jax.random.key_data(leaf) if checkpoint_files._is_key(leaf) else leaf)
        for key, leaf in leaves
    ]
    return [
        (jax.tree_util.keystr(key), str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
        for key, leaf in numbers
    ]


def open_run(directory, **options) -> Checkpoints:
    return Checkpoints(directory, **{"keep": 3, "config_hash": "a" * 64, **options})


def save_steps(directory, *steps: int, **options) -> Checkpoints:
    checkpoints = open_run(directory, **options)
    for step in steps:
        checkpoints.save(step, make_state(step), {"position": step})
    return checkpoints


def flip_bit(path: Path, *, at: float = 0.5, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)


def test_restored_state_is_bit_equal_to_the_saved_one(tmp_path):
    checkpoints = open_run(tmp_path)
    host = {"iterator": {"epoch": 1, "seen": [3, 5]}, "stage": "warmup", "loss": 0.1}
    checkpoints.save(7, make_state(7), host)
    state, restored_host = open_run(tmp_path).restore(make_state(0))
    assert raw_bytes(state) == raw_bytes(make_state(7))
    assert restored_host == host
    assert checkpoints.latest() == 7
    draws = [jax.random.normal(s["rng"], (3,)) for s in (state, make_state(7))]
    np.testing.assert_array_equal(*draws)


def test_a_template_of_shapes_restores_as_arrays_do(tmp_path):
    checkpoints = save_steps(tmp_path, 3)
    shapes = jax.eval_shape(lambda: make_state(3))
    state, _ = checkpoints.restore(shapes)
    assert raw_bytes(state) == raw_bytes(make_state(3))


def test_a_fresh_run_has_no_latest_and_restore_says_so(tmp_path):
    checkpoints = open_run(tmp_path)
    assert checkpoints.latest() is None
    with pytest.raises(CheckpointError, match="no checkpoint that can be restored"):
        checkpoints.restore(make_state(0))


def test_only_the_newest_stay_and_labelled_ones_are_never_pruned(tmp_path):
    checkpoints = open_run(tmp_path, keep=2)
    checkpoints.save(1, make_state(1), {}, label="warmup")
    for step in (1, 2, 3, 4):
        checkpoints.save(step, make_state(step), {})
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["000000001-warmup", "000000003", "000000004"]
    assert checkpoints.find("warmup") == tmp_path / "checkpoints" / "000000001-warmup"
    assert checkpoints.find("continual") is None


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = save_steps(tmp_path, 4)
    checkpoints.save(4, make_state(9), {"position": 9})
    state, host = checkpoints.restore(make_state(0))
    assert host == {"position": 9} and raw_bytes(state) == raw_bytes(make_state(9))


def test_an_exchange_cut_between_its_renames_keeps_the_old_one(tmp_path):
    save_steps(tmp_path, 4)
    root = tmp_path / "checkpoints"
    (root / "000000004").rename(root / "000000004.replaced.tmp")
    assert open_run(tmp_path).restore(make_state(0))[1] == {"position": 4}


def test_a_flipped_bit_in_any_file_is_seen_and_the_one_before_is_used(tmp_path):
    save_steps(tmp_path, 1, 2)
    newest = tmp_path / "checkpoints" / "000000002"
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    assert len(files) > 5
    for number, file in enumerate(files):
        flip_bit(newest / file, at=number / len(files), bit=number % 8)
        messages = []
        checkpoints = open_run(tmp_path, warn=messages.append)
        state, host = checkpoints.restore(make_state(0))
        assert host == {"position": 1} and raw_bytes(state) == raw_bytes(make_state(1)), file
        assert len(messages) == 1 and "000000002: damaged" in messages[0]
        assert checkpoints.latest() == 1
        aside = tmp_path / "checkpoints" / "000000002.damaged"
        aside.rename(newest)  # and put it right again for the next file
        flip_bit(newest / file, at=number / len(files), bit=number % 8)
    assert open_run(tmp_path).restore(make_state(0))[1] == {"position": 2}


def test_large_files_are_covered_by_the_checksums_of_their_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "HASHED_BYTES", -1)  # as if every file were large
    big = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    checkpoints = open_run(tmp_path, warn=lambda message: None)
    checkpoints.save(1, big, {})
    checkpoints.save(2, big, {})
    data = sorted((tmp_path / "checkpoints/000000002/state").rglob("d/*"))
    flip_bit(max(data, key=lambda path: path.stat().st_size))
    state, _ = checkpoints.restore(big)
    assert checkpoints.latest() == 1 and raw_bytes(state) == raw_bytes(big)


def test_truncated_and_missing_files_are_damage(tmp_path):
    checkpoints = save_steps(tmp_path, 1, 2, 3, warn=lambda message: None)
    root = tmp_path / "checkpoints"
    manifest = root / "000000003" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    (root / "000000002" / "host-0.json").unlink()
    assert checkpoints.restore(make_state(0))[1] == {"position": 1}
    (root / "000000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint that can be restored"):
        checkpoints.restore(make_state(0))
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        checkpoints.latest()


def test_another_configuration_is_refused_with_both_hashes_and_the_keys(tmp_path):
    save_steps(tmp_path, 1, config={"seed": 0, "model": {"layers": 2, "heads": 1}})
    with pytest.raises(CheckpointError) as caught:
        open_run(tmp_path, config_hash="b" * 64, config={"seed": 0, "model": {"layers": 3}})
    message = str(caught.value)
    assert "a" * 12 in message and "b" * 12 in message
    assert "model.heads, model.layers" in message and "seed" not in message


def test_another_model_is_refused_and_nothing_is_set_aside(tmp_path):
    checkpoints = save_steps(tmp_path, 1)
    template = make_state(0)
    template["params"]["scale"] = jnp.ones(5)
    template["params"]["bias"] = jnp.ones(1)
    del template["flag"]
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(template)
    message = str(caught.value)
    assert "params.bias is not in it" in message and "flag is in it only" in message
    assert "params.scale is float32[4] there and float32[5] here" in message
    assert checkpoints.latest() == 1


def test_a_newer_format_is_refused_and_nothing_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "FORMAT", 2)
    save_steps(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 2; this version reads format 1"):
        open_run(tmp_path)
    assert (tmp_path / "checkpoints" / "000000001").is_dir()


def test_what_is_not_a_jax_array_is_refused():
    with pytest.raises(TypeError, match=r"a\.b: a checkpoint holds jax arrays, got float"):
        checkpoint_files.named_leaves({"a": {"b": 1.0}})


def test_weights_are_read_from_another_run_by_label_or_the_latest(tmp_path):
    checkpoints = open_run(tmp_path)
    checkpoints.save(1, make_state(1), {}, label="warmup")
    checkpoints.save(2, make_state(2), {})
    template = {"params": make_state(0)["params"]}
    for location, step in ((f"{tmp_path}@warmup", 1), (str(tmp_path), 2)):
        weights = read_weights(location, template)
        assert raw_bytes(weights) == raw_bytes({"params": make_state(step)["params"]})
    with pytest.raises(CheckpointError, match="labelled 'end' .labels there: warmup"):
        read_weights(f"{tmp_path}@end", template)
    with pytest.raises(CheckpointError, match="is not a run directory"):
        read_weights(str(tmp_path / "nowhere"), template)


def test_reading_weights_passes_over_damage_and_leaves_the_other_run_as_it_is(tmp_path):
    save_steps(tmp_path, 1, 2)
    flip_bit(tmp_path / "checkpoints" / "000000002" / "manifest.json")
    messages = []
    template = {"params": make_state(0)["params"]}
    weights = read_weights(str(tmp_path), template, warn=messages.append)
    assert raw_bytes(weights) == raw_bytes({"params": make_state(1)["params"]})
    assert len(messages) == 1 and (tmp_path / "checkpoints" / "000000002").is_dir()


FULL_DISK = """
    import resource, signal, sys
    import jax
    from jaxlab.errors import CheckpointError
    from jaxlab.training.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep=3, config_hash="a" * 64)
    big = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        checkpoints.save(2, big, {})
    except CheckpointError as error:
        print(error)
"""


def start_python(code: str, directory: Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), str(directory)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment, **options
    )


def test_a_full_disk_leaves_the_earlier_checkpoints_and_one_clear_error(tmp_path):
    checkpoints = save_steps(tmp_path, 1)
    # In a process of its own, because the limit would hold for the writers of other tests as well.
    with start_python(FULL_DISK, tmp_path, stderr=subprocess.DEVNULL) as child:
        lines = child.stdout.read().splitlines()
    assert len(lines) == 1
    assert "000000002: the checkpoint was not written" in lines[0] and "File too large" in lines[0]
    assert lines[0].endswith("earlier ones are untouched")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000001"]
    assert checkpoints.restore(make_state(0))[1] == {"position": 1}


CHILD = """
    import itertools, sys
    import jax.numpy as jnp
    from jaxlab.training.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep=2, config_hash="k")
    first = (checkpoints.latest() or 0) + 1
    for step in itertools.count(first):
        state = {"w": jnp.full((64, 64), step, jnp.float32), "n": jnp.int32(step)}
        checkpoints.save(step, state, {"position": step})
        print(step, flush=True)
"""


def test_a_process_killed_inside_saves_always_leaves_a_whole_newest_checkpoint(tmp_path):
    template = {"w": jnp.zeros((64, 64)), "n": jnp.int32(0)}
    delays = np.random.default_rng(0).uniform(0, 0.08, 3)
    for delay in delays:
        with start_python(CHILD, tmp_path) as child:
            first = child.stdout.readline()
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
            reported = max(int(line) for line in (first + child.stdout.read()).split())
        messages = []
        checkpoints = Checkpoints(tmp_path, keep=2, config_hash="k", warn=messages.append)
        state, host = checkpoints.restore(template)
        assert messages == []
        # A save may finish in the instant between its rename and the report of it.
        assert host["position"] in (reported, reported + 1)
        assert int(state["n"]) == host["position"] and (state["w"] == host["position"]).all()
        assert not list((tmp_path / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint32", "bool"])
def test_every_single_flipped_bit_changes_an_arrays_checksum(dtype):
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 2, 3 * 8 * jnp.dtype(dtype).itemsize, dtype=np.uint8)
    if dtype == "bool":
        clean[:] = 0
    width = 8 * jnp.dtype(dtype).itemsize

    def checksum(bits):
        values = np.packbits(bits, bitorder="little").view(jnp.dtype(dtype))
        return array_checksums({"x": jnp.asarray(values)})["x"]

    # A boolean has one bit that means something.
    flips = range(0, clean.size, width) if dtype == "bool" else range(clean.size)
    seen = {checksum(clean)}
    for position in flips:
        bits = clean.copy()
        bits[position] ^= 1
        seen.add(checksum(bits))
    assert len(seen) == len(flips) + 1


def test_moved_elements_and_exchanged_signs_change_an_arrays_checksum():
    x = jnp.arange(6.0).reshape(2, 3)
    signs = [x.at[0, i].multiply(-1).at[1, j].multiply(-1) for i in (1, 2) for j in range(3)]
    arrays = {str(i): array for i, array in enumerate([x, x[::-1], x.T, *signs])}
    assert len(set(array_checksums(arrays).values())) == len(arrays)


def test_the_host_state_of_other_processes_is_read_when_all_saved_the_same(tmp_path):
    for number, text in enumerate(['{"batch": 7}', '{"batch": 7}']):
        (tmp_path / f"host-{number}.json").write_text(text)
    assert checkpoint_files.read_host(tmp_path, {"processes": 2}) == {"batch": 7}
    (tmp_path / "host-1.json").write_text('{"batch": 8}')
    with pytest.raises(CheckpointError, match="its 2 processes each saved .* resume with 2"):
        checkpoint_files.read_host(tmp_path, {"processes": 2})
