"""Object detectors on a page: run each one once per image, then select boxes at any threshold, without the layout.

`LADDER` lists the methods of the page, each with the regions that it looks at. detector_views.py draws them.
"""

import functools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING as KNOWN
from transformers import AutoModelForObjectDetection

from ..data import scenes
from ..metrics.detection import COCO_AREAS, flatten_boxes, match_boxes
from ..models.detection_backbone import STRIDE
from ..models.detection_boxes import to_corners
from ..models.detection_processor import DetectionImageProcessor, select_boxes
from ..models.selective_search import selective_search
from ..recipes.detection import METHODS, Method, StageTimer, method_of
from .checkpoints import load_vision_model, newest_run, shown_name
from .uploads import open_image

SCENE_SIDE = 192  # pixels of generated scenes
MAX_BOXES = 100  # found boxes on the page
MATCH = 0.5  # smallest IoU of a box and the true box that it finds
FOUND, CANDIDATES = "found", "candidates"  # the views of every detector


class View(NamedTuple):
    """Regions that a method looks at: their label on the page, and one or two sentences about them."""

    label: str
    about: str


@dataclass(frozen=True)
class Step:
    """A method on the page: its name for readers, and its views by key."""

    title: str
    views: Mapping[str, View]


SEARCHED = "Selective search proposes them from the colors of the image. In color: the best ones on an object."
LADDER: dict[str, Step] = {
    "sliding_window": Step(
        "Sliding window",
        {"windows": View("Windows", "White: one window per size. In color: the best windows on an object.")},
    ),
    "rcnn": Step("R-CNN", {"proposals": View("Region proposals", SEARCHED)}),
    "fast_rcnn": Step("Fast R-CNN", {"proposals": View("Region proposals", SEARCHED)}),
    "faster_rcnn": Step(
        "Faster R-CNN",
        {
            "proposals": View("Region proposals", "A network moved them to objects. In color: the best ones."),
            "anchors": View("Anchors", "White: the anchors of one cell. In color: the best ones, before they move."),
        },
    ),
    "yolo_v1": Step(
        "YOLO v1",
        {"cells": View("Grid cells", "The color is the class. Outlined cells are responsible for the found boxes.")},
    ),
    "anchor_free": Step(
        "Anchor-free",
        {"cells": View("Grid cells", "The color is the class. Outlined cells predicted the found boxes.")},
    ),
}
KINDS = list(dict.fromkeys(method.config.model_type for method in METHODS.values()))


@dataclass(frozen=True, eq=False)
class DetectionPicture:
    """An image on the page.

    Attributes:
        image: The image.
        boxes: True boxes of a generated scene, x0, y0, x1, y1 in pixels.
        names: For each true box, the names that its class has in different models.
    """

    image: Image.Image
    boxes: tuple[tuple[float, ...], ...] = ()
    names: tuple[tuple[str, ...], ...] = ()

    def find_truth(self, classes: Sequence[str]) -> list[int] | None:
        """Return the class of each true box, or None if a class is unknown or the image is no scene.

        Args:
            classes: Names of the classes of a model.
        """
        found = [next((classes.index(name) for name in names if name in classes), None) for names in self.names]
        return None if None in found else found or None


@dataclass(frozen=True, eq=False)
class Detector:
    """An object detector with its image processor.

    Attributes:
        model: The model, in evaluation mode.
        processor: Its image processor.
        name: The folder or Hub id that it was loaded from.
    """

    model: Any
    processor: Any
    name: str

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        known = self.model.config.id2label
        return [str(known[number]) for number in range(self.model.config.num_labels)]

    @property
    def method(self) -> Method | None:
        """Its method, or None for a detector of another library."""
        return method_of(self.model)

    @property
    def step(self) -> Step:
        """Its title and its views on the page."""
        for name, method in METHODS.items():
            if method is self.method:
                return LADDER[name]
        return Step(type(self.model).__name__.removesuffix("ForObjectDetection"), {})

    @property
    def views(self) -> dict[str, str]:
        """Views of the page, as key and label."""
        more = {key: view.label for key, view in self.step.views.items()}
        return {FOUND: "Found boxes", CANDIDATES: "Boxes before NMS", **more}


@dataclass(frozen=True)
class Regions:
    """Regions that a detector looks at.

    Attributes:
        boxes: x0, y0, x1, y1 in [0, 1] of the image, (n, 4).
        scores: Highest score of each class in each region, or one score per region, (n, classes) or (n, 1).
        shown: Rows to draw without color, even if their scores are low.
        grid: Whether the regions are the cells of a grid.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    shown: torch.Tensor
    grid: bool = False


@dataclass(frozen=True)
class Detection:
    """All boxes of a detector for one image, before threshold and non-maximum suppression.

    Attributes:
        boxes: x0, y0, x1, y1 in [0, 1] of the image, (n, 4).
        scores: (n, classes).
        regions: Regions by view.
        milliseconds: Time per stage: some of `hf_dl.recipes.detection.STAGES`, and "other".
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    regions: dict[str, Regions] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)


