"""The head and the loss of YOLO v1: a grid of cells, each with a few boxes and one set of classes.

Redmon et al., "You only look once: Unified, real-time object detection", CVPR 2016, https://arxiv.org/abs/1506.02640,
and the layer "detection" of darknet.

    output    S x S x (5 B + C): per cell B boxes (x, y, sqrt(w), sqrt(h), confidence), and C classes; all linear
    x, y      relative to the cell, in [0, 1]
    w, h      relative to the image; the network predicts their square roots, as in darknet
    score     confidence * class

A cell is responsible for the object whose center it contains, and for the first of several. In the cell, the box with
the highest IoU is responsible; if no box overlaps, the one with the smallest error.

Differences from the paper: `yolo_head="convolution"` shares its weights between cells and learns from few images.
"fully_connected" is the head of the paper. Confidence and class are limited to [0, 1] before their product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .detection_backbone import ConvNorm, start_with
from .detection_boxes import paired_iou, to_centers, to_corners
from .detection_output import NO_CLASS

COORDINATE_WEIGHT, NO_OBJECT_WEIGHT = 5.0, 0.5
MIN_SCORE = 1e-6  # keeps the log-odds of scores finite


class YoloV1Head(nn.Module):
    """The boxes and classes of a grid of S x S cells.

    Args:
        config: The configuration of the detector.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.size, self.boxes, self.num_labels = config.grid_size, config.boxes_per_cell, config.num_labels
        width, outputs = config.feature_size, 5 * config.boxes_per_cell + config.num_labels
        # boxes start at the center of the cell, with a usual size
        start = [0.5, 0.5, 0.45, 0.45, 0.1] * config.boxes_per_cell + [1 / config.num_labels] * config.num_labels
        self.shared = nn.Sequential(ConvNorm(width, 2 * width, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(self.size))
        if config.yolo_head == "convolution":
            self.hidden = nn.Sequential(ConvNorm(2 * width, 2 * width), nn.ReLU())
            self.output = start_with(nn.Conv2d(2 * width, outputs, 1), start)
        else:
            self.hidden = nn.Sequential(
                nn.Flatten(),
                nn.Linear(2 * width * self.size**2, config.hidden_size),
                nn.LeakyReLU(0.1),
                nn.Dropout(config.dropout),
            )
            output = nn.Linear(config.hidden_size, outputs * self.size**2)
            self.output = start_with(output, start * self.size**2)

    def forward(self, features: Tensor) -> Tensor:
        """Predict the cells, (batch, S * S, 5 B + C), row by row.

        Args:
            features: (batch, channels, rows, columns).
        """
        output = self.output(self.hidden(self.shared(features)))
        if output.ndim == 4:
            return output.flatten(2).transpose(1, 2)
        return output.unflatten(1, (self.size**2, -1))

    def decode(self, predictions: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Convert predictions to `logits` and `pred_boxes` of `DetectionOutput`.

        Args:
            predictions: Result of `forward`.
            height: Height of the image; not needed, because boxes are relative to it.
            width: Width of the image; not needed.
        """
        places, confidence, classes = split_cells(predictions, self.boxes)
        score = confidence.clamp(0, 1)[..., None] * classes.clamp(0, 1)[:, :, None]  # (batch, cells, B, C)
        logits = torch.logit(score.flatten(1, 2).float(), eps=MIN_SCORE)
        boxes = to_corners(cell_boxes(places.float(), self.size)).clamp(0, 1)
        return logits, to_centers(boxes).flatten(1, 2)

    def losses(
        self, predictions: Tensor, classes: Tensor, boxes: Tensor, height: int, width: int
    ) -> dict[str, Tensor]:
        """Compute the loss terms, see `yolo_v1_losses`.

        Args:
            predictions: Result of `forward`.
            classes: Classes, int (batch, rows), with `NO_CLASS` for padding and ignored regions.
            boxes: Boxes (batch, rows, 4) as center x, center y, width, height in [0, 1].
            height: Height of the image; not needed, because boxes are relative to it.
            width: Width of the image; not needed.
        """
        return yolo_v1_losses(predictions.float(), classes, boxes, size=self.size, count=self.boxes)


def split_cells(predictions: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places (..., B, 4), confidences (..., B) and classes (..., C) of cells (..., 5 B + C)."""
    boxes = predictions[..., : 5 * count].unflatten(-1, (count, 5))
    return boxes[..., :4], boxes[..., 4], predictions[..., 5 * count :]


def cell_boxes(places: Tensor, size: int) -> Tensor:
    """Return the boxes of places as center x, center y, width, height, relative to the image.

    Args:
        places: (batch, S * S, B, 4) as x, y in the cell, sqrt(width), sqrt(height).
        size: S.

    Returns:
        Boxes of the same shape.
    """
    row = torch.arange(size, device=places.device)
    corner = torch.stack(torch.meshgrid(row, row, indexing="ij")[::-1], dim=-1).reshape(-1, 1, 2)  # x, y
    return torch.cat([(corner + places[..., :2]) / size, places[..., 2:].square()], dim=-1)


def yolo_v1_losses(predictions: Tensor, classes: Tensor, boxes: Tensor, *, size: int, count: int) -> dict[str, Tensor]:
    """Compute the loss terms of a batch: squared errors, summed over the grid, averaged over the images.

        coordinates = 5 * squared error of x, y, sqrt(w), sqrt(h) of responsible boxes
        object      = (confidence - IoU)^2 of responsible boxes; the IoU of the current box has no gradient
        no_object   = 0.5 * confidence^2 of all other boxes, also in cells with an object
        class       = squared error of all classes of cells with an object

    Args:
        predictions: (batch, S * S, 5 B + C).
        classes: Classes, int (batch, rows), with `NO_CLASS` for padding and ignored regions.
        boxes: Boxes (batch, rows, 4) as center x, center y, width, height in [0, 1].
        size: S.
        count: B.

    Returns:
        The four terms, whose sum is the loss. Cells with a center in an ignored region and no object have no loss.
    """
    places, confidence, scores = split_cells(predictions, count)
    real, cells = classes != NO_CLASS, torch.arange(size**2, device=boxes.device)
    place = (boxes[..., :2] * size).floor().clamp(0, size - 1)  # column, row
    number = place[..., 1] * size + place[..., 0]
    inside = (number[:, None] == cells[:, None]) & real[:, None]  # (batch, cells, rows)
    filled, owner = inside.any(-1), inside.int().argmax(-1)  # the first object of the cell
    truth = boxes.gather(1, owner[..., None].expand(-1, -1, 4))  # (batch, cells, 4)

    found = cell_boxes(places, size)
    pairs = (to_corners(found), to_corners(truth)[:, :, None])
    with torch.no_grad():
        iou = paired_iou(*torch.broadcast_tensors(*pairs))  # (batch, cells, B)
        error = (found - truth[:, :, None]).square().sum(-1)
        rank = torch.where(iou.amax(-1, keepdim=True) > 0, iou, -error)
        responsible = F.one_hot(rank.argmax(-1), count).bool() & filled[..., None]
        center = (torch.stack([cells % size, cells // size], dim=-1) + 0.5) / size
        corners = to_corners(boxes)[:, None]
        covered = ((center[:, None] > corners[..., :2]) & (center[:, None] < corners[..., 2:])).all(-1)
        ignored = (covered & ~real[:, None]).any(-1) & ~filled

    in_cell = truth[..., :2] * size - torch.stack([cells % size, cells // size], dim=-1)
    target = torch.cat([in_cell, truth[..., 2:].clamp(min=0).sqrt()], dim=-1)[:, :, None]
    hot = F.one_hot(classes.gather(1, owner).clamp(min=0), scores.shape[-1])
    terms = {
        "coordinates": COORDINATE_WEIGHT * (places - target).square().sum(-1) * responsible,
        "object": (confidence - iou).square() * responsible,
        "no_object": NO_OBJECT_WEIGHT * confidence.square() * ~responsible * ~ignored[..., None],
        "class": (scores - hot).square().sum(-1) * filled,
    }
    return {name: term.sum() / predictions.shape[0] for name, term in terms.items()}
