"""Progress in a file and on a terminal, with a clock that the tests set."""

import io
import os
import sys

import pytest

from hf_dl import progress
from hf_dl.progress import Progress, Tracked, activity, track


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, in a list with one entry."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_last_line", 0.0)
    monkeypatch.setattr(progress, "_last_update", 0.0)
    return now


def test_a_file_gets_one_line_every_ten_seconds(clock, capsys):
    with Progress(1000, description="Rendering train scenes", unit="row") as bar:
        for step in range(1, 1001):
            clock[0] += 1 / 16
            bar.update(step)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Rendering train scenes: 64/1000"  # after four seconds
    assert len(lines) == 6 and lines[1] == "Rendering train scenes: 224/1000"


def test_short_work_prints_nothing_and_lines_of_two_bars_keep_their_distance(clock, capsys):
    with Progress(10, description="Reading") as bar:
        for step in range(10):
            clock[0] += 0.3
            bar.update(step)
    assert capsys.readouterr().err == ""
    with Progress(3) as bar:
        clock[0] += 5
        bar.update(1)
        for _ in track(range(3), "Evaluating"):
            clock[0] += 3
    assert capsys.readouterr().err == "step 1/3\n"


def test_at_most_three_values_with_names_are_shown(clock, capsys):
    names = {"loss": "loss", "mse": "squared error", "val_fg_ari": "foreground ARI"}
    with Progress(3, names=names) as bar:
        bar.show({"loss": 0.123456, "learning_rate": 1.0, "val_fg_ari": 0.5, "val_ari": 0.4})
        clock[0] += 5
        bar.update(1)
    assert capsys.readouterr().err == "step 1/3 loss 0.1235 foreground ARI 0.5\n"
    with Progress(3) as bar:
        bar.show(dict.fromkeys("abcdefgh", 1.0))
        bar.show({"a": 2.0})
        clock[0] += 20
        bar.update(1)
    assert capsys.readouterr().err == "step 1/3 a 2 b 1 c 1\n"


def test_other_processes_are_silent(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Progress(3) as bar:
        clock[0] += 20
        bar.update(1)
    with activity("Drawing"):
        clock[0] += 20
    assert capsys.readouterr().err == ""


def test_an_activity_says_that_it_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "_last_line", -100.0)
    monkeypatch.setattr(progress, "_last_update", -100.0)
    wait = progress.threading.Event()
    monkeypatch.setattr(progress, "_write", lambda line: (print(line, file=sys.stderr), wait.set()))

    @activity("Drawing figures")
    def draw():
        assert wait.wait(10)
        return 3

    with activity("Training"):
        assert draw() == 3
    assert capsys.readouterr().err.startswith("Drawing figures: ")  # the inner one


def test_a_terminal_gets_a_bar_with_a_total(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(track([1, 2], "Rendering")) == [1, 2]
    assert "Rendering:" in sys.stderr.getvalue() and "/2" in sys.stderr.getvalue()


def test_a_tracked_loader_keeps_its_attributes():
    class Loader(list):
        batch_size = 4

    loader = Tracked(Loader([1, 2, 3]), "Evaluating")
    assert (len(loader), list(loader), list(loader), loader.batch_size) == (3, [1, 2, 3], [1, 2, 3], 4)
    assert os.environ.get("RANK") in (None, "0")
