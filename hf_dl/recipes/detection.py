"""Object detection: the flags, data, models and evaluation that the scripts and the Space share.

scripts/train_detector.py trains one of `METHODS`, and scripts/evaluate_detector.py scores a saved model. To add a
detector, write its config and model in hf_dl/models, add one entry to `METHODS`, and list its loss terms in
scripts/train_detector.py. hf_dl/recipes/detection_report.py has the pictures and the model card.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_dl.data import detection
from hf_dl.data.detection_augmentation import BoxAugmentation
from hf_dl.data.detection_files import is_coco_without_test
from hf_dl.metrics.detection import coco_scores, voc_scores
from hf_dl.metrics.detection_errors import ERRORS, detection_errors
from hf_dl.models.dense_detector import DenseDetectorConfig, DenseDetectorForObjectDetection
from hf_dl.models.detection_backbone import (
    STRIDE,
    DetectionConfig,
    load_classifier_weights,
    load_published_weights,
)
from hf_dl.models.detection_processor import DetectionImageProcessor
from hf_dl.models.image_input import to_rgb
from hf_dl.models.rcnn import RcnnConfig, RcnnForObjectDetection
from hf_dl.models.sliding_window import SlidingWindowConfig, SlidingWindowForObjectDetection
from hf_dl.models.two_stage_detector import TwoStageDetectorConfig, TwoStageDetectorForObjectDetection

from .evaluation import checked_config, hide_progress_bars, report_data, split_size
from .proposals import add_proposals, choose_anchor_sizes, time_proposals
from .trained_backbone import load_backbone

BATCH_IMAGES = 32  # images per batch during evaluation
CACHED_PIXELS = 200_000_000  # of decoded images in memory per dataset; 4 bytes each
STAGES = ("proposals", "features", "classification", "nms")  # of a detector, whose times are reported
NUM_SCENES = {"train": 5000, "validation": 300, "test": 500}  # default numbers of generated scenes


@dataclass(frozen=True)
class Method:
    """One detector.

    Attributes:
        config: Config class. A `DetectionConfig` has the shared backbone, other classes have their own network.
        model: Model class. `forward` takes `pixel_values` and `labels`, and returns a `DetectionOutput`.
        summary: First sentence of the model card.
        fields: Fixed fields of the config.
        flags: Flags of the training script that set a config field of the same name.
        learning_rate: Peak learning rate, if the flag is not given.
        batch_size: Images per step, if the flag is not given.
        nms_threshold: IoU above which the box with the lower score is removed.
        score_threshold: Lowest score of the boxes for average precision.
        stages: Module of the model per stage whose time is reported, for keys of `STAGES`.
        num_proposals: Boxes of selective search per image. They are computed once and cached with the images.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    summary: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    learning_rate: float = 1e-3
    batch_size: int = 32
    nms_threshold: float = 0.5
    score_threshold: float = 0.01
    stages: Mapping[str, str] = field(default_factory=lambda: {"features": "backbone", "classification": "head"})
    num_proposals: int = 0


