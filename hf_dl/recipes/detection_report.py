"""Pictures, tables and the model card of a detector."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from hf_dl.metrics.detection import coco_evaluation, precision_recall_curves
from hf_dl.models.image_input import to_rgb
from hf_dl.progress import activity
from hf_dl.reporting.card import run_card
from hf_dl.reporting.grids import SEGMENT_COLORS, image_grid
from hf_dl.reporting.plots import plot_run

from .detection import DetectionImages, find_method, references

SHOWN = 0.5  # lowest score of a box in a picture
EXAMPLES = 6  # test images in the picture
MAX_TEXTS = 40  # texts in an image; more would cover it
SIDE = 256  # pixels of the longer side of an image in a picture
CURVES = {
    "loss": {"training": "loss"},
    "validation mAP": {"IoU 0.5 to 0.95": "val_map", "IoU 0.5": "val_map_50", "IoU 0.75": "val_map_75"},
}
LIMITS = (
    "It finds objects of its classes only, and was trained on images of one source.",
    "Images are resized to one size, which changes their aspect ratio. Objects of a few pixels are missed.",
)


def box_color(label: int) -> tuple[int, int, int]:
    """Return the color of the boxes of a class."""
    return tuple(int(value) for value in SEGMENT_COLORS[1 + int(label) % (len(SEGMENT_COLORS) - 1)])


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    *,
    names: Sequence[str],
    scores: Sequence[float] | None = None,
    notes: Sequence[str] | None = None,
    side: int = SIDE,
    text_size: int = 11,
) -> np.ndarray:
    """Draw boxes with their classes into an image. The texts avoid each other if possible.

    Only the first 40 boxes have a text.

    Args:
        image: The image. It is enlarged or reduced.
        boxes: Boxes as x0, y0, x1, y1 in pixels of the image.
        labels: Class of each box.
        names: Names of the classes.
        scores: Score of each box, for the text. Defaults to none.
        notes: More text for each box. Defaults to none.
        side: Pixels of the longer side of the result.
        text_size: Size of the text in pixels.

    Returns:
        uint8 (height, width, 3).
    """
    factor = side / max(image.size)
    canvas = to_rgb(image).resize([max(1, round(length * factor)) for length in image.size], Image.Resampling.BILINEAR)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(text_size)
    limits = (canvas.width - 1, canvas.height - 1) * 2
    placed: list[tuple[float, float, float, float]] = []
    texts = []
    for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        corners = [min(float(value) * factor, limit) for value, limit in zip(box, limits, strict=True)]
        draw.rectangle(corners, outline=box_color(label), width=max(2, side // 190))
        if number >= MAX_TEXTS:
            continue
        text = names[int(label)] + ("" if scores is None else f" {float(scores[number]):.2f}")
        text += f" {notes[number]}" if notes and notes[number] else ""
        size = draw.textlength(text, font=font) + 4, text_size + 2
        placed.append(place_label(corners, size, placed, canvas.size))
        texts.append((text, box_color(label)))
    for (left, top, right, bottom), (text, color) in reversed(list(zip(placed, texts, strict=True))):  # best on top
        draw.rectangle((left, top, right, bottom), fill=color)
        middle = (top + bottom + 1) / 2
        draw.text((left + 2, middle), text, fill="black" if sum(color) > 380 else "white", font=font, anchor="lm")
    return np.asarray(canvas)


def place_label(
    box: Sequence[float],
    size: tuple[float, float],
    placed: Sequence[Sequence[float]],
    limits: tuple[int, int],
) -> tuple[float, float, float, float]:
    """Choose a place for the text of a box: above it, below it, or inside, where it covers other texts least.

    Args:
        box: The box x0, y0, x1, y1.
        size: Width and height of the text.
        placed: Rectangles of other texts.
        limits: Width and height of the picture.

    Returns:
        The rectangle of the text, x0, y0, x1, y1.

    Example:
        >>> place_label((10, 30, 50, 60), (20, 8), [], (100, 100))
        (10, 22, 30, 30)
        >>> place_label((10, 30, 50, 60), (20, 8), [(0, 20, 100, 40)], (100, 100))
        (10, 60, 30, 68)
    """
    (width, height), (x0, y0, x1, y1) = size, box
    columns, rows = (x0, x1 - width, (x0 + x1 - width) / 2), (y0 - height, y1, y0, y1 - height)
    best, least = None, None
    for y in rows:
        for x in columns:
            left = max(0, min(x, limits[0] - 1 - width))
            top = max(0, min(y, limits[1] - 1 - height))
            covered = sum(
                max(0, min(left + width, other[2]) - max(left, other[0]))
                * max(0, min(top + height, other[3]) - max(top, other[1]))
                for other in placed
            )
            if least is None or covered < least:
                best, least = (left, top, left + width, top + height), covered
    return best


def draw_examples(data: DetectionImages, found: Sequence[Mapping[str, torch.Tensor]], path: Path) -> None:
    """Draw the annotation and the detections of the first images.

    Args:
        data: The images.
        found: The detections of each image.
        path: The picture to write.
    """
    rows: list[list[np.ndarray]] = [[], []]
    for row, boxes in zip(data.rows.select(range(min(EXAMPLES, len(data)))), found, strict=False):
        objects, keep = row["objects"], boxes["scores"] >= SHOWN
        rows[0].append(draw_boxes(row["image"], objects["bbox"], objects["category"], names=data.names))
        kept = {key: value[keep].tolist() for key, value in boxes.items()}
        rows[1].append(
            draw_boxes(row["image"], kept["boxes"], kept["labels"], names=data.names, scores=kept["scores"])
        )
    image_grid(rows, path, labels=["annotation", f"detected (score {SHOWN} or more)"], cell=2.2)


def draw_precision_recall(
    found: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path
) -> None:
    """Draw the precision at each recall, at IoU 0.5, one line per class.

    Args:
        found: The detections of each image.
        truth: The objects of each image.
        names: Names of the classes.
        path: The picture to write.
    """
    from matplotlib.figure import Figure  # here, because this import takes most of a second

    figure = Figure(figsize=(4.5, 3.5), layout="constrained", dpi=120)
    axes = figure.subplots()
    for label, curve in precision_recall_curves(found, truth).items():
        if len(curve["recall"]) and np.isfinite(curve["recall"]).all():
            axes.plot(curve["recall"], curve["precision"], label=names[label], linewidth=1.5)
    axes.set(xlabel="recall", ylabel="precision at IoU 0.5", xlim=(0, 1.01), ylim=(0, 1.02))
    if axes.lines and len(names) <= 12:
        axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, facecolor="white", metadata={"Software": None})


def class_rows(
    found: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the average precision and the number of objects of each class with objects."""
    result, counts = coco_evaluation(found, truth), np.zeros(len(names), int)
    for row in truth:
        np.add.at(counts, np.asarray(row["labels"], int), 1)
    return [
        {
            "class": names[label],
            "objects": int(counts[label]),
            "AP": round(result.average_precision(label=label), 4),
            "AP50": round(result.average_precision(label=label, iou=0.5), 4),
            "AP75": round(result.average_precision(label=label, iou=0.75), 4),
        }
        for label in result.labels
        if counts[label]
    ]


