"""The systems of the package and their main results, for `hf-dl list` and the table of the README.

systems.toml describes the systems. systems.json holds their results. scripts/make_front_page.py writes it from the
reports in model_cards/, so that an installed package has the numbers without the reports.
"""

import json
import math
import re
import statistics
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DESCRIPTIONS = Path(__file__).with_name("systems.toml")
RESULTS = Path(__file__).with_name("systems.json")


@dataclass(frozen=True)
class System:
    """A system as systems.toml describes it.

    Attributes:
        name: Key of the system.
        title: Use of the system, in a few words.
        command: `hf-dl` command whose runs gave the result.
        experiment: Name of the report in model_cards/.
        row: Flags that select the runs in the report.
        metric: Metric that is averaged over these runs.
        label: Name of the metric for readers.
        baseline: "chance", or a dict with `label` and either `metric` or `row`.
        space: Folder of its demo page in spaces/, or None.
        paper: Authors and year, or None.
        url: Address of the paper, or None.
    """

    name: str
    title: str
    command: str
    experiment: str
    row: dict[str, Any]
    metric: str
    label: str
    baseline: str | dict[str, Any]
    space: str | None = None
    paper: str | None = None
    url: str | None = None

    @property
    def card(self) -> str:
        """The path of the model card in the repository."""
        return f"model_cards/{self.experiment}.md"


def read_systems() -> list[System]:
    """Read systems.toml."""
    described = tomllib.loads(DESCRIPTIONS.read_text(encoding="utf-8"))
    return [System(name=name, **fields) for name, fields in described.items()]


def read_results() -> dict[str, dict[str, Any]]:
    """Read the results of all systems from systems.json, by the system's name; see `summarize`."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def summarize(system: System, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the main result of a system.

    Args:
        system: The system.
        report: The JSON of its experiment in model_cards/.

    Returns:
        Four entries. `result` has the mean and the sample standard deviation over the runs, such as "0.912 ± 0.008".
        `baseline` is a text such as "chance 0.000". `runs` is the number of runs. `time` has the mean time of a run
        and the number of CPU cores that it used.

    Raises:
        ValueError: If no finished run of the report matches the system's row.
    """
    cells = _select(system, report, system.row)
    values = [cell["metrics"][system.metric] for cell in cells]
    decimals = _decimals(values)
    if isinstance(system.baseline, str):
        name, baseline = system.baseline, report["table"]["baseline"][system.metric]
    else:
        row, metric = system.baseline.get("row", system.row), system.baseline.get("metric", system.metric)
        name = system.baseline["label"]
        baseline = statistics.mean(cell["metrics"][metric] for cell in _select(system, report, row))
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return {
        "result": f"{statistics.mean(values):.{decimals}f}{spread}",
        "baseline": f"{name} {baseline:.{decimals}f}",
        "runs": len(values),
        "time": _time(cells),
    }


def _select(system: System, report: Mapping[str, Any], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    matching = (cell for cell in report["cells"] if all(cell["flags"].get(key) == row[key] for key in row))
    cells = [cell for cell in matching if cell["status"] == "finished"]
    if not cells:
        raise ValueError(
            f"{system.experiment}.json has no finished run with {dict(row)} for the system {system.name!r}."
        )
    return cells


def _decimals(values: list[float]) -> int:
    """Return how many decimals show the standard deviation with one digit, or with two if it begins with 1, 2 or 3."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    if deviation > 0:
        decimals = 1 - math.floor(math.log10(deviation / 0.35))
    else:
        decimals = 3 - math.floor(math.log10(abs(values[0]))) - 1 if values[0] else 1
    return min(max(decimals, 1 if abs(values[0]) >= 10 else 2), 4)


def _time(cells: list[dict[str, Any]]) -> str:
    """Return the mean time of a run and the number of CPU threads, which the report names with the processor.

    CPU time on one thread if it was recorded, because other jobs and pauses do not count. Otherwise wall-clock time.
    """
    threads = re.search(r"(\d+) threads?", cells[0]["device"])
    alone = threads and threads[1] == "1" and all(cell.get("cpu_seconds") for cell in cells)
    seconds = statistics.mean(cell["cpu_seconds" if alone else "seconds"] for cell in cells)
    time = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    if not threads:
        return time
    return f"{time}, {threads[1]} {'core' if threads[1] == '1' else 'cores'}"


def describe(system: System, result: Mapping[str, Any]) -> str:
    """Return the lines of `hf-dl list` about a system."""
    runs = f"; mean of {result['runs']} runs" if result["runs"] > 1 else ""
    page = f"\n  page    hf-dl demo {system.space}" if system.space else ""
    paper = f"\n  paper   {system.paper}, {system.url}" if system.paper else ""
    return (
        f"{system.title}\n"
        f"  run     hf-dl {system.command}   ({result['time']} per run)\n"
        f"  result  {system.label} {result['result']} ({result['baseline']}{runs})\n"
        f"  card    {system.card}{page}{paper}"
    )
