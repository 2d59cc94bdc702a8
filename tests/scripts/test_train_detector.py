import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection, YolosConfig, YolosForObjectDetection, YolosImageProcessor

from hf_dl.models import detection_anchor_free, detection_yolo_v1
from hf_dl.models.detection_processor import DetectionImageProcessor
from hf_dl.recipes import detection as recipe
from hf_dl.reporting.card import read_card
from scripts import evaluate_detector, run_experiment, train_detector
from tests.data.test_detection import write_voc
from tests.scripts.runs import killed_after, reset
from tests.snippets import run_snippet

SMALL = "--num_train=24 --num_test=8 --image_size=32 --batch_size=8 --warmup_steps=0 --log_every=1".split()
STEPS = "--max_steps=6 --eval_every=3 --eval_epochs=0 --save_every=3 --cpu_threads=1".split()


def train(folder, *flags):
    return train_detector.main([f"--output_dir={folder}", *SMALL, *STEPS, *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("train") / "run"
    metrics = train(folder)
    reset()
    yield folder, metrics
    torch.set_num_threads(threads)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("test_ms")}


def test_the_folder_is_all_that_a_person_needs(finished, capsys):
    folder, metrics = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "preprocessor_config.json", "dense_detector.py", "detection_backbone.py",
        "results.json", "README.md", "examples.png", "precision_recall.png", "curves.png", "classes.csv",
    }  # fmt: skip
    for picture in ("examples.png", "precision_recall.png", "curves.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 5
    card = read_card(folder / "README.md")
    assert card.data.pipeline_tag == "object-detection" and "| sphere |" in card.text
    run_snippet(folder)
    assert capsys.readouterr().out.startswith("[")
    assert json.loads((folder / "results.json").read_text())["metrics"] == metrics


def test_losses_and_scores_are_logged(finished):
    folder, metrics = finished
    lines = [line for line in read_log(folder) if "loss" in line]
    assert len(lines) == 6
    assert all(line["loss"] == pytest.approx(line["classification"] + line["box"]) for line in lines)
    assert [line["step"] for line in read_log(folder) if "val_map_50" in line] == [3, 6]
    for name in ("map", "map_50", "mar_100", "voc07_map_50", "voc10_map_50", "error_class", "error_background"):
        assert 0 <= metrics[f"test_{name}"] <= 1
    assert metrics["test_images"] == 8 and metrics["test_objects"] > 8
    times = {name: metrics[f"test_ms_{name}"] for name in recipe.STAGES}
    assert times.pop("proposals") == 0 < min(times.values())  # it has no proposals
    assert metrics["test_ms"] >= sum(times.values())


@pytest.mark.parametrize("method", recipe.METHODS)
def test_the_terms_and_weights_in_the_script_are_the_ones_of_the_model(method, monkeypatch):
    constants = {
        ("anchor_free", "box"): (detection_anchor_free, "BOX_WEIGHT"),
        ("yolo_v1", "coordinates"): (detection_yolo_v1, "COORDINATE_WEIGHT"),
        ("yolo_v1", "no_object"): (detection_yolo_v1, "NO_OBJECT_WEIGHT"),
    }
    args = train_detector.Args(method=method, image_size=[32])
    recipe.complete_flags(args)
    torch.manual_seed(0)
    model = recipe.make_model(args, ["cat", "dog"])[0].eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([[[1, 0.5, 0.5, 0.5, 0.6]]] * 2)}
    if recipe.METHODS[method].num_proposals:
        inputs["proposals"] = torch.tensor([[[0.5, 0.5, 0.6, 0.6], [0.2, 0.2, 0.3, 0.3]]] * 2)
    with torch.no_grad():
        before = model(**inputs).loss_dict
        for place in constants.values():
            monkeypatch.setattr(*place, 1)
        after = model(**inputs).loss_dict
    table = train_detector.LOSS_TERMS[method]
    assert list(before) == list(table)  # in the same order, so that the sum is the same to the bit
    for name, weight in table.items():
        assert before[name].item() == pytest.approx(weight * after[name].item(), rel=1e-6) and before[name] > 0
        assert weight == 1 or (method, name) in constants


