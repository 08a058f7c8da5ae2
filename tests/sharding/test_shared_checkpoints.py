"""Checkpoints that several processes write and read: what one cannot do, none believes done."""

import jax.numpy as jnp
import numpy as np

from jaxlab.training.checkpoint import Checkpoints
from tests.sharding.two_processes import run_two

# Starts, and saves an array that no process holds whole; Orbax keeps smaller ones elsewhere.
SAVE = """
import sys
from pathlib import Path
from jaxlab.sharding.multihost import start
start()
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from jaxlab.config import MeshConfig
from jaxlab.errors import CheckpointError
from jaxlab.sharding.mesh import make_mesh
from jaxlab.training import checkpoint, checkpoint_files
cut = NamedSharding(make_mesh(MeshConfig()), PartitionSpec("fsdp"))
weights = jax.jit(lambda: jnp.arange(4096.0).reshape(8, 512), out_shardings=cut)()
root, mine = Path(sys.argv[1]), jax.process_index()
run = checkpoint.Checkpoints(root, keep=2, config_hash="a" * 64)
run.save(3, {"weights": weights}, {"step": 3})
"""
# Saves again and again, and each time one process fails in one part of it.
FAIL = """
handler = ocp.PyTreeCheckpointHandler
parts = [(Path, "mkdir", 0), (checkpoint_files, "_lack_of_room", 1), (handler, "save", 0),
         (handler, "save", 1), (handler, "finalize", 0), (checkpoint, "_publish", 0)]
def fails(*_, **__):
    raise OSError("the disk is gone")
for owner, name, process in parts:
    works = getattr(owner, name)
    setattr(owner, name, fails if mine == process else works)
    try:
        run.save(4, {"weights": weights}, {"step": 4})
    except CheckpointError as error:
        print(name, run.latest(), str(error).partition("not written: ")[2].partition(";")[0])
    setattr(owner, name, works)
run.save(4, {"weights": weights}, {"step": 4})
print(*sorted(path.name for path in (root / "checkpoints").iterdir()))
"""
# Saves again, as if every file were large: then the arrays' own checksums cover it.
AGAIN = """
checkpoint_files.HASHED_BYTES = -1
run.save(4, {"weights": weights}, {"step": 4})
"""
RESTORE = """
state, position = run.restore({"weights": weights})
print(position["step"], float(jnp.sum(state["weights"])))
"""


def test_what_two_processes_save_one_restores_with_its_position(tmp_path):
    run_two(SAVE, str(tmp_path))
    template = {"weights": jnp.zeros((8, 512))}
    restored, position = Checkpoints(tmp_path, keep=1, config_hash="a" * 64).restore(template)
    np.testing.assert_array_equal(restored["weights"], np.arange(4096).reshape(8, 512))
    assert position == {"step": 3}


def test_a_part_that_one_process_cannot_write_leaves_none_believing_in_the_save(tmp_path):
    said = [out.splitlines() for out in run_two(SAVE + FAIL, str(tmp_path))]
    parts = [("mkdir", 0), ("_lack_of_room", 1), ("save", 0), ("save", 1)]
    parts += [("finalize", 0), ("_publish", 0)]
    for mine, lines in enumerate(said):
        expected = [
            f"{name} 3 {f'process {process}: ' * (process != mine)}the disk is gone"
            for name, process in parts
        ]
        assert lines == [*expected, "000000003 000000004"]


def test_what_one_process_finds_damaged_all_pass_over_and_nothing_else(tmp_path):
    run_two(SAVE + AGAIN, str(tmp_path))
    files = list(tmp_path.glob("checkpoints/000000004/state/ocdbt.process_1/d/*"))
    assert files
    for path in files:
        path.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))
    before = SAVE.rpartition("run.save")[0]
    said = [out.splitlines() for out in run_two(before + RESTORE, str(tmp_path))]
    assert [lines[-1] for lines in said] == ["3 8386560.0", "3 8386560.0"]
    assert any("000000004: damaged (process 1: the arrays cannot be read" in x for x in said[0])
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["000000003", "000000004.damaged"]
