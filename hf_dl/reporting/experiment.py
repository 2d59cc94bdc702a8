"""Experiment files, the cells of an experiment, and the folders of their runs.

An experiment is a TOML file with a script, the flags that are fixed, the flags that vary, and the seeds:

```toml
script = "train_classifier.py"
question = "Does the choice of normalization change accuracy with small batches?"
expect = "group >= batch at batch size 8 (Wu & He 2018)"
seeds = [0, 1, 2]
fixed = { source = "synthetic", max_steps = 2000 }
grid = { norm = ["batch", "group"], batch_size = [8, 128] }
table = { rows = "norm", columns = "batch_size", value = "test_accuracy", baseline = 0.04 }
curves = ["loss", "val_loss"]                # optional: learning curves; defaults to loss, val_loss and table.value
labels = { test_accuracy = "test accuracy" } # optional: texts for flags, metrics and values in tables and figures
notes = { batch = "torch's default" }        # optional: remarks on values of the table's first flag
reading = "Batch reaches {norm=batch, batch_size=8: test_accuracy %}."  # optional: text below the table of the card
figures = ["speed.svg"]                      # optional: more figures in the folder of the card
confusion = false                            # optional: false leaves out the confusion matrices, which are large
optional = ["test_loss"]                     # optional: metrics of table.value that some runs do not have
samples = true                               # optional: the card has texts that language models wrote during training

[[claims]]                                   # optional: an expectation that the card checks
says = "group is at least level with batch at batch size 8"
metric = "test_accuracy"
of = { norm = "group", batch_size = 8 }      # the mean of this setting
over = { norm = "batch", batch_size = 8 }    # minus the mean of this setting, or minus a number; defaults to 0
at_least = -0.01                             # lower bound; at_most is the upper bound; at least one is needed

[variants.decoder.diffusion]                 # optional: for values of the grid that are not values of a flag
script = "train_slot_diffusion.py"           # optional: the script to run for this value
flags = { autoencoder = "runs/{style}" }     # optional: more flags; {flag} is replaced by the value of a flag
metrics = { ari = "test_attention_ari" }     # optional: the script's metric for each metric of the table
after = { decoder = "broadcast" }            # optional: run after the cell with this value; {after} is its folder
without = ["max_steps"]                      # optional: fixed flags that are not for this value
```

A cell is one point of the grid with one seed. Its folder is named by a hash of the script and its flags. A cell with
changed flags is therefore a new cell, and a finished cell is not run again.

`hf_dl.reporting.reading` describes the placeholders of `reading`.
"""

import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

RESULT_KEYS = ("script", "args", "metrics")
RESERVED_FLAGS = ("seed", "output_dir")
SAMPLES = "samples.json"  # in the folder of a run: texts that a language model wrote during training
OPTIONAL_KEYS = (
    "fixed", "grid", "curves", "labels", "notes", "reading", "figures", "confusion", "optional", "samples", "claims",
    "variants",
)  # fmt: skip
VARIANT_KEYS = ("script", "flags", "metrics", "after", "without")


@dataclass(frozen=True)
class Table:
    """The flags that make the rows and columns of the table, and the metrics that fill it.

    Args:
        rows: One or two flags of the grid.
        value: The metrics of results.json to show, or seconds, cpu_seconds or num_parameters.
        columns: A flag of the grid; defaults to one column per metric.
        baseline: Chance level, or another known reference, by metric.
    """

    rows: tuple[str, ...]
    value: tuple[str, ...]
    columns: str | None = None
    baseline: dict[str, float] = field(default_factory=dict)

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that the table shows, rows before columns."""
        return self.rows if self.columns is None else (*self.rows, self.columns)


@dataclass(frozen=True)
class Claim:
    """An expected result: a bound on the mean of a metric, or on the mean of a difference.

    Args:
        says: The expectation in words.
        metric: A metric of results.json, or seconds, cpu_seconds or num_parameters.
        of: The setting: a value for each flag that the table shows.
        over: The setting whose mean is subtracted, or a number to subtract.
        at_least: Lower bound.
        at_most: Upper bound.
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
        flags: The fixed flags, the flags of this point of the grid, and the seed.
        folder: The folder of the run.
        script: The script to run.
        given: The flags to pass to the script: `flags`, with the name of a variant replaced by the flags of the
            variant. Flags that the variant leaves out are missing.
        metrics: The script's metric by metric of the table, where the names differ.
        after: The cell that must finish before this one, because this one starts from its folder.
    """

    flags: dict[str, Any]
    folder: Path
    script: str
    given: dict[str, Any]
    metrics: dict[str, str] = field(default_factory=dict)
    after: "Cell | None" = None

    @property
    def id(self) -> str:
        """The hash of script and flags, the name of the folder."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether the folder contains a readable results.json."""
        try:
            read_results(self.folder)
        except (OSError, ValueError):
            return False
        return True

    @property
    def failure_file(self) -> Path:
        """The file for the error of a failed run; outside the folder, because the script may clear the folder."""
        return self.folder.with_suffix(".failed.json")


