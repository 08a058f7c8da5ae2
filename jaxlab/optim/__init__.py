"""Gradient transformations, learning-rate schedules and the factory that chains them."""

from jaxlab.optim.blocks import block_labels
from jaxlab.optim.factory import decay_mask, make_optimizer
from jaxlab.optim.flat_mask import FlatDirectionsState, flat_fractions, flat_shares
from jaxlab.optim.followups import BLOCKWISE, grad_power, scale_by_block
from jaxlab.optim.ire import ire, refresh_flat_mask, scale_flat_directions
from jaxlab.optim.lite import LiteMuonState, lite_muon
from jaxlab.optim.sam import AverageSamState, average_sam, sam
from jaxlab.optim.schedules import make_schedule

__all__ = [
    "BLOCKWISE",
    "AverageSamState",
    "FlatDirectionsState",
    "LiteMuonState",
    "average_sam",
    "block_labels",
    "decay_mask",
    "flat_fractions",
    "flat_shares",
    "grad_power",
    "ire",
    "lite_muon",
    "make_optimizer",
    "make_schedule",
    "refresh_flat_mask",
    "sam",
    "scale_by_block",
    "scale_flat_directions",
]
