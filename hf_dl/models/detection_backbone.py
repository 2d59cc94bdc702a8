"""The shared backbone of the detectors: images in, one feature map with a cell per 8x8 pixels out.

`backbone` of the config names the network:

* "small": a residual network with strides 2, 4, 8 and 16, for images of about 128 to 320 pixels. It has 0.5 million
  parameters.
* A key of `CLASSIFIERS`: one of our image classifiers without its output layer. `backbone_options` sets the fields of
  its config.
* "timm/NAME": a convolutional network of timm, such as "timm/resnet18".

1x1 convolutions map the feature maps with strides of 8 and more to the same number of channels. The maps are enlarged
to stride 8 and added, as in Lin et al., "Feature pyramid networks for object detection", CVPR 2017,
https://arxiv.org/abs/1612.03144. Difference: the result is one map instead of a pyramid.
"""

import difflib
import importlib
import json
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .classic_cnn import ClassicCNNConfig, ClassicCNNModel
from .conv_classifier import ConvClassifierConfig, ConvClassifierModel
from .norm_resnet import NormResNetConfig, NormResNetModel
from .small_vit import SmallViTConfig, SmallViTModel

STRIDE = 8  # pixels per cell of the feature map, along each axis
WIDTHS = (16, 32, 64, 96)  # channels of "small" at strides 2, 4, 8 and 16


@strict
class DetectionConfig(PreTrainedConfig):
    """The fields that the configurations of all detectors share.

    Args:
        backbone: "small", a key of `CLASSIFIERS`, or "timm/NAME".
        backbone_options: Fields of the config of a classifier of ours, such as {"n": 2}. Values must be JSON types.
        feature_size: Channels of the feature map.
        num_labels: Number of classes. `id2label` names them.
    """

    backbone: str = "small"
    backbone_options: dict[str, Any] | None = None
    feature_size: int = 64

    def __post_init__(self, **kwargs):
        """Convert fields to JSON types, so that a config that was saved and loaded is equal to the original."""
        self.backbone_options = json.loads(json.dumps(self.backbone_options))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid or does not fit another field.
        """
        if self.backbone != "small" and self.backbone not in CLASSIFIERS and not self.backbone.startswith("timm/"):
            raise ValueError(
                f"backbone={self.backbone!r} is unknown. Choose one of: small, {', '.join(CLASSIFIERS)}; or timm/NAME."
            )
        if self.backbone_options and self.backbone not in CLASSIFIERS:
            raise ValueError(
                f"backbone_options={self.backbone_options} needs one of our classifiers, not backbone="
                f"{self.backbone!r}. Choose one of: {', '.join(CLASSIFIERS)}."
            )
        if self.feature_size < 1:
            raise ValueError(f"feature_size={self.feature_size} must be at least 1.")


class ConvNorm(nn.Sequential):
    """A convolution and batch normalization, without activation."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1):
        convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))) with 3x3 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = ConvNorm(channels, channels), ConvNorm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x, (batch, channels, height, width)."""
        return F.relu(x + self.second(F.relu(self.first(x))))


class SmallTrunk(nn.Module):
    """The network "small": four strided convolutions, with 0, 1, 1 and 2 residual blocks after them."""

    def __init__(self):
        super().__init__()
        self.stages, channels = nn.ModuleList(), 3
        for width, blocks in zip(WIDTHS, (0, 1, 1, 2), strict=True):
            layers = [ConvNorm(channels, width, stride=2), nn.ReLU(), *(ResidualBlock(width) for _ in range(blocks))]
            self.stages.append(nn.Sequential(*layers))
            channels = width

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Return the feature map of each stage."""
        return _run(self.stages, pixel_values)


