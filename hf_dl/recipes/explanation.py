"""Explanations of an image classifier: the flags, figures and studies of scripts/explain_image.py.

`explain_files` explains images from files. `explain_study` explains the validation images of a dataset: it draws some
correct and some wrong predictions per class, and scores the maps by the masks of the objects.
"""

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_dl import explain
from hf_dl.data import class_folders, labeled_images
from hf_dl.explain import Explanation
from hf_dl.explain.grad_cam import ENGINES
from hf_dl.models.image_input import open_image
from hf_dl.reporting.grids import color_heat

from .evaluation import load_model, report_data

TOP_K = 5
MAPS = tuple(explain.MAP_METHODS)


@dataclass
class ExplanationFlags:
    """Flags for the maps and for the masking of patches."""

    images: list[str] = field(
        default_factory=list,
        metadata={"help": "Image files or folders of images. By default, validation images are studied."},
    )
    method: str = field(
        default="grad_cam",
        metadata={"help": f"Kind of map. Choose one of: {', '.join(MAPS)}."},
    )
    methods: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Draw one page for each of these methods, instead of maps of all images. Choose from: "
            f"{', '.join(explain.METHODS)}."
        },
    )
    page_images: int = field(default=6, metadata={"help": "Pages: number of images."})
    channels: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4, 5],
        metadata={"help": "Pages activation and patches: channels of the layer in --layers."},
    )
    epsilon: float = field(
        default=8 / 255, metadata={"help": "Pages fgsm and pgd: largest change of a pixel, in units from 0 to 1."}
    )
    sanity: bool = field(
        default=False,
        metadata={"help": "Study: compare the maps with the maps of random networks (Adebayo et al. 2018)."},
    )
    layers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "grad_cam: names of layers, or a number of last layers. Defaults to the last layer. Pages "
            "activation, patches, codes and inversion: names of layers."
        },
    )
    layer: int = field(default=-1, metadata={"help": "cls: index of the layer whose attention is shown."})
    head: int = field(default=-1, metadata={"help": "cls: index of the attention head. -1 averages all heads."})
    engine: str = field(
        default="hf_dl", metadata={"help": f"grad_cam: implementation. Choose one of: {', '.join(ENGINES)}."}
    )
    label: str = field(
        default="", metadata={"help": "Class to explain, by name or number. Defaults to the predicted class."}
    )
    curves: bool = field(default=False, metadata={"help": "Compute deletion and insertion curves."})
    mask_counts: list[int] = field(
        default_factory=list,
        metadata={"help": "Numbers of patches to mask, for vision transformers. By default, no patch is masked."},
    )
    mask_ways: list[str] = field(
        default_factory=lambda: ["black", "gray", "attention"],
        metadata={"help": f"How patches are masked. Choose from: {', '.join(explain.WAYS)}."},
    )
    mask_seeds: int = field(default=20, metadata={"help": "Number of random choices of patches."})
    mask_images: int = field(
        default=20, metadata={"help": "Maximum number of images whose patches are masked, or checked by --sanity."}
    )
    source: str = field(
        default="synthetic",
        metadata={
            "help": "Study: dataset, see hf_dl.data.labeled_images; or a flat folder of images. Defaults to the data "
            "of the training run."
        },
    )
    num_images: int = field(
        default=500, metadata={"help": "Study: maximum number of validation images. 0 uses all images."}
    )
    study_classes: list[str] = field(
        default_factory=list, metadata={"help": "Study: classes to draw, by name or number. Defaults to 7 classes."}
    )
    per_class: int = field(
        default=5, metadata={"help": "Study: maximum number of correct images per class, and of wrong images."}
    )
    batch_size: int = field(default=32, metadata={"help": "Number of images per forward pass."})

    def __post_init__(self):
        if self.method not in MAPS:
            raise ValueError(f"method={self.method!r} is unknown. Choose one of: {', '.join(MAPS)}.")
        for method in self.methods:
            if method not in explain.METHODS:
                raise ValueError(f"methods={method!r} is unknown. Choose from: {', '.join(explain.METHODS)}.")
        if self.page_images < 1:
            raise ValueError(f"page_images={self.page_images} must be at least 1.")
        for way in self.mask_ways:
            if way not in explain.WAYS:
                raise ValueError(f"mask_ways={way!r} is unknown. Choose from: {', '.join(explain.WAYS)}.")