@dataclass(frozen=True)
class Experiment:
    """A parsed experiment file; the docstring of the module describes the format."""

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
    reading: str = ""
    figures: tuple[str, ...] = ()
    confusion: bool = True
    optional: tuple[str, ...] = ()
    samples: bool = False
    claims: tuple[Claim, ...] = ()
    variants: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def cells(self, root: str | Path = "runs") -> list[Cell]:
        """List the cells: every point of the grid with every seed.

        Args:
            root: The folder of all runs. The folder of a cell is `<root>/<name>/<hash>`.

        Returns:
            The cells in the order of the grid, seeds innermost.
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
            given = {name: value for name, value in given.items() if name not in variant.get("without", ())}
            given |= variant.get("flags", {})
            metrics |= variant.get("metrics", {})
            if "after" in variant:
                after = self._cell(flags | variant["after"], root)
        given = {name: _filled(value, flags) for name, value in given.items()}
        # The hash of this cell uses the hash of the other cell, not its folder, which depends on `root`.
        hashed = {name: _filled(value, {"after": after.id}) for name, value in given.items()} if after else given
        digest = hashlib.sha256(json.dumps([script, hashed], sort_keys=True).encode()).hexdigest()[:10]
        if after:
            given = {name: _filled(value, {"after": after.folder}) for name, value in given.items()}
        return Cell(flags, root / self.name / digest, script, given, metrics, after)


def _filled(value: Any, flags: Mapping[str, Any]) -> Any:
    """Replace the names of flags in braces by their values."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\{(\w+)\}", lambda found: str(flags.get(found[1], found[0])), value)


def _names(value: Any, what: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{what}={value!r} is not a name or a list of names. Write names in quotes.")
    if len(set(names)) != len(names):
        raise ValueError(f"{what}={value!r} contains the same name twice. Remove one.")
    return tuple(names)


def _expect_keys(given: Mapping[str, Any], *, required: Sequence[str], optional: Sequence[str], where: str) -> None:
    unknown = [key for key in given if key not in (*required, *optional)]
    if unknown:
        known = ", ".join((*required, *optional))
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}. The known keys are {known}.")
    missing = [key for key in required if key not in given]
    if missing:
        raise ValueError(f"{where}: the key {missing[0]!r} is missing. Add it.")