class ClassifierTrunk(nn.Module):
    """The stages of one of our classifiers."""

    def __init__(self, name: str, options: dict[str, Any]):
        super().__init__()
        config_class, model_class = CLASSIFIERS[name]
        config = config_class(**options)
        if config.num_channels != 3:
            raise ValueError(f"num_channels={config.num_channels} of backbone={name!r} is not supported. Expected 3.")
        self.network = model_class(config)
        if isinstance(getattr(self.network, "hidden", None), nn.Module):
            self.network.hidden = None  # the linear layers after the feature maps

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Return the feature map of each stage."""
        if isinstance(self.network, SmallViTModel):
            return [self._patches(pixel_values)]
        stem = [] if not hasattr(self.network, "stem") else [self.network.stem, F.relu]
        stages = self.network.stages
        return _run([*stages.values()] if isinstance(stages, nn.ModuleDict) else stages, _apply(stem, pixel_values))

    def _patches(self, pixel_values: Tensor) -> Tensor:
        network = self.network
        size = network.config.patch_size
        rows, columns = (side // size for side in pixel_values.shape[-2:])
        tokens = network.embeddings(pixel_values)
        for block in network.blocks:
            tokens, _ = block(tokens)
        return network.norm(tokens)[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))


class TimmTrunk(nn.Module):
    """A network of timm that returns its feature maps."""

    def __init__(self, name: str, *, pretrained: bool = False):
        super().__init__()
        # not an import statement: a checkpoint with another backbone loads without timm
        timm = importlib.import_module("timm")
        architecture = name.split(".")[0]
        if not timm.is_model(architecture):
            close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
            hint = f" Similar names: {', '.join(close)}." if close else ""
            raise ValueError(f"backbone='timm/{name}' is unknown: timm has no model {architecture!r}.{hint}")
        try:
            self.network = timm.create_model(name, pretrained=pretrained, features_only=True)
        except (RuntimeError, AttributeError, AssertionError) as error:
            raise ValueError(
                f"backbone='timm/{name}' has no feature maps. Choose a convolutional network such as timm/resnet18."
            ) from error

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Return the feature map of each stage."""
        return self.network(pixel_values)


CLASSIFIERS: dict[str, tuple[type, type]] = {
    "norm_resnet": (NormResNetConfig, NormResNetModel),
    "conv_classifier": (ConvClassifierConfig, ConvClassifierModel),
    "classic_cnn": (ClassicCNNConfig, ClassicCNNModel),
    "small_vit": (SmallViTConfig, SmallViTModel),
}


