"""The bar of generated rows."""

import re
from pathlib import Path

import datasets
import pytest

from hf_dl import progress
from hf_dl.data.generation import counted, row_bar

DATA = Path(__file__).parents[2] / "hf_dl/data"


@counted
def rows(number):
    yield from ({"number": each} for each in range(number))


def test_rows_are_counted_with_a_total(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "_last_line", -100.0)
    enabled = datasets.is_progress_bar_enabled()
    with row_bar(3, "Rendering train scenes"):
        assert not datasets.is_progress_bar_enabled()
        assert len(list(rows(3))) == 3
    assert datasets.is_progress_bar_enabled() is enabled
    assert capsys.readouterr().err == "Rendering train scenes: 1/3\n"  # the next line would come ten seconds later
    monkeypatch.setattr(progress, "_last_line", -100.0)
    assert len(list(rows(3))) == 3  # a stream
    assert capsys.readouterr().err == ""


@counted
def pairs(number):
    numbers = [row["number"] for row in rows(2 * number)]
    yield from ({"pair": pair} for pair in zip(numbers[::2], numbers[1::2], strict=True))


def test_parts_are_added_up_and_inner_rows_do_not_count(monkeypatch):
    counts = []
    monkeypatch.setattr(progress.Progress, "update", lambda bar, step: counts.append(step))
    with row_bar(5, "Rendering pairs"):
        list(pairs(2))
        list(pairs(3))
    assert counts == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("path", sorted(DATA.glob("*.py")), ids=lambda path: path.stem)
def test_all_generated_rows_have_a_bar(path):
    """`datasets` shows a bar without a total, and none in a file."""
    text = path.read_text()
    siblings = "".join(each.read_text() for each in path.parent.glob("*.py"))
    generators = re.findall(r"[ .]Dataset\.from_generator\(\s*(\w+),", text)
    assert len(generators) == text.count("with row_bar(")
    assert all(f"@counted\ndef {name}(" in siblings for name in generators if name != "generator")