METHODS: dict[str, Method] = {
    "anchor_free": Method(
        DenseDetectorConfig,
        DenseDetectorForObjectDetection,
        "An object detector without anchors: each cell of a feature map predicts classes and one box (after FCOS, "
        "Tian et al. 2019).",
        fields={"head_type": "anchor_free"},
        learning_rate=3e-3,
        nms_threshold=0.6,
    ),
    "yolo_v1": Method(
        DenseDetectorConfig,
        DenseDetectorForObjectDetection,
        "An object detector: YOLO v1 (Redmon et al. 2016), a grid of cells with a few boxes each.",
        fields={"head_type": "yolo_v1"},
        flags=("grid_size", "boxes_per_cell", "yolo_head"),
        score_threshold=0.001,
    ),
    "fast_rcnn": Method(
        TwoStageDetectorConfig,
        TwoStageDetectorForObjectDetection,
        "An object detector: Fast R-CNN (Girshick 2015), which classifies the boxes of selective search on a shared "
        "feature map.",
        fields={"two_stage_type": "fast"},
        flags=("roi_type",),
        learning_rate=3e-3,
        batch_size=16,
        num_proposals=200,
    ),
    "faster_rcnn": Method(
        TwoStageDetectorConfig,
        TwoStageDetectorForObjectDetection,
        "An object detector: Faster R-CNN (Ren et al. 2015), which classifies the boxes of a region proposal network.",
        fields={"two_stage_type": "faster"},
        flags=("roi_type", "anchor_sizes"),
        learning_rate=3e-3,
        batch_size=16,
        stages={"features": "backbone", "proposals": "rpn", "classification": "head"},
    ),
    "rcnn": Method(
        RcnnConfig,
        RcnnForObjectDetection,
        "An object detector: R-CNN (Girshick et al. 2014), which classifies each box of selective search as an image "
        "of its own.",
        nms_threshold=0.3,
        stages={"features": "backbone", "classification": "hidden"},
        num_proposals=200,
    ),
    "sliding_window": Method(
        SlidingWindowConfig,
        SlidingWindowForObjectDetection,
        "An object detector: a classifier of small windows with a box regressor, computed for all windows of an image "
        "at several scales (after OverFeat, Sermanet et al. 2013).",
        learning_rate=2e-3,
        nms_threshold=0.3,
        stages={"features": "features", "classification": "hidden"},
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@dataclass
class AnnotationFlags:
    """Flags for boxes and images that do not fit, of all scripts that read boxes."""

    border: Literal["clip", "drop", "refuse"] = field(
        default="clip", metadata={"help": "Boxes across the border: cut them, drop them, or stop with an error."}
    )
    corrupt: Literal["refuse", "skip"] = field(
        default="refuse", metadata={"help": "Damaged image files: refuse stops with an error, skip leaves them out."}
    )


@dataclass
class DetectionFlags(AnnotationFlags):
    """Flags that select the images, for training and for evaluation."""

    source: str = field(
        default="synthetic",
        metadata={
            "help": "synthetic (generated, no download), a folder of PASCAL VOC or COCO, saved tables, or a Hub "
            "dataset id."
        },
    )
    classes: Literal["shape", "shape_color", "shape_material"] = field(
        default="shape", metadata={"help": "source=synthetic: classes of the objects."}
    )
    style: Literal["plain", "textured"] = field(
        default="plain", metadata={"help": "source=synthetic: look of the scenes."}
    )
    num_objects: list[int] = field(
        default_factory=lambda: [1, 6], metadata={"help": "source=synthetic: fewest and most objects per scene."}
    )
    num_train: int = field(
        default=0, metadata={"help": "Number of training images. 0 uses all images, 5000 for source=synthetic."}
    )
    num_test: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of validation images, and of test images. 0 uses all images. Defaults to all, and "
            "to at most half of num_train."
        },
    )
    holdout: float = field(
        default=0.1, metadata={"help": "Fraction of the training images that replaces a missing split."}
    )


@dataclass
class ModelFlags:
    """Flags that select the detector. A flag without a value uses the default of the model's config."""

    method: str = field(
        default="anchor_free",
        metadata={
            "help": "Detector: anchor_free, yolo_v1, fast_rcnn, faster_rcnn, rcnn or sliding_window. fit_rcnn.py "
            "completes rcnn."
        },
    )
    backbone: str = field(
        default="small",
        metadata={
            "help": "small, one of our classifiers such as norm_resnet, the folder of a trained classifier of ours, "
            "or timm/NAME."
        },
    )
    pretrained: bool = field(
        default=False, metadata={"help": "backbone=timm/NAME: start from the published weights (a download)."}
    )
    image_size: list[int] = field(
        default_factory=lambda: [128],
        metadata={"help": "Height and width of the input in pixels, or one number. Multiples of 8."},
    )
    grid_size: int | None = field(default=None, metadata={"help": "yolo_v1: rows and columns of cells."})
    boxes_per_cell: int | None = field(default=None, metadata={"help": "yolo_v1: boxes per cell."})
    yolo_head: str | None = field(
        default=None, metadata={"help": "yolo_v1: convolution, or fully_connected as in the paper."}
    )
    roi_type: str | None = field(
        default=None, metadata={"help": "fast_rcnn, faster_rcnn: align, or pool as in the papers."}
    )
    anchor_sizes: list[int] | None = field(
        default=None,
        metadata={
            "help": "faster_rcnn: sides of the anchors in pixels. Defaults to three sizes of the training boxes."
        },
    )


