"""Outputs and labels of the detectors: the names and the box format of DETR in transformers.

Carion et al., "End-to-end object detection with transformers" (DETR), ECCV 2020, https://arxiv.org/abs/2005.12872.

Difference from DETR: `sigmoid(logits)` is the score of each class, and no class means "no object". Boxes overlap until
`DetectionImageProcessor.post_process_object_detection` removes duplicates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

PADDING_LOGIT = -1e4  # of boxes that only fill up a batch: their score is 0, also in half precision
NO_CLASS = -1  # class of padding, and of regions without a class, in `pad_labels`

Labels = Sequence[Mapping[str, Tensor]] | Tensor


@dataclass
class DetectionOutput(ModelOutput):
    """Output of a detector.

    Args:
        loss: Sum of the loss terms, if `labels` are given.
        loss_dict: The loss terms by name. Their sum is the loss.
        logits: (batch, boxes, classes). `sigmoid(logits)` is the score of each class.
        pred_boxes: (batch, boxes, 4) as center x, center y, width, height, in [0, 1] of the image.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: torch.FloatTensor | None = None
    pred_boxes: torch.FloatTensor | None = None


def pad_labels(labels: Labels, num_labels: int, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Return the labels of a batch as two tensors with the same number of rows per image.

    Args:
        labels: One dictionary per image with `class_labels`, int (objects,), and `boxes` (objects, 4) as center x,
            center y, width, height in [0, 1]. Optional: `ignored_boxes` (regions, 4), such as crowds. Or a tensor
            (batch, rows, 5) with the class and the box of each row. The class is `NO_CLASS` in padding and ignored
            regions. The classes of a tensor are not checked.
        num_labels: Number of classes.
        device: Device of the result. Defaults to the device of the labels.

    Returns:
        The classes, int64 (batch, rows), and the boxes, float32 (batch, rows, 4). Padding has boxes without area.

    Raises:
        ValueError: If a key is missing, the shapes differ, or a class is not in [0, num_labels).

    Example:
        >>> empty = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
        >>> one = {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
        >>> classes, boxes = pad_labels([empty, one], 3)
        >>> classes.tolist(), boxes.shape
        ([[-1], [2]], torch.Size([2, 1, 4]))
    """
    if isinstance(labels, Tensor):
        if labels.ndim != 3 or labels.shape[2] != 5:
            raise ValueError(f"labels has shape {tuple(labels.shape)}, expected (batch, rows, 5): class and box.")
        labels = labels.to(device or labels.device)
        return labels[..., 0].long(), labels[..., 1:].float()
    rows = [_read_label(row, number, num_labels) for number, row in enumerate(labels)]
    most = max(max((kinds.shape[0] for kinds, _ in rows), default=0), 1)
    device = device or (rows[0][1].device if rows else None)
    classes = torch.full((len(rows), most), NO_CLASS, device=device)
    boxes = torch.zeros(len(rows), most, 4, device=device)
    for number, (kinds, places) in enumerate(rows):
        classes[number, : kinds.shape[0]] = kinds.to(device)
        boxes[number, : kinds.shape[0]] = places.to(device)
    return classes, boxes


def _read_label(row: Mapping[str, Tensor], number: int, num_labels: int) -> tuple[Tensor, Tensor]:
    for key in ("class_labels", "boxes"):
        if key not in row:
            raise ValueError(f"labels[{number}] has no {key!r}. Expected class_labels and boxes, as DETR.")
    classes, boxes = row["class_labels"].long(), row["boxes"].float().reshape(-1, 4)
    if classes.shape != boxes.shape[:1]:
        raise ValueError(
            f"labels[{number}] has {boxes.shape[0]} boxes and class_labels of shape {tuple(classes.shape)}."
        )
    if classes.numel() and not (0 <= int(classes.min()) and int(classes.max()) < num_labels):
        wrong = int(classes[(classes < 0) | (classes >= num_labels)][0])
        raise ValueError(
            f"labels[{number}] has the class {wrong}. Expected 0 to {num_labels - 1}, because the model has "
            f"{num_labels} classes. Map the ids of the data to this range."
        )
    ignored = row.get("ignored_boxes")
    if ignored is not None and ignored.numel():
        ignored = ignored.float().reshape(-1, 4)
        classes = torch.cat([classes, classes.new_full(ignored.shape[:1], NO_CLASS)])
        boxes = torch.cat([boxes, ignored])
    return classes, boxes
