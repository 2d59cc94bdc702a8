"""Detectors that predict the boxes of all cells of a feature map at once, without proposals.

`head_type` names the head, a key of `DENSE_HEADS`:

* "anchor_free": one box per cell of 8x8 pixels, see detection_anchor_free.py.
* "yolo_v1": a grid of S x S cells with B boxes each, see detection_yolo_v1.py.

`DetectionImageProcessor` turns the outputs into boxes in pixels and removes duplicates.
"""

from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .detection_anchor_free import AnchorFreeHead
from .detection_backbone import DetectionBackbone, DetectionConfig, init_detection_weights
from .detection_output import DetectionOutput, Labels, pad_labels
from .detection_yolo_v1 import YoloV1Head

# The pipeline accepts a model only if its name is in this table.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["dense_detector"] = "DenseDetectorForObjectDetection"

DENSE_HEADS = {"anchor_free": AnchorFreeHead, "yolo_v1": YoloV1Head}


@strict
class DenseDetectorConfig(DetectionConfig):
    """Configuration of a `DenseDetectorForObjectDetection`. See `DetectionConfig` for the fields of the backbone.

    Args:
        head_type: A key of `DENSE_HEADS`.
        grid_size: S of "yolo_v1", the number of rows and of columns of cells.
        boxes_per_cell: B of "yolo_v1".
        yolo_head: Layers of "yolo_v1": "convolution", or "fully_connected" as in the paper.
        hidden_size: Neurons of the hidden layer of "fully_connected".
        dropout: Dropout probability of "fully_connected", at least 0 and less than 1.

    Example:
        >>> DenseDetectorConfig(id2label={0: "cat", 1: "dog"}).num_labels
        2
    """

    model_type = "dense_detector"

    head_type: str = "anchor_free"
    grid_size: int = 8
    boxes_per_cell: int = 2
    yolo_head: Literal["convolution", "fully_connected"] = "convolution"
    hidden_size: int = 512
    dropout: float = 0.5

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid or does not fit another field.
        """
        super().validate_architecture()
        if self.head_type not in DENSE_HEADS:
            raise ValueError(f"head_type={self.head_type!r} is unknown. Choose one of: {', '.join(DENSE_HEADS)}.")
        for name in ("grid_size", "boxes_per_cell", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")


class DenseDetectorForObjectDetection(PreTrainedModel):
    """A backbone and a dense head.

    Example:
        >>> model = DenseDetectorForObjectDetection(DenseDetectorConfig(num_labels=4)).eval()
        >>> label = {"class_labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}
        >>> output = model(torch.zeros(1, 3, 64, 64), labels=[label])
        >>> output.logits.shape, output.pred_boxes.shape, sorted(output.loss_dict)
        (torch.Size([1, 64, 4]), torch.Size([1, 64, 4]), ['box', 'classification'])
    """

    config: DenseDetectorConfig
    base_model_prefix = "dense_detector"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps

    def __init__(self, config: DenseDetectorConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = DetectionBackbone(config)
        self.head = DENSE_HEADS[config.head_type](config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_detection_weights(module)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, labels: Labels | None = None, **kwargs: Any) -> DetectionOutput:
        """Detect objects.

        Args:
            pixel_values: (batch, 3, height, width). Height and width are multiples of 8.
            labels: One dictionary per image with `class_labels` and `boxes`, or a padded tensor; see `pad_labels`.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            The output, see `DetectionOutput`. The loss terms are means over the images.

        Raises:
            ValueError: If the images or the labels are invalid.
        """
        height, width = pixel_values.shape[-2:]
        predictions = self.head(self.backbone(pixel_values))
        logits, boxes = self.head.decode(predictions, height, width)
        loss = terms = None
        if labels is not None:
            classes, places = pad_labels(labels, self.num_labels, device=pixel_values.device)
            if classes.shape[0] != pixel_values.shape[0]:
                raise ValueError(
                    f"Got {pixel_values.shape[0]} images and labels of {classes.shape[0]}. Expected one per image."
                )
            terms = self.head.losses(predictions, classes, places, height, width)
            loss = sum(terms.values())
        return DetectionOutput(loss=loss, loss_dict=terms, logits=logits, pred_boxes=boxes)
