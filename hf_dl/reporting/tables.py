"""The table of an experiment: mean ± standard deviation over the seeds, as markdown.

The standard deviation is that of a sample (divided by n - 1), and says how much single runs differ; a group with one
run has none. Nothing is left out: a group without a finished run is shown as missing or failed.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .experiment import OWN_NUMBERS


@dataclass(frozen=True)
class Group:
    """The cells of an experiment that differ in nothing but the seed.

    Args:
        key: The values of the flags that the table shows, rows before columns.
        cells: The cells as `hf_dl.reporting.experiment.collect` describes them.
    """

    key: tuple[Any, ...]
    cells: list[dict[str, Any]]

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The cells with results."""
        return [cell for cell in self.cells if cell["status"] == "finished"]

    @property
    def failed(self) -> int:
        """The number of cells whose run ended with an error."""
        return sum(cell["status"] == "failed" for cell in self.cells)

    @property
    def restarts(self) -> int:
        """How often the runs started over because training had collapsed, all seeds together."""
        return sum(cell.get("restarts") or 0 for cell in self.finished)

    def values(self, metric: str) -> list[float]:
        """Return the metric of each finished cell, in the order of the seeds.

        Args:
            metric: A key of the cells' metrics, or what every run tells of itself, `OWN_NUMBERS`.

        Returns:
            One number a finished cell.

        Raises:
            ValueError: If a finished cell does not have the metric.
        """
        found = []
        for cell in self.finished:
            own = {name: cell[name] for name in OWN_NUMBERS if cell.get(name) is not None}
            values = own | cell["metrics"]
            if metric not in values:
                raise ValueError(
                    f"value={metric!r} is not among the metrics of cell {cell['id']}; it has "
                    f"{', '.join(sorted(cell['metrics']))}. Correct table.value of the experiment."
                )
            found.append(float(values[metric]))
        return found


def groups(report: Mapping[str, Any]) -> list[Group]:
    """Group the cells of a report by the flags that its table shows.

    Args:
        report: The report of an experiment.

    Returns:
        The groups in the order of the grid, columns innermost.
    """
    shown = shown_flags(report)
    result = []
    for key in itertools.product(*(report["grid"][name] for name in shown)):
        cells = [cell for cell in report["cells"] if tuple(cell["flags"][name] for name in shown) == key]
        result.append(Group(key=key, cells=cells))
    return result


