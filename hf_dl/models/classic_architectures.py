"""Tables of the classic convolutional networks, from LeNet-5 to ResNet-152, layer by layer.

Each `Architecture` has the published input, stages of layers and fully connected layers. To add a network, add one
entry to `ARCHITECTURES`. The last linear layer, which has one output per class, is not in the tables.

Differences from the papers:

- LeNet-5 (LeCun et al. 1998): each map of the second convolution sees all six maps; the paper connects subsets.
  Pooling has no trained weights, and a linear layer takes the place of the distances to fixed codes.
- AlexNet (Krizhevsky et al. 2012): the input has 227x227 pixels. The paper says 224, which gives no whole number of
  windows. `alexnet` has the two groups of the paper, `alexnet_one_tower` has none.
- ZFNet (Zeiler & Fergus 2013): local response normalization stands for its contrast normalization.
- VGG (Simonyan & Zisserman 2014): 11, 13, 16 and 19 layers with weights (configurations A, B, D, E).
- GoogLeNet (Szegedy et al. 2014): `googlenet` has batch normalization, no biases, and 3x3 convolutions in the third
  branch, as the network of torchvision, so that its weights load. `googlenet_2014` is the network of the paper.
- ResNet (He et al. 2015): the 3x3 convolution of a bottleneck has the stride, as in torchvision.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from .classic_layers import Conv, Hidden, Inception, Layer, Pool, Residual, ResponseNorm


@dataclass(frozen=True)
class Architecture:
    """A network before its last linear layer.

    Attributes:
        image_size: Height and width of the published input in pixels.
        stages: Names and layers of the stages. `small_stem` replaces the layers of the first stages.
        hidden: Fully connected layers. Without any, the network ends with the mean over the pixels.
        small_stem: The first stages for images of about 32x32 pixels: a 3x3 convolution with stride 1 instead of a
            large kernel with a stride. They replace the stages of the same name.
        dropout: Dropout probability before the last linear layer.
        num_channels: Channels of the published input.
        num_labels: Number of published classes.
        auxiliary: Stages after which an auxiliary classifier learns with the network.
        norm: Whether the auxiliary classifiers have batch normalization.
        paper: The paper.
    """

    image_size: int
    stages: dict[str, Sequence[Layer]]
    paper: str
    hidden: Sequence[Hidden] = ()
    small_stem: dict[str, Sequence[Layer]] = field(default_factory=dict)
    dropout: float = 0.0
    num_channels: int = 3
    num_labels: int = 1000
    auxiliary: Sequence[str] = ()
    norm: bool = False

    def layers(self, small_stem: bool = False) -> dict[str, Sequence[Layer]]:
        """Return the stages, with the small stem if requested."""
        return {**self.stages, **(self.small_stem if small_stem else {})}

    def sizes(self, image_size: int, small_stem: bool = False) -> list[tuple[str, int, str]]:
        """Return the stage, the output size and the arithmetic of each layer that changes the size.

        Args:
            image_size: Height and width of the input in pixels.
            small_stem: Whether the network has the small stem.

        Returns:
            One row per layer. The rows end with the first size that is less than 1.
        """
        rows, size = [], image_size
        for stage, layers in self.layers(small_stem).items():
            for layer in layers:
                for out, formula in layer.steps(size):
                    rows.append((stage, out, formula))
                    if out < 1:
                        return rows
                    size = out
        return rows


# ---------------------------------------------------------------------------------------------------------------------
# LeNet-5, AlexNet, ZFNet

_LENET5 = Architecture(
    image_size=32,
    num_channels=1,
    num_labels=10,
    stages={
        "conv1": [Conv(6, 5, activation=nn.Tanh), Pool(2, 2, mean=True)],  # 28x28, 14x14
        "conv2": [Conv(16, 5, activation=nn.Tanh), Pool(2, 2, mean=True)],  # 10x10, 5x5
    },
    hidden=[Hidden(120, activation=nn.Tanh), Hidden(84, activation=nn.Tanh)],
    paper="LeCun et al. 1998, Gradient-based learning applied to document recognition",
)

_FULLY_CONNECTED = [Hidden(4096, dropout=0.5, dropout_first=True), Hidden(4096, dropout=0.5, dropout_first=True)]


def _alexnet(groups: int) -> Architecture:
    return Architecture(
        image_size=227,
        stages={
            "conv1": [Conv(96, 11, stride=4), ResponseNorm(), Pool(3, 2)],  # 55x55, 27x27
            "conv2": [Conv(256, 5, padding=2, groups=groups), ResponseNorm(), Pool(3, 2)],  # 27x27, 13x13
            "conv3": [Conv(384, 3, padding=1)],
            "conv4": [Conv(384, 3, padding=1, groups=groups)],
            "conv5": [Conv(256, 3, padding=1, groups=groups), Pool(3, 2)],  # 13x13, 6x6
        },
        small_stem={"conv1": [Conv(96, 3, padding=1), ResponseNorm(), Pool(3, 2)]},
        hidden=_FULLY_CONNECTED,
        paper="Krizhevsky et al. 2012, ImageNet classification with deep convolutional neural networks",
    )


_ZFNET = Architecture(
    image_size=224,
    stages={
        "conv1": [Conv(96, 7, stride=2, padding=1), Pool(3, 2, ceil=True), ResponseNorm()],  # 110x110, 55x55
        "conv2": [Conv(256, 5, stride=2), Pool(3, 2, ceil=True), ResponseNorm()],  # 26x26, 13x13
        "conv3": [Conv(384, 3, padding=1)],
        "conv4": [Conv(384, 3, padding=1)],
        "conv5": [Conv(256, 3, padding=1), Pool(3, 2)],  # 13x13, 6x6
    },
    small_stem={"conv1": [Conv(96, 3, padding=1), Pool(3, 2, ceil=True), ResponseNorm()]},
    hidden=_FULLY_CONNECTED,
    paper="Zeiler & Fergus 2013, Visualizing and understanding convolutional networks, https://arxiv.org/abs/1311.2901",
)

# ---------------------------------------------------------------------------------------------------------------------
# VGG: 3x3 convolutions only; the size halves after each stage. 224, 112, 56, 28, 14, 7

_VGG_WIDTHS = (64, 128, 256, 512, 512)


def _vgg(depths: Sequence[int], norm: bool = False) -> Architecture:
    stages = {}
    for index, (depth, width) in enumerate(zip(depths, _VGG_WIDTHS, strict=True), 1):
        stages[f"conv{index}"] = [Conv(width, 3, padding=1, norm=norm)] * depth + [Pool(2, 2)]
    return Architecture(
        image_size=224,
        stages=stages,
        hidden=[Hidden(4096, dropout=0.5), Hidden(4096, dropout=0.5)],
        paper="Simonyan & Zisserman 2014, Very deep convolutional networks, https://arxiv.org/abs/1409.1556",
    )


# ---------------------------------------------------------------------------------------------------------------------
# GoogLeNet

_INCEPTIONS = {  # 1x1; 1x1 and 3x3; 1x1 and 5x5; 1x1 after pooling
    "3a": (64, (96, 128), (16, 32), 32),
    "3b": (128, (128, 192), (32, 96), 64),
    "4a": (192, (96, 208), (16, 48), 64),
    "4b": (160, (112, 224), (24, 64), 64),
    "4c": (128, (128, 256), (24, 64), 64),
    "4d": (112, (144, 288), (32, 64), 64),
    "4e": (256, (160, 320), (32, 128), 128),
    "5a": (256, (160, 320), (32, 128), 128),
    "5b": (384, (192, 384), (48, 128), 128),
}


def _googlenet(published: bool) -> Architecture:
    options = {"norm": not published, "eps": 1e-3, "bias": published}
    pool, last_pool = Pool(3, 2, ceil=True), Pool(3 if published else 2, 2, ceil=True)
    response = [ResponseNorm()] if published else []
    modules = {
        name: Inception(*row, kernel=5 if published else 3, norm=not published) for name, row in _INCEPTIONS.items()
    }
    return Architecture(
        image_size=224,
        stages={
            "conv1": [Conv(64, 7, stride=2, padding=3, **options), pool, *response],  # 112x112, 56x56
            "conv2": [Conv(64, 1, **options), Conv(192, 3, padding=1, **options), *response, pool],  # 28x28
            "inception3": [modules["3a"], modules["3b"], pool],  # 14x14
            "inception4a": [modules["4a"]],
            "inception4d": [modules["4b"], modules["4c"], modules["4d"]],
            "inception4e": [modules["4e"], last_pool],  # 7x7
            "inception5": [modules["5a"], modules["5b"]],
        },
        small_stem={"conv1": [Conv(64, 3, padding=1, **options), *response]},
        dropout=0.4 if published else 0.2,
        auxiliary=("inception4a", "inception4d"),
        norm=not published,
        paper="Szegedy et al. 2014, Going deeper with convolutions, https://arxiv.org/abs/1409.4842",
    )


# ---------------------------------------------------------------------------------------------------------------------
# ResNet: 112x112 after the first convolution, then 56, 28, 14, 7


def _resnet(depths: Sequence[int], bottleneck: bool) -> Architecture:
    stages = {"conv1": [Conv(64, 7, stride=2, padding=3, norm=True, bias=False), Pool(3, 2, padding=1)]}
    for index, depth in enumerate(depths):
        stages[f"conv{index + 2}"] = [Residual(depth, 64 * 2**index, 1 if index == 0 else 2, bottleneck)]
    return Architecture(
        image_size=224,
        stages=stages,
        small_stem={"conv1": [Conv(64, 3, padding=1, norm=True, bias=False)]},
        paper="He et al. 2015, Deep residual learning for image recognition, https://arxiv.org/abs/1512.03385",
    )


ARCHITECTURES: dict[str, Architecture] = {
    "lenet5": _LENET5,
    "alexnet": _alexnet(groups=2),
    "alexnet_one_tower": _alexnet(groups=1),
    "zfnet": _ZFNET,
    "vgg11": _vgg((1, 1, 2, 2, 2)),
    "vgg13": _vgg((2, 2, 2, 2, 2)),
    "vgg16": _vgg((2, 2, 3, 3, 3)),
    "vgg19": _vgg((2, 2, 4, 4, 4)),
    "vgg11_bn": _vgg((1, 1, 2, 2, 2), norm=True),
    "vgg13_bn": _vgg((2, 2, 2, 2, 2), norm=True),
    "vgg16_bn": _vgg((2, 2, 3, 3, 3), norm=True),
    "vgg19_bn": _vgg((2, 2, 4, 4, 4), norm=True),
    "googlenet": _googlenet(published=False),
    "googlenet_2014": _googlenet(published=True),
    "resnet18": _resnet((2, 2, 2, 2), bottleneck=False),
    "resnet34": _resnet((3, 4, 6, 3), bottleneck=False),
    "resnet50": _resnet((3, 4, 6, 3), bottleneck=True),
    "resnet101": _resnet((3, 4, 23, 3), bottleneck=True),
    "resnet152": _resnet((3, 8, 36, 3), bottleneck=True),
}
"""The networks by name."""
