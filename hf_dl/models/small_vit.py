"""Small vision transformer for image classification, which can return its attention and ignore masked patches.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1. A linear layer projects the patches of an image
to tokens. The model adds a CLS token and learned positions, applies pre-norm transformer blocks, and classifies the
CLS token.

Differences from the paper:

- By default, the model trains in minutes on a CPU: 64x64 images, 8x8 patches, 4 blocks of 64 channels.
- One projection computes the queries, keys and values of a block. Attention uses `scaled_dot_product_attention`, and
  attention matrices are computed only if requested.
- The model accepts images of other sizes and interpolates the positions of the patches.
- The CLS token goes to the head without a tanh layer.
- The head is a key of `HEADS` in layers_heads.py, and `logits` are log-probabilities. The default is a linear layer.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.image_utils import PILImageResampling
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import can_return_tuple

from .image_input import RgbImageProcessor
from .layers_heads import HEADS, check_options, make_head
from .layers_output_head import OutputHead
from .layers_problem_type import check_problem_type, classify

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


@strict
class SmallViTConfig(PreTrainedConfig):
    """Configuration of a `SmallViTModel`. Set the number of classes with `num_labels` or `id2label`.

    Args:
        image_size: Height and width of the images in pixels, a multiple of `patch_size`.
        patch_size: Height and width of a patch in pixels.
        num_channels: Channels of the images.
        hidden_size: Channels of a token, a multiple of `num_attention_heads`.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: Number of attention heads per block.
        intermediate_size: Hidden units of the MLP of a block.
        hidden_act: Activation of the MLP: "gelu", "relu" or "silu".
        hidden_dropout_prob: Dropout probability of the embeddings and of the outputs of attention and MLP.
        attention_probs_dropout_prob: Dropout probability of the attention weights.
        initializer_range: Standard deviation of the initial weights, positions and CLS token.
        layer_norm_eps: Epsilon of the layer normalizations.
        head: Output layer, a key of `HEADS` such as "softmax" or "hierarchical".
        head_options: Options of the output layer, see `make_head`. Values must be JSON types.

    Example:
        ```python
        >>> SmallViTConfig(num_labels=25).grid_size
        8

        ```
    """

    model_type = "small_vit"

    image_size: int = 64
    patch_size: int = 8
    num_channels: int = 3
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 128
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    head: str = "softmax"
    head_options: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        """Convert fields to JSON types, so that a config that was saved and loaded is equal to the original."""
        self.head_options = json.loads(json.dumps(self.head_options))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid or does not fit another field.
        """
        for name in (
            "image_size",
            "patch_size",
            "num_channels",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}."
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown. Choose one of: {', '.join(ACTIVATIONS)}.")
        check_options(self.head, self.head_options)
        check_problem_type(self.problem_type, HEADS[self.head].problem_types)

    @property
    def grid_size(self) -> int:
        """Return the number of patches along one side of an image of `image_size`."""
        return self.image_size // self.patch_size


class SmallViTImageProcessor(RgbImageProcessor):
    """Image processor that resizes images to a square and maps them to [-1, 1]."""

    resample = PILImageResampling.BILINEAR
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"height": 64, "width": 64}
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True


