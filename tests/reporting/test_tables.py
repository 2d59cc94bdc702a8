import statistics

import numpy as np
import pytest

from hf_dl.reporting.experiment import read_experiment
from hf_dl.reporting.report import collect
from hf_dl.reporting.tables import claims_table, decimals_for, mean_and_deviation, results_table
from tests.reporting.fake_runs import CLAIMS, TOML, write_run, write_runs


@pytest.fixture
def report(tmp_path):
    def make(text=TOML, **kwargs):
        path = tmp_path / "fake.toml"
        path.write_text(text)
        experiment = read_experiment(path)
        write_runs(experiment, tmp_path / "runs", **kwargs)
        return collect(experiment, tmp_path / "runs")

    return make


def rows(table):
    return [[entry.strip() for entry in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]


def test_means_and_sample_deviations_are_those_of_numpy(report):
    made = report()
    header, _, *body, chance = rows(results_table(made))
    assert header == ["W", "norm", "accuracy", "val loss", "n"]
    assert chance == ["chance", "", "0.100", "", ""]
    for row, group in zip(body, made.groups(), strict=True):
        values = [
            cell["metrics"]["val_accuracy"]
            for cell in made.cells
            if (str(cell["flags"]["width"]), cell["flags"]["norm"]) == (row[0], row[1])
        ]
        assert len(values) == 3 and row[4] == "3" and group.values("val_accuracy") == values
        mean, deviation = map(float, row[2].split(" ± "))
        assert mean == pytest.approx(np.mean(values), abs=6e-4)
        assert deviation == pytest.approx(np.std(values, ddof=1), abs=6e-4)


def test_missing_failed_and_partial_rows_are_shown(report, tmp_path):
    made = report(skip=lambda flags: flags["norm"] == "batch" and (flags["width"] == 4 or flags["seed"] > 0))
    made.cells[0] |= {"status": "failed", "error": "ValueError: no"}
    text = results_table(made)
    header, _, first, _, third, *_ = rows(text)
    assert header[-2:] == ["n", "failed"]
    assert first == ["4", "batch", "failed", "failed", "0", "1"]
    assert "±" not in third[2] and third[4:] == ["1", "0"]
    made.cells[0]["status"] = "missing"
    assert rows(results_table(made))[2] == ["4", "batch", "missing", "missing", "0"]
    assert "over 3 seeds; 7 of 12 runs finished, no restarts, none failed." in results_table(made)
    assert "1 failed" in text


@pytest.mark.parametrize(
    "seeds, sentence",
    [
        (1, "Results of 1 of 3 planned seeds; 4 of 12 runs"),
        (2, "Mean ± standard deviation over 2 of 3 planned seeds; 8 of 12 runs"),
        (3, "Mean ± standard deviation over 3 seeds; 12 of 12 runs"),
    ],
)
def test_the_caption_counts_the_finished_seeds(report, seeds, sentence):
    assert f"{sentence} finished, no restarts" in results_table(report(skip=lambda flags: flags["seed"] >= seeds))


def test_labels_are_for_values_too(report):
    made = report(TOML.replace("labels = {", 'labels = { group = "group norm",'))
    assert [row[1] for row in rows(results_table(made))[2:4]] == ["batch", "group norm"]


def test_restarts_are_counted(report):
    made = report(restarts=2)
    header, _, first, *_ = rows(results_table(made))
    assert header[-1] == "restarts" and first[-1] == "6"
    assert "24 restarts after a collapse" in results_table(made)


def test_columns_and_several_values_make_one_table_a_metric(report):
    text = TOML.replace('rows = ["width", "norm"]', 'rows = "norm", columns = "width"')
    made = report(text, skip=lambda flags: flags["width"] == 8 and flags["norm"] == "group" and flags["seed"] == 1)
    table = results_table(made)
    assert table.index("**accuracy**") < table.index("**val loss**")
    header, _, first, second, chance, *_ = rows(table)
    assert header == ["norm", "W = 4", "W = 8"]
    assert second[0] == "group" and second[2].endswith("(n = 2)") and "(n" not in "".join(first)
    assert chance[0] == "chance" and float(chance[1]) == float(chance[2]) == 0.1


def test_what_every_run_tells_of_itself_can_be_shown(report):
    made = report()
    for number, cell in enumerate(made.cells):
        cell |= {"seconds": 10.0 + number, "cpu_seconds": 9.0 + number, "num_parameters": 1234}
    (group, *_) = made.groups()
    assert group.values("num_parameters") == [1234.0] * 3
    for name in ("seconds", "cpu_seconds"):
        assert group.values(name) == [cell[name] for cell in group.cells]


def test_one_value_with_a_plain_baseline(report):
    text = TOML.replace('value = ["val_accuracy", "val_loss"]', 'value = "val_accuracy"')
    text = text.replace("baseline = { val_accuracy = 0.1 }", "baseline = 0.1")
    made = report(text)
    assert rows(results_table(made))[0] == ["W", "norm", "accuracy", "n"]
    assert results_table(made).endswith("none failed.") and "accuracy: mean ±" in results_table(made)


def test_metric_that_no_run_has_is_named(report):
    made = report(TOML.replace('"val_loss"', '"val_los"'))
    with pytest.raises(ValueError, match="value='val_los' is not among the metrics .* val_accuracy, val_loss"):
        results_table(made)


def test_an_optional_metric_may_be_missing(report):
    text = TOML.replace('"val_loss"', '"extra"') + CLAIMS.replace("val_loss", "extra")
    made = report('optional = ["extra"]\n' + text)
    for cell in made.cells[:2] + made.cells[9:]:  # two seeds of the first setting, and all of the last one
        cell["metrics"]["extra"] = 0.25
    body = rows(results_table(made))[2:6]
    assert [row[3] for row in body] == ["0.2500 ± 0.0000 (n = 2)", "–", "–", "0.2500 ± 0.0000"]
    assert rows(claims_table(made))[-1][3:] == ["-0.6500 ± 0.0000", "yes"]
    assert [group.values("extra") for group in made.groups()] == [[0.25] * 2, [], [], [0.25] * 3]
    with pytest.raises(ValueError, match="value='extra' is not among the metrics"):
        results_table(report(text))
    with pytest.raises(ValueError, match=r"optional contains 'extra', which is not a metric of table.value. It has"):
        report('optional = "extra"\n' + TOML)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.5, 0.51], [0.6, 0.62]], 3),
        ([[0.9, 0.91, 0.8], [0.1, 0.14]], 2),
        ([[300.0, 320.0]], 0),
        ([[0.0031, 0.0032]], 5),
        ([[0.5, 0.5], [0.5]], 4),
        ([[0.0]], 1),
        ([[]], 1),
        ([[float("nan"), 1.0]], 3),
        ([[1e-9, 3e-9]], 6),
    ],
)
def test_decimals_follow_the_spread(values, expected):
    assert decimals_for(values) == expected


