"""R-CNN: each proposal of selective search is cut out, warped to a square and classified by itself.

1. `DetectionImageProcessor` with `num_proposals` runs selective search.
2. Each proposal is warped to the size of the crop, with some pixels of context around it. Outside of the image, the
   crop is gray.
3. The backbone and a hidden layer give a feature vector per crop.
4. A linear support vector machine (SVM) per class scores the vector. Per class, a linear map moves the box.

Training has two parts. `forward` with labels computes the loss of fine-tuning: cross-entropy with the class "no
object". hf_dl/recipes/rcnn.py then fits the SVMs and the boxes, and sets `config.fitted`. Before that, the classifier
of the fine-tuning gives the scores, and boxes do not move.

Girshick et al. 2014, "Rich feature hierarchies for accurate object detection and semantic segmentation",
https://arxiv.org/abs/1311.2524. Differences: a smaller network and crops of 48 pixels instead of 227.
"""

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .detection_backbone import STRIDE, DetectionBackbone, DetectionConfig, init_detection_weights
from .detection_boxes import decode_boxes, to_centers, to_corners
from .detection_output import NO_CLASS, PADDING_LOGIT, DetectionOutput, Labels, pad_labels
from .localizer import log_odds
from .sliding_window import choose_windows, cut_windows
from .two_stage_detector import read_proposals

# The pipeline accepts a model only if its name is in this table.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["rcnn"] = "RcnnForObjectDetection"


