import copy

import numpy as np
import pytest
import torch

from hf_dl.data import detection
from hf_dl.data.detection_files import is_coco_without_test
from hf_dl.models.detection_output import DetectionOutput
from hf_dl.models.localizer import KeypointOutput
from hf_dl.recipes import localizer
from hf_dl.recipes.box_images import BoxImages, flip_randomly
from scripts import train_localizer
from tests.data.test_detection import write_coco
from tests.scripts.runs import reset


@pytest.fixture(scope="module")
def data():
    return BoxImages(detection.load("test", num_images=4, size=64, num_objects=(2, 2)), (32, 64))


def test_images_have_one_size_and_normalized_boxes(data):
    rows = detection.load("test", num_images=4, size=64, num_objects=(2, 2))
    assert data.pixels.shape == (4, 3, 32, 64) and data.pixels.dtype == torch.uint8
    for row, labels in zip(rows, data.labels, strict=True):
        boxes = np.array(row["objects"]["bbox"]) / 64
        np.testing.assert_allclose(labels[:, 1:3], (boxes[:, :2] + boxes[:, 2:]) / 2, atol=1e-6)
        assert labels[:, 0].tolist() == row["objects"]["category"]


def test_the_default_number_of_generated_scenes(monkeypatch):
    counts = {}
    monkeypatch.setattr(detection, "load", lambda split, *_, num_images, **__: counts.update({split: num_images}))
    monkeypatch.setattr(localizer, "BoxImages", lambda *_: None)
    monkeypatch.setattr(detection, "class_names", lambda *_: [])
    for split in ("train", "test"):
        localizer.load_images(localizer.LocalizerFlags(), split)
    assert counts == {"train": 5000, "test": 500}


def test_boxes_move_with_their_image():
    images = torch.arange(4.0).expand(20, 1, 1, 4).clone()
    labels = torch.tensor([[1, 0.125, 0.5, 0.25, 1.0]]).expand(20, 1, 5).clone()  # the first pixel
    images, labels = flip_randomly(images, labels, generator=torch.Generator().manual_seed(0))
    flipped = images[:, 0, 0, 0] == 3
    assert 0 < flipped.sum() < 20
    assert (labels[flipped, 0, 1] == 0.875).all() and (labels[~flipped, 0, 1] == 0.125).all()


@pytest.mark.parametrize("target", ["box", "point"])
def test_a_perfect_output_has_perfect_scores(data, target, monkeypatch):
    flags = localizer.LocalizerFlags(num_objects=2, target=target, per_class=True, image_size=32)
    model, processor = localizer.make_model(flags, ["a", "b", "c", "d"])
    model.config.image_size = [32, 64]
    classes, boxes = localizer.assign_outputs(data.labels[..., 0].long(), data.labels[..., 1:], 2)
    wrong = classes.clone()
    wrong[0, 0] = (classes[0, 0] + 1) % 4
    for named, expected in ((classes, 1.0), (wrong, 7 / 8)):
        logits = torch.full((4, 2, 4, 4), -9.0)
        logits[torch.arange(4)[:, None], torch.arange(2), named, named] = 9.0
        places = boxes[:, :, None, : model.numbers].expand(-1, -1, 4, -1)
        kind, name = (KeypointOutput, "keypoints") if target == "point" else (DetectionOutput, "pred_boxes")
        output = kind(**{"logits": logits.flatten(1, 2), name: places.flatten(1, 2)})
        monkeypatch.setattr(type(model), "forward", lambda self, pixels, output=output: output)
        scores = localizer.evaluate(model, processor, data)
        assert scores["class_accuracy"] == scores["localization_accuracy"] == expected and scores["ms"] > 0
        if target == "point":
            assert scores["point_accuracy"] == 1 and scores["point_error"] < 1e-4
        else:
            assert scores["box_accuracy"] == 1 and scores["mean_iou"] == pytest.approx(1)
            assert (scores["localization_error"] > 0) == (expected < 1)


