"""The benchmark of the recurrent layers."""

import json

import pytest
import torch

from hf_dl.models.layers_recurrent import CELLS
from scripts.benchmarks import recurrent


def test_it_measures_every_cell(monkeypatch, tmp_path):
    settings = {
        "plain": recurrent.Setting(2, 4, 3, 5, num_layers=2),
        "masked": recurrent.Setting(2, 6, 3, 5, 1, True, True),
    }
    monkeypatch.setattr(recurrent, "SETTINGS", settings)
    results = recurrent.main(["--repetitions=1", f"--output={tmp_path / 'found.json'}"])
    assert json.loads((tmp_path / "found.json").read_text()) == results
    assert set(results) == {f"{cell}, {setting}" for cell in CELLS for setting in settings} | {"quoted"}
    for name, rows in results.items():
        if name == "quoted":
            continue
        for way in ("fused", "steps"):
            assert rows[way]["largest_difference"] < 1e-5 and rows[way]["memory_ratio"] > 0, (name, way)


def test_the_memory_of_a_step_is_the_one_of_its_tensors():
    assert recurrent.tensor_memory(lambda: torch.zeros(2**18) + 1) == pytest.approx(2, rel=0.01)
