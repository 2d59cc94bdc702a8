"""Experiment files, the folders of their runs, and the one JSON that everything else of a report is made from.

An experiment is a TOML file that names a script, the flags that stay fixed, the flags that vary and the seeds:

```toml
script = "train_classifier.py"
question = "Does the choice of normalization change accuracy at small batches?"
expect = "group >= batch at batch size 8 (Wu & He 2018)"
seeds = [0, 1, 2]
fixed = { source = "synthetic", max_steps = 2000 }
grid = { norm = ["batch", "group"], batch_size = [8, 128] }
table = { rows = "norm", columns = "batch_size", value = "test_accuracy", baseline = 0.04 }
curves = ["loss", "val_loss"]                # optional: the curves; by default loss, val_loss and the values
labels = { test_accuracy = "test accuracy" } # optional: how keys and texts are written in tables and figures
notes = { batch = "torch's default" }        # optional: what to know of a value of the table's first flag
figures = ["speed.svg"]                      # optional: further figures that lie beside the card
confusion = false                            # optional: leave the confusion matrices out, as they are large

[[claims]]                                   # optional: what `expect` says, in a form that the card can check:
says = "group is level with batch or ahead at batch size 8"
metric = "test_accuracy"
of = { norm = "group", batch_size = 8 }      # the mean of this setting,
over = { norm = "batch", batch_size = 8 }    # less that of this one, or less a number; less nothing by default,
at_least = -0.01                             # is at least this; or at_most, or both

[variants.decoder.diffusion]                 # optional: what a value of the grid stands for, if it is no flag;
script = "train_slot_diffusion.py"           # each may have a script of its own,
flags = { autoencoder = "runs/{style}" }     # flags of its own, which may name other flags in braces,
metrics = { ari = "test_attention_ari" }     # and names of its own for the metrics of the table;
after = { decoder = "broadcast" }            # it runs after the cell that differs in this, whose folder is {after}
```

A cell is one point of the grid with one seed; its folder is named by a hash of the script and its flags, so a changed
flag is another cell and an unchanged one is not run again.
"""

import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

RESULT_KEYS = ("script", "args", "metrics")
MATRICES = "confusion"  # the key under which results.json may hold a confusion matrix
REPORTED_KEYS = (
    "script", "args", "metrics", "seed", "steps", "restarts", "seconds", "cpu_seconds", "num_parameters",
    "model_class", "device", "num_processes", "mixed_precision", "commit", "dirty", "versions", "date",
)  # fmt: skip
OWN_NUMBERS = ("seconds", "cpu_seconds", "num_parameters")  # what every run tells of itself, beside its metrics
RESERVED_FLAGS = ("seed", "output_dir")
OPTIONAL_KEYS = ("fixed", "grid", "curves", "labels", "notes", "figures", "confusion", "claims", "variants")
VARIANT_KEYS = ("script", "flags", "metrics", "after")


@dataclass(frozen=True)
class Table:
    """Which flags make the rows and columns of a report's table, and which metrics fill it.

    Args:
        rows: One or two flags of the grid.
        value: The metrics of results.json that are shown; also `OWN_NUMBERS`.
        columns: A flag of the grid, or None for one column a metric.
        baseline: Chance level (or another known reference) of each metric, by metric.
    """

    rows: tuple[str, ...]
    value: tuple[str, ...]
    columns: str | None = None
    baseline: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """What is expected of an experiment: a bound on the mean of a metric in one setting, or on that of a difference.

    Args:
        says: The expectation in words.
        metric: A metric of results.json, or one of `OWN_NUMBERS`.
        of: The setting: a value for each flag that the table shows.
        over: What is taken off: the mean of another setting, or a number.
        at_least: The least value that agrees.
        at_most: The greatest.
    """

    says: str
    metric: str
    of: dict[str, Any]
    over: dict[str, Any] | float = 0.0
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Args:
        flags: Its place in the grid, the fixed flags and the seed.
        folder: The folder that it writes to.
        script: The script that runs it.
        given: The flags that the script is started with: `flags`, but for those that name a variant, whose own flags
            stand in their place.
        metrics: What the table calls the metrics of this script, and what the script calls them.
        after: The cell that has to be finished before this one runs, as it starts from its folder.
    """

    flags: dict[str, Any]
    folder: Path
    script: str
    given: dict[str, Any]
    metrics: dict[str, str] = field(default_factory=dict)
    after: "Cell | None" = None

    @property
    def id(self) -> str:
        """The hash that names the folder."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether the folder holds a readable results.json."""
        try:
            read_results(self.folder)
        except (OSError, ValueError):
            return False
        return True

    @property
    def failure_file(self) -> Path:
        """Where a failed run leaves its last words; beside the folder, which the script may clear."""
        return self.folder.with_suffix(".failed.json")


