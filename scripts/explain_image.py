"""Explain an image classifier: where in an image its evidence is, and what becomes of the label without it.

    scripts/run python scripts/explain_image.py --model runs/train_classifier
    scripts/run python scripts/explain_image.py --model google/vit-base-patch16-224 --images cat.jpg --mask_counts 16

With images (files or folders) each gets a figure of the original, the map, the overlay and the likeliest classes;
with numbers of patches to take away, it is shown what becomes of the label. Without images, the model is studied on
validation images: for some classes five that it gets right and five that it gets wrong, and, where the data have masks
of the objects as the synthetic ones do, how much of the maps lies on the object and how often their peak does. Figures
and explanations.json are written; a minute on two cores. With an `output_dir` the study also leaves results.json, and
can be the script of an experiment; `--run norm=batch --seed 0` then finds the model among the runs of another one.
"""

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser

from hf_dl import explain
from hf_dl.data import labeled_images
from hf_dl.reporting.experiment import find_run, portable
from hf_dl.training.provenance import write_results

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
TOP_K = 5


@dataclass
class Args:
    """Flags of this script."""

    model: str = field(default="runs/train_classifier", metadata={"help": "Folder or Hub id of the classifier."})
    run: str = field(
        default="", metadata={"help": "Where --model is a folder of runs: a flag of the one to take, as norm=batch."}
    )
    seed: int = field(default=0, metadata={"help": "With --run: that of the run."})
    cpu_threads: int = field(default=0, metadata={"help": "Threads of the processor; 0: as many as torch takes."})
    images: list[str] = field(default_factory=list, metadata={"help": "Images or folders of images; none: a study."})
    method: Literal["grad_cam", "cls", "rollout", "gradient_rollout"] = field(
        default="grad_cam", metadata={"help": "What the map is; all but grad_cam are for vision transformers."}
    )
    layers: list[str] = field(
        default_factory=list, metadata={"help": "grad_cam: names of layers, or how many of the last ones; default: 1."}
    )
    layer: int = field(default=-1, metadata={"help": "cls: which layer's attention."})
    head: int = field(default=-1, metadata={"help": "cls: which head's; -1: the mean of all."})
    engine: Literal["hf_dl", "grad-cam"] = field(default="hf_dl", metadata={"help": "grad_cam: whose computation."})
    label: str = field(default="", metadata={"help": "Class to explain, by name or number; default: the predicted."})
    curves: bool = field(default=False, metadata={"help": "Whether to measure deletion and insertion curves."})
    mask_counts: list[int] = field(
        default_factory=list, metadata={"help": "Numbers of patches to take away (vision transformers); none: do not."}
    )
    mask_ways: list[str] = field(
        default_factory=lambda: ["black", "gray", "attention"],
        metadata={"help": f"How they are taken: {', '.join(explain.WAYS)}."},
    )
    mask_seeds: int = field(default=20, metadata={"help": "Draws of random patches."})
    mask_images: int = field(default=20, metadata={"help": "Images that patches are taken from, at most."})
    source: str = field(default="synthetic", metadata={"help": "Data of the study, as of hf_dl.data.labeled_images."})
    num_images: int = field(default=500, metadata={"help": "Validation images of the study, at most; 0: all."})
    study_classes: list[str] = field(default_factory=list, metadata={"help": "Classes that are shown; default: 7."})
    per_class: int = field(default=5, metadata={"help": "Right and wrong images of each class, each, at most."})
    batch_size: int = field(default=32, metadata={"help": "Images at a time."})
    output_dir: str = field(default="", metadata={"help": "Where to write; default: explanations/<model>."})


