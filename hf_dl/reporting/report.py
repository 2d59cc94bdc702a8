"""The report of an experiment: its description and the results of its cells, in memory and as one JSON file.

Tables, figures and cards are made from a report alone. The JSON file is committed, so they can be made again without
the runs.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .experiment import Claim, Experiment, Table, portable, read_curves, read_results, read_samples

MATRICES = "confusion"  # the key of the confusion matrix in results.json
NUM_SAMPLES = 4  # steps of training whose texts are kept per setting
MAX_CHARACTERS, MAX_LINES = 300, 12  # of a kept text
REPORTED_KEYS = (
    "script", "args", "local_paths", "metrics", "seed", "steps", "restarts", "seconds", "cpu_seconds",
    "num_parameters", "model_class", "device", "num_processes", "mixed_precision", "commit", "dirty", "versions",
    "date",
)  # fmt: skip
OWN_NUMBERS = ("seconds", "cpu_seconds", "num_parameters")  # numbers that every run reports in addition to its metrics


@dataclass(frozen=True)
class Group:
    """The cells of an experiment that differ only in the seed.

    Args:
        key: The values of the flags that the table shows, rows before columns.
        cells: The cells of a `Report`.
        optional: Metrics that a finished cell may lack.
    """

    key: tuple[Any, ...]
    cells: list[dict[str, Any]]
    optional: tuple[str, ...] = ()

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The cells with results."""
        return [cell for cell in self.cells if cell["status"] == "finished"]

    @property
    def failed(self) -> int:
        """Number of cells whose run ended with an error."""
        return sum(cell["status"] == "failed" for cell in self.cells)

    @property
    def restarts(self) -> int:
        """Number of restarts after a collapse of the training, summed over the seeds."""
        return sum(cell.get("restarts") or 0 for cell in self.finished)

    def by_seed(self, metric: str) -> dict[int, float]:
        """Return a metric of each finished cell by its seed.

        Args:
            metric: A metric of the cells, or one of `OWN_NUMBERS`.

        Returns:
            One number per finished cell, in the order of the seeds. Cells without an optional metric are left out.

        Raises:
            ValueError: If a finished cell does not have the metric, and the metric is not optional.
        """
        found = {}
        for cell in self.finished:
            own = {name: cell[name] for name in OWN_NUMBERS if cell.get(name) is not None}
            values = own | cell["metrics"]
            if metric in values:
                found[cell["flags"]["seed"]] = float(values[metric])
            elif metric not in self.optional:
                raise ValueError(
                    f"value={metric!r} is not among the metrics of cell {cell['id']}; it has "
                    f"{', '.join(sorted(cell['metrics']))}. Correct table.value of the experiment."
                )
        return found

    def values(self, metric: str) -> list[float]:
        """Return the numbers of `by_seed` without the seeds."""
        return [*self.by_seed(metric).values()]