@dataclass(frozen=True)
class Experiment:
    """A parsed experiment file; see the module for the format."""

    name: str
    script: str
    question: str
    expect: str
    seeds: tuple[int, ...]
    table: Table
    fixed: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    curves: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    figures: tuple[str, ...] = ()
    confusion: bool = True
    claims: tuple[Claim, ...] = ()
    variants: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def cells(self, root: str | Path = "runs") -> list[Cell]:
        """List every cell: the product of the grid, and each seed of each point.

        Args:
            root: The folder that holds the runs; a cell lies in `<root>/<name>/<hash>`.

        Returns:
            The cells, in the order of the grid, seeds innermost.
        """
        points = itertools.product(*self.grid.values(), self.seeds)
        return [
            self._cell({**self.fixed, **dict(zip(self.grid, point, strict=True)), "seed": seed}, Path(root))
            for *point, seed in points
        ]

    def _cell(self, flags: dict[str, Any], root: Path) -> Cell:
        given = {name: value for name, value in flags.items() if name not in self.variants}
        script, metrics, after = self.script, {}, None
        for variant in (variants[flags[name]] for name, variants in self.variants.items()):
            script = variant.get("script", script)
            given |= variant.get("flags", {})
            metrics |= variant.get("metrics", {})
            if "after" in variant:
                after = self._cell(flags | variant["after"], root)
        given = {name: _filled(value, flags) for name, value in given.items()}
        # The folder of the other cell is named by its hash alone, so that this one does not depend on `root`.
        hashed = {name: _filled(value, {"after": after.id}) for name, value in given.items()} if after else given
        digest = hashlib.sha256(json.dumps([script, hashed], sort_keys=True).encode()).hexdigest()[:10]
        if after:
            given = {name: _filled(value, {"after": after.folder}) for name, value in given.items()}
        return Cell(flags, root / self.name / digest, script, given, metrics, after)


