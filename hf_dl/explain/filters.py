"""Raw filters of the first convolution, as pictures.

The filters of the first layer see pixels, so their weights are small images (Krizhevsky et al. 2012, figure 3). All
filters share one scale: 0.5 is the weight 0, and the largest absolute weight is 0 or 1. Weak filters are therefore
gray, and colors can be compared.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .calls import modules_in_order


@dataclass
class FiltersOutput:
    """Output of `raw_filters`.

    Attributes:
        layer: Name of the convolution.
        weights: Weights, (filters, channels, height, width).
        pictures: Weights scaled jointly to [0, 1], of the same shape.
    """

    layer: str
    weights: torch.Tensor
    pictures: torch.Tensor


def raw_filters(model: nn.Module, pixel_values: torch.Tensor) -> FiltersOutput:
    """Return the filters of the first convolution, or the patch embedding of a vision transformer.

    Args:
        model: Classifier.
        pixel_values: Images, (batch, channels, height, width). The first image runs, to find the first layer.

    Returns:
        See `FiltersOutput`.

    Raises:
        ValueError: If no convolution sees the channels of the images.

    Example:
        ```python
        >>> model = nn.Sequential(nn.Conv2d(3, 6, 5), nn.Flatten(), nn.LazyLinear(2))
        >>> raw_filters(model, torch.zeros(1, 3, 8, 8)).pictures.shape
        torch.Size([6, 3, 5, 5])

        ```
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    channels = pixel_values.shape[1]
    found = modules_in_order(model, pixel_values, names)
    first = next((module for module in found if module.weight.shape[1] == channels), None)
    if first is None:
        raise ValueError(
            f"model={type(model).__name__} has no convolution of images with {channels} channels, so it has no "
            "filters to show. Use method='activation' for other layers."
        )
    weights = first.weight.detach().clone()
    return FiltersOutput(names[first], weights, 0.5 + weights / (2 * weights.abs().max().clamp_min(1e-30)))
