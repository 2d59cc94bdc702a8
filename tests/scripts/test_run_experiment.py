import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from hf_dl.reporting.card import experiment_card, read_card
from hf_dl.reporting.experiment import read_experiment
from hf_dl.reporting.report import read_report
from scripts.run_experiment import main, to_argv

ROOT = Path(__file__).resolve().parents[2]
# A script like the scripts of the project, with a formula instead of training.
SCRIPT = '''
"""Fake training."""
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hf_dl.training.args import TrainingArgs, parse_args


@dataclass
class Args(TrainingArgs):
    width: int = field(default=4, metadata={"help": "Width."})
    norm: Literal["batch", "group"] = field(default="batch", metadata={"help": "Norm."})
    explode: bool = field(default=False, metadata={"help": "Fail."})


def main(argv=None):
    args = parse_args(Args, argv)
    if args.explode and args.width == 8 and args.seed == 1:
        raise ValueError(f"loss is not finite at step 7, see {Path.cwd()}/x")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"val_accuracy": 0.5 + args.width / 100 + args.seed / 1000}
    results = {"script": "train_fake.py", "args": vars(args), "metrics": metrics, "seed": args.seed, "seconds": 0.1}
    (folder / "results.json").write_text(json.dumps(results))
    with open("calls.txt", "a") as calls:
        calls.write(f"{args.width} {args.norm} {args.seed}\\n")


if __name__ == "__main__":
    main()
'''
# The parts of hf_dl that the script uses, without torch, whose import takes seconds in every process.
STUB = """
import argparse
from dataclasses import dataclass


@dataclass
class TrainingArgs:
    max_steps: int = 1
    seed: int = 0
    output_dir: str = ""


def parse_args(cls, argv=None):
    parser = argparse.ArgumentParser()
    for flag in cls.__dataclass_fields__.values():
        convert = (lambda text: text == "true") if flag.type is bool else flag.type if flag.type is int else str
        parser.add_argument(f"--{flag.name}", type=convert, default=flag.default)
    return parser.parse_args(argv)
"""
TOML = """
script = "train_fake.py"
question = "q"
expect = "e"
seeds = [0, 1]
fixed = { max_steps = 5, explode = false, norm = "group" }
grid = { width = [4, 8] }
table = { rows = "width", value = "val_accuracy", baseline = 0.1 }
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "scripts" / "experiments").mkdir(parents=True)
    (tmp_path / "scripts" / "train_fake.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "experiments" / "fake.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "stub" / "hf_dl" / "training").mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("training/__init__.py", ""), ("training/args.py", STUB)):
        (tmp_path / "stub" / "hf_dl" / name).write_text(text)
    yield tmp_path
    sys.modules.pop("train_fake", None)


def change(project, old, new):
    path = project / "scripts" / "experiments" / "fake.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


EXPERIMENT = "scripts/experiments/fake.toml"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_steps = 5", "max_step = 5", "'max_step' is not a flag of train_fake.py. Did you mean 'max_steps'?"),
        ("width = [4, 8]", "widht = [4, 8]", "shows 'width', which is not in the grid"),
        ('norm = "group"', 'norm = "bath"', "norm=bath width=4: argument --norm: invalid choice: 'bath'"),
        ("width = [4, 8]", 'width = [4, "x"]', "invalid int value: 'x'"),
        ("max_steps = 5", "max_steps = 0", "max_steps=0 and epochs=0.0 train nothing"),
        ("train_fake.py", "train_none.py", "script='train_none.py' was not found in the folder of the file"),
    ],
)
def test_what_the_script_would_refuse_is_refused_before_anything_runs(project, capsys, old, new, message):
    change(project, old, new)
    assert main([EXPERIMENT]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (project / "runs").exists()


# The launcher imports torch, and so does the script behind it. tests/test_cli.py tests `hf_dl launch`.
@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dry_run_prints_commands_that_run(launched, project, capsys, monkeypatch):
    assert main([EXPERIMENT, "--dry_run", "--max_cells", "3"]) == 0
    first, *commands = capsys.readouterr().out.splitlines()
    assert first == "fake: 4 cells; 3 to run now." and len(commands) == 3
    assert not (project / "runs").exists() and not (project / "model_cards").exists()
    launch = f"{shlex.quote(sys.executable)} -m hf_dl launch "
    assert commands[1].startswith(launch)
    if not launched:
        monkeypatch.setenv("PYTHONPATH", str(project / "stub"))
        commands[1] = commands[1].replace(launch, launch.removesuffix("-m hf_dl launch "))
    subprocess.run(commands[1], shell=True, check=True, capture_output=True)
    assert (project / "calls.txt").read_text() == "4 group 1\n"


def test_scripts_and_experiments_may_lie_outside_of_the_working_folder(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scripts.run_experiment.LAUNCH", (sys.executable,))
    monkeypatch.setenv("PYTHONPATH", str(project / "stub"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main([str(project / EXPERIMENT), "--max_cells", "1"]) == 0
    assert f"{project / 'scripts'}" not in capsys.readouterr().out  # the table, and no path of the installation
    names = {path.relative_to(tmp_path / "elsewhere").as_posix() for path in (tmp_path / "elsewhere").rglob("*.*")}
    assert {"model_cards/fake.md", "model_cards/fake.json", "calls.txt"} <= names
    assert not (project / "runs").exists() and not (project / "model_cards").exists()


def test_runs_the_missing_cells_once_and_reports_a_failure(project, capsys, monkeypatch):
    monkeypatch.setattr("scripts.run_experiment.LAUNCH", (sys.executable,))
    monkeypatch.setenv("PYTHONPATH", str(project / "stub"))
    change(project, "explode = false", "explode = true")
    assert main([EXPERIMENT, "--jobs", "2"]) == 1
    captured = capsys.readouterr()
    assert "failed: max_steps=5 explode=True norm=group width=8 seed=1: ValueError: loss is not finite" in captured.err
    assert sorted((project / "calls.txt").read_text().split("\n")) == ["", "4 group 0", "4 group 1", "8 group 0"]
    report = read_report(project / "model_cards" / "fake.json")
    assert [cell["status"] for cell in report.cells] == ["finished", "finished", "finished", "failed"]
    assert report.cells[3]["error"] == "ValueError: loss is not finite at step 7, see x"
    card = read_card(project / "model_cards" / "fake.md")
    assert "| 4      | 0.5405 ± 0.0007 | 2 |      0 |" in card.text
    assert "| 8      |          0.5800 | 1 |      1 |" in card.text
    assert (project / "model_cards" / "fake.svg").is_file()
    assert not (project / "model_cards" / "fake_curves.svg").exists()  # nothing was logged

    # The second time only the failed cell runs again; the report does not need the runs of the others.
    (project / "scripts" / "train_fake.py").write_text(SCRIPT.replace("args.seed == 1", "args.seed == 7"))
    assert main([EXPERIMENT]) == 0
    assert (project / "calls.txt").read_text().endswith("8 group 1\n")
    assert len((project / "calls.txt").read_text().splitlines()) == 4
    before = {path.name: path.read_bytes() for path in (project / "model_cards").iterdir()}
    (project / "runs").rename(project / "gone")
    assert main([EXPERIMENT, "--only_report"]) == 0
    assert {path.name: path.read_bytes() for path in (project / "model_cards").iterdir()} == before
    assert all(cell["status"] == "finished" for cell in read_report(project / "model_cards" / "fake.json").cells)


def test_variants_run_their_own_scripts(project, capsys, monkeypatch):
    monkeypatch.setattr("scripts.run_experiment.LAUNCH", (sys.executable,))
    monkeypatch.setenv("PYTHONPATH", str(project / "stub"))
    script = SCRIPT.replace("train_fake", "train_other").replace("0.5 +", "0.25 +")
    script = script.replace("val_accuracy", "val_top_1").replace("explode", "unused")
    (project / "scripts" / "train_other.py").write_text(script)
    change(project, "width = [4, 8]", 'model = ["one", "other"]')
    change(project, 'rows = "width"', 'rows = "model"')
    with open(project / EXPERIMENT, "a") as toml:
        toml.write(
            '[variants.model.one]\nflags = { width = 8 }\n[variants.model.other]\nscript = "train_other.py"\n'
            'metrics = { val_accuracy = "val_top_1" }\nwithout = ["explode"]\n'
        )
    assert main([EXPERIMENT]) == 0
    table = capsys.readouterr().out
    assert "| one    | 0.5805" in table and "| other  | 0.2905" in table
    text = (project / "model_cards" / "fake.md").read_text()
    assert "- Runs: 4 of `scripts/train_fake.py` and `scripts/train_other.py`, 4 of them finished\n" in text
    assert "| `model` = `one` | `train_fake.py --width 8` |" in text
    assert "| `model` = `other` | `train_other.py` without `explode` |" in text
    change(project, "width = 8 }", "widht = 8 }")
    assert main([EXPERIMENT]) == 1
    assert "'widht' is not a flag of train_fake.py. Did you mean 'width'?" in capsys.readouterr().err


def test_a_cell_runs_after_the_one_that_it_starts_from(project, capsys, monkeypatch):
    monkeypatch.setattr("scripts.run_experiment.LAUNCH", (sys.executable,))
    monkeypatch.setenv("PYTHONPATH", str(project / "stub"))
    change(project, "width = [4, 8]", 'model = ["other", "one"]')
    change(project, 'rows = "width"', 'rows = "model"')
    change(project, "explode = false, ", "")
    with open(project / EXPERIMENT, "a") as toml:
        toml.write(
            "[variants.model.one]\nflags = { width = 8, explode = true }\n[variants.model.other]\n"
            'flags = { start = "{after}" }\nafter = { model = "one" }\n'
        )
    path = project / "scripts" / "train_fake.py"
    path.write_text(SCRIPT.replace("    norm: Literal", '    start: str = ""\n    norm: Literal'))
    assert main([EXPERIMENT, "--max_cells", "2", "--dry_run"]) == 0
    assert "--start" not in capsys.readouterr().out  # they come last
    assert main([EXPERIMENT, "--jobs", "2"]) == 1
    assert (project / "calls.txt").read_text().splitlines() == ["8 group 0", "4 group 0"]
    error = capsys.readouterr().err
    first, second = error.splitlines()[-2:]
    assert "model=one seed=1: ValueError: loss is not finite" in first and "(full log: " in first
    assert "model=other seed=1: it needs the run max_steps=5 norm=group model=one seed=1, which has not" in second
    assert second.endswith("Run the same command again")
    path.write_text(path.read_text().replace("args.seed == 1", "args.seed == 7"))
    assert main([EXPERIMENT]) == 0
    assert (project / "calls.txt").read_text().splitlines()[2:] == ["8 group 1", "4 group 1"]
    text = (project / "model_cards" / "fake.md").read_text()
    assert "`train_fake.py --start <the run of model=one>`" in text


def test_report_without_any_run(project, capsys):
    assert main([EXPERIMENT, "--only_report"]) == 0
    assert "there is nothing to report" in capsys.readouterr().out
    assert not (project / "model_cards").exists()


def test_flags_become_a_command_line():
    assert to_argv({"a": 1, "b": True, "c": [2, 3], "d": "x y"}) == [
        "--a",
        "1",
        "--b",
        "true",
        "--c",
        "2",
        "3",
        "--d",
        "x y",
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "experiments").glob("*.toml")), ids=lambda path: path.stem)
def test_committed_experiments_are_in_step_with_their_reports(path):
    experiment = read_experiment(path)
    committed = ROOT / "model_cards" / f"{experiment.name}.json"
    if committed.is_file():
        report = json.loads(committed.read_text())
        ids = [cell["id"] for cell in report["cells"]]
        assert ids == [cell.id for cell in experiment.cells()], "run the experiment again, or with --only_report"
        own = json.loads(json.dumps(asdict(experiment)))
        for key in ("question", "expect", "table", "labels", "notes", "reading", "claims"):
            assert report[key] == own[key], f"{key} has changed; make the report again, with --only_report"
        card = read_card(committed.with_suffix(".md"))
        assert card.data.to_dict() == experiment_card(read_report(committed)).data.to_dict(), "use --only_report"