def test_the_script_lists_all_methods():
    assert train_detector.LOSS_TERMS.keys() == recipe.METHODS.keys()
    assert all(name in train_detector.__doc__ for name in recipe.METHODS)


def test_evaluating_the_folder_gives_the_same_scores(finished, tmp_path):
    folder, metrics = finished
    found = evaluate_detector.main([f"--model={folder}", f"--output_dir={tmp_path}"])
    assert without_times(found) == pytest.approx(
        {name: value for name, value in without_times(metrics).items() if name.startswith("test_")}, abs=1e-6
    )
    assert {"evaluation.json", "classes.csv", "examples.png"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="has 32 classes .*, but the model has 4 classes"):
        evaluate_detector.main([f"--model={folder}", "--source=synthetic", "--classes=shape_color", "--num_test=2"])


def test_detectors_of_transformers_are_evaluated_too(tmp_path):
    names = ["sphere", "cube", "cylinder", "cone"]
    config = YolosConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=[32, 32],
        patch_size=16, num_detection_tokens=5, id2label=dict(enumerate(names)),
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = evaluate_detector.main([f"--model={tmp_path}", "--num_test=3", "--threshold=0.1"])
    assert 0 <= found["test_map_50"] <= 1 and found["test_images"] == 3 and "test_ms_features" not in found


def test_killed_and_resumed_it_ends_the_same(finished, tmp_path):
    folder, metrics = finished
    with killed_after(4):
        train(tmp_path)
    assert without_times(train(tmp_path, "--resume")) == without_times(metrics)
    left, right = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_own_data_with_images_without_objects_trains_yolo(tmp_path):
    images = {"a": [("dog", 0, 1, 1, 20, 10), ("cat", 1, 5, 3, 8, 6)], "b": [], "c": [("cat", 0, 3, 2, 12, 9)]}
    source = write_voc(tmp_path, images, {"train": ["a", "b"], "val": ["c"], "test": ["c", "b"]})
    flags = [f"--source={source}", "--method=yolo_v1", "--grid_size=2", "--max_steps=2", "--batch_size=2"]
    flags += ["--with_validation", "--num_train=0", "--image_size", "32", "64", "--save_every=0", "--eval_every=0"]
    metrics = train(tmp_path / "run", *flags)
    assert metrics["test_objects"] == 1 and metrics["test_images"] == 2
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "run")
    assert model.config.id2label == {0: "cat", 1: "dog"} and model.config.grid_size == 2
    assert DetectionImageProcessor.from_pretrained(tmp_path / "run").size == {"height": 32, "width": 64}
    line = next(line for line in read_log(tmp_path / "run") if "loss" in line)
    assert line["epoch"] == pytest.approx(2 / 3, abs=1e-3)  # of three images, one of them for validation
    assert line["loss"] == pytest.approx(sum(line[k] for k in ("coordinates", "object", "no_object", "class")))


