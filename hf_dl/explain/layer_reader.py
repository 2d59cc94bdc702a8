"""Read the output of one layer. The forward pass ends at the layer, so later layers cost nothing."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .calls import (
    as_map,
    class_logits,
    evaluating,
    find_blocks,
    find_layers,
    modules_in_order,
    patch_size_of,
)


class _Reached(Exception):  # noqa: N818
    """Ends a forward pass at the layer."""


def split_batches(images: torch.Tensor | Iterable[torch.Tensor], batch_size: int) -> Iterator[torch.Tensor]:
    """Yield batches of images, from a tensor or from an iterable of batches, such as a DataLoader.

    Args:
        images: Images (count, channels, height, width), or batches of images.
        batch_size: Maximum number of images per batch.
    """
    for batch in [images] if isinstance(images, torch.Tensor) else images:
        yield from batch.split(batch_size)


class LayerReader:
    """Reads a layer of a classifier.

    Args:
        model: Classifier.
        pixel_values: Images, (batch, channels, height, width). The first image runs once, to check the layer.
        layer: Name or module.

    Attributes:
        name: Name of the layer.

    Raises:
        ValueError: If the layer is unknown, does not run exactly once, or returns no tensor.

    Example:
        ```python
        >>> model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.LazyLinear(5))
        >>> LayerReader(model, torch.zeros(1, 3, 8, 8), "0")(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 6, 6, 6])

        ```
    """

    def __init__(self, model: nn.Module, pixel_values: torch.Tensor, layer: str | nn.Module):
        self.model = model
        [(self.name, self.module)] = find_layers(model, pixel_values, layer, flag="layer").items()
        found = []
        handle = self._watch(lambda tensor: found.append(_as_tensor(tensor)))
        try:
            with torch.no_grad(), evaluating(model):
                class_logits(model, pixel_values[:1])
        finally:
            handle.remove()
        if len(found) != 1:
            raise ValueError(
                f"layer={self.name!r} runs {len(found)} times in a forward pass. Choose a layer that runs once."
            )
        if not isinstance(found[0], torch.Tensor) or found[0].ndim not in (2, 3, 4):
            shown = tuple(found[0].shape) if isinstance(found[0], torch.Tensor) else type(found[0]).__name__
            raise ValueError(f"layer={self.name!r} returns {shown}. Expected a feature map, tokens or features.")

    def _watch(self, look: Any) -> Any:
        return self.module.register_forward_hook(lambda _, args, output: look(output))

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the output of the layer: (batch, features), (batch, tokens, channels) or a feature map."""
        found = []

        def look(tensor: Any) -> None:
            found.append(_as_tensor(tensor))
            raise _Reached

        handle = self._watch(look)
        try:
            with evaluating(self.model):
                class_logits(self.model, pixel_values)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0]

    def as_map(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the output of the layer as (batch, channels, height, width). Features have one position."""
        output = self(pixel_values)
        if output.ndim == 2:
            return output[:, :, None, None]
        return as_map(output, tuple(pixel_values.shape[-2:]), patch_size_of(self.model))


def spread_layers(model: nn.Module, pixel_values: torch.Tensor, count: int) -> list[str]:
    """Return layers at even distances: transformer blocks, or convolutions larger than 1x1.

    Args:
        model: Classifier.
        pixel_values: Image, (1, channels, height, width).
        count: Largest number of layers. The first and the last layer are always returned, if `count` is at least 2.

    Returns:
        Names of the layers, from the first to the last.

    Raises:
        ValueError: If the model has no such layer.
    """
    names = {module: name for name, module in model.named_modules()}
    try:
        layers = find_blocks(model)
    except ValueError:
        convolutions = [m for m in names if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
        order = modules_in_order(model, pixel_values, convolutions)
        layers = [module for module in dict.fromkeys(order) if order.count(module) == 1]
    if not layers:
        raise ValueError(f"model={type(model).__name__} has no convolution larger than 1x1 and no transformer block.")
    last = len(layers) - 1
    places = {round(i * last / max(count - 1, 1)) for i in range(count)}
    return [names[layers[place]] for place in sorted(places)]


def _as_tensor(output: Any) -> Any:
    """Return the first entry of a tuple or of an output of transformers."""
    while isinstance(output, (tuple, list, Mapping)) and len(output):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


def check_channels(channels: Iterable[int] | int, count: int, layer: str) -> list[int]:
    """Return channels of a layer as a list.

    Raises:
        ValueError: If the layer does not have a channel.
    """
    found = [channels] if isinstance(channels, int) else torch.as_tensor(channels).long().reshape(-1).tolist()
    unknown = [channel for channel in found if not 0 <= channel < count]
    if unknown or not found:
        raise ValueError(f"channels={found} of layer={layer!r} is invalid. Expected numbers from 0 to {count - 1}.")
    return found
