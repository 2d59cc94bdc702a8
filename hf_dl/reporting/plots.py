"""Figures of runs and experiments: learning curves, the table as a picture, and confusion matrices.

They are drawn with matplotlib's objects, never with pyplot, so that no global state is touched and threads may draw;
the same numbers give the same bytes of SVG. Colors are those of Okabe and Ito, which people with the common forms
of color blindness can tell apart.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .experiment import MATRICES, read_curves
from .tables import groups, label, shown_flags, value_label

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#595959")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
INK = "#262626"
WIDTH = 8.4  # inches; at 100 dots an inch, as wide as a README is shown
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
    # A date would make every figure differ from the committed one.
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
    # A seed counts where it ran: beyond its last step (early stopping) the mean is that of the others.
    lines = np.array([np.interp(steps, x, y, left=np.nan, right=np.nan) for x, y in seeds])
    counts = np.sum(~np.isnan(lines), axis=0)
    axes.plot(steps, np.nansum(lines, axis=0) / counts, color=color, linestyle=line, linewidth=1.9)
    if len(seeds) > 1:
        low, high = np.nanmin(lines, axis=0), np.nanmax(lines, axis=0)
        axes.fill_between(steps, low, high, color=color, alpha=0.16, linewidth=0)


def _scale(axes: Axes, panel: Mapping[str, Sequence[Series]]) -> None:
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
    xlabel: str = "step",
    styles: Sequence[tuple[int, int]] | None = None,
    legend: Sequence[tuple[str, str, Any]] | None = None,
) -> Path:
    """Draw curves: a panel a quantity, in each the mean line and the range of the seeds for each label.

    A panel whose values are positive and span more than a factor of 20 gets a logarithmic axis; one whose values are
    scores up to 1 is drawn from 0 to 1. Panels with the same labels share one legend below them, others have their
    own between title and curves.

    Args:
        path: The file to write; its suffix says the format, .svg or .png.
        panels: Title to label to (steps, values) of each seed.
        xlabel: What the horizontal axis counts.
        styles: For each label of a panel in turn, the indices of its color and its dash; by default each label has a
            color of its own.
        legend: Text, color and dash of each entry of the legend below, where it is not one for each label.

    Returns:
        The path.

    Raises:
        ValueError: If there is nothing to draw.

    Example:
        >>> draw_curves("loss.svg", {"loss": {"train": [([0, 1], [1.0, 0.5])]}})  # doctest: +SKIP
    """
    panels = {title: panel for title, panel in panels.items() if any(len(x) for s in panel.values() for x, _ in s)}
    if not panels:
        raise ValueError("panels holds no points; the runs logged none of the asked keys (see log.jsonl).")
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
            axes.set_xlabel(xlabel)
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
    return [Line2D([], [], color=color, linestyle=dash, linewidth=1.9, label=text) for text, color, dash in entries]


def plot_run(
    folder: str | Path, path: str | Path, panels: Mapping[str, Mapping[str, str]] | None = None
) -> Path | None:
    """Draw the learning curves of one run from its log.jsonl.

    Args:
        folder: The folder of the run.
        path: The figure to write; its suffix says the format.
        panels: Title to label to logged key; by default one panel with the training and the validation loss.

    Returns:
        The path, or None where the run logged nothing that could be drawn.

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


def _styles(report: Mapping[str, Any]) -> tuple[list[tuple[int, int]] | None, list[tuple[str, str, Any]] | None]:
    """Looks and legend of the groups: the first flag gives the color and the others the dash, where these suffice."""
    shown = shown_flags(report)
    first, rest = report["grid"][shown[0]], [*itertools.product(*(report["grid"][name] for name in shown[1:]))]
    if len(shown) == 1 or len(first) > len(COLORS) or len(rest) > len(LINES):
        return None, None
    legend = [(_flag_labels(report, shown[:1], [value]), COLORS[index], "-") for index, value in enumerate(first)]
    legend += [
        (_flag_labels(report, shown[1:], values), "#737373", dash) for values, dash in zip(rest, LINES, strict=False)
    ]
    return [(color, dash) for color in range(len(first)) for dash in range(len(rest))], legend


def _flag_labels(report: Mapping[str, Any], names: Sequence[str], values: Sequence[Any]) -> str:
    # A word speaks for itself ("batch"); a number needs its name ("K = 5").
    return ", ".join(
        value_label(report, value) if isinstance(value, str) else f"{label(report, name)} = {json.dumps(value)}"
        for name, value in zip(names, values, strict=True)
    )


