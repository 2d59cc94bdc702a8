"""Fast R-CNN and Faster R-CNN: classify regions of a feature map, and move their boxes to the objects.

`two_stage_type` names the source of the regions:

* "fast": the caller gives `proposals`, such as the boxes of selective search. Girshick, "Fast R-CNN", ICCV 2015,
  https://arxiv.org/abs/1504.08083.
* "faster": a region proposal network on the same feature map, see detection_proposals.py. Ren et al., "Faster R-CNN",
  NeurIPS 2015, https://arxiv.org/abs/1506.01497.

`roi_type` names the features of a region: "align" (He et al., "Mask R-CNN", ICCV 2017,
https://arxiv.org/abs/1703.06870) or "pool", as in both papers.

Differences from the papers: smooth L1 has its kink at 1/9, and background regions may have an IoU from 0 to 0.5. Both
stages are trained at once. Each region returns one box, of its best class.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .detection_backbone import DetectionBackbone, DetectionConfig, init_detection_weights, start_with
from .detection_boxes import IGNORED, clip_boxes, decode_boxes, match_anchors, sample_matches, to_centers, to_corners
from .detection_kernels import roi_align, roi_pool
from .detection_output import PADDING_LOGIT, DetectionOutput, Labels, pad_labels
from .detection_proposals import (
    RegionProposalNetwork,
    box_loss,
    match_labels,
    proposal_losses,
)

# The pipeline accepts a model only if its name is in this table.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["two_stage_detector"] = "TwoStageDetectorForObjectDetection"

REGION_FEATURES = {"align": roi_align, "pool": roi_pool}
CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # one over the standard deviations of the codes of regions
REGION_IOU = 0.5  # of a region and its object, at least
REGION_POSITIVES = 0.25  # largest share of regions with an object in the loss


@strict
class TwoStageDetectorConfig(DetectionConfig):
    """Configuration of a `TwoStageDetectorForObjectDetection`. See `DetectionConfig` for the fields of the backbone.

    Args:
        two_stage_type: "fast" or "faster".
        anchor_sizes: Sides of the square anchors in pixels. Choose them close to the sizes of the objects.
        anchor_ratios: Heights of the anchors divided by their widths. The area of an anchor stays the same.
        num_candidates: Boxes of the region proposal network that enter non-maximum suppression.
        num_proposals: Boxes per image that are classified.
        region_sample: Regions per image in the loss.
        roi_type: A key of `REGION_FEATURES`.
        roi_size: Rows and columns of the features of a region.
        hidden_size: Neurons of the two hidden layers.

    Example:
        >>> TwoStageDetectorConfig(two_stage_type="fast", id2label={0: "cat", 1: "dog"}).num_labels
        2
    """

    model_type = "two_stage_detector"

    two_stage_type: Literal["fast", "faster"] = "faster"
    anchor_sizes: list[int | float] | tuple[int | float, ...] = (16, 28, 48)
    anchor_ratios: list[int | float] | tuple[int | float, ...] = (0.7, 1.0, 1.4)
    num_candidates: int = 600
    num_proposals: int = 150
    region_sample: int = 64
    roi_type: str = "align"
    roi_size: int = 5
    hidden_size: int = 256

    def __post_init__(self, **kwargs):
        """Convert fields to JSON types, so that a config that was saved and loaded is equal to the original."""
        self.anchor_sizes, self.anchor_ratios = list(self.anchor_sizes), list(self.anchor_ratios)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid or does not fit another field.
        """
        super().validate_architecture()
        if self.roi_type not in REGION_FEATURES:
            raise ValueError(f"roi_type={self.roi_type!r} is unknown. Choose one of: {', '.join(REGION_FEATURES)}.")
        for name in ("anchor_sizes", "anchor_ratios"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise ValueError(f"{name}={values} is invalid. Expected positive numbers.")
        for name in ("num_candidates", "num_proposals", "region_sample", "roi_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")


class RegionHead(nn.Module):
    """Classify the features of regions, and predict the codes of a box for each class.

    Args:
        config: The configuration.
    """

    def __init__(self, config: TwoStageDetectorConfig):
        super().__init__()
        self.crop, self.size = REGION_FEATURES[config.roi_type], config.roi_size
        self.hidden = nn.Sequential(
            nn.Linear(config.feature_size * self.size**2, config.hidden_size),
            nn.ReLU(),
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.ReLU(),
        )
        # initialized as in Fast R-CNN; class 0 is the background
        self.classes = start_with(nn.Linear(config.hidden_size, config.num_labels + 1), std=0.01)
        self.codes = start_with(nn.Linear(config.hidden_size, 4 * config.num_labels), std=0.001)

    def forward(self, features: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Classify regions.

        Args:
            features: (batch, channels, rows, columns).
            boxes: Regions of each image in pixels, (batch, n, 4).

        Returns:
            The class logits (batch, n, 1 + classes), with the background first, and the codes (batch, n, classes, 4).
        """
        batch, count = boxes.shape[:2]
        crops = self.crop(features, boxes, bins=self.size, scale=1 / DetectionBackbone.stride)
        hidden = self.hidden(crops.flatten(1))
        logits, codes = self.classes(hidden).float(), self.codes(hidden).float()
        return logits.reshape(batch, count, -1), codes.reshape(batch, count, -1, 4)


class TwoStageDetectorForObjectDetection(PreTrainedModel):
    """A backbone, a region proposal network if the type is "faster", and a classifier of regions.

    Example:
        >>> model = TwoStageDetectorForObjectDetection(TwoStageDetectorConfig(num_labels=4, num_proposals=50)).eval()
        >>> label = {"class_labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}
        >>> output = model(torch.zeros(1, 3, 64, 64), labels=[label])
        >>> output.logits.shape, output.pred_boxes.shape
        (torch.Size([1, 50, 4]), torch.Size([1, 50, 4]))
        >>> sorted(output.loss_dict)
        ['box', 'classification', 'rpn_box', 'rpn_objectness']
    """

    config: TwoStageDetectorConfig
    base_model_prefix = "two_stage_detector"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps

    def __init__(self, config: TwoStageDetectorConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = DetectionBackbone(config)
        self.rpn = RegionProposalNetwork(config) if config.two_stage_type == "faster" else None
        self.head = RegionHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_detection_weights(module)

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Labels | None = None, proposals: Tensor | None = None, **kwargs: Any
    ) -> DetectionOutput:
        """Detect objects.

        Args:
            pixel_values: (batch, 3, height, width). Height and width are multiples of 8.
            labels: One dictionary per image with `class_labels` and `boxes`, or a padded tensor; see `pad_labels`.
            proposals: Regions to classify as center x, center y, width, height in [0, 1], (batch, n, 4). Rows
                without area only fill up the batch. Needed by "fast". Defaults to the proposals of the network.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            The output, see `DetectionOutput`, with one box per proposal. In training with labels, the boxes are the
            regions in the loss. The loss terms are means over the sampled anchors (`rpn_objectness`, `rpn_box`) and
            over the sampled regions (`classification`, `box`) of the batch.

        Raises:
            ValueError: If the images, the labels or the proposals are invalid.
        """
        height, width = pixel_values.shape[-2:]
        features = self.backbone(pixel_values)
        found = None
        if self.rpn is not None and (proposals is None or labels is not None):
            boxes, filled, found = self.rpn(features, height, width)
        if proposals is not None:
            boxes, filled = read_proposals(proposals, pixel_values)
        elif found is None:
            raise ValueError(
                "two_stage_type='fast' needs proposals, and got none. Give the boxes of selective search as "
                "proposals, or use two_stage_type='faster'."
            )
        if labels is None:
            logits, places = self.classify(features, boxes, filled, height, width)
            return DetectionOutput(logits=logits, pred_boxes=places)

        classes, objects = pad_labels(labels, self.num_labels, device=pixel_values.device)
        if classes.shape[0] != pixel_values.shape[0]:
            raise ValueError(
                f"Got {pixel_values.shape[0]} images and labels of {classes.shape[0]}. Expected one per image."
            )
        objects = to_corners(objects) * objects.new_tensor([width, height, width, height])
        terms = {} if found is None else proposal_losses(*found, classes, objects, random=self.training)
        regions, matches = sample_regions(
            boxes, filled, classes, objects, count=self.config.region_sample, random=self.training
        )
        predictions = self.head(features, regions)
        terms |= region_losses(*predictions, regions, classes, objects, matches)
        if self.training:
            logits, places = decode_regions(*predictions, regions, matches != IGNORED, height, width)
        else:
            logits, places = self.classify(features, boxes, filled, height, width)
        return DetectionOutput(loss=sum(terms.values()), loss_dict=terms, logits=logits, pred_boxes=places)

    def classify(
        self, features: Tensor, boxes: Tensor, filled: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Return the logits and the boxes of regions as in `DetectionOutput`.

        Args:
            features: (batch, channels, height / 8, width / 8).
            boxes: Regions in pixels, (batch, n, 4).
            filled: Whether each row is a region, (batch, n).
            height: Height of the images in pixels.
            width: Width of the images in pixels.
        """
        return decode_regions(*self.head(features, boxes), boxes, filled, height, width)


def read_proposals(proposals: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Convert the proposals of the caller to pixels.

    Args:
        proposals: Center x, center y, width, height in [0, 1], (batch, n, 4). Padding has no area.
        pixel_values: (batch, 3, height, width).

    Returns:
        The boxes (batch, n, 4), and whether each row is a proposal, (batch, n).

    Raises:
        ValueError: If the shape is invalid.
    """
    if proposals.ndim != 3 or proposals.shape[2] != 4 or proposals.shape[0] != pixel_values.shape[0]:
        raise ValueError(
            f"proposals has shape {tuple(proposals.shape)}, expected ({pixel_values.shape[0]}, n, 4): center x, "
            "center y, width and height in [0, 1]."
        )
    height, width = pixel_values.shape[-2:]
    proposals = proposals.float()
    boxes = to_corners(proposals) * proposals.new_tensor([width, height, width, height])
    return clip_boxes(boxes, height, width), (proposals[..., 2:] > 0).all(-1)


def sample_regions(
    boxes: Tensor, filled: Tensor, classes: Tensor, objects: Tensor, *, count: int, random: bool
) -> tuple[Tensor, Tensor]:
    """Choose the regions of the loss from the proposals and the boxes of the objects.

    Args:
        boxes: Proposals in pixels, (batch, n, 4).
        filled: Whether each row is a proposal, (batch, n).
        classes: Class of each label, (batch, labels), see `pad_labels`.
        objects: Box of each label in pixels, (batch, labels, 4).
        count: Number of regions per image.
        random: Whether the choice is random, for training.

    Returns:
        The regions (batch, count, 4). The index of the label of each region, `NEGATIVE` or `IGNORED`, (batch, count).
        The number of regions is smaller if there are fewer boxes.
    """

    def match(iou: Tensor) -> Tensor:
        return match_anchors(iou, high=REGION_IOU, low=REGION_IOU, keep_best=False)

    rows = zip(boxes, classes, objects, strict=True)
    matches = torch.stack([match_labels(places, kinds, found, match) for places, kinds, found in rows])
    matches = torch.where(filled, matches, IGNORED)
    own = torch.arange(classes.shape[1], device=classes.device).expand_as(classes)
    matches = torch.cat([matches, torch.where(classes >= 0, own, IGNORED)], dim=1)
    boxes = torch.cat([boxes, objects], dim=1)
    sample = sample_matches(matches, count, positive_share=REGION_POSITIVES, random=random)
    first = (~sample).int().argsort(dim=1, stable=True)[:, :count]
    chosen = torch.where(sample, matches, IGNORED).gather(1, first)
    return boxes.gather(1, first[..., None].expand(-1, -1, 4)), chosen


def region_losses(
    logits: Tensor, codes: Tensor, regions: Tensor, classes: Tensor, objects: Tensor, matches: Tensor
) -> dict[str, Tensor]:
    """Compute the loss terms of the classifier of regions.

        classification = mean of the cross-entropy over the regions
        box = sum of smooth L1 for the codes of the true class / number of regions

    Args:
        logits: Background and classes, (batch, n, 1 + classes).
        codes: (batch, n, classes, 4).
        regions: In pixels, (batch, n, 4).
        classes: Class of each label, (batch, labels).
        objects: Box of each label in pixels, (batch, labels, 4).
        matches: Index of the label of each region, `NEGATIVE` or `IGNORED`, (batch, n).

    Returns:
        The terms by name.
    """
    kinds = classes.gather(1, matches.clamp(min=0))
    positive, used = matches >= 0, matches != IGNORED
    wanted = torch.where(positive, kinds + 1, 0)
    entropy = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    own = codes.gather(2, (wanted - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
    box = box_loss(own, regions, objects, matches, weights=CODE_WEIGHTS)
    count = used.sum().clamp(min=1)
    return {"classification": (entropy * used).sum() / count, "box": box.sum() / count}


def decode_regions(
    logits: Tensor, codes: Tensor, regions: Tensor, filled: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Convert predictions for regions to the fields of `DetectionOutput`.

    Args:
        logits: Background and classes, (batch, n, 1 + classes).
        codes: (batch, n, classes, 4).
        regions: In pixels, (batch, n, 4).
        filled: Whether each row is a region, (batch, n).
        height: Height of the images in pixels.
        width: Width of the images in pixels.

    Returns:
        The log-odds of the probability of each class, (batch, n, classes). The box of the best class as center x,
        center y, width, height in [0, 1], (batch, n, 4). Rows without a region have `PADDING_LOGIT`.
    """
    # log(p / (1 - p)) = logit - log of the sum of exp(other logits)
    same = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    others = logits[..., None, :].masked_fill(same, -torch.inf).logsumexp(-1)
    odds = (logits - others)[..., 1:]
    best = odds.argmax(-1)[..., None, None].expand(-1, -1, 1, 4)
    boxes = clip_boxes(decode_boxes(codes.gather(2, best).squeeze(2), regions, weights=CODE_WEIGHTS), height, width)
    boxes = to_centers(boxes) / boxes.new_tensor([width, height, width, height])
    return odds.masked_fill(~filled[..., None], PADDING_LOGIT), boxes
