"""Figures of runs and experiments: learning curves, the table as a picture, and confusion matrices.

The figures use matplotlib's object interface instead of pyplot, so they do not change global state and can be drawn in
threads. The same numbers give the same bytes of SVG. The colors of Okabe and Ito are distinct for people with the
common forms of color blindness. The functions import matplotlib, because this takes most of a second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .experiment import read_curves
from .report import MATRICES, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#595959")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
INK = "#262626"
WIDTH = 8.4  # inches; the width of a README at 100 dots per inch
STYLE = {
    "svg.hashsalt": "hf_dl", "font.size": 9.5, "font.family": ["DejaVu Sans"], "text.color": INK,
    "axes.edgecolor": "#8c8c8c", "axes.labelcolor": INK, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#ebebeb", "grid.linewidth": 0.8,
    "xtick.color": "#595959", "ytick.color": "#595959", "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "legend.frameon": False, "legend.fontsize": 9, "lines.solid_capstyle": "butt", "figure.facecolor": "white",
}  # fmt: skip

Series = tuple[Sequence[float], Sequence[float]]


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date, the same numbers give the same file.
    figure.savefig(path, dpi=200, **({"metadata": {"Date": None}} if path.suffix == ".svg" else {}))
    return path


def _looks(index: int, styles: Sequence[tuple[int, int]] | None = None) -> tuple[str, Any]:
    color, line = styles[index] if styles else (index, index // len(COLORS))
    return COLORS[color % len(COLORS)], LINES[line % len(LINES)]


def _draw_curve(axes: Axes, seeds: Sequence[Series], color: str, line: Any) -> None:
    seeds = [series for series in seeds if len(series[0])]
    if not seeds:
        return
    steps = np.unique(np.concatenate([np.asarray(steps, dtype=float) for steps, _ in seeds]))
    # After the last step of a seed (early stopping), the mean is over the other seeds.
    lines = np.array([np.interp(steps, x, y, left=np.nan, right=np.nan) for x, y in seeds])
    counts = np.sum(~np.isnan(lines), axis=0)
    axes.plot(steps, np.nansum(lines, axis=0) / counts, color=color, linestyle=line, linewidth=1.9)
    if len(seeds) > 1:
        low, high = np.nanmin(lines, axis=0), np.nanmax(lines, axis=0)
        axes.fill_between(steps, low, high, color=color, alpha=0.16, linewidth=0)


def _scale(axes: Axes, panel: Mapping[str, Sequence[Series]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = np.concatenate([np.asarray(y, dtype=float) for seeds in panel.values() for _, y in seeds] or [[]])
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 200 * values.min() else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif len(values) and values.min() >= -0.1 and values.max() <= 1 and values.max() > 0.5:
        axes.set_ylim(min(0.0, float(values.min())) - 0.02, 1.02)


def draw_curves(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Sequence[Series]]],
    *,
    styles: Sequence[tuple[int, int]] | None = None,
    legend: Sequence[tuple[str, str, Any]] | None = None,
) -> Path:
    """Draw curves: one panel per quantity, with the mean and the range of the seeds for each label.

    The vertical axis is logarithmic if the values are positive and span more than a factor of 20. It goes from 0 to 1
    if the values are scores up to 1. Panels with the same labels share one legend below them; otherwise each panel has
    its legend below its title.

    Args:
        path: The file to write; the suffix sets the format, .svg or .png.
        panels: For each title and label, the (steps, values) of each seed.
        styles: Index of the color and index of the dash for each label of a panel; defaults to one color per label.
        legend: Text, color and dash of each entry of the shared legend; defaults to one entry per label.

    Returns:
        The path.

    Raises:
        ValueError: If no panel has a point.

    Example:
        >>> draw_curves("loss.svg", {"loss": {"train": [([0, 1], [1.0, 0.5])]}})  # doctest: +SKIP
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = {title: panel for title, panel in panels.items() if any(len(x) for s in panel.values() for x, _ in s)}
    if not panels:
        raise ValueError("panels contains no points: the runs logged none of the keys. See log.jsonl.")
    shared = len({tuple(panel) for panel in panels.values()}) == 1
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    labels = [*next(iter(panels.values()))]
    legend = legend or [(name, *_looks(index, styles)) for index, name in enumerate(labels)]
    fitting = int((100 if columns > 1 else 62) / (max(len(text) for text, *_ in legend) + 7))
    legend_columns = max(1, min(len(legend), fitting))
    height = 2.75 * rows + 0.2 * (1 + math.ceil(len(legend) / legend_columns))
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH if columns > 1 else 5.6, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (title, panel) in zip(grid, panels.items(), strict=False):
            for index, seeds in enumerate(panel.values()):
                _draw_curve(axes, seeds, *_looks(index, styles))
            _scale(axes, panel)
            axes.set_title(title, pad=None if shared else 24)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.margins(x=0.02)
            if not shared:
                place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.2}
                entries = [(name, *_looks(index, styles)) for index, name in enumerate(panel)]
                axes.legend(handles=_handles(entries), ncols=len(panel), columnspacing=1.4, **place)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        if shared and (len(labels) > 1 or len(panels) == 1):
            place = {"loc": "outside lower center", "ncols": legend_columns}
            figure.legend(handles=_handles(legend), handlelength=2.4, **place)
        return _save(figure, path)


