"""Whose a run's directory is: the configuration that lies in it says."""

from pathlib import Path
from typing import Any

from jaxlab import strict_yaml
from jaxlab.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.yaml"


def refuse_other_workload(config: Any, run: Path) -> None:
    """Raise CheckpointError when ``run`` holds a run of another workload, before it is touched."""
    try:
        there = strict_yaml.read_mapping(run / CONFIG_FILE).get("workload", "language-model")
    except ConfigError:
        return  # there is none, or one that was damaged, which the run writes anew
    if there != config.workload:
        raise CheckpointError(
            f"{run}: holds a run of workload {there}, and this configuration is of "
            f"{config.workload}; use another run directory"
        )
