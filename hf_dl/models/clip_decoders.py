"""Decoders from the tokens of a frozen CLIP and an embedded phrase to the mask of the phrase.

- "clipseg": Lüddecke & Ecker 2022, "Image Segmentation Using Text and Image Prompts", section 3.1. Tokens of several
  blocks of CLIP pass through small transformer blocks, the deepest first. FiLM brings in the phrase before the first
  block, and a transposed convolution draws the pixels.
- "deconv": the baseline CLIP-Deconv of the paper. It reads the deepest tokens only, and has a multilayer perceptron
  instead of transformer blocks.
- "unet": the convolutional counterpart. FiLM brings in the phrase at the bottleneck. Each stage doubles the resolution
  and joins the tokens of a shallower block. A transposed convolution enlarges them, as in UNETR (Hatamizadeh et al.
  2022).

To add a decoder, subclass `PhraseDecoder` and add the class to `DECODERS`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .layers_conditioning import FiLM, MultiHeadAttention


def to_grid(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Drop the CLS token and arrange the others in a grid.

    Args:
        tokens: (batch, 1 + rows * columns, channels).
        grid: Rows and columns.

    Returns:
        (batch, channels, rows, columns).
    """
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid)


class TransformerBlock(GradientCheckpointingLayer):
    """Post-norm transformer block: x = norm(x + attention(x)), then x = norm(x + MLP(x)).

    Args:
        channels: Channels of a token.
        num_heads: Attention heads, a divisor of `channels`.
        hidden_dim: Hidden units of the MLP, whose activation is ReLU.
        eps: Epsilon of the layer normalizations.
    """

    def __init__(self, channels: int, num_heads: int, hidden_dim: int, eps: float = 1e-5):
        super().__init__()
        self.attention = MultiHeadAttention(channels, num_heads)
        self.attention_norm = nn.LayerNorm(channels, eps=eps)
        self.mlp_in = nn.Linear(channels, hidden_dim)
        self.mlp_out = nn.Linear(hidden_dim, channels)
        self.mlp_norm = nn.LayerNorm(channels, eps=eps)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Update tokens, (batch, tokens, channels)."""
        tokens = self.attention_norm(tokens + self.attention(tokens, tokens))
        return self.mlp_norm(tokens + self.mlp_out(F.relu(self.mlp_in(tokens))))


def make_head(channels: int, patch_size: int, refined: bool) -> nn.Module:
    """Make the layers from the cells of a grid to the pixels.

    Args:
        channels: Channels of a cell.
        patch_size: Side of a cell in pixels.
        refined: Whether to draw a cell in two steps, after a 3x3 convolution. For 16 pixels, each step enlarges the
            grid 4 times.

    Returns:
        A module from (batch, channels, rows, columns) to (batch, 1, rows * patch_size, columns * patch_size).

    Example:
        ```python
        >>> make_head(64, 16, True)(torch.randn(1, 64, 22, 22)).shape
        torch.Size([1, 1, 352, 352])

        ```
    """
    if not refined:
        return nn.ConvTranspose2d(channels, 1, patch_size, stride=patch_size)
    last = next(size for size in range(math.isqrt(patch_size), 0, -1) if patch_size % size == 0)
    first = patch_size // last
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(channels, channels // 2, first, stride=first),
        nn.ReLU(),
        nn.ConvTranspose2d(channels // 2, 1, last, stride=last),
    )


class PhraseDecoder(nn.Module):
    """Base class of the decoders.

    Args:
        num_layers: Number of blocks of CLIP whose tokens the decoder reads.
        token_dim: Channels of a token of CLIP.
        prompt_dim: Channels of an embedded phrase.
        patch_size: Side of a patch in pixels.
        reduce_dim: Channels to which the tokens are reduced.
        refined: Whether to use the refined head.
        num_attention_heads: Attention heads of a transformer block.
        intermediate_size: Hidden units of the MLP of a transformer block.
        eps: Epsilon of the layer normalizations.
    """

    @classmethod
    def choose_layers(cls, layers: Sequence[int]) -> list[int]:
        """Return the blocks of CLIP whose tokens the decoder reads, out of the `layers` of a config."""
        return list(layers)

    @classmethod
    def check_options(cls, num_layers: int, patch_size: int, refined: bool) -> None:
        """Raise ValueError if the decoder does not support these options of a config."""

    def forward(
        self,
        features: torch.Tensor,
        prompt: torch.Tensor,
        grid: tuple[int, int],
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draw the mask of each phrase.

        Args:
            features: Tokens of CLIP, (images, layers, 1 + rows * columns, token_dim), the deepest layer last.
            prompt: Embedded phrases, (phrases, prompt_dim).
            grid: Rows and columns of the patches.
            image_index: The image of each phrase, int (phrases,). Defaults to one image per phrase, in order. Layers
                without the phrase run once per image.

        Returns:
            Logits of the pixels, (phrases, rows * patch_size, columns * patch_size).
        """
        raise NotImplementedError