@dataclass
class TrainingDataFlags:
    """Flags of the training images: their augmentation, see `BoxAugmentation`, and their split."""

    with_validation: bool = field(
        default=False, metadata={"help": "Train on the validation images, too. Their scores then mean little."}
    )
    flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    vertical_flip: float = field(default=0.0, metadata={"help": "Probability of a vertical flip."})
    shift: float = field(default=0.0, metadata={"help": "Largest shift, as a fraction of width and height."})
    zoom: float = field(default=0.0, metadata={"help": "Largest relative change of the size."})
    color: float = field(default=0.0, metadata={"help": "Largest relative change of brightness and contrast."})


def find_method(name: str) -> Method:
    """Return the method with this name.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown. Choose one of: {', '.join(METHODS)}.")
    return METHODS[name]


def method_of(model: PreTrainedModel) -> Method | None:
    """Return the method of a saved model, or None for a detector of another library."""
    for method in METHODS.values():
        if type(model) is method.model and all(getattr(model.config, k) == v for k, v in method.fields.items()):
            return method
    return None


def complete_flags(args: Any) -> Method:
    """Check the flags of the model, and enter the defaults of the method.

    Args:
        args: Flags of the training script with the fields of `ModelFlags`. `learning_rate` and `batch_size` are set
            unless the user gave them.

    Returns:
        The method.

    Raises:
        ValueError: If a flag has an invalid value or belongs to another method.
    """
    method = find_method(args.method)
    for name in {name for other in METHODS.values() for name in other.flags} - set(method.flags):
        if getattr(args, name) is not None:
            accepted = ", ".join(method.flags) or "no such flags"
            raise ValueError(
                f"{name}={getattr(args, name)} is not a flag of method={args.method!r}, which accepts: {accepted}."
            )
    if len(args.image_size) not in (1, 2) or any(side < STRIDE or side % STRIDE for side in args.image_size):
        raise ValueError(
            f"image_size={args.image_size} is invalid. Expected height and width, or one number, multiples of "
            f"{STRIDE}."
        )
    if args.backbone != "small" and not issubclass(method.config, DetectionConfig):
        raise ValueError(
            f"backbone={args.backbone!r} does not work with method={args.method!r}: it has its own network."
        )
    if args.pretrained and not args.backbone.startswith("timm/"):
        raise ValueError(f"pretrained needs backbone=timm/NAME, not {args.backbone!r}.")
    defaults = method.config(**method.fields)
    for name in method.flags:
        if getattr(args, name) is None:
            setattr(args, name, getattr(defaults, name))
    for name in ("learning_rate", "batch_size"):
        if name not in (args.given or {}):
            setattr(args, name, getattr(method, name))
    return method


def complete_anchors(args: Any, data: datasets.Dataset) -> None:
    """Choose the sizes of the anchors, if the method has anchors and the user gave no sizes.

    Args:
        args: Flags of the training script, after `complete_flags`.
        data: The training images.
    """
    if "anchor_sizes" in find_method(args.method).flags and "anchor_sizes" not in (args.given or {}):
        args.anchor_sizes = choose_anchor_sizes(data, image_size=args.image_size) or args.anchor_sizes


# ---------------------------------------------------------------------------------------------------------------------
# Data and model


class DetectionImages(torch.utils.data.Dataset):
    """Images with boxes, prepared for a detector. `__getitems__` returns a batch.

    Decoded images stay in memory, up to `CACHED_PIXELS`, because decoding takes as long as the other preparation.

    Attributes:
        rows: The dataset, see `hf_dl.data.detection`. It has a column `proposals` if the processor needs them.
        names: Names of the classes.

    Args:
        rows: The dataset.
        processor: The image processor. If it uses proposals, they are computed once and cached by `datasets`.
        augmentation: Change of each image and its boxes. Defaults to none.
    """

    def __init__(self, rows: datasets.Dataset, processor: Any, augmentation: BoxAugmentation | None = None):
        self.rows = add_proposals(rows) if getattr(processor, "num_proposals", 0) else rows
        self.names = detection.class_names(rows)
        self._processor, self._augmentation = processor, augmentation
        self._cache: dict[int, tuple[Any, dict[str, list], list[list[float]]]] = {}
        self._cached_pixels = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return `pixel_values`, `labels`, and `proposals` if used; see `DetectionImageProcessor.preprocess`."""
        missing = [index for index in indices if index not in self._cache]
        new = dict(zip(missing, map(self._read, self.rows.select(missing)), strict=True))
        images, annotations, proposals = [], [], []
        for index in indices:
            image, objects, boxes = new[index] if index in new else self._cache[index]
            if self._augmentation is not None:
                image, objects, boxes = augment(image, objects, boxes, augmentation=self._augmentation)
            images.append(image)
            # processors of transformers need a number
            annotations.append({"image_id": index, "annotations": to_annotations(objects)})
            proposals.append(boxes)
        for index, row in new.items():
            if index not in self._cache and self._cached_pixels < CACHED_PIXELS:
                self._cache[index] = row
                self._cached_pixels += row[0].width * row[0].height
        given = {"proposals": proposals} if "proposals" in self.rows.column_names else {}
        batch = dict(self._processor(images, annotations=annotations, return_tensors="pt", **given))
        batch["pixel_values"] = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        return batch

    def _read(self, row: dict[str, Any]) -> tuple[Any, dict[str, list], list[list[float]]]:
        return to_rgb(row["image"]), row["objects"], row.get("proposals", [])

    def fingerprint_data(self) -> datasets.Dataset:
        """Return the data without augmentation, for the fingerprint of a training run."""
        return self.rows.cast_column("image", datasets.Image(decode=False))