@dataclass
class Report:
    """The results of an experiment.

    Args:
        experiment: The experiment.
        cells: One dict per cell: "id", "flags", "status" ("finished", "failed" or "missing"), and for finished cells
            the `REPORTED_KEYS` of results.json and the thinned "curves". The first seed also has the confusion matrix,
            if the run wrote one, and "samples" if the experiment asks for them.

    Example:
        >>> report = read_report("model_cards/slots_default.json")  # doctest: +SKIP
        >>> report.groups()[0].values("test_posterior_ari")  # doctest: +SKIP
    """

    experiment: Experiment
    cells: list[dict[str, Any]]

    @property
    def table(self) -> Table:
        """The flags and metrics that the table shows."""
        return self.experiment.table

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The cells with results."""
        return [cell for cell in self.cells if cell["status"] == "finished"]

    def shown_flags(self) -> tuple[str, ...]:
        """Return the flags that the table shows, rows before columns."""
        return self.table.flags

    def groups(self) -> list[Group]:
        """Group the cells by the flags that the table shows, in the order of the grid, columns innermost."""
        shown, optional = self.shown_flags(), self.experiment.optional
        return [
            Group(key, [cell for cell in self.cells if tuple(cell["flags"][name] for name in shown) == key], optional)
            for key in itertools.product(*(self.experiment.grid[name] for name in shown))
        ]

    def label(self, key: str) -> str:
        """Return the text for a flag or metric in tables and figures."""
        return self.experiment.labels.get(key, key.replace("_", " "))

    def value_label(self, value: Any) -> str:
        """Return the text for the value of a flag in tables and figures."""
        if isinstance(value, bool):
            return str(value).lower()
        return self.experiment.labels.get(value, value) if isinstance(value, str) else str(value)

    def setting_label(self, names: Sequence[str], values: Sequence[Any]) -> str:
        """Return the text for a setting in figures, such as "batch" or "K = 5": numbers get the name of their flag."""
        return ", ".join(
            self.value_label(value) if isinstance(value, str) else f"{self.label(name)} = {json.dumps(value)}"
            for name, value in zip(names, values, strict=True)
        )


def collect(experiment: Experiment, root: str | Path = "runs", *, previous: Report | None = None) -> Report:
    """Gather the results of every cell of an experiment.

    Args:
        experiment: The experiment.
        root: The folder that contains the runs.
        previous: An earlier report of the experiment, for a machine that has the report but not the runs. Its cells
            are used for cells that are missing in `root`, if script and flags are the same.

    Returns:
        The report. Absolute paths are cut to their last part.

    Raises:
        ValueError: If a run lacks a metric that `variants` names.
    """
    known = {cell["id"]: cell for cell in previous.finished} if previous else {}
    cells = []
    for cell in experiment.cells(root):
        entry: dict[str, Any] = {"id": cell.id, "flags": cell.flags}
        first_seed = cell.flags["seed"] == experiment.seeds[0]
        samples: list[dict[str, Any]] = []
        if cell.finished:
            results = read_results(cell.folder)
            entry |= {"status": "finished"} | {key: results[key] for key in REPORTED_KEYS if key in results}
            entry["script"] = cell.script  # with its folder, for scripts in a folder
            entry["args"] = {key: value for key, value in results["args"].items() if key != "output_dir"}
            missing = [name for name in cell.metrics.values() if name not in results["metrics"]]
            if missing:
                raise ValueError(
                    f"{cell.folder} has no metric {missing[0]!r}. Correct the key variants of the experiment."
                )
            own = {name: results["metrics"][metric] for name, metric in cell.metrics.items()}
            entry["metrics"] = {**results["metrics"], **own}
            entry["curves"] = read_curves(cell.folder, experiment.curves)
            if first_seed:
                samples = _choose_samples(read_samples(cell.folder)) if experiment.samples else []
                entry |= {MATRICES: results[MATRICES]} if MATRICES in results else {}
        elif cell.id in known:
            entry = dict(known[cell.id])
            samples = entry.pop("samples", [])
        elif cell.failure_file.is_file():
            entry |= {"status": "failed", **json.loads(cell.failure_file.read_text(encoding="utf-8"))}
        else:
            entry["status"] = "missing"
        if not experiment.confusion:
            entry.pop(MATRICES, None)
        entry = portable(entry)
        if samples and experiment.samples:  # texts may begin with a slash, and are not paths
            entry["samples"] = samples
        cells.append(entry)
    return Report(experiment, json.loads(json.dumps(cells)))


def _choose_samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return texts of at most `NUM_SAMPLES` steps, with the first and the last one, cut to the maximum length.

    Between these two, late steps are preferred: the texts of the first few steps are all noise.
    """
    count = min(NUM_SAMPLES, len(samples))
    chosen = [samples[math.ceil(i * (len(samples) - 1) / max(1, count - 1))] for i in range(count)]
    return [{"step": each["step"], "text": _cut_text(each["text"])} for each in chosen]


def _cut_text(text: str) -> str:
    """Cut a long text, and write invisible characters as the escapes of Python."""
    seen = "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text[:MAX_CHARACTERS]
    )
    lines = seen.split("\n")
    cut = len(text) > MAX_CHARACTERS or len(lines) > MAX_LINES
    return "\n".join(lines[:MAX_LINES]) + " …" * cut


def write_report(report: Report, path: str | Path) -> None:
    """Write a report as JSON, one line per cell, so that a changed cell is a changed line.

    Args:
        report: The report.
        path: The file to write.
    """
    head = json.dumps(asdict(report.experiment), indent=2, ensure_ascii=False)
    cells = ",\n".join("    " + json.dumps(cell, ensure_ascii=False) for cell in report.cells)
    text = head.removesuffix("\n}") + ',\n  "cells": [\n' + cells + "\n  ]\n}\n"
    Path(path).write_text(text, encoding="utf-8")


def read_report(path: str | Path) -> Report:
    """Read a report that `write_report` wrote.

    Args:
        path: The JSON file, such as model_cards/slots.json.

    Returns:
        The report.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is cut short or is not a report.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Run the experiment with scripts/run_experiment.py first.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}). Write it again with --only_report.") from error
    try:
        return _from_json(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the report of an experiment ({error}). Write it with scripts/run_experiment.py."
        ) from error


def _from_json(content: Mapping[str, Any]) -> Report:
    head = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    cells = list(head.pop("cells"))
    table = {key: tuple(value) if isinstance(value, list) else value for key, value in head.pop("table").items()}
    claims = tuple(Claim(**claim) for claim in head.pop("claims"))
    return Report(Experiment(**head, table=Table(**table), claims=claims), cells)