class Explainer:
    """A classifier with its processor, and the method that the flags name."""

    def __init__(self, args: Args):
        self.args = args
        device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = find_run(args.model, args.run, args.seed) if args.run else args.model
        self.model = AutoModelForImageClassification.from_pretrained(folder).eval().to(device)
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.names = [str(self.model.config.id2label[i]) for i in range(self.model.config.num_labels)]
        normalized = getattr(self.processor, "do_normalize", False)
        self.mean = self.processor.image_mean if normalized else 0.0
        self.std = self.processor.image_std if normalized else 1.0
        self.layers = [int(x) for x in args.layers] if "".join(args.layers).isdigit() else args.layers
        self.target = None if not args.label else self.index(args.label, "label")
        if args.method != "grad_cam":
            explain.find_blocks(self.model)  # says so at once if it is no vision transformer

    def index(self, name: str, flag: str) -> int:
        """The number of a class, given by name or number."""
        if name in self.names:
            return self.names.index(name)
        if name.isdigit() and int(name) < len(self.names):
            return int(name)
        raise ValueError(f"{flag}={name!r} is no class of the model; it has {', '.join(self.names[:10])}, ...")

    def prepare(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """What the model is given, (batch, channels, height, width)."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.model.device)

    def prepare_masks(self, masks: Sequence[Image.Image]) -> torch.Tensor:
        """Masks of objects, resized and cropped as the images are, bool (batch, height, width)."""
        pictures = [Image.fromarray(np.where(np.asarray(mask) > 0, 255, 0).astype(np.uint8)) for mask in masks]
        pictures = [picture.convert("RGB") for picture in pictures]
        values = self.processor(images=pictures, do_rescale=False, do_normalize=False, return_tensors="pt")
        return values["pixel_values"].to(self.model.device)[:, 0] > 127

    def show(self, pixel_values: torch.Tensor) -> np.ndarray:
        """What the model sees, uint8 (batch, height, width, 3)."""
        mean, std = (torch.as_tensor(x, device=pixel_values.device).reshape(-1, 1, 1) for x in (self.mean, self.std))
        pixels = (pixel_values * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)
        return (pixels * 255).round().byte().movedim(1, -1).cpu().numpy()

    def explain(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps in [0, 1], (batch, height, width), and probabilities, (batch, classes)."""
        args = self.args
        if args.method == "grad_cam":
            layers = self.layers[0] if self.layers and isinstance(self.layers[0], int) else (self.layers or 1)
            output = explain.grad_cam(self.model, pixel_values, layers=layers, classes=self.target, engine=args.engine)
            if isinstance(layers, int):
                self.layers = list(output.layers)  # found once
            return output.maps, output.logits.softmax(-1)
        maps, output = explain.attention_maps(
            self.model,
            pixel_values,
            method=args.method,
            layer=args.layer,
            head=None if args.head < 0 else args.head,
            classes=self.target,
        )
        maps = explain.normalize(explain.upsample(maps, pixel_values.shape[-2:]))
        return maps, output.logits.softmax(-1)


def color(maps: np.ndarray) -> np.ndarray:
    """Paint maps in [0, 1] by a scale from dark to light, uint8 (..., 3)."""
    return (matplotlib.colormaps["inferno"](maps)[..., :3] * 255).round().astype(np.uint8)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The gray image under the colored map, both to be recognized, uint8 (height, width, 3)."""
    gray = image.mean(axis=-1, keepdims=True)
    return (0.45 * gray + 0.55 * color(heat)).round().astype(np.uint8)


def find_images(paths: Sequence[str]) -> list[Path]:
    """The image files that the flags name, folders being searched.

    Raises:
        ValueError: If a path does not exist, or there is no image.
    """
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"images={str(path)!r} does not exist; expected an image or a folder of images.")
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"images={str(path)!r} holds no image; expected files such as .jpg or .png.")
        found += files
    return found


def open_image(path: Path) -> Image.Image:
    """Decode an image as RGB, upright.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"images={str(path)!r} cannot be read as an image: {error}.") from error


def draw_image(path: Path, image: np.ndarray, heat: np.ndarray, top: list[tuple[str, float]], explained: str) -> None:
    """Draw the original, the map, the overlay and bars of the likeliest classes."""
    figure = Figure(figsize=(10.5, 2.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.1])
    pictures = {"image": image, f"evidence for {explained}"[:34]: color(heat), "overlay": overlay(image, heat)}
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
    """Draw a class's right and wrong images side by side: original, map, overlay, prediction and confidence."""
    figure = Figure(figsize=(1.15 * 2 * per_class + 0.4, 4.3), dpi=120)
    # A column that stays free divides the right from the wrong.
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
            for row, picture in enumerate((image, color(heat), overlay(image, heat))):
                ax = figure.add_subplot(grid[row, offset + column])
                ax.imshow(picture, interpolation="nearest")
                ax.set_axis_off()
                if row == 0:
                    ax.set_title(f"{entry['prediction'][:18]}\n{entry['confidence']:.2f}", fontsize=6.5, pad=3)
    figure.savefig(path, facecolor="white", metadata={"Software": None})