def augment(
    image: Image.Image,
    objects: Mapping[str, Sequence[Any]],
    proposals: Sequence[Sequence[float]],
    *,
    augmentation: BoxAugmentation,
) -> tuple[Image.Image, dict[str, list[Any]], list[list[float]]]:
    """Change an image, and move its objects and its proposals along.

    Args:
        image: RGB image.
        objects: The column `objects` of the image.
        proposals: Boxes of the image in pixels.
        augmentation: The change.

    Returns:
        The image, the remaining objects and the remaining proposals.
    """
    count, total = len(objects["bbox"]), len(objects["bbox"]) + len(proposals)
    together = {"bbox": [*objects["bbox"], *proposals], "area": [*objects["area"], *[1.0] * len(proposals)]}
    image, moved = augmentation(image, together | {"row": list(range(total))})
    rows = [row for row in moved["row"] if row < count]
    kept = {key: [values[row] for row in rows] for key, values in objects.items()}
    kept |= {key: moved[key][: len(rows)] for key in ("bbox", "area")}
    return image, kept, moved["bbox"][len(rows) :]


def to_annotations(objects: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Convert the column `objects` of `hf_dl.data.detection` to annotations as in COCO.

    Example:
        >>> objects = {"bbox": [[2, 3, 6, 4]], "category": [1], "area": [4], "iscrowd": [False], "difficult": [False]}
        >>> to_annotations(objects)
        [{'bbox': [2, 3, 4, 1], 'category_id': 1, 'area': 4, 'iscrowd': False, 'difficult': False}]
    """
    keys = ("area", "iscrowd", "difficult")
    others = zip(*(objects[key] for key in keys), strict=True)
    return [
        {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": kind, **dict(zip(keys, values, strict=True))}
        for (x0, y0, x1, y1), kind, values in zip(objects["bbox"], objects["category"], others, strict=True)
    ]


def load_rows(args: DetectionFlags, split: str, *, size: int) -> datasets.Dataset:
    """Load one split of the images that the flags select.

    COCO publishes no annotations of its test images. If a folder of COCO has none, its validation images are the test
    images, too.

    Args:
        args: The flags.
        split: "train", "validation" or "test".
        size: Width and height of generated scenes in pixels.

    Returns:
        The dataset, see `hf_dl.data.detection`.

    Raises:
        ValueError: If an object is missing, see `check_objects`, or a flag is invalid.
    """
    hide_progress_bars()
    if len(args.num_objects) != 2:
        raise ValueError(f"num_objects={args.num_objects} is invalid. Expected the fewest and the most, such as 1 6.")
    synthetic = args.source == "synthetic"
    count = split_size(args, split, NUM_SCENES[split] if synthetic else None)
    if synthetic and split == "train" and count is None:
        count = NUM_SCENES[split]
    rows = detection.load(
        "validation" if split == "test" and is_coco_without_test(args.source) else split,
        args.source,
        boxes=args.border,
        corrupt=args.corrupt,
        num_images=count,
        holdout=args.holdout,
        classes=args.classes,
        style=args.style,
        size=size,
        num_objects=(args.num_objects[0], args.num_objects[1]),
    )
    report_data(rows, split)
    check_objects(rows, split, source=args.source, monitor=getattr(args, "monitor", ""))
    return rows


def check_objects(rows: datasets.Dataset, split: str, *, source: str, monitor: str = "") -> None:
    """Check that the images have objects where training needs them: for the loss, and for the score to monitor.

    Args:
        rows: The dataset of the split, see `hf_dl.data.detection`.
        split: "train", "validation" or "test". Test images need no objects.
        source: Name of the data.
        monitor: Name of the score that selects the best checkpoint. Defaults to none.

    Raises:
        ValueError: If no training image has an object, or no validation image although `monitor` is a score of them.
            Crowds and difficult objects do not count.
    """
    if split != "train" and not (split == "validation" and monitor.startswith("val_")):
        return
    for objects in rows["objects"]:
        flags = zip(objects["iscrowd"], objects["difficult"], strict=True)
        if any(not crowd and not difficult for crowd, difficult in flags):
            return
    needs = "" if split == "train" else f", but monitor={monitor!r} needs one"
    raise ValueError(
        f"No {split} image of source={source!r} has an object{needs}. Expected boxes for at least one of its "
        f"{len(rows)} images, and crowds and difficult objects do not count; check its annotations."
    )


def make_augmentation(args: TrainingDataFlags) -> BoxAugmentation:
    """Make the augmentation that the flags select.

    Raises:
        ValueError: If a flag is out of range.
    """
    if args.zoom < 0:
        raise ValueError(f"zoom={args.zoom} must be at least 0. 0 keeps the size.")
    return BoxAugmentation(
        flip=args.flip,
        vertical_flip=args.vertical_flip,
        shift=args.shift,
        scale=(1 / (1 + args.zoom), 1 + args.zoom),
        color=args.color,
    )


def make_model(args: Any, names: Sequence[str]) -> tuple[PreTrainedModel, DetectionImageProcessor]:
    """Create the detector that the flags select, and its image processor.

    Args:
        args: Flags with the fields of `ModelFlags`, after `complete_flags`.
        names: Names of the classes.

    Returns:
        The model, in channels-last memory format because its convolutions are faster in it, and the processor.

    Raises:
        ValueError: If the backbone is unknown or cannot be used.
    """
    method, classifier = find_method(args.method), None
    fields = {"backbone": args.backbone, "backbone_options": None}
    processor_fields = {"nms_threshold": method.nms_threshold, "num_proposals": method.num_proposals}
    if Path(args.backbone).is_dir():
        classifier, fields, statistics = load_backbone(args.backbone)
        processor_fields |= statistics
    if not issubclass(method.config, DetectionConfig):  # it has its own network; see `complete_flags`
        fields = {}
    fields |= dict(method.fields) | {name: getattr(args, name) for name in method.flags}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    model = method.model(checked_config(method.config, **fields, **labels))
    if classifier is not None:
        load_classifier_weights(model.backbone, classifier)
    if args.pretrained:
        load_published_weights(model.backbone, args.backbone)
        published = model.backbone.trunk.network.pretrained_cfg
        processor_fields |= {"image_mean": list(published["mean"]), "image_std": list(published["std"])}
    height, width = args.image_size[0], args.image_size[-1]
    processor = DetectionImageProcessor(size={"height": height, "width": width}, **processor_fields)
    return model.to(memory_format=torch.channels_last), processor


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


class StageTimer:
    """Measure the time in modules of a model, and in other code.

    Args:
        model: The model.
        stages: Name of a module per stage.

    Attributes:
        seconds: Seconds per stage. On CPUs, it is the CPU time of this process, which other programs do not change.
    """

    def __init__(self, model: nn.Module, stages: Mapping[str, str]):
        self.seconds: dict[str, float] = dict.fromkeys(stages, 0.0)
        self._device = next(model.parameters()).device
        self._handles, self._begin = [], {}
        for stage, name in stages.items():
            module = model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._starter(stage)))
            self._handles.append(module.register_forward_hook(self._stopper(stage)))

    def now(self) -> float:
        """Return the time in seconds."""
        if self._device.type == "cpu":
            return time.process_time()
        torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of a `with` block to a stage."""
        begin = self.now()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self.now() - begin

    def close(self) -> None:
        """Stop measuring modules."""
        for handle in self._handles:
            handle.remove()

    def _starter(self, stage: str) -> Callable[..., None]:
        def start(*args: Any) -> None:
            self._begin[stage] = self.now()

        return start

    def _stopper(self, stage: str) -> Callable[..., None]:
        def stop(*args: Any) -> None:
            self.seconds[stage] += self.now() - self._begin[stage]

        return stop


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    processor: Any,
    data: DetectionImages,
    *,
    threshold: float,
    stages: Mapping[str, str] | None = None,
    num_images: int | None = None,
) -> tuple[list[dict[str, torch.Tensor]], dict[str, float]]:
    """Detect the objects of images.

    Args:
        model: The detector. It is set to evaluation mode.
        processor: Its processor, with `post_process_object_detection`.
        data: The images.
        threshold: Lowest score. Average precision needs a low one.
        stages: See `Method.stages`. Defaults to none.
        num_images: Number of images, from the first one on. Defaults to all.

    Returns:
        `scores`, `labels` and `boxes` of each image, in pixels of the original image. And the milliseconds per image
        of all `STAGES`, and in `total`, without reading the images. "nms" is the post-processing. The time of
        selective search is measured on a few images. Without `stages`, only "nms" and "total" are measured.
    """
    model.eval()
    count = len(data) if num_images is None else min(num_images, len(data))
    timer, found = StageTimer(model, stages or {}), []
    try:
        for start in range(0, count, BATCH_IMAGES):
            batch = data.__getitems__(range(start, min(start + BATCH_IMAGES, count)))
            labels = batch.pop("labels")
            inputs = {
                name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
                for name, value in batch.items()
            }
            with timer.measure("total"):
                output = model(**inputs)
                with timer.measure("nms"):
                    sizes = [tuple(label["orig_size"].tolist()) for label in labels]
                    found += processor.post_process_object_detection(output, threshold, sizes)
    finally:
        timer.close()
    times = dict.fromkeys(STAGES, 0.0) if stages else {}
    times |= {stage: 1000 * seconds / count for stage, seconds in timer.seconds.items()}
    if stages and getattr(processor, "num_proposals", 0):  # their time is not in the loop, because they are cached
        times["proposals"] = time_proposals(data.rows)
        times["total"] += times["proposals"]
    return [{key: value.cpu() for key, value in row.items()} for row in found], times


