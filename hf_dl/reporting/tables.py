"""The tables of an experiment in Markdown: mean ± standard deviation over the seeds.

The standard deviation is the sample standard deviation (n - 1 in the denominator). It shows how much single runs
differ; a group with one run has none. Groups without a finished run are shown as missing or failed.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .report import Group, Report

MAX_COLUMNS = 6  # a wider table does not fit the page of a card
SPLITS = {"test": "test", "situations": "new situations", "val": "validation", "train": "training"}  # test comes first


def split_of(metric: str) -> str:
    """Return the prefix of a metric that names its data split, such as "test", or "" if it has none.

    Example:
        >>> split_of("test_accuracy"), split_of("seconds")
        ('test', '')
    """
    prefix, _, rest = metric.partition("_")
    return prefix if rest and prefix in SPLITS else ""


def decimals_for(values: Sequence[Sequence[float]]) -> int:
    """Choose the number of decimals of a column, so that its numbers line up and show no more than is known.

    Args:
        values: The values of each group of the column.

    Returns:
        The number of decimals, between 0 and 6. The median standard deviation gets one significant digit, or two if
        the first is below 3.5. Without a standard deviation, the largest value gets four significant digits.
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
    """Format the mean and the sample standard deviation of some runs.

    Args:
        values: One number per run, at least one.
        decimals: Number of decimals.

    Returns:
        The text, such as "0.912 ± 0.015", or only the mean for a single run. A count that is the same in all runs has
        no deviation.

    Example:
        >>> mean_and_deviation([0.9, 0.92, 0.94], 3), mean_and_deviation([143001, 143001], 0)
        ('0.920 ± 0.020', '143,001')
    """
    if decimals == 0 and len(set(values)) == 1 and float(values[0]).is_integer():
        return f"{int(values[0]):,}"
    mean = f"{np.mean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{decimals}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, keys: int) -> str:
    """Write a Markdown table whose source is aligned too.

    Args:
        header: The titles of the columns.
        rows: The rows, as long as the header.
        keys: Number of columns from the left that are aligned to the left; the others are aligned to the right.

    Returns:
        The table.
    """
    header, rows = [_escape(text) for text in header], [[_escape(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{text:{'<' if i < keys else '>'}{widths[i]}}" for i, text in enumerate(row)) + " |"
        for row in (header, *rows)
    ]
    rule = "|" + "|".join("-" * (width + 2) if i < keys else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return "\n".join([lines[0], rule + "|", *lines[1:]])


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def results_table(report: Report) -> str:
    """Write the results of an experiment as Markdown tables of at most `MAX_COLUMNS` columns.

    Rows are settings and columns are metrics. If the metrics need more columns, they are divided over several tables:
    one table per data split if all splits have the same metrics, otherwise in their order. A single setting with many
    metrics becomes one row per metric. If the experiment names `columns`, there is one table per metric.

    A row "chance" shows the baselines. A dash replaces an optional metric that no run of the setting has. Columns
    count the finished runs (n) and, if there are any, the restarts and the failed runs. A sentence below describes
    the numbers.

    Args:
        report: The report.

    Returns:
        The tables and the sentence.

    Raises:
        ValueError: If a finished cell does not have a metric of the table that is not optional.
    """
    groups = report.groups()
    decimals = column_decimals(report, groups)
    if report.table.columns is not None:
        tables = _tables_by_column(report, groups, decimals)
    else:
        counted = _counted(groups)
        width = len(report.table.rows) + len(report.table.value) + len(counted)
        if len(groups) == 1 and width > MAX_COLUMNS:
            tables = [_table_of_one_setting(report, groups[0], decimals)]
        else:
            tables = _tables_of_settings(report, groups, decimals, counted)
    return "\n\n".join([*tables, _caption(report, groups)])


def column_decimals(report: Report, groups: Sequence[Group]) -> dict[str, int]:
    """Return the number of decimals of each metric of the table."""
    return {metric: decimals_for([group.values(metric) for group in groups]) for metric in report.table.value}


def _counted(groups: Sequence[Group]) -> dict[str, Callable[[Group], int]]:
    """Return the columns that count runs."""
    counted = {"restarts": lambda group: group.restarts, "failed": lambda group: group.failed}
    counted = {name: count for name, count in counted.items() if any(map(count, groups))}
    return {"n": lambda group: len(group.finished), **counted}


def _entry(group: Group, metric: str, decimals: int, *, show_n: bool) -> str:
    if not group.finished:
        return "failed" if group.failed else "missing"
    values = group.values(metric)
    if not values:  # an optional metric
        return "–"
    text, expected = mean_and_deviation(values, decimals), len(group.cells if show_n else group.finished)
    return f"{text} (n = {len(values)})" if len(values) < expected else text


def _chance(report: Report, metric: str, decimals: Mapping[str, int]) -> str:
    baseline = report.table.baseline
    return f"{baseline[metric]:.{decimals[metric]}f}" if metric in baseline else ""


def _pages(metrics: Sequence[str], *, first: int, other: int) -> list[tuple[str, list[str]]]:
    """Divide metrics over tables.

    Args:
        metrics: The metrics.
        first: Maximum number of metrics in the first table.
        other: Maximum number of metrics in the other tables.

    Returns:
        A title, or "", and the metrics of each table.
    """
    if len(metrics) <= first:
        return [("", list(metrics))]
    by_split = {split: [m for m in metrics if split_of(m) == split] for split in ("", *SPLITS)}
    by_split = {split: found for split, found in by_split.items() if found}
    kinds = {tuple(m.removeprefix(split) for m in found) for split, found in by_split.items()}
    if len(by_split) > 1 and len(kinds) == 1 and max(map(len, by_split.values())) <= first:
        return [(SPLITS[split], found) for split, found in by_split.items()]
    count = 1 + math.ceil((len(metrics) - first) / other)
    pages, rest = [], list(metrics)
    for number in range(count):
        size = min(first if number == 0 else other, math.ceil(len(rest) / (count - number)))
        pages.append(("", rest[:size]))
        rest = rest[size:]
    return pages


def _tables_of_settings(
    report: Report, groups: Sequence[Group], decimals: Mapping[str, int], counted: Mapping[str, Callable[[Group], int]]
) -> list[str]:
    """Write a row per setting and a column per metric; the first table also counts the runs."""
    rows = report.table.rows
    room = MAX_COLUMNS - len(rows)
    tables = []
    for title, metrics in _pages(report.table.value, first=room - len(counted), other=room):
        counts = {} if tables else counted
        body = [
            [report.value_label(value) for value in group.key]
            + [_entry(group, metric, decimals[metric], show_n=False) for metric in metrics]
            + [str(count(group)) for count in counts.values()]
            for group in groups
        ]
        chance = [_chance(report, metric, decimals) for metric in metrics]
        if any(chance):
            body.append(["chance", *[""] * (len(rows) - 1), *chance, *[""] * len(counts)])
        header = [report.label(name) for name in (*rows, *metrics)] + [*counts]
        table = markdown_table(header, body, keys=len(rows))
        tables.append(f"**{title}**\n\n{table}" if title else table)
    return tables


def _table_of_one_setting(report: Report, group: Group, decimals: Mapping[str, int]) -> str:
    """Write a row per metric."""
    body = [
        [report.label(metric), _entry(group, metric, decimals[metric], show_n=True), _chance(report, metric, decimals)]
        for metric in report.table.value
    ]
    setting = report.setting_label(report.table.rows, group.key)
    header = ["metric", setting, "chance"]
    if not report.table.baseline:
        header, body = header[:2], [row[:2] for row in body]
    return markdown_table(header, body, keys=1)


def _tables_by_column(report: Report, groups: Sequence[Group], decimals: Mapping[str, int]) -> list[str]:
    """Write a table per metric, with a row per setting and a column per value of the flag `columns`."""
    rows, columns, metrics = report.table.rows, report.table.columns, report.table.value
    values = report.experiment.grid[columns]
    room = MAX_COLUMNS - len(rows)
    tables = []
    for metric in metrics:
        chance = _chance(report, metric, decimals)
        for first in range(0, len(values), room):
            shown = values[first : first + room]
            body = []
            for start in range(0, len(groups), len(values)):
                row = groups[start + first : start + first + len(shown)]
                entries = [_entry(group, metric, decimals[metric], show_n=True) for group in row]
                body.append([*(report.value_label(value) for value in row[0].key[: len(rows)]), *entries])
            if chance:
                body.append(["chance", *[""] * (len(rows) - 1), *[chance] * len(shown)])
            header = [report.label(name) for name in rows]
            header += [f"{report.label(columns)} = {report.value_label(value)}" for value in shown]
            title = f"**{report.label(metric)}**\n\n" if len(metrics) > 1 and not first else ""
            tables.append(title + markdown_table(header, body, keys=len(rows)))
    return tables


def claims_table(report: Report) -> str:
    """Write the claims of an experiment as a Markdown table: expectation, bound, measured value, and the verdict.

    Args:
        report: The report.

    Returns:
        One row per claim, or "" without claims. The measured value is the mean over the seeds. For two settings it is
        the mean of the differences per seed.

    Raises:
        ValueError: If a finished cell does not have a metric of a claim.
    """
    by_setting = {group.key: group for group in report.groups()}
    rows = []
    for claim in report.experiment.claims:

        def by_seed(setting: Mapping[str, object], metric: str = claim.metric) -> dict[int, float]:
            return by_setting[tuple(setting[name] for name in report.shown_flags())].by_seed(metric)

        found, low, high = by_seed(claim.of), claim.at_least, claim.at_most
        compared = isinstance(claim.over, dict)
        other = by_seed(claim.over) if compared else dict.fromkeys(found, claim.over)
        values = [found[seed] - other[seed] for seed in found if seed in other]
        bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", low), ("≤", high)) if bound is not None]
        metric = report.label(claim.metric) + (", difference" if compared or claim.over else "")
        measured, holds = "missing", ""
        if values:
            mean = float(np.mean(values))
            measured = mean_and_deviation(values, decimals_for([values]))
            holds = "yes" if (low is None or mean >= low) and (high is None or mean <= high) else "**no**"
        rows.append([claim.says, metric, " and ".join(bounds), measured, holds])
    return markdown_table(["expected", "metric", "bound", "measured", "holds"], rows, keys=3) if rows else ""


def _caption(report: Report, groups: Sequence[Group]) -> str:
    metrics, planned = report.table.value, len(report.experiment.seeds)
    seeds = max((len(group.finished) for group in groups), default=0)
    finished, total = sum(len(group.finished) for group in groups), sum(len(group.cells) for group in groups)
    restarts, failed = sum(group.restarts for group in groups), sum(group.failed for group in groups)
    kind = "Results" if seeds < 2 else "Mean ± standard deviation"
    count = f"{seeds} of {planned} planned seeds" if seeds < planned else f"{seeds} seed{'' if seeds == 1 else 's'}"
    over = "of" if seeds < 2 else "over"
    subject = f"{report.label(metrics[0])}: {kind.lower()}" if len(metrics) == 1 else kind
    restarted = f"{restarts} restart{'' if restarts == 1 else 's'} after a collapse" if restarts else "no restarts"
    text = (
        f"{subject} {over} {count}; {finished} of {total} runs finished, "
        f"{restarted}, {f'{failed} failed' if failed else 'none failed'}."
    )
    return text + _note_on_micro_f1(report)


def _note_on_micro_f1(report: Report) -> str:
    """Say that micro F1 equals accuracy, if the table shows micro F1 and the two are equal in every run."""
    pairs = [(metric, metric.replace("micro_f1", "accuracy")) for metric in report.table.value if "micro_f1" in metric]
    scores = [cell["metrics"] for cell in report.finished]
    if not pairs or not all(math.isclose(s[one], s.get(two, math.nan)) for s in scores for one, two in pairs):
        return ""
    return " Micro F1 equals accuracy here, because each example has exactly one true and one predicted class."