def _read_table(given: Any, grid: Mapping[str, Any], where: str) -> Table:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: table={given!r} is not a table. Write table = {{ rows = ..., value = ... }}.")
    _expect_keys(given, required=("rows", "value"), optional=("columns", "baseline"), where=f"{where}: table")
    rows, value = _names(given["rows"], f"{where}: table.rows"), _names(given["value"], f"{where}: table.value")
    columns = given.get("columns")
    if columns is not None and not isinstance(columns, str):
        raise ValueError(f"{where}: table.columns={columns!r} is not the name of one flag of the grid.")
    if len(rows) > 2:
        raise ValueError(f"{where}: table.rows={list(rows)} has {len(rows)} flags. Expected one or two.")
    table = Table(rows=rows, value=value, columns=columns)
    for name in table.flags:
        if name not in grid:
            raise ValueError(f"{where}: the table shows {name!r}, which is not in the grid. It has {list(grid)}.")
    if columns in rows:
        raise ValueError(f"{where}: table.columns={columns!r} is also in table.rows. Name it once.")
    hidden = [name for name, values in grid.items() if name not in table.flags and len(values) > 1]
    if hidden:
        raise ValueError(
            f"{where}: the grid varies {hidden[0]!r}, but the table does not show it, so different settings would be "
            "averaged. Add it to table.rows or table.columns."
        )
    baseline = given.get("baseline", {})
    if isinstance(baseline, (int, float)) and not isinstance(baseline, bool) and len(value) == 1:
        baseline = {value[0]: float(baseline)}
    if not isinstance(baseline, dict) or not all(
        name in value and isinstance(number, (int, float)) for name, number in baseline.items()
    ):
        raise ValueError(
            f"{where}: table.baseline={baseline!r} is invalid. Expected a table with a number for some of "
            f"{list(value)}, or a single number if table.value has one metric."
        )
    return replace(table, baseline=baseline)


def _read_claims(given: Any, grid: Mapping[str, Any], shown: Sequence[str], where: str) -> tuple[Claim, ...]:
    if not isinstance(given, list) or not all(isinstance(claim, dict) for claim in given):
        raise ValueError(f"{where}: claims={given!r} is not a list of tables. Write [[claims]] above each claim.")
    for number, claim in enumerate(given, start=1):
        place = f"{where}: claim {number}"
        _expect_keys(claim, required=("says", "metric", "of"), optional=("over", "at_least", "at_most"), where=place)
        for key in ("says", "metric"):
            if not isinstance(claim[key], str) or not claim[key].strip():
                raise ValueError(f"{place}: {key}={claim[key]!r} must be a text that is not empty.")
        bounds = [claim[key] for key in ("at_least", "at_most") if key in claim]
        if not bounds or any(isinstance(bound, bool) or not isinstance(bound, (int, float)) for bound in bounds):
            raise ValueError(f"{place} needs at_least or at_most, or both; they must be numbers.")
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
                    f"{place}: {key}={setting!r} is not a setting of the table. Set {' and '.join(shown)} to values "
                    "of the grid."
                )
    return tuple(Claim(**claim) for claim in given)