class Selection(NamedTuple):
    """The boxes that remain, by descending score.

    Attributes:
        boxes: x0, y0, x1, y1 in pixels of the image, (n, 4).
        scores: (n,).
        labels: (n,).
        rows: Row of each box in `Detection`, (n,).
        milliseconds: Time of threshold and non-maximum suppression.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    milliseconds: float


class Counts(NamedTuple):
    """Found boxes compared with true boxes.

    Attributes:
        hits: Whether each found box is the first one on an object of its class.
        missed: Rows of the true boxes without a found box.
    """

    hits: list[bool]
    missed: list[int]


@functools.lru_cache(maxsize=16)
def draw_scenes(seed: int, count: int = 8) -> tuple[DetectionPicture, ...]:
    """Draw scenes with two to six objects, like the training images of the small default detectors.

    Args:
        seed: Seed of the scenes.
        count: Number of scenes.
    """
    rows = scenes.load("test", num_scenes=count, size=SCENE_SIDE, num_objects=(2, 6), seed=seed, streaming=True)
    return tuple(
        DetectionPicture(
            row["image"],
            tuple(tuple(map(float, each["box"])) for each in row["objects"]),
            tuple(
                (each["shape"], f"{each['color']} {each['shape']}", f"{each['material']} {each['shape']}")
                for each in row["objects"]
            ),
        )
        for row in rows
    )


def open_picture(file: str) -> DetectionPicture:
    """Open an uploaded image; see `open_image`."""
    return DetectionPicture(open_image(file))


def load_detector(name: str) -> Detector:
    """Load an object detector for evaluation, on the GPU if one is available.

    Args:
        name: A folder or a Hub id. Surrounding spaces are ignored.

    Raises:
        ValueError: If the model is missing, damaged, or not an object detector.
    """
    name = name.strip()
    return Detector(*load_vision_model(name, AutoModelForObjectDetection, KNOWN, kind="object detector"), name)


def check(detector: Detector) -> None:
    """Raise an error if a model does not fit the page."""
    select(detect(detector, Image.new("RGB", (64, 64), "gray")), (64, 64), threshold=0.5, nms_threshold=0.5)


def find_runs(root: Path) -> dict[str, str]:
    """Return the folder of the newest finished run of each method, and the title of the method.

    Args:
        root: Folder that contains runs/.
    """
    found = {}
    for name, method in METHODS.items():
        if folder := newest_run(root, [method.config.model_type], method.fields):
            found[folder] = LADDER[name].title
    return found


def describe(detector: Detector) -> str:
    """Describe a detector in one line."""
    facts = f"{len(detector.classes)} classes", f"{detector.model.num_parameters():,} parameters"
    return " · ".join([f"{detector.step.title}: {shown_name(detector.name)}", *facts])


@torch.no_grad()
def detect(detector: Detector, image: Image.Image) -> Detection:
    """Run a detector on an image.

    Args:
        detector: The detector.
        image: An RGB image of any size.
    """
    model, processor, method = detector.model, detector.processor, detector.method
    timer, proposed = StageTimer(model, method.stages if method else {}), []
    network = getattr(model, "rpn", None) if method else None
    handle = network.register_forward_hook(lambda module, inputs, output: proposed.append(output)) if network else None
    try:
        with timer.measure("total"):
            given = {}
            if getattr(processor, "num_proposals", 0):
                with timer.measure("proposals"):
                    given["proposals"] = [selective_search(image)]
            batch = processor(images=[image], return_tensors="pt", **given).to(model.device)
            output = model(**batch)
            if isinstance(processor, DetectionImageProcessor):
                boxes, scores = (
                    to_corners(output.pred_boxes[0].float()).clamp(0, 1),
                    output.logits[0].float().sigmoid(),
                )
            else:
                boxes, scores = _read_boxes(detector, output, image)
    finally:
        timer.close()
        if handle is not None:
            handle.remove()
    boxes, scores = boxes.cpu(), scores.cpu()
    regions = find_regions(detector, batch, proposed, scores) if method else {}
    times = {stage: 1000 * value for stage, value in timer.seconds.items()}
    total = times.pop("total")
    times["other"] = max(total - sum(times.values()), 0.0)
    return Detection(boxes, scores, regions, times)


def _read_boxes(detector: Detector, output: Any, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the boxes in [0, 1] and the scores of a detector of another library, one class per box."""
    sides = torch.tensor([image.width, image.height] * 2)
    (found,) = detector.processor.post_process_object_detection(
        output, threshold=0.0, target_sizes=[(image.height, image.width)]
    )
    boxes, values, labels = (found[key].float().cpu() for key in ("boxes", "scores", "labels"))
    scores = torch.zeros(len(boxes), detector.model.config.num_labels)
    scores[torch.arange(len(boxes)), labels.long()] = values
    return (boxes / sides).clamp(0, 1), scores


