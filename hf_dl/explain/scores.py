"""How well a map agrees with the known mask of the object."""

import torch


def _check(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(
            f"masks has shape {tuple(masks.shape)}, expected that of maps, {tuple(maps.shape)}, as (batch, height, "
            "width)."
        )
    return masks.to(maps.device) != 0


def share_inside(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The part of each map that lies inside the object.

    Compare it with the object's share of the image, which is what a constant map gets.

    Args:
        maps: Not negative, (batch, height, width).
        masks: The object, bool or int of the same shape, 0 outside.

    Returns:
        (batch,), from 0 to 1; NaN for a map of zeros, which is nowhere.

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
    """Whether the largest value of each map is on the object (Zhang et al. 2016).

    Args:
        maps: (batch, height, width).
        masks: The object, bool or int of the same shape, 0 outside.
        tolerance: How many pixels beside the object still count, in each direction; 15 in the paper's photographs.

    Returns:
        bool (batch,); False for a constant map, which points nowhere.

    Raises:
        ValueError: If the shapes differ, or the tolerance is negative.
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
