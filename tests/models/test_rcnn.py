import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from hf_dl.models import DetectionImageProcessor, RcnnConfig, RcnnForObjectDetection
from hf_dl.models.detection_boxes import encode_boxes, to_centers
from hf_dl.models.detection_output import PADDING_LOGIT
from hf_dl.recipes import rcnn
from tests.models.contract import ModelContract

TINY = {"feature_size": 8, "num_labels": 3, "hidden_size": 12, "crop_size": 16, "context": 1}


class TestRcnn(ModelContract):
    model_class = RcnnForObjectDetection
    processor_class = DetectionImageProcessor
    auto_classes = ("AutoModelForObjectDetection",)
    overfit_steps = 40
    overfit_learning_rate = 1e-2
    overfit_ratio = 0.5  # other crops in each step

    def config(self):
        return RcnnConfig(**TINY, positives=2, negatives=2)

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        classes = torch.randint(0, 3, (batch, 1, 1), generator=draw)
        boxes = torch.rand(batch, 1, 4, generator=draw) * 0.1 + torch.tensor([0.45, 0.45, 0.5, 0.5])
        pixels = torch.randn(batch, 3, 32, 40, generator=draw)
        others = torch.rand(batch, 3, 4, generator=draw) * 0.3 + 0.3
        proposals = torch.cat([others, boxes], dim=1)
        return {"pixel_values": pixels, "labels": torch.cat([classes, boxes], -1), "proposals": proposals}

    @pytest.mark.slow
    def test_compiles_to_the_same_numbers(self, model):
        super().test_compiles_to_the_same_numbers(model)


def make(**fields):
    torch.manual_seed(0)
    return RcnnForObjectDetection(RcnnConfig(**TINY | fields)).eval()


def test_a_crop_is_the_proposal_with_context_and_gray_outside():
    """Of an image whose values are its x coordinate: 14 pixels for the proposal, and one of context on each side."""
    model, seen = make(), []
    model._describe_crops = lambda crops: (seen.append(crops), crops.mean((1, 2, 3))[:, None].expand(-1, 12))[1]
    pixels = (torch.arange(40.0) + 0.5).expand(1, 3, 32, 40)
    model.describe(pixels, torch.tensor([[[10.0, 8, 24, 22], [0, 0, 14, 14], [0, 0, 0, 0]]]))
    (crops,) = seen
    assert crops.shape == (2, 3, 16, 16)  # the last row is padding
    torch.testing.assert_close(crops[0, 0, 0], torch.arange(9, 25) + 0.5, rtol=1e-4, atol=1e-5)
    assert crops[1, :, 0].abs().max() < 1e-5 and crops[1, :, :, 0].abs().max() < 1e-5  # outside of the image
    torch.testing.assert_close(crops[1, 0, 5, 1:], torch.arange(15) + 0.5, rtol=1e-4, atol=1e-5)


def test_padding_is_never_found():
    proposals = torch.zeros(2, 4, 4)
    proposals[0, 0] = 0.5
    for fitted in (False, True):
        output = make(fitted=fitted)(torch.randn(2, 3, 32, 32), proposals=proposals)
        rows = 4 * 3 if fitted else 4
        assert output.logits.shape == (2, rows, 3) and output.pred_boxes.shape == (2, rows, 4)
        assert (output.logits[1] == PADDING_LOGIT).all() and (output.logits[0] > -100).any()


def test_an_svm_per_class_scores_and_moves_each_box():
    model = make(fitted=True)
    pixels, proposals = torch.randn(1, 3, 32, 32), torch.tensor([[[0.5, 0.5, 0.5, 0.5]]])
    with torch.no_grad():
        for buffer in (model.svm_weight, model.svm_bias, model.box_weight, model.box_bias):
            buffer.normal_(0, 0.1)
        output = model(pixels, proposals=proposals)
        (vector,) = model.describe(pixels, torch.tensor([[[8.0, 8, 24, 24]]]))[0]
        for label in range(3):
            margin = model.svm_weight[label] @ vector + model.svm_bias[label]
            assert output.logits[0, label, label].item() == pytest.approx(margin.item(), abs=1e-5)
            assert (output.logits[0, label, [k for k in range(3) if k != label]] == PADDING_LOGIT).all()
            dx, dy, dw, dh = (model.box_weight[label] @ vector + model.box_bias[label]).tolist()
            x, y, w, h = 16 + 16 * dx, 16 + 16 * dy, 16 * np.exp(dw), 16 * np.exp(dh)
            corners = np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, 32) / 32
            found = to_centers(torch.tensor(corners, dtype=torch.float32))
            torch.testing.assert_close(output.pred_boxes[0, label], found, rtol=1e-4, atol=1e-5)


def test_hard_negatives_are_found():
    """The first negatives are easy. The ones that look like objects come last, and must be in the last fit."""
    random = np.random.default_rng(0)
    positive = random.normal([9, 9, 0], 1, (60, 3)).astype(np.float32)
    easy = random.normal([-9, -9, 0], 1, (rcnn.REFIT + 900, 3)).astype(np.float32)
    hard = random.normal([9, -1, 0], 1, (300, 3)).astype(np.float32)
    weight, bias, kept = rcnn.fit_svm(positive, np.concatenate([easy, hard]))
    assert (positive @ weight + bias > 0).mean() > 0.95 and (hard @ weight + bias < 0).mean() > 0.95
    assert kept < 900
    weight, bias, _ = rcnn.fit_svm(positive, easy)
    assert (hard @ weight + bias < 0).mean() < 0.9  # unseen