class Explainer:
    """A classifier, its processor and the selected kind of map.

    Attributes:
        names: Names of the classes.
        layers: Names or number of the layers. `explain` replaces the number by the names.
        target: The class to explain, or None for the predicted class.
        reported: Files that cannot be read and were reported.

    Args:
        args: The flags.
        folder: Folder or Hub id of the model.

    Raises:
        ValueError: If the class is unknown, or the method needs a vision transformer.
    """

    def __init__(self, args: ExplanationFlags, folder: str | Path):
        self.args, self.reported = args, set()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(AutoModelForImageClassification, folder).eval().to(device)
        self.processor = load_model(AutoImageProcessor, folder)
        self.names = [str(self.model.config.id2label[i]) for i in range(self.model.config.num_labels)]
        normalized = getattr(self.processor, "do_normalize", False)
        self.mean = self.processor.image_mean if normalized else 0.0
        self.std = self.processor.image_std if normalized else 1.0
        self.layers = [int(x) for x in args.layers] if "".join(args.layers).isdigit() else args.layers
        self.target = None if not args.label else self.find_class(args.label, "label")
        if explain.METHODS[args.method].attention:
            explain.find_blocks(self.model)  # raises ValueError early if the model has no transformer blocks

    def find_class(self, name: str, flag: str) -> int:
        """Return the number of a class.

        Args:
            name: Name or number of the class.
            flag: Name of the flag, for the error message.

        Raises:
            ValueError: If the model does not have the class.
        """
        if name in self.names:
            return self.names.index(name)
        if name.isdigit() and int(name) < len(self.names):
            return int(name)
        raise ValueError(f"{flag}={name!r} is not a class of the model, which has {', '.join(self.names[:10])}, ...")

    def study_classes(self) -> list[int]:
        """Return the numbers of the classes to draw: `args.study_classes`, or 7 classes at even distances."""
        classes = [self.find_class(name, "study_classes") for name in self.args.study_classes]
        number = min(7, len(self.names))
        return classes or [round(i * (len(self.names) - 1) / max(number - 1, 1)) for i in range(number)]

    def prepare(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Convert images to pixel values (batch, channels, height, width)."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.model.device)

    def prepare_masks(self, masks: Sequence[Image.Image]) -> torch.Tensor:
        """Resize and crop masks of objects like the images.

        Args:
            masks: Masks whose nonzero pixels belong to an object.

        Returns:
            bool (batch, height, width).
        """
        pictures = [Image.fromarray(np.where(np.asarray(mask) > 0, 255, 0).astype(np.uint8)) for mask in masks]
        pictures = [picture.convert("RGB") for picture in pictures]
        values = self.processor(images=pictures, do_rescale=False, do_normalize=False, return_tensors="pt")
        return values["pixel_values"].to(self.model.device)[:, 0] > 127

    def show(self, pixel_values: torch.Tensor) -> np.ndarray:
        """Convert pixel values back to images, uint8 (batch, height, width, 3)."""
        mean, std = (torch.as_tensor(x, device=pixel_values.device).reshape(-1, 1, 1) for x in (self.mean, self.std))
        pixels = (pixel_values * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)
        return (pixels * 255).round().byte().movedim(1, -1).cpu().numpy()

    def explain(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute maps and probabilities.

        Args:
            pixel_values: (batch, channels, height, width).

        Returns:
            Maps in [0, 1], (batch, height, width), and probabilities (batch, classes).
        """
        found = self.look(pixel_values, self.args.method)
        return found.maps, found.logits.softmax(-1)

    def options(self, method: str) -> dict[str, Any]:
        """Return the options of a kind of map that have flags."""
        args = self.args
        if method == "cls":
            return {"layer": args.layer, "head": None if args.head < 0 else args.head}
        if method != "grad_cam":
            return {}
        layers = self.layers[0] if self.layers and isinstance(self.layers[0], int) else (self.layers or 1)
        return {"layers": layers, "engine": args.engine}

    def look(self, pixel_values: torch.Tensor, method: str) -> Explanation:
        """Compute maps by a method, with all details.

        Args:
            pixel_values: (batch, channels, height, width).
            method: Name of a kind of map.
        """
        pixels = {"image_mean": self.mean, "image_std": self.std}
        found = explain.explain(
            self.model, pixel_values, method=method, target=self.target, **pixels, **self.options(method)
        )
        if method == "grad_cam" and not all(isinstance(layer, str) for layer in self.layers or [1]):
            self.layers = list(found.output.layers)  # later batches use the same layers
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Blend the gray image with the map in color, uint8 (height, width, 3)."""
    gray = image.mean(axis=-1, keepdims=True)
    return (0.45 * gray + 0.55 * color_heat(heat)).round().astype(np.uint8)


def draw_image(path: Path, image: np.ndarray, heat: np.ndarray, top: list[tuple[str, float]], explained: str) -> None:
    """Draw an image, its map, their overlay and the most probable classes.

    Args:
        path: The image file to write.
        image: uint8 (height, width, 3).
        heat: The map in [0, 1], (height, width).
        top: Names and probabilities of the most probable classes.
        explained: Name of the explained class.
    """
    from matplotlib.figure import Figure  # here, because this import takes most of a second

    figure = Figure(figsize=(10.5, 2.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.1])
    pictures = {"image": image, f"evidence for {explained}"[:34]: color_heat(heat), "overlay": overlay(image, heat)}
    for ax, (title, picture) in zip(axes, pictures.items(), strict=False):
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(title, fontsize=8)
        ax.set_axis_off()
    names, values = zip(*reversed(top), strict=True)
    bars = axes[3].barh([name[:24] for name in names], values, color="#332288")
    axes[3].bar_label(bars, [f"{value:.2f}" for value in values], fontsize=7, padding=2)
    axes[3].set_xlim(0, 1.18)
    axes[3].set_xticks([])
    axes[3].set_title("probability", fontsize=8)
    axes[3].tick_params(labelsize=7, length=0)
    axes[3].spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def draw_class(path: Path, name: str, shown: dict[str, list[dict[str, Any]]], per_class: int) -> None:
    """Draw correct and wrong images of a class: original, map and overlay, with prediction and confidence.

    Args:
        path: The image file to write.
        name: Name of the class.
        shown: Entries "right" and "wrong", each with `image`, `heat`, `prediction` and `confidence` per image.
        per_class: Number of columns for correct images, and for wrong images.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.15 * 2 * per_class + 0.4, 4.3), dpi=120)
    # an empty column separates correct and wrong images
    grid = figure.add_gridspec(
        3, 2 * per_class + 1, width_ratios=[1] * per_class + [0.15] + [1] * per_class,
        left=0.01, right=0.99, top=0.8, bottom=0.01, wspace=0.06, hspace=0.04,
    )  # fmt: skip
    figure.suptitle(name, fontsize=11, y=0.985)
    for offset, (title, entries) in zip((0, per_class + 1), shown.items(), strict=True):
        x = 0.25 if offset == 0 else 0.75
        figure.text(x, 0.915, f"{title} ({len(entries)} shown)", ha="center", fontsize=9)
        for column, entry in enumerate(entries):
            image, heat = entry["image"], entry["heat"]
            for row, picture in enumerate((image, color_heat(heat), overlay(image, heat))):
                ax = figure.add_subplot(grid[row, offset + column])
                ax.imshow(picture, interpolation="nearest")
                ax.set_axis_off()
                if row == 0:
                    ax.set_title(f"{entry['prediction'][:18]}\n{entry['confidence']:.2f}", fontsize=6.5, pad=3)
    figure.savefig(path, facecolor="white", metadata={"Software": None})


def draw_masking(path: Path, report: dict[str, Any]) -> None:
    """Draw the probability of the original label over the number of masked patches, one panel per way of masking.

    Args:
        path: The image file to write.
        report: The result of `explain.masking_report`.
    """
    from matplotlib.figure import Figure

    ways = list(dict.fromkeys(cell["way"] for cell in report["summary"]))
    figure = Figure(figsize=(2.6 * len(ways) + 0.9, 2.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for ax, way in zip(axes, ways, strict=True):
        for place in dict.fromkeys(cell["place"] for cell in report["summary"]):
            cells = [c for c in report["summary"] if c["way"] == way and c["place"] == place]
            ax.plot([c["count"] for c in cells], [c["probability"] for c in cells], marker="o", ms=3, label=place)
        ax.set_title(f"masked by {way}", fontsize=8)
        ax.set_xlabel("masked patches", fontsize=8)
        ax.set_ylim(0, 1)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("probability of the label", fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Software": None})


# ---------------------------------------------------------------------------------------------------------------------
# Images from files


def find_images(paths: Sequence[str]) -> list[Path]:
    """List the image files in files and folders.

    Args:
        paths: Image files, or folders that are searched recursively.

    Returns:
        The image files.

    Raises:
        ValueError: If a path does not exist, or a folder has no image.
    """
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"images={str(path)!r} does not exist; expected an image or a folder of images.")
        files = [path] if path.is_file() else class_folders.find_images(path)
        if not files:
            raise ValueError(f"images={str(path)!r} contains no image; expected files such as .jpg or .png.")
        found += files
    return found


def open_images(explainer: Explainer, skipped: list[dict[str, Any]]) -> Iterator[tuple[str, Image.Image]]:
    """Open the images in `args.images`, or in a flat folder `args.source`.

    A file that cannot be read is reported once per explainer. If no file can be read, the error is the only report.

    Args:
        explainer: The classifier, with the flags.
        skipped: Gets one entry, `file` and `error`, for each file that cannot be read.

    Yields:
        Name and image.

    Raises:
        ValueError: If a path does not exist, or no file can be read.
    """
    args, failed, opened = explainer.args, {}, False
    for path in find_images(args.images or [args.source]):
        name = class_folders.shown_path(path.name)
        try:
            image = open_image(path)
            opened = True
        except (OSError, ValueError) as error:
            failed[path] = {"file": name, "error": str(error)}
            skipped.append(failed[path])
        if opened:
            for new in [each for each in failed if each not in explainer.reported]:
                explainer.reported.add(new)
                print(f"{failed[new]['file']:30s} skipped: {failed[new]['error']}", file=sys.stderr)
        if path not in failed:
            yield name, image
    if not opened:
        first = next(iter(failed.values()))
        raise ValueError(f"None of {len(failed)} files can be read. {first['file']!r}: {first['error']}")


def explain_files(explainer: Explainer, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Explain the images in `args.images`, or in a flat folder `args.source`, and draw one figure per image.

    The images are processed one at a time because their sizes may differ. Files that cannot be read are reported and
    skipped.

    Args:
        explainer: The classifier and the kind of map.
        folder: The folder for the figures.

    Returns:
        The metrics, and one entry per file: the most probable classes, or the `error` of a file that was skipped.

    Raises:
        ValueError: If a path does not exist, or no file can be read.
    """
    args, entries, used, kept = explainer.args, [], set(), []
    for name, image in open_images(explainer, entries):
        pixel_values = explainer.prepare([image])
        maps, probabilities = explainer.explain(pixel_values)
        values, order = probabilities[0].topk(min(TOP_K, len(explainer.names)))
        top = [(explainer.names[i], value) for i, value in zip(order.tolist(), values.tolist(), strict=True)]
        stem, number = Path(name).stem, 1
        while stem in used:  # images in different folders may have the same name
            number += 1
            stem = f"{Path(name).stem}_{number}"
        used.add(stem)
        target = int(order[0]) if explainer.target is None else explainer.target
        draw_image(
            folder / f"{stem}.png",
            explainer.show(pixel_values)[0],
            maps[0].cpu().numpy(),
            top,
            explainer.names[target],
        )
        entry = {"file": name, "figure": f"{stem}.png", "explained": explainer.names[target], "top": dict(top)}
        if args.curves:
            entry |= {name: values[0] for name, values in measure_curves(explainer, pixel_values, maps).items()}
        entries.append(entry)
        kept.append(pixel_values)
        print(f"{name:30s} {top[0][0]:24s} {top[0][1]:.3f}")
    skipped = [entry for entry in entries if "error" in entry]
    metrics = {"images": float(len(kept))} | ({"skipped": float(len(skipped))} if skipped else {})
    if args.mask_counts:
        same = [values for values in kept if values.shape == kept[0].shape]
        metrics |= mask_patches(explainer, torch.cat(same[: args.mask_images]), folder)
    return metrics, entries


# ---------------------------------------------------------------------------------------------------------------------
# Validation images


def load_study(explainer: Explainer) -> Iterator[dict[str, list]]:
    """Load validation images in batches.

    Args:
        explainer: The classifier, with the flags `source`, `num_images` and `batch_size`.

    Yields:
        Lists `image` (PIL), `label` and, if the dataset has them, `mask`.

    Raises:
        ValueError: If the classes of the data are not the classes of the model.
    """
    args, size = explainer.args, getattr(explainer.processor, "size", None) or {}
    side = size.get("height") or size.get("shortest_edge") or getattr(explainer.model.config, "image_size", 64)
    options = {"num_classes": len(explainer.names)} if args.source == "synthetic" else {}
    data = labeled_images.load("validation", args.source, size=side, num_images=args.num_images or None, **options)
    report_data(data, "validation")
    names = data.features["label"].names
    if list(names) != explainer.names:
        raise ValueError(
            f"source={args.source!r} has the classes {', '.join(names[:3])}, ..., expected the classes of the model, "
            f"{', '.join(explainer.names[:3])}, ..."
        )
    for start in range(0, len(data), args.batch_size):
        yield data[start : start + args.batch_size]


def explain_study(explainer: Explainer, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Explain validation images, draw some of them per class, and score the maps by the masks of the objects.

    Args:
        explainer: The classifier and the kind of map.
        folder: The folder for the figures.

    Returns:
        The metrics over all images, correct images (`_right`) and wrong images (`_wrong`); and one entry per drawn
        image. Masks add three metrics. `share_inside` is the fraction of the map on the object. `pointing_game` is
        how often the maximum of the map is on the object. `object_share` is the fraction of pixels on the object.
        `milliseconds` is the CPU time per map, and `sanity_correlation` the result of `check_sanity`.
    """
    args = explainer.args
    classes = explainer.study_classes()
    shown = {c: {"right": [], "wrong": []} for c in classes}
    entries, sums, some, seconds = [], {}, [], 0.0
    for batch in load_study(explainer):
        pixel_values = explainer.prepare(batch["image"])
        started = clock(explainer.model.device)
        maps, probabilities = explainer.explain(pixel_values)
        seconds += clock(explainer.model.device) - started
        confidence, predicted = probabilities.max(dim=-1)
        label = torch.as_tensor(batch["label"], device=predicted.device)
        scores = {"correct": predicted == label, "confidence": confidence}
        if "mask" in batch:
            masks = explainer.prepare_masks(batch["mask"])
            scores["inside"] = explain.share_inside(maps, masks)
            scores["pointing"] = explain.pointing_game(maps, masks)
            scores["object"] = masks.float().mean(dim=(1, 2))
        if args.curves:
            curves = measure_curves(explainer, pixel_values, maps)
            scores |= {name: torch.tensor(values) for name, values in curves.items()}
        for name, values in scores.items():
            sums.setdefault(name, []).append(values.float().cpu())
        some.append(pixel_values if sum(map(len, some)) < args.mask_images else pixel_values[:0])
        pictures, heats = explainer.show(pixel_values), maps.cpu().numpy()
        for i, c in enumerate(label.tolist()):
            kind = "right" if predicted[i] == c else "wrong"
            if c in shown and len(shown[c][kind]) < args.per_class:
                prediction = explainer.names[int(predicted[i])]
                number = (len(sums["correct"]) - 1) * args.batch_size + i
                entry = {"image": number, "class": explainer.names[c]}
                entry |= {"prediction": prediction, "confidence": confidence[i].item()}
                entry |= {name: values[i].item() for name, values in scores.items() if name in ("inside", "pointing")}
                entries.append(entry)
                shown[c][kind].append({**entry, "image": pictures[i], "heat": heats[i]})
    for c, kinds in shown.items():
        name = explainer.names[c]
        draw_class(folder / f"class_{c}_{re.sub(r'[^A-Za-z0-9]+', '_', name)}.png", name, kinds, args.per_class)
    columns = {name: torch.cat(values) for name, values in sums.items()}
    right = columns.pop("correct") > 0
    metrics = {"images": float(len(right)), "accuracy": right.float().mean().item()}
    metrics["milliseconds"] = 1000 * seconds / len(right)
    rename = {"inside": "share_inside", "pointing": "pointing_game", "object": "object_share"}
    for name, values in columns.items():
        for suffix, rows in (("", right | True), ("_right", right), ("_wrong", ~right)):
            found = values[rows & ~values.isnan()]  # the share of a map of zeros is NaN
            if len(found):
                metrics[rename.get(name, name) + suffix] = found.mean().item()
    if args.sanity:
        metrics["sanity_correlation"] = check_sanity(explainer, torch.cat(some)[: args.mask_images])
    if args.mask_counts:
        metrics |= mask_patches(explainer, torch.cat(some)[: args.mask_images], folder)
    return metrics, entries


def clock(device: torch.device) -> float:
    """Return CPU seconds of this process, or seconds of a GPU after its work is finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def check_sanity(explainer: Explainer, pixel_values: torch.Tensor) -> float:
    """Compare the maps with the maps of networks with random weights.

    Args:
        explainer: The classifier and the kind of map.
        pixel_values: (batch, channels, height, width).

    Returns:
        The mean rank correlation of the maps after all layers are randomized.
    """
    pixels = {"image_mean": explainer.mean, "image_std": explainer.std}
    method = explainer.args.method
    options = {"target": explainer.target, **pixels, **explainer.options(method)}
    return explain.sanity_check(explainer.model, pixel_values, method=method, stages=1, **options).final


# ---------------------------------------------------------------------------------------------------------------------
# Masking


def measure_curves(explainer: Explainer, pixel_values: torch.Tensor, maps: torch.Tensor) -> dict[str, list[float]]:
    """Compute the areas under the deletion and insertion curves.

    Args:
        explainer: The classifier.
        pixel_values: (batch, channels, height, width).
        maps: Maps in [0, 1], (batch, height, width).

    Returns:
        `deletion_area` and `insertion_area`, one value per image.
    """
    options = {"classes": explainer.target, "image_mean": explainer.mean, "image_std": explainer.std}
    return {
        f"{mode}_area": explain.curve(explainer.model, pixel_values, maps, mode=mode, **options).area.tolist()
        for mode in ("deletion", "insertion")
    }


def mask_patches(explainer: Explainer, pixel_values: torch.Tensor, folder: Path) -> dict[str, float]:
    """Mask patches and measure the change of the predictions.

    Writes masking.json and masking.png, and prints one line per setting.

    Args:
        explainer: The classifier, a vision transformer.
        pixel_values: (batch, channels, height, width).
        folder: The folder to write to.

    Returns:
        The mean probability of the original label per way of masking, place and number of patches.
    """
    args = explainer.args
    report = explain.masking_report(
        explainer.model,
        pixel_values,
        counts=args.mask_counts,
        seeds=args.mask_seeds,
        ways=args.mask_ways,
        image_mean=explainer.mean,
        image_std=explainer.std,
        batch_size=args.batch_size,
    )
    (folder / "masking.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_masking(folder / "masking.png", report)
    print(f"{'way':10s} {'place':8s} {'patches':>7s} {'p(label)':>8s} {'rank':>6s} {'KL':>6s} {'changed':>7s}  became")
    for c in report["summary"]:
        became = ", ".join(f"{name} {count}" for name, count in list(c["became"].items())[:3])
        print(
            f"{c['way']:10s} {c['place']:8s} {c['count']:7d} {c['probability']:8.3f} {c['rank']:6.1f} {c['kl']:6.2f} "
            f"{c['changed']:7.2f}  {became}"
        )
    return {f"{c['way']}_{c['place']}_{c['count']}_probability": c["probability"] for c in report["summary"]}
