"""The parts of box detectors equal torchvision's."""

import math

import pytest
import torch
from torchvision import ops
from torchvision.models.detection import _utils as reference
from torchvision.models.detection.anchor_utils import AnchorGenerator

from hf_dl.metrics import detection as metrics
from hf_dl.models import detection_boxes as B


def random_boxes(count, seed=0, size=30.0):
    generator = torch.Generator().manual_seed(seed)
    corner, side = torch.rand(2, count, 2, dtype=torch.float64, generator=generator) * size
    return torch.cat([corner, corner + side + 0.1], 1)


def test_iou():
    boxes, others = random_boxes(12), random_boxes(9, 1)
    others[0, 2:] = others[0, :2]  # no area
    found = B.pairwise_iou(boxes, others)
    torch.testing.assert_close(found, ops.box_iou(boxes, others))
    torch.testing.assert_close(found, metrics.box_iou(boxes, others))
    point = torch.zeros(1, 4, requires_grad=True)
    B.pairwise_iou(point, point).sum().backward()
    assert torch.isfinite(point.grad).all()


def test_conversions():
    boxes = random_boxes(5)
    torch.testing.assert_close(B.to_centers(boxes), ops.box_convert(boxes, "xyxy", "cxcywh"))
    torch.testing.assert_close(B.to_corners(B.to_centers(boxes)), boxes)
    torch.testing.assert_close(B.clip_boxes(boxes - 5, 20, 30), ops.clip_boxes_to_image(boxes - 5, (20, 30)))


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (10, 10, 5, 5)])
def test_codes(weights):
    boxes, anchors = random_boxes(20), random_boxes(20, 1)
    coder = reference.BoxCoder(weights)
    codes = B.encode_boxes(boxes, anchors, weights=weights)
    torch.testing.assert_close(codes, coder.encode_single(boxes, anchors))
    torch.testing.assert_close(B.decode_boxes(codes, anchors, weights=weights), boxes)
    wild = torch.randn(20, 4, dtype=torch.float64) * 50
    found = B.decode_boxes(wild, anchors, weights=weights)
    torch.testing.assert_close(found, coder.decode_single(wild, anchors))
    assert torch.isfinite(found).all() and math.isclose(math.exp(B.MAX_LOG_SCALE), 62.5)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_nms(threshold):
    boxes = random_boxes(60)
    boxes = torch.cat([boxes, boxes[:5]])
    scores = torch.rand(65, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(65) % 3
    assert torch.equal(B.non_maximum_suppression(boxes, scores, threshold), ops.nms(boxes, scores, threshold))
    found = B.non_maximum_suppression(boxes, scores, threshold, labels=labels)
    assert torch.equal(found, ops.batched_nms(boxes, scores, labels, threshold))
    assert B.non_maximum_suppression(boxes[:0], scores[:0], threshold).shape == (0,)
    # equal scores: the first stays; an IoU of exactly the threshold is kept
    pair = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 20.0]])
    assert B.non_maximum_suppression(pair, torch.ones(2), 0.5).tolist() == [0, 1]
    assert B.non_maximum_suppression(pair, torch.ones(2), 0.49).tolist() == [0]


def test_anchors():
    found = B.make_anchors(3, 5, 8, sizes=[16, 28], ratios=[0.5, 1, 2])
    assert found.shape == (90, 4)
    centers = B.to_centers(found).view(3, 5, 6, 4)
    assert centers[1, 4, :, :2].unique(dim=0).tolist() == [[36, 12]]  # x, y of the cell in row 1, column 4
    assert torch.allclose(centers[..., 2:].prod(-1), torch.tensor([16.0**2] * 3 + [28.0**2] * 3))
    assert torch.allclose((centers[..., 3] / centers[..., 2])[0, 0], torch.tensor([0.5, 1, 2, 0.5, 1, 2]))
    # torchvision puts the first anchor at (0, 0), rounds its corners, and changes the size fastest
    theirs = AnchorGenerator(((16,),), ((0.5, 1.0, 2.0),)).cell_anchors[0]
    ours = B.make_anchors(1, 1, 8, sizes=[16]) - 4
    torch.testing.assert_close(ours.round(), theirs)
    with pytest.raises(ValueError, match=r"sizes=\[0\] is invalid. Expected positive numbers"):
        B.make_anchors(1, 1, 8, sizes=[0])