def _read_variants(given: Any, fixed: Mapping[str, Any], grid: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not all(isinstance(variants, dict) for variants in given.values()):
        raise ValueError(
            f"{where}: variants={given!r} is not a table. Write [variants.flag.value] above each variant."
        )
    for name, variants in given.items():
        if name not in grid:
            raise ValueError(f"{where}: variants.{name} is not a flag of the grid. It has {list(grid)}.")
        if sorted(variants) != sorted(map(str, grid[name])) or not all(isinstance(v, str) for v in grid[name]):
            raise ValueError(
                f"{where}: variants.{name} has {list(variants)}. Expected the values of the grid, all of them texts: "
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
                    f"{place}: flags={flags!r} is invalid. Expected a table of flags that are not in grid or fixed, "
                    f"and not {' or '.join(RESERVED_FLAGS)}."
                )
            if not isinstance(metrics, dict) or not all(isinstance(metric, str) for metric in metrics.values()):
                raise ValueError(
                    f"{place}: metrics={metrics!r} is invalid. Expected a table of names and metrics of the script."
                )
            unused = variant.get("without", [])
            if not isinstance(unused, list) or not all(flag in fixed for flag in unused):
                raise ValueError(f"{place}: without={unused!r} is invalid. Expected a list of flags of fixed.")
            after = variant.get("after", {})
            if not isinstance(after, dict) or not all(v in grid.get(flag, []) for flag, v in after.items()):
                raise ValueError(
                    f"{place}: after={after!r} is invalid. Expected a table of flags and values of the grid."
                )
            if any("after" in given[flag][v] for flag, v in after.items() if flag in given):
                raise ValueError(f"{place}: after={after!r} names a variant that has the key after itself.")
            if "after" in variant and after.get(name) in (None, value):
                raise ValueError(f"{place}: after={after!r} must contain another value of {name!r}.")
    return given


def read_experiment(path: str | Path) -> Experiment:
    """Read and validate an experiment file.

    Args:
        path: A TOML file in the format that the docstring of the module describes.

    Returns:
        The experiment, named after the file.

    Raises:
        ValueError: If the file is not TOML, has an unknown or missing key, or has a table that does not fit its grid.
        FileNotFoundError: If the file does not exist.

    Example:
        >>> experiment = read_experiment("scripts/experiments/slots.toml")
        >>> experiment.name, experiment.script
        ('slots', 'train_slots.py')
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"path={str(path)!r} is not a file. Give the path of an experiment, such as slots.toml."
        )
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not valid TOML: {error}.") from error
    where = path.name
    required = ("script", "question", "expect", "seeds", "table")
    _expect_keys(given, required=required, optional=OPTIONAL_KEYS, where=where)
    for key in ("script", "question", "expect"):
        if not isinstance(given[key], str) or not given[key].strip():
            raise ValueError(f"{where}: {key}={given[key]!r} is empty or not a text. Write a sentence in quotes.")
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
            raise ValueError(f"{where}: {key} sets {reserved[0]!r}, which run_experiment.py sets. Remove it.")
    for name, values in grid.items():
        if not isinstance(values, list) or not values or any(isinstance(value, (dict, list)) for value in values):
            raise ValueError(f"{where}: grid.{name}={values!r} is not a list of values.")
        if len({json.dumps(value) for value in values}) != len(values):
            raise ValueError(f"{where}: grid.{name}={values!r} has a value twice. Remove one.")
        if name in fixed:
            raise ValueError(f"{where}: {name!r} is both in fixed and in grid. Remove one.")
    for key in ("confusion", "samples"):
        if not isinstance(given.get(key, True), bool):
            raise ValueError(f"{where}: {key}={given[key]!r} must be true or false.")
    labels, notes = given.get("labels", {}), given.get("notes", {})
    for key, texts in (("labels", labels), ("notes", notes)):
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"{where}: {key}={texts!r} is not a table of texts.")
    if not isinstance(given.get("reading", ""), str):
        raise ValueError(f"{where}: reading={given['reading']!r} is not a text.")
    table = _read_table(given["table"], grid, where)
    known = [str(value) for value in grid[table.rows[0]]]
    unknown = [name for name in notes if name not in known]
    if unknown:
        raise ValueError(
            f"{where}: notes contains {unknown[0]!r}, which is not a value of {table.rows[0]!r}. It has {known}."
        )
    curves = ("loss", "val_loss", *table.value)
    if "curves" in given:
        curves = _names(given["curves"], f"{where}: curves")
    optional = _names(given["optional"], f"{where}: optional") if "optional" in given else ()
    unknown = [name for name in optional if name not in table.value]
    if unknown:
        raise ValueError(
            f"{where}: optional contains {unknown[0]!r}, which is not a metric of table.value. It has "
            f"{list(table.value)}."
        )
    return Experiment(
        name=path.stem, script=given["script"], question=given["question"], expect=given["expect"],
        seeds=tuple(seeds), table=table, fixed=fixed, grid=grid, curves=tuple(dict.fromkeys(curves)), labels=labels,
        notes=notes, reading=given.get("reading", "").strip(),
        figures=_names(given["figures"], f"{where}: figures") if "figures" in given else (),
        confusion=given.get("confusion", True),
        optional=optional, samples=given.get("samples", False),
        claims=_read_claims(given.get("claims", []), grid, table.flags, where),
        variants=_read_variants(given.get("variants", {}), fixed, grid, where),
    )  # fmt: skip


def portable(value: Any) -> Any:
    """Replace absolute paths by their last part, because they mean nothing on another machine.

    Args:
        value: Anything that JSON can hold, including nested dicts and lists.

    Returns:
        The value, with every text that is an absolute path replaced by the last part of the path.

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
        The content. It has `script`, `args` and `metrics`, and every metric is a number.

    Raises:
        FileNotFoundError: If results.json does not exist, because the run has not finished.
        ValueError: If the file is cut short or was not written by a run.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist because the run has not finished. Run its script to the end first."
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}). Run the script again.") from error
    missing = [key for key in RESULT_KEYS if not isinstance(results, dict) or key not in results]
    if missing:
        raise ValueError(
            f"{path} has no {missing[0]!r}, so it was not written by a script of hf_dl. Run the script again."
        )
    for key in ("args", "metrics"):
        if not isinstance(results[key], dict):
            raise ValueError(f"{path}: {key} is not a table of names and values. Run the script again.")
    for name, value in results["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{path}: the metric {name!r} is {value!r}, not a number. Run the script again.")
    return results


