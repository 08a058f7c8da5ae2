"""Configuration of image classification.

Imports neither jax nor numpy, like ``jaxlab.config``: whatever is wrong is found before any device
is touched.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxlab.training_config import (
    OptimizerConfig,
    StageConfig,
    TrainingConfig,
    fraction,
    ire_starts,
    not_negative,
    positive,
    require,
    with_learning_rate,
)

PRESET_NAMES = (
    *("resnet8", "resnet14", "resnet20", "resnet56", "wrn-16-8", "wrn-28-10"),
    *("resnet50", "vit-t-4", "vit-s-4", "vit-s-16"),
)


@dataclass(frozen=True, kw_only=True)
class VisionModelConfig:
    """A named shape of ``jaxlab.models.vision``; its classes and image size are the data's."""

    preset: str
    width: int | None = None  # in place of the preset's (of the first stage, or of the transformer)
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        positive(self, "width")
        unknown = f"no preset is called {self.preset!r}; known: {', '.join(PRESET_NAMES)}"
        require(self.preset in PRESET_NAMES, "preset", unknown)


@dataclass(frozen=True, kw_only=True)
class VisionDataConfig:
    """Where images come from and what training does to them.

    ``basic`` pads small images by four pixels, cuts a window and flips half of them; images over 64
    pixels are cut and resized at random instead. ``randaugment`` adds two random operations of
    magnitude 15 of 30, ``autoaugment`` a random pair of the policy that was found for CIFAR.
    """

    source: str  # folder:PATH or tfds:NAME
    image_size: int = 32
    augment: Literal["none", "basic", "randaugment", "autoaugment"] = "basic"
    normalise: Literal["cifar", "imagenet"] = "cifar"  # whose mean and deviation of the channels
    limit: int | None = None  # training images, spread over the classes; None: all
    test_limit: int | None = None

    def __post_init__(self):
        positive(self, "image_size", "limit", "test_limit")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """One experiment in image classification: everything that decides its numbers.

    ``start_loss`` starts IRE when the running mean of the training loss falls to it, as the paper
    does on CIFAR (arXiv 2405.20763, appendix A), in place of ``optimizer.ire.start_step``.
    """

    workload: Literal["vision"]
    name: str
    seed: int = 0
    model: VisionModelConfig
    data: VisionDataConfig
    optimizer: OptimizerConfig
    stage: StageConfig
    label_smoothing: float = 0.0
    mixup: float | None = None  # both parameters of the Beta distribution of shares; None: without
    start_loss: float | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self):
        require(self.name != "", "name", "must not be empty")
        not_negative(self, "seed")
        positive(self, "mixup", "start_loss")
        fraction(self, "label_smoothing")
        ire, decoders = self.optimizer.ire, "is for the decoder's matrices; choose sgd or adamw"
        name = self.optimizer.name
        require(name in ("adamw", "sgd"), "optimizer.name", f"{name} {decoders}")
        blocks = "names the decoder's kinds of blocks; leave it out"
        require(self.optimizer.blockwise is None, "optimizer.blockwise", blocks)
        whole = "batch norm needs the batch in one piece; set it to 1"
        require(self.stage.accumulation == 1, "stage.accumulation", whole)
        require(
            not self.stage.memory, "stage.memory", "images carry no references; set it to false"
        )
        if self.start_loss is not None:
            require(ire is not None, "start_loss", "starts IRE, which optimizer.ire does not name")
            once = "start_loss decides when IRE starts; set this key to null"
            require(ire.start_step is None, "optimizer.ire.start_step", once)
        else:
            ire_starts(self.optimizer, {"stage": self.stage})
        self._fill_learning_rate()

    def _fill_learning_rate(self) -> None:
        filled = with_learning_rate(self.stage, "stage", self.optimizer)
        object.__setattr__(self, "stage", filled)
