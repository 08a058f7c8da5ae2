"""Training on eight devices is training on one."""

import random
from pathlib import Path

import numpy as np
import pytest

from tests.eight_devices import run_module
from tests.integration.tiny_run import CONFIG, pages

# Sums over devices come in another order, and two stages of two and three steps carry it on.
TOLERANCE = 1e-5


def write_config(folder: Path) -> Path:
    """A tiny run whose sizes eight devices divide, as ``tiny.yaml`` in the folder."""
    (folder / "corpus.jsonl").write_text(pages(random.Random(0)))
    text = CONFIG.replace("CORPUS", str(folder / "corpus.jsonl"))
    text = text.replace("heads: 2\n  kv_heads: 1", "heads: 4\n  kv_heads: 2")
    text = text.replace("batch_size: 2", "batch_size: 8").replace("keep: 1", "keep: 3")
    text = text.replace("evaluate_every: 1", "evaluate_every: 0")
    (folder / "tiny.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, list[float]]:
    folder = write_config(tmp_path_factory.mktemp("meshes"))
    files = str(folder / "tiny.yaml"), str(folder)
    return run_module("tests.sharding.on_eight_devices", *files)


def test_the_losses_of_both_stages_with_ire_are_those_of_one_device(losses):
    """What changes the mesh on the way is in test_processes.py."""
    assert len(losses["eight devices"]) == 7
    np.testing.assert_allclose(losses["eight devices"], losses["one device"], rtol=TOLERANCE)