def _filled(value: Any, flags: Mapping[str, Any]) -> Any:
    """A text with the values of the flags that it names in braces."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\{(\w+)\}", lambda found: str(flags.get(found[1], found[0])), value)


def _names(value: Any, what: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{what}={value!r} is not a name or a list of names; write a metric or flag in quotes.")
    if len(set(names)) != len(names):
        raise ValueError(f"{what}={value!r} names the same thing twice; remove one.")
    return tuple(names)


def _expect_keys(given: Mapping[str, Any], *, required: Sequence[str], optional: Sequence[str], where: str) -> None:
    unknown = [key for key in given if key not in (*required, *optional)]
    if unknown:
        known = ", ".join((*required, *optional))
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; the known keys are {known}.")
    missing = [key for key in required if key not in given]
    if missing:
        raise ValueError(f"{where} lacks the key {missing[0]!r}; add it.")


def _read_table(given: Any, grid: Mapping[str, Any], where: str) -> Table:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: table={given!r} is not a table; write table = {{ rows = ..., value = ... }}.")
    _expect_keys(given, required=("rows", "value"), optional=("columns", "baseline"), where=f"{where}: table")
    rows, value = _names(given["rows"], f"{where}: table.rows"), _names(given["value"], f"{where}: table.value")
    columns = given.get("columns")
    if columns is not None and not isinstance(columns, str):
        raise ValueError(f"{where}: table.columns={columns!r} is not the name of one flag of the grid.")
    if len(rows) > 2:
        raise ValueError(f"{where}: table.rows={list(rows)} has {len(rows)} flags; name one or two.")
    shown = rows if columns is None else (*rows, columns)
    for name in shown:
        if name not in grid:
            raise ValueError(f"{where}: the table shows {name!r}, which the grid does not vary; it has {list(grid)}.")
    if columns in rows:
        raise ValueError(f"{where}: table.columns={columns!r} is among the rows as well; name it once.")
    hidden = [name for name, values in grid.items() if name not in shown and len(values) > 1]
    if hidden:
        raise ValueError(
            f"{where}: the grid varies {hidden[0]!r}, which the table does not show, so runs with different settings "
            "would be averaged; add it to table.rows or table.columns."
        )
    baseline = given.get("baseline", {})
    if isinstance(baseline, (int, float)) and not isinstance(baseline, bool) and len(value) == 1:
        baseline = {value[0]: float(baseline)}
    if not isinstance(baseline, dict) or not all(
        name in value and isinstance(number, (int, float)) for name, number in baseline.items()
    ):
        raise ValueError(
            f"{where}: table.baseline={baseline!r} is neither a number (for a single value) nor a table from the "
            f"names in value, {list(value)}, to numbers."
        )
    return Table(rows=rows, value=value, columns=columns, baseline=baseline)


def _read_claims(given: Any, grid: Mapping[str, Any], shown: Sequence[str], where: str) -> tuple[Claim, ...]:
    if not isinstance(given, list) or not all(isinstance(claim, dict) for claim in given):
        raise ValueError(f"{where}: claims={given!r} is not a list of tables; write [[claims]] above each.")
    for number, claim in enumerate(given, start=1):
        place = f"{where}: claim {number}"
        _expect_keys(claim, required=("says", "metric", "of"), optional=("over", "at_least", "at_most"), where=place)
        for key in ("says", "metric"):
            if not isinstance(claim[key], str) or not claim[key].strip():
                raise ValueError(f"{place}: {key}={claim[key]!r} is empty or not a text.")
        bounds = [claim[key] for key in ("at_least", "at_most") if key in claim]
        if not bounds or any(isinstance(bound, bool) or not isinstance(bound, (int, float)) for bound in bounds):
            raise ValueError(f"{place} needs a number as at_least or at_most, or both.")
        over = claim.get("over", 0.0)
        for key, setting in (("of", claim["of"]), ("over", over)):
            if key == "over" and isinstance(setting, (int, float)) and not isinstance(setting, bool):
                continue
            if (
                not isinstance(setting, dict)
                or set(setting) != set(shown)
                or any(value not in grid[name] for name, value in setting.items())
            ):
                raise ValueError(
                    f"{place}: {key}={setting!r} is no setting of the table; give {' and '.join(shown)} a value of "
                    "the grid."
                )
    return tuple(Claim(**claim) for claim in given)


def _read_variants(given: Any, fixed: Mapping[str, Any], grid: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(variants, dict) for variants in given.values()):
        raise ValueError(f"{where}: variants={given!r} is not a table; write [variants.flag.value] above each.")
    for name, variants in given.items():
        if name not in grid:
            raise ValueError(f"{where}: variants.{name} is about no flag of the grid; it has {list(grid)}.")
        if sorted(variants) != sorted(map(str, grid[name])) or not all(isinstance(v, str) for v in grid[name]):
            raise ValueError(
                f"{where}: variants.{name} has {list(variants)}, expected the values of the grid, all texts: "
                f"{grid[name]}."
            )
        for value, variant in variants.items():
            place = f"{where}: variants.{name}.{value}"
            if not isinstance(variant, dict):
                raise ValueError(f"{place}={variant!r} is not a table.")
            _expect_keys(variant, required=(), optional=VARIANT_KEYS, where=place)
            if not isinstance(variant.get("script", "train.py"), str):
                raise ValueError(f"{place}: script={variant['script']!r} is not a text.")
            flags, metrics = variant.get("flags", {}), variant.get("metrics", {})
            if not isinstance(flags, dict) or any(flag in (*grid, *fixed, *RESERVED_FLAGS) for flag in flags):
                raise ValueError(
                    f"{place}: flags={flags!r} is not a table of flags that neither grid nor fixed nor the experiment "
                    "itself sets."
                )
            if not isinstance(metrics, dict) or not all(isinstance(metric, str) for metric in metrics.values()):
                raise ValueError(f"{place}: metrics={metrics!r} is not a table from names to metrics of the script.")
            after = variant.get("after", {})
            if not isinstance(after, dict) or not all(v in grid.get(flag, []) for flag, v in after.items()):
                raise ValueError(f"{place}: after={after!r} is not a table from flags of the grid to their values.")
            if any("after" in given[flag][v] for flag, v in after.items() if flag in given):
                raise ValueError(f"{place}: after={after!r} names a variant that itself runs after another one.")
            if "after" in variant and after.get(name) in (None, value):
                raise ValueError(f"{place}: after={after!r} names no other value of {name!r}.")
    return given


def read_experiment(path: str | Path) -> Experiment:
    """Read an experiment file, and refuse what cannot be meant.

    Args:
        path: A TOML file in the format that the module describes.

    Returns:
        The experiment, named after the file.

    Raises:
        ValueError: If the file is not TOML, has an unknown or missing key, or a table that does not fit its grid.
        FileNotFoundError: If there is no such file.

    Example:
        >>> experiment = read_experiment("scripts/experiments/slots.toml")
        >>> experiment.name, experiment.script
        ('slots', 'train_slots.py')
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file; name an experiment such as slots.toml.")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not valid TOML: {error}.") from error
    where = path.name
    required = ("script", "question", "expect", "seeds", "table")
    _expect_keys(given, required=required, optional=OPTIONAL_KEYS, where=where)
    for key in ("script", "question", "expect"):
        if not isinstance(given[key], str) or not given[key].strip():
            raise ValueError(f"{where}: {key}={given[key]!r} is empty or not a text; write a sentence in quotes.")
    seeds = given["seeds"]
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(type(seed) is int and seed >= 0 for seed in seeds)
        or len(set(seeds)) != len(seeds)
    ):
        raise ValueError(f"{where}: seeds={seeds!r} is not a list of different non-negative whole numbers.")
    fixed, grid = given.get("fixed", {}), given.get("grid", {})
    for key, flags in (("fixed", fixed), ("grid", grid)):
        if not isinstance(flags, dict):
            raise ValueError(f"{where}: {key}={flags!r} is not a table of flags.")
        reserved = [name for name in RESERVED_FLAGS if name in flags]
        if reserved:
            raise ValueError(f"{where}: {key} sets {reserved[0]!r}, which the experiment sets itself; remove it.")
    for name, values in grid.items():
        if not isinstance(values, list) or not values or any(isinstance(value, (dict, list)) for value in values):
            raise ValueError(f"{where}: grid.{name}={values!r} is not a list of values to try.")
        if len({json.dumps(value) for value in values}) != len(values):
            raise ValueError(f"{where}: grid.{name}={values!r} has a value twice; remove one.")
        if name in fixed:
            raise ValueError(f"{where}: {name!r} is both fixed and in the grid; keep one of them.")
    if not isinstance(given.get("confusion", True), bool):
        raise ValueError(f"{where}: confusion={given['confusion']!r} is neither true nor false.")
    labels, notes = given.get("labels", {}), given.get("notes", {})
    for key, texts in (("labels", labels), ("notes", notes)):
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"{where}: {key}={texts!r} is not a table from keys to texts.")
    table = _read_table(given["table"], grid, where)
    known = [str(value) for value in grid[table.rows[0]]]
    unknown = [name for name in notes if name not in known]
    if unknown:
        raise ValueError(
            f"{where}: notes speak of {unknown[0]!r}, which is no value of {table.rows[0]!r}; it has {known}."
        )
    shown = table.rows if table.columns is None else (*table.rows, table.columns)
    curves = ("loss", "val_loss", *table.value)
    if "curves" in given:
        curves = _names(given["curves"], f"{where}: curves")
    return Experiment(
        name=path.stem, script=given["script"], question=given["question"], expect=given["expect"],
        seeds=tuple(seeds), table=table, fixed=fixed, grid=grid, curves=tuple(dict.fromkeys(curves)), labels=labels,
        notes=notes, figures=_names(given["figures"], f"{where}: figures") if "figures" in given else (),
        confusion=given.get("confusion", True),
        claims=_read_claims(given.get("claims", []), grid, shown, where),
        variants=_read_variants(given.get("variants", {}), fixed, grid, where),
    )  # fmt: skip