def test_mean_and_deviation():
    values = [0.1, 0.2, 0.4]
    assert mean_and_deviation(values, 3) == f"{sum(values) / 3:.3f} ± {statistics.stdev(values):.3f}"
    assert mean_and_deviation([0.25], 2) == "0.25"


def test_claims_are_checked_against_the_means_of_the_seeds(report):
    made = report(TOML + CLAIMS)
    header, _, first, second, third = rows(claims_table(made))
    assert header == ["expected", "metric", "bound", "measured", "holds"]
    cells = {(cell["flags"]["width"], cell["flags"]["norm"], cell["flags"]["seed"]): cell for cell in made.cells}
    gains = [
        cells[4, "group", seed]["metrics"]["val_accuracy"] - cells[4, "batch", seed]["metrics"]["val_accuracy"]
        for seed in range(3)
    ]
    mean, deviation = map(float, first[3].split(" ± "))
    assert mean == pytest.approx(np.mean(gains), abs=6e-4) and deviation == pytest.approx(
        np.std(gains, ddof=1), abs=6e-4
    )
    assert first[:3] == ["Group beats batch", "accuracy, difference", "≥ 0.05 and ≤ 0.15"] and first[4] == "yes"
    assert second[1:3] == ["accuracy", "≥ 0.99"] and second[4] == "**no**"
    assert third[1:3] == ["val loss, difference", "≤ 0"] and third[4] == "yes"
    assert claims_table(report()) == ""


