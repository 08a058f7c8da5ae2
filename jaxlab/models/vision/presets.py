"""Named shapes of image models."""

from jaxlab.models.vision.resnet import ResNetShape, cifar_resnet, imagenet_resnet, wide_resnet
from jaxlab.models.vision.vit import ViTShape

VisionShape = ResNetShape | ViTShape

# The shapes of IRE's experiments (arXiv 2405.20763, section 4.1); resnet8 to resnet20 are the same
# family for studies on a CPU. The ViTs are DeiT's tiny and small with CIFAR's patches.
PRESETS: dict[str, VisionShape] = {
    "resnet8": cifar_resnet(8),
    "resnet14": cifar_resnet(14),
    "resnet20": cifar_resnet(20),
    "resnet56": cifar_resnet(56),
    "wrn-16-8": wide_resnet(16, 8),
    "wrn-28-10": wide_resnet(28, 10),
    "resnet50": imagenet_resnet((3, 4, 6, 3)),
    "vit-t-4": ViTShape(patch=4, width=192, depth=12, heads=3),
    "vit-s-4": ViTShape(patch=4, width=384, depth=12, heads=6),
    "vit-s-16": ViTShape(patch=16, width=384, depth=12, heads=6),
}
