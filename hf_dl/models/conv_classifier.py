"""A plain convolutional classifier: three convolutions, a linear layer, and a choice of output layers.

This is the network for comparing output layers. Each 3x3 convolution is followed by an optional normalization, 2x2 max
pooling and a ReLU. The usual order, ReLU before pooling, has the same result and takes more time. The feature map is
flattened. A linear layer with ReLU and dropout computes the hidden states, and a head from `HEADS` in layers_heads.py
classifies them. With the default sizes and 100 classes, the network has 0.64 million parameters, 82 % of them in the
first linear layer.

`logits` are log-probabilities for all heads. They can be used like the logits of any classifier, because
softmax(log p) = p.
"""

import json
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import can_return_tuple

from .layers_heads import HEADS, check_options, make_head
from .layers_norm import NORMS, NormLayer, check_norm, make_norm
from .layers_output_head import OutputHead
from .layers_problem_type import check_problem_type, classify


@strict
class ConvClassifierConfig(PreTrainedConfig):
    """Configuration of a `ConvClassifierModel`. Set the number of classes with `num_labels` or `id2label`.

    Args:
        widths: Channels of the three convolutions.
        hidden_size: Channels of the hidden states, the input of the output layer.
        norm: Normalization after each convolution, a key of `NORMS` such as "batch", "group" or "none".
        dropout: Dropout probability of the hidden states, at least 0 and less than 1.
        image_size: Height and width of the images in pixels, a multiple of 8.
        num_channels: Channels of the images.
        head: Output layer, a key of `HEADS` such as "softmax" or "hierarchical".
        head_options: Options of the output layer, see `make_head`. Values must be JSON types.

    Example:
        ```python
        >>> options = {"tree": "two_level", "groups": [[0, 3], [1, 2]]}
        >>> ConvClassifierConfig(num_labels=4, head="hierarchical", head_options=options).flat_size
        2048

        ```
    """

    model_type = "conv_classifier"

    widths: list[int] | tuple[int, ...] = (32, 64, 128)
    hidden_size: int = 256
    norm: str = "none"
    dropout: float = 0.2
    image_size: int = 32
    num_channels: int = 3
    head: str = "softmax"
    head_options: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        """Convert fields to JSON types, so that a config that was saved and loaded is equal to the original."""
        self.widths = list(self.widths)
        self.head_options = json.loads(json.dumps(self.head_options))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid or does not fit another field.
        """
        for name in ("hidden_size", "image_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if len(self.widths) != 3 or min(self.widths) < 1:
            raise ValueError(f"widths={self.widths} must be three numbers of channels, each at least 1.")
        if self.image_size % 8:
            raise ValueError(f"image_size={self.image_size} must be a multiple of 8. It is halved three times.")
        check_norm(self.norm, self.widths)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        check_options(self.head, self.head_options)
        check_problem_type(self.problem_type, HEADS[self.head].problem_types)

    @property
    def flat_size(self) -> int:
        """Return the number of inputs of the first linear layer."""
        return self.widths[-1] * (self.image_size // 8) ** 2


class ConvClassifierPreTrainedModel(PreTrainedModel):
    """Base class for weight initialization and loading."""

    config: ConvClassifierConfig
    base_model_prefix = "conv_classifier"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, OutputHead):
            module.init_weights()
        elif isinstance(module, NormLayer):
            module.reset_parameters()


class ConvClassifierModel(ConvClassifierPreTrainedModel):
    """The network without its output layer; it ends with the hidden states.

    Example:
        ```python
        >>> model = ConvClassifierModel(ConvClassifierConfig())
        >>> output = model(torch.randn(2, 3, 32, 32))
        >>> output.last_hidden_state.shape, output.pooler_output.shape
        (torch.Size([2, 128, 4, 4]), torch.Size([2, 256]))

        ```
    """

    def __init__(self, config: ConvClassifierConfig):
        super().__init__(config)
        self.stages = nn.ModuleList()
        channels = config.num_channels
        for width in config.widths:
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=not NORMS[config.norm].has_shift)
            self.stages.append(nn.Sequential(convolution, make_norm(config.norm, width), nn.MaxPool2d(2), nn.ReLU()))
            channels = width
        self.hidden = nn.Linear(config.flat_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Compute the hidden states of images.

        Args:
            pixel_values: (batch, channels, image_size, image_size), in [-1, 1] or with mean 0 and deviation 1.
            output_hidden_states: Whether to return the feature maps after each stage. Defaults to the config.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            `last_hidden_state` (batch, channels, image_size / 8, image_size / 8); `pooler_output` (batch,
            hidden_size), the hidden states, which are not negative; and `hidden_states`, if requested.

        Raises:
            ValueError: If the shape of `pixel_values` is invalid.
        """
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected "
                f"(batch, {', '.join(map(str, expected))}). Resize images with the processor of the model's folder."
            )
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        states, maps = pixel_values, ()
        for stage in self.stages:
            states = stage(states)
            maps += (states,)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=states,
            pooler_output=self.dropout(F.relu(self.hidden(states.flatten(1)))),
            hidden_states=maps if output_hidden_states else None,
        )


class ConvClassifierForImageClassification(ConvClassifierPreTrainedModel):
    """The network with its output layer, for image classification.

    Example:
        ```python
        >>> config = ConvClassifierConfig(num_labels=10, head="hierarchical")
        >>> model = ConvClassifierForImageClassification(config).eval()
        >>> output = model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 9]))
        >>> output.logits.shape, bool(output.loss.isclose(-output.logits[[0, 1], [0, 9]].mean()))
        (torch.Size([2, 10]), True)

        ```
    """

    def __init__(self, config: ConvClassifierConfig):
        super().__init__(config)
        # `save_pretrained` enters the class that it saves. This entry makes AutoModel load the network inside it.
        here = {"AutoModel": "conv_classifier.ConvClassifierModel"}
        config.auto_map = {**here, **(getattr(config, "auto_map", None) or {})}
        self.num_labels = config.num_labels
        self.conv_classifier = ConvClassifierModel(config)
        self.head = make_head(config.head, config.hidden_size, config.num_labels, **(config.head_options or {}))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify images.

        Args:
            pixel_values: (batch, channels, image_size, image_size), as in `ConvClassifierModel`.
            labels: Classes in [0, num_labels), int (batch,). Floating-point labels make a regression or a multi-label
                model, see `classify`; this needs head="softmax".
            output_hidden_states: Whether to return the feature maps after each stage. Defaults to the config.
            temperature: Temperature of the noise that head="gumbel" adds in training, greater than 0.
            generator: Random generator for that noise.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            `loss`, if `labels` are given; `logits` (batch, num_labels), which are log-probabilities, or scores before
            the sigmoid or the mean for other problem types; and `hidden_states`, if requested.
        """
        outputs = self.conv_classifier(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        options = {"temperature": temperature, "generator": generator}
        loss, logits = classify(self.head, outputs.pooler_output, labels, self.config, **options)
        return ImageClassifierOutputWithNoAttention(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
        )
