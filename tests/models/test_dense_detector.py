import json
import math

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torchvision.ops import complete_box_iou_loss

from hf_dl.models import DenseDetectorConfig, DenseDetectorForObjectDetection, DetectionImageProcessor
from hf_dl.models.detection_anchor_free import anchor_free_losses, assign_points, cell_centers, complete_iou
from hf_dl.models.detection_output import NO_CLASS
from tests.models.contract import SAME_CODE, ModelContract

TINY = {
    "feature_size": 8, "num_labels": 3, "backbone": "conv_classifier", "backbone_options": {"widths": [4, 4, 8]}
}  # fmt: skip
HEADS = {
    "anchor_free": {},
    "yolo_v1": {"head_type": "yolo_v1", "grid_size": 2},
    "yolo_v1_fully_connected": {
        "head_type": "yolo_v1", "grid_size": 2, "yolo_head": "fully_connected", "hidden_size": 32, "dropout": 0.0,
    },
}  # fmt: skip


class TestAnchorFree(ModelContract):
    skipped = {"adapters_and_quantization_reach_every_linear_layer": "no linear layer"}
    model_class = DenseDetectorForObjectDetection
    processor_class = DetectionImageProcessor
    auto_classes = ("AutoModelForObjectDetection",)
    overfit_steps = 60
    overfit_learning_rate = 1e-2
    overfit_ratio = 0.3

    def config(self):
        return DenseDetectorConfig(**TINY, **HEADS["anchor_free"])

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        classes = torch.randint(-1, 3, (batch, 2, 1), generator=draw)
        boxes = torch.rand(batch, 2, 4, generator=draw) * 0.4 + 0.3
        pixels = torch.randn(batch, 3, 32, 32, generator=draw)
        return {"pixel_values": pixels, "labels": torch.cat([classes, boxes], -1)}


class TestYoloV1(TestAnchorFree):
    skipped = SAME_CODE

    def config(self):
        return DenseDetectorConfig(**TINY, **HEADS["yolo_v1_fully_connected"])

    def smooth_answer(self, model, inputs):
        return model(**inputs).pred_boxes  # the log-odds of a score near 0 are not smooth


def detector(name="anchor_free", **fields):
    torch.manual_seed(0)
    return DenseDetectorForObjectDetection(DenseDetectorConfig(**(TINY | HEADS[name] | fields)))


def label(*rows):
    rows = torch.tensor(rows, dtype=torch.float).reshape(-1, 5)
    return {"class_labels": rows[:, 0].long(), "boxes": rows[:, 1:]}


@pytest.mark.parametrize("name", HEADS)
def test_images_without_objects_train(name):
    model = detector(name).train()
    images = torch.randn(2, 3, 32, 48)
    for labels in ([label(), label()], [label(), label((1, 0.5, 0.5, 0.2, 0.2))]):
        model.zero_grad()
        model(images, labels=labels).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        terms = model(images, labels=labels).loss_dict
        assert all(value.isfinite() for value in terms.values())
    assert model(images, labels=[label(), label()]).loss > 0


@pytest.mark.parametrize("name", HEADS)
def test_boxes_are_inside_the_image(name):
    model = detector(name).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter))
        boxes = model(torch.randn(2, 3, 32, 64)).pred_boxes
    low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    assert low.min() > -1e-6 and high.max() < 1 + 1e-6 and boxes[..., 2:].min() >= 0


def test_every_object_has_a_point_and_the_smaller_box_wins():
    points = cell_centers(4, 4)
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 32, 32], [10, 10, 14, 14], [0, 0, 0, 0], [16, 16, 32, 32]])
    owners, ignored = assign_points(points, torch.tensor([0, 1, 2, NO_CLASS, NO_CLASS]), boxes)
    owners = owners.unflatten(0, (4, 4))
    assert owners[0, 0] == 0  # no point is in this box
    assert owners[1, 1] == 2  # the nearest point of both; the smaller box
    boxes_of_10_and_12 = torch.tensor([[0.0, 0, 12, 12], [1, 1, 11, 11]])  # their areas differ by less than 64
    for order in ([0, 1], [1, 0]):
        near, _ = assign_points(torch.tensor([[4.0, 4.0]]), torch.tensor([0, 0]), boxes_of_10_and_12[order])
        assert order[near.item()] == 1
    assert owners[1, 2] == owners[2, 1] == owners[2, 2] == 1  # near the center of the large box
    assert ignored.nonzero().tolist() == []  # all points of the region have an object
    owners, ignored = assign_points(
        cell_centers(6, 6), torch.tensor([1, NO_CLASS]), torch.tensor([[0.0, 0, 48, 48], [40, 40, 48, 48]])
    )
    found = owners.unflatten(0, (6, 6)) == 0  # points far from the center are negatives, also inside the box
    assert found[1:5, 1:5].all() and found.sum() == 16 and ignored.nonzero().tolist() == [[35]]


