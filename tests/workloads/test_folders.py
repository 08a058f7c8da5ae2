"""A run's directory belongs to one workload, whichever comes second."""

from pathlib import Path

import pytest

from jaxlab.config import load_config, save_yaml
from jaxlab.errors import CheckpointError
from jaxlab.training.folder import CONFIG_FILE, refuse_other_workload
from jaxlab.workloads import WORKLOADS, trainer

CONFIGS = {
    "language-model": "demo.yaml",
    "vision": "vision_small.yaml",
    "flat-toys": "flat_toys.yaml",
}


def config_of(workload: str):
    return load_config(Path(__file__).parents[2] / "configs" / CONFIGS[workload])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("second", WORKLOADS)
@pytest.mark.parametrize("first", WORKLOADS)
def test_a_run_of_another_workload_is_refused_and_stays_as_it_is(first, second, tmp_path):
    save_yaml(config_of(first), tmp_path / CONFIG_FILE)
    before = contents(tmp_path)
    if first == second:
        refuse_other_workload(config_of(second), tmp_path)
        return
    with pytest.raises(
        CheckpointError, match=f"holds a run of workload {first}, .* is of {second}; use another"
    ):
        trainer(second)(config_of(second), tmp_path)
    assert contents(tmp_path) == before


def test_a_new_folder_and_one_whose_configuration_is_damaged_are_anybodys(tmp_path):
    refuse_other_workload(config_of("vision"), tmp_path / "new")
    (tmp_path / CONFIG_FILE).write_text("")
    refuse_other_workload(config_of("vision"), tmp_path)
