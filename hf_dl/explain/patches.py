"""The patches of a data set that activate a channel most, cut out by the receptive field (Zeiler & Fergus 2014).

The data set streams. Only the images of the current best patches are kept. Each image contributes its largest
activation, so the patches come from different images.

The receptive field of a position is the set of pixels that can change it. It follows from one backward pass, in which
ReLU and max pooling do not cut any path (see backward_rules.py). If a layer sees the whole image (fully connected
layers, normalization of a whole image), the patch is the whole image. Tokens see the whole image too, but each one
stays at its place. So their patch is the patch of the token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .backward_rules import BackwardRule
from .calls import default_layers, evaluating, per_channel, to_model
from .layer_reader import LayerReader, check_channels, split_batches


@dataclass
class PatchesOutput:
    """Output of `top_patches`.

    Attributes:
        layer: Name of the layer.
        channels: The channels.
        values: Activations, largest first, (channels, k).
        images: Positions of the images in the data set, int64 (channels, k).
        positions: Row and column in the feature map, int64 (channels, k, 2).
        boxes: Top, left, bottom and right of the receptive field in pixels, inside of the image, int64 (channels, k,
            4). Bottom and right are excluded.
        patches: The patches, (channels, k, image channels, height, width), of the size of the largest field. Gray
            pixels are outside of the image.
    """

    layer: str
    channels: list[int]
    values: torch.Tensor
    images: torch.Tensor
    positions: torch.Tensor
    boxes: torch.Tensor
    patches: torch.Tensor


def receptive_fields(reader: LayerReader, pixel_values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Compute the receptive field of one position per image.

    Args:
        reader: The layer.
        pixel_values: Images, (batch, channels, height, width).
        positions: Row and column in the feature map, int64 (batch, 2).

    Returns:
        Top, left, bottom and right in pixels, inside of the image, int64 (batch, 4). Bottom and right are excluded.

    Example:
        ```python
        >>> model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5))
        >>> images = torch.zeros(1, 3, 8, 8)
        >>> receptive_fields(LayerReader(model, images, "1"), images, torch.tensor([[1, 0]])).tolist()
        [[2, 0, 6, 4]]

        ```
    """
    height, width = pixel_values.shape[-2:]
    with torch.inference_mode(False), torch.enable_grad(), BackwardRule("receptive_field"):
        images = to_model(reader.model, pixel_values).requires_grad_()
        output = reader(images)
        if output.ndim == 3:  # tokens
            rows, columns = reader.as_map(images).shape[-2:]
            sides = torch.tensor([height / rows, width / columns])
            top_left = (positions * sides).round().long()
            return torch.cat([top_left, top_left + sides.round().long()], dim=1)
        output = output if output.ndim == 4 else output[:, :, None, None]
        at = output[torch.arange(len(output)), :, positions[:, 0], positions[:, 1]]
        # different weights, because a sum over all channels can be constant, for example after a softmax
        weights = torch.linspace(1, 2, at.shape[1]).to(at)
        (gradient,) = torch.autograd.grad((at * weights).sum(), images)
    seen, boxes = (gradient != 0).any(dim=1).cpu(), []
    for mask in seen:
        rows, columns = (mask.any(dim=dim).nonzero().flatten() for dim in (1, 0))
        found = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1] if len(rows) else [0, 0, height, width]
        boxes.append([int(x) for x in found])
    return torch.tensor(boxes)


def _cut(image: torch.Tensor, box: Sequence[int], size: tuple[int, int], empty: torch.Tensor) -> torch.Tensor:
    """Cut a box out of an image, and fill the part of the field that is outside of the image."""
    top, left, bottom, right = box
    missing_rows, missing_columns = size[0] - (bottom - top), size[1] - (right - left)
    # the field continues on the side where the image ends
    above = missing_rows if top == 0 else 0
    before = missing_columns if left == 0 else 0
    margins = (before, missing_columns - before, above, missing_rows - above)
    return F.pad(image[:, top:bottom, left:right] - empty, margins) + empty


@torch.no_grad()
def top_patches(
    model: nn.Module,
    images: torch.Tensor | Iterable[torch.Tensor],
    *,
    channels: int | Sequence[int],
    layer: str | nn.Module | None = None,
    k: int = 9,
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
    batch_size: int = 32,
) -> PatchesOutput:
    """Find the patches of a data set with the largest activations of channels.

    Args:
        model: Classifier.
        images: Normalized images of one size, (count, channels, height, width), or an iterable of batches of them.
        channels: One or several channels of the layer.
        layer: Name or module. Defaults to the last feature map.
        k: Number of patches per channel.
        image_mean: Mean of the normalization, for the gray margin, see `fill_patches`.
        image_std: Standard deviation of the normalization, for the gray margin, see `fill_patches`.
        batch_size: Images per forward pass.

    Returns:
        See `PatchesOutput`. If the data set has fewer than k images, there are as many patches as images.

    Raises:
        ValueError: If an argument is unknown or out of range, or the data set is empty.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1.")
    reader, best, kept, count = None, None, {}, 0
    with evaluating(model):
        for batch in split_batches(images, batch_size):
            if reader is None:
                reader = LayerReader(model, batch, default_layers(model, batch)[0] if layer is None else layer)
            output = reader.as_map(batch)
            channels = check_channels(channels, output.shape[1], reader.name)
            values, places = output[:, channels].flatten(2).max(dim=2)
            columns = output.shape[3]
            numbers = torch.arange(count, count + len(batch), device=values.device)[:, None].expand_as(values)
            found = torch.stack([x.double() for x in (values, numbers, places // columns, places % columns)], 2).cpu()
            best = found if best is None else torch.cat([best, found])
            order = best[:, :, 0].argsort(dim=0, descending=True, stable=True)[:k]
            best = best.gather(0, order[:, :, None].expand(-1, -1, 4))
            kept |= {count + i: image for i, image in enumerate(batch)}
            used = set(best[:, :, 1].long().flatten().tolist())
            kept = {number: image.detach().clone() for number, image in kept.items() if number in used}
            count += len(batch)
        if best is None:
            raise ValueError("images has no batch. Expected at least one image.")
        best = best.transpose(0, 1)  # (channels, k, 4)
        numbers, positions = best[:, :, 1].long(), best[:, :, 2:].long()
        chosen = [kept[number] for number in numbers.flatten().tolist()]
        boxes = torch.cat(
            [
                receptive_fields(reader, torch.stack(chosen[start : start + batch_size]), part)
                for start, part in zip(
                    range(0, len(chosen), batch_size), positions.flatten(0, 1).split(batch_size), strict=True
                )
            ]
        )
    size = tuple((boxes[:, 2:] - boxes[:, :2]).amax(dim=0).tolist())
    empty = ((0.5 - per_channel(image_mean, chosen[0])) / per_channel(image_std, chosen[0])).expand(
        chosen[0].shape[0], 1, 1
    )
    patches = torch.stack([_cut(image, box, size, empty) for image, box in zip(chosen, boxes.tolist(), strict=True)])
    shape = numbers.shape
    return PatchesOutput(
        layer=reader.name,
        channels=channels,
        values=best[:, :, 0],
        images=numbers,
        positions=positions,
        boxes=boxes.unflatten(0, shape),
        patches=patches.unflatten(0, shape),
    )
