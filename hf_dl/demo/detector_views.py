"""Pictures and HTML of object detectors on a page: boxes, the regions that a method looks at, and times per stage."""

import html
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw

from ..recipes.detection_report import box_color, draw_boxes
from .detectors import (
    CANDIDATES,
    FOUND,
    MAX_BOXES,
    Counts,
    Detection,
    DetectionPicture,
    Detector,
    Regions,
    Selection,
    count,
    describe,
)
from .page import show_bars
from .pictures import as_url

SIDE, TEXT = 768, 26  # pixels of the longer side of a picture, and of its texts: sharp on large screens
MAX_DRAWN = 40  # regions in color
MANY = 20  # more regions without color are thin and gray
MAX_BARS = 6  # scores below a picture
NEUTRAL = (255, 190, 60)  # regions without a class, such as anchors
STAGES = {
    "proposals": "#e8a33d", "features": "#4f6bd8", "classification": "#2a9d8f", "nms": "#c8547a", "other": "#94a3b8",
}  # fmt: skip
STAGE_NAMES = {"nms": "NMS", "other": "other, such as resizing"}
CSS = """
.detector img {width: 100%; height: auto; display: block; border-radius: 6px}
.detector .note {margin: 6px 0 10px; min-height: 2.8em}
.detector .note, .detector .model {font-size: var(--text-sm)}
.detector .model {margin-top: 14px}
.detector h4 {margin: 10px 0 2px}
.detector p {margin: 0 0 6px}
.times {margin: 12px 0}
.times .stack {display: flex; height: 18px; border-radius: 4px; overflow: hidden; margin: 4px 0 6px}
.times .stack div {min-width: 1px}
.times .legend {display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: var(--text-sm)}
.times .legend span {white-space: nowrap; font-variant-numeric: tabular-nums}
.times i {display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px}
"""


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_view(
    picture: DetectionPicture,
    detector: Detector,
    found: Detection,
    chosen: Selection,
    *,
    view: str = FOUND,
    threshold: float = 0.5,
    counts: Counts | None = None,
) -> Image.Image:
    """Draw the found boxes, or the regions that the detector has looked at.

    Args:
        picture: The image.
        detector: The detector.
        found: All boxes of the image.
        chosen: The boxes that remain.
        view: A key of `Detector.views`. Other views show the found boxes.
        threshold: Score above which a region is in color.
        counts: With counts, the true boxes are drawn in white, and false boxes are marked.
    """
    if view == CANDIDATES or view in found.regions:
        return draw_regions(picture.image, find_view(found, view), found, chosen, threshold=threshold)
    image, notes = enlarge(picture.image), None
    scale = SIDE / max(picture.image.size)
    if counts is not None:
        notes = ["" if hit else "false" for hit in counts.hits]
        draw = ImageDraw.Draw(image)
        for box in picture.boxes:
            draw_outline(draw, [value * scale for value in box])
    drawn = draw_boxes(
        image, (chosen.boxes * scale).tolist(), chosen.labels.tolist(), names=detector.classes,
        scores=chosen.scores.tolist(), notes=notes, side=SIDE, text_size=TEXT,
    )  # fmt: skip
    return Image.fromarray(drawn)


def draw_outline(draw: ImageDraw.ImageDraw, box: Sequence[float]) -> None:
    """Draw a white rectangle with dark edges, which is visible on any color.

    Args:
        draw: The picture.
        box: x0, y0, x1, y1 in pixels of the picture.
    """
    x0, y0, x1, y1 = box
    draw.rectangle((x0 - 3, y0 - 3, x1 + 3, y1 + 3), outline="black", width=6)
    draw.rectangle((x0 - 2, y0 - 2, x1 + 2, y1 + 2), outline="white", width=4)


def find_view(found: Detection, view: str) -> Regions:
    """Return the regions of a view."""
    if view == CANDIDATES:
        return Regions(found.boxes, found.scores, torch.zeros(0, dtype=torch.long))
    return found.regions[view]


