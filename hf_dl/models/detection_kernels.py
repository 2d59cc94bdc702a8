"""Fast versions of non-maximum suppression, RoI pooling and RoI align for batches.

The definitions with the same names are in detection_boxes.py, and the tests compare both. The kernels of torchvision
exist for single and double precision. Other types are converted to single precision and back.
"""

import torch

# importing torchvision registers the kernels below torch.ops.torchvision
import torchvision.ops  # noqa: F401
from torch import Tensor

from .detection_boxes import interpolation_weights


def non_maximum_suppression(
    boxes: Tensor, scores: Tensor, threshold: float, *, labels: Tensor | None = None
) -> Tensor:
    """Return the indices of the kept boxes. See `detection_boxes.non_maximum_suppression`."""
    boxes = _to_single(boxes)
    if labels is not None and boxes.shape[0]:
        boxes = _separate(boxes, labels)
    kind = torch.promote_types(boxes.dtype, scores.dtype)
    return torch.ops.torchvision.nms(boxes.to(kind), scores.to(kind), threshold)


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Apply non-maximum suppression to each image of a batch.

    Args:
        boxes: (batch, n, 4).
        scores: (batch, n).
        threshold: Boxes with a larger IoU are removed.

    Returns:
        Bool, True for the kept boxes, (batch, n).

    Example:
        >>> boxes = torch.tensor([[[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 10.0, 10.0]]])
        >>> suppress(boxes, torch.tensor([[0.6, 0.9]]), 0.5)
        tensor([[False,  True]])
    """
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if torch.compiler.is_compiling():  # one call for any number of images
        images = torch.arange(scores.shape[0], device=scores.device)[:, None].expand_as(scores)
        found = non_maximum_suppression(boxes.flatten(0, 1), scores.flatten(), threshold, labels=images.flatten())
        return kept.flatten().index_fill(0, found, True).reshape(scores.shape)
    for row, places, values in zip(kept, boxes, scores, strict=True):  # less work: it grows with the square of n
        row[non_maximum_suppression(places, values, threshold)] = True
    return kept


def _separate(boxes: Tensor, labels: Tensor) -> Tensor:
    """Shift boxes (n, 4) so that boxes of different labels do not overlap."""
    boxes = boxes.double()  # the shift would cost precision
    low, high = boxes.min(), boxes.max()
    return boxes - low + labels[:, None] * (high - low + 1)


def roi_pool(features: Tensor, boxes: Tensor, *, bins: int, scale: float) -> Tensor:
    """Return the maximum of the feature map in each part of each box. See `detection_boxes.roi_pool`.

    Args:
        features: Feature maps (batch, channels, height, width).
        boxes: Boxes of each image in pixels, (batch, n, 4).
        bins: Number of rows and columns of parts.
        scale: Cells per pixel.

    Returns:
        (batch * n, channels, bins, bins).
    """
    single = _to_single(features)
    images = torch.arange(boxes.shape[0], device=boxes.device)[:, None, None].expand(-1, boxes.shape[1], 1)
    regions = torch.cat([images, boxes.detach()], dim=-1).flatten(0, 1).to(single.dtype)
    return torch.ops.torchvision.roi_pool(single, regions, scale, bins, bins)[0].to(features.dtype)


def roi_align(features: Tensor, boxes: Tensor, *, bins: int, scale: float, sampling: int = 2) -> Tensor:
    """Return the mean of interpolated points in each part of each box. See `detection_boxes.roi_align`.

    Two products of matrices replace the kernel of torchvision, whose gradient takes several times longer on CPUs.

    Args:
        features: Feature maps (batch, channels, height, width).
        boxes: Boxes of each image in pixels, (batch, n, 4).
        bins: Number of rows and columns of parts.
        scale: Cells per pixel.
        sampling: Points per part and axis.

    Returns:
        (batch * n, channels, bins, bins).
    """
    batch, channels, height, width = features.shape
    box = boxes.detach().flatten(0, 1) * scale - 0.5
    start, size = box[:, :2], box[:, 2:] - box[:, :2]
    columns = interpolation_weights(start[:, 0], size[:, 0], bins, sampling, width).to(features.dtype)
    rows = interpolation_weights(start[:, 1], size[:, 1], bins, sampling, height).to(features.dtype)
    maps = features.transpose(1, 2).reshape(batch, height, channels * width)
    mixed = (
        rows.reshape(batch, -1, height) @ maps
    )  # the rows of cells of each part, (batch, n * bins, channels * width)
    pooled = mixed.reshape(-1, bins * channels, width) @ columns.transpose(1, 2)
    return pooled.reshape(-1, bins, channels, bins).transpose(1, 2)


def _to_single(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
