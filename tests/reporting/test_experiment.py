import json

import pytest

from hf_dl.reporting.card import experiment_card
from hf_dl.reporting.experiment import find_run, portable, read_curves, read_experiment, read_results
from hf_dl.reporting.report import collect, read_report, write_report
from tests.reporting.fake_runs import CLAIMS, CONFUSION, TOML, write_run, write_runs


@pytest.fixture
def toml(tmp_path):
    def write(text=TOML):
        path = tmp_path / "fake.toml"
        path.write_text(text)
        return path

    return write


def test_cells_are_the_product_of_the_grid_and_the_seeds(toml):
    experiment = read_experiment(toml())
    cells = experiment.cells("runs")
    assert experiment.name == "fake" and len(cells) == 2 * 2 * 3
    assert len({cell.folder for cell in cells}) == 12
    assert [cell.flags["seed"] for cell in cells[:4]] == [0, 1, 2, 0]
    assert cells[3].flags == {"source": "synthetic", "max_steps": 100, "width": 4, "norm": "group", "seed": 0}
    assert experiment.curves == ("loss", "val_loss", "val_accuracy")


def test_folder_depends_on_script_and_flags_and_on_nothing_else(toml):
    before = [cell.id for cell in read_experiment(toml()).cells()]
    reworded = TOML.replace("More is better.", "It does not.").replace("[4, 8]", "[4, 8, 16]")
    reordered = reworded.replace('source = "synthetic", max_steps = 100', 'max_steps = 100, source = "synthetic"')
    assert [cell.id for cell in read_experiment(toml(reordered)).cells()][:12] == before
    other = {cell.id for cell in read_experiment(toml(TOML.replace("max_steps = 100", "max_steps = 101"))).cells()}
    assert not other & set(before)
    other = {cell.id for cell in read_experiment(toml(TOML.replace("train_fake", "train_other"))).cells()}
    assert not other & set(before)


VARIANTS = """
[variants.norm.batch]
flags = { folder = "data/{source}/{width}/{seed}/{other}" }
[variants.norm.group]
script = "train_other.py"
flags = { groups = 2 }
metrics = { val_accuracy = "val_top_1" }
without = ["max_steps"]
"""


def test_a_value_of_the_grid_may_stand_for_a_script_and_flags(toml, tmp_path):
    experiment = read_experiment(toml(TOML + VARIANTS))
    batch, *_, group = experiment.cells(tmp_path)
    assert batch.script == "train_fake.py" and group.script == "train_other.py"
    folder = "data/synthetic/4/0/{other}"
    assert batch.given == {"source": "synthetic", "max_steps": 100, "width": 4, "seed": 0, "folder": folder}
    assert group.given == {"source": "synthetic", "width": 8, "seed": 2, "groups": 2}
    assert group.flags == {"source": "synthetic", "max_steps": 100, "width": 8, "norm": "group", "seed": 2}
    write_run(group.folder, group.given, {"val_top_1": 0.75, "val_loss": 0.5})
    cell = collect(experiment, tmp_path).cells[-1]
    assert cell["metrics"] == {"val_top_1": 0.75, "val_accuracy": 0.75, "val_loss": 0.5}
    assert cell["flags"]["norm"] == "group"
    assert cell["script"] == "train_other.py"  # of the experiment: results.json has no folder of the script
    write_run(group.folder, group.given, {"val_loss": 0.5})
    with pytest.raises(ValueError, match="has no metric 'val_top_1'. Correct the key variants of the experiment"):
        collect(experiment, tmp_path)


AFTER = VARIANTS.replace("groups = 2", 'start = "{after}"') + 'after = { norm = "batch" }\n'