def draw_regions(
    image: Image.Image, regions: Regions, found: Detection, chosen: Selection, *, threshold: float
) -> Image.Image:
    """Draw the regions with the highest scores in the color of their class, and others in white or gray.

    In a grid, the color of each cell is its class, and stronger colors are higher scores. The cells that gave the
    remaining boxes are outlined, with these boxes.

    Args:
        image: The image.
        regions: The regions.
        found: All boxes of the image.
        chosen: The boxes that remain.
        threshold: Score above which a region is in color.
    """
    canvas = enlarge(image).convert("RGBA")
    layer = Image.new("RGBA", canvas.size)
    draw, sides = ImageDraw.Draw(layer), torch.tensor([*canvas.size, *canvas.size]) - 1
    corners = (regions.boxes * sides).tolist()
    best, labels = regions.scores.max(1)
    colors = [NEUTRAL if regions.scores.shape[1] == 1 else box_color(label) for label in labels.tolist()]
    if regions.grid:
        for box, color, score in zip(corners, colors, best.tolist(), strict=True):
            draw.rectangle(box, fill=(*color, round(200 * score)), outline=(255, 255, 255, 60))
        places = (chosen.boxes / torch.tensor([*image.size, *image.size]) * sides).tolist()
        owners = (chosen.rows // (len(found.boxes) // len(corners))).tolist()
        for place, owner, label in zip(places, owners, chosen.labels.tolist(), strict=True):
            draw.rectangle(place, outline=(*box_color(label), 255), width=3)
            draw.rectangle(corners[owner], outline="white", width=5)
    else:
        plain, order = regions.shown.tolist(), best.argsort(descending=True)[:MAX_DRAWN]
        for row in plain if len(plain) > MANY else []:
            draw.rectangle(corners[row], outline=(240, 240, 240, 120), width=2)
        for row in order[best[order] > threshold].flip(0).tolist():
            draw.rectangle(corners[row], outline=(*colors[row], 255), width=4)
        for row in plain if len(plain) <= MANY else []:
            draw_outline(draw, corners[row])
    return Image.alpha_composite(canvas, layer).convert("RGB")


def enlarge(image: Image.Image) -> Image.Image:
    """Resize an image to the size of the pictures on the page. It keeps its proportions."""
    scale = SIDE / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# HTML


def summarize(picture: DetectionPicture, detector: Detector, chosen: Selection, threshold: float) -> list[str]:
    """Say how many boxes remain, and compare them with the true boxes of a scene.

    Args:
        picture: The image.
        detector: The detector.
        chosen: The boxes.
        threshold: The threshold of the scores.

    Returns:
        One or two sentences.
    """
    number = len(chosen.boxes)
    text = f"{number} box{'' if number == 1 else 'es'} with a score above {threshold:.2f}."
    if number == MAX_BOXES:
        text = f"The {MAX_BOXES} best boxes with a score above {threshold:.2f}."
    if not number:
        text = f"No object found: no box has a score above {threshold:.2f}."
    labels = picture.find_truth(detector.classes)
    if labels is None:
        return [text, "The model has other classes than the scene."] if picture.boxes else [text]
    counts = count(chosen, picture.boxes, labels)
    total, wrong = len(labels), counts.hits.count(False)
    hits = f"{total - len(counts.missed)} of {total} objects found"
    return [text, f"{hits}, {len(counts.missed)} missed, {wrong} false box{'' if wrong == 1 else 'es'}."]


def explain_view(detector: Detector, found: Detection, view: str, threshold: float) -> str:
    """Explain a view in a few words; an empty text for the found boxes."""
    if view != CANDIDATES and view not in found.regions:
        return ""
    regions = find_view(found, view)
    strong = int((regions.scores.amax(1) > threshold).sum())
    if view == CANDIDATES:
        return f"{strong:,} boxes have a score above {threshold:.2f} before NMS."
    number = int((regions.boxes[:, 2:] > regions.boxes[:, :2]).all(1).sum())
    name = detector.views[view].lower()
    score = "an objectness" if view == "anchors" else "a score"
    about = detector.step.views[view].about
    return f"{number:,} {name}, {strong:,} with {score} above {threshold:.2f}. {about}"


def show_times(milliseconds: Mapping[str, float], longest: float) -> str:
    """Draw the time of each stage as parts of a bar, in HTML.

    Args:
        milliseconds: Time per stage, a key of `STAGES`.
        longest: Total time of the longest bar on the page.
    """
    total = sum(milliseconds.values())
    stages = [(stage, milliseconds[stage]) for stage in STAGES if stage in milliseconds]
    parts = "".join(f"<div style='flex: {time:.4f}; background: {STAGES[stage]}'></div>" for stage, time in stages)
    legend = "".join(
        f"<span><i style='background: {STAGES[stage]}'></i>{STAGE_NAMES.get(stage, stage)} {time:.1f} ms</span>"
        for stage, time in stages
    )
    width = 100 * total / max(longest, 1e-9)
    return (
        f"<div class='times'><h4>Time of this run: {total:.1f} ms</h4>"
        f"<div class='stack' style='width: {width:.1f}%'>{parts}</div><div class='legend'>{legend}</div></div>"
    )


def show_scores(detector: Detector, chosen: Selection) -> str:
    """Draw the highest scores as bars, in HTML."""
    names = detector.classes
    rows = [(names[label], score) for label, score in zip(chosen.labels.tolist(), chosen.scores.tolist(), strict=True)]
    if not rows:
        return ""
    more = f"<p>and {len(rows) - MAX_BARS} more</p>" if len(rows) > MAX_BARS else ""
    return show_bars("Scores", rows[:MAX_BARS]) + more


def show_detector(
    picture: DetectionPicture,
    detector: Detector,
    found: Detection,
    chosen: Selection,
    *,
    view: str,
    threshold: float,
    truth: bool,
    longest: float,
) -> str:
    """Show the results of a detector, as HTML: the picture, a summary, the time per stage and the scores.

    Args:
        picture: The image.
        detector: The detector.
        found: All boxes of the image.
        chosen: The boxes that remain.
        view: A key of `Detector.views`.
        threshold: The threshold of the scores.
        truth: Whether to draw the true boxes of a scene.
        longest: Total time of the longest bar on the page.
    """
    labels = picture.find_truth(detector.classes) if truth else None
    counts = None if labels is None else count(chosen, picture.boxes, labels)
    drawn = draw_view(picture, detector, found, chosen, view=view, threshold=threshold, counts=counts)
    first, *rest = summarize(picture, detector, chosen, threshold)
    note = html.escape(explain_view(detector, found, view, threshold))
    head = f"<h4>{html.escape(first)}</h4>" + "".join(f"<p>{html.escape(text)}</p>" for text in rest)
    times = show_times(found.milliseconds | {"nms": chosen.milliseconds}, longest)
    picture_url = as_url(drawn)
    return (
        f"<div class='detector'><img src='{picture_url}' alt='{html.escape(first)}'>{head}"
        f"{f'<p class=note>{note}</p>' if note else ''}{times}{show_scores(detector, chosen)}"
        f"<p class=model>{html.escape(describe(detector))}</p></div>"
    )
