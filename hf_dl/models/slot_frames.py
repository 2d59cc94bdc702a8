"""Frames of slots: where a slot is in the image, and how large it is.

A frame is (x, y, size): center and radius of the attention of the slot, as fractions of the image. It is the last part
of a slot's vector. Attention and decoder work in the coordinates of the slot, (position - center) / size. The network
then learns a shape once and not again at each position and size. Biza et al. 2023, "Invariant Slot
Attention: Object Discovery with Slot-Centric Reference Frames", sections 3.1 and 3.2.

Differences from the paper: both axes have the same size. Attention reads the distance from the center (see
`FrameSlotAttention`), and one layer after the iterations reads the shape (`FrameReadout`). `SEEDS` selects where the
slots start.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .layers_precision import reference_parameter

FRAME_DIM = 3
"""Channels of a frame: x, y, size."""

MIN_SIZE = 0.03
"""Smallest size, added in quadrature: the attention to a single token has no spread."""

# Small seeds make the first iteration read the token at the seed.
_SEED_SIZE = 0.03
CANDIDATES = 16
"""Number of random places per seed; the seed is the best of them."""

# With this weight, a distance of 0.2 counts as much as half the range of one color channel.
_PLACE_WEIGHT = 24.0


def cell_centers(side: int, like: torch.Tensor) -> torch.Tensor:
    """Return the centers (x, y) of the cells of a square grid in row-major order, (side^2, 2), in [0, 1]."""
    centers = (torch.arange(side, device=like.device, dtype=like.dtype) + 0.5) / side
    return torch.stack([centers.repeat(side), centers.repeat_interleave(side)], dim=-1)


def token_side(tokens: int) -> int:
    """Return the side of a square grid of tokens.

    Raises:
        ValueError: If the number of tokens is not a square.
    """
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"The image has {tokens} tokens. Frames need a square grid of tokens.")
    return side


def attention_frames(attention: torch.Tensor, *, epsilon: float = 1e-8) -> torch.Tensor:
    """Compute the frame of each slot from its attention: mean position and standard deviation.

    Args:
        attention: (batch, slots, tokens). The tokens are the cells of a square grid in row-major order.
        epsilon: Added to the attention before it is normalized over the tokens.

    Returns:
        (batch, slots, 3): x, y and size as fractions of the image. The size is the standard deviation, averaged over
        both axes.

    Raises:
        ValueError: If the number of tokens is not a square.

    Example:
        ```python
        >>> attention_frames(torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]]))
        tensor([[[0.2500, 0.2500, 0.0300],
                 [0.5000, 0.5000, 0.2518]]])

        ```
    """
    positions = cell_centers(token_side(attention.shape[-1]), attention)  # (tokens, 2)
    weights = attention + epsilon
    weights = weights / weights.sum(dim=-1, keepdim=True)
    center = weights @ positions  # (batch, slots, 2)
    variance = (weights @ positions.square() - center.square()).mean(dim=-1, keepdim=True)
    return torch.cat([center, (variance.clamp_min(0) + MIN_SIZE**2).sqrt()], dim=-1)


@torch.no_grad()
def color_seeds(pixel_values: torch.Tensor, num_slots: int, noise: torch.Tensor, *, side: int = 32) -> torch.Tensor:
    """Choose starting frames where the image differs from its main color, by greedy k-means++.

    Arthur & Vassilvitskii 2007, "k-means++: The Advantages of Careful Seeding". The first seed is the background: the
    median color of the image, without a position. Each further seed is drawn among the cells of a coarse grid, with a
    probability that grows with the distance to the seeds so far. The distance counts colors and positions. Of several
    draws, the best one explains most of the image. Neighboring slots then rarely start on the same object.

    Args:
        pixel_values: (batch, channels, height, width), in [-1, 1].
        num_slots: K.
        noise: Uniform numbers in [0, 1), (batch, slots, candidates).
        side: Side of the grid.

    Returns:
        Frames, (batch, slots, 3). The first one covers the image.
    """
    grid = F.adaptive_avg_pool2d(pixel_values.float(), side)
    colors = grid.flatten(2).transpose(1, 2)  # (batch, cells, channels)
    places = cell_centers(side, colors)
    features = torch.cat([colors, math.sqrt(_PLACE_WEIGHT) * places.expand(colors.shape[0], -1, -1)], dim=-1)
    lengths = features.square().sum(-1)  # (batch, cells)
    rows = torch.arange(colors.shape[0], device=colors.device)
    distance = (colors - colors.median(dim=1, keepdim=True).values).square().sum(-1) ** 1.5  # (batch, cells)
    centers = [colors.new_full((colors.shape[0], 2), 0.5)]
    for slot in range(1, num_slots):
        # Inverse transform sampling: the result for an image does not depend on its batch.
        cumulative = (distance + 1e-9).cumsum(dim=1)
        draws = noise[:, slot].to(cumulative) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, draws).clamp_max(side**2 - 1)  # (batch, candidates)
        candidates = features.gather(1, chosen[..., None].expand(-1, -1, features.shape[-1]))
        squares = lengths[:, None] + candidates.square().sum(-1, keepdim=True)
        squares = (squares - 2 * candidates @ features.transpose(1, 2)).clamp_min(0)  # (batch, candidates, cells)
        tried = torch.minimum(squares * squares.sqrt(), distance[:, None])
        best = tried.sum(-1).argmin(dim=1)
        distance = tried[rows, best]
        centers.append(places[chosen[rows, best]])
    frames = F.pad(torch.stack(centers, dim=1), (0, 1), value=_SEED_SIZE)
    frames[:, 0, 2] = 0.5
    return frames.to(pixel_values.dtype)


def random_seeds(pixel_values: torch.Tensor, num_slots: int, noise: torch.Tensor) -> torch.Tensor:
    """Choose starting frames anywhere in the image, as in the paper; for the arguments see `color_seeds`."""
    centers = 0.1 + 0.8 * noise[:, :num_slots, :2]
    return F.pad(centers, (0, 1), value=0.2).to(pixel_values)


SEEDS: dict[str, Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]] = {
    "color": color_seeds,
    "random": random_seeds,
}
"""The ways to choose the starting frames by name."""


def draw_seeds(
    kind: str,
    pixel_values: torch.Tensor,
    num_slots: int,
    *,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw the starting frames of the slots of each image.

    Args:
        kind: A key of `SEEDS`.
        pixel_values: (batch, channels, height, width), in [-1, 1].
        num_slots: K.
        generator: Source of randomness.
        noise: Uniform numbers in [0, 1) for all images, (slots, `CANDIDATES`). Defaults to new numbers for each image.

    Returns:
        (batch, slots, 3).
    """
    shape = (pixel_values.shape[0], num_slots, CANDIDATES)
    if noise is None:
        device = pixel_values.device if generator is None else generator.device
        noise = torch.rand(shape, generator=generator, device=device)
    return SEEDS[kind](pixel_values, num_slots, noise.to(pixel_values.device).expand(shape))


