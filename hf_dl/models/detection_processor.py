"""The image processor of the detectors: images and annotations in, boxes in pixels of the original images out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms
from transformers import BatchFeature
from transformers.image_utils import ImageInput, PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .detection_boxes import to_centers, to_corners
from .detection_output import DetectionOutput
from .image_input import RgbImageProcessor

MAX_CANDIDATES = 1000  # boxes per image that enter NMS, the highest scores


class DetectionImageProcessorKwargs(ImagesKwargs, total=False):
    """The settings of `DetectionImageProcessor` besides the settings of all image processors."""

    nms_threshold: float
    max_detections: int
    num_proposals: int


class DetectionImageProcessor(RgbImageProcessor):
    """Resize images and their boxes to one size, and turn the output of a detector into boxes.

    The aspect ratio changes, so normalized boxes are the same before and after, and all batches have one size.

    Args:
        size: Height and width of the input of the model, multiples of 8.
        nms_threshold: IoU above which the box with the lower score is removed, for boxes of the same class.
        max_detections: Largest number of boxes per image.
        num_proposals: Boxes of selective search per image, for Fast R-CNN. Defaults to none.
        **kwargs: Settings of all image processors.

    Example:
        >>> processor = DetectionImageProcessor(size={"height": 64, "width": 64})
        >>> annotation = {"image_id": 1, "annotations": [{"bbox": [10, 0, 20, 50], "category_id": 2}]}
        >>> image = torch.zeros(3, 100, 50, dtype=torch.uint8)
        >>> batch = processor(image, annotations=annotation, return_tensors="pt")
        >>> batch["pixel_values"].shape, batch["labels"][0]["class_labels"].tolist()
        (torch.Size([1, 3, 64, 64]), [2])
        >>> [round(number, 2) for number in batch["labels"][0]["boxes"][0].tolist()]
        [0.4, 0.25, 0.4, 0.5]
    """

    resample = PILImageResampling.BILINEAR
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.25, 0.25, 0.25]
    size = {"height": 128, "width": 128}
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    nms_threshold = 0.6
    max_detections = 100
    num_proposals = 0
    valid_kwargs = DetectionImageProcessorKwargs

    def preprocess(
        self,
        images: ImageInput,
        annotations: dict | Sequence[dict] | None = None,
        proposals: Sequence[Sequence[Sequence[float]]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images, and their boxes if annotations are given.

        Args:
            images: One image or several.
            annotations: One dictionary per image, as in COCO: `image_id` and `annotations`, a list of dictionaries
                with `bbox` (x, y, width, height in pixels) and `category_id` from 0. Optional: `iscrowd`, and
                `difficult` as in PASCAL VOC. Boxes are cut at the border, and boxes without area are left out.
            proposals: Boxes of each image, x0, y0, x1, y1 in pixels. Defaults to selective search, which takes 0.1
                seconds per small image. They are unused if `num_proposals` is 0.
            **kwargs: Other settings for this call, and `return_tensors`.

        Returns:
            `pixel_values` (batch, 3, height, width), and `labels` if annotations are given: one dictionary per image.
            `class_labels` (objects,) and `boxes` (objects, 4), center x, center y, width, height in [0, 1], are the
            objects. `ignored_boxes` (regions, 4) are crowds and difficult objects. `orig_size` is height and width.
            With `num_proposals`, `proposals` (batch, num_proposals, 4), see `stack_proposals`.

        Raises:
            ValueError: If the numbers of images and annotations differ, or an annotation is invalid.
        """
        return super().preprocess(images, annotations, proposals, **kwargs)

    def _preprocess(
        self,
        images: list[Tensor],
        annotations: dict | Sequence[dict] | None,
        proposals: Sequence[Sequence[Sequence[float]]] | None,
        *,
        num_proposals: int,
        **kwargs: Any,
    ) -> BatchFeature:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        encoded = super()._preprocess(images, **kwargs)
        if num_proposals:
            if proposals is None:
                # not at the top: only Fast R-CNN needs scipy
                from .selective_search import selective_search

                proposals = [selective_search(image.permute(1, 2, 0).cpu().numpy()) for image in images]
            encoded["proposals"] = stack_proposals(proposals, sizes, count=num_proposals)
        if annotations is not None:
            annotations = [annotations] if isinstance(annotations, dict) else annotations
            if len(annotations) != len(images):
                raise ValueError(
                    f"Got {len(images)} images and {len(annotations)} annotations. Expected one annotation per image."
                )
            encoded["labels"] = [make_label(row, *size) for row, size in zip(annotations, sizes, strict=True)]
        return encoded

    def post_process_object_detection(
        self,
        outputs: DetectionOutput,
        threshold: float = 0.5,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Turn the output of a detector into boxes, with the arguments of transformers' pipeline.

        For average precision, use a low threshold such as 0.01: precision at high recall needs all boxes.

        Args:
            outputs: Output of the model, or an object with `logits` and `pred_boxes`.
            threshold: Boxes with this score or less are removed.
            target_sizes: Height and width of each image. Defaults to boxes in [0, 1].

        Returns:
            `scores` (n,), `labels` (n,) and `boxes` (n, 4) as x0, y0, x1, y1 of each image, by descending score.

        Raises:
            ValueError: If the numbers of target sizes and images differ.
        """
        if target_sizes is not None and len(target_sizes) != len(outputs.logits):
            raise ValueError(
                f"target_sizes has {len(target_sizes)} entries for {len(outputs.logits)} images. Expected one per "
                "image."
            )
        probabilities = outputs.logits.float().sigmoid()
        corners = to_corners(outputs.pred_boxes.float()).clamp(0, 1)
        results = []
        for number, (scores, boxes) in enumerate(zip(probabilities, corners, strict=True)):
            found = select_boxes(
                boxes, scores, threshold, nms_threshold=self.nms_threshold, max_detections=self.max_detections
            )
            if target_sizes is not None:
                height, width = (float(side) for side in target_sizes[number])
                found["boxes"] = found["boxes"] * found["boxes"].new_tensor([width, height, width, height])
            results.append(found)
        return results


def select_boxes(
    boxes: Tensor, scores: Tensor, threshold: float, *, nms_threshold: float, max_detections: int
) -> dict[str, Tensor]:
    """Return the boxes of an image that remain after the threshold and non-maximum suppression per class.

    Args:
        boxes: (n, 4) as x0, y0, x1, y1, not negative.
        scores: (n, classes). A box may be found for several classes.
        threshold: Boxes with this score or less are removed.
        nms_threshold: IoU above which the box with the lower score is removed.
        max_detections: Largest number of boxes.

    Returns:
        `scores`, `labels` and `boxes`, by descending score.
    """
    rows, labels = (scores > threshold).nonzero(as_tuple=True)
    values = scores[rows, labels]
    order = values.argsort(descending=True, stable=True)[:MAX_CANDIDATES]
    rows, labels, values = rows[order], labels[order], values[order]
    # axes are scaled separately, which keeps IoUs, so normalized boxes are good enough
    kept = batched_nms(boxes[rows], values, labels, nms_threshold)[:max_detections]
    return {"scores": values[kept], "labels": labels[kept], "boxes": boxes[rows[kept]]}


def make_label(annotation: dict[str, Any], height: int, width: int) -> dict[str, Tensor]:
    """Convert the annotation of an image from the format of COCO to the labels of a detector.

    Args:
        annotation: Dictionary with `annotations`, see `DetectionImageProcessor.preprocess`.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Returns:
        The label, see `DetectionImageProcessor.preprocess`.

    Raises:
        ValueError: If a key is missing or a box does not have four finite numbers.
    """
    objects = annotation.get("annotations")
    if objects is None:
        raise ValueError(f"An annotation has the keys {sorted(annotation)}. Expected 'image_id' and 'annotations'.")
    name = f"The annotation of image {annotation.get('image_id')!r}"
    for entry in objects:
        if "bbox" not in entry or "category_id" not in entry:
            raise ValueError(f"{name} has an object with the keys {sorted(entry)}. Expected 'bbox' and 'category_id'.")
        if len(entry["bbox"]) != 4:
            raise ValueError(f"{name} has bbox={list(entry['bbox'])}. Expected x, y, width and height.")
    boxes = torch.tensor([list(entry["bbox"]) for entry in objects], dtype=torch.float32).reshape(-1, 4)
    if not boxes.isfinite().all():
        raise ValueError(f"{name} has a bbox with a number that is not finite. Expected x, y, width and height.")
    classes = torch.tensor([int(entry["category_id"]) for entry in objects], dtype=torch.int64)
    unwanted = torch.tensor(
        [bool(entry.get("iscrowd") or entry.get("difficult")) for entry in objects], dtype=torch.bool
    )
    sides = torch.tensor([width, height, width, height], dtype=torch.float32)
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    corners = corners.clamp(min=0).minimum(sides)
    filled = (corners[:, 2:] > corners[:, :2]).all(1)
    normalized = to_centers(corners / sides)
    return {
        "class_labels": classes[filled & ~unwanted],
        "boxes": normalized[filled & ~unwanted],
        "ignored_boxes": normalized[filled & unwanted],
        "orig_size": torch.tensor([height, width]),
    }


def stack_proposals(
    proposals: Sequence[Sequence[Sequence[float]]], sizes: Sequence[tuple[int, int]], *, count: int
) -> Tensor:
    """Bring the proposals of a batch to one number per image, as the input of a detector.

    Args:
        proposals: Boxes of each image, x0, y0, x1, y1 in pixels.
        sizes: Height and width of each image.
        count: Number of boxes per image. Later boxes are left out.

    Returns:
        Center x, center y, width and height, divided by the size of the image, (images, count, 4). Rows of zeros fill
        images with fewer boxes.

    Example:
        >>> stack_proposals([[[0, 0, 8, 4]], []], [(8, 16), (8, 8)], count=1)
        tensor([[[0.2500, 0.2500, 0.5000, 0.5000]],
        <BLANKLINE>
                [[0.0000, 0.0000, 0.0000, 0.0000]]])
    """
    result = torch.zeros(len(proposals), count, 4)
    for row, boxes, (height, width) in zip(result, proposals, sizes, strict=True):
        corners = torch.as_tensor(np.asarray(boxes[:count], np.float32).reshape(-1, 4))
        row[: len(corners)] = to_centers(corners / torch.tensor([width, height, width, height]))
    return result