def plot_curves(report: Mapping[str, Any], path: str | Path) -> Path | None:
    """Draw the learning curves of an experiment: a panel a quantity, a line a setting, a band over its seeds.

    With two flags in the table, the first gives the color and the second the dash of a line.

    Args:
        report: The report of an experiment.
        path: The figure to write; its suffix says the format.

    Returns:
        The path, or None where no cell has curves.
    """
    panels: dict[str, dict[str, list[Series]]] = {}
    for key in report["curves"]:
        panel = {
            _flag_labels(report, shown_flags(report), group.key): [
                c["curves"][key] for c in group.finished if key in c.get("curves", {})
            ]
            for group in groups(report)
        }
        if any(panel.values()):
            panels[label(report, key)] = panel
    styles, legend = _styles(report)
    return draw_curves(path, panels, styles=styles, legend=legend) if panels else None


def plot_table(report: Mapping[str, Any], path: str | Path) -> Path | None:
    """Draw the table of an experiment: a panel a metric, a row a setting, a dot a seed, a tick the mean.

    With two or three flags in the table, the last is told by color. The bar is the mean ± one sample standard
    deviation, the dashed line the baseline.

    Args:
        report: The report of an experiment.
        path: The figure to write; its suffix says the format.

    Returns:
        The path, or None where no cell has finished.
    """
    everything = groups(report)
    if not any(group.finished for group in everything):
        return None
    metrics, baseline, shown = report["table"]["value"], report["table"]["baseline"], shown_flags(report)
    row_flags, color_flags = (shown[:-1], shown[-1:]) if len(shown) > 1 else (shown, ())
    inner = math.prod(len(report["grid"][name]) for name in color_flags)
    outer = len(everything) // inner
    columns = min(len(metrics), 3)
    rows = math.ceil(len(metrics) / columns)
    height = rows * (0.75 + max(0.34, 0.2 * inner + 0.12) * outer) + 0.35
    width = WIDTH if columns > 1 else 6.2
    names = [_flag_labels(report, row_flags, everything[row * inner].key[: len(row_flags)]) for row in range(outer)]
    # Titles as wide as their panels: in inches, a letter of the names beside them takes about 0.075.
    panel = (width - 0.075 * max(map(len, names))) / columns
    fitting = panel * 72 / (0.62 * max(len(label(report, metric)) for metric in metrics))
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes, metric in zip(grid.ravel(), metrics, strict=False):
            for index, group in enumerate(everything):
                row, place = divmod(index, inner)
                y = row + (place - (inner - 1) / 2) * 0.66 / inner
                if group.finished:
                    _draw_dots(axes, group.values(metric), y, COLORS[place % len(COLORS)])
                else:
                    axes.annotate(
                        "failed" if group.failed else "missing", (0.99, y), xycoords=("axes fraction", "data"),
                        ha="right", va="center", fontsize=8, color="#8c8c8c", style="italic",
                    )  # fmt: skip
            if metric in baseline:
                axes.axvline(baseline[metric], color="#8c8c8c", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
                axes.annotate(
                    "chance", (baseline[metric], 0), xycoords=("data", "axes fraction"), xytext=(3, 3),
                    textcoords="offset points", fontsize=8, color="#737373",
                )  # fmt: skip
            axes.set_title(label(report, metric), fontsize=min(STYLE["axes.titlesize"], fitting))
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
            values = report["grid"][color_flags[0]]
            handles = [
                Line2D([], [], marker="o", markersize=6, linestyle="", color=COLORS[index % len(COLORS)])
                for index in range(inner)
            ]
            names = [_flag_labels(report, color_flags, [value]) for value in values]
            fitting = int((100 if columns > 1 else 74) / (max(map(len, names)) + 5))  # as in draw_curves
            ncols = max(1, min(inner, fitting))
            figure.legend(handles, names, loc="outside lower center", ncols=ncols, handletextpad=0.2)
        return _save(figure, path)


def plot_confusion(report: Mapping[str, Any], path: str | Path) -> Path | None:
    """Draw the confusion matrix of each setting of an experiment, of its first seed, side by side.

    A cell is a part of its row, the true class; the scale is that of square roots, so that rare mistakes are seen.
    Lines part the groups of classes that are alike, where the results name them.

    Args:
        report: The report of an experiment.
        path: The figure to write; .png is the smaller for many classes.

    Returns:
        The path, or None where no cell has a confusion matrix.
    """
    panels = {
        _flag_labels(report, shown_flags(report), group.key): cell[MATRICES]
        for group in groups(report)
        for cell in group.finished
        if MATRICES in cell
    }
    if not panels:
        return None
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    # Bold letters are about two thirds as wide as high; a title must not run into the next one.
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
        figure.colorbar(picture, ax=list(grid), shrink=0.6, aspect=30, label="part of the true class")
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