class FrameReadout(nn.Module):
    """Add to each slot what it sees in its own frame, such as its shape.

    Let x be a token, and p the features of its position in the frame of the slot. The mean of ReLU(W x + V p) over the
    tokens is weighted with the attention of the slot. A linear map of this mean is added to the slot.

    Args:
        token_dim: Channels of the tokens.
        slot_dim: Channels of a slot without its frame.
        hidden_dim: Channels of the features.
        extent: Distance from the center, in sizes, that the features are scaled by.
    """

    def __init__(self, token_dim: int, slot_dim: int, *, hidden_dim: int = 64, extent: float = 2.5):
        super().__init__()
        self.extent = extent
        self.norm = nn.LayerNorm(token_dim)
        self.from_token = nn.Linear(token_dim, hidden_dim)
        self.from_place = nn.Linear(10, hidden_dim)
        self.to_slot = nn.Linear(hidden_dim, slot_dim)

    def forward(self, tokens: torch.Tensor, slots: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Read the tokens.

        Args:
            tokens: (batch, tokens, token_dim).
            slots: Slots with their frames, (batch, slots, slot_dim + 3).
            attention: The attention of the last iteration, (batch, slots, tokens).

        Returns:
            Slots of the same shape, with unchanged frames.
        """
        tokens = tokens.to(reference_parameter(self).dtype)
        appearance, frames = slots.split([slots.shape[-1] - FRAME_DIM, FRAME_DIM], dim=-1)
        precise = frames.to(torch.promote_types(frames.dtype, torch.float32))
        positions = cell_centers(token_side(tokens.shape[1]), precise)
        places = (positions - precise[:, :, None, :2]) / (self.extent * precise[:, :, None, 2:])
        waves = [wave(octave * math.pi * places) for octave in (0.5, 1.0) for wave in (torch.sin, torch.cos)]
        features = torch.cat([places, *waves], dim=-1).to(tokens.dtype)  # (batch, slots, tokens, 10)
        hidden = F.relu(self.from_token(self.norm(tokens))[:, None] + self.from_place(features))
        weights = attention / attention.sum(dim=-1, keepdim=True).clamp_min(1e-8)
        seen = (weights[:, :, None].to(hidden) @ hidden).squeeze(2)  # (batch, slots, hidden)
        return torch.cat([appearance + self.to_slot(seen), frames], dim=-1)
