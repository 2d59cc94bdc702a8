"""The classic convolutional networks: LeNet-5, AlexNet, ZFNet, VGG, GoogLeNet and ResNet.

classic_architectures.py has their layers and papers, and classic_layers.py the arithmetic of sizes. All widths can be
scaled with `width_multiplier`. With `small_stem`, the first layers fit images of 32x32 pixels:

    ClassicCNNConfig(architecture="vgg16")                                          # as published
    ClassicCNNConfig(architecture="vgg16", image_size=32, width_multiplier=0.125)   # a small version

`load_torchvision` copies the weights of VGG, GoogLeNet and ResNet models of torchvision.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTImageProcessor
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import can_return_tuple

from .classic_architectures import ARCHITECTURES, Architecture
from .classic_layers import Conv, Options, build_layers
from .layers_problem_type import classification_loss

AUXILIARY_WEIGHT = 0.3  # of the loss of each auxiliary classifier (Szegedy et al. 2014, section 5)


@strict
class ClassicCNNConfig(PreTrainedConfig):
    """Configuration of a `ClassicCNNModel`. Defaults to AlexNet with two groups.

    Args:
        architecture: Name of the network, a key of `ARCHITECTURES`.
        width_multiplier: Factor for the channels of all layers except the last.
        image_size: Height and width of the images in pixels. Defaults to the published size. Networks with fully
            connected layers accept this size only; GoogLeNet and ResNet accept others, too.
        num_channels: Channels of the images. Defaults to the published number: 1 for LeNet-5, 3 for the others.
        small_stem: Whether the first convolution has a 3x3 kernel and stride 1, for images of about 32x32 pixels.
        dropout: Dropout probability. Defaults to the published one.
        auxiliary: Whether the auxiliary classifiers of GoogLeNet are trained with the network.
        num_labels: Number of classes. `id2label` names them.

    Example:
        ```python
        >>> config = ClassicCNNConfig(architecture="zfnet")
        >>> config.image_size, [size for _, size, _ in config.sizes()]
        (224, [110, 55, 26, 13, 13, 13, 13, 6])

        ```
    """

    model_type = "classic_cnn"

    architecture: str = "alexnet"
    width_multiplier: float | int = 1.0
    image_size: int | None = None
    num_channels: int | None = None
    small_stem: bool = False
    dropout: float | int | None = None
    auxiliary: bool = False

    def __post_init__(self, **kwargs):
        """Enter the published image size and number of channels where they are not given."""
        known = ARCHITECTURES.get(self.architecture)
        if known is not None:
            self.image_size = known.image_size if self.image_size is None else self.image_size
            self.num_channels = known.num_channels if self.num_channels is None else self.num_channels
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid or does not fit the architecture.
        """
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture={self.architecture!r} is unknown; choose one of {', '.join(ARCHITECTURES)}."
            )
        network = self.network
        if self.width_multiplier <= 0:
            raise ValueError(f"width_multiplier={self.width_multiplier} must be greater than 0.")
        if self.num_channels < 1:
            raise ValueError(f"num_channels={self.num_channels} must be at least 1.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if self.small_stem and not network.small_stem:
            raise ValueError(f"small_stem=True does nothing for {self.architecture}, whose kernels are small already.")
        if self.auxiliary and not network.auxiliary:
            raise ValueError(f"auxiliary=True needs architecture='googlenet', not {self.architecture!r}.")
        check_size(network, self.architecture, self.image_size, self.small_stem)

    @property
    def network(self) -> Architecture:
        """Return the table of the architecture."""
        return ARCHITECTURES[self.architecture]

    def sizes(self) -> list[tuple[str, int, str]]:
        """Return the stage, the output size and its arithmetic for each layer that changes the size of the image.

        Example:
            ```python
            >>> ClassicCNNConfig().sizes()[0]
            ('conv1', 55, '⌊(227 - 11 + 2*0)/4⌋ + 1 = 55')

            ```
        """
        return self.network.sizes(self.image_size, self.small_stem)

    @classmethod
    def published(cls, architecture: str, **fields: Any) -> "ClassicCNNConfig":
        """Return a config with the number of classes of the paper: 10 for LeNet-5, 1000 for the others.

        Args:
            architecture: Name of the network, a key of `ARCHITECTURES`.
            **fields: Other fields.

        Raises:
            ValueError: If a field is invalid.
        """
        labels = {"num_labels": ARCHITECTURES[architecture].num_labels} if architecture in ARCHITECTURES else {}
        return cls(architecture=architecture, **{**labels, **fields})


def check_size(network: Architecture, name: str, image_size: int, small_stem: bool) -> None:
    """Check that images are large enough for a network.

    Args:
        network: The table of the network.
        name: Its name.
        image_size: Height or width of the images in pixels.
        small_stem: Whether it has the small stem.

    Raises:
        ValueError: With the arithmetic of the layer that does not fit.
    """
    rows = network.sizes(image_size, small_stem)
    if image_size >= 1 and all(size >= 1 for _, size, _ in rows):
        return
    stage, _, formula = rows[-1]
    smallest = image_size + 1
    while any(size < 1 for _, size, _ in network.sizes(smallest, small_stem)):
        smallest += 1
    stem = " Or set small_stem=True." if network.small_stem and not small_stem else ""
    raise ValueError(
        f"image_size={image_size} is too small for {name}: in stage {stage}, {formula.split(' = ')[0]} is less than "
        f"1. The smallest size is {smallest}.{stem}"
    )


def image_processor(config: ClassicCNNConfig) -> ViTImageProcessor:
    """Make the image processor of the model. It resizes images to a square and maps them to [-1, 1].

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


class ClassicCNNPreTrainedModel(PreTrainedModel):
    """Base class for weight initialization and loading."""

    config: ClassicCNNConfig
    base_model_prefix = "classic_cnn"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)


class ClassicCNNModel(ClassicCNNPreTrainedModel):
    """The network without its last linear layer.

    Example:
        ```python
        >>> config = ClassicCNNConfig(architecture="alexnet", width_multiplier=0.1, image_size=67)
        >>> output = ClassicCNNModel(config)(torch.randn(2, 3, 67, 67))
        >>> output.last_hidden_state.shape, output.pooler_output.shape
        (torch.Size([2, 26, 1, 1]), torch.Size([2, 410]))

        ```
    """

    def __init__(self, config: ClassicCNNConfig):
        super().__init__(config)
        network, channels = config.network, config.num_channels
        options = Options(width=config.width_multiplier, dropout=config.dropout)
        self.stages = nn.ModuleDict()
        self.channels = {}  # of the output of each stage
        for name, layers in network.layers(config.small_stem).items():
            self.stages[name], channels = build_layers(layers, channels, options)
            self.channels[name] = channels
        self.hidden = None
        if network.hidden:
            size = config.sizes()[-1][1]
            self.hidden, channels = build_layers(network.hidden, channels * size**2, options)
        self.features = channels
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Compute the features of images.

        Args:
            pixel_values: (batch, channels, height, width).
            output_hidden_states: Whether to return the output of each stage. Defaults to the config.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            `last_hidden_state` (batch, channels, height, width), the output of the last stage; `pooler_output`
            (batch, features); and `hidden_states`, if requested. `pooler_output` is the output of the fully connected
            layers. In a network without such layers, it is the mean over the pixels.

        Raises:
            ValueError: If the shape of `pixel_values` is invalid.
        """
        config = self.config
        self._check(pixel_values)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        states = [pixel_values]
        for stage in self.stages.values():
            states.append(stage(states[-1]))
        last = states[-1]
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=last,
            pooler_output=last.mean((2, 3)) if self.hidden is None else self.hidden(last.flatten(1)),
            hidden_states=tuple(states[1:]) if output_hidden_states else None,
        )

    def _check(self, pixel_values: torch.Tensor) -> None:
        config = self.config
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected "
                f"(batch, {config.num_channels}, height, width)."
            )
        for side in pixel_values.shape[2:]:
            if self.hidden is not None and side != config.image_size:
                rows = config.network.sizes(int(side), config.small_stem)
                raise ValueError(
                    f"pixel_values has shape {tuple(pixel_values.shape)}, expected {config.image_size}x"
                    f"{config.image_size} pixels. {side} pixels would become {rows[-1][1]} in the last feature map, "
                    f"{rows[-1][2]}, and the fully connected layers expect {config.sizes()[-1][1]}. Resize images "
                    "with the processor of the model's folder."
                )