def references(rows: datasets.Dataset) -> list[dict[str, Any]]:
    """Return the objects of a dataset in the format of `hf_dl.metrics.detection`."""
    keys = {"bbox": "boxes", "category": "labels", "area": "area", "iscrowd": "iscrowd", "difficult": "difficult"}
    return [{new: objects[old] for old, new in keys.items()} for objects in rows["objects"]]


def watch(model: PreTrainedModel, processor: Any, data: DetectionImages, *, threshold: float) -> dict[str, float]:
    """Compute the scores to log during training, without undefined ones: `map`, `map_50`, `map_75`. See `evaluate`."""
    found, _ = predict(model, processor, data, threshold=threshold)
    scores = coco_scores(found, references(data.rows))
    return {name: scores[name] for name in ("map", "map_50", "map_75") if math.isfinite(scores[name])}


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    data: DetectionImages,
    *,
    threshold: float,
    stages: Mapping[str, str] | None = None,
) -> tuple[dict[str, float], list[dict[str, torch.Tensor]]]:
    """Compute all scores of a detector.

    Args:
        model: The detector.
        processor: Its processor.
        data: The images.
        threshold: Lowest score of a detection, such as `Method.score_threshold`.
        stages: See `Method.stages`. Defaults to none.

    Returns:
        The scores and the detections. The names of the scores are:

        * the names of `coco_scores`, and `voc07_map_50` and `voc10_map_50`;
        * `error_class` and others: what each kind of error costs, see `detection_errors`;
        * `ms`, `ms_features` and others: milliseconds per image;
        * `images` and `objects`: their numbers.

        Scores that no object defines are left out.
    """
    found, times = predict(model, processor, data, threshold=threshold, stages=stages)
    truth = references(data.rows)
    scores = coco_scores(found, truth)
    for protocol in ("voc07", "voc10"):
        scores[f"{protocol}_map_50"] = voc_scores(found, truth, protocol=protocol)["map_50"]
    errors = detection_errors(found, truth)
    scores |= {f"error_{name}": errors[name] for name in (*ERRORS, "false_positive", "false_negative")}
    scores |= {"ms" if stage == "total" else f"ms_{stage}": value for stage, value in times.items()}
    counts = {"images": len(data), "objects": sum(len(row["labels"]) for row in truth)}
    return {name: value for name, value in scores.items() if math.isfinite(value)} | counts, found


def scene_size(processor: Any) -> int:
    """Return the size of generated scenes for an image processor: the larger side of its input."""
    size = dict(processor.size)
    return max(size["height"], size["width"]) if size.get("height") else 128


def check_classes(model: PreTrainedModel, names: Sequence[str], *, source: str) -> None:
    """Check that a saved model has the classes of the data.

    Args:
        model: The model.
        names: Names of the classes of the data.
        source: Name of the data.

    Raises:
        ValueError: If they differ.
    """
    known = [model.config.id2label[label] for label in range(model.config.num_labels)]
    if known != list(names):
        raise ValueError(
            f"source={source!r} has {len(names)} classes ({', '.join(names[:3])}, ...), but the model has "
            f"{len(known)} classes ({', '.join(known[:3])}, ...). Use data with the classes of the model."
        )