def test_many_boxes_in_one_image_train():
    draw = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randint(0, 3, (10_000, 1), generator=draw), torch.rand(10_000, 4, generator=draw)], 1)
    labels = [label(), {"class_labels": rows[:, 0].long(), "boxes": rows[:, 1:] * 0.5 + 0.1}]
    assert detector()(torch.zeros(2, 3, 32, 32), labels=labels).loss.isfinite()


def test_complete_iou_equals_torchvision():
    draw = torch.Generator().manual_seed(0)
    boxes, others = (torch.rand(50, 2, 2, generator=draw).sort(1).values.flatten(1) for _ in range(2))
    torch.testing.assert_close(
        1 - complete_iou(boxes, others), complete_box_iou_loss(boxes, others), rtol=1e-4, atol=1e-5
    )


def test_the_loss_of_one_object_by_hand():
    """One point has an object whose box it predicts with an IoU of one half. The other point is a negative."""
    logits = torch.tensor([[[0.0, 0.0], [1.0, -1.0]]], requires_grad=True)
    found = torch.tensor([[[0.0, 0, 8, 8], [8.0, 0, 16, 8]]])
    terms = anchor_free_losses(
        logits, found, torch.tensor([[1]]), torch.tensor([[[0.0, 0, 8, 16]]]), torch.tensor([[0, -1]]),
        torch.zeros(1, 2, dtype=torch.bool),
    )  # fmt: skip
    score = torch.tensor([0.5, 0.5, 1.0, -1.0])
    score[2:] = score[2:].sigmoid()
    entropy = -(1 - score).log()
    entropy[1] = np.log(2)  # cross-entropy of 0.5 and 0.5
    expected = ((score - torch.tensor([0, 0.5, 0, 0])) ** 2 * entropy).sum()
    torch.testing.assert_close(terms["classification"], expected / 9)
    torch.testing.assert_close(terms["box"], 2 * (1 - complete_iou(found[0, 0], torch.tensor([0.0, 0, 8, 16]))) / 9)


def test_points_in_ignored_regions_have_no_loss():
    model, images = detector(), torch.randn(1, 3, 32, 32)
    region = label() | {"ignored_boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]])}
    assert model(images, labels=[region]).loss == 0 < model(images, labels=[label()]).loss


def test_another_number_of_classes_can_be_fine_tuned(tmp_path):
    detector(num_labels=1).save_pretrained(tmp_path)
    model = DenseDetectorForObjectDetection.from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 16, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_type": "fcos"}, "head_type='fcos' is unknown. Choose one of: anchor_free, yolo_v1"),
        ({"grid_size": 0}, "grid_size=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"backbone": "vgg"}, "backbone='vgg' is unknown"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        DenseDetectorConfig(**fields)


def test_labels_are_counted():
    with pytest.raises(ValueError, match="Got 2 images and labels of 1. Expected one per image"):
        detector()(torch.zeros(2, 3, 32, 32), labels=[label()])


def test_the_pipeline_of_transformers_loads_a_folder(tmp_path, monkeypatch):
    errors = []
    monkeypatch.setattr(transformers.pipelines.base.logger, "error", errors.append)
    names = {0: "cat", 1: "dog", 2: "cow"}
    model = detector(id2label=names, label2id={name: number for number, name in names.items()})
    with torch.no_grad():  # each cell finds a dog, at most exp(0.7) cells to each side
        model.head.class_output.bias.copy_(torch.tensor([-9.0, 2.0, -9.0]))
        model.head.box_output.weight.zero_()
    model.save_pretrained(tmp_path)
    DetectionImageProcessor(size={"height": 32, "width": 32}, nms_threshold=1.0).save_pretrained(tmp_path)
    found = transformers.pipeline("object-detection", str(tmp_path))
    images = [Image.new("RGB", (64, 32)), Image.new("L", (320, 640))]
    results = found(images, batch_size=2, threshold=0.5)
    assert errors == [] and len(results) == 2
    for image, rows in zip(images, results, strict=True):
        assert rows and {row["label"] for row in rows} == {"dog"}
        sides = {int(image.width * max(0, (cell + 0.5) / 4 - math.exp(0.7) / 4)) for cell in range(4)}
        assert {row["box"]["xmin"] for row in rows} == sides
        assert max(row["box"]["ymax"] for row in rows) == image.height
    assert json.loads((tmp_path / "config.json").read_text())["id2label"]["1"] == "dog"
