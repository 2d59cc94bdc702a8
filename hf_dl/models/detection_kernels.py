"""Fast versions of non-maximum suppression, RoI pooling and RoI align, with the kernels of torchvision.

The definitions with the same names are in detection_boxes.py, and the tests compare both. The kernels exist for single
and double precision; other types are converted to single precision and back.
"""

import torch

# importing torchvision registers the kernels below torch.ops.torchvision
import torchvision.ops  # noqa: F401
from torch import Tensor


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


def roi_pool(features: Tensor, boxes: Tensor, images: Tensor, *, bins: int, scale: float) -> Tensor:
    """Return the maximum of the feature map in each part of each box. See `detection_boxes.roi_pool`."""
    single = _to_single(features)
    regions = torch.cat([images[:, None], boxes.detach()], dim=1).to(single.dtype)
    return torch.ops.torchvision.roi_pool(single, regions, scale, bins, bins)[0].to(features.dtype)


def roi_align(
    features: Tensor,
    boxes: Tensor,
    images: Tensor,
    *,
    bins: int,
    scale: float,
    sampling: int = 2,
    aligned: bool = True,
) -> Tensor:
    """Return the mean of interpolated points in each part of each box. See `detection_boxes.roi_align`."""
    single = _to_single(features)
    regions = torch.cat([images[:, None], boxes.detach()], dim=1).to(single.dtype)
    pooled = torch.ops.torchvision.roi_align(single, regions, scale, bins, bins, sampling, aligned)
    return pooled.to(features.dtype)


def _to_single(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