class AuxiliaryClassifier(nn.Module):
    """A classifier on a feature map in the middle of GoogLeNet: pooling to 4x4, 1x1 convolution, two linear layers."""

    def __init__(self, channels: int, config: ClassicCNNConfig):
        super().__init__()
        options, norm = Options(config.width_multiplier), config.network.norm
        self.pool = nn.AdaptiveAvgPool2d(4)
        row = Conv(128, 1, norm=norm, eps=1e-3, bias=not norm)
        self.conv, channels = row.build(channels, options)
        width = options.scale(1024)
        self.hidden = nn.Sequential(nn.Linear(channels * 16, width), nn.ReLU(), nn.Dropout(0.7))
        self.classifier = nn.Linear(width, config.num_labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, num_labels) for x, (batch, channels, height, width)."""
        return self.classifier(self.hidden(self.conv(self.pool(x)).flatten(1)))


class ClassicCNNForImageClassification(ClassicCNNPreTrainedModel):
    """The network with its last linear layer, for image classification.

    Example:
        ```python
        >>> config = ClassicCNNConfig.published("lenet5")
        >>> model = ClassicCNNForImageClassification(config)
        >>> model(torch.randn(2, 1, 32, 32)).logits.shape, model.num_parameters()
        (torch.Size([2, 10]), 61706)

        ```
    """

    def __init__(self, config: ClassicCNNConfig):
        super().__init__(config)
        # `save_pretrained` enters the class that it saves. This entry makes AutoModel load the network inside it.
        config.auto_map = {"AutoModel": "classic_cnn.ClassicCNNModel", **(getattr(config, "auto_map", None) or {})}
        self.num_labels = config.num_labels
        self.classic_cnn = ClassicCNNModel(config)
        probability = config.network.dropout if config.dropout is None else config.dropout
        self.dropout = nn.Dropout(0.0 if config.network.hidden else probability)
        self.auxiliary = None
        if config.auxiliary:
            channels = self.classic_cnn.channels
            self.auxiliary = nn.ModuleDict(
                {stage: AuxiliaryClassifier(channels[stage], config) for stage in config.network.auxiliary}
            )
        self.classifier = nn.Linear(self.classic_cnn.features, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify images.

        Args:
            pixel_values: (batch, channels, height, width), as in `ClassicCNNModel`.
            labels: Classes in [0, num_labels), int (batch,). Floating-point labels make a regression or a multi-label
                model, see `classification_loss`.
            output_hidden_states: Whether to return the output of each stage. Defaults to the config.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            `loss`, if `labels` are given; `logits` (batch, num_labels); and `hidden_states`, if requested. In training
            mode, the loss contains 0.3 times the loss of each auxiliary classifier.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        with_auxiliary = self.auxiliary is not None and self.training and labels is not None
        outputs = self.classic_cnn(
            pixel_values, output_hidden_states=output_hidden_states or with_auxiliary, return_dict=True
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        if with_auxiliary:
            states = dict(zip(self.classic_cnn.stages, outputs.hidden_states, strict=True))
            for stage, classifier in self.auxiliary.items():
                loss = loss + AUXILIARY_WEIGHT * classification_loss(classifier(states[stage]), labels, self.config)
        return ImageClassifierOutputWithNoAttention(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states if output_hidden_states else None
        )


@torch.no_grad()
def load_torchvision(model: ClassicCNNForImageClassification, source: nn.Module) -> None:
    """Copy the weights of a VGG, GoogLeNet or ResNet of torchvision into a model of the same architecture.

    Both list their weights from the first to the last layer, so they are copied in this order.

    Args:
        model: Model with `width_multiplier=1` and the same number of classes. Give it `auxiliary=True` if the
            GoogLeNet of torchvision has auxiliary classifiers.
        source: Model of torchvision.

    Raises:
        ValueError: If the weights have other shapes. The model is unchanged then.

    Example:
        ```python
        >>> import torchvision
        >>> model = ClassicCNNForImageClassification(ClassicCNNConfig(architecture="resnet18", num_labels=5))
        >>> load_torchvision(model, torchvision.models.resnet18(num_classes=5))

        ```
    """
    ours, theirs = model.state_dict(), source.state_dict()
    shapes = [[tuple(value.shape) for value in state.values()] for state in (ours, theirs)]
    if shapes[0] != shapes[1]:
        pairs = zip(ours, theirs, *shapes, strict=False)
        different = next((pair for pair in pairs if pair[2] != pair[3]), None)
        detail = (
            f"they have {len(theirs)} and {len(ours)} tensors"
            if different is None
            else f"{different[1]} has shape {different[3]}, and {different[0]} has shape {different[2]}"
        )
        raise ValueError(
            f"The weights of {type(source).__name__} do not fit {model.config.architecture!r}: {detail}. Use the same "
            "architecture, number of classes and auxiliary classifiers."
        )
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
