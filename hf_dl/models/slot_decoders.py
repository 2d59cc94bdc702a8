"""Decoders of the slot autoencoder: each slot paints an image and an alpha mask, and the masks blend the images.

To add a decoder, subclass `SlotDecoder` and add the class to `DECODERS`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .layers_position import PositionEmbedding
from .layers_precision import reference_parameter
from .slot_frames import FRAME_DIM


class SlotDecoder(GradientCheckpointingLayer):
    """Base class of the decoders.

    Args:
        config: A `SlotAutoencoderConfig`.

    Attributes:
        patch: Side of the pixel patch that each cell of the output contains; 1 if a cell is a pixel.
    """

    patch = 1

    @staticmethod
    def check_config(config: PreTrainedConfig) -> None:
        """Raise ValueError if the fields of the config do not fit this decoder."""

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        """Paint each slot on its own.

        Args:
            slots: (batch * slots, slot_dim).

        Returns:
            (batch * slots, (num_channels + 1) * patch^2, image_size / patch, image_size / patch): the colors of each
            pixel, then its alpha before the softmax over the slots. The pixels of a patch are in the order of
            `torch.nn.functional.pixel_shuffle`.
        """
        raise NotImplementedError


class BroadcastDecoder(SlotDecoder):
    """Spatial broadcast decoder (Watters et al. 2019) with transposed 5x5 convolutions, as in the paper."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.size = config.decoder_size
        self.position = PositionEmbedding(config.slot_dim, frequencies=config.decoder_frequencies)
        layers, channels = [], config.slot_dim
        for index, width in enumerate(config.decoder_channels):
            if index < self.num_upsamplings(config):
                layers += [nn.ConvTranspose2d(channels, width, 5, stride=2, padding=2, output_padding=1), nn.ReLU()]
            else:
                layers += [nn.Conv2d(channels, width, 5, padding=2), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, config.num_channels + 1, 3, padding=1))

    @staticmethod
    def num_upsamplings(config: PreTrainedConfig) -> int:
        """Return how many times the grid is doubled from `decoder_size` to `image_size`."""
        return (config.image_size // config.decoder_size).bit_length() - 1

    @staticmethod
    def check_config(config: PreTrainedConfig) -> None:
        """Raise ValueError if `decoder_channels` cannot double `decoder_size` up to `image_size`."""
        doublings = BroadcastDecoder.num_upsamplings(config)
        if config.decoder_size * 2**doublings != config.image_size:
            raise ValueError(
                f"image_size={config.image_size} must be decoder_size={config.decoder_size} times a power of two."
            )
        if len(config.decoder_channels) < doublings:
            raise ValueError(
                f"decoder_channels={config.decoder_channels} must have at least {doublings} entries, one for each "
                f"doubling from decoder_size={config.decoder_size} to image_size={config.image_size}."
            )

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        """Paint slots (batch * slots, slot_dim) as (batch * slots, channels + 1, image_size, image_size)."""
        slots = slots.to(reference_parameter(self).dtype)
        grid = slots[:, None, None, :] + self.position.grid(
            self.size, self.size, like=slots
        )  # (batch * slots, size, size, dim)
        return self.layers(grid.permute(0, 3, 1, 2))


class CoarseGrids(nn.Module):
    """Spatial broadcast to a coarse grid, 3x3 convolutions on this and finer grids, then a pixel patch per cell.

    The paper adds the slot to the position embedding. This network multiplies them as well (feature-wise modulation,
    Perez et al. 2018). With the Fourier features p(x, y) and the slot s,

        grid(x, y) = A s + C ((B s) * (D p(x, y)))

    Products of sines and cosines are sines and cosines of sums and differences. A linear map of the slot can therefore
    move its shape, and the network does not learn each shape again at each position.

    The activation is a leaky ReLU. With ReLU, all units can be 0 where a slot paints a ground without structure. All
    slots then have the same alpha there, without a gradient, and share the ground.

    Args:
        slot_dim: Channels of a slot.
        config: A `SlotAutoencoderConfig`.
        patch: Side of the pixel patch of each cell of the finest grid.
    """

    @staticmethod
    def activation() -> nn.Module:
        """Return the activation between two layers."""
        return nn.LeakyReLU(0.1)

    def __init__(self, slot_dim: int, config: PreTrainedConfig, *, patch: int):
        super().__init__()
        self.size = config.decoder_size
        channels, *finer = config.decoder_channels
        self.from_slot = nn.Linear(slot_dim, channels)
        self.scale = nn.Linear(slot_dim, 2 * channels)
        self.position = PositionEmbedding(2 * channels, frequencies=config.decoder_frequencies)
        self.mix = nn.Linear(2 * channels, channels)
        layers = [self.activation(), nn.Conv2d(channels, channels, 3, padding=1), self.activation()]
        for width in finer:
            layers += [nn.Conv2d(channels, 4 * width, 1), nn.PixelShuffle(2), self.activation()]
            layers += [nn.Conv2d(width, width, 3, padding=1), self.activation()]
            channels = width
        layers.append(nn.Conv2d(channels, (config.num_channels + 1) * patch**2, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        """Paint slots (batch * slots, slot_dim) as (batch * slots, (channels + 1) * patch^2, size, size)."""
        slots = slots.to(reference_parameter(self).dtype)
        moved = self.scale(slots)[:, None, None, :] * self.position.grid(self.size, self.size, like=slots)
        grid = self.from_slot(slots)[:, None, None, :] + self.mix(moved)  # (batch * slots, size, size, channels)
        return self.layers(grid.permute(0, 3, 1, 2))


def finest_grid(config: PreTrainedConfig) -> int:
    """Return the side of the finest grid of `CoarseGrids`."""
    return config.decoder_size * 2 ** (len(config.decoder_channels) - 1)


class PixelShuffleDecoder(CoarseGrids, SlotDecoder):
    """`CoarseGrids` over the image, and a pixel patch per cell."""

    def __init__(self, config: PreTrainedConfig):
        patch = config.image_size // finest_grid(config)
        super().__init__(config.slot_dim, config, patch=patch)
        self.patch = patch

    @staticmethod
    def check_config(config: PreTrainedConfig) -> None:
        """Raise ValueError if `image_size` is not a multiple of the finest grid."""
        finest = finest_grid(config)
        if config.image_size % finest:
            raise ValueError(
                f"image_size={config.image_size} must be a multiple of {finest}, the finest of the decoder's grids. "
                f"The grids start at decoder_size={config.decoder_size} and double for each further entry of "
                f"decoder_channels={config.decoder_channels}."
            )


class CanvasDecoder(SlotDecoder):
    """Paint each slot on a canvas in its own frame, then paste the canvas into the image at the slot's place.

    The canvas covers the square within `EXTENT` sizes of the center of the slot, so small objects are painted with
    more detail than the image has. Pasting is bilinear interpolation, as in a spatial transformer (Jaderberg et al.
    2015) without rotation. Outside the canvas, the colors of its border continue, and alphas fall quickly. A linear
    map of the slot is added to all its alphas, so that a slot can lie in front of the others or behind them.
    """

    EXTENT = 2.5
    OUTSIDE = 20.0  # decrease of the alpha logit per half canvas outside the canvas

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.image_size, self.canvas_size = config.image_size, config.canvas_size
        self.cell = config.canvas_size // finest_grid(config)
        self.canvas = CoarseGrids(config.slot_dim - FRAME_DIM, config, patch=self.cell)
        self.depth = nn.Linear(config.slot_dim - FRAME_DIM, 1, bias=False)  # a bias would be the same for all slots

    @staticmethod
    def check_config(config: PreTrainedConfig) -> None:
        """Raise ValueError if the slots have no frames, or `canvas_size` is not a multiple of the finest grid."""
        if not config.frames:
            raise ValueError(
                "decoder_type='canvas' needs frames=True; choose another decoder for slots without frames."
            )
        if config.canvas_size < 1 or config.canvas_size % finest_grid(config):
            raise ValueError(
                f"canvas_size={config.canvas_size} must be a multiple of {finest_grid(config)}, the finest of the "
                f"decoder's grids for decoder_size={config.decoder_size} and decoder_channels="
                f"{config.decoder_channels}."
            )

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        """Paint slots (batch * slots, slot_dim) as (batch * slots, channels + 1, image_size, image_size)."""
        appearance, frames = slots.split([slots.shape[-1] - FRAME_DIM, FRAME_DIM], dim=-1)
        canvas = F.pixel_shuffle(self.canvas(appearance), self.cell)  # (batch * slots, channels + 1, canvas, canvas)
        precise = torch.promote_types(slots.dtype, torch.float32)  # half precision cannot tell pixels apart
        canvas, frames = canvas.to(precise), frames.to(precise)
        pixels = (torch.arange(self.image_size, device=slots.device, dtype=frames.dtype) + 0.5) / self.image_size
        # Coordinates of the pixels on the canvas: -1 and 1 are its borders.
        x, y = ((pixels - frames[:, [axis]]) / (self.EXTENT * frames[:, 2:]) for axis in (0, 1))
        rows = self._weights(y) @ canvas.transpose(1, 2).flatten(2)  # (batch * slots, image, (channels + 1) * canvas)
        pasted = rows.unflatten(2, (-1, self.canvas_size)).flatten(1, 2) @ self._weights(x).transpose(1, 2)
        pasted = pasted.unflatten(1, (self.image_size, -1)).transpose(1, 2)
        outside = (y.abs() - 1).clamp_min(0)[:, :, None] + (x.abs() - 1).clamp_min(0)[:, None, :]
        colors, alpha = pasted.split([pasted.shape[1] - 1, 1], dim=1)
        dtype = reference_parameter(self).dtype
        depth = self.depth(appearance.to(dtype))[:, :, None, None]
        alpha = alpha + depth - self.OUTSIDE * outside[:, None]
        return torch.cat([colors, alpha], dim=1).to(dtype)

    def _weights(self, places: torch.Tensor) -> torch.Tensor:
        """Return the weight of each canvas cell at each pixel of an axis, (batch * slots, image_size, canvas_size)."""
        cells = ((places.clamp(-1, 1) + 1) * self.canvas_size - 1) / 2
        index = torch.arange(self.canvas_size, device=places.device, dtype=places.dtype)
        return (1 - (cells.clamp(0, self.canvas_size - 1)[:, :, None] - index).abs()).clamp_min(0)


DECODERS: dict[str, type[SlotDecoder]] = {
    "broadcast": BroadcastDecoder,
    "pixel_shuffle": PixelShuffleDecoder,
    "canvas": CanvasDecoder,
}
"""The decoders by name."""


def blend_slots(
    decoder: SlotDecoder, config: PreTrainedConfig, slots: torch.Tensor, keep: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Paint each slot and blend the results with the alpha masks.

    Args:
        decoder: The decoder.
        config: Its `SlotAutoencoderConfig`.
        slots: (batch, slots, slot_dim).
        keep: The slots to paint, bool (batch, slots). The remaining slots share the pixels of a removed slot according
            to their alphas. Defaults to all slots.

    Returns:
        - The blended image, (batch, channels, height, width).
        - The image of each slot, (batch, slots, channels, height, width).
        - The masks, (batch, slots, height, width), which sum to 1 over the slots.

    Raises:
        ValueError: If `slots` has the wrong shape, or `keep` has the wrong shape or keeps no slot of an image.
    """
    if slots.ndim != 3 or slots.shape[-1] != config.slot_dim:
        raise ValueError(f"slots has shape {tuple(slots.shape)}, expected (batch, slots, {config.slot_dim}).")
    patch = decoder.patch
    painted = decoder(slots.flatten(0, 1)).unflatten(0, slots.shape[:2])
    contents, alphas = painted.split([config.num_channels * patch**2, patch**2], dim=2)
    if keep is not None:
        if keep.shape != slots.shape[:2] or not keep.any(dim=1).all():
            raise ValueError(
                f"keep has shape {tuple(keep.shape)}, expected {tuple(slots.shape[:2])} with at least one slot "
                "kept in each image."
            )
        alphas = alphas.masked_fill(~keep[:, :, None, None, None].to(alphas.device), float("-inf"))
    masks = alphas.softmax(dim=1)
    if patch == 1:  # nothing to rearrange, and pixel_shuffle would copy everything
        return (contents * masks).sum(dim=1), contents, masks.squeeze(2)
    # Blend while each cell still holds its patch of pixels: only the sum has to be rearranged for the loss.
    by_channel = contents.unflatten(2, (config.num_channels, patch**2))
    reconstruction = (by_channel * masks.unsqueeze(2)).sum(dim=1).flatten(1, 2)
    return (
        F.pixel_shuffle(reconstruction, patch),
        F.pixel_shuffle(contents, patch),
        F.pixel_shuffle(masks, patch).squeeze(2),
    )
