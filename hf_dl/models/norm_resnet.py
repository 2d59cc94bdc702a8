"""The ResNet with 6n + 2 layers for small images, with a choice of normalizations.

He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2. The network has these parts:

1. a 3x3 convolution;
2. three stages of 2n 3x3 convolutions, with 16, 32 and 64 channels at full, half and quarter resolution;
3. the mean over the pixels, and a linear layer.

A normalization follows each convolution, and a residual connection skips every two convolutions. n = 3, 5, 9, 18 are
ResNet-20, -32, -56 and -110 of the paper.

Differences from the paper:

- `norm` is a key of `NORMS` in layers_norm.py. With "none", the convolutions have a bias instead.
- `shortcut="projection"` uses a strided 1x1 convolution if a shortcut changes the size (option B of the paper). The
  default strides and pads with zeros (option A). `shortcut="none"` makes the plain network of the paper, without
  residual connections.
- Images may have any size, because of the mean over the pixels.

`NormResNetConfig.receptive_field` is the size of the image area that a pixel of the last feature map depends on:
53x53 pixels with n = 2. On much larger images, the network only sees small patches and averages over them.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTImageProcessor
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import can_return_tuple

from .layers_norm import NORMS, NormLayer, check_norm, make_norm
from .layers_problem_type import classification_loss


@strict
class NormResNetConfig(PreTrainedConfig):
    """Configuration of a `NormResNetModel`. Defaults to a ResNet-14 with batch normalization.

    Args:
        n: Number of residual blocks per stage. The network has 6n + 2 layers with weights.
        norm: Normalization after each convolution, a key of `NORMS` such as "batch", "group" or "none".
        num_groups: Number of groups of norm="group".
        layer_norm_affine: "channel" for one scale and shift per channel in norm="layer", or "pixel" for one per value
            as in `torch.nn.LayerNorm`. With "pixel", the model accepts images of `image_size` only.
        widths: Channels of the three stages.
        image_size: Height and width to which the processor resizes images, in pixels. The model accepts any size.
        num_channels: Channels of the images.
        shortcut: Shortcut where the size changes: "identity" (stride, and zeros for new channels) or "projection"
            (1x1 convolution). "none" removes all residual connections.
        num_labels: Number of classes. `id2label` names them.

    Example:
        ```python
        >>> config = NormResNetConfig(n=3, norm="group", num_labels=25)
        >>> config.num_layers, config.receptive_field
        (20, 81)

        ```
    """

    model_type = "norm_resnet"

    n: int = 2
    norm: str = "batch"
    num_groups: int = 8
    layer_norm_affine: Literal["channel", "pixel"] = "channel"
    widths: list[int] | tuple[int, ...] = (16, 32, 64)
    image_size: int = 32
    num_channels: int = 3
    shortcut: Literal["identity", "projection", "none"] = "identity"

    def __post_init__(self, **kwargs):
        """Convert fields to JSON types, so that a config that was saved and loaded is equal to the original."""
        self.widths = list(self.widths)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid or does not fit another field.
        """
        for name in ("n", "num_groups", "image_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if len(self.widths) != 3 or min(self.widths) < 1:
            raise ValueError(f"widths={self.widths} must be three numbers of channels, each at least 1.")
        if self.shortcut == "identity" and sorted(self.widths) != self.widths:
            raise ValueError(
                f"widths={self.widths} must not decrease, because shortcut='identity' can only add channels. Use "
                "shortcut='projection' for other widths."
            )
        check_norm(self.norm, self.widths, num_groups=self.num_groups)

    @property
    def num_layers(self) -> int:
        """Return the number of convolutions and linear layers on the longest path."""
        return 6 * self.n + 2

    @property
    def receptive_field(self) -> int:
        """Return the side of the image area that a pixel of the last feature map depends on, in pixels."""
        strides = [1, *[1] * (2 * self.n), *2 * [2, *[1] * (2 * self.n - 1)]]
        size, step = 1, 1  # step: pixels between neighbors of the feature map
        for stride in strides:
            size += 2 * step  # a 3x3 kernel adds a neighbor on each side
            step *= stride
        return size


def image_processor(config: NormResNetConfig) -> ViTImageProcessor:
    """Make the image processor of the model. It resizes images to a square and maps them to [-1, 1].

    It is a class of transformers, so that a checkpoint needs no code for it.

    Args:
        config: Configuration of the model, which contains `image_size`.

    Returns:
        The processor. Save it to the folder of the model with `save_pretrained`.
    """
    return ViTImageProcessor(
        size={"height": config.image_size, "width": config.image_size},
        image_mean=[0.5] * config.num_channels,
        image_std=[0.5] * config.num_channels,
        do_convert_rgb=config.num_channels == 3,
    )


class ConvNorm(nn.Sequential):
    """A convolution followed by a normalization."""

    def __init__(self, config: NormResNetConfig, inputs: int, outputs: int, *, kernel: int, stride: int, size: int):
        convolution = nn.Conv2d(
            inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=not NORMS[config.norm].has_shift
        )
        image_size = (size, size) if config.layer_norm_affine == "pixel" else None
        norm = make_norm(config.norm, outputs, num_groups=config.num_groups, image_size=image_size)
        super().__init__(convolution, norm)


class ResidualBlock(nn.Module):
    """A residual block, relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))).

    `size` is the size of its output. Without shortcut, it is a plain block of two convolutions.
    """

    def __init__(self, config: NormResNetConfig, inputs: int, outputs: int, *, stride: int, size: int):
        super().__init__()
        self.first = ConvNorm(config, inputs, outputs, kernel=3, stride=stride, size=size)
        self.second = ConvNorm(config, outputs, outputs, kernel=3, stride=1, size=size)
        self.stride, self.new_channels, self.plain = stride, outputs - inputs, config.shortcut == "none"
        self.projection = None
        if config.shortcut == "projection" and (stride > 1 or inputs != outputs):
            self.projection = ConvNorm(config, inputs, outputs, kernel=1, stride=stride, size=size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform x, (batch, inputs, height, width)."""
        residual = self.second(F.relu(self.first(x)))
        if self.plain:
            return F.relu(residual)
        if self.projection is not None:
            x = self.projection(x)
        elif self.stride > 1 or self.new_channels:
            # Keep the pixels at the centers of a 3x3 convolution with this stride.
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(x + residual)


class NormResNetPreTrainedModel(PreTrainedModel):
    """Base class for weight initialization and loading."""

    config: NormResNetConfig
    base_model_prefix = "norm_resnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps
    _no_split_modules = ["ResidualBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
        elif isinstance(module, NormLayer):
            module.reset_parameters()


class NormResNetModel(NormResNetPreTrainedModel):
    """The network without its linear layer; it ends with the mean over the pixels.

    Example:
        ```python
        >>> model = NormResNetModel(NormResNetConfig())
        >>> output = model(torch.randn(2, 3, 64, 64), output_hidden_states=True)
        >>> [tuple(states.shape[1:]) for states in output.hidden_states]
        [(16, 64, 64), (16, 64, 64), (32, 32, 32), (64, 16, 16)]

        ```
    """

    def __init__(self, config: NormResNetConfig):
        super().__init__(config)
        size, channels = config.image_size, config.widths[0]
        self.stem = ConvNorm(config, config.num_channels, channels, kernel=3, stride=1, size=size)
        self.stages = nn.ModuleList()
        for index, width in enumerate(config.widths):
            stride = 1 if index == 0 else 2
            size = (size + stride - 1) // stride
            blocks = [ResidualBlock(config, channels, width, stride=stride, size=size)]
            blocks += [ResidualBlock(config, width, width, stride=1, size=size) for _ in range(config.n - 1)]
            self.stages.append(nn.Sequential(*blocks))
            channels = width
        self.post_init()

    def extra_repr(self) -> str:
        """Return the text that `print` shows in the parentheses of the model."""
        return f"{self.config.num_layers} layers, sees {self.config.receptive_field} pixels"

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Compute the features of images.

        Args:
            pixel_values: (batch, channels, height, width), in [-1, 1].
            output_hidden_states: Whether to return the feature maps after the first convolution and after each stage.
                Defaults to the config.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            `last_hidden_state` (batch, channels, height / 4, width / 4), `pooler_output` (batch, channels) and
            `hidden_states`, if requested.

        Raises:
            ValueError: If the shape of `pixel_values` is invalid.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected "
                f"(batch, {self.config.num_channels}, height, width)."
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = [F.relu(self.stem(pixel_values))]
        for stage in self.stages:
            states.append(stage(states[-1]))
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=states[-1],
            pooler_output=states[-1].mean((2, 3)),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


class NormResNetForImageClassification(NormResNetPreTrainedModel):
    """The network with its linear layer, for image classification.

    Example:
        ```python
        >>> model = NormResNetForImageClassification(NormResNetConfig(num_labels=10))
        >>> model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 9])).logits.shape, model.num_parameters()
        (torch.Size([2, 10]), 172506)

        ```
    """

    def __init__(self, config: NormResNetConfig):
        super().__init__(config)
        # `save_pretrained` enters the class that it saves. This entry makes AutoModel load the network inside it.
        config.auto_map = {"AutoModel": "norm_resnet.NormResNetModel", **(getattr(config, "auto_map", None) or {})}
        self.num_labels = config.num_labels
        self.norm_resnet = NormResNetModel(config)
        self.classifier = nn.Linear(config.widths[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify images.

        Args:
            pixel_values: (batch, channels, height, width), in [-1, 1].
            labels: Classes in [0, num_labels), int (batch,). For `problem_type="regression"`, numbers, (batch,) or
                (batch, num_labels). For "multi_label_classification", 0 or 1 per class, (batch, num_labels).
            output_hidden_states: Whether to return the feature maps after the first convolution and after each stage.
                Defaults to the config.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            `loss`, if `labels` are given, see `classification_loss`; `logits` (batch, num_labels); and
            `hidden_states`, if requested.
        """
        outputs = self.norm_resnet(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        return ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
        )
