"""The parts of box detectors from their definitions: box codes, IoU, NMS, anchors, matching, RoI pooling, RoI align.

Boxes are (x0, y0, x1, y1) in pixels, half-open: the width is x1 - x0. The tests compare the functions with
torchvision, which has faster kernels for NMS and RoIs.

* Box codes: Girshick et al., "Rich feature hierarchies for accurate object detection" (R-CNN), CVPR 2014,
  https://arxiv.org/abs/1311.2524.
* RoI pooling: Girshick, "Fast R-CNN", ICCV 2015, https://arxiv.org/abs/1504.08083.
* Anchors and matching: Ren et al., "Faster R-CNN", NeurIPS 2015, https://arxiv.org/abs/1506.01497.
* RoI align: He et al., "Mask R-CNN", ICCV 2017, https://arxiv.org/abs/1703.06870.

Difference from torchvision: anchors lie at the centers of the cells, and not at their top left corners.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NEGATIVE, IGNORED = -1, -2  # results of `match_anchors`

# exp(4.135) = 62.5: the largest factor between the side of a box and the side of its anchor
MAX_LOG_SCALE = math.log(1000 / 16)


def to_centers(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from x0, y0, x1, y1 to center x, center y, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def to_corners(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from center x, center y, width, height to x0, y0, x1, y1."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the IoU of all pairs of boxes.

        IoU = area of the intersection / (area + other area - area of the intersection)

    Args:
        boxes: (n, 4).
        others: (m, 4).

    Returns:
        The IoU (n, m). It is 0 if the intersection has no area.

    Example:
        >>> pairwise_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
        tensor([[0.3333]])
    """
    low = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    areas, other_areas = ((side[:, 2:] - side[:, :2]).prod(-1) for side in (boxes, others))
    union = areas[:, None] + other_areas - intersection
    # the second `where` keeps 0 / 0 out of the gradient
    return torch.where(intersection > 0, intersection / torch.where(union > 0, union, 1), 0)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the IoU of each box (..., 4) with the box at the same place in `others`, (...)."""
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    area, other_area = ((side[..., 2:] - side[..., :2]).prod(-1) for side in (boxes, others))
    union = area + other_area - intersection
    return torch.where(intersection > 0, intersection / torch.where(union > 0, union, 1), 0)


def covered_shares(boxes: Tensor, regions: Tensor) -> Tensor:
    """Compute the share of each box that each region covers, to leave out boxes in ignored regions.

    A small box inside of a large crowd has a small IoU, but a share of 1.

    Args:
        boxes: (..., n, 4).
        regions: (..., m, 4).

    Returns:
        Area of the intersection / area of the box, (..., n, m). It is 0 for a box without area.

    Example:
        >>> covered_shares(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, -9.0, 9.0, 9.0]]))
        tensor([[0.5000]])
    """
    low = torch.maximum(boxes[..., :, None, :2], regions[..., None, :, :2])
    high = torch.minimum(boxes[..., :, None, 2:], regions[..., None, :, 2:])
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[..., None]
    return (high - low).clamp(min=0).prod(-1) / area.clamp(min=1e-6)


def encode_boxes(boxes: Tensor, anchors: Tensor, *, weights: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """Compute the codes that move anchors to boxes: the targets of box regression.

        dx = (x - anchor x) / anchor width, dw = log(width / anchor width), and the same for y and height

    Args:
        boxes: (..., 4), with an area.
        anchors: (..., 4), with an area.
        weights: Factors of dx, dy, dw and dh: one over the standard deviations of the codes. Fast R-CNN uses
            (10, 10, 5, 5), and the proposals of Faster R-CNN use 1.

    Returns:
        The codes (..., 4).
    """
    box, anchor = to_centers(boxes), to_centers(anchors)
    shift = (box[..., :2] - anchor[..., :2]) / anchor[..., 2:]
    scale = (box[..., 2:] / anchor[..., 2:]).log()
    return torch.cat([shift, scale], dim=-1) * boxes.new_tensor(weights)


def decode_boxes(codes: Tensor, anchors: Tensor, *, weights: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """Compute the boxes of codes: the inverse of `encode_boxes`.

    Args:
        codes: (..., 4). The scales are limited to `MAX_LOG_SCALE`, so that an untrained model gives finite boxes.
        anchors: (..., 4).
        weights: As in `encode_boxes`.

    Returns:
        The boxes (..., 4).

    Example:
        >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> decode_boxes(encode_boxes(torch.tensor([[2.0, 3.0, 6.0, 9.0]]), anchors), anchors)
        tensor([[2., 3., 6., 9.]])
    """
    anchor, codes = to_centers(anchors), codes / codes.new_tensor(weights)
    center = anchor[..., :2] + codes[..., :2] * anchor[..., 2:]
    size = anchor[..., 2:] * codes[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    return to_corners(torch.cat([center, size], dim=-1))


def clip_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Cut boxes (..., 4) at the border of an image."""
    limit = boxes.new_tensor([width, height, width, height])
    return boxes.clamp(min=0).minimum(limit)


