"""The kernels equal the definitions in detection_boxes.py, with and without compilation."""

import pytest
import torch

from hf_dl.models import detection_boxes as B
from hf_dl.models import detection_kernels as K
from tests.models.test_detection_boxes import ROIS, features, random_boxes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nms_equals_its_definition(dtype):
    boxes = (random_boxes(60) - 20).to(dtype)  # with negative coordinates
    boxes = torch.cat([boxes, boxes[:5]])
    scores = torch.rand(65, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(65) % 3
    # the definition compares in the precision of its arguments, which is too coarse in half precision
    exact = boxes.double(), scores.double()
    for threshold in (0.0, 0.3, 0.7):
        assert torch.equal(
            K.non_maximum_suppression(boxes, scores, threshold), B.non_maximum_suppression(*exact, threshold)
        )
        found = K.non_maximum_suppression(boxes, scores, threshold, labels=labels)
        assert torch.equal(found, B.non_maximum_suppression(*exact, threshold, labels=labels))
    none = K.non_maximum_suppression(boxes[:0], scores[:0], 0.5, labels=labels[:0])
    assert none.shape == (0,) and none.dtype == torch.int64


def test_nms_of_a_batch_equals_nms_of_each_image(monkeypatch):
    boxes, scores = random_boxes(60).reshape(3, 20, 4), torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(3, 20, dtype=torch.bool)
    for image in range(3):
        expected[image, B.non_maximum_suppression(boxes[image], scores[image], 0.3)] = True
    assert 0 < expected.sum() < 60
    assert torch.equal(K.suppress(boxes, scores, 0.3), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(K.suppress(boxes, scores, 0.3), expected)


@pytest.mark.parametrize("bins", [1, 3])
@pytest.mark.parametrize("name", ["roi_pool", "roi_align"])
def test_regions_equal_their_definition(name, bins):
    maps, boxes = features(), torch.stack([ROIS, ROIS.flip(0) + 1])
    images = torch.arange(2).repeat_interleave(ROIS.shape[0])
    ours = getattr(B, name)(maps, boxes.flatten(0, 1), images, bins=bins, scale=0.25)
    fast = getattr(K, name)(maps, boxes, bins=bins, scale=0.25)
    torch.testing.assert_close(fast, ours)
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((found * weights).sum(), maps)[0] for found in (ours, fast)]
    torch.testing.assert_close(*gradients)
    half = getattr(K, name)(maps.bfloat16(), boxes, bins=bins, scale=0.25)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), ours, rtol=0.03, atol=0.03)
    assert getattr(K, name)(maps, boxes[:, :0], bins=bins, scale=0.25).shape == (0, 3, bins, bins)