def shown_flags(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the flags that the table of a report shows: those of the rows, then that of the columns, if any."""
    columns = report["table"]["columns"]
    return (*report["table"]["rows"], *([columns] if columns else []))


def label(report: Mapping[str, Any], key: str) -> str:
    """Return how a key is written in tables and figures: as the experiment says, or with spaces for underscores."""
    return report["labels"].get(key, key.replace("_", " "))


def value_label(report: Mapping[str, Any], value: Any) -> str:
    """Return how a value of a flag is written in tables and figures: a text as the experiment says."""
    if isinstance(value, bool):
        return str(value).lower()
    return report["labels"].get(value, value) if isinstance(value, str) else str(value)


def decimals_for(values: Sequence[Sequence[float]]) -> int:
    """Choose the decimals of a column, so that its numbers line up and say no more than is known.

    Args:
        values: The values of each group of the column.

    Returns:
        As many decimals as show the median standard deviation with one significant digit, or with two where the first
        is below 3.5; where there is none, as many as give the largest value four digits. Between 0 and 6.
    """
    deviations = [float(np.std(group, ddof=1)) for group in values if len(group) > 1]
    deviations = [deviation for deviation in deviations if math.isfinite(deviation) and deviation > 0]
    sizes = [abs(value) for group in values for value in group if math.isfinite(value) and value != 0]
    if deviations:
        decimals = 1 - math.floor(math.log10(statistics.median(deviations) / 0.35))
    elif sizes:
        decimals = 3 - math.floor(math.log10(max(sizes)))
    else:
        decimals = 1
    return min(max(decimals, 0), 6)


def mean_and_deviation(values: Sequence[float], decimals: int) -> str:
    """Write the mean and the sample standard deviation of some runs.

    Args:
        values: One number a run, at least one.
        decimals: The digits after the point.

    Returns:
        The text, such as "0.912 ± 0.015"; a single run has no deviation.

    Example:
        >>> mean_and_deviation([0.9, 0.92, 0.94], 3)
        '0.920 ± 0.020'
    """
    mean = f"{np.mean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{decimals}f}"


def _entry(group: Group, metric: str, decimals: int, *, say_n: bool) -> str:
    if not group.finished:
        return "failed" if group.failed else "missing"
    text = mean_and_deviation(group.values(metric), decimals)
    return f"{text} (n = {len(group.finished)})" if say_n and len(group.finished) < len(group.cells) else text


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], keys: int) -> str:
    # Keys stand to the left, numbers to the right, and the source is aligned as well, so that it reads as text.
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{text:{'<' if i < keys else '>'}{widths[i]}}" for i, text in enumerate(row)) + " |"
        for row in (header, *rows)
    ]
    rule = "|" + "|".join("-" * (width + 2) if i < keys else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return "\n".join([lines[0], rule + "|", *lines[1:]])


def _text(text: str) -> str:
    return text.replace("|", "\\|")


def results_table(report: Mapping[str, Any]) -> str:
    """Write the table of an experiment as markdown.

    Args:
        report: The report of an experiment, from `collect` or `read_report`.

    Returns:
        One table with a column a metric, or, where the experiment names `columns`, one table a metric. Rows without
        results say so; a row "chance" shows the baselines; restarts and failures get a column where there are any.
        A sentence below says what the numbers are.

    Raises:
        ValueError: If a metric of the table is not among those of a finished cell.
    """
    rows, columns = report["table"]["rows"], report["table"]["columns"]
    metrics, baseline = report["table"]["value"], report["table"]["baseline"]
    everything = groups(report)
    decimals = {metric: decimals_for([group.values(metric) for group in everything]) for metric in metrics}
    chance = {metric: f"{baseline[metric]:.{decimals[metric]}f}" if metric in baseline else "" for metric in metrics}
    row_labels = [label(report, name) for name in rows]
    chance_labels = ["chance", *[""] * (len(rows) - 1)]
    tables = []
    if columns is None:
        counted = {"restarts": lambda group: group.restarts, "failed": lambda group: group.failed}
        counted = {name: count for name, count in counted.items() if any(map(count, everything))}
        body = [
            [_text(value_label(report, value)) for value in group.key]
            + [_entry(group, metric, decimals[metric], say_n=False) for metric in metrics]
            + [str(len(group.finished))]
            + [str(count(group)) for count in counted.values()]
            for group in everything
        ]
        if baseline:
            body.append([*chance_labels, *chance.values(), *[""] * (1 + len(counted))])
        header = [*row_labels, *(label(report, metric) for metric in metrics), "n", *counted]
        tables.append(_markdown(header, body, keys=len(rows)))
    else:
        values = report["grid"][columns]
        for metric in metrics:
            body = []
            for start in range(0, len(everything), len(values)):
                row = everything[start : start + len(values)]
                entries = [_entry(group, metric, decimals[metric], say_n=True) for group in row]
                keys = [_text(value_label(report, value)) for value in row[0].key[: len(rows)]]
                body.append([*keys, *entries])
            if metric in baseline:
                body.append([*chance_labels, *[chance[metric]] * len(values)])
            header = [
                *row_labels,
                *(f"{label(report, columns)} = {_text(value_label(report, value))}" for value in values),
            ]
            title = f"**{label(report, metric)}**\n\n" if len(metrics) > 1 else ""
            tables.append(title + _markdown(header, body, keys=len(rows)))
    return "\n\n".join([*tables, _caption(report, everything)])


def claims_table(report: Mapping[str, Any]) -> str:
    """Write as markdown what was expected of an experiment, what was measured, and whether the two agree.

    Args:
        report: The report of an experiment, from `collect` or `read_report`.

    Returns:
        A row a claim: the mean over the seeds (of the differences, where two settings are compared) with the bounds;
        "" where the experiment claims nothing.

    Raises:
        ValueError: If a metric is not among those of a finished cell.
    """
    by_setting = {group.key: group for group in groups(report)}
    shown = shown_flags(report)
    rows = []
    for claim in report["claims"]:

        def by_seed(setting: Mapping[str, Any], metric: str = claim["metric"]) -> dict[int, float]:
            group = by_setting[tuple(setting[name] for name in shown)]
            seeds = [cell["flags"]["seed"] for cell in group.finished]
            return dict(zip(seeds, group.values(metric), strict=True))

        found, low, high = by_seed(claim["of"]), claim["at_least"], claim["at_most"]
        compared = isinstance(claim["over"], dict)
        other = by_seed(claim["over"]) if compared else dict.fromkeys(found, claim["over"])
        values = [found[seed] - other[seed] for seed in found if seed in other]
        bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", low), ("≤", high)) if bound is not None]
        what = label(report, claim["metric"]) + (", difference" if compared or claim["over"] else "")
        measured, agrees = "missing", ""
        if values:
            mean = float(np.mean(values))
            measured = mean_and_deviation(values, decimals_for([values]))
            agrees = "yes" if (low is None or mean >= low) and (high is None or mean <= high) else "**no**"
        rows.append([_text(claim["says"]), what, " and ".join(bounds), measured, agrees])
    return _markdown(["expected", "of", "bound", "measured", "agrees"], rows, keys=3) if rows else ""


def _caption(report: Mapping[str, Any], everything: Sequence[Group]) -> str:
    metrics = report["table"]["value"]
    what = f"{label(report, metrics[0])}: mean" if len(metrics) == 1 else "Mean"
    seeds = len(report["seeds"])
    finished = sum(len(group.finished) for group in everything)
    total = sum(len(group.cells) for group in everything)
    restarts, failed = sum(group.restarts for group in everything), sum(group.failed for group in everything)
    spread = " ± standard deviation" if seeds > 1 else ""
    parts = [f"{what}{spread} over {seeds} {'seeds' if seeds > 1 else 'seed'}; {finished} of {total} runs finished"]
    parts.append(f"{restarts} restart{'' if restarts == 1 else 's'} after a collapse" if restarts else "no restarts")
    parts.append(f"{failed} failed" if failed else "none failed")
    return ", ".join(parts) + "."