class DetectionBackbone(nn.Module):
    """The network of `config.backbone`, whose coarse feature maps are merged to one with a stride of 8 pixels.

    Attributes:
        channels: Channels of the feature map, `config.feature_size`.
        stride: Pixels per cell of the feature map.

    Args:
        config: The configuration.

    Raises:
        ValueError: If the network cannot be made or has no feature map with stride 8 or less.

    Example:
        >>> backbone = DetectionBackbone(DetectionConfig())
        >>> backbone(torch.zeros(2, 3, 64, 96)).shape
        torch.Size([2, 64, 8, 12])
    """

    stride = STRIDE

    def __init__(self, config: DetectionConfig):
        super().__init__()
        self.channels, name = config.feature_size, config.backbone
        if name == "small":
            self.trunk = SmallTrunk()
        elif name in CLASSIFIERS:
            self.trunk = ClassifierTrunk(name, config.backbone_options or {})
        else:
            self.trunk = TimmTrunk(name.removeprefix("timm/"))
        strides, channels = _measure(self.trunk)
        last = {stride: number for number, stride in enumerate(strides)}  # the last map of each stride
        finest = max((stride for stride in (1, 2, 4, STRIDE) if stride in last), default=None)
        if finest is None:
            raise ValueError(
                f"backbone={name!r} has feature maps with strides {strides}, expected a stride of 1, 2, 4 or "
                f"{STRIDE}. Choose a convolutional network such as timm/resnet18, or small_vit with a patch_size of 8."
            )
        coarser = (2 * STRIDE, 4 * STRIDE) if finest == STRIDE else ()
        self.used = [last[stride] for stride in (finest, *coarser) if stride in last]
        self.reduce, width = nn.Sequential(), channels[self.used[0]]
        for _ in range((STRIDE // finest).bit_length() - 1):
            self.reduce.append(nn.Sequential(ConvNorm(width, self.channels, stride=2), nn.ReLU()))
            width = self.channels
        widths = [width, *(channels[number] for number in self.used[1:])]
        self.lateral = nn.ModuleList(self._map(width, first=number == 0) for number, width in enumerate(widths))

    def _map(self, width: int, *, first: bool) -> nn.Module:
        return nn.Identity() if first and width == self.channels else ConvNorm(width, self.channels, kernel=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Compute the feature map.

        Args:
            pixel_values: (batch, 3, height, width). Height and width are multiples of 8.

        Returns:
            (batch, channels, height / 8, width / 8).

        Raises:
            ValueError: If the shape of `pixel_values` is invalid.
        """
        valid = pixel_values.ndim == 4 and pixel_values.shape[1] == 3
        if not valid or any(side % STRIDE or not side for side in pixel_values.shape[2:]):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, 3, height, width) with height "
                f"and width multiples of {STRIDE}."
            )
        maps = self.trunk(pixel_values)
        merged = self.lateral[0](self.reduce(maps[self.used[0]]))
        for number, lateral in zip(self.used[1:], self.lateral[1:], strict=True):
            merged = merged + F.interpolate(lateral(maps[number]), size=merged.shape[-2:])
        return F.relu(merged)


LayerT = TypeVar("LayerT", nn.Linear, nn.Conv2d)


def start_with(layer: LayerT, bias: Sequence[float] | None = None, *, std: float = 0.01) -> LayerT:
    """Mark a layer for `init_detection_weights`: small weights and this bias, so that it starts with this output.

    Only a layer with own parameters can be marked: transformers initializes no others in code outside of it.

    Args:
        layer: A linear layer or a convolution.
        bias: One number per output. Defaults to zeros.
        std: Standard deviation of the weights.

    Returns:
        The layer.
    """
    layer.start_bias = [0.0] * layer.bias.shape[0] if bias is None else [float(number) for number in bias]
    layer.start_std = std
    return layer


def init_detection_weights(module: nn.Module) -> None:
    """Initialize a convolution or linear layer of a detector. Other modules stay unchanged.

    Args:
        module: Any module of a detector. Convolutions are initialized as in He et al. 2015.
    """
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        return
    start = getattr(module, "start_bias", None)
    if start is not None:
        init.normal_(module.weight, std=module.start_std)
        init.copy_(module.bias, torch.tensor(start))
        return
    if isinstance(module, nn.Conv2d):
        init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:
        init.kaiming_uniform_(module.weight, a=5**0.5)
    if module.bias is not None:
        init.zeros_(module.bias)


def load_published_weights(backbone: DetectionBackbone, name: str) -> None:
    """Copy the published weights of a network of timm into a backbone. They are downloaded once.

    Args:
        backbone: Backbone of a config with `backbone="timm/NAME"`.
        name: The name, "timm/NAME".
    """
    published = TimmTrunk(name.removeprefix("timm/"), pretrained=True)
    backbone.trunk.load_state_dict(published.state_dict())


@torch.no_grad()
def load_classifier_weights(backbone: DetectionBackbone, classifier: nn.Module) -> None:
    """Copy the weights of a trained classifier of ours into a backbone.

    Args:
        backbone: Backbone whose config names the same classifier with the same options.
        classifier: The classifier with its output layer, or without.

    Raises:
        ValueError: If the backbone is another network.
    """
    source = getattr(classifier, classifier.base_model_prefix, classifier)
    network = getattr(backbone.trunk, "network", None)
    if type(network) is not type(source):
        other = type(network or backbone.trunk).__name__
        raise ValueError(
            f"The classifier is a {type(source).__name__}, and the backbone a {other}. Use the same network."
        )
    missing, _ = network.load_state_dict(source.state_dict(), strict=False)
    if missing:
        raise ValueError(f"The classifier has no weights for {missing[0]} of the backbone. Use the same network.")


def _apply(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _run(stages: Any, x: Tensor) -> list[Tensor]:
    maps = []
    for stage in stages:
        x = stage(x)
        maps.append(x)
    return maps


@torch.no_grad()
def _measure(trunk: nn.Module, size: int = 64) -> tuple[list[int], list[int]]:
    """Return the stride and the channels of each feature map. A stride that does not divide the image counts as 0."""
    training = trunk.training
    maps = trunk.eval()(torch.zeros(1, 3, size, size))
    trunk.train(training)
    strides = [size // each.shape[-1] if size % each.shape[-1] == 0 else 0 for each in maps]
    return strides, [each.shape[1] for each in maps]
