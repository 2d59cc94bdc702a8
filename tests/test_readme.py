"""The README and `hf-dl list` show the committed results, and their commands and examples work."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from hf_dl import cli, systems
from hf_dl.models import SlotAutoencoderConfig, SlotAutoencoderModel, SlotImageProcessor
from scripts import make_front_page

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# Numbers that the README may contain: versions and options of commands. Results are not allowed.
ALLOWED = re.compile(
    r"\bPython 3\.\d+ or newer|\bApache-2\.0\b|CIFAR-100\b|WikiText-2\b|version = \{[\d.]+\}"
    r"|--\w+ \d+\b|num_scenes=\d+|\[\d+\]|\[:, 1:\]"
)


def results_of(text):
    """Return the numbers of a text, except for the generated table, addresses and allowed numbers."""
    text = re.sub(f"{re.escape(make_front_page.BEGIN)}.*?{make_front_page.END}", "", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)|https?://\S+|`[\w./]+`", "", text)
    return re.findall(r"(?<![\w.])\d[\d.,]*(?: ?%)?|(?:two|three|four|ten) times|half of", ALLOWED.sub("", text))


def test_the_results_are_those_of_the_reports():
    assert systems.read_results() == make_front_page.make_results(), "run scripts/make_front_page.py"


def test_the_table_is_current():
    table = make_front_page.make_table(systems.read_results())
    assert README == make_front_page.replace_table(README, table), "run scripts/make_front_page.py"


def test_no_result_is_typed_by_hand():
    assert results_of(README) == []


@pytest.mark.parametrize("text", ["0.912 ARI", "94 % of them", "in 5 minutes", "two times as fast", "(0.9)", "12,000"])
def test_a_typed_result_is_found(text):
    assert results_of(README + text)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_files_that_it_names_exist():
    named = [*re.findall(r"\]\(([^)#]+)\)", README), *re.findall(r"scripts/[\w/.]+|spaces/[\w/.]+", README)]
    missing = [path for path in named if "://" not in path and not (ROOT / path).exists()]
    assert len(named) > 10 and not missing


def commands():
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
    lines = [line.split(" #")[0].strip() for line in blocks.splitlines()]
    told = [f"hf-dl {system.command}" for system in systems.read_systems()]
    return [each for line in [*lines, *told] for each in line.split(" && ") if each.startswith("hf-dl ")]


@pytest.mark.parametrize("command", commands())
def test_the_commands_exist(command):
    """Each system, experiment and Space exists, and each flag is one of the script's or of `accelerate launch`."""
    name, *words = shlex.split(command)[1:]
    assert name in cli.COMMANDS
    if name in cli.CHOICES:
        assert words[0] in cli.list_names(cli.CHOICES[name][1])


def test_each_system_is_complete():
    for system in systems.read_systems():
        assert (ROOT / system.card).is_file()
        assert system.space is None or (ROOT / "spaces" / system.space / "app.py").is_file()
        assert bool(system.paper) == bool(system.url)


def test_list_shows_each_system(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for system in systems.read_systems():
        result = systems.read_results()[system.name]
        for text in (system.title, f"hf-dl {system.command} ", result["result"], result["baseline"], system.card):
            assert text in shown
    assert max(map(len, shown.splitlines())) <= 119
    assert cli.main(["list", "slots"]) == 2


def make_report(*rows, baseline=None):
    cells = [
        {
            "status": "finished",
            "flags": {"norm": norm},
            "metrics": {"acc": acc},
            "seconds": 90,
            "device": "X, 2 threads",
        }
        for norm, acc in rows
    ]
    return {"cells": cells, "table": {"baseline": baseline or {}}}


def make_system(**changes):
    given = {"name": "a", "title": "A", "command": "train a", "experiment": "e", "row": {"norm": "x"}, "metric": "acc"}
    return systems.System(**{**given, "label": "accuracy", "baseline": "chance", **changes})


def test_the_summary_of_a_report():
    report = make_report(("x", 0.90), ("x", 0.92), ("x", 0.94), ("y", 0.5), baseline={"acc": 0.1})
    found = systems.summarize(make_system(), report)
    assert found == {"result": "0.920 ± 0.020", "baseline": "chance 0.100", "runs": 3, "time": "90 s, 2 cores"}
    found = systems.summarize(make_system(baseline={"row": {"norm": "y"}, "label": "other"}), report)
    assert found["baseline"] == "other 0.500"
    for threads, time in (("2 threads", "90 s, 2 cores"), ("1 thread", "40 s, 1 core")):  # a pause is no CPU time
        alone = make_report(("x", 0.9), baseline={"acc": 0.1})
        alone["cells"][0] |= {"device": f"X, {threads}", "cpu_seconds": 40}
        assert systems.summarize(make_system(), alone)["time"] == time
    single = systems.summarize(make_system(row={"norm": "y"}), report)
    assert (single["result"], single["runs"]) == ("0.500", 1)
    with pytest.raises(ValueError, match=r"e.json has no finished run with {'norm': 'z'}"):
        systems.summarize(make_system(row={"norm": "z"}), report)


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    SlotAutoencoderModel(SlotAutoencoderConfig(decoder_size=8)).save_pretrained("runs/train_slots")
    SlotImageProcessor().save_pretrained("runs/train_slots")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert 6 <= len(code.splitlines()) <= 12
    names = {}
    exec(code, names)
    assert names["segments"].shape == (64, 64) and names["image"].shape == (1, 3, 64, 64)


def test_each_system_has_a_result():
    assert json.loads(systems.RESULTS.read_text()).keys() == {system.name for system in systems.read_systems()}


def test_a_quiet_launch_adds_nothing_to_the_sentence_of_an_error(tmp_path, capfd):
    from accelerate.commands.launch import launch_command, launch_command_parser

    script = tmp_path / "train.py"
    script.write_text(
        "from hf_dl.training.errors import explain_errors\n"
        "explain_errors('train.py')\n"
        "raise FileNotFoundError('a.json does not exist.')\n"
    )
    words = ["--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", str(script)]
    assert "`--quiet`" in (ROOT / "README.md").read_text()
    with pytest.raises(SystemExit) as ended:
        launch_command(launch_command_parser().parse_args(words))
    assert ended.value.code == 1
    assert capfd.readouterr().err == "train.py: error: a.json does not exist.\n"


def test_the_cards_link_to_files_that_exist():
    """A card may name another experiment before it has a card; the link must wait for it."""
    cards, missing = sorted((ROOT / "model_cards").glob("*.md")), []
    for card in cards:
        targets = re.findall(r"\]\(([^)#]+)\)", card.read_text())
        missing += [f"{card.name}: {t}" for t in targets if "://" not in t and not (card.parent / t).is_file()]
    assert len(cards) > 30 and not missing
