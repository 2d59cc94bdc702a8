import json
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPImageProcessor

from hf_dl.demo.gap import ALIGNMENTS, SCORES, GapResults
from hf_dl.recipes import clip, gap_points
from hf_dl.reporting.report import Report
from scripts import make_gap_playground

SIZES = {"num_pairs": 12, "num_test": 32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one setting and one seed of another, with models that are not trained."""
    root = tmp_path_factory.mktemp("runs")
    flags = clip.ModelFlags(hidden_size=16, num_hidden_layers=1, text_layers=1, num_heads=2, projection_dim=8)
    tokenizer = clip.make_tokenizer(["a red cube and a blue cone", "an image with a gray sphere"])
    size = {"height": 32, "width": 32}
    for number, (detail, temperature, seed) in enumerate([("poor", 0.5, 1), ("rich", None, 0), ("poor", 0.5, 0)]):
        torch.manual_seed(seed)
        folder = root / str(number)
        options = {**vars(flags), "image_size": 32, "temperature": temperature}
        clip.make_model(SimpleNamespace(**options), tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
        args = {"source": "synthetic", "detail": detail, "temperature": temperature, "style": "plain"}
        metrics = {"test_centroid_distance": 0.5 + seed / 5, "test_rmg": 0.1, "val_rmg": 0.2}
        results = {"script": "train_clip.py", "args": {**args, "image_size": 32, "seed": seed}, "metrics": metrics}
        (folder / "results.json").write_text(json.dumps(results | {"commit": "0123456"}))
    return root


def test_each_setting_has_its_runs_by_seed(runs):
    found = gap_points.find_settings(runs)
    assert {setting: [folder.name for folder in folders] for setting, folders in found.items()} == {
        ("poor", "0.5"): ["2", "0"],
        ("rich", "learned"): ["1"],
    }
    scores = gap_points.summarize_runs(found["poor", "0.5"])
    assert scores == {"centroid_distance": [0.6, 0.1414], "rmg": [0.1, 0.0]}


def test_scores_of_the_report_replace_those_of_the_points(runs):
    flags = [{"detail": "poor", "temperature": 0.5, "seed": seed} for seed in range(4)]
    metrics = [{"test_rmg": seed / 10, "val_rmg": 9.0} for seed in range(4)]
    rows = [
        {"status": "finished", "args": a, "metrics": m, "commit": "new"} for a, m in zip(flags, metrics, strict=True)
    ]
    rows[3]["status"] = "failed"
    rows.append(rows[0] | {"args": flags[0] | {"temperature": None}, "metrics": {"test_rmg": 5.0}})
    cell = {"detail": "poor", "temperature": "0.5", "seeds": 1, "seed": 0, "scores": {}, "views": {"none": {}}}
    content = {"script": "train_clip.py", "commit": "new", "cells": [cell]}
    found = gap_points.update_scores(content, Report(None, rows))
    assert found == {**content, "cells": [{**cell, "seeds": 3, "scores": {"rmg": [0.1, 0.1]}}]}
    for wrong in ({**content, "commit": "old"}, {**content, "cells": [{**cell, "seed": 7}]}):
        with pytest.raises(ValueError, match="points of captions='poor' with temperature='0.5' have seed .* again"):
            gap_points.update_scores(wrong, Report(None, rows))


def test_no_run(tmp_path):
    with pytest.raises(
        ValueError, match="has no finished run of train_clip.py on scenes. Run the experiment clip_gap"
    ):
        gap_points.find_settings(tmp_path)


def test_the_page_reads_what_the_script_writes(runs, tmp_path, monkeypatch, capsys):
    record_points = gap_points.record_points
    monkeypatch.setattr(
        make_gap_playground, "record_points", lambda *args, **sizes: record_points(*args, **sizes, **SIZES)
    )
    path = tmp_path / "space" / "gap.json"
    make_gap_playground.main([f"--runs={runs}", "--num_points=5", f"--output={path}"])
    assert f"{path.stat().st_size:,} bytes" in capsys.readouterr().out
    results = GapResults(path)
    assert results.details == ["rich", "poor"] and results.temperatures == ["learned", "0.5"]
    cell = results.get("poor", "0.5")
    assert (cell.seeds, cell.seed) == (2, 0) and results.commit == "0123456"
    assert results.fitted_on == "12 captioned scenes that CLIP was not trained on"
    assert set(cell.views) == {"none", *ALIGNMENTS}
    for view in cell.views.values():
        assert len(view["images"]) == len(view["texts"]) == 10 and set(view["scores"]) == set(SCORES)
    distances = [cell.views[name]["scores"]["centroid_distance"] for name in ("none", "centering")]
    assert distances[1] < distances[0]
    assert results.draw("poor", "0.5", "centering").count("<circle") == 20


def test_a_large_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gap_points, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="The points need 24 bytes. Expected at most 10. Record fewer points."):
        gap_points.write_points({"a": 1, "cells": []}, tmp_path / "gap.json")
    assert not (tmp_path / "gap.json").exists()