def portable(value: Any) -> Any:
    """Cut absolute paths, which mean nothing on another machine, down to their last part.

    Args:
        value: Anything that JSON can hold; dicts and lists are walked.

    Returns:
        The value with every text that is an absolute path replaced by its last part.

    Example:
        >>> portable({"output_dir": "/home/me/runs/slots", "num_slots": 5})
        {'output_dir': 'slots', 'num_slots': 5}
    """
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    if isinstance(value, str):
        for path in (PurePosixPath(value), PureWindowsPath(value)):
            if path.is_absolute():
                return path.name
    return value


def read_results(folder: str | Path) -> dict[str, Any]:
    """Read the results.json of a run.

    Args:
        folder: The folder of the run.

    Returns:
        Its content; `script`, `args` and `metrics` are present, and every metric is a number.

    Raises:
        FileNotFoundError: If the run has no results.json, so it has not ended.
        ValueError: If the file is cut short or is not what a run writes.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, so the run has not ended; run its script to the end first.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); run the script again.") from error
    missing = [key for key in RESULT_KEYS if not isinstance(results, dict) or key not in results]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]!r}, so no run of this project wrote it; run the script again.")
    for key in ("args", "metrics"):
        if not isinstance(results[key], dict):
            raise ValueError(f"{path}: {key} is not a table of names and values; run the script again.")
    for name, value in results["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{path}: the metric {name!r} is {value!r}, not a number; run the script again.")
    return results


def find_run(root: str | Path, flag: str, seed: int) -> Path:
    """Find the finished run that was started with a flag and a seed, among the runs of a folder.

    Args:
        root: A folder of runs, such as `runs/norms`, which an experiment filled.
        flag: The flag and its value, such as "norm=batch".
        seed: The seed.

    Returns:
        The folder of the run, the first by name where several agree.

    Raises:
        ValueError: If `flag` is no flag with a value, or there is no such run.
    """
    name, equals, value = flag.partition("=")
    if not name or not equals:
        raise ValueError(f"run={flag!r} is no flag with its value; write it as norm=batch.")
    for path in sorted(Path(root).glob("*/results.json")):
        args = read_results(path.parent)["args"]
        if name in args and str(args[name]) == value and args.get("seed") == seed:
            return path.parent
    raise ValueError(
        f"model={str(root)!r} holds no finished run with --{name} {value} --seed {seed}; run its experiment first."
    )


def read_curves(
    folder: str | Path, keys: Sequence[str] | None = None, *, points: int = 120
) -> dict[str, tuple[list[int], list[float]]]:
    """Read what a run logged over its steps, thinned for drawing.

    After a restart only the attempt that was kept is read, and where a resumed run logged a step twice, the later
    line. A series longer than `points` is averaged over neighbors, so that a noisy loss keeps its level.

    Args:
        folder: The folder of the run; without log.jsonl there are no curves.
        keys: The logged keys to read; None reads every number but step, epoch and seconds.
        points: The most points that a series keeps.

    Returns:
        Steps and values by key, for the keys that were logged.

    Raises:
        ValueError: If a line other than the last is not JSON. The last may be cut short by a killed run.
    """
    path = Path(folder) / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    series: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is not JSON ({error}); remove it or run again.") from error
        if entry.get("event") == "restart":
            series.clear()
            continue
        for key, value in entry.items():
            wanted = key not in ("step", "epoch", "seconds", "event") if keys is None else key in keys
            if wanted and "step" in entry and isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(key, {})[int(entry["step"])] = float(value)
    return {key: _thin(sorted(series[key].items()), points) for key in keys or series if key in series}


def _thin(series: list[tuple[int, float]], points: int) -> tuple[list[int], list[float]]:
    size = math.ceil(len(series) / points)
    steps, values = [], []
    for start in range(0, len(series), size):
        group = series[start : start + size]
        steps.append(group[-1][0])
        values.append(float(f"{math.fsum(value for _, value in group) / len(group):.5g}"))
    return steps, values


def collect(
    experiment: Experiment, root: str | Path = "runs", *, previous: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Gather the results of every cell into one report, from which card, table and figures are made.

    Args:
        experiment: The experiment.
        root: The folder that holds the runs.
        previous: An earlier report of the experiment, as on a machine that has the report but not the runs. Its cells
            stand in for those that `root` lacks, as far as script and flags are the same.

    Returns:
        The experiment's own fields and `cells`: for each its id, flags, status ("finished", "failed" or "missing"),
        what results.json says, and its thinned curves; a confusion matrix for the first seed alone, as it is large.
        Absolute paths are cut to their last part.
    """
    known = {cell["id"]: cell for cell in (previous or {}).get("cells", []) if cell["status"] == "finished"}
    cells = []
    for cell in experiment.cells(root):
        entry: dict[str, Any] = {"id": cell.id, "flags": cell.flags}
        if cell.finished:
            results = read_results(cell.folder)
            entry |= {"status": "finished"} | {key: results[key] for key in REPORTED_KEYS if key in results}
            entry["args"] = {key: value for key, value in results["args"].items() if key != "output_dir"}
            missing = [name for name in cell.metrics.values() if name not in results["metrics"]]
            if missing:
                raise ValueError(f"{cell.folder} has no metric {missing[0]!r}; correct the experiment's variants.")
            own = {name: results["metrics"][metric] for name, metric in cell.metrics.items()}
            entry["metrics"] = {**results["metrics"], **own}
            entry["curves"] = read_curves(cell.folder, experiment.curves)
            if MATRICES in results and cell.flags["seed"] == experiment.seeds[0]:
                entry[MATRICES] = results[MATRICES]
        elif cell.id in known:
            entry = dict(known[cell.id])
        elif cell.failure_file.is_file():
            entry |= {"status": "failed", **json.loads(cell.failure_file.read_text(encoding="utf-8"))}
        else:
            entry["status"] = "missing"
        if not experiment.confusion:
            entry.pop(MATRICES, None)
        cells.append(portable(entry))
    return json.loads(json.dumps({**asdict(experiment), "cells": cells}))


def write_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Write a report as JSON, one line a cell, so that a changed cell is a changed line.

    Args:
        report: What `collect` returned.
        path: The file to write.
    """
    head = json.dumps({key: value for key, value in report.items() if key != "cells"}, indent=2, ensure_ascii=False)
    cells = ",\n".join("    " + json.dumps(cell, ensure_ascii=False) for cell in report["cells"])
    text = head.removesuffix("\n}") + ',\n  "cells": [\n' + cells + "\n  ]\n}\n"
    Path(path).write_text(text, encoding="utf-8")


def read_report(path: str | Path) -> dict[str, Any]:
    """Read a report that `write_report` wrote.

    Args:
        path: The JSON file, such as model_cards/slots.json.

    Returns:
        The report.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is cut short or is not a report.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the experiment with scripts/run_experiment.py first.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); make it again with --only_report.") from error
    if not isinstance(report, dict) or not isinstance(report.get("cells"), list) or "table" not in report:
        raise ValueError(f"{path} is not the report of an experiment; make it with scripts/run_experiment.py.")
    return report