def test_boxes_are_a_ridge_regression():
    random = np.random.default_rng(0)
    vectors, truth = random.normal(size=(400, 5)).astype(np.float32), random.normal(size=(4, 5)) * 0.2
    codes = vectors @ truth.T + [0.1, -0.2, 0.3, 0]
    weight, bias = rcnn.fit_boxes(vectors, codes, strength=1e-6)
    np.testing.assert_allclose(weight, truth, atol=1e-4)
    np.testing.assert_allclose(bias, [0.1, -0.2, 0.3, 0], atol=1e-4)
    shrunk, bias = rcnn.fit_boxes(vectors, codes, strength=1e9)
    assert np.abs(shrunk).max() < 1e-4 and np.allclose(bias, codes.mean(0), atol=1e-3)


def test_fit_writes_all_classes_into_the_model():
    model = make()
    random = np.random.default_rng(0)
    truth = np.repeat([0, 1, -1], [20, 20, 200])
    vectors = random.normal(size=(240, 12)).astype(np.float32) + np.eye(12, dtype=np.float32)[truth] * 6
    overlap = np.zeros((240, 3), np.float32)
    overlap[np.arange(40), truth[:40]] = 1
    codes = encode_boxes(torch.rand(240, 4) + torch.tensor([0, 0, 3, 3]), torch.tensor([0.0, 0, 3, 3])).numpy()
    codes = codes[:, None].repeat(3, axis=1)
    cache = rcnn.FeatureCache(vectors, truth, overlap, codes, np.ones(240, bool))
    counts = rcnn.fit(model, cache)
    assert counts["positives"] == 40 and counts["boxes"] == 40 and model.config.fitted
    margins = vectors @ model.svm_weight.numpy().T + model.svm_bias.numpy()
    assert (margins[:40].argmax(1) == truth[:40]).mean() > 0.95 and (margins[40:] < 0).all(1).mean() > 0.95
    assert (margins[:, 2] < -1e3).all()  # no object of this class
    with pytest.raises(ValueError, match="No training image has an object"):
        rcnn.fit(model, rcnn.FeatureCache(vectors, truth * 0 - 1, overlap, codes, np.ones(240, bool)))


def cache_one_image(*, objects=(), ignored=(), proposals=()):
    """The cache of an image of 64x64 pixels. Boxes are in pixels, objects are pairs of a class and a box."""

    class Data:
        def __len__(self):
            return 1

        def __getitems__(self, indices):
            boxes = torch.tensor([box for _, box in objects], dtype=torch.float).reshape(-1, 4)
            others = (torch.tensor(each, dtype=torch.float).reshape(-1, 4) for each in (ignored, proposals))
            boxes, regions, found = (to_centers(each) / 64 for each in (boxes, *others))
            label = {"class_labels": torch.tensor([kind for kind, _ in objects], dtype=torch.long), "boxes": boxes}
            label["ignored_boxes"] = regions
            return {"pixel_values": torch.zeros(1, 3, 64, 64), "labels": [label], "proposals": found[None]}

    return rcnn.cache_features(make(), Data())


def test_proposals_inside_of_a_crowd_are_not_used():
    """A small proposal inside of a large crowd has a small IoU with it."""
    inside, half, beside = [4, 4, 12, 12], [16, 0, 24, 8], [22, 22, 38, 38]
    cache = cache_one_image(ignored=[[0, 0, 20, 20]], proposals=[inside, half, beside])
    assert cache.usable.tolist() == [False, False, True]


def test_the_codes_of_a_class_lead_to_its_nearest_object():
    """Both objects have the same IoU with the proposal."""
    left, right, proposal = [8, 8, 24, 24], [12, 8, 28, 24], [10, 8, 26, 24]
    cache = cache_one_image(objects=[(2, left), (0, right)], proposals=[proposal])
    assert cache.overlap[2, 0] == cache.overlap[2, 2] > rcnn.REGRESSED and cache.overlap[2, 1] == 0
    assert cache.codes[2, :, 0] == pytest.approx([2 / 16, 0, -2 / 16])


def test_the_boxes_of_a_class_need_usable_proposals_and_no_lead_over_other_classes():
    """Each object of class 1 has the box of an object of class 0. All proposals of class 2 are in a crowd."""
    model, random = make(), np.random.default_rng(0)
    with torch.no_grad():
        model.box_weight.fill_(9)  # of an earlier fit
    truth = np.repeat([0, 1, 2, -1], 20)
    vectors = random.normal(size=(80, 12)).astype(np.float32)
    overlap, codes = np.zeros((80, 3), np.float32), np.full((80, 3, 4), 0.1, np.float32)
    overlap[:40, :2] = overlap[40:60, 2] = 1
    codes[:, 1] = 0.3
    cache = rcnn.FeatureCache(vectors, truth, overlap, codes, truth != 2)
    assert rcnn.fit(model, cache)["boxes"] == 80
    assert model.box_bias[0].tolist() == pytest.approx([0.1] * 4) and model.box_weight[:2].abs().max() < 1e-4
    assert model.box_bias[1].tolist() == pytest.approx([0.3] * 4)
    assert not model.box_weight[2].any() and not model.box_bias[2].any()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"crop_size": 20}, "crop_size=20 must be a multiple of 8"),
        ({"context": 24}, "context=24 must be from 0 to less than half of crop_size=48"),
        ({"positives": 0}, "positives=0 must be at least 1"),
    ],
)
def test_invalid_configs_name_the_value(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        RcnnConfig(**fields)


def test_missing_proposals_and_labels_raise_an_error():
    with pytest.raises(ValueError, match="R-CNN needs proposals, and got none"):
        make()(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="Got 1 images and labels of 2"):
        make()(torch.zeros(1, 3, 32, 32), torch.zeros(2, 1, 5), torch.full((1, 1, 4), 0.5))
