import numpy as np
import pytest

from hf_dl.reporting.card import experiment_card
from hf_dl.reporting.experiment import read_experiment
from hf_dl.reporting.reading import fill_reading
from hf_dl.reporting.report import collect
from hf_dl.reporting.tables import results_table
from tests.reporting.fake_runs import TOML, write_runs


@pytest.fixture
def report(tmp_path):
    def make(reading, text=TOML, **options):
        (tmp_path / "fake.toml").write_text(f"reading = '''{reading}'''\n{text}")
        experiment = read_experiment(tmp_path / "fake.toml")
        write_runs(experiment, tmp_path / "runs", **options)
        return collect(experiment, tmp_path / "runs")

    return make


def test_placeholders_become_the_means_that_the_table_shows(report):
    made = report("Batch: {width=4, norm=batch: val_accuracy} or {norm=batch, width=4:val_accuracy %} of them.")
    values = made.groups()[0].values("val_accuracy")
    text = fill_reading(made)
    number = text.split()[1]
    assert float(number) == pytest.approx(np.mean(values), abs=6e-4) and f" {number} ±" in results_table(made)
    assert text == f"Batch: {number} or {100 * np.mean(values):.1f} % of them."
    card = experiment_card(made).text
    assert f"### How to read this\n\n{text}\n" in card
    assert card.index("| W ") < card.index(text) < card.index("## Expected and measured")


def test_a_flag_with_one_value_can_be_left_out(report):
    made = report("{norm=group: num_parameters}", TOML.replace("[4, 8]", "[4]"))
    assert fill_reading(made) == "1,234"


def test_missing_runs_are_shown_as_missing(report):
    made = report("{width=4, norm=batch: val_loss}", skip=lambda flags: flags["norm"] == "batch")
    assert fill_reading(made) == "(missing)"


def test_an_optional_metric_that_no_run_has_is_missing(report):
    made = report("{width=4, norm=batch: extra}", 'optional = "extra"\n' + TOML.replace('"val_loss"', '"extra"'))
    assert fill_reading(made) == "(missing)"


def test_no_reading_is_no_section(report):
    assert fill_reading(report("")) == "" and "How to read this" not in experiment_card(report("")).text


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (
            "{width=4, norm=batch: accuracy}",
            "the metric 'accuracy' is unknown. The metrics are val_accuracy, val_loss",
        ),
        ("{width=5, norm=batch: val_loss}", r"'5' is not a value of 'width'. The values are \['4', '8'\]"),
        ("{depth=5: val_loss}", r"'depth=5' is not a flag of the table .*\['width', 'norm'\]"),
        ("{width=4: val_loss}", r"does not set 'norm'. Its values are \['batch', 'group'\]"),
        ("{width=4, norm=batch: val_loss + 1}", r"\+ 1} is not a placeholder"),
        ("{}", "{} is not a placeholder"),
        ("It reaches 0.93.", "reading contains the number '0.93'. Write a placeholder"),
        ("It reaches 93 % of them.", "reading contains the number '93 %'"),
    ],
)
def test_mistakes_are_found_when_the_card_is_made(report, reading, message):
    with pytest.raises(ValueError, match=message):
        experiment_card(report(reading))


@pytest.mark.parametrize("value", ["x=a:b", "batch, bias 5"])
def test_a_value_may_contain_a_colon_an_equals_sign_and_a_comma(report, value):
    text = TOML.replace('"batch", "group"', f'"{value}", "group"')
    for setting in (f"norm={value}, width=4", f"width=4, norm={value}"):
        assert float(fill_reading(report(f"{{{setting}: val_accuracy}}", text))) > 0