@pytest.mark.parametrize("keep_best", [False, True])
def test_matching(keep_best):
    iou = ops.box_iou(random_boxes(6), random_boxes(300, 1))
    iou[2] = 0  # an object without any overlap
    iou[3, 7] = iou[3, 9] = iou[3].max()  # a tie
    matcher = reference.Matcher(0.5, 0.3, allow_low_quality_matches=keep_best)
    found = B.match_anchors(iou, high=0.5, low=0.3, keep_best=keep_best)
    theirs = matcher(iou)
    if keep_best:  # torchvision also restores the anchors of an object that overlaps none: all of them
        theirs = matcher(iou[[0, 1, 3, 4, 5]])
        theirs = torch.where(theirs >= 2, theirs + 1, theirs)
    assert torch.equal(found, theirs) and {*found.unique().tolist()} >= {B.NEGATIVE, B.IGNORED, 3 if keep_best else -1}
    assert B.match_anchors(iou[:0]).tolist() == [B.NEGATIVE] * 300
    with pytest.raises(ValueError, match="low=0.8 must not be above high=0.7"):
        B.match_anchors(iou, low=0.8)


def test_sampling():
    matches = torch.tensor([0] * 10 + [B.NEGATIVE] * 50 + [B.IGNORED] * 20 + [1] * 10)
    generator = torch.Generator().manual_seed(0)
    chosen = B.sample_matches(matches, 32, generator=generator)
    assert (chosen & (matches >= 0)).sum() == 16 and (chosen & (matches == B.NEGATIVE)).sum() == 16
    few = B.sample_matches(matches[5:], 64, positive_share=0.25, generator=generator)
    assert (few & (matches[5:] >= 0)).sum() == 15 and few.sum() == 64
    assert not few[matches[5:] == B.IGNORED].any()
    assert B.sample_matches(matches, 200).sum() == 70  # too few of both
    assert B.sample_matches(matches[:0], 8).sum() == 0


ROIS = torch.tensor(
    [[0, 0, 31, 31], [4, 4, 12, 20], [5.3, 7.7, 30.1, 9.2], [-9, -3, 50, 44], [12, 12, 12, 12], [2, 28, 6, 32]],
    dtype=torch.float64,
)
IMAGES = torch.tensor([0, 1, 1, 0, 1, 0])


def features():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 8, 10, dtype=torch.float64, generator=generator, requires_grad=True)


def check(ours, theirs):
    """Compare values and gradients of two functions of the features."""
    values, gradients = [], []
    for function in (ours, theirs):
        given = features()
        value = function(given)
        (value * torch.arange(value.numel()).view_as(value)).sum().backward()
        values.append(value.detach())
        gradients.append(given.grad)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


def test_roi_pool():
    rois = torch.cat([IMAGES[:, None], ROIS], 1)
    for bins in (2, 5):
        check(
            lambda x, bins=bins: B.roi_pool(x, ROIS, IMAGES, bins=bins, scale=0.25),
            lambda x, bins=bins: ops.roi_pool(x, rois, bins, 0.25),
        )
    assert B.roi_pool(features(), ROIS[:0], IMAGES[:0], bins=2, scale=0.25).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling", [0, 1, 2])
def test_roi_align(aligned, sampling):
    rois = torch.cat([IMAGES[:, None], ROIS], 1)
    options = {"bins": 3, "scale": 0.25, "sampling": sampling, "aligned": aligned}
    check(
        lambda x: B.roi_align(x, ROIS, IMAGES, **options),
        lambda x: ops.roi_align(x, rois, 3, 0.25, sampling, aligned),
    )
    assert B.roi_align(features(), ROIS[:0], IMAGES[:0], **options).shape == (0, 3, 3, 3)


def test_roi_align_of_a_plane_is_the_plane():
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(10.0), indexing="ij")
    plane = (2 * (x + 0.5) - 3 * (y + 0.5))[None, None]  # the value of a cell belongs to its center
    box = torch.tensor([[8.0, 4.0, 32.0, 20.0]])  # 2 to 8 and 1 to 5 in cells
    found = B.roi_align(plane, box, torch.tensor([0]), bins=2, scale=0.25)
    expected = [[2 * cx - 3 * cy for cx in (3.5, 6.5)] for cy in (2, 4)]
    torch.testing.assert_close(found[0, 0], torch.tensor(expected))
