"""Run the missing cells of an experiment, then write its report, card and figures into model_cards/.

    scripts/run python scripts/run_experiment.py scripts/experiments/slots.toml
    scripts/run python scripts/run_experiment.py scripts/experiments/slots.toml --dry_run      # print the commands
    scripts/run python scripts/run_experiment.py scripts/experiments/slots.toml --only_report  # run nothing

Each cell runs in its own process. Finished cells are skipped, and interrupted cells continue from their last
checkpoint. A failed cell does not stop the others; it is listed at the end, and the exit status is 1.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hf_dl.reporting.card import experiment_card
from hf_dl.reporting.experiment import Cell, Experiment, read_experiment
from hf_dl.reporting.plots import plot_confusion, plot_curves, plot_table
from hf_dl.reporting.report import Report, collect, read_report, write_report
from hf_dl.reporting.tables import results_table

LAUNCH = (sys.executable, "-m", "hf_dl", "launch")  # `accelerate launch` without its traceback


def find_scripts(experiment: Experiment, toml: Path) -> dict[str, Path]:
    """Find the scripts of an experiment: near the experiment file, or in the folder of this script."""
    found = {}
    for name in dict.fromkeys(cell.script for cell in experiment.cells()):
        folders = (toml.resolve().parent, toml.resolve().parent.parent, Path(__file__).resolve().parent)
        paths = [folder / name for folder in folders]
        found[name] = next((path for path in paths if path.is_file()), None)
        if found[name] is None:
            raise FileNotFoundError(
                f"{toml}: script={name!r} was not found in the folder of the file, in its parent folder, or in "
                f"{Path(__file__).resolve().parent}."
            )
    return found


def to_argv(flags: dict[str, Any]) -> list[str]:
    """Convert flags to command-line arguments."""
    argv = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in values)]
    return argv


def check_flags(experiment: Experiment, scripts: dict[str, Path]) -> None:
    """Parse the flags of all cells with the parsers of their scripts, to find mistakes before anything runs."""
    from hf_dl.training import TrainingArgs, flag_names, parse_args, parse_flags, suggest_flag

    args_of = {name: _find_args(path) for name, path in scripts.items()}
    seen = set()
    for cell in experiment.cells():
        found, flags = args_of[cell.script], {name: v for name, v in cell.given.items() if name != "seed"}
        known, parse = flag_names(found), parse_args if issubclass(found, TrainingArgs) else parse_flags
        for name in flags:
            if name not in known:
                close = suggest_flag(name, known)
                hint = f" Did you mean {close!r}?" if close else f" `{cell.script} --help` lists them."
                raise ValueError(f"{experiment.name}.toml: {name!r} is not a flag of {cell.script}.{hint}")
        if (key := json.dumps([cell.script, flags])) in seen:
            continue
        seen.add(key)
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                parse(found, to_argv(flags))
        except (SystemExit, ValueError) as error:
            reason = errors.getvalue().strip().rpartition("error: ")[2] or str(error)
            raise ValueError(f"{experiment.name}.toml: {cell.script} rejects {_words(flags)}: {reason}") from None


def _find_args(script: Path) -> type:
    """Import a script and return the class of its flags."""
    from hf_dl.training import TrainingArgs

    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, TrainingArgs) and value.__module__ == module.__name__
    ]
    if not found and dataclasses.is_dataclass(getattr(module, "Args", None)):  # an evaluation script
        found = [module.Args]
    if len(found) != 1:
        raise ValueError(
            f"{script.name} defines {len(found)} subclasses of TrainingArgs. Its flags must be exactly one class."
        )
    return found[0]


def _words(flags: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in flags.items())


def _command(cell: Cell, scripts: dict[str, Path]) -> list[str]:
    command = [*LAUNCH, str(scripts[cell.script]), *to_argv(cell.given)]
    command += ["--output_dir", str(cell.folder)]
    return command + ["--resume", "true"] * (cell.folder / "checkpoints").is_dir()


def _last_words(log: Path, status: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    # A traceback ends with "ValueError: ...". An explained error is "train_slots.py: error: ...".
    pattern = r"([\w.]+: )?[\w.]*(Error|Exception|error)\b.*: |hf-dl: .* was ended by "
    errors = [line for line in lines if re.match(pattern, line)]
    return errors[-1].replace(f"{Path.cwd()}/", "")[:300] if errors else f"exit status {status}"


def run_cell(cell: Cell, scripts: dict[str, Path], *, echo: bool) -> str | None:
    """Run one cell to its end.

    Args:
        cell: The cell.
        scripts: The scripts of the experiment by name.
        echo: Whether to show its output; `<folder>.log` always contains it.

    Returns:
        The reason for a failure, or None.
    """
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    cell.failure_file.unlink(missing_ok=True)
    log = cell.folder.with_suffix(".log")
    with (
        open(log, "wb") as file,
        subprocess.Popen(_command(cell, scripts), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
    ):
        while chunk := process.stdout.read1():
            file.write(chunk)
            if echo:
                sys.stdout.write(chunk.decode(errors="replace"))
                sys.stdout.flush()
        status = process.wait()
    if status == 0 and cell.finished:
        return None
    error = _last_words(log, status) if status else "the script ended without writing a readable results.json"
    cell.failure_file.write_text(json.dumps({"returncode": status, "error": error}), encoding="utf-8")
    return error


def run_cells(cells: list[Cell], scripts: dict[str, Path], jobs: int) -> list[tuple[Cell, str]]:
    """Run cells, `jobs` at a time, and return the failed cells with the reasons."""
    failures = []

    def run(numbered: tuple[int, Cell]) -> None:
        number, cell = numbered
        print(f"[{number}/{len(cells)}] {_words(cell.flags)} -> {cell.folder}", flush=True)
        start = time.monotonic()
        if cell.after is None or cell.after.finished:
            error = run_cell(cell, scripts, echo=jobs == 1)
        else:
            error = f"it needs the run {_words(cell.after.flags)}, which has not finished. Run the same command again"
        print(f"[{number}/{len(cells)}] {error or 'finished'} ({time.monotonic() - start:.0f} s)", flush=True)
        if error:
            failures.append((cell, error))

    for waits in (False, True):
        chosen = [(number, cell) for number, cell in enumerate(cells, start=1) if bool(cell.after) == waits]
        if jobs == 1:
            for numbered in chosen:
                run(numbered)
        else:
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(run, chosen))
    return failures


def write_everything(experiment: Experiment, runs: Path, folder: Path) -> Report:
    """Write report, figures and card. Cells that are missing in `runs` are taken from the existing report."""
    path = folder / f"{experiment.name}.json"
    previous = read_report(path) if path.is_file() else None
    report = collect(experiment, runs, previous=previous)
    if not report.finished:
        print(f"No run of {experiment.name} has finished, so there is nothing to report.")
        return report
    # Errors in the experiment file must show before any file is overwritten.
    table, _ = results_table(report), experiment_card(report)
    folder.mkdir(parents=True, exist_ok=True)
    write_report(report, path)
    figures = [plot_table(report, path.with_suffix(".svg"))]
    figures.append(plot_curves(report, folder / f"{experiment.name}_curves.svg"))
    figures.append(plot_confusion(report, folder / f"{experiment.name}_confusion.png"))
    shown = [folder / name for name in experiment.figures if (folder / name).is_file()]
    shown += [figure for figure in figures if figure]
    card = path.with_suffix(".md")
    experiment_card(report, figures=shown).save(card)
    print(f"\n{table}\n\nWritten: {', '.join(str(each) for each in (card, path, *filter(None, figures)))}")
    return report


def main(argv: list[str] | None = None) -> int:
    """Run an experiment.

    Args:
        argv: The command line; None reads `sys.argv`.

    Returns:
        The exit status: 0, or 1 if a run failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("experiment", type=Path, help="experiment file, such as scripts/experiments/slots.toml")
    parser.add_argument(
        "--dry_run", action="store_true", help="check the file and print the commands without running them"
    )
    parser.add_argument(
        "--only_report",
        action="store_true",
        help="write the report from finished runs and the existing report; run nothing",
    )
    parser.add_argument("--max_cells", type=int, help="run at most this many of the missing cells")
    parser.add_argument("--jobs", type=int, default=1, help="number of cells to run at a time")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--report_dir", type=Path, default=Path("model_cards"), help="folder of the report")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"jobs={args.jobs} must be 1 or more.")
    if args.max_cells is not None and args.max_cells < 0:
        parser.error(f"max_cells={args.max_cells} must be 0 or more.")
    failures = []
    try:
        experiment = read_experiment(args.experiment)
        if not args.only_report:
            scripts = find_scripts(experiment, args.experiment)
            check_flags(experiment, scripts)
            cells = experiment.cells(args.runs_dir)
            missing = sorted((cell for cell in cells if not cell.finished), key=lambda cell: bool(cell.after))
            missing = missing[: args.max_cells]
            print(f"{experiment.name}: {len(cells)} cells; {len(missing)} to run now.", flush=True)
            if args.dry_run:
                print("\n".join(shlex.join(_command(cell, scripts)) for cell in missing))
                return 0
            failures = run_cells(missing, scripts, args.jobs)
        write_everything(experiment, args.runs_dir, args.report_dir)
    except (ValueError, OSError) as error:
        print(f"run_experiment.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run the same command to continue.", file=sys.stderr)
        return 130
    for cell, error in failures:
        log = cell.folder.with_suffix(".log")
        more = f" (full log: {log})" if log.is_file() else ""  # a run that did not start has no log
        print(f"failed: {_words(cell.flags)}: {error}{more}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
