import dataclasses
import time

import pytest
import torch
import transformers
from datasets import Dataset
from PIL import Image
from torch import nn

from hf_dl.data import detection
from hf_dl.metrics.detection import coco_scores
from hf_dl.models import NormResNetConfig, NormResNetForImageClassification
from hf_dl.models.detection_output import PADDING_LOGIT, DetectionOutput, pad_labels
from hf_dl.models.detection_processor import DetectionImageProcessor
from hf_dl.models.norm_resnet import image_processor
from hf_dl.recipes import detection as recipe
from hf_dl.recipes.detection_report import draw_boxes
from hf_dl.recipes.proposals import choose_anchor_sizes
from hf_dl.reporting.grids import SEGMENT_COLORS
from scripts import evaluate_detector
from scripts.train_detector import Args
from tests.data.test_detection import write_coco, write_voc


def oracle(batch, names):
    """The output of a detector that finds all annotated objects."""
    classes, boxes = pad_labels(batch["labels"], len(names))
    logits = torch.where(classes[..., None] == torch.arange(len(names)), 4.0, PADDING_LOGIT)
    return DetectionOutput(logits=logits, pred_boxes=boxes)


@pytest.mark.parametrize("kind", ["scenes", "voc", "coco"])
def test_the_annotation_itself_has_an_average_precision_of_1(kind, tmp_path):
    """Reader, processor, post-processing and metric agree on classes, axes and sizes."""
    if kind == "scenes":
        rows = detection.load("test", num_images=12, size=48)
    elif kind == "voc":  # images of 20 x 10 pixels
        images = {"a": [("dog", 0, 1, 1, 20, 10), ("cat", 1, 5, 3, 8, 6), ("cat", 0, 11, 2, 16, 9)], "b": []}
        rows = detection.load("train", write_voc(tmp_path, images, {"train": ["a", "b"], "val": [], "test": []}))
    else:
        boxes = [(10, 3, [1, 2, 5, 6], {}), (10, 90, [8, 0, 12, 4], {}), (11, 90, [0, 0, 20, 10], {"iscrowd": 1})]
        rows = detection.load("train", write_coco(tmp_path, boxes))
    processor = DetectionImageProcessor(size={"height": 32, "width": 64})
    data = recipe.DetectionImages(rows, processor)
    batch = data.__getitems__(range(len(data)))
    assert batch["pixel_values"].shape == (len(rows), 3, 32, 64)
    sizes = [row["orig_size"].tolist() for row in batch["labels"]]
    found = processor.post_process_object_detection(oracle(batch, data.names), 0.01, sizes)
    scores = coco_scores(found, recipe.references(rows))
    assert scores["map"] == pytest.approx(1) and scores["mar_100"] == pytest.approx(1)


def test_a_folder_of_coco_without_test_annotations_is_tested_on_its_validation_images(tmp_path):
    for name, count in (("train2017", 2), ("val2017", 1)):
        write_coco(tmp_path, [(10, 3, [1, 2, 5, 6], {})], modes=("RGB",) * count, name=name)
    args = Args(source=str(tmp_path))
    assert [len(recipe.load_rows(args, split, size=8)) for split in ("train", "validation", "test")] == [2, 1, 1]


def test_augmentation_changes_the_batch_and_not_the_fingerprint():
    rows = detection.load("test", num_images=4, size=32)
    args = Args(image_size=[32], flip=1.0, zoom=0.2, shift=0.1, color=0.3)
    plain, changed = (
        recipe.DetectionImages(rows, DetectionImageProcessor(size={"height": 32, "width": 32}), each)
        for each in (None, recipe.make_augmentation(args))
    )
    before, after = plain[0], changed[0]
    assert not torch.equal(before["pixel_values"], after["pixel_values"])
    assert not torch.equal(before["labels"][0]["boxes"], after["labels"][0]["boxes"])
    assert plain.fingerprint_data()[0] == changed.fingerprint_data()[0]
    again = plain.__getitems__([1, 0])  # the second one from memory
    assert torch.equal(again["pixel_values"][1], before["pixel_values"][0])
    assert torch.equal(again["labels"][0]["boxes"], plain[1]["labels"][0]["boxes"])


