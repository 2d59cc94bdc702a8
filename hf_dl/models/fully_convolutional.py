"""Classic networks as sliding windows: linear layers become convolutions (Sermanet et al. 2013, OverFeat).

A linear layer on a feature map of s x s pixels is a convolution with an s x s kernel. The linear layers after it are
1x1 convolutions. On a larger image, the network then classifies each window of the training size, at all
positions that are `stride` pixels apart, and computes overlapping windows only once:

    VGG-16, 384x384 pixels:  12x12 features, a kernel of 7x7, 6x6 windows of 224x224 pixels

The mean over the pixels of GoogLeNet and ResNet becomes average pooling with a stride of 1.

Windows of a network without padding get the same logits as separate crops. With padding, the border of a crop sees
zeros, and a window sees its neighborhood, so that the logits differ.

Sermanet et al. 2013, OverFeat, https://arxiv.org/abs/1312.6229
"""

import copy
import math

import torch
from torch import nn

from .classic_cnn import ClassicCNNForImageClassification


class FullyConvolutionalCNN(nn.Module):
    """A classic network that returns a map of logits for images of any size. Made by `to_fully_convolutional`.

    Attributes:
        window: Side of the image area that a position of the map classifies, in pixels.
        stride: Pixels between the windows of neighboring positions.
    """

    def __init__(self, features: nn.Module, classifier: nn.Module, *, window: int, stride: int):
        super().__init__()
        self.features, self.classifier = features, classifier
        self.window, self.stride = window, stride

    def extra_repr(self) -> str:
        """Return the text that `print` shows in the parentheses of the model."""
        return f"windows of {self.window} pixels, stride {self.stride}"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Classify all windows of images.

        Args:
            pixel_values: (batch, channels, height, width), at least as large as a window.

        Returns:
            Logits, (batch, num_labels, rows, columns).

        Raises:
            ValueError: If the images are smaller than a window.
        """
        if pixel_values.ndim != 4 or min(pixel_values.shape[2:]) < self.window:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, channels, height, width) with "
                f"at least {self.window}x{self.window} pixels."
            )
        return self.classifier(self.features(pixel_values))


def to_fully_convolutional(model: ClassicCNNForImageClassification) -> FullyConvolutionalCNN:
    """Turn the linear layers of a classic network into convolutions.

    Args:
        model: The network. It is copied and does not change.

    Returns:
        The network with the same weights, in the same mode. For images of the size of the config, it returns the
        logits of `model` as a map of one position.

    Example:
        ```python
        >>> from hf_dl.models.classic_cnn import ClassicCNNConfig
        >>> model = ClassicCNNForImageClassification(ClassicCNNConfig.published("lenet5")).eval()
        >>> to_fully_convolutional(model)(torch.zeros(1, 1, 52, 52)).shape
        torch.Size([1, 10, 6, 6])

        ```
    """
    config, base = model.config, copy.deepcopy(model.classic_cnn)
    rows = config.sizes()
    side = rows[-1][1] if rows else config.image_size
    layers = [layer for stage in config.network.layers(config.small_stem).values() for layer in stage]
    parts: list[nn.Module] = []
    if base.hidden is None:
        parts.append(nn.AvgPool2d(side, stride=1))
        kernel = 1
    else:
        kernel = side
        for block in base.hidden:
            converted = [_convert(part, kernel) if isinstance(part, nn.Linear) else part for part in block]
            parts.append(nn.Sequential(*converted))
            kernel = 1
    parts += [copy.deepcopy(model.dropout), _convert(model.classifier, kernel)]
    features = nn.Sequential(*base.stages.values())
    stride = math.prod(getattr(layer, "stride", 1) for layer in layers)
    found = FullyConvolutionalCNN(features, nn.Sequential(*parts), window=config.image_size, stride=stride)
    return found.train(model.training)


@torch.no_grad()
def _convert(linear: nn.Linear, kernel: int) -> nn.Conv2d:
    """Make the convolution whose output for a single window is the output of a linear layer."""
    channels = linear.in_features // kernel**2
    convolution = nn.Conv2d(
        channels, linear.out_features, kernel, device=linear.weight.device, dtype=linear.weight.dtype
    )
    convolution.weight.copy_(linear.weight.view(linear.out_features, channels, kernel, kernel))
    convolution.bias.copy_(linear.bias)
    return convolution
