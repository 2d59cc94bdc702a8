"""The anchor-free head of a dense detector: each cell of the feature map predicts the classes and one box.

* Cells as points, distances to the four sides, and center sampling: Tian et al., "FCOS: Fully convolutional one-stage
  object detection", ICCV 2019, https://arxiv.org/abs/1904.01355. The head is decoupled: classes and boxes have
  their own convolutions.
* The class score predicts the IoU of the box: Li et al., "Generalized focal loss", NeurIPS 2020,
  https://arxiv.org/abs/2006.04388. This replaces the centerness of FCOS.
* Complete IoU (CIoU): Zheng et al., "Distance-IoU loss", AAAI 2020, https://arxiv.org/abs/1911.08287.

Differences from FCOS: one feature map with a stride of 8 pixels, and every object gets its nearest point even if the
box contains no point.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .detection_backbone import STRIDE, ConvNorm, DetectionConfig, start_with
from .detection_boxes import clip_boxes, paired_iou, to_centers, to_corners
from .detection_output import NO_CLASS

CENTER_RADIUS = 1.5  # strides between an object's center and its points, along each axis
PRIOR = 0.01  # score of an untrained model, so that the many negatives do not dominate the first steps
SIZE_BIAS = 0.7  # exp(0.7) * 8 = 16 pixels: distance to each side in an untrained model
MAX_LOG_DISTANCE = 6.0  # of the distance in strides: limits the boxes of an untrained model
BOX_WEIGHT = 2.0  # of the box loss
REGION = (2 * CENTER_RADIUS) ** 2  # points of a large object


class AnchorFreeHead(nn.Module):
    """Classes and box of each cell.

    Args:
        config: The configuration of the detector.
    """

    def __init__(self, config: DetectionConfig):
        super().__init__()
        width = config.feature_size
        self.class_branch = nn.Sequential(ConvNorm(width, width), nn.ReLU())
        self.box_branch = nn.Sequential(ConvNorm(width, width), nn.ReLU())
        # an untrained model finds nothing, and its boxes have a usual size
        rare = -math.log((1 - PRIOR) / PRIOR)
        self.class_output = start_with(nn.Conv2d(width, config.num_labels, 1), [rare] * config.num_labels)
        self.box_output = start_with(nn.Conv2d(width, 4, 1), [SIZE_BIAS] * 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the classes and boxes of all cells.

        Args:
            features: (batch, channels, rows, columns).

        Returns:
            Logits (batch, cells, classes), and boxes (batch, cells, 4) as x0, y0, x1, y1 in pixels, not clipped.
        """
        logits = self.class_output(self.class_branch(features)).flatten(2).transpose(1, 2)
        distances = self.box_output(self.box_branch(features)).flatten(2).transpose(1, 2).float()
        distances = distances.clamp(max=MAX_LOG_DISTANCE).exp() * STRIDE  # left, top, right, bottom
        points = cell_centers(*features.shape[-2:], device=features.device)
        return logits, torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)

    def decode(self, predictions: tuple[Tensor, Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Convert predictions to `logits` and `pred_boxes` of `DetectionOutput`.

        Args:
            predictions: Result of `forward`.
            height: Height of the image in pixels.
            width: Width of the image in pixels.
        """
        logits, boxes = predictions
        sides = boxes.new_tensor([width, height, width, height])
        return logits, to_centers(clip_boxes(boxes, height, width) / sides)

    def losses(
        self, predictions: tuple[Tensor, Tensor], classes: Tensor, boxes: Tensor, height: int, width: int
    ) -> dict[str, Tensor]:
        """Compute the loss terms, see `anchor_free_losses`.

        Args:
            predictions: Result of `forward`.
            classes: Classes, int (batch, rows), with `NO_CLASS` for padding and ignored regions.
            boxes: Boxes (batch, rows, 4) as center x, center y, width, height in [0, 1].
            height: Height of the image in pixels.
            width: Width of the image in pixels.
        """
        logits, found = predictions
        corners = to_corners(boxes) * boxes.new_tensor([width, height, width, height])
        points = cell_centers(height // STRIDE, width // STRIDE, device=boxes.device)
        pairs = [assign_points(points, *image) for image in zip(classes, corners, strict=True)]
        owners, ignored = (torch.stack(part) for part in zip(*pairs, strict=True))
        return anchor_free_losses(logits.float(), found, classes, corners, owners, ignored)


def cell_centers(rows: int, columns: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the centers x, y of the cells in pixels, (rows * columns, 2), row by row.

    Example:
        >>> cell_centers(1, 2)
        tensor([[ 4.,  4.],
                [12.,  4.]])
    """
    y, x = (STRIDE * (torch.arange(count, device=device) + 0.5) for count in (rows, columns))
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1)


@torch.no_grad()
def assign_points(points: Tensor, classes: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Assign an object to each point of an image.

    A point belongs to an object if it is inside the box, and at most 1.5 strides from the center of the box along each
    axis. The point nearest to the center always belongs to the object. If several objects claim a point, the claim as
    the nearest point comes first, then the smaller box.

    Args:
        points: (points, 2) as x, y in pixels.
        classes: (rows,), with `NO_CLASS` for padding and ignored regions.
        boxes: (rows, 4) as x0, y0, x1, y1 in pixels.

    Returns:
        The row of the object of each point or -1, int (points,); and bool (points,), True for points without an object
        inside an ignored region.
    """
    real = classes != NO_CLASS
    inside = ((points[:, None] > boxes[:, :2]) & (points[:, None] < boxes[:, 2:])).all(-1)  # (points, rows)
    offset = (points[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2).abs()
    claimed = inside & (offset <= CENTER_RADIUS * STRIDE).all(-1)
    nearest = offset.square().sum(-1).argmin(0)  # (rows,)
    nearest = torch.arange(points.shape[0], device=points.device)[:, None] == nearest
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1).double()  # in single precision, area - 1e9 is exact to 64 pixels
    cost = torch.where(claimed, area, math.inf)
    cost = torch.where(nearest, area - 1e9, cost).masked_fill(~real, math.inf)  # no image has 1e9 pixels
    best, owner = cost.min(1)
    positive = best < math.inf
    return torch.where(positive, owner, -1), (inside & ~real).any(1) & ~positive


def anchor_free_losses(
    logits: Tensor, found: Tensor, classes: Tensor, boxes: Tensor, owners: Tensor, ignored: Tensor
) -> dict[str, Tensor]:
    """Compute the loss terms of a batch.

        classification = sum of |y - p|^2 * BCE(p, y), with y = IoU for the class of the object, else 0
        box            = 2 * sum of (1 - CIoU)

    Both are divided by 9 times the number of images, because a large object has 9 points. With the number of points as
    divisor, as in FCOS, the loss of a batch would not be the mean of the losses of its parts.

    Args:
        logits: (batch, points, classes).
        found: Predicted boxes (batch, points, 4) as x0, y0, x1, y1.
        classes: (batch, rows).
        boxes: Boxes of the objects (batch, rows, 4).
        owners: Result of `assign_points`, (batch, points).
        ignored: Points without a loss, (batch, points).

    Returns:
        `classification` and `box`, whose sum is the loss.
    """
    positive = owners >= 0
    rows = owners.clamp(min=0)
    count = REGION * logits.shape[0]
    target = boxes.gather(1, rows[..., None].expand(-1, -1, 4))
    target = torch.where(positive[..., None], target, found.detach())  # a box with a finite loss, which is not used
    quality = paired_iou(found, target).detach().clamp(0, 1) * positive
    hot = F.one_hot(classes.gather(1, rows).clamp(min=0), logits.shape[-1])
    wanted = quality[..., None] * hot
    focus = (wanted - logits.sigmoid()).square()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    classification = (focus * entropy).sum(-1) * ~ignored
    box = (1 - complete_iou(found, target)) * positive
    return {"classification": classification.sum() / count, "box": BOX_WEIGHT * box.sum() / count}


def complete_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the complete IoU of pairs of boxes: the IoU minus costs of the distance and the aspect ratio.

        CIoU = IoU - d^2 / c^2 - a * v, v = 4 / pi^2 * (difference of atan(width / height))^2, a = v / (1 - IoU + v)

    d is the distance of the centers, and c is the diagonal of the smallest box around both. a has no gradient.

    Args:
        boxes: (..., 4) as x0, y0, x1, y1, with an area.
        others: (..., 4).

    Returns:
        The complete IoU (...), at most 1. It has a gradient for boxes without overlap.

    Example:
        >>> complete_iou(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([2.0, 0.0, 4.0, 2.0]))
        tensor(-0.2000)
    """
    iou = paired_iou(boxes, others)
    low = torch.minimum(boxes[..., :2], others[..., :2])
    high = torch.maximum(boxes[..., 2:], others[..., 2:])
    diagonal = (high - low).square().sum(-1).clamp(min=1e-7)
    (center, size), (other, other_size) = (to_centers(each).split(2, -1) for each in (boxes, others))
    distance = (center - other).square().sum(-1)
    angles = [torch.atan(each[..., 0] / each[..., 1].clamp(min=1e-7)) for each in (size, other_size)]
    aspect = 4 / math.pi**2 * (angles[0] - angles[1]).square()
    weight = (aspect / (1 - iou + aspect).clamp(min=1e-7)).detach()
    return iou - distance / diagonal - weight * aspect
