"""The modality gap of recorded models: a scatter plot of images and captions, before and after alignment.

scripts/make_gap_playground.py records the points of the experiment clip_gap.toml. No model is needed to show them.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DETAILS = {"rich": "rich: all objects", "partial": "partial: one object", "poor": "poor: one word"}  # of captions
ALIGNMENTS = {
    "centering": "centering",
    "rotation": "rotation",
    "centered_rotation": "centering and rotation",
}
SCORES = {  # of each alignment
    "centroid_distance": "distance of the centroids",
    "rmg": "relative modality gap",
    "separability": "linear separability",
    "accuracy": "zero-shot accuracy",
}
RUN_SCORES = {  # of all seeds
    "centroid_distance": "distance of the centroids",
    "separability": "linear separability",
    "plain_accuracy": "zero-shot accuracy",
    "plain_unseen_accuracy": "zero-shot accuracy of unseen combinations",
}
SHARES = ("separability", "accuracy", "plain_accuracy", "plain_unseen_accuracy")  # shown in percent
CSS = """
.gap {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); gap: 8px 24px}
.gap h4 {margin: 0 0 4px}
.gap > div {max-width: 520px}
.gap svg {width: 100%; height: auto; display: block; border: 1px solid var(--border-color-primary); border-radius: 8px}
.gap .pair {stroke: currentColor; stroke-opacity: 0.18; stroke-width: 0.6}
.gap .image {fill: #0072B2} .gap .text {fill: #D55E00}
.legend span {margin-right: 18px; white-space: nowrap}
.legend i {display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 6px}
.gap table {border-collapse: collapse; margin-top: 6px; width: 100%}
.gap td {padding: 3px 12px 3px 0 !important; border: none !important}
.gap table, .gap tr {border: none !important}
.gap tr + tr {border-top: 1px solid var(--border-color-primary) !important}
.gap td:last-child {text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding-right: 0}
"""
_BEFORE = "none"


@dataclass(frozen=True)
class GapCell:
    """The recorded results of one level of detail and one temperature.

    Attributes:
        detail: Information in the captions, a key of `DETAILS`.
        temperature: "learned", or the fixed temperature as text.
        seeds: Number of trained models.
        seed: Seed of the model whose points are shown.
        scores: Mean and standard deviation of the scores of all models, by name.
        views: Scores and points by alignment, see `hf_dl.recipes.gap_points.align_run`.
    """

    detail: str
    temperature: str
    seeds: int
    seed: int
    scores: dict[str, list[float]]
    views: dict[str, dict[str, Any]]


class GapResults:
    """The recorded results of all settings.

    Args:
        path: The file that scripts/make_gap_playground.py wrote. A missing file gives no results.
    """

    def __init__(self, path: Path):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cells": []}
        self.commit, self.fitted_on = content.get("commit"), content.get("fitted_on")
        self.cells = {(cell["detail"], cell["temperature"]): GapCell(**cell) for cell in content["cells"]}

    @property
    def details(self) -> list[str]:
        """Recorded levels of detail, from the most to the least information."""
        return [name for name in DETAILS if any(name == detail for detail, _ in self.cells)]

    @property
    def temperatures(self) -> list[str]:
        """Recorded temperatures in ascending order, the learned one first."""
        found = {temperature for _, temperature in self.cells}
        return sorted(found, key=lambda name: -1.0 if name == "learned" else float(name))

    def get(self, detail: str | None, temperature: str | None) -> GapCell:
        """Return the results of a setting.

        Args:
            detail: Information in the captions.
            temperature: "learned", or the fixed temperature as text.

        Raises:
            ValueError: If nothing was recorded for the setting.
        """
        if (detail, temperature) not in self.cells:
            known = "; ".join(f"{each}, {other}" for each, other in self.cells) or "none"
            raise ValueError(
                f"captions={detail!r} with temperature={temperature!r} have no recorded results. Choose one of: "
                f"{known}."
            )
        return self.cells[detail, temperature]

    def draw(self, detail: str | None, temperature: str | None, alignment: str) -> str:
        """Draw a setting before and after an alignment, and the scores of its models, as HTML."""
        cell = self.get(detail, temperature)
        source = f"<p>The alignment was fitted on {html.escape(self.fitted_on)}.</p>" if self.fitted_on else ""
        return show_gap(cell, alignment) + source + show_training(cell)


def show_gap(cell: GapCell, alignment: str) -> str:
    """Draw images and captions before and after an alignment, as HTML with the scores.

    Args:
        cell: The setting.
        alignment: A key of `ALIGNMENTS`.
    """
    before, after = cell.views[_BEFORE], cell.views[alignment]
    # One scale for both panels, so that the gap can be compared.
    most = max(abs(value) for view in (before, after) for key in ("images", "texts") for value in view[key])
    legend = (
        "<p class='legend'><span><i style='background: #0072B2'></i>images</span>"
        "<span><i style='background: #D55E00'></i>captions</span></p>"
    )
    panels = "".join(
        f"<div><h4>{html.escape(title)}</h4>{draw_points(view['images'], view['texts'], most, title)}"
        f"{_table((name, _number(key, view['scores'][key])) for key, name in SCORES.items())}</div>"
        for title, view in (("Before alignment", before), (f"After {ALIGNMENTS[alignment]}", after))
    )
    return f"{legend}<div class='gap'>{panels}</div>"


def show_training(cell: GapCell) -> str:
    """Show the mean scores of all models of a setting, as HTML."""
    rows = []
    for key, name in RUN_SCORES.items():
        if key in cell.scores:
            mean, deviation = (_number(key, value) for value in cell.scores[key])
            rows.append((name, f"{mean} ± {deviation}" if cell.seeds > 1 else mean))
    heading, note = "Test scores of this model", ""
    if cell.seeds > 1:
        heading = f"All {cell.seeds} models of these settings"
        note = f"<p>Mean ± standard deviation over the seeds. The plots show the model with seed {cell.seed}.</p>"
    return f"<div class='gap'><div><h4>{heading}</h4>{_table(rows)}{note}</div></div>"


def draw_points(images: Sequence[float], texts: Sequence[float], most: float, title: str) -> str:
    """Draw pairs of points as SVG, with a line between the points of a pair.

    Args:
        images: Coordinates x, y, x, y, ... of the images.
        texts: Coordinates of their captions.
        most: The largest absolute coordinate.
        title: Description for readers who do not see the plot.
    """
    scale = 95 / max(most, 1e-6)
    left, right = (
        [(100 + scale * x, 100 - scale * y) for x, y in zip(each[::2], each[1::2], strict=True)]
        for each in (images, texts)
    )
    lines = "".join(
        f"<line x1='{a:.1f}' y1='{b:.1f}' x2='{c:.1f}' y2='{d:.1f}'/>"
        for (a, b), (c, d) in zip(left, right, strict=True)
    )
    dots = ""
    for kind, points in (("image", left), ("text", right)):
        circles = "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='1.3'/>" for x, y in points)
        dots += f"<g class='{kind}'>{circles}</g>"
    label = html.escape(f"{title}: {len(left)} images and their captions in two dimensions", quote=True)
    return f"<svg viewBox='0 0 200 200' role='img' aria-label='{label}'><g class='pair'>{lines}</g>{dots}</svg>"


def _table(rows: Any) -> str:
    return f"<table>{''.join(f'<tr><td>{name}</td><td>{value}</td></tr>' for name, value in rows)}</table>"


def _number(score: str, value: float) -> str:
    return f"{value:.1%}" if score in SHARES else f"{value:.3f}"
