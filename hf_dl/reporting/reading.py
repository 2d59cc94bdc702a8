"""Texts about results whose numbers come from the report.

The key `reading` of an experiment file explains its results. Its numbers are placeholders:

- `{norm=batch, batch_size=8: test_accuracy}` is the mean of the metric over the seeds of this setting.
- `{norm=batch: test_accuracy %}` is the same in percent.
- `{test_accuracy}` is enough if the experiment has one setting. A flag with one value can always be left out.

Nothing is evaluated. The metric gets the same number of decimals as in the table; percentages have at most one.
"""

import re

import numpy as np

from .report import Group, Report
from .tables import column_decimals, decimals_for

_PLACEHOLDER = re.compile(r"\{[^{}]*\}")
_CONTENT = re.compile(r"\{(?:(?P<setting>.+):)?\s*(?P<metric>\w+)\s*(?P<percent>%)?\s*\}", re.DOTALL)
_TYPED = re.compile(r"\d+\.\d+|\d+\s*%")


def fill_reading(report: Report) -> str:
    """Return the text `reading` of an experiment with all placeholders replaced by numbers.

    Args:
        report: The report.

    Returns:
        The text, or "" without one. A setting without a finished run gives "(missing)", and so does an optional
        metric that its runs do not have.

    Raises:
        ValueError: If a placeholder does not name a setting and a metric of the report. Also if the text contains a
            decimal number or a percentage that is not a placeholder.
    """
    text = report.experiment.reading
    if typed := _TYPED.search(_PLACEHOLDER.sub("", text)):
        raise ValueError(
            f"{report.experiment.name}.toml: reading contains the number {typed[0]!r}. Write a placeholder such as "
            "{flag=value: metric}, so that it is read from the results."
        )
    text = _PLACEHOLDER.sub(lambda found: _number(report, found[0]), text)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _number(report: Report, placeholder: str) -> str:
    where = f"{report.experiment.name}.toml: reading: {placeholder}"
    content = _CONTENT.fullmatch(placeholder)
    if not content:
        raise ValueError(f"{where} is not a placeholder. Write {{flag=value, flag=value: metric}}.")
    group = _group(report, content["setting"] or "", where)
    if not group.finished:
        return "(missing)"
    metric = content["metric"]
    try:
        values = group.values(metric)
    except ValueError:
        known = ", ".join(sorted(group.finished[0]["metrics"]))
        raise ValueError(f"{where}: the metric {metric!r} is unknown. The metrics are {known}.") from None
    if not values:  # an optional metric
        return "(missing)"
    decimals = column_decimals(report, report.groups()).get(metric, decimals_for([values]))
    mean = float(np.mean(values))
    if content["percent"]:
        return f"{100 * mean:.{min(1, max(0, decimals - 2))}f} %"
    return f"{mean:,.{decimals}f}"


def _group(report: Report, setting: str, where: str) -> Group:
    shown, grid = report.shown_flags(), report.experiment.grid
    given = {}
    # A value may contain a comma, if no flag and equals sign follow it.
    for part in filter(None, (part.strip() for part in re.split(r",(?=\s*\w+\s*=)", setting))):
        name, equals, value = (text.strip() for text in part.partition("="))
        if not equals or name not in shown:
            raise ValueError(
                f"{where}: {part!r} is not a flag of the table with a value. The flags are {list(shown)}."
            )
        known = {str(known): known for known in grid[name]}
        if value not in known:
            raise ValueError(f"{where}: {value!r} is not a value of {name!r}. The values are {list(known)}.")
        given[name] = known[value]
    missing = [name for name in shown if name not in given and len(grid[name]) > 1]
    if missing:
        raise ValueError(f"{where} does not set {missing[0]!r}. Its values are {grid[missing[0]]}.")
    key = tuple(given.get(name, grid[name][0]) for name in shown)
    return next(group for group in report.groups() if group.key == key)
