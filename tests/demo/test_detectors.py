import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

from hf_dl.demo import detector_views as views
from hf_dl.demo import detectors
from hf_dl.demo.detectors import CANDIDATES, FOUND, LADDER, Counts, Detection, DetectionPicture, Regions, Selection
from hf_dl.models.detection_boxes import to_corners
from hf_dl.recipes.detection import METHODS, STAGES
from hf_dl.recipes.detection_report import box_color, draw_boxes

from .tiny import SHAPE_NAMES, save_detector

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a run of each method."""
    root = tmp_path_factory.mktemp("detectors")
    for name in METHODS:
        save_detector(root / "runs" / name, name)
    return root


@pytest.fixture(scope="module")
def ladder(root):
    return {name: detectors.load_detector(str(root / "runs" / name)) for name in METHODS}


@pytest.fixture(scope="module")
def detections(ladder, image):
    return {name: detectors.detect(detector, image) for name, detector in ladder.items()}


def make_selection(*rows):
    """Make found boxes from (box, score, label, row)."""
    boxes, scores, labels, numbers = zip(*rows, strict=True) if rows else ([], [], [], [])
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Selection(boxes, torch.tensor(scores), torch.tensor(labels).long(), torch.tensor(numbers).long(), 0.5)


class TestLadder:
    def test_every_method_has_a_step(self):
        assert set(LADDER) == set(METHODS) and set(views.STAGES) == {*STAGES, "other"}
        assert all(view.label and view.about.endswith(".") for step in LADDER.values() for view in step.views.values())

    @pytest.mark.parametrize("name", METHODS)
    def test_boxes_regions_and_times(self, ladder, detections, image, name):
        detector, found = ladder[name], detections[name]
        assert detector.step is LADDER[name] and list(found.regions) == list(detector.step.views)
        assert found.scores.shape == (len(found.boxes), 4) and 0 <= found.boxes.min() <= found.boxes.max() <= 1
        stages = {"other", "features", "classification"} | ({"proposals"} & found.regions.keys())
        assert set(found.milliseconds) == stages and min(found.milliseconds.values()) >= 0
        chosen = detectors.select(found, image.size, threshold=0.1, nms_threshold=0.5)
        plain = np.asarray(views.enlarge(image))
        for view in detector.views:
            drawn = views.draw_view(DetectionPicture(image), detector, found, chosen, view=view, threshold=0.1)
            assert drawn.size == (768, 480)
            if view not in (FOUND, CANDIDATES):
                assert (np.asarray(drawn) != plain).any()
                assert re.match(
                    r"[\d,]+ .*with an? \w+ above 0.10\. \w", views.explain_view(detector, found, view, 0.1)
                )

    @pytest.mark.parametrize("name", METHODS)
    def test_tiny_images_and_no_boxes(self, ladder, name):
        image = Image.new("RGB", (30, 1))
        found = detectors.detect(ladder[name], image)
        chosen = detectors.select(found, image.size, threshold=0.999, nms_threshold=0.5)
        for view in ladder[name].views:
            assert views.draw_view(DetectionPicture(image), ladder[name], found, chosen, view=view).size == (768, 26)

    def test_selected_boxes_are_the_ones_of_the_processor(self, ladder, detections, image):
        detector, found = ladder["anchor_free"], detections["anchor_free"]
        batch = detector.processor(images=[image], return_tensors="pt")
        with torch.no_grad():
            output = detector.model(**batch)
        detector.processor.nms_threshold, threshold = 0.3, float(found.scores.median())
        (expected,) = detector.processor.post_process_object_detection(output, threshold, [(40, 64)])
        chosen = detectors.select(found, image.size, threshold=threshold, nms_threshold=0.3)
        assert len(chosen.boxes) == len(expected["boxes"]) > 1
        assert torch.allclose(chosen.boxes, expected["boxes"], atol=1e-4)
        assert torch.equal(found.boxes[chosen.rows] * torch.tensor([64, 40, 64, 40]), chosen.boxes)
        assert torch.equal(found.scores[chosen.rows, chosen.labels], chosen.scores)

    def test_regions_are_what_the_network_saw(self, ladder, detections, image):
        assert len(detections["anchor_free"].regions["cells"].boxes) == 16  # 4 x 4 cells of 8 x 8 pixels
        cells = detections["yolo_v1"].regions["cells"]
        assert cells.grid and cells.boxes[5].tolist() == [0.25, 0.25, 0.5, 0.5] and cells.scores.shape == (16, 4)
        assert torch.equal(cells.scores[3], detections["yolo_v1"].scores[6:8].amax(0))  # two boxes per cell
        batch = ladder["fast_rcnn"].processor(images=[image], return_tensors="pt")
        proposals = detections["fast_rcnn"].regions["proposals"].boxes
        assert torch.equal(proposals, to_corners(batch["proposals"][0]))
        anchors = detections["faster_rcnn"].regions["anchors"]
        assert len(anchors.boxes) == 16 * 9 and len(anchors.shown) == 9 and anchors.scores.shape == (144, 1)
        assert len(detections["faster_rcnn"].regions["proposals"].boxes) == 20
        windows = detections["sliding_window"].regions["windows"]
        sizes = (windows.boxes[windows.shown, 2] - windows.boxes[windows.shown, 0]) * 32
        assert sizes.tolist() == pytest.approx([16, 31], abs=1)


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yolos")
    config = YolosConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=[32, 32],
        patch_size=16, num_detection_tokens=5, id2label={0: "a", 1: HOSTILE},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return detectors.load_detector(f" {folder} ")


class TestOtherLibraries:
    def test_a_detector_of_transformers(self, yolos, image):
        found = detectors.detect(yolos, image)
        assert yolos.step.title == "Yolos" and list(yolos.views) == [FOUND, CANDIDATES] and not found.regions
        assert found.scores.shape == (5, 2) and ((found.scores > 0).sum(1) == 1).all()
        assert list(found.milliseconds) == ["other"]
        text = detectors.describe(yolos)
        assert text.startswith("Yolos: ") and "2 classes" in text and "/" not in text

    def test_names_of_classes_are_text(self, yolos, image):
        found = Detection(torch.tensor([[0.1, 0.1, 0.5, 0.5]]), torch.tensor([[0.0, 0.9]]))
        chosen = detectors.select(found, image.size, threshold=0.5, nms_threshold=0.5)
        shown = views.show_detector(
            DetectionPicture(image), yolos, found, chosen, view="cells", threshold=0.5, truth=True, longest=1
        )
        assert HOSTILE not in shown and "&lt;img src=x" in shown and "1 box with a score above 0.50." in shown

    def test_other_models_get_a_sentence(self, resnet, tmp_path):
        with pytest.raises(ValueError, match="'norm_resnet', which is not an object detector. Choose an object detec"):
            detectors.load_detector(str(resnet))
        with pytest.raises(ValueError, match="was not found. Expected a folder"):
            detectors.load_detector(str(tmp_path / "nothing"))


def test_the_newest_run_of_each_method_is_found(root, tmp_path):
    assert detectors.find_runs(root) == {str(root / "runs" / name): LADDER[name].title for name in METHODS}
    assert detectors.find_runs(tmp_path) == {}


def test_a_new_threshold_does_not_run_the_network(ladder, image, monkeypatch):
    results, picture, calls = detectors.Results(), DetectionPicture(image), []
    detect = detectors.detect
    monkeypatch.setattr(detectors, "detect", lambda *args: calls.append(args) or detect(*args))
    first = results.get(ladder["anchor_free"], picture)
    assert results.get(ladder["anchor_free"], picture) is first and len(calls) == 1
    assert results.get(ladder["yolo_v1"], picture) is not first and len(calls) == 2


class TestTruth:
    truth = ([0, 0, 10, 10], [20, 0, 30, 10], [40, 20, 50, 30])

    def test_each_object_is_found_once(self):
        boxes = (
            ([20, 0, 30, 10], 0.9, 1, 0),
            ([0, 1, 10, 10], 0.8, 0, 1),
            ([0, 0, 10, 10], 0.7, 0, 2),  # the object is already found
            ([40, 20, 50, 30], 0.6, 2, 3),  # the wrong class
            ([20, 0, 30, 10], 0.5, 0, 4),
        )
        counts = detectors.count(make_selection(*boxes), self.truth, [0, 1, 3])
        assert counts == Counts([True, True, False, False, False], [2])
        assert detectors.count(make_selection(), self.truth, [0, 1, 3]) == Counts([], [0, 1, 2])

    def test_names_of_classes_differ_between_models(self):
        names = (("cube", "red cube", "metal cube"), ("cone", "blue cone", "rubber cone"))
        picture = DetectionPicture(Image.new("RGB", (60, 40)), self.truth[:2], names)
        assert picture.find_truth(["sphere", "cone", "cube"]) == [2, 1]
        assert picture.find_truth(["metal cube", "rubber cone"]) == [0, 1]
        assert picture.find_truth(["cat", "cube"]) is None
        assert DetectionPicture(picture.image).find_truth(["cube"]) is None

    def test_scenes_have_true_boxes(self):
        drawn = detectors.draw_scenes(3, count=2)
        assert detectors.draw_scenes(3, count=2) is drawn and drawn[0].image.size == (192, 192)
        for each in drawn:
            assert 2 <= len(each.boxes) == len(each.names) <= 6
            assert len(each.find_truth(SHAPE_NAMES)) == len(each.boxes)

    def test_the_counts_are_said(self, ladder):
        names = (("sphere",), ("cube",), ("cone",))
        picture, detector = DetectionPicture(Image.new("RGB", (60, 40)), self.truth, names), ladder["anchor_free"]
        chosen = make_selection(([20, 0, 30, 10], 0.9, 1, 0), ([0, 20, 9, 30], 0.8, 0, 1))
        assert views.summarize(picture, detector, chosen, 0.4) == [
            "2 boxes with a score above 0.40.", "1 of 3 objects found, 2 missed, 1 false box.",
        ]  # fmt: skip
        assert views.summarize(picture, detector, make_selection(), 0.4) == [
            "No object found: no box has a score above 0.40.", "0 of 3 objects found, 3 missed, 0 false boxes.",
        ]  # fmt: skip
        many = make_selection(*[([0, 0, 9, 9], 0.9, 1, 0)] * 100)
        assert views.summarize(DetectionPicture(picture.image), detector, many, 0.4) == [
            "The 100 best boxes with a score above 0.40."
        ]
        other = DetectionPicture(picture.image, self.truth[:1], (("cat",),))
        assert views.summarize(other, detector, chosen, 0.4)[1] == "The model has other classes than the scene."

    def test_true_boxes_are_white_and_false_boxes_are_marked(self, ladder):
        picture = DetectionPicture(Image.new("RGB", (96, 96)), ([24, 24, 72, 72],), (("cube",),))
        chosen = make_selection(([24, 48, 72, 72], 0.9, 1, 0))
        found = Detection(chosen.boxes / 96, torch.zeros(1, 4))
        counts = detectors.count(chosen, picture.boxes, [1])
        drawn = np.asarray(views.draw_view(picture, ladder["anchor_free"], found, chosen, counts=counts))
        without = np.asarray(views.draw_view(picture, ladder["anchor_free"], found, chosen))
        assert (drawn[190:194, 400] == 255).any() and not without[190:194].any()
        assert tuple(drawn[575, 400]) == box_color(1)


def test_responsible_cells_are_outlined(image):
    chosen = make_selection(([32, 0, 64, 20], 0.9, 2, 3))
    grid = torch.tensor([[0, 0, 0.5, 1], [0.5, 0, 1, 1]])
    regions = Regions(grid, torch.tensor([[0, 0, 0.2, 0], [0, 0, 0.9, 0]]), torch.zeros(0, dtype=torch.long), True)
    found = Detection(torch.zeros(4, 4), torch.zeros(4, 4))  # two boxes per cell
    drawn = np.asarray(views.draw_regions(image, regions, found, chosen, threshold=0.5))
    white = (drawn[200:300] == 255).all(-1).all(0)  # columns that are white over many rows
    assert white[384:390].any() and white[-3:].any() and not white[:380].any()


def test_times_share_one_scale():
    shown = views.show_times({"features": 6.0, "nms": 1.0, "other": 1.0}, longest=16.0)
    assert "Time of this run: 8.0 ms" in shown and "width: 50.0%" in shown
    assert shown.index("features 6.0 ms") < shown.index("NMS 1.0 ms") < shown.index("other, such as resizing 1.0 ms")


def test_only_some_scores_are_listed(ladder):
    chosen = make_selection(*[([0, 0, 9, 9], 0.9, 1, 0)] * 8)
    shown = views.show_scores(ladder["anchor_free"], chosen)
    assert shown.count("class='row") == 6 and "and 2 more" in shown
    assert views.show_scores(ladder["anchor_free"], make_selection()) == ""


def test_texts_of_close_boxes_do_not_cover_each_other():
    boxes = [[10, 40, 50, 90], [11, 41, 51, 90], [12, 42, 52, 90]]
    drawn = draw_boxes(Image.new("RGB", (100, 100)), boxes, [0, 1, 2], names=["cube", "cone", "ball"], text_size=20)
    for label in range(3):  # the text has a background in the color of its class
        filled = (drawn == box_color(label)).all(-1).sum(1)
        assert (filled > 15).sum() >= 15
