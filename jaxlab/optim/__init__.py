"""Gradient transformations, learning-rate schedules and the factory that chains them."""

from jaxlab.optim.factory import decay_mask, make_optimizer
from jaxlab.optim.schedules import make_schedule

__all__ = ["decay_mask", "make_optimizer", "make_schedule"]