def find_regions(
    detector: Detector, batch: Mapping[str, torch.Tensor], proposed: Sequence[Any], scores: torch.Tensor
) -> dict[str, Regions]:
    """Return the regions that a detector of the ladder has looked at, by view.

    Args:
        detector: The detector.
        batch: Its input.
        proposed: Outputs of its region proposal network, or empty.
        scores: Its scores, (n, classes). n is a multiple of the number of regions.
    """
    model, views = detector.model, detector.step.views
    height, width = batch["pixel_values"].shape[-2:]
    sides = torch.tensor([width, height] * 2)
    found = {}
    if "cells" in views:
        size = getattr(model.head, "size", None)
        rows, columns = (size, size) if size else (height // STRIDE, width // STRIDE)
        found["cells"] = _make_regions(_make_grid(rows, columns), scores, grid=True)
    if "windows" in views:
        levels = [windows for _, windows in model.pyramid(height, width)]
        starts = np.cumsum([0, *map(len, levels)])
        middle = [start + _middle(level) for start, level in zip(starts, levels, strict=False)]
        found["windows"] = _make_regions(torch.cat(levels) / sides, scores, middle)
    if "proposals" in views:
        boxes = proposed[0][0][0].cpu() / sides if proposed else to_corners(batch["proposals"][0].cpu())
        found["proposals"] = _make_regions(boxes, scores, range(len(boxes)))
    if "anchors" in views:
        objectness, _, anchors = (each.cpu() for each in proposed[0][2])
        per_cell = len(model.rpn.sizes) * len(model.rpn.ratios)
        first = _middle(anchors) // per_cell * per_cell
        shown = torch.arange(first, first + per_cell)
        found["anchors"] = Regions(anchors / sides, objectness[0].float().sigmoid()[:, None], shown)
    return found


def _make_regions(
    boxes: torch.Tensor, scores: torch.Tensor, shown: Sequence[int] = (), *, grid: bool = False
) -> Regions:
    """Return regions with the best scores of the boxes that each region has predicted."""
    best = scores.reshape(len(boxes), -1, scores.shape[1]).amax(1)
    return Regions(boxes, best, torch.tensor(list(shown), dtype=torch.long), grid)


def _make_grid(rows: int, columns: int) -> torch.Tensor:
    """Return the cells of a grid over an image, row by row."""
    y, x = (part.flatten() for part in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    return torch.stack([x / columns, y / rows, (x + 1) / columns, (y + 1) / rows], dim=1)


def _middle(boxes: torch.Tensor) -> int:
    """Return the row of the box that is closest to the middle of all boxes."""
    centers = boxes[:, :2] + boxes[:, 2:]
    return int((centers - (centers.amin(0) + centers.amax(0)) / 2).square().sum(1).argmin())


def select(found: Detection, size: tuple[int, int], *, threshold: float, nms_threshold: float) -> Selection:
    """Select boxes by their scores, and remove duplicates. This does not run the network.

    Args:
        found: All boxes of the image.
        size: Width and height of the image.
        threshold: Boxes with this score or less are removed.
        nms_threshold: IoU above which the box with the lower score is removed, for boxes of the same class.
    """
    begin = time.process_time()  # as the other stages
    kept = select_boxes(found.boxes, found.scores, threshold, nms_threshold=nms_threshold, max_detections=MAX_BOXES)
    milliseconds = 1000 * (time.process_time() - begin)
    same = (found.boxes == kept["boxes"][:, None]).all(-1) & (
        found.scores[:, kept["labels"]].T == kept["scores"][:, None]
    )
    rows = same.int().argmax(1) if len(same) else torch.zeros(0, dtype=torch.long)
    boxes = kept["boxes"] * torch.tensor([*size, *size])
    return Selection(boxes, kept["scores"], kept["labels"], rows, milliseconds)


def count(chosen: Selection, boxes: Sequence[Sequence[float]], labels: Sequence[int]) -> Counts:
    """Compare found boxes with the true boxes of a scene, as COCO does at an IoU of 0.5.

    Args:
        chosen: The found boxes.
        boxes: True boxes, x0, y0, x1, y1 in pixels.
        labels: Their classes.
    """
    detected = {"boxes": chosen.boxes, "scores": chosen.scores, "labels": chosen.labels}
    flat = flatten_boxes([detected], [{"boxes": list(boxes), "labels": list(labels)}])
    matched = match_boxes(flat, np.array([MATCH]), [COCO_AREAS["all"]])[0][:, 0, 0]
    hits = np.zeros(len(matched), bool)
    hits[np.lexsort((-chosen.scores.numpy(), chosen.labels.numpy()))] = matched >= 0  # the order of `flat`
    return Counts(hits.tolist(), sorted(set(range(len(boxes))) - set(matched.tolist())))


class Results:
    """The last results of the page, so that a new threshold needs no model call.

    Args:
        size: Number of pairs of an image and a detector to keep.
    """

    def __init__(self, size: int = 16):
        self._lock = threading.Lock()
        self._compute = functools.lru_cache(maxsize=size)(self._compute)

    def get(self, detector: Detector, picture: DetectionPicture) -> Detection:
        """Return all boxes of a detector for a picture."""
        with self._lock:
            return self._compute(detector, picture)

    def _compute(self, detector: Detector, picture: DetectionPicture) -> Detection:
        return detect(detector, picture.image)
