"""Gradient transformations, learning-rate schedules and the factory that chains them."""

from jaxlab.optim.factory import decay_mask, make_optimizer
from jaxlab.optim.ire import FlatDirectionsState, ire, refresh_flat_mask, scale_flat_directions
from jaxlab.optim.sam import AverageSamState, average_sam, sam
from jaxlab.optim.schedules import make_schedule

__all__ = [
    "AverageSamState",
    "FlatDirectionsState",
    "average_sam",
    "decay_mask",
    "ire",
    "make_optimizer",
    "make_schedule",
    "refresh_flat_mask",
    "sam",
    "scale_flat_directions",
]
