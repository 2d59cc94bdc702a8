"""Colors for segments and maps, and grids of images with titles."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Twelve colors that are distinct for color-blind people too, after Paul Tol's "muted"; the first is the background.
SEGMENT_COLORS = np.array(
    [
        (221, 221, 221), (51, 34, 136), (221, 204, 119), (204, 102, 119), (68, 170, 153), (136, 34, 85),
        (136, 204, 238), (153, 153, 51), (170, 68, 153), (17, 119, 51), (102, 37, 6), (85, 85, 85),
    ],
    dtype=np.uint8,
)  # fmt: skip


def color_segments(mask: np.ndarray) -> np.ndarray:
    """Color a segmentation: one color per label, repeating after twelve labels.

    Args:
        mask: int (height, width), labels from 0.

    Returns:
        uint8 (height, width, 3).
    """
    return SEGMENT_COLORS[np.asarray(mask) % len(SEGMENT_COLORS)]


def color_heat(heat: np.ndarray) -> np.ndarray:
    """Color a map from dark (0) to light (1).

    Args:
        heat: Values in [0, 1], any shape.

    Returns:
        uint8 (..., 3).
    """
    from matplotlib import colormaps  # here, because this import takes most of a second

    return (colormaps["inferno"](heat)[..., :3] * 255).round().astype(np.uint8)


def image_grid(
    rows: Sequence[Sequence[np.ndarray]],
    path: str | Path,
    *,
    titles: Sequence[str] = (),
    labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    cell: float = 1.1,
) -> Path:
    """Draw rows of images as one figure.

    Args:
        rows: Images, uint8 (height, width, 3); rows may differ in length.
        path: The figure to write; the suffix sets the format.
        titles: One title per column, above the first row.
        labels: One label per row, to its left.
        captions: One text per image, below it, for each row. A row without texts is less high.
        cell: Width of an image in inches, at 120 pixels per inch.

    Returns:
        The path.

    Raises:
        ValueError: If `rows` contains no image.
    """
    from matplotlib.figure import Figure  # here, because this import takes most of a second

    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise ValueError("rows contains no image. Expected at least one row with at least one image.")
    head, side = 0.25 if titles else 0.02, 0.25 if labels else 0.0
    below = [0.16 if y < len(captions) and captions[y] else 0.0 for y in range(len(rows))]
    tops = [head + y * cell + sum(below[:y]) for y in range(len(rows))]  # distance of each row from the top
    width, height = columns * cell + side, len(rows) * cell + sum(below) + head
    figure = Figure(figsize=(width, height), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1))  # in inches; axes per image take five times as long
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(0, height))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            scale = 0.97 * cell / max(image.shape[:2])
            high, wide = scale * image.shape[0] / 2, scale * image.shape[1] / 2
            middle, center = side + (x + 0.485) * cell, height - tops[y] - 0.515 * cell
            place = (middle - wide, middle + wide, center - high, center + high)
            axes.imshow(image, interpolation="nearest", extent=place, aspect="auto")
    for x, title in enumerate(titles):
        place = (side + (x + 0.485) * cell) / width
        figure.text(place, 1 - 0.6 * head / height, title, ha="center", va="center", fontsize=8)
    for y, label in enumerate(labels):
        place = 1 - (tops[y] + 0.515 * cell) / height
        figure.text(0.5 * side / width, place, label, ha="center", va="center", fontsize=8, rotation=90)
    for y, row in enumerate(captions):
        place = 1 - (tops[y] + cell + 0.06) / height
        for x, text in enumerate(row):
            fontsize = min(7, 125 * cell / max(len(text), 1))  # long texts are smaller
            figure.text((side + (x + 0.485) * cell) / width, place, text, ha="center", va="center", fontsize=fontsize)
    path = Path(path)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from font"
        )  # it draws a box for letters of other alphabets
        figure.savefig(path, facecolor="white", metadata={"Software": None} if path.suffix == ".png" else None)
    return path
