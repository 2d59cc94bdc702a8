import re
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from hf_dl.reporting.experiment import read_experiment
from hf_dl.reporting.plots import COLORS, draw_curves, plot_confusion, plot_curves, plot_run, plot_table
from hf_dl.reporting.report import collect, write_report
from tests.reporting.fake_runs import CONFUSION, TOML, write_run, write_runs


@pytest.fixture
def report(tmp_path):
    def make(text=TOML, **kwargs):
        (tmp_path / "fake.toml").write_text(text)
        experiment = read_experiment(tmp_path / "fake.toml")
        write_runs(experiment, tmp_path / "runs", **kwargs)
        return collect(experiment, tmp_path / "runs")

    return make


def drawn_lines(path, color):
    """The points of the lines of a color in an SVG, in the picture's coordinates."""
    lines = []
    for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}path"):
        if f"stroke: {color.lower()}" in element.get("style", "") and "fill: none" in element.get("style", ""):
            points = re.findall(r"[ML] (\S+) (\S+)", element.get("d"))
            lines.append(np.array(points, dtype=float))
    return lines


def test_svg_is_the_same_bytes_every_time_and_in_another_process(report, tmp_path):
    made = report()
    first = plot_curves(made, tmp_path / "a.svg").read_bytes(), plot_table(made, tmp_path / "b.svg").read_bytes()
    again = plot_curves(made, tmp_path / "c.svg").read_bytes(), plot_table(made, tmp_path / "d.svg").read_bytes()
    assert first == again and b"<dc:date>" not in first[0]
    write_report(made, tmp_path / "report.json")
    program = (
        "from hf_dl.reporting.plots import plot_curves, plot_table\n"
        "from hf_dl.reporting.report import read_report\n"
        "report = read_report('report.json'); plot_curves(report, 'e.svg'); plot_table(report, 'f.svg')"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert (tmp_path / "e.svg").read_bytes() == first[0] and (tmp_path / "f.svg").read_bytes() == first[1]


def test_no_global_state_of_matplotlib_is_touched(report, tmp_path):
    before = dict(matplotlib.rcParams)
    plot_curves(report(), tmp_path / "a.svg")
    assert dict(matplotlib.rcParams) == before
    program = "import sys, hf_dl.reporting.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_line_is_the_mean_of_the_seeds_where_they_ran(tmp_path):
    # The second seed stops early and was logged at other steps: the mean is over the seeds that were still running.
    seeds = [([0, 10, 20], [0.0, 4.0, 4.0]), ([0, 5, 10], [2.0, 2.0, 2.0])]
    path = draw_curves(tmp_path / "a.svg", {"x": {"one": seeds}})
    (line,) = [line for line in drawn_lines(path, COLORS[0]) if len(line) == 4]
    x, y = line.T
    np.testing.assert_allclose((x - x[0]) / (x[-1] - x[0]), [0, 0.25, 0.5, 1], atol=1e-4)
    # Means 1, 2, 3 and, of the first alone, 4: equal steps upwards.
    np.testing.assert_allclose(np.diff(y) / np.diff(y)[0], [1, 1, 1], atol=1e-3)
    assert np.all(np.diff(y) < 0)


def test_band_reaches_from_the_lowest_to_the_highest_seed(tmp_path):
    def heights(seeds):
        path = draw_curves(tmp_path / "a.svg", {"x": {"one": seeds, "two": [([0, 1], [-9.0, 9.0])]}})
        text = path.read_text()
        band = re.search(r'id="FillBetweenPolyCollection_1">.*?<path id="\S+" d="(.*?)"', text, re.DOTALL)
        return band and np.array(re.findall(r"[ML] (\S+) (\S+)", band[1]), dtype=float)[:, 1]

    flat = [([0, 1], [value, value]) for value in (-1.0, 0.5, 3.0)]
    y = heights(flat)
    other = next(line for line in drawn_lines(tmp_path / "a.svg", COLORS[1]) if len(line) == 2)
    scale = (other[0, 1] - other[1, 1]) / 18
    assert (y.max() - y.min()) / scale == pytest.approx(4.0, rel=1e-3)
    assert heights(flat[:1]) is None


def test_groups_without_runs_are_written_into_the_table_figure(report, tmp_path):
    # Text is drawn as paths, with the text in comments.
    full = plot_table(report(), tmp_path / "a.svg").read_text()
    made = report()
    for cell in made.cells[:3]:
        cell["status"] = "missing"
    made.cells[3]["status"] = made.cells[4]["status"] = made.cells[5]["status"] = "failed"
    for cell in made.cells[6:9]:  # without an optional metric
        del cell["metrics"]["val_loss"]
    made.experiment = replace(made.experiment, optional=("val_loss",))
    holes = plot_table(made, tmp_path / "b.svg").read_text()
    assert holes.count("<!-- – -->") == 1
    assert "<!-- missing -->" in holes and "<!-- failed -->" in holes and "<!-- chance -->" in holes
    assert "<!-- missing -->" not in full and "<!-- chance -->" in full


def test_nothing_finished_draws_nothing(report, tmp_path):
    made = report(skip=lambda flags: True)
    assert plot_table(made, tmp_path / "a.svg") is None and plot_curves(made, tmp_path / "b.svg") is None
    assert plot_run(tmp_path, tmp_path / "c.png") is None
    assert not [*tmp_path.glob("*.svg"), *tmp_path.glob("*.png")]
    with pytest.raises(ValueError, match="contains no points"):
        draw_curves(tmp_path / "a.svg", {"x": {"a": [([], [])]}})


def test_confusion_matrices_are_drawn_where_there_are_any(report, tmp_path):
    assert plot_confusion(report(), tmp_path / "none.svg") is None
    path = plot_confusion(report(confusion=CONFUSION), tmp_path / "a.svg")
    text = path.read_text()
    assert text.count("<image") == 4 + 1  # one panel per setting, and the scale
    assert "<!-- W = 8, group -->" in text and "<!-- true class -->" in text


def test_figure_of_one_run(tmp_path):
    write_run(tmp_path, {}, {"val_accuracy": 0.9})
    path = plot_run(tmp_path, tmp_path / "curves.png")
    with Image.open(path) as image:
        assert image.size[0] == 1120 and len(set(image.tobytes())) > 10
    texts = plot_run(tmp_path, tmp_path / "curves.svg").read_text()
    for text in ("loss", "training", "validation"):
        assert f"<!-- {text} -->" in texts
    panels = {"error": {"held out": "val_loss", "never logged": "nothing"}}
    texts = plot_run(tmp_path, tmp_path / "curves.svg", panels).read_text()
    assert "<!-- held out -->" in texts and "never logged" not in texts


def test_many_groups_have_different_looks(report, tmp_path):
    text = TOML.replace("width = [4, 8]", "width = [1, 2, 3, 4, 5, 6, 7, 8, 9]")
    made = report(text)
    assert plot_curves(made, tmp_path / "a.svg") and plot_table(made, tmp_path / "b.svg")
    styles = set(re.findall(r"stroke-dasharray: [^;]+|stroke: #\w+", (tmp_path / "a.svg").read_text()))
    assert {f"stroke: {color.lower()}" for color in COLORS} <= styles
