"""Agreement of a map with the known mask of the object."""

import torch


def _check(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(
            f"masks has shape {tuple(masks.shape)} and maps {tuple(maps.shape)}. Expected the same shape (batch, "
            "height, width)."
        )
    return masks.to(maps.device) != 0


def share_inside(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Compute the share of each map inside the object.

    A constant map has the object's share of the image as its score, so compare with that.

    Args:
        maps: Maps without negative values, (batch, height, width).
        masks: Masks of the object, bool or int of the same shape, 0 outside.

    Returns:
        The shares, (batch,), from 0 to 1. NaN for a map of zeros.

    Raises:
        ValueError: If the shapes differ.

    Example:
        ```python
        >>> share_inside(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0, 1]]])).item()
        0.75

        ```
    """
    masks = _check(maps, masks)
    return (maps * masks).sum(dim=(1, 2)) / maps.sum(dim=(1, 2))


def pointing_game(maps: torch.Tensor, masks: torch.Tensor, *, tolerance: int = 0) -> torch.Tensor:
    """Return whether the largest value of each map is on the object (Zhang et al. 2016).

    Args:
        maps: Maps, (batch, height, width).
        masks: Masks of the object, bool or int of the same shape, 0 outside.
        tolerance: Number of pixels around the object that also count, in each direction. The paper uses 15.

    Returns:
        Bool (batch,). False for a constant map.

    Raises:
        ValueError: If the shapes differ, or `tolerance` is negative.
    """
    masks = _check(maps, masks)
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance} must be at least 0.")
    if tolerance:
        grown = torch.nn.functional.max_pool2d(masks[:, None].float(), 2 * tolerance + 1, 1, tolerance)
        masks = grown[:, 0] > 0
    flat = maps.flatten(1)
    hit = masks.flatten(1).gather(1, flat.argmax(dim=1, keepdim=True))[:, 0]
    return hit & (flat.amax(dim=1) > flat.amin(dim=1))
