"""Encoders of the slot autoencoder: an image becomes a grid of tokens, which slot attention reads.

To add a convolutional network, write a function like `make_cnn` and add it to `ENCODERS`.
"""

from collections.abc import Callable

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import PreTrainedConfig

from .layers_position import PositionEmbedding


def make_cnn(config: PreTrainedConfig) -> tuple[nn.Module, int]:
    """Build 5x5 convolutions with ReLU, as in Locatello et al. 2020.

    Args:
        config: A `SlotAutoencoderConfig`; `encoder_channels` and `encoder_strides` have one entry per convolution.

    Returns:
        The network, (batch, num_channels, height, width) to (batch, channels, rows, columns), and its `channels`.
    """
    layers, channels = [], config.num_channels
    for width, stride in zip(config.encoder_channels, config.encoder_strides, strict=True):
        layers += [nn.Conv2d(channels, width, 5, stride=stride, padding=2), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers), channels


def make_resnet18(config: PreTrainedConfig) -> tuple[nn.Module, int]:
    """Build ResNet-18 with group normalization and stride 4, as in SlotDiffusion's CLEVRTex baseline.

    Small images need a small stride. The stem is therefore a 3x3 convolution of stride 1 without pooling, followed by
    the first three stages only, with strides 1, 2 and 2.

    Args:
        config: A `SlotAutoencoderConfig`.

    Returns:
        The network and its number of output channels, as from `make_cnn`.
    """
    resnet = ResNet(BasicBlock, [2, 2, 2, 2], norm_layer=lambda channels: nn.GroupNorm(32, channels))
    stem = nn.Conv2d(config.num_channels, 64, 3, padding=1, bias=False)
    return nn.Sequential(stem, resnet.bn1, nn.ReLU(), resnet.layer1, resnet.layer2, resnet.layer3), 256


ENCODERS: dict[str, Callable[[PreTrainedConfig], tuple[nn.Module, int]]] = {
    "cnn": make_cnn,
    "resnet18": make_resnet18,
}
"""The convolutional networks by name."""


class SlotEncoder(nn.Module):
    """Encode images (batch, channels, height, width) as tokens (batch, tokens, token_dim).

    A convolutional network, a position embedding, layer normalization, and an MLP per token.

    Args:
        config: A `SlotAutoencoderConfig`; `encoder_type` is a key of `ENCODERS`.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.backbone, channels = ENCODERS[config.encoder_type](config)
        self.position = PositionEmbedding(channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, config.token_dim), nn.ReLU(), nn.Linear(config.token_dim, config.token_dim)
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images. The tokens are in row-major order."""
        features = self.backbone(pixel_values).permute(0, 2, 3, 1)  # (batch, height, width, channels)
        features = features + self.position.grid(*features.shape[1:3], like=features)
        return self.mlp(self.norm(features.flatten(1, 2)))