def non_maximum_suppression(
    boxes: Tensor, scores: Tensor, threshold: float, *, labels: Tensor | None = None
) -> Tensor:
    """Keep the box with the highest score, remove all boxes that overlap with it, and repeat with the others.

    Args:
        boxes: (n, 4).
        scores: (n,).
        threshold: Boxes with a larger IoU are removed.
        labels: (n,). Boxes of different labels do not remove each other. Defaults to one label for all.

    Returns:
        The indices of the kept boxes, by descending score.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
        >>> non_maximum_suppression(boxes, torch.tensor([0.6, 0.9, 0.7]), 0.5)
        tensor([1, 2])
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    overlaps = pairwise_iou(boxes, boxes) > threshold
    if labels is not None:
        overlaps &= labels[order][:, None] == labels[order]
    kept = torch.ones_like(order, dtype=torch.bool)
    for number in range(order.shape[0]):
        if kept[number]:
            kept[number + 1 :] &= ~overlaps[number, number + 1 :]
    return order[kept]


# ---------------------------------------------------------------------------------------------------------------------
# Anchors


def make_anchors(
    height: int,
    width: int,
    stride: int,
    *,
    sizes: Sequence[float],
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    device: torch.device | str | None = None,
) -> Tensor:
    """Return boxes of several sizes and shapes around the center of each cell of a feature map.

    Args:
        height: Height of the feature map in cells.
        width: Width of the feature map in cells.
        stride: Side of a cell in pixels of the image.
        sizes: Square roots of the areas in pixels.
        ratios: Heights divided by widths.
        device: Device of the result.

    Returns:
        The anchors (height * width * sizes * ratios, 4), row by row. The ratio changes fastest, then the size.

    Raises:
        ValueError: If a size or a ratio is not positive.

    Example:
        >>> make_anchors(1, 2, 8, sizes=[4], ratios=[1])
        tensor([[ 2.,  2.,  6.,  6.],
                [10.,  2., 14.,  6.]])
    """
    for name, values in (("sizes", sizes), ("ratios", ratios)):
        if not values or min(values) <= 0:
            raise ValueError(f"{name}={list(values)} is invalid. Expected positive numbers.")
    shapes = torch.tensor(
        [[size / math.sqrt(ratio), size * math.sqrt(ratio)] for size in sizes for ratio in ratios], device=device
    )
    y, x = (stride * (torch.arange(count, device=device) + 0.5) for count in (height, width))
    centers = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[:, :, None]  # (height, width, 1, 2)
    shapes, centers = torch.broadcast_tensors(shapes, centers)
    return to_corners(torch.cat([centers, shapes], dim=-1)).reshape(-1, 4)


def match_anchors(iou: Tensor, *, high: float = 0.7, low: float = 0.3, keep_best: bool = True) -> Tensor:
    """Assign an object to each anchor.

    An anchor with an IoU of at least `high` belongs to the object with the highest IoU. With an IoU below `low`, it is
    a negative. The others are ignored. With `keep_best`, the anchors with the highest IoU of each object, ties
    included, belong to the object that they overlap most. This may be another object, as in torchvision.

    Args:
        iou: IoU of each object and each anchor, (objects, anchors).
        high: Smallest IoU of a positive.
        low: IoU that a negative stays below.
        keep_best: Whether each object with an overlap keeps its best anchors below `high`.

    Returns:
        The index of the object, `NEGATIVE` or `IGNORED`, for each anchor. Without objects, all are negatives.

    Raises:
        ValueError: If `low` is above `high`.
    """
    if low > high:
        raise ValueError(f"low={low} must not be above high={high}.")
    if iou.shape[0] == 0:
        return torch.full(iou.shape[1:], NEGATIVE, device=iou.device)
    value, match = iou.max(0)
    result = torch.where(value >= high, match, torch.where(value < low, NEGATIVE, IGNORED))
    if keep_best:
        best = iou.amax(1, keepdim=True)
        chosen = ((iou == best) & (best > 0)).any(0)
        result = torch.where(chosen, match, result)
    return result


def sample_matches(
    matches: Tensor,
    count: int,
    *,
    positive_share: float = 0.5,
    random: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose anchors for the loss: positives up to their share, filled with negatives.

    Args:
        matches: Results of `match_anchors`, (..., anchors).
        count: Number of anchors to choose from each row.
        positive_share: Largest share of positives.
        random: Whether the choice is random. False takes anchors that are spread over the row, always the same.
        generator: Source of the random numbers. Defaults to the global one.

    Returns:
        Bool, True for the chosen anchors. They are fewer than `count` if there are too few negatives.
    """
    if random:
        keys = torch.rand(matches.shape, generator=generator, device=matches.device)
    else:  # multiples of the golden ratio modulo 1, in integers, are spread evenly
        keys = (torch.arange(matches.shape[-1], device=matches.device) * 40503 % 65536).expand(matches.shape) / 65536
    positive, negative = matches >= 0, matches == NEGATIVE
    chosen = positive & (_rank(keys.masked_fill(~positive, -1)) < int(count * positive_share))
    rest = count - chosen.sum(-1, keepdim=True)
    return chosen | negative & (_rank(keys.masked_fill(~negative, -1)) < rest)