def test_proposals_move_along_with_objects():
    rows = detection.load("test", num_images=4, size=32)
    processor = DetectionImageProcessor(size={"height": 32, "width": 32}, num_proposals=20)
    plain, changed = (
        recipe.DetectionImages(rows, processor, each)
        for each in (None, recipe.make_augmentation(Args(image_size=[32], flip=1.0)))
    )
    before, after = plain[1], changed[1]
    assert before["proposals"].shape == (1, 20, 4)
    for name, boxes, moved in (
        ("proposals", before["proposals"][0], after["proposals"][0]),
        ("objects", before["labels"][0]["boxes"], after["labels"][0]["boxes"]),
    ):
        filled = boxes[:, 2] > 0
        mirrored = torch.where(filled[:, None] & (torch.arange(4) == 0), 1 - boxes, boxes)
        torch.testing.assert_close(moved, mirrored, msg=name)
        assert filled.any()
    assert torch.equal(before["labels"][0]["class_labels"], after["labels"][0]["class_labels"])


def save_classifier(folder):
    torch.manual_seed(0)
    config = NormResNetConfig(n=1, widths=(4, 4, 8), num_labels=2)
    model = NormResNetForImageClassification(config)
    model.save_pretrained(folder)
    image_processor(config).save_pretrained(folder)
    return model


def test_a_trained_classifier_becomes_the_backbone(tmp_path):
    classifier = save_classifier(tmp_path)
    args = Args(backbone=str(tmp_path), image_size=[32, 48])
    recipe.complete_flags(args)
    model, processor = recipe.make_model(args, ["cat", "dog"])
    assert model.config.backbone == "norm_resnet" and model.config.backbone_options["widths"] == [4, 4, 8]
    assert torch.equal(model.backbone.trunk.network.stem[0].weight, classifier.norm_resnet.stem[0].weight)
    assert (processor.size["height"], processor.size["width"]) == (32, 48)
    assert list(processor.image_std) == [0.5, 0.5, 0.5]
    assert model.config.id2label == {0: "cat", 1: "dog"} and model(torch.zeros(1, 3, 32, 48)).logits.shape[2] == 2
    assert recipe.method_of(model) is recipe.METHODS["anchor_free"]


def test_published_weights_bring_their_statistics(monkeypatch):
    asked = []
    monkeypatch.setattr(recipe, "load_published_weights", lambda backbone, name: asked.append(name))
    args = Args(backbone="timm/resnet10t", pretrained=True, image_size=[32])
    recipe.complete_flags(args)
    _, processor = recipe.make_model(args, ["cat"])
    assert asked == ["timm/resnet10t"] and list(processor.image_mean) == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "yolo"}, "method='yolo' is unknown. Choose one of: anchor_free, yolo_v1"),
        (
            {"method": "sliding_window", "backbone": "timm/x"},
            "backbone='timm/x' does not work with method='sliding_window'",
        ),
        ({"grid_size": 7}, "grid_size=7 is not a flag of method='anchor_free', which accepts: no such flags"),
        ({"image_size": [100]}, r"image_size=\[100\] is invalid. Expected height and width, or one number, multiples"),
        ({"image_size": [8, 8, 8]}, r"image_size=\[8, 8, 8\] is invalid"),
        ({"method": "fast_rcnn", "anchor_sizes": [8]}, r"anchor_sizes=\[8\] is not a flag of method='fast_rcnn'"),
        ({"pretrained": True}, "pretrained needs backbone=timm/NAME, not 'small'"),
    ],
)
def test_wrong_flags_of_the_model_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        recipe.complete_flags(Args(**flags))


def test_help_names_all_methods_and_wrong_numbers_are_refused():
    text = next(field.metadata["help"] for field in dataclasses.fields(recipe.ModelFlags) if field.name == "method")
    assert all(name in text for name in recipe.METHODS)
    with pytest.raises(ValueError, match="zoom=-1 must be at least 0. 0 keeps the size"):
        recipe.make_augmentation(Args(zoom=-1))
    with pytest.raises(ValueError, match="num_test=-3 must be at least 0. 0 uses all examples"):
        recipe.load_rows(Args(num_test=-3), "test", size=32)
    for threshold in (-0.1, 2):
        with pytest.raises(ValueError, match=f"threshold={threshold}.* must be from 0 to 1"):
            evaluate_detector.main([f"--threshold={threshold}"])


