"""Configuration of the problems with known flat directions: they have no settings."""

from dataclasses import dataclass
from typing import Literal

from jaxlab.training_config import require


@dataclass(frozen=True, kw_only=True)
class FlatToysConfig:
    """All of them, as the tests hold them."""

    workload: Literal["flat-toys"]
    name: str

    def __post_init__(self):
        require(self.name != "", "name", "must not be empty")