def _handles(entries: Sequence[tuple[str, str, Any]]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=color, linestyle=dash, linewidth=1.9, label=text) for text, color, dash in entries]


def plot_run(
    folder: str | Path, path: str | Path, panels: Mapping[str, Mapping[str, str]] | None = None
) -> Path | None:
    """Draw the learning curves of one run from its log.jsonl.

    Args:
        folder: The folder of the run.
        path: The figure to write; the suffix sets the format.
        panels: For each title and label, the logged key; defaults to one panel with training and validation loss.

    Returns:
        The path, or None if the run logged none of the keys.

    Example:
        >>> panels = {"accuracy": {"validation": "val_accuracy"}}
        >>> plot_run("runs/train_classifier", "curves.png", panels)  # doctest: +SKIP
    """
    curves = read_curves(folder, points=200)
    panels = panels or {"loss": {"training": "loss", "validation": "val_loss"}}
    drawn = {
        title: {name: [curves[key]] for name, key in panel.items() if key in curves} for title, panel in panels.items()
    }
    return draw_curves(path, drawn) if any(drawn.values()) else None


def _styles(report: Report) -> tuple[list[tuple[int, int]] | None, list[tuple[str, str, Any]] | None]:
    """Return styles and legend of the groups: the first flag sets the color and the others the dash, if possible."""
    shown, grid = report.shown_flags(), report.experiment.grid
    first, rest = grid[shown[0]], [*itertools.product(*(grid[name] for name in shown[1:]))]
    if len(shown) == 1 or len(first) > len(COLORS) or len(rest) > len(LINES):
        return None, None
    legend = [(report.setting_label(shown[:1], [value]), COLORS[index], "-") for index, value in enumerate(first)]
    legend += [
        (report.setting_label(shown[1:], values), "#737373", dash) for values, dash in zip(rest, LINES, strict=False)
    ]
    return [(color, dash) for color in range(len(first)) for dash in range(len(rest))], legend


def plot_curves(report: Report, path: str | Path) -> Path | None:
    """Draw the learning curves of an experiment: one panel per quantity, one line and band per setting.

    With two flags in the table, the first sets the color and the second the dash of a line. The band is the range over
    the seeds.

    Args:
        report: The report.
        path: The figure to write; the suffix sets the format.

    Returns:
        The path, or None if no cell has curves.
    """
    panels: dict[str, dict[str, list[Series]]] = {}
    for key in report.experiment.curves:
        panel = {
            report.setting_label(report.shown_flags(), group.key): [
                c["curves"][key] for c in group.finished if key in c.get("curves", {})
            ]
            for group in report.groups()
        }
        if any(panel.values()):
            panels[report.label(key)] = panel
    styles, legend = _styles(report)
    return draw_curves(path, panels, styles=styles, legend=legend) if panels else None