def _per_phrase(x: torch.Tensor, image_index: torch.Tensor | None) -> torch.Tensor:
    """Repeat the row of each image for its phrases. The row of a single image is not copied."""
    if image_index is None:
        return x
    return x.expand(image_index.shape[0], *x.shape[1:]) if x.shape[0] == 1 else x[image_index]


class ClipSegDecoder(PhraseDecoder):
    """The decoder of CLIPSeg. Tokens keep the CLS token up to the head."""

    def __init__(
        self,
        num_layers: int,
        token_dim: int,
        prompt_dim: int,
        patch_size: int,
        *,
        reduce_dim: int,
        refined: bool,
        num_attention_heads: int,
        intermediate_size: int,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.film = FiLM(prompt_dim, reduce_dim)
        self.reduces = nn.ModuleList(nn.Linear(token_dim, reduce_dim) for _ in range(num_layers))  # deepest first
        self.blocks = nn.ModuleList(
            TransformerBlock(reduce_dim, num_attention_heads, intermediate_size, eps) for _ in range(num_layers)
        )
        self.head = make_head(reduce_dim, patch_size, refined)

    def forward(
        self,
        features: torch.Tensor,
        prompt: torch.Tensor,
        grid: tuple[int, int],
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `PhraseDecoder.forward`."""
        hidden: torch.Tensor | None = None
        for depth, (reduce, block) in enumerate(zip(self.reduces, self.blocks, strict=True)):
            tokens = _per_phrase(reduce(features[:, -1 - depth]), image_index)  # (phrases, 1 + patches, reduce_dim)
            hidden = self.film(tokens, prompt) if hidden is None else hidden + tokens
            hidden = block(hidden)
        return self.head(to_grid(hidden, grid)).squeeze(1)


class DeconvDecoder(PhraseDecoder):
    """FiLM on the deepest tokens, a two-layer perceptron per token, and the head. Tokens do not interact."""

    @classmethod
    def choose_layers(cls, layers: Sequence[int]) -> list[int]:
        """Return the deepest layer."""
        return [layers[-1]]

    def __init__(
        self,
        num_layers: int,
        token_dim: int,
        prompt_dim: int,
        patch_size: int,
        *,
        reduce_dim: int,
        refined: bool,
        **options: Any,
    ):
        super().__init__()
        self.reduce = nn.Linear(token_dim, reduce_dim)
        self.film = FiLM(prompt_dim, reduce_dim)
        self.mlp = nn.Sequential(nn.Linear(reduce_dim, reduce_dim), nn.ReLU(), nn.Linear(reduce_dim, reduce_dim))
        self.head = make_head(reduce_dim, patch_size, refined)

    def forward(
        self,
        features: torch.Tensor,
        prompt: torch.Tensor,
        grid: tuple[int, int],
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `PhraseDecoder.forward`."""
        tokens = _per_phrase(self.reduce(features[:, -1]), image_index)
        return self.head(to_grid(self.mlp(self.film(tokens, prompt)), grid)).squeeze(1)


class UNetDecoder(PhraseDecoder):
    """Convolutions that double the resolution up to the pixels, and join shallower tokens at the last resolutions.

    With scales 1, 2, 4, ... up to the patch size, x_0 from the deepest tokens t_0 and the phrase c, and tokens t_s of
    shallower blocks, the shallowest one at the resolution of the pixels:

        x_0 = relu(conv(FiLM(reduce(t_0), c)))
        x_s = relu(conv([enlarge(x_(s-1)), transposed_conv(reduce(t_s))]))

    The tokens before the first block contain the pixels of each patch, so shallow tokens have the sharpest edges.
    Channels start at `reduce_dim`, and halve from the second stage on.

    A convolution of joined channels is the sum of a convolution of each part. The part of t_s does not depend on the
    phrase, so it runs once per image. `enlarge_and_convolve` never computes the enlarged x_(s-1).
    """

    def __init__(
        self,
        num_layers: int,
        token_dim: int,
        prompt_dim: int,
        patch_size: int,
        *,
        reduce_dim: int,
        **options: Any,
    ):
        super().__init__()
        self.scales = _scales(patch_size)
        widths = [max(reduce_dim >> max(stage - 1, 0), 8) for stage in range(len(self.scales))]
        self.first_join = len(self.scales) - num_layers + 1  # the stage of the second deepest tokens
        self.film = FiLM(prompt_dim, reduce_dim)
        self.reduces = nn.ModuleList(nn.Linear(token_dim, reduce_dim) for _ in range(num_layers))  # deepest first
        self.bottleneck = nn.Conv2d(reduce_dim, widths[0], 3, padding=1)
        self.enlarge, self.stages = nn.ModuleList(), nn.ModuleList()
        for stage in range(1, len(self.scales)):
            scale, width, joins = self.scales[stage], widths[stage], stage >= self.first_join
            if joins:
                self.enlarge.append(nn.ConvTranspose2d(reduce_dim, width, scale, stride=scale))
            self.stages.append(nn.Conv2d(widths[stage - 1] + joins * width, width, 3, padding=1))
        self.output = nn.Conv2d(widths[-1], 1, 3, padding=1)

    @classmethod
    def check_options(cls, num_layers: int, patch_size: int, refined: bool) -> None:
        """Raise ValueError if the decoder does not support these options of a config."""
        if refined:
            raise ValueError(
                "refined=True does not work with decoder_type='unet', which has no head. Set it to False."
            )
        if num_layers > len(_scales(patch_size)):
            raise ValueError(
                f"layers has {num_layers} entries, but decoder_type='unet' has {len(_scales(patch_size))} resolutions "
                f"for patches of {patch_size} pixels. Choose at most one layer per resolution."
            )

    def forward(
        self,
        features: torch.Tensor,
        prompt: torch.Tensor,
        grid: tuple[int, int],
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `PhraseDecoder.forward`."""
        tokens = [reduce(features[:, -1 - depth]) for depth, reduce in enumerate(self.reduces)]
        x = self.film(_per_phrase(tokens[0], image_index), prompt)
        x = F.relu(self.bottleneck(to_grid(x, grid)))
        for stage, conv in enumerate(self.stages, start=1):
            scale, channels = self.scales[stage], x.shape[1]
            size = (grid[0] * scale, grid[1] * scale)
            x = enlarge_and_convolve(x, conv.weight[:, :channels], conv.bias, size)
            join = stage - self.first_join
            if join >= 0:
                skip = self.enlarge[join](to_grid(tokens[1 + join], grid))
                x = x + _per_phrase(F.conv2d(skip, conv.weight[:, channels:], padding=1), image_index)
            x = F.relu(x)
        return self.output(x).squeeze(1)


def enlarge_and_convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: tuple[int, int]
) -> torch.Tensor:
    """Enlarge an image by nearest neighbors, and apply a 3x3 convolution with padding 1.

    Repeating each pixel is a transposed convolution with a 2x2 kernel of ones. Together with the 3x3 convolution, it
    is a transposed convolution with a 4x4 kernel. Per pixel and pair of channels, it multiplies 4 times instead of 9.

    Args:
        x: (batch, in_channels, height, width).
        weight: (out_channels, in_channels, 3, 3).
        bias: (out_channels,), or None.
        size: Height and width of the result.

    Returns:
        (batch, out_channels, *size).
    """
    if size != (2 * x.shape[2], 2 * x.shape[3]):
        return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, bias, padding=1)
    weight = F.pad(weight, (0, 1, 0, 0)) + F.pad(weight, (1, 0, 0, 0))  # convolved with (1, 1) along the width
    weight = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
    return F.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), bias, stride=2, padding=1)


def _scales(patch_size: int) -> list[int]:
    """Return the resolutions of the U-Net relative to the grid: 1, 2, 4, ..., patch_size."""
    stages = (patch_size - 1).bit_length()
    return [min(2**stage, patch_size) for stage in range(stages + 1)]


DECODERS: dict[str, type[PhraseDecoder]] = {"clipseg": ClipSegDecoder, "deconv": DeconvDecoder, "unet": UNetDecoder}
"""From the `decoder_type` of a config to the class."""