def test_a_cell_may_start_from_another_one(toml, tmp_path):
    cells = read_experiment(toml(TOML + AFTER)).cells(tmp_path)
    by_flags = {(cell.flags["width"], cell.flags["norm"], cell.flags["seed"]): cell for cell in cells}
    for (width, norm, seed), cell in by_flags.items():
        if norm == "batch":
            assert cell.after is None
        else:
            assert cell.after == by_flags[width, "batch", seed]
            assert cell.given["start"] == str(cell.after.folder) and cell.flags["norm"] == "group"
    elsewhere = read_experiment(toml(TOML + AFTER)).cells(tmp_path / "other")
    assert [cell.id for cell in elsewhere] == [cell.id for cell in cells]
    assert len({cell.id for cell in cells}) == len(cells)
    # the run that a cell starts from is part of its hash
    changed = read_experiment(toml(TOML + AFTER.replace("data/", "date/"))).cells(tmp_path)
    assert not {cell.id for cell in changed} & {cell.id for cell in cells}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('norm = "batch" }', 'norm = "layer" }', "is invalid. Expected a table of flags and values of the grid"),
        ('norm = "batch" }', 'depth = "batch" }', "is invalid. Expected a table of flags and values of the grid"),
        ('{ norm = "batch" }', '"batch"', "after='batch' is invalid"),
        ('norm = "batch" }', "width = 4 }", "must contain another value of 'norm'"),
        ('norm = "batch" }', 'norm = "group" }', "names a variant that has the key after itself"),
        (
            "[variants.norm.group]",
            'after = { norm = "group" }\n[variants.norm.group]',
            "names a variant that has the key after itself",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused_with_a_sentence(toml, old, new, message):
    assert old in AFTER
    with pytest.raises(ValueError, match=message):
        read_experiment(toml(TOML + AFTER.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("variants.norm", "variants.depth", "variants.depth is not a flag of the grid"),
        ("norm.group", "norm.layer", r"variants.norm has \['batch', 'layer'\]. Expected the values of the grid"),
        ("script =", "skript =", "variants.norm.group has the unknown key 'skript'"),
        (
            "groups = 2",
            "width = 2",
            "flags={'width': 2} is invalid. Expected a table of flags that are not in grid or fixed",
        ),
        ("groups = 2", "seed = 2", "flags={'seed': 2} is invalid"),
        ('"val_top_1"', "1", "metrics={'val_accuracy': 1} is invalid"),
        ('"train_other.py"', "1", "script=1 is not a text"),
        ('["max_steps"]', '["width"]', r"without=\['width'\] is invalid. Expected a list of flags of fixed"),
        ('["max_steps"]', '"max_steps"', "without='max_steps' is invalid"),
    ],
)
def test_wrong_variants_are_refused_with_a_sentence(toml, old, new, message):
    assert old in VARIANTS
    with pytest.raises(ValueError, match=message):
        read_experiment(toml(TOML + VARIANTS.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("question =", "qestion =", "unknown key 'qestion'. The known keys are script, question"),
        ('expect = "More is better."', "", "the key 'expect' is missing"),
        ('question = "Does more help?"', 'question = ""', "question='' is empty"),
        ("seeds = [0, 1, 2]", "seeds = [0, 0]", r"seeds=\[0, 0\] is not a list of different"),
        ("seeds = [0, 1, 2]", "seeds = 3", "seeds=3 is not a list"),
        ("seeds = [0, 1, 2]", "seeds = [0.5]", "seeds="),
        ("seeds = [0, 1, 2]", "seeds = [true]", "seeds="),
        ("max_steps = 100", "seed = 1", "fixed sets 'seed'"),
        ("max_steps = 100", "width = 1", "'width' is both in fixed and in grid"),
        ("width = [4, 8]", "width = 4", "grid.width=4 is not a list"),
        ("width = [4, 8]", "width = []", "grid.width="),
        ("width = [4, 8]", "width = [4, 4]", "a value twice"),
        ('["width", "norm"]', '["width"]', "varies 'norm', but the table does not show it"),
        ('["width", "norm"]', '["width", "depth"]', "shows 'depth', which is not in the grid"),
        ('["width", "norm"]', '["width", "width"]', "twice"),
        ("baseline = {", "base = {", "table has the unknown key 'base'"),
        ("baseline = { val_accuracy = 0.1 }", "baseline = 0.1", "table.baseline=0.1 is invalid"),
        ("baseline = { val_accuracy", "baseline = { accuracy", "table.baseline="),
        ("labels = {", "labels = { x = 1, ", "labels="),
        ("seeds = [0", "seeds = [[0", "not valid TOML"),
    ],
)
def test_wrong_files_are_refused_with_a_sentence(toml, old, new, message):
    assert old in TOML
    with pytest.raises(ValueError, match=message):
        read_experiment(toml(TOML.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('says = "Group beats batch"', "", "claim 1: the key 'says' is missing"),
        ('says = "Group beats batch"', "says = 3", "claim 1: says=3 must be a text"),
        ("at_least = 0.99", "", "claim 2 needs at_least or at_most"),
        ("at_least = 0.99", "at_least = true", "claim 2 needs at_least or at_most"),
        ("at_least = 0.99", "atleast = 0.99", "claim 2 has the unknown key 'atleast'"),
        ('of = { width = 8, norm = "batch" }', "of = { width = 8 }", "Set width and norm to values of the grid"),
        ("over = { width = 4,", "over = { width = 5,", "claim 1: over=.* is not a setting of the table"),
        ("over = 0.9", "over = true", "claim 3: over=True is not a setting"),
        ('4 = "A narrow one."', '5 = "A wide one."', "notes contains '5', which is not a value of 'width'"),
        ('4 = "A narrow one."', "4 = 4", "notes={'4': 4} is not a table"),
        ('["speed.svg", "absent.svg"]', "[1]", "figures="),
    ],
)
def test_wrong_claims_are_refused_with_a_sentence(toml, old, new, message):
    assert old in CLAIMS
    read_experiment(toml(TOML + CLAIMS))
    with pytest.raises(ValueError, match=message):
        read_experiment(toml(TOML + CLAIMS.replace(old, new)))


def test_the_report_has_the_confusion_of_the_first_seed_alone(toml, tmp_path):
    experiment = read_experiment(toml(TOML))
    write_runs(experiment, tmp_path / "runs", confusion=CONFUSION)
    for cell in collect(experiment, tmp_path / "runs").cells:
        assert cell.get("confusion") == (CONFUSION if cell["flags"]["seed"] == 0 else None)


def test_the_report_has_no_confusion_where_the_file_leaves_it_out(toml, tmp_path):
    before = read_experiment(toml(TOML))
    write_runs(before, tmp_path / "runs", confusion=CONFUSION)
    previous = collect(before, tmp_path / "runs")
    experiment = read_experiment(toml("confusion = false\n" + TOML))
    for runs in ("runs", "elsewhere"):  # from the runs, and from the report alone
        cells = collect(experiment, tmp_path / runs, previous=previous).cells
        assert [cell["status"] for cell in cells] == [cell["status"] for cell in previous.cells]
        assert not any("confusion" in cell for cell in cells)
    with pytest.raises(ValueError, match="confusion='no' must be true or false"):
        read_experiment(toml('confusion = "no"\n' + TOML))


def test_a_run_is_found_by_its_flags(toml, tmp_path):
    experiment = read_experiment(toml(TOML))
    write_runs(experiment, tmp_path)
    root = next(tmp_path.glob("*/*/results.json")).parents[1]
    for seed in experiment.seeds[:2]:
        args = read_results(find_run(root, "width=8,norm=batch", seed))["args"]
        assert (args["width"], args["norm"], args["seed"]) == (8, "batch", seed)
    run = find_run(root, "width=8,norm=batch", 0)
    assert find_run(root, "width=8,norm=batch", 0, script=read_results(run)["script"]) == run
    with pytest.raises(ValueError, match=r"run='width=8' matches 2 runs with seed 0 .*: \w+, \w+\. Add a flag, such"):
        find_run(root, "width=8", 0)
    (root / "zz").mkdir()
    (root / "zz" / "results.json").write_text((run / "results.json").read_text())
    with pytest.raises(ValueError, match=f"{run.name}, zz. Remove all but one"):
        find_run(root, "width=8,norm=batch", 0)
    (root / "zz" / "results.json").unlink()
    both = read_results(find_run(root, "norm=group, width=4", 1))["args"]
    assert (both["width"], both["norm"], both["seed"]) == (4, "group", 1)
    with pytest.raises(ValueError, match="with --width 4 --norm bath --seed 0. Run its experiment first"):
        find_run(root, "width=4,norm=bath", 0)
    for wrong in ("width=8,", "width=8,norm", "=8"):
        with pytest.raises(ValueError, match=f"run='{wrong}' is not a flag with a value"):
            find_run(root, wrong, 0)
    with pytest.raises(ValueError, match="contains no finished run of other.py with --width 8 --seed 0"):
        find_run(root, "width=8", 0, script="other.py")
    with pytest.raises(ValueError, match="contains no finished run with --width 5 --seed 0. Run its experiment first"):
        find_run(root, "width=5", 0)
    with pytest.raises(ValueError, match="run='width' is not a flag with a value. Write it like norm=batch"):
        find_run(root, "width", 0)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_experiment(tmp_path / "none.toml")


def test_report_survives_the_loss_of_the_runs(toml, tmp_path):
    experiment = read_experiment(toml())
    write_runs(experiment, tmp_path / "runs", skip=lambda flags: flags["seed"] == 2)
    cells = experiment.cells(tmp_path / "runs")
    assert [cell.finished for cell in cells] == [True, True, False] * 4
    cells[2].failure_file.write_text(json.dumps({"returncode": 1, "error": "ValueError: no"}))
    (cells[5].folder).mkdir()
    (cells[5].folder / "results.json").write_text('{"script": "train')
    report = collect(experiment, tmp_path / "runs")
    assert [cell["status"] for cell in report.cells][:6] == [
        *["finished"] * 2,
        "failed",
        *["finished"] * 2,
        "missing",
    ]
    cell = report.cells[0]
    for key in ("args", "metrics", "seconds", "commit", "versions", "device", "seed", "curves"):
        assert key in cell
    assert str(tmp_path) not in json.dumps(report.cells)
    write_report(report, tmp_path / "fake.json")
    assert read_report(tmp_path / "fake.json") == report
    lines = (tmp_path / "fake.json").read_text().splitlines()
    assert sum('"status"' in line for line in lines) == 12
    again = collect(experiment, tmp_path / "elsewhere", previous=report)
    assert [c["status"] == "finished" for c in again.cells] == [c["status"] == "finished" for c in report.cells]
    assert again.cells[0] == cell
    # Results of other flags must not stand in.
    changed = read_experiment(toml(TOML.replace("max_steps = 100", "max_steps = 101")))
    assert {c["status"] for c in collect(changed, tmp_path / "elsewhere", previous=report).cells} == {"missing"}


def test_samples_of_the_first_seed_are_kept_and_cut(toml, tmp_path):
    experiment = read_experiment(toml("samples = true\n" + TOML))
    write_runs(experiment, tmp_path / "runs")
    texts = ["/a b", "unused", "x" * 400, "\n".join("abcdefghijklmnop"), "a\u202e\x1b[1m\ud800 é"]
    samples = [{"step": 10**number, "text": text} for number, text in enumerate(texts)]
    for cell in experiment.cells(tmp_path / "runs"):
        (cell.folder / "samples.json").write_text(json.dumps(samples))
    report = collect(experiment, tmp_path / "runs")
    first, other = report.cells[0]["samples"], report.cells[1]
    assert "samples" not in other and [each["step"] for each in first] == [1, 100, 1000, 10_000]
    assert first[0]["text"] == "/a b"  # not a path
    assert first[1]["text"] == "x" * 300 + " …" and first[2]["text"] == "\n".join("abcdefghijkl") + " …"
    assert first[3]["text"] == r"a\u202e\x1b[1m\ud800 é"
    write_report(report, tmp_path / "fake.json")
    kept = collect(experiment, tmp_path / "elsewhere", previous=read_report(tmp_path / "fake.json"))
    assert kept == report and experiment_card(kept).text == experiment_card(report).text
    without = collect(read_experiment(toml(TOML)), tmp_path / "elsewhere", previous=report)
    assert not any("samples" in cell for cell in without.cells)
    (experiment.cells(tmp_path / "runs")[0].folder / "samples.json").write_text('[{"step": 1}]')
    with pytest.raises(ValueError, match="samples.json is not a list of steps and texts. Run the script again"):
        collect(experiment, tmp_path / "runs")
    with pytest.raises(ValueError, match="samples='yes' must be true or false"):
        read_experiment(toml('samples = "yes"\n' + TOML))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"script": "a", "args"', "cut short or damaged"),
        ("", "cut short or damaged"),
        ("[1, 2]", "has no 'script'"),
        ('{"script": "a", "args": {}}', "has no 'metrics'"),
        ('{"script": "a", "args": {}, "metrics": []}', "metrics is not a table"),
        ('{"script": "a", "args": {}, "metrics": {"ari": "0.9"}}', "metric 'ari' is '0.9', not a number"),
    ],
)
def test_damaged_results_are_one_sentence(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_results(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="the run has not finished"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match="Run the experiment"):
        read_report(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"cells": [')
    with pytest.raises(ValueError, match="cut short"):
        read_report(tmp_path / "x.json")


def test_curves_are_thinned_by_means_of_neighbors(tmp_path):
    lines = [{"step": step, "epoch": 0.0, "seconds": 1.0, "loss": float(step % 2)} for step in range(1, 1001)]
    lines += [{"step": 500, "val_loss": 0.25}, {"step": 1000, "val_loss": 0.125}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curves = read_curves(tmp_path, points=100)
    assert sorted(curves) == ["loss", "val_loss"]
    assert curves["loss"][0] == list(range(10, 1001, 10)) and set(curves["loss"][1]) == {0.5}
    assert curves["val_loss"] == ([500, 1000], [0.25, 0.125])
    assert list(read_curves(tmp_path, ["val_loss", "other"])) == ["val_loss"]


def test_curves_after_restart_resume_and_kill(tmp_path):
    lines = [
        {"step": 1, "loss": 9.0},
        {"step": 2, "event": "restart", "message": "collapsed"},
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.5},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": float("nan")},
    ]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "log.jsonl").write_text(text + '\n{"step": 4, "lo')
    assert read_curves(tmp_path) == {"loss": ([1, 2], [3.0, 2.0])}
    (tmp_path / "log.jsonl").write_text('{"step": 4, "lo\n' + text)
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_curves(tmp_path)
    assert read_curves(tmp_path / "nothing") == {}


def test_portable_cuts_absolute_paths_only():
    value = {"a": "/home/me/x/runs", "b": ["C:\\Users\\me\\data", "data/birds"], "c": "a / b", "d": 1.5, "e": None}
    assert portable(value) == {"a": "runs", "b": ["data", "data/birds"], "c": "a / b", "d": 1.5, "e": None}


def test_write_run_is_what_the_contract_says(tmp_path):
    write_run(tmp_path, {"seed": 1}, {"val_accuracy": 0.5})
    assert read_results(tmp_path)["metrics"] == {"val_accuracy": 0.5}