def _rank(values: Tensor) -> Tensor:
    """Return the place of each value in the descending order of its row, from 0."""
    return values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Regions of interest (RoI)


def roi_pool(features: Tensor, boxes: Tensor, images: Tensor, *, bins: int, scale: float) -> Tensor:
    """Divide each box into bins x bins parts, and return the maximum of the feature map in each part.

    The corners of the box are rounded to cells, and both of them belong to the box. Neighboring parts share a row or a
    column of cells where the sides do not divide. A part without cells gives 0.

    Args:
        features: Feature maps (images, channels, height, width).
        boxes: (n, 4) in pixels of the image.
        images: Index of the feature map of each box, (n,).
        bins: Number of rows and columns of parts.
        scale: Cells per pixel, one over the stride.

    Returns:
        (n, channels, bins, bins). The gradient reaches the features only.
    """
    rounded = boxes.detach() * scale
    rounded = rounded.sign() * (rounded.abs() + 0.5).floor()  # halves away from 0, as in C
    start, size = rounded[:, :2], (rounded[:, 2:] - rounded[:, :2] + 1).clamp(min=1)
    part = torch.arange(bins, device=boxes.device, dtype=boxes.dtype)
    first = (part * (size[:, :, None] / bins)).floor() + start[:, :, None]  # (n, 2, bins): x and y
    last = ((part + 1) * (size[:, :, None] / bins)).ceil() + start[:, :, None]

    def inside(axis: int, cells: int) -> Tensor:
        cell = torch.arange(cells, device=boxes.device)
        return (cell >= first[:, axis, :, None]) & (cell < last[:, axis, :, None])  # (n, bins, cells)

    columns, rows = inside(0, features.shape[3]), inside(1, features.shape[2])
    result = []
    for number, image in enumerate(images.tolist()):
        found = features[image].unsqueeze(1).masked_fill(~columns[number][None, :, None], -math.inf).amax(-1)
        found = found.unsqueeze(1).masked_fill(~rows[number][None, :, None], -math.inf).amax(-1)
        result.append(found)  # (channels, bins of rows, bins of columns)
    if not result:
        return features.new_zeros(0, features.shape[1], bins, bins)
    pooled = torch.stack(result)
    return pooled.masked_fill(pooled == -math.inf, 0)


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
    """Divide each box into bins x bins parts, and return the mean of interpolated points of each part.

    The points of a part are a grid of sampling x sampling. The mean of bilinear interpolation over a grid is a product
    of one matrix per axis: `rows @ features @ columns.T`.

    Args:
        features: Feature maps (images, channels, height, width).
        boxes: (n, 4) in pixels of the image.
        images: Index of the feature map of each box, (n,).
        bins: Number of rows and columns of parts.
        scale: Cells per pixel, one over the stride.
        sampling: Points per part and axis. 0 means one point per started cell.
        aligned: Whether the value of a cell belongs to its center. False is the first version of the operation,
            shifted by half a cell, with boxes of at least one cell.

    Returns:
        (n, channels, bins, bins). The gradient reaches the features only.
    """
    box = boxes.detach() * scale - (0.5 if aligned else 0.0)
    start, size = box[:, :2], box[:, 2:] - box[:, :2]
    size = size if aligned else size.clamp(min=1)
    columns = interpolation_weights(start[:, 0], size[:, 0], bins, sampling, features.shape[3]).to(features.dtype)
    rows = interpolation_weights(start[:, 1], size[:, 1], bins, sampling, features.shape[2]).to(features.dtype)
    return torch.einsum("nih,nchw,njw->ncij", rows, features[images], columns)


def interpolation_weights(start: Tensor, size: Tensor, bins: int, sampling: int, cells: int) -> Tensor:
    """Return the weights of the cells of an axis for the mean of the points of each part of `roi_align`.

    Args:
        start: First coordinate of each box in cells, (n,).
        size: Length of each box in cells, (n,).
        bins: Number of parts.
        sampling: Points per part. 0 means one point per started cell.
        cells: Number of cells.

    Returns:
        (n, bins, cells).
    """
    count = torch.full_like(size, sampling) if sampling > 0 else (size / bins).ceil()
    most = sampling if sampling > 0 else int(count.max()) if count.numel() else 0
    point = torch.arange(most, device=size.device, dtype=size.dtype)
    offset = (point + 0.5) / count.clamp(min=1)[:, None]  # (n, points)
    part = torch.arange(bins, device=size.device, dtype=size.dtype)[:, None]
    place = start[:, None, None] + (part + offset[:, None]) * (size / bins)[:, None, None]  # (n, bins, points)
    used = (point < count[:, None])[:, None] & (place >= -1) & (place <= cells)
    place = place.clamp(0, cells - 1)
    # the hat function of a cell is its weight in linear interpolation
    cell = torch.arange(cells, device=size.device, dtype=size.dtype)
    weight = (1 - (place[..., None] - cell).abs()).clamp(min=0) * used[..., None]
    return weight.sum(2) / count.clamp(min=1)[:, None, None]
