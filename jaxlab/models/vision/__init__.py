"""Image classifiers: residual networks and vision transformers, NHWC."""

from jaxlab.models.vision.model import VisionModel
from jaxlab.models.vision.presets import PRESETS, VisionShape

__all__ = ["PRESETS", "VisionModel", "VisionShape"]