def test_claims_of_missing_runs_say_so_and_seeds_are_paired(report):
    made = report(
        TOML + CLAIMS, skip=lambda flags: flags["norm"] == "batch" and (flags["width"] == 8 or flags["seed"] > 0)
    )
    _, _, first, second, _ = rows(claims_table(made))
    assert "±" not in first[3] and first[4] == "yes"  # seed 0 is all that both settings have
    assert second[3:] == ["missing", ""]


def wide_report(tmp_path, metrics, *, grid="width = [4, 8]", scores=None):
    text = TOML.replace('["val_accuracy", "val_loss"]', str(metrics)).replace(
        'rows = ["width", "norm"]', 'rows = "width"'
    )
    text = text.replace('width = [4, 8], norm = ["batch", "group"]', grid)
    (tmp_path / "fake.toml").write_text(text.replace("val_accuracy = 0.1", f"{metrics[0]} = 0.1"))
    experiment = read_experiment(tmp_path / "fake.toml")
    for cell in experiment.cells(tmp_path / "runs"):
        write_run(cell.folder, cell.flags, scores or dict.fromkeys(metrics, 0.5 + cell.flags["seed"] / 100))
    return collect(experiment, tmp_path / "runs")


def headers(table):
    lines = table.splitlines()
    return [row for row, below in zip(lines, lines[1:], strict=False) if below.startswith("|--")]


def test_wide_tables_are_split_by_split_if_all_splits_have_the_same_metrics(tmp_path):
    kinds = ("accuracy", "micro_f1", "macro_f1")
    made = wide_report(tmp_path, [f"{split}_{kind}" for kind in kinds for split in ("train", "val", "test")])
    table = results_table(made)
    assert [len(row.split("|")) - 2 for row in headers(table)] == [5, 4, 4]
    titles = [line for line in table.splitlines() if line.startswith("**")]
    assert titles == ["**test**", "**validation**", "**training**"]
    assert headers(table)[0].split() == "| W | test accuracy | test micro f1 | test macro f1 | n |".split()


@pytest.mark.parametrize("number", [4, 5, 6, 9, 10, 15, 16])
def test_wide_tables_have_at_most_six_columns_and_every_metric_once(tmp_path, number):
    metrics = [f"test_score_{letter}" for letter in "abcdefghijklmnop"[:number]]
    table = results_table(wide_report(tmp_path, metrics))
    sizes = [len(row.split("|")) - 2 for row in headers(table)]
    assert max(sizes) <= 6 and max(sizes) - min(sizes) <= 2
    assert sum(sizes) == number + len(sizes) + 1  # the key of each table, and n once
    shown = " ".join(headers(table))
    assert all(shown.count(f"test score {letter} ") == 1 for letter in "abcdefghijklmnop"[:number])
    assert table.count("| n |") == 1


def test_one_setting_with_many_metrics_has_a_row_per_metric(tmp_path):
    metrics = [f"test_score_{letter}" for letter in "abcdef"]
    found = rows(results_table(wide_report(tmp_path, metrics, grid="width = [4]")))
    assert found[0] == ["metric", "W = 4", "chance"]
    assert found[2] == ["test score a", "0.510 ± 0.010", "0.100"] and found[3][2] == "" and len(found) == 8


def test_many_columns_are_split_too(report):
    text = TOML.replace('rows = ["width", "norm"]', 'rows = "norm", columns = "width"')
    table = results_table(report(text.replace("width = [4, 8]", "width = [1, 2, 3, 4, 5, 6, 7]")))
    assert [row.count("W = ") for row in headers(table)] == [5, 2, 5, 2]
    assert "W = 5" in headers(table)[0] and "W = 7" in headers(table)[1] and table.count("**accuracy**") == 1


def test_micro_f1_is_explained_once_if_it_equals_accuracy(tmp_path):
    metrics = ["test_accuracy", "test_micro_f1"]
    table = results_table(wide_report(tmp_path, metrics))
    assert table.count("Micro F1 equals accuracy") == 1
    other = wide_report(tmp_path, metrics, scores={"test_accuracy": 0.5, "test_micro_f1": 0.6})
    assert "equals accuracy" not in results_table(other)