def find_run(root: str | Path, flag: str, seed: int, *, script: str | None = None) -> Path:
    """Find a finished run by its flags and the seed.

    Args:
        root: A folder of runs, such as `runs/norms`.
        flag: A flag and its value, such as "norm=batch". Commas separate several flags.
        seed: The seed.
        script: Name of the script, such as "train_slots.py", if the folder has runs of several scripts.

    Returns:
        The folder of the run.

    Raises:
        ValueError: If `flag` is not a flag with a value, no run matches, or several runs match.
    """
    parts = [part.strip().partition("=") for part in flag.split(",")]
    wanted = {name: value for name, _, value in parts}
    if not all(name and equals for name, equals, _ in parts):
        raise ValueError(f"run={flag!r} is not a flag with a value. Write it like norm=batch.")
    matches = {}
    for path in sorted(Path(root).glob("*/results.json")):
        results = read_results(path.parent)
        args = results["args"]
        if script is not None and results["script"] != script:
            continue
        found = {name: str(args[name]) for name in wanted if name in args}
        if found == wanted and args.get("seed") == seed:
            matches[path.parent] = {name: str(value) for name, value in args.items() if name != "output_dir"}
    if len(matches) > 1:
        first, second = list(matches.values())[:2]
        differ = [name for name in first if name in second and first[name] != second[name]]
        example = f" Add a flag, such as {flag},{differ[0]}={first[differ[0]]}." if differ else " Remove all but one."
        raise ValueError(
            f"run={flag!r} matches {len(matches)} runs with seed {seed} in {str(root)!r}: "
            f"{', '.join(folder.name for folder in matches)}.{example}"
        )
    if matches:
        return next(iter(matches))
    of = f" of {script}" if script else ""
    words = " ".join(f"--{name} {value}" for name, value in wanted.items())
    raise ValueError(
        f"model={str(root)!r} contains no finished run{of} with {words} --seed {seed}. Run its experiment first."
    )


def read_samples(folder: str | Path) -> list[dict[str, Any]]:
    """Read the texts that the language model of a run wrote during training, from its samples.json.

    Args:
        folder: The folder of the run.

    Returns:
        Dicts with `step` and `text`, in the order of the steps. Empty without the file.

    Raises:
        ValueError: If the file was not written by a run.
    """
    path = Path(folder) / SAMPLES
    if not path.is_file():
        return []
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}). Run the script again.") from error
    if not isinstance(samples, list) or not all(
        isinstance(each, dict) and isinstance(each.get("step"), int) and isinstance(each.get("text"), str)
        for each in samples
    ):
        raise ValueError(f"{path} is not a list of steps and texts. Run the script again.")
    return samples


def read_curves(
    folder: str | Path, keys: Sequence[str] | None = None, *, points: int = 120
) -> dict[str, tuple[list[int], list[float]]]:
    """Read the learning curves of a run from log.jsonl, thinned for drawing.

    Lines before a restart are skipped. If a resumed run logged a step twice, the later line is used. A series longer
    than `points` is averaged over neighboring steps, which keeps the level of a noisy loss.

    Args:
        folder: The folder of the run.
        keys: The logged keys to read; defaults to all numbers except step, epoch and seconds.
        points: Maximum number of points per series.

    Returns:
        Steps and values by key, for the keys that were logged; empty without log.jsonl.

    Raises:
        ValueError: If a line other than the last is not JSON. A killed run may cut the last line short.
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
            raise ValueError(
                f"{path}: line {number} is not JSON ({error}). Remove the line or run the script again."
            ) from error
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