def write_odd_coco(root):
    """Write COCO files with gaps in the ids, odd boxes, images of many modes, and 10,000 boxes in one image."""
    draw = np.random.default_rng(0)
    boxes = [[5, 4, 20, 10], [3, 3, 0, 5], [50, 3, 9, 9], [30, 20, 90, 90]]  # without area, outside, across the border
    places = np.concatenate([draw.uniform(0, 20, (10_000, 2)), draw.uniform(1, 10, (10_000, 2))], 1).tolist()
    pairs = [*((1, box) for box in boxes), *((2, box) for box in places)]
    annotations = [
        {"id": number, "image_id": image, "category_id": (7, 90)[number % 2], "bbox": box}
        for number, (image, box) in enumerate(pairs)
    ]
    (root / "annotations").mkdir(parents=True)
    for split, found in (("train", annotations), ("val", [])):
        (root / f"{split}2017").mkdir()
        modes = ["RGB", "L", "RGBA", "P", "CMYK"]
        for number, mode in enumerate(modes):
            image = Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).convert(mode)
            image.save(root / f"{split}2017" / f"{number}.tif")
        images = [{"id": number, "file_name": f"{number}.tif"} for number in range(len(modes))]
        classes = [{"id": 1, "name": "unused"}, {"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}]
        text = json.dumps({"images": images, "annotations": found, "categories": classes})
        (root / "annotations" / f"instances_{split}2017.json").write_text(text)
    return root


def test_odd_annotations_train_and_missing_ones_are_refused(tmp_path):
    source = write_odd_coco(tmp_path / "coco")
    flags = [f"--source={source}", "--num_train=0", "--max_steps=2", "--batch_size=3", "--save_every=0"]
    with pytest.warns(UserWarning, match=r"Cut or dropped boxes in 1 images .* 1 \(2 without area, 1 outside\)"):
        metrics = train(tmp_path / "run", *flags)
    assert metrics["test_images"] == 5 and metrics["test_objects"] == 0
    assert not any("map" in name for name in metrics)  # undefined without an object
    lines = [line["classification"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert len(lines) == 2 and np.isfinite(lines).all()
    assert AutoModelForObjectDetection.from_pretrained(tmp_path / "run").config.label2id["dog"] == 2
    reset()
    args = train_detector.Args(source=str(source), monitor="val_map")
    with pytest.raises(ValueError, match="No validation image of .* has an object, but monitor='val_map' needs one"):
        train_detector.recipe.load_rows(args, "validation", size=32)
    (source / "annotations" / "instances_val2017.json").rename(source / "annotations" / "instances_train2017.json")
    with pytest.raises(ValueError, match="No train image of source='.*' has an object. Expected boxes for at least"):
        train_detector.recipe.load_rows(args, "train", size=32)


@pytest.mark.parametrize("name", ["ladder", "localization", "bccd"])
def test_the_flags_of_the_experiments(name, capsys):
    path = Path(run_experiment.__file__).parent / "experiments" / f"detection_{name}.toml"
    assert run_experiment.main([str(path), "--dry_run"]) == 0, capsys.readouterr().err
    assert " to run now." in capsys.readouterr().out


@pytest.mark.slow
def test_the_default_detector_reaches_the_scores_of_the_prototype(tmp_path):
    """The prototype of the ladder had these scores after five minutes of CPU time, which this run takes as well."""
    threads = torch.get_num_threads()
    flags = "--epochs=12 --eval_epochs=0 --save_every=0 --cpu_threads=1 --mixed_precision=bf16"
    metrics = train_detector.main([f"--output_dir={tmp_path}", *flags.split()])
    reset()
    torch.set_num_threads(threads)
    assert metrics["test_images"] == 500
    assert metrics["test_map_50"] >= 0.992 and metrics["test_map"] >= 0.902


@pytest.mark.parametrize("method", ["fast_rcnn", "faster_rcnn"])
def test_detectors_with_proposals_train(method, tmp_path):
    """The proposals of Fast R-CNN are computed with the images, and their time counts."""
    folder = tmp_path / "run"
    metrics = train(folder, f"--method={method}", "--max_steps=2", "--roi_type=pool", "--save_every=0")
    line = next(line for line in read_log(folder) if "loss" in line)
    terms = ["classification", "box"] + (["rpn_objectness", "rpn_box"] if method == "faster_rcnn" else [])
    assert line["loss"] == pytest.approx(sum(line[name] for name in terms))
    times = [metrics[f"test_ms_{stage}"] for stage in recipe.STAGES]
    assert metrics["test_ms"] >= sum(times) and min(times) > 0
    model = AutoModelForObjectDetection.from_pretrained(folder)
    assert (model.config.two_stage_type, model.config.roi_type) == (method.removesuffix("_rcnn"), "pool")
    assert DetectionImageProcessor.from_pretrained(folder).num_proposals == (200 if method == "fast_rcnn" else 0)
