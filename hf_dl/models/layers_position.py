"""The position embedding of slot attention's tokens, of the slot decoders, and of the slot U-Net.

Attention and the decoders treat all cells alike. Without a position embedding, they cannot tell cells apart.
"""

import math

import torch
from torch import nn


class PositionEmbedding(nn.Module):
    """A linear map of the positions of cell centers in [0, 1].

    The features of a position are (x, y, 1 - x, 1 - y), as in Locatello et al. 2020, and sin and cos of 2^i pi x and
    2^i pi y for i below `frequencies` (Mildenhall et al. 2020, NeRF, section 5.1).

    Args:
        channels: Channels of the embedding.
        frequencies: Number of octaves; 0 uses the positions alone.

    Example:
        ```python
        >>> PositionEmbedding(64, frequencies=4).grid(8, 8, like=torch.empty(0)).shape
        torch.Size([8, 8, 64])

        ```
    """

    def __init__(self, channels: int, *, frequencies: int = 0):
        super().__init__()
        self.frequencies = frequencies
        self.projection = nn.Linear(4 + 4 * frequencies, channels)

    def grid(self, height: int, width: int, *, like: torch.Tensor) -> torch.Tensor:
        """Return the embedding of a grid, (height, width, channels), with the dtype and the device of `like`.

        The weights may be stored elsewhere, or in another type, until the linear map is called.
        """
        precise = torch.promote_types(like.dtype, torch.float32)  # half precision cannot tell distant cells apart
        y = (torch.arange(height, device=like.device, dtype=precise) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=precise) + 0.5) / width
        x, y = x.expand(height, width), y[:, None].expand(height, width)
        features = [x, y, 1 - x, 1 - y]
        for index in range(self.frequencies):
            for position in (x, y):
                angle = 2**index * math.pi * position
                features += [angle.sin(), angle.cos()]
        return self.projection(torch.stack(features, dim=-1).to(like.dtype))