class SmallViTEmbeddings(nn.Module):
    """Embed images (batch, channels, height, width) as tokens (batch, 1 + patches, hidden_size).

    The CLS token comes first, then the patches row by row.
    """

    def __init__(self, config: SmallViTConfig):
        super().__init__()
        self.grid_size = config.grid_size
        self.patch_projection = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.positions = nn.Parameter(torch.empty(1, 1 + config.grid_size**2, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def positions_of(self, height: int, width: int) -> torch.Tensor:
        """Return the positions of CLS and a grid of patches, (1, 1 + height * width, hidden_size)."""
        if (height, width) == (self.grid_size, self.grid_size):
            return self.positions
        cls, patches = self.positions.split([1, self.grid_size**2], dim=1)
        patches = patches.unflatten(1, (self.grid_size, self.grid_size)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed images, (batch, channels, height, width)."""
        patches = self.patch_projection(pixel_values)  # (batch, hidden_size, rows, columns)
        positions = self.positions_of(*patches.shape[-2:])
        tokens = torch.cat(
            [self.cls_token.expand(patches.shape[0], -1, -1), patches.flatten(2).transpose(1, 2)], dim=1
        )
        return self.dropout(tokens + positions)


class SmallViTAttention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v for each head."""

    def __init__(self, config: SmallViTConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, tokens: torch.Tensor, keep: torch.Tensor | None = None, *, output_attention: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute self-attention.

        Args:
            tokens: Tokens, (batch, tokens, hidden_size).
            keep: Boolean mask that broadcasts to (batch, heads, tokens, tokens). False masks a token. Defaults to no
                mask.
            output_attention: Whether to compute and return the attention weights.

        Returns:
            The outputs, (batch, tokens, hidden_size), and the attention weights, (batch, heads, tokens, tokens), or
            `None`. The weights of a row sum to 1.
        """
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        if output_attention:
            logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            if keep is not None:
                logits = logits.masked_fill(~keep, float("-inf"))
            attention = logits.softmax(dim=-1)
            mixed = F.dropout(attention, dropout) @ value
        else:
            attention = None
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=dropout)
        return self.output(mixed.transpose(1, 2).flatten(2)), attention


class SmallViTBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block: x = x + attention(norm(x)), then x = x + MLP(norm(x))."""

    def __init__(self, config: SmallViTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SmallViTAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.mlp_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, tokens: torch.Tensor, keep: torch.Tensor | None = None, *, output_attention: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Update the tokens. Arguments and results are the same as in `SmallViTAttention`."""
        update, attention = self.attention(self.attention_norm(tokens), keep, output_attention=output_attention)
        tokens = tokens + self.dropout(update)
        update = self.mlp_out(self.activation(self.mlp_in(self.mlp_norm(tokens))))
        return tokens + self.dropout(update), attention


class SmallViTPreTrainedModel(PreTrainedModel):
    """Base class for weight initialization and loading."""

    config: SmallViTConfig
    base_model_prefix = "small_vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _input_embed_layer = "patch_projection"
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps
    _supports_sdpa = True
    _no_split_modules = ["SmallViTEmbeddings", "SmallViTBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, OutputHead):
            module.init_weights(std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SmallViTEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.positions, std=std)


class SmallViTModel(SmallViTPreTrainedModel):
    """Small vision transformer without an output layer.

    Example:
        ```python
        >>> model = SmallViTModel(SmallViTConfig())
        >>> output = model(torch.randn(2, 3, 64, 64), output_attentions=True)
        >>> output.pooler_output.shape, output.attentions[0].shape
        (torch.Size([2, 64]), torch.Size([2, 4, 65, 65]))

        ```
    """

    def __init__(self, config: SmallViTConfig):
        super().__init__(config)
        self.embeddings = SmallViTEmbeddings(config)
        self.blocks = nn.ModuleList(SmallViTBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (batch, channels, height, width), in [-1, 1]. Height and width are multiples of `patch_size`.
            attention_mask: Mask of the CLS token and the patches row by row, (batch, 1 + patches). A token with 0 or
                False is ignored. For the CLS token, the result is the same as without the patch.
            output_attentions: Whether to return the attention weights of each block. Defaults to the config.
            output_hidden_states: Whether to return the tokens before each block and after the last block. Defaults to
                the config.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            `last_hidden_state` (batch, 1 + patches, hidden_size), after the last normalization, and `pooler_output`
            (batch, hidden_size), its CLS token. If requested, also `hidden_states` and `attentions`, which are (batch,
            heads, tokens, tokens) for each block.

        Raises:
            ValueError: If the shape of `pixel_values` or `attention_mask` is invalid.
        """
        config = self.config
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, {config.num_channels}, height, "
                "width)."
            )
        height, width = pixel_values.shape[-2:]
        if height % config.patch_size or width % config.patch_size or not height or not width:
            raise ValueError(
                f"pixel_values has height {height} and width {width}, expected multiples of "
                f"patch_size={config.patch_size}."
            )
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        tokens = self.embeddings(pixel_values)
        keep = None
        if attention_mask is not None:
            if attention_mask.shape != tokens.shape[:2]:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, expected {tuple(tokens.shape[:2])}: the "
                    "CLS token and the patches."
                )
            keep = attention_mask.to(tokens.device).bool()[:, None, None, :]
        hidden_states, attentions = (tokens,), ()
        for block in self.blocks:
            tokens, attention = block(tokens, keep, output_attention=output_attentions)
            attentions += (attention,)
            hidden_states += (tokens,)
        tokens = self.norm(tokens)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=tokens[:, 0],
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )


class SmallViTForImageClassification(SmallViTPreTrainedModel):
    """Small vision transformer with an output layer on its CLS token, for image classification.

    Example:
        ```python
        >>> model = SmallViTForImageClassification(SmallViTConfig(num_labels=25))
        >>> model(torch.randn(2, 3, 64, 64), labels=torch.tensor([3, 8])).logits.shape
        torch.Size([2, 25])

        ```
    """

    def __init__(self, config: SmallViTConfig):
        super().__init__(config)
        # `save_pretrained` enters the class that it saves. This entry makes AutoModel load the model inside it.
        config.auto_map = {"AutoModel": "small_vit.SmallViTModel", **(getattr(config, "auto_map", None) or {})}
        self.num_labels = config.num_labels
        self.small_vit = SmallViTModel(config)
        options = config.head_options or {}
        self.classifier = make_head(config.head, config.hidden_size, config.num_labels, **options)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (batch, channels, height, width), in [-1, 1]. Height and width are multiples of `patch_size`.
            labels: Classes in [0, num_labels), int (batch,). Floating-point labels make a regression or a multi-label
                model, see `classify`; this needs head="softmax".
            attention_mask: See `SmallViTModel`.
            output_attentions: See `SmallViTModel`.
            output_hidden_states: See `SmallViTModel`.
            temperature: Temperature of the noise that head="gumbel" adds in training, greater than 0.
            generator: Random generator for that noise.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            `loss`, if `labels` are given; `logits` (batch, num_labels), which are log-probabilities, or scores before
            the sigmoid or the mean for other problem types; and, if requested, `hidden_states` and `attentions`.
        """
        output = self.small_vit(
            pixel_values,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        options = {"temperature": temperature, "generator": generator}
        loss, logits = classify(self.classifier, output.pooler_output, labels, self.config, **options)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