def test_wrong_backbones_and_data_are_refused(tmp_path):
    args = Args(backbone=str(tmp_path), image_size=[32])
    with pytest.raises(ValueError, match="is a folder without a model. Train a classifier first"):
        recipe.make_model(args, ["cat"])
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a model of type 'vit'. Expected one of: norm_resnet"):
        recipe.make_model(args, ["cat"])
    with pytest.raises(ValueError, match="backbone='resnet' is unknown"):
        recipe.make_model(Args(backbone="resnet", image_size=[32]), ["cat"])
    with pytest.raises(ValueError, match=r"num_objects=\[3\] is invalid. Expected the fewest and the most"):
        recipe.load_rows(Args(num_objects=[3]), "test", size=32)
    model, _ = recipe.make_model(Args(image_size=[32]), ["cat", "dog"])
    with pytest.raises(ValueError, match=r"source='birds' has 1 classes \(cat, ...\), but the model has 2 classes"):
        recipe.check_classes(model, ["cat"], source="birds")


def test_the_method_sets_the_learning_rate_the_batch_size_and_its_flags():
    args = Args(method="yolo_v1", grid_size=4)
    args.given = {}
    recipe.complete_flags(args)
    assert (args.learning_rate, args.batch_size, args.grid_size, args.boxes_per_cell) == (1e-3, 32, 4, 2)
    for method in ("fast_rcnn", "faster_rcnn"):  # with 1e-3, the classes are learned several times slower
        args = Args(method=method)
        args.given = {}
        recipe.complete_flags(args)
        assert (args.learning_rate, args.batch_size) == (3e-3, 16)
    args = Args(method="faster_rcnn", learning_rate=0.5, batch_size=8)
    args.given = {"learning_rate": 0.5, "batch_size": 8}
    recipe.complete_flags(args)
    assert (args.learning_rate, args.batch_size) == (0.5, 8)


def test_anchors_fit_the_boxes_of_the_training_images():
    """Two rare sizes keep their anchors beside many boxes of one size, in pixels of the input."""
    boxes = [[*([0, 0, 40 + number % 3, 40] for number in range(30)), [0, 0, 10, 10]], [[0, 0, 80, 90], [3, 3, 3, 9]]]
    picture = Image.new("RGB", (100, 100))
    rows = Dataset.from_list([{"image": picture, "objects": {"bbox": each}} for each in [*boxes, []]])
    args = Args(method="faster_rcnn", image_size=[200])
    args.given = {}
    recipe.complete_flags(args)
    recipe.complete_anchors(args, rows)
    assert args.anchor_sizes == [20, 81, 170]
    assert choose_anchor_sizes(rows, image_size=[50, 200], count=2) == [10, 41]  # the area stays the same
    assert choose_anchor_sizes(rows.select([1]), image_size=[100]) == [85]
    args.anchor_sizes = [8]
    recipe.complete_anchors(args, rows.select([2]))
    assert args.anchor_sizes == [8]  # without boxes, the default remains
    args.given = {"anchor_sizes": [8]}
    recipe.complete_anchors(args, rows)
    assert args.anchor_sizes == [8]
    args = Args(method="fast_rcnn")
    recipe.complete_anchors(args, rows)
    assert args.anchor_sizes is None


def test_the_timer_measures_modules_and_blocks():
    class Slow(nn.Linear):
        def forward(self, x):
            begin = time.process_time()
            while time.process_time() - begin < 0.01:
                pass
            return super().forward(x)

    model = nn.Sequential(Slow(2, 2), nn.Linear(2, 2))
    timer = recipe.StageTimer(model, {"slow": "0", "fast": "1"})
    with timer.measure("total"):
        model(torch.zeros(1, 2))
    timer.close()
    model(torch.zeros(1, 2))
    assert 0.01 <= timer.seconds["slow"] < timer.seconds["total"] < 0.02 and timer.seconds["fast"] < 0.01


def test_boxes_and_their_texts_stay_inside_the_picture():
    boxes = [[0, 0, 40, 20], [30, 10, 40, 20]]
    picture = draw_boxes(Image.new("RGB", (40, 20), "white"), boxes, [0, 1], names=["cat", "dog"], scores=[1, 0.5])
    assert picture.shape == (128, 256, 3)
    first, second = (tuple(SEGMENT_COLORS[1 + number]) for number in (0, 1))
    assert tuple(picture[5, 0]) == first and tuple(picture[50, -1]) == first  # left and right side
    assert tuple(picture[-1, -1]) == tuple(picture[64, 220]) == second
    dark = picture[52:63].sum(-1) < 150  # the text above the second box, which begins to the left of its corner
    assert dark[:, 195:253].any() and not dark[:, 253:].any()