def test_a_run_trains_saves_and_reports(tmp_path):
    threads = torch.get_num_threads()
    flags = "--num_train=16 --num_test=4 --image_size=32 --max_steps=3 --batch_size=8 --eval_every=2 --cpu_threads=1"
    metrics = train_localizer.main([f"--output_dir={tmp_path}", "--num_objects=2", "--target=point", *flags.split()])
    reset()
    torch.set_num_threads(threads)
    assert {"test_class_accuracy", "test_point_error", "test_point_accuracy"} <= metrics.keys()
    assert {"model.safetensors", "preprocessor_config.json", "README.md", "curves.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    loaded = localizer.LocalizerForKeypointDetection.from_pretrained(tmp_path)
    assert loaded(torch.zeros(1, 3, 32, 32)).keypoints.shape == (1, 2, 2)


def test_the_scores_are_those_of_the_saved_weights(tmp_path, monkeypatch):
    """The averaged weights are saved, so they are scored as well."""
    threads, scored, evaluate = torch.get_num_threads(), [], localizer.evaluate

    def record(model, processor, data):
        scored.append({name: value.clone() for name, value in model.named_parameters()})
        return evaluate(model, processor, data)

    monkeypatch.setattr(localizer, "evaluate", record)
    flags = "--num_train=16 --num_test=4 --image_size=32 --max_steps=4 --batch_size=8 --eval_every=0 --cpu_threads=1"
    train_localizer.main([f"--output_dir={tmp_path}", *flags.split(), "--ema_decay=0.9"])
    reset()
    torch.set_num_threads(threads)
    saved = dict(localizer.LocalizerForObjectDetection.from_pretrained(tmp_path).named_parameters())
    assert all(saved[name].equal(value) for name, value in scored[-1].items())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["annotations/instances_train2017.json", "annotations/instances_val2017.json"], True),
        (["annotations/instances_val.json", "annotations/instances_eval.json"], False),
        (["annotations/instances_test2017.json"], False),
        (["annotations/other.json"], False),
        (["Annotations/0001.xml"], False),
    ],
)
def test_coco_without_test_annotations(files, expected, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert is_coco_without_test(tmp_path) == expected
    assert not is_coco_without_test("some/dataset") and not is_coco_without_test("synthetic")


@pytest.mark.parametrize("target", ["box", "point"])
def test_scores_without_an_object_are_left_out(data, target):
    model, processor = localizer.make_model(localizer.LocalizerFlags(target=target, image_size=32), ["a", "b"])
    model.config.image_size = [32, 32]
    empty = copy.copy(data)
    empty.pixels, empty.labels = data.pixels[..., :32], torch.full_like(data.labels, -1)
    assert localizer.evaluate(model, processor, empty).keys() == {"ms"}


def test_training_images_need_objects_and_boxes_across_the_border_follow_the_flag(tmp_path):
    boxes = [(10, 3, [1, 2, 5, 6], {"iscrowd": 1})]
    for name, more in (("train2017", []), ("val2017", [(11, 3, [10, 5, 30, 30], {})])):
        write_coco(tmp_path, boxes + more, name=name)
    flags = localizer.LocalizerFlags(source=str(tmp_path), image_size=32)
    with pytest.raises(ValueError, match="No train image of .* has an object. .* crowds and difficult objects do not"):
        localizer.load_images(flags, "train")
    with pytest.warns(UserWarning, match="Cut or dropped boxes in 1 images"):
        images, _ = localizer.load_images(flags, "validation")
    assert images.labels[1, 0].tolist() == [0, 0.75, 0.75, 0.5, 0.5]
    flags.border = "refuse"
    with pytest.raises(ValueError, match=r"Boxes of image 11 \(1 outside\) do not fit"):
        localizer.load_images(flags, "validation")
    (tmp_path / "val2017" / "0.png").write_bytes(b"damaged")
    flags.border, flags.corrupt, flags.monitor = "drop", "skip", "val_class_accuracy"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="No validation image .* monitor='val_class_accur"):
        localizer.load_images(flags, "validation")


def test_a_negative_weight_is_refused(tmp_path):
    with pytest.raises(ValueError, match="place_weight=-1 must be 0 or above"):
        train_localizer.Args(output_dir=str(tmp_path), place_weight=-1)
