"""The probe of objects: a small classifier that reads the color and shape of an object in an image.

scripts/train_probe.py trains it on crops of rendered objects. `ObjectProbe` is the probe of `hf_dl.metrics.editing`.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor

from hf_dl.data import object_crops, scenes
from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import LabeledImages
from hf_dl.models.conv_classifier import ConvClassifierConfig, ConvClassifierForImageClassification
from hf_dl.progress import activity
from hf_dl.reporting.card import run_card
from hf_dl.reporting.plots import plot_run

from .classifier import to_pixel_values
from .evaluation import hide_progress_bars, load_model, split_size
from .slot_diffusion_parts import run_training

SUMMARY = (
    "A classifier of 32x32 crops that reads the color and shape of an object in a generated scene. It tells whether "
    "objects keep their color and shape when a model edits an image."
)
LIMITS = (
    "It knows the 8 colors and 4 shapes of the generated scenes, and names one of each for any crop.",
    "It reads the object in the middle of the crop. The crop is 1.25 times as large as the box of the object.",
)
ATTRIBUTES = ("color", "shape")  # in the order of the words of a class, such as "red cube"
FOLDER = "runs/train_probe"  # default output folder of the training script
CROP_SIZE = 32
CURVES = {
    "loss": {"training": "loss"},
    "error of the color": {f"{style} scenes": f"val_{style}_color_error" for style in scenes.STYLES},
    "error of the shape": {f"{style} scenes": f"val_{style}_shape_error" for style in scenes.STYLES},
}


@dataclass
class ProbeFlags:
    """Flags that select the crops of the training script."""

    styles: list[str] = field(
        default_factory=lambda: list(scenes.STYLES), metadata={"help": "Looks of the synthetic scenes."}
    )
    image_size: int = field(default=64, metadata={"help": "Height and width of the scenes, in pixels."})
    num_objects: list[int] = field(
        default_factory=lambda: [2, 4], metadata={"help": "Fewest and most objects per scene."}
    )
    num_train: int = field(default=6000, metadata={"help": "Number of training scenes per style."})
    num_test: int | None = field(
        default=None,
        metadata={
            "help": "Number of validation scenes per style, and of test scenes. Defaults to 500, and to at most half "
            "of num_train."
        },
    )


def load_crops(flags: ProbeFlags, split: str) -> dict[str, LabeledImages]:
    """Load the crops of one split.

    Args:
        flags: Selects the scenes.
        split: "train", "validation" or "test".

    Returns:
        The crops by style, and for the training split all of them under the key "all".
    """
    hide_progress_bars()
    options = {"size": CROP_SIZE, "image_size": flags.image_size, "num_objects": tuple(flags.num_objects)}
    count = split_size(flags, split, 500)
    crops = {style: object_crops.load(split, style=style, num_scenes=count, **options) for style in flags.styles}
    if split == "train":
        crops = {"all": datasets.concatenate_datasets(list(crops.values()))}
    return {name: LabeledImages(data) for name, data in crops.items()}


def make_model() -> tuple[PreTrainedModel, ViTImageProcessor]:
    """Create the network and its image processor."""
    names = dict(enumerate(object_crops.CLASSES))
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    config = ConvClassifierConfig(image_size=CROP_SIZE, norm="batch", **labels)
    model = ConvClassifierForImageClassification(config).to(memory_format=torch.channels_last)
    size = {"height": CROP_SIZE, "width": CROP_SIZE}
    return model, ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True)


class ObjectProbe:
    """Read the color and shape of objects with an image classifier.

    Args:
        model: Classifier whose classes are a color and a shape, such as "red cube". The probability of a color is the
            sum over the classes of this color.
        processor: Its image processor, with `image_mean`, `image_std` and the size of the crops.

    Raises:
        ValueError: If a class is not a color and a shape.
    """

    def __init__(self, model: PreTrainedModel, processor: Any):
        self.model, self.processor = model.eval(), processor
        names = [model.config.id2label[number] for number in range(model.config.num_labels)]
        wrong = [name for name in names if len(name.split()) != len(ATTRIBUTES)]
        if wrong:
            raise ValueError(
                f"A class of the probe is {wrong[0]!r}. Expected a color and a shape, such as 'red cube'."
            )
        self.values, self.members = {}, {}  # the values of an attribute, and which classes have each value
        for place, attribute in enumerate(ATTRIBUTES):
            words = [name.split()[place] for name in names]
            self.values[attribute] = values = sorted(set(words))
            self.members[attribute] = torch.tensor([[value == word for word in words] for value in values]).float()

    def __call__(self, images: torch.Tensor, boxes: torch.Tensor) -> dict[str, list[str]]:
        """Read the attributes of one object per image.

        Args:
            images: uint8 (objects, 3, height, width).
            boxes: Boxes x0, y0, x1, y1 in pixels, half-open, (objects, 4).

        Returns:
            The color and the shape of each object.
        """
        size = self.processor.size["height"]
        return self.read(object_crops.crop_objects(images, boxes, size=size))

    @torch.no_grad()
    def read(self, crops: torch.Tensor) -> dict[str, list[str]]:
        """Read the attributes of crops, uint8 (objects, 3, size, size)."""
        device = next(self.model.parameters()).device
        logits = [
            self.model(to_pixel_values(batch, self.processor, device)).logits.float() for batch in crops.split(250)
        ]
        probabilities = torch.cat(logits).softmax(dim=1).cpu()
        return {
            name: [values[best] for best in (probabilities @ self.members[name].T).argmax(1).tolist()]
            for name, values in self.values.items()
        }


def load_probe(place: str | Path) -> ObjectProbe:
    """Load a probe from a folder or a Hub id.

    Args:
        place: Folder or Hub id of an image classifier, such as the output of scripts/train_probe.py.

    Raises:
        ValueError: If the classifier cannot be loaded, or its classes are not colors and shapes.
    """
    return ObjectProbe(load_model(AutoModelForImageClassification, place), load_model(AutoImageProcessor, place))


def find_probe(place: str, scripts: Path) -> ObjectProbe:
    """Load a probe, or train it first if the default folder has none.

    Args:
        place: Folder or Hub id of the probe. Empty for the default folder of scripts/train_probe.py.
        scripts: Folder of the scripts.

    Raises:
        SystemExit: If the training fails. Its exit status is passed on.
        ValueError: If the probe cannot be loaded.
    """
    if not place and not Path(FOLDER, "config.json").is_file():
        print(f"Training the probe of objects in {FOLDER}, once. --probe selects another one.", file=sys.stderr)
        run_training(["accelerate", "launch", str(scripts / "train_probe.py"), "--output_dir", FOLDER])
    return load_probe(place or FOLDER)


def measure_accuracy(probe: ObjectProbe, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """Compare the readings of crops with the truth.

    Args:
        probe: The probe.
        batches: Batches with `image`, uint8 (batch, 3, size, size), and `labels`, numbers of `object_crops.CLASSES`.

    Returns:
        `color_accuracy`, `shape_accuracy`, `color_error` and `shape_error`, which are 1 - accuracy, and the number of
        `images`.
    """
    right, count = dict.fromkeys(ATTRIBUTES, 0), 0
    for batch in batches:
        truth = zip(*(object_crops.CLASSES[label].split() for label in batch["labels"].tolist()), strict=True)
        readings = probe.read(batch["image"])
        for name, values in zip(ATTRIBUTES, truth, strict=True):
            right[name] += sum(read == value for read, value in zip(readings[name], values, strict=True))
        count += len(batch["image"])
    accuracies = {f"{name}_accuracy": right[name] / count for name in ATTRIBUTES}
    return {**accuracies, **{f"{name}_error": 1 - right[name] / count for name in ATTRIBUTES}, "images": float(count)}


def evaluate(probe: ObjectProbe, crops: Mapping[str, LabeledImages], split: str) -> dict[str, float]:
    """Measure the accuracy on each style, with keys such as `test_plain_color_accuracy`; see `measure_accuracy`."""
    metrics = {}
    for style, data in crops.items():
        scores = measure_accuracy(probe, DataLoader(data, 250, collate_fn=as_is))
        metrics |= {f"{split}_{style}_{name}": value for name, value in scores.items()}
    return metrics


@activity("Writing the report")
def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and print the paths."""
    plot_run(folder, folder / "curves.png", CURVES)
    card = run_card(folder, summary=SUMMARY, limits=LIMITS, tags=("probing",))
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (AutoModelForImageClassification.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