def plot_table(report: Report, path: str | Path) -> Path | None:
    """Draw the table of an experiment: one panel per metric, one row per setting, one dot per seed.

    The tick is the mean, the bar is the mean ± one sample standard deviation, and the dashed line is the baseline.
    With two or three flags in the table, the color shows the last one.

    Args:
        report: The report.
        path: The figure to write; the suffix sets the format.

    Returns:
        The path, or None if no cell has finished.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    everything = report.groups()
    if not any(group.finished for group in everything):
        return None
    metrics, baseline, shown = report.table.value, report.table.baseline, report.shown_flags()
    row_flags, color_flags = (shown[:-1], shown[-1:]) if len(shown) > 1 else (shown, ())
    inner = math.prod(len(report.experiment.grid[name]) for name in color_flags)
    outer = len(everything) // inner
    columns = min(len(metrics), 3)
    rows = math.ceil(len(metrics) / columns)
    height = rows * (0.75 + max(0.34, 0.2 * inner + 0.12) * outer) + 0.35
    width = WIDTH if columns > 1 else 6.2
    names = [report.setting_label(row_flags, everything[row * inner].key[: len(row_flags)]) for row in range(outer)]
    # Titles must not be wider than their panels. A letter of the row names takes about 0.075 inches.
    panel = (width - 0.075 * max(map(len, names))) / columns
    fitting = panel * 72 / (0.62 * max(len(report.label(metric)) for metric in metrics))
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes, metric in zip(grid.ravel(), metrics, strict=False):
            for index, group in enumerate(everything):
                row, place = divmod(index, inner)
                y = row + (place - (inner - 1) / 2) * 0.66 / inner
                values = group.values(metric)
                if values:
                    _draw_dots(axes, values, y, COLORS[place % len(COLORS)])
                else:
                    state = "–" if group.finished else "failed" if group.failed else "missing"
                    axes.annotate(
                        state, (0.99, y), xycoords=("axes fraction", "data"),
                        ha="right", va="center", fontsize=8, color="#8c8c8c", style="italic",
                    )  # fmt: skip
            if metric in baseline:
                axes.axvline(baseline[metric], color="#8c8c8c", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
                axes.annotate(
                    "chance", (baseline[metric], 0), xycoords=("data", "axes fraction"), xytext=(3, 3),
                    textcoords="offset points", fontsize=8, color="#737373",
                )  # fmt: skip
            axes.set_title(report.label(metric), fontsize=min(STYLE["axes.titlesize"], fitting))
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(MaxNLocator(5 if columns < 3 else 4))
            axes.ticklabel_format(axis="x", scilimits=(-2, 4))
            axes.margins(x=0.08)
            axes.set_yticks(range(outer), names)
            axes.set_ylim(outer - 0.5, -0.5)
        for axes in grid.ravel()[len(metrics) :]:
            axes.set_visible(False)
        if inner > 1:
            values = report.experiment.grid[color_flags[0]]
            handles = [
                Line2D([], [], marker="o", markersize=6, linestyle="", color=COLORS[index % len(COLORS)])
                for index in range(inner)
            ]
            names = [report.setting_label(color_flags, [value]) for value in values]
            fitting = int((100 if columns > 1 else 74) / (max(map(len, names)) + 5))  # as in draw_curves
            ncols = max(1, min(inner, fitting))
            figure.legend(handles, names, loc="outside lower center", ncols=ncols, handletextpad=0.2)
        return _save(figure, path)


def plot_confusion(report: Report, path: str | Path) -> Path | None:
    """Draw the confusion matrix of the first seed of each setting, side by side.

    Each entry is a fraction of the images of its row, the true class. The color scale is a square root, which makes
    rare mistakes visible. Lines separate groups of similar classes, if the results name groups.

    Args:
        report: The report.
        path: The figure to write; .png is smaller than .svg for many classes.

    Returns:
        The path, or None if no cell has a confusion matrix.
    """
    from matplotlib import rc_context
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    panels = {
        report.setting_label(report.shown_flags(), group.key): cell[MATRICES]
        for group in report.groups()
        for cell in group.finished
        if MATRICES in cell
    }
    if not panels:
        return None
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    # Titles must not overlap. The width of a bold letter is about two thirds of its height.
    fitting = 0.86 * WIDTH * 72 / columns / (0.66 * max(map(len, panels)))
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + rows * (WIDTH / columns + 0.15)), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (title, matrix) in zip(grid, panels.items(), strict=False):
            counts = np.asarray(matrix["counts"], dtype=float)
            shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
            for edge in np.cumsum(matrix.get("groups", []))[:-1] - 0.5:
                axes.axhline(edge, color="#cccccc", linewidth=0.3)
                axes.axvline(edge, color="#cccccc", linewidth=0.3)
            axes.set_title(title, fontsize=min(STYLE["axes.titlesize"], fitting))
            axes.grid(visible=False)
            axes.set_xticks([])
            axes.set_yticks([])
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        grid[0].set_ylabel("true class")
        grid[0].set_xlabel("predicted class")
        figure.colorbar(picture, ax=list(grid), shrink=0.6, aspect=30, label="fraction of the true class")
        return _save(figure, path)


def _draw_dots(axes: Axes, values: Sequence[float], y: float, color: str) -> None:
    mean = float(np.mean(values))
    if len(values) > 1:
        deviation = float(np.std(values, ddof=1))
        axes.plot([mean - deviation, mean + deviation], [y, y], color=color, linewidth=5, alpha=0.22, zorder=2)
    axes.scatter([mean], [y], s=110, marker="|", color=color, linewidths=1.8, zorder=3)
    axes.scatter(
        values, [y] * len(values), s=18, color=color, alpha=0.75, edgecolors="white", linewidths=0.5, zorder=4
    )