@strict
class RcnnConfig(DetectionConfig):
    """Configuration of a `RcnnForObjectDetection`. See `DetectionConfig` for the fields of the backbone.

    Args:
        crop_size: Height and width of the warped crops in pixels, a multiple of 8.
        context: Pixels of the crop around the proposal, on each side.
        hidden_size: Numbers in a feature vector.
        positives: Largest number of crops on objects per image, while fine-tuning.
        negatives: Number of crops near objects per image, and of others, while fine-tuning.
        fitted: Whether the SVMs and the boxes are fitted.

    Example:
        >>> RcnnConfig(num_labels=4).crop_size
        48
    """

    model_type = "rcnn"

    crop_size: int = 48
    context: int = 3
    hidden_size: int = 256
    positives: int = 8
    negatives: int = 12
    fitted: bool = False

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid or does not fit another field.
        """
        super().validate_architecture()
        for name in ("hidden_size", "positives", "negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.crop_size < STRIDE or self.crop_size % STRIDE:
            raise ValueError(f"crop_size={self.crop_size} must be a multiple of {STRIDE}.")
        if not 0 <= self.context < self.crop_size / 2:
            raise ValueError(f"context={self.context} must be from 0 to less than half of crop_size={self.crop_size}.")


class RcnnForObjectDetection(PreTrainedModel):
    """Classify each proposal by itself.

    Example:
        >>> model = RcnnForObjectDetection(RcnnConfig(num_labels=4)).eval()
        >>> proposals = torch.tensor([[[0.5, 0.5, 0.4, 0.3], [0.2, 0.3, 0.2, 0.2]]])
        >>> model(torch.zeros(1, 3, 64, 64), proposals=proposals).logits.shape
        torch.Size([1, 2, 4])
    """

    config: RcnnConfig
    base_model_prefix = "rcnn"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps

    def __init__(self, config: RcnnConfig):
        super().__init__(config)
        self.num_labels, size = config.num_labels, config.hidden_size
        self.backbone = DetectionBackbone(config)
        self.hidden = nn.Linear(config.feature_size * (config.crop_size // STRIDE) ** 2, size)
        self.classifier = nn.Linear(size, config.num_labels + 1)
        # the fitted maps of feature vectors: not trained by gradients
        self.register_buffer("svm_weight", torch.zeros(config.num_labels, size))
        self.register_buffer("svm_bias", torch.zeros(config.num_labels))
        self.register_buffer("box_weight", torch.zeros(config.num_labels, 4, size))
        self.register_buffer("box_bias", torch.zeros(config.num_labels, 4))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_detection_weights(module)
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)
        elif module is self:
            for name in ("svm_weight", "svm_bias", "box_weight", "box_bias"):
                init.zeros_(getattr(self, name))

    def describe(self, pixel_values: Tensor, boxes: Tensor) -> Tensor:
        """Compute the feature vectors of boxes.

        Args:
            pixel_values: (batch, 3, height, width).
            boxes: (batch, boxes, 4), x0, y0, x1, y1 in pixels. Rows without area only fill up the batch.

        Returns:
            (batch, boxes, hidden_size). Vectors of boxes without area are 0, or invalid in compiled models.
        """
        size = self.config.crop_size
        centers = to_centers(boxes)
        larger = centers[..., 2:] * (size / (size - 2 * self.config.context))
        crops = cut_windows(
            pixel_values, to_corners(torch.cat([centers[..., :2], larger], dim=-1)), size=size, padding="zeros"
        )
        if torch.compiler.is_compiling():  # shapes that depend on the data cannot be compiled
            return self._describe_crops(crops.flatten(0, 1)).unflatten(0, boxes.shape[:2])
        filled = (centers[..., 2:] > 0).all(-1)
        result = crops.new_zeros(*boxes.shape[:2], self.config.hidden_size)
        if not filled.any():
            return result
        vectors = self._describe_crops(crops[filled])
        return result.to(vectors.dtype).masked_scatter(filled[..., None], vectors)

    def _describe_crops(self, crops: Tensor) -> Tensor:
        return F.relu(self.hidden(self.backbone(crops).flatten(1)))

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Labels | None = None, proposals: Tensor | None = None, **kwargs: Any
    ) -> DetectionOutput:
        """Detect objects.

        Args:
            pixel_values: (batch, 3, height, width).
            labels: One dictionary per image with `class_labels` and `boxes`, or a padded tensor; see `pad_labels`.
            proposals: Boxes of selective search as center x, center y, width, height in [0, 1], (batch, n, 4). Rows
                without area only fill up the batch. The image processor computes them.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            The output, see `DetectionOutput`. In training mode with labels, it has only the loss. After fitting, the
            boxes of the classes of a proposal follow each other, and each one has the score of its class only. The
            logits are then the decision values of the SVMs.

        Raises:
            ValueError: If the images, the labels or the proposals are invalid.
        """
        if proposals is None:
            raise ValueError(
                "R-CNN needs proposals, and got none. Use the image processor that is saved with the model."
            )
        boxes, filled = read_proposals(proposals, pixel_values)
        boxes = boxes * filled[..., None]
        terms = loss = logits = places = None
        if labels is not None:
            loss = self._loss(pixel_values, boxes, labels)
            terms = {"classification": loss}
        if labels is None or not self.training:
            logits, places = self._detect(pixel_values, boxes, filled)
        return DetectionOutput(loss=loss, loss_dict=terms, logits=logits, pred_boxes=places)

    def _detect(self, pixel_values: Tensor, boxes: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self.describe(pixel_values, boxes)
        if self.config.fitted:
            margins = vectors @ self.svm_weight.T + self.svm_bias
            codes = torch.einsum("brd,ckd->brck", vectors, self.box_weight) + self.box_bias
            corners = decode_boxes(codes.float(), boxes[:, :, None]).flatten(1, 2)
            own = torch.eye(self.num_labels, dtype=torch.bool, device=vectors.device) & filled[:, :, None, None]
            logits = margins[:, :, None].expand(-1, -1, self.num_labels, -1)
            logits = logits.masked_fill(~own, PADDING_LOGIT).flatten(1, 2)
        else:
            logits = log_odds(self.classifier(vectors)).masked_fill(~filled[..., None], PADDING_LOGIT)
            corners = boxes
        height, width = pixel_values.shape[-2:]
        corners = (corners / corners.new_tensor([width, height] * 2)).clamp(0, 1)
        return logits, to_centers(corners).to(pixel_values.dtype)

    def _loss(self, pixel_values: Tensor, boxes: Tensor, labels: Labels) -> Tensor:
        height, width = pixel_values.shape[-2:]
        classes, places = pad_labels(labels, self.num_labels, device=pixel_values.device)
        if classes.shape[0] != pixel_values.shape[0]:
            raise ValueError(
                f"Got {pixel_values.shape[0]} images and labels of {classes.shape[0]}. Expected one per image."
            )
        corners = to_corners(places) * places.new_tensor([width, height] * 2)
        candidates = torch.cat([boxes, corners * (classes != NO_CLASS)[..., None]], dim=1)
        count = candidates.shape[1]
        noise = torch.rand if self.training else torch.zeros
        noise = noise(classes.shape[0], count, device=pixel_values.device)
        positives, negatives = min(self.config.positives, count), min(self.config.negatives, count)
        chosen, named, _ = choose_windows(candidates, classes, corners, noise, positives, negatives, threshold=0.5)
        used = named >= NO_CLASS
        target = torch.where(named == NO_CLASS, self.num_labels, named).clamp(min=0)
        crops = candidates.take_along_dim(chosen[..., None], dim=1) * used[..., None]
        logits = self.classifier(self.describe(pixel_values, crops)).flatten(0, 1).float()
        entropy = F.cross_entropy(logits, target.flatten(), reduction="none").unflatten(0, used.shape)
        return ((entropy * used).sum(1) / used.sum(1).clamp(min=1)).mean()