def draw_masking(path: Path, report: dict[str, Any]) -> None:
    """Draw the probability of the original label against the number of patches taken, a panel for each way."""
    ways = list(dict.fromkeys(cell["way"] for cell in report["summary"]))
    figure = Figure(figsize=(2.6 * len(ways) + 0.9, 2.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for ax, way in zip(axes, ways, strict=True):
        for place in dict.fromkeys(cell["place"] for cell in report["summary"]):
            cells = [c for c in report["summary"] if c["way"] == way and c["place"] == place]
            ax.plot([c["count"] for c in cells], [c["probability"] for c in cells], marker="o", ms=3, label=place)
        ax.set_title(f"taken by {way}", fontsize=8)
        ax.set_xlabel("patches taken", fontsize=8)
        ax.set_ylim(0, 1)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("probability of the label", fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Software": None})


def measure_curves(explainer: Explainer, pixel_values: torch.Tensor, maps: torch.Tensor) -> dict[str, list[float]]:
    """Areas under the deletion and insertion curves, for each image."""
    options = {"classes": explainer.target, "image_mean": explainer.mean, "image_std": explainer.std}
    return {
        f"{mode}_area": explain.curve(explainer.model, pixel_values, maps, mode=mode, **options).area.tolist()
        for mode in ("deletion", "insertion")
    }


def take_patches_away(explainer: Explainer, pixel_values: torch.Tensor, folder: Path) -> dict[str, float]:
    """Write masking.json and masking.png, print what became of the labels, and return the mean probabilities."""
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


def explain_files(explainer: Explainer, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Explain the images that the flags name, one at a time, as they may differ in size."""
    args, entries, used, kept = explainer.args, [], set(), []
    for path in find_images(args.images):
        pixel_values = explainer.prepare([open_image(path)])
        maps, probabilities = explainer.explain(pixel_values)
        values, order = probabilities[0].topk(min(TOP_K, len(explainer.names)))
        top = [(explainer.names[i], value) for i, value in zip(order.tolist(), values.tolist(), strict=True)]
        stem, number = path.stem, 1
        while stem in used:  # images of the same name in several folders
            number += 1
            stem = f"{path.stem}_{number}"
        used.add(stem)
        target = int(order[0]) if explainer.target is None else explainer.target
        draw_image(
            folder / f"{stem}.png",
            explainer.show(pixel_values)[0],
            maps[0].cpu().numpy(),
            top,
            explainer.names[target],
        )
        entry = {"file": path.name, "figure": f"{stem}.png", "explained": explainer.names[target], "top": dict(top)}
        if args.curves:
            entry |= {name: values[0] for name, values in measure_curves(explainer, pixel_values, maps).items()}
        entries.append(entry)
        kept.append(pixel_values)
        print(f"{path.name:30s} {top[0][0]:24s} {top[0][1]:.3f}")
    metrics = {"images": float(len(entries))}
    if args.mask_counts:
        same = [values for values in kept if values.shape == kept[0].shape]
        metrics |= take_patches_away(explainer, torch.cat(same[: args.mask_images]), folder)
    return metrics, entries


def load_study(explainer: Explainer) -> Iterator[dict[str, list]]:
    """Batches of validation images, as lists of PIL images, labels and, where there are, masks.

    Raises:
        ValueError: If the classes of the data are not those of the model.
    """
    args, size = explainer.args, getattr(explainer.processor, "size", None) or {}
    side = size.get("height") or size.get("shortest_edge") or getattr(explainer.model.config, "image_size", 64)
    options = {"num_classes": len(explainer.names)} if args.source == "synthetic" else {}
    data = labeled_images.load("validation", args.source, size=side, num_images=args.num_images or None, **options)
    names = data.features["label"].names
    if list(names) != explainer.names:
        raise ValueError(
            f"source={args.source!r} has the classes {', '.join(names[:3])}, ..., expected those of the model, "
            f"{', '.join(explainer.names[:3])}, ..."
        )
    for start in range(0, len(data), args.batch_size):
        yield data[start : start + args.batch_size]


def study(explainer: Explainer, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Explain validation images; draw right and wrong ones of some classes; score the maps by the objects' masks."""
    args = explainer.args
    classes = [explainer.index(name, "study_classes") for name in args.study_classes]
    number = min(7, len(explainer.names))
    classes = classes or [round(i * (len(explainer.names) - 1) / max(number - 1, 1)) for i in range(number)]
    shown = {c: {"right": [], "wrong": []} for c in classes}
    entries, sums, some = [], {}, []
    for batch in load_study(explainer):
        pixel_values = explainer.prepare(batch["image"])
        maps, probabilities = explainer.explain(pixel_values)
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
    rename = {"inside": "share_inside", "pointing": "pointing_game", "object": "object_share"}
    for name, values in columns.items():
        for suffix, rows in (("", right | True), ("_right", right), ("_wrong", ~right)):
            # A map of zeros is nowhere: it has no share.
            found = values[rows & ~values.isnan()]
            if len(found):
                metrics[rename.get(name, name) + suffix] = found.mean().item()
    if args.mask_counts:
        metrics |= take_patches_away(explainer, torch.cat(some)[: args.mask_images], folder)
    return metrics, entries


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Explain what the flags name, and write figures and explanations.json."""
    args = Args(**vars(HfArgumentParser(Args, allow_abbrev=False).parse_args(argv)))
    started = time.monotonic()
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    explainer = Explainer(args)
    folder = Path(args.output_dir or Path("explanations") / Path(args.model).name)
    folder.mkdir(parents=True, exist_ok=True)
    metrics, entries = (explain_files if args.images else study)(explainer, folder)
    found = {"args": portable(asdict(args)), "layers": explainer.layers, "metrics": metrics, "images": entries}
    (folder / "explanations.json").write_text(json.dumps(found, indent=2) + "\n")
    if args.output_dir and not args.images:  # a study may be a cell of an experiment
        seconds = time.monotonic() - started
        write_results(folder, __file__, found["args"], metrics, explainer.model, seconds=seconds)
    for name, value in metrics.items():
        print(f"{name:40s} {value:.4f}")
    print(f"Figures and explanations.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