def write_pictures(data: DetectionImages, found: Sequence[Mapping[str, torch.Tensor]], folder: Path) -> None:
    """Write examples.png, precision_recall.png and classes.csv into a folder.

    Args:
        data: The images.
        found: The detections of each image.
        folder: The folder.
    """
    truth = references(data.rows)
    draw_examples(data, found, folder / "examples.png")
    draw_precision_recall(found, truth, data.names, folder / "precision_recall.png")
    with open(folder / "classes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["class", "objects", "AP", "AP50", "AP75"])
        writer.writeheader()
        writer.writerows(class_rows(found, truth, data.names))


@activity("Writing the report")
def write_report(folder: Path, method: str) -> None:
    """Write the learning curves and the model card of a finished run, and print where they are.

    Args:
        folder: The folder of the run.
        method: A key of `METHODS`.
    """
    plot_run(folder, folder / "curves.png", CURVES)
    card = run_card(folder, summary=find_method(method).summary, limits=LIMITS, tags=["vision", method])
    with open(folder / "classes.csv", newline="", encoding="utf-8") as file:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in csv.reader(file)]
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    card.text += f"\n\n## Classes, on the test split\n\n{table}\n"
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (pipeline('object-detection', '{folder}'))")
    print(f"report      {folder / 'README.md'}")
    print(f"pictures    {folder / 'examples.png'}, precision_recall.png, curves.png")
