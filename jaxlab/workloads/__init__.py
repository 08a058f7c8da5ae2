"""What ``jaxlab train`` can run: the ``workload`` of a configuration decides."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["WORKLOADS", "Workload", "config_class", "trainer"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Where a workload's configuration class and its ``train(config, run)`` are, MODULE:NAME.

    ``together``: several processes may train as one.
    """

    config: str
    train: str
    together: bool = False


# Named and not imported: a configuration is checked without jax.
WORKLOADS: dict[str, Workload] = {
    "language-model": Workload(
        "jaxlab.config:ExperimentConfig", "jaxlab.training.loop:train", together=True
    ),
    "vision": Workload(
        "jaxlab.workloads.vision_config:VisionConfig", "jaxlab.workloads.vision:train_vision"
    ),
    "flat-toys": Workload(
        "jaxlab.workloads.flat_toys_config:FlatToysConfig",
        "jaxlab.workloads.flat_toys:train_flat_toys",
    ),
}


def config_class(workload: str) -> type:
    """The configuration class of a workload."""
    return _imported(WORKLOADS[workload].config)


def trainer(workload: str) -> Callable[..., Any]:
    """The function that runs a workload, given its configuration and a run directory.

    Raises ConfigError in one of several processes when the workload is not shared among them.
    """
    if not WORKLOADS[workload].together:
        from jaxlab.sharding.processes import refuse_several

        refuse_several(f"workload {workload}")
    return _imported(WORKLOADS[workload].train)


def _imported(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
