"""Regions that may contain an object, from a feature map: the region proposal network of Faster R-CNN.

Ren et al., "Faster R-CNN: towards real-time object detection with region proposal networks", NeurIPS 2015,
https://arxiv.org/abs/1506.01497. The network predicts the log-odds that an anchor belongs to an object, and four codes
that move the anchor to the object. Boxes are x0, y0, x1, y1 in pixels of the input.

Differences from the paper: the stride is 8, and anchors that cross the border of the image are trained, as in
torchvision. Smooth L1 has its kink at 1/9. Each loss term is a mean over the sampled anchors. Ignored regions of the
labels, such as crowds, give no loss.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .detection_backbone import STRIDE, start_with
from .detection_boxes import (
    IGNORED,
    NEGATIVE,
    clip_boxes,
    covered_shares,
    decode_boxes,
    encode_boxes,
    make_anchors,
    match_anchors,
    pairwise_iou,
    sample_matches,
)
from .detection_kernels import suppress

ANCHOR_HIGH, ANCHOR_LOW = 0.7, 0.3  # IoUs of positive and negative anchors
ANCHOR_SAMPLE, ANCHOR_POSITIVES = 256, 0.5  # anchors per image in the loss, and the largest share of positives
NMS_THRESHOLD = 0.7
MIN_SIDE = 1e-3  # pixels; smaller proposals are dropped
COVERED = 0.7  # part of the area of an anchor that an ignored region must cover
BETA = 1 / 9  # smooth L1 is quadratic below


class RegionProposalNetwork(nn.Module):
    """A 3x3 convolution, followed by the log-odds of an object and the codes of a box for each anchor.

    Args:
        config: Configuration with `anchor_sizes`, `anchor_ratios`, `num_candidates`, `num_proposals` and
            `feature_size`.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.sizes, self.ratios = config.anchor_sizes, config.anchor_ratios
        self.limits = {"candidates": config.num_candidates, "count": config.num_proposals}
        count, channels = len(self.sizes) * len(self.ratios), config.feature_size
        # initialized as in the paper: the first proposals are the anchors
        self.hidden = start_with(nn.Conv2d(channels, channels, 3, padding=1))
        self.objectness = start_with(nn.Conv2d(channels, count, 1))
        self.codes = start_with(nn.Conv2d(channels, 4 * count, 1))

    def forward(
        self, features: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Propose boxes.

        Args:
            features: (batch, channels, rows, columns).
            height: Height of the images in pixels.
            width: Width of the images in pixels.

        Returns:
            The results of `select_proposals`, and the ones of `score_anchors`.
        """
        found = self.score_anchors(features)
        return *select_proposals(*found, height=height, width=width, **self.limits), found

    def score_anchors(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-odds (batch, anchors), the codes (batch, anchors, 4) and the anchors (anchors, 4)."""
        hidden = F.relu(self.hidden(features))
        objectness, codes = (layer(hidden).permute(0, 2, 3, 1) for layer in (self.objectness, self.codes))
        rows, columns = features.shape[-2:]
        anchors = make_anchors(rows, columns, STRIDE, sizes=self.sizes, ratios=self.ratios, device=features.device)
        objectness, codes = objectness.flatten(1), codes.reshape(codes.shape[0], -1, 4)
        if objectness.dtype in (torch.bfloat16, torch.float16):
            objectness, codes = objectness.float(), codes.float()
        return objectness, codes, anchors


def select_proposals(
    objectness: Tensor, codes: Tensor, anchors: Tensor, *, height: int, width: int, candidates: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return the best boxes of each image after non-maximum suppression, without gradient.

    Args:
        objectness: (batch, anchors).
        codes: (batch, anchors, 4).
        anchors: (anchors, 4).
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        candidates: Number of boxes before non-maximum suppression.
        count: Number of boxes after it. It is reduced to the number of candidates.

    Returns:
        The boxes (batch, count, 4) by descending objectness, and whether each row is a proposal, (batch, count). The
        other rows only fill up the batch.
    """
    scores, best = objectness.detach().topk(min(candidates, anchors.shape[0]), dim=1)
    chosen = codes.detach().gather(1, best[..., None].expand(-1, -1, 4))
    boxes = clip_boxes(decode_boxes(chosen, anchors[best]), height, width)
    filled = (boxes[..., 2:] - boxes[..., :2] >= MIN_SIDE).all(-1)
    kept = filled & suppress(boxes, scores.masked_fill(~filled, -torch.inf), NMS_THRESHOLD)
    first = (~kept).int().argsort(dim=1, stable=True)[:, :count]
    return boxes.gather(1, first[..., None].expand(-1, -1, 4)), kept.gather(1, first)


def match_labels(boxes: Tensor, classes: Tensor, places: Tensor, match: Callable[[Tensor], Tensor]) -> Tensor:
    """Assign objects to the boxes of one image, and ignore negatives inside of ignored regions.

    Args:
        boxes: Anchors or proposals, (n, 4).
        classes: Class of each label, negative for ignored regions and padding, (labels,).
        places: Box of each label in pixels, (labels, 4). Padding has no area.
        match: Function from the IoU (labels, n) to matches (n,), such as `match_anchors`.

    Returns:
        The index of the label, `NEGATIVE` or `IGNORED`, (n,).
    """
    objects = classes >= 0
    matches = match(pairwise_iou(places, boxes) * objects[:, None])
    inside = (covered_shares(boxes, places) > COVERED) & ~objects
    return torch.where((matches == NEGATIVE) & inside.any(1), IGNORED, matches)


def proposal_losses(
    objectness: Tensor, codes: Tensor, anchors: Tensor, classes: Tensor, places: Tensor, *, random: bool
) -> dict[str, Tensor]:
    """Compute the loss terms of a region proposal network.

        rpn_objectness = mean of the cross-entropy over the sampled anchors
        rpn_box = sum of smooth L1 over the sampled positives / number of sampled anchors

    Args:
        objectness: (batch, anchors).
        codes: (batch, anchors, 4).
        anchors: (anchors, 4).
        classes: Class of each label, (batch, labels), see `pad_labels`.
        places: Box of each label in pixels, (batch, labels, 4).
        random: Whether the sample is random, for training.

    Returns:
        The terms by name.
    """
    matches = torch.stack(
        [
            match_labels(anchors, kinds, boxes, lambda iou: match_anchors(iou, high=ANCHOR_HIGH, low=ANCHOR_LOW))
            for kinds, boxes in zip(classes, places, strict=True)
        ]
    )
    sample = sample_matches(matches, ANCHOR_SAMPLE, positive_share=ANCHOR_POSITIVES, random=random)
    positive = matches >= 0
    entropy = F.binary_cross_entropy_with_logits(objectness, positive.to(objectness.dtype), reduction="none")
    box = box_loss(codes, anchors.expand_as(codes), places, matches)
    count = sample.sum().clamp(min=1)
    return {"rpn_objectness": (entropy * sample).sum() / count, "rpn_box": (box * sample).sum() / count}


def box_loss(
    codes: Tensor, boxes: Tensor, places: Tensor, matches: Tensor, *, weights: tuple[float, ...] = (1, 1, 1, 1)
) -> Tensor:
    """Compute smooth L1 between codes and the codes of the matched objects.

    Args:
        codes: Predictions, (batch, n, 4).
        boxes: Anchors or proposals in pixels, (batch, n, 4).
        places: Box of each label in pixels, (batch, labels, 4).
        matches: Index of the label or negative, (batch, n).
        weights: See `encode_boxes`.

    Returns:
        The sum over the four codes, (batch, n). It is 0 for rows without an object.
    """
    positive = (matches >= 0)[..., None]
    # boxes without area would give infinite codes, whose gradient is not a number
    target = places.gather(1, matches.clamp(min=0)[..., None].expand(-1, -1, 4))
    some = boxes.new_tensor([0, 0, 1, 1])
    target, boxes = torch.where(positive, target, some), torch.where(positive, boxes, some)
    wanted = encode_boxes(target, boxes, weights=weights)
    loss = F.smooth_l1_loss(codes, wanted.to(codes.dtype), beta=BETA, reduction="none")
    return (loss * positive).sum(-1)
