"""Parts of a denoising U-Net with cross-attention to slots: time embedding, residual block, attention, transformer.

Time embedding and residual block follow Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B. The
transformer over the cells of a feature map, with cross-attention to a condition, follows Rombach et al. 2022,
"High-Resolution Image Synthesis with Latent Diffusion Models", section 3.3 and appendix E.2.1.

With the same weights, the parts compute the same as the blocks of diffusers, except for these differences:

- A residual block that resamples has no first convolution. Average pooling or interpolation replaces it, also in the
  skip connection. Dhariwal & Nichol 2021 and diffusers' `ResnetBlock2D(down=True)` resample first and then apply the
  convolution. With that convolution set to the identity, theirs equals ours, at twice the cost.
- The time embedding passes through SiLU once, where it is computed, instead of in every residual block.
- Keys and values come from one projection.
- The transformer can add a position embedding (`position_frequencies`), as in Jiang et al. 2023, "Object-Centric Slot
  Diffusion". In pure noise, a cell has no other information for choosing its slot.
- The last layer of each residual branch is initialized to zero, as in Dhariwal & Nichol 2021 and unlike diffusers. A
  new network then passes its input through, and the loss starts at the variance of the noise.
- An input in channels_last memory format gives an output in channels_last. The cells of a feature map then become
  tokens without a copy.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .layers_position import PositionEmbedding


def sinusoids(timesteps: torch.Tensor, channels: int) -> torch.Tensor:
    """Compute cosines and sines of the time at frequencies from 1 down to almost 1 / 10000 (Vaswani et al. 2017).

    Args:
        timesteps: (batch,).
        channels: An even number.

    Returns:
        float32 (batch, channels), cosines first.
    """
    half = channels // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Embed timesteps: SiLU of an MLP of the time's sinusoids.

    Args:
        channels: Number of sinusoids, an even number.
        time_dim: Channels of the embedding.

    Example:
        ```python
        >>> TimeEmbedding(32, 128)(torch.tensor([0, 999])).shape
        torch.Size([2, 128])

        ```
    """

    def __init__(self, channels: int, time_dim: int):
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, timesteps: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Embed timesteps (batch,) to (batch, time_dim) of type `dtype`.

        The weights may be stored in another type, see `enable_layerwise_casting` of diffusers.
        """
        embedding = sinusoids(timesteps, self.channels).to(dtype)
        return F.silu(self.linear_2(F.silu(self.linear_1(embedding))))


class _NormSilu(torch.autograd.Function):
    """silu(group_norm(x)) that saves only x and the statistics for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        batch, channels, height, width = x.shape
        shape = (batch, channels, height * width, groups)
        normalized, mean, rstd = torch.native_group_norm(x, weight, bias, *shape, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.shape = shape
        return F.silu(normalized)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        batch, channels, _, groups = ctx.shape
        scale = (rstd[..., None] * weight.view(groups, -1)).view(batch, channels)
        shift = bias - (mean[..., None] * scale.view(batch, groups, -1)).view(batch, channels)
        normalized = torch.addcmul(shift[..., None, None], x, scale[..., None, None])
        grad = torch.ops.aten.silu_backward(grad, normalized)
        needed = list(ctx.needs_input_grad[:3])
        return *torch.ops.aten.native_group_norm_backward(grad, x, mean, rstd, weight, *ctx.shape, needed), None, None


def norm_silu(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """Compute silu(norm(x)), saving one feature map less for the backward pass than the two separate operations.

    The separate operations are used under `torch.compile`, which decides itself what to save, and under autocast,
    which casts between the two.

    Args:
        norm: The normalization, with weight and bias.
        x: (batch, channels, height, width).

    Returns:
        A tensor of the same shape. It does not support second derivatives.
    """
    if torch.compiler.is_compiling() or x.device.type == "meta" or not torch.is_grad_enabled():
        return F.silu(norm(x))
    if torch.is_autocast_enabled(x.device.type) or x.dtype != norm.weight.dtype:
        return F.silu(norm(x))
    return _NormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


RESAMPLINGS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda x: x,
    "down": lambda x: F.avg_pool2d(x, 2),
    "up": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
}
"""The resampling of feature maps in a residual block, by name."""


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, plus the time; GroupNorm, SiLU, dropout, convolution; plus the input.

    With R the first 3x3 convolution, or the resampling that replaces it:

        h = R(silu(norm1(x))) + W time
        y = conv2(dropout(silu(norm2(h)))) + S(x)

    S resamples in the same way. If the number of channels changes, S also has a 1x1 convolution.

    Args:
        in_channels: Channels of the input; a multiple of `groups`.
        out_channels: Channels of the output; a multiple of `groups`.
        time_dim: Channels of the time embedding.
        groups: Groups of the normalizations.
        dropout: Probability of dropout before the second convolution.
        resample: A key of `RESAMPLINGS`: "down" (average over 2x2 cells), "up" (each cell becomes 2x2 cells) or None.

    Example:
        ```python
        >>> block = ResidualBlock(32, 64, time_dim=128, resample="down")
        >>> block(torch.randn(2, 32, 16, 16), torch.randn(2, 128)).shape
        torch.Size([2, 64, 8, 8])

        ```
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_dim: int,
        groups: int = 32,
        dropout: float = 0.0,
        resample: str | None = None,
    ):
        super().__init__()
        if resample not in RESAMPLINGS:
            raise ValueError(f"resample={resample!r} is unknown; choose one of {', '.join(map(str, RESAMPLINGS))}.")
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, in_channels)
        # Resampling keeps the number of channels. Without a first convolution, the second one changes it.
        channels = out_channels if resample is None else in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1) if resample is None else None
        self.time = nn.Linear(time_dim, channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Transform a feature map.

        Args:
            x: (batch, in_channels, height, width), with even height and width if `resample="down"`.
            time: Time embedding from `TimeEmbedding`, (batch, time_dim).

        Returns:
            (batch, out_channels, height, width), with half or twice the height and width if `resample` is given.
        """
        resample = RESAMPLINGS[self.resample]
        hidden = resample(norm_silu(self.norm1, x))
        if self.conv1 is not None:
            hidden = self.conv1(hidden)
        hidden = hidden + self.time(time)[:, :, None, None]
        hidden = self.conv2(self.dropout(norm_silu(self.norm2, hidden)))
        # The convolution of S acts on single cells, so it is applied to the smaller of the two maps.
        x = resample(self.skip(x)) if self.resample == "up" else self.skip(resample(x))
        return x + hidden


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(head_dim)) v per head, from tokens to themselves or to a context.

    Args:
        channels: Channels of the tokens; a multiple of `head_dim`.
        head_dim: Channels of a head.
        context_dim: Channels of the context. Defaults to self-attention.
    """

    def __init__(self, channels: int, *, head_dim: int, context_dim: int | None = None):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_kv = nn.Linear(channels if context_dim is None else context_dim, 2 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(
        self, tokens: torch.Tensor, context: torch.Tensor | None = None, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend to the context, or to the tokens themselves.

        Args:
            tokens: (batch, tokens, channels).
            context: (batch, length, context_dim).
            keep: The part of the context to attend to, bool (batch, length), at least one per row. Defaults to all.

        Returns:
            (batch, tokens, channels).
        """
        query = self.to_q(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, tokens, head)
        pair = self.to_kv(tokens if context is None else context).unflatten(-1, (2, -1, self.head_dim))
        key, value = pair.permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if keep is None else keep[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class SlotTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the slots, and a gated feed-forward network, each as x + f(layer_norm(x)).

    The feed-forward network is a GEGLU (Shazeer 2020) with four times the channels inside.

    Args:
        channels: Channels of the tokens; a multiple of `head_dim`.
        slot_dim: Channels of a slot.
        head_dim: Channels of an attention head.
    """

    def __init__(self, channels: int, slot_dim: int, *, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, head_dim=head_dim)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, head_dim=head_dim, context_dim=slot_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_in = nn.Linear(channels, 8 * channels)
        self.feed_out = nn.Linear(4 * channels, channels)

    def forward(self, tokens: torch.Tensor, slots: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Update tokens (batch, tokens, channels); for `slots` and `keep` see `SlotTransformer`."""
        tokens = tokens + self.self_attention(self.norm1(tokens))
        tokens = tokens + self.cross_attention(self.norm2(tokens), slots, keep)
        hidden, gate = self.feed_in(self.norm3(tokens)).chunk(2, dim=-1)
        return tokens + self.feed_out(hidden * F.gelu(gate))


class SlotTransformer(nn.Module):
    """Transformer blocks over the cells of a feature map, with cross-attention to slots, added to the feature map.

    Args:
        channels: Channels of the feature map; a multiple of `head_dim` and of `groups`.
        slot_dim: Channels of a slot.
        head_dim: Channels of an attention head.
        depth: Number of transformer blocks.
        groups: Groups of the normalization.
        position_frequencies: Octaves of the position embedding that is added to the cells. Defaults to no position
            embedding, as in diffusers.

    Example:
        ```python
        >>> transformer = SlotTransformer(64, 48, head_dim=32)
        >>> transformer(torch.randn(2, 64, 8, 8), torch.randn(2, 5, 48)).shape
        torch.Size([2, 64, 8, 8])

        ```
    """

    def __init__(
        self,
        channels: int,
        slot_dim: int,
        *,
        head_dim: int,
        depth: int = 1,
        groups: int = 32,
        position_frequencies: int | None = None,
    ):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.position = None
        if position_frequencies is not None:
            self.position = PositionEmbedding(channels, frequencies=position_frequencies)
        self.project_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(SlotTransformerBlock(channels, slot_dim, head_dim=head_dim) for _ in range(depth))
        self.project_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, x: torch.Tensor, slots: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Let the cells attend to each other and to the slots.

        Args:
            x: (batch, channels, height, width).
            slots: (batch, slots, slot_dim).
            keep: The slots to attend to, bool (batch, slots), at least one per row. Defaults to all slots.

        Returns:
            (batch, channels, height, width).
        """
        tokens = self.project_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # (batch, height * width, channels)
        if self.position is not None:
            tokens = tokens + self.position.grid(*x.shape[-2:], like=tokens).flatten(0, 1)
        for block in self.blocks:
            tokens = block(tokens, slots, keep)
        return x + self.project_out(tokens).unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)
