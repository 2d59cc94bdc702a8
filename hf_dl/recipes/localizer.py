"""Localization of a fixed number of objects by regression: flags, data, model, scores and report.

The training loop is in scripts/train_localizer.py.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hf_dl.data import detection
from hf_dl.data.detection_files import is_coco_without_test
from hf_dl.metrics.detection import localization_error
from hf_dl.models.detection_boxes import pairwise_iou, to_corners
from hf_dl.models.detection_output import NO_CLASS
from hf_dl.models.detection_processor import DetectionImageProcessor
from hf_dl.models.localizer import (
    LocalizerConfig,
    LocalizerForKeypointDetection,
    LocalizerForObjectDetection,
    LocalizerPreTrainedModel,
    assign_outputs,
)
from hf_dl.reporting.card import run_card
from hf_dl.reporting.plots import plot_run

from .box_images import BoxImages, normalize
from .detection import AnnotationFlags, StageTimer, check_objects
from .evaluation import checked_config, hide_progress_bars, report_data, split_size

SUMMARY = (
    "A localizer outputs the classes and places of a fixed number of objects by regression. It finds no more objects "
    "than it has outputs."
)
TAGS = ("object-detection", "localization")
TARGETS = {"box": LocalizerForObjectDetection, "point": LocalizerForKeypointDetection}
NUM_IMAGES = {"train": 5000, "validation": 200, "test": 500}  # of generated scenes
NEAR = 0.05  # a point is right if it is closer to the truth than this share of the diagonal of the image


@dataclass
class LocalizerFlags(AnnotationFlags):
    """Flags of the data and the network."""

    source: str = field(
        default="synthetic", metadata={"help": "synthetic, a Hub id, or a folder: PASCAL VOC, COCO or tables."}
    )
    classes: Literal["shape", "shape_color", "shape_material"] = field(
        default="shape", metadata={"help": "Classes of generated scenes."}
    )
    style: Literal["plain", "textured"] = field(default="plain", metadata={"help": "Style of generated scenes."})
    image_size: int = field(default=128, metadata={"help": "Height and width of the images, a multiple of 32."})
    num_objects: int = field(
        default=1, metadata={"help": "K, the number of outputs. Generated scenes have exactly K objects."}
    )
    num_train: int = field(
        default=0, metadata={"help": "Number of training images; 0: all images, or 5000 generated scenes."}
    )
    num_test: int | None = field(
        default=None, metadata={"help": "Largest number of validation images, and of test images."}
    )
    target: Literal["box", "point"] = field(
        default="box", metadata={"help": "What the network outputs: boxes, or points at the centers of objects."}
    )
    per_class: bool = field(default=False, metadata={"help": "Whether each class has its own box or point."})
    head_input: Literal["map", "pool"] = field(
        default="map", metadata={"help": "Input of the box layers: the last feature map, or its mean."}
    )
    place_loss: Literal["l2", "smooth_l1"] = field(
        default="smooth_l1", metadata={"help": "Loss of boxes and points: squared errors, or smooth L1."}
    )
    backbone: str = field(
        default="small", metadata={"help": "small, one of our classifiers such as norm_resnet, or timm/NAME."}
    )


def load_images(flags: LocalizerFlags, split: str) -> tuple[BoxImages, list[str]]:
    """Load one split. The test images of a folder of COCO without test annotations are its validation images.

    Args:
        flags: Selects the source, the size and the number of images.
        split: "train", "validation" or "test".

    Returns:
        The images with boxes, and the names of the classes.

    Raises:
        ValueError: If an object is missing, see `check_objects`, or the data is invalid.
    """
    hide_progress_bars()
    synthetic = flags.source == "synthetic"
    count = split_size(flags, split, NUM_IMAGES[split] if synthetic else None)
    if synthetic and split == "train" and count is None:
        count = NUM_IMAGES[split]
    scenes = {"classes": flags.classes, "style": flags.style, "num_objects": (flags.num_objects,) * 2}
    options = scenes | {"size": flags.image_size} if synthetic else {}
    loaded = "validation" if split == "test" and is_coco_without_test(flags.source) else split
    data = detection.load(
        loaded, flags.source, num_images=count or None, boxes=flags.border, corrupt=flags.corrupt, **options
    )
    if not synthetic:  # generated scenes have objects
        report_data(data, split)
        check_objects(data, split, source=flags.source, monitor=getattr(flags, "monitor", ""))
    return BoxImages(data, (flags.image_size, flags.image_size)), detection.class_names(data)


def make_model(flags: LocalizerFlags, names: list[str]) -> tuple[LocalizerPreTrainedModel, DetectionImageProcessor]:
    """Create the model and its image processor.

    Args:
        flags: `LocalizerFlags`.
        names: Names of the classes.

    Raises:
        ValueError: If a flag is invalid.
    """
    same = ("num_objects", "per_class", "head_input", "place_loss", "backbone", "image_size")
    fields = {name: getattr(flags, name) for name in same}
    config = checked_config(LocalizerConfig, **fields, id2label=dict(enumerate(names)))
    processor = DetectionImageProcessor(size={"height": flags.image_size, "width": flags.image_size})
    return TARGETS[flags.target](config), processor


@torch.no_grad()
def evaluate(
    model: LocalizerPreTrainedModel, processor: DetectionImageProcessor, data: BoxImages, *, batch_size: int = 64
) -> dict[str, float]:
    """Score the outputs against the objects that they stand for, from left to right.

    Args:
        model: The model.
        processor: Its image processor.
        data: The images.
        batch_size: Images per forward pass.

    Returns:
        `class_accuracy`, `localization_accuracy` (class and place are right), and `ms`, milliseconds per image of the
        network. For boxes `mean_iou`, `box_accuracy` (IoU of at least 0.5) and ImageNet's `localization_error` with 5
        guesses. For points `point_error`, the mean distance in pixels, and `point_accuracy`, the share within 5 % of
        the diagonal of the image. Shares of objects. Images with fewer objects than outputs count with the objects
        that they have. Scores that no object defines are left out.
    """
    training = model.training
    model.eval()
    kept, device, timer = model.config.num_objects, model.device, StageTimer(model, {})
    guesses, truths = [], []
    named, place_right, both, distance = [], [], [], []
    sides = torch.tensor(data.pixels.shape[:1:-1], dtype=torch.float32)  # width, height
    for start in range(0, len(data), batch_size):
        batch = data.__getitems__(range(start, min(start + batch_size, len(data))))
        pixels = normalize(batch["image"], processor, device)
        with timer.measure("network"):
            output = model(pixels)
        classes, boxes = assign_outputs(batch["labels"][..., 0].long(), batch["labels"][..., 1:], kept)
        logits = output.logits.float().cpu().unflatten(1, (kept, -1))
        found = logits.amax(2).argmax(-1)  # (images, K); with `per_class`, the place of the best class
        places = (output.pred_boxes if model.numbers == 4 else output.keypoints).float().cpu().unflatten(1, (kept, -1))
        own = found if model.config.per_class else torch.zeros_like(found)
        places = places.take_along_dim(own[..., None, None], dim=2)[:, :, 0]
        valid = classes != NO_CLASS
        right = (found == classes)[valid]
        named.append(right)
        if model.numbers == 2:
            error = ((places - boxes[..., :2]) * sides).norm(dim=-1)[valid]
            distance.append(error)
            place_right.append(error <= NEAR * sides.norm())
            both.append(right & place_right[-1])
            continue
        pairs = zip(to_corners(places[valid]), to_corners(boxes[valid]), strict=True)
        iou = torch.tensor([float(pairwise_iou(a[None], b[None])) for a, b in pairs])
        distance.append(iou)
        place_right.append(iou >= 0.5)
        both.append(right & place_right[-1])
        for row, kinds, truth in zip(output_rows(processor, output), classes, to_corners(boxes), strict=True):
            guesses.append(row)
            objects = kinds != NO_CLASS
            truths.append({"boxes": truth[objects].numpy(), "labels": kinds[objects].numpy()})
    model.train(training)
    scores = {"class_accuracy": _share(named), "localization_accuracy": _share(both)}
    scores["ms"] = 1000 * timer.seconds["network"] / len(data)
    if model.numbers == 2:
        scores |= {"point_error": _share(distance), "point_accuracy": _share(place_right)}
    else:
        scores |= {"mean_iou": _share(distance), "box_accuracy": _share(place_right)}
        scores["localization_error"] = localization_error(guesses, truths)["localization_error"]
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def output_rows(processor: DetectionImageProcessor, output: Any) -> list[dict[str, Any]]:
    """Return the boxes of an output as arrays, in [0, 1] of the image."""
    found = processor.post_process_object_detection(output, threshold=0.001)
    return [{name: value.cpu().numpy() for name, value in row.items()} for row in found]


def _share(parts: list[torch.Tensor]) -> float:
    return float(torch.cat(parts).float().mean())  # without objects, it is not a number


def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder."""
    curves = {"training loss": {"classes": "classification", "places": "place"}}
    curves["accuracy"] = {
        "classes": "val_class_accuracy",
        "places": "val_box_accuracy",
        "points": "val_point_accuracy",
    }
    plot_run(folder, folder / "curves.png", curves)
    run_card(folder, summary=SUMMARY, tags=TAGS).save(folder / "README.md")
    print(f"checkpoint  {folder}  (from_pretrained)")
    print(f"report      {folder / 'README.md'}")
