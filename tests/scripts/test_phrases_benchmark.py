"""The benchmark of many phrases for one image."""

import json

from scripts.benchmarks import phrases
from tests.models.test_clip_segmenter import CLIP


def test_it_measures_every_decoder_and_writes_a_card(tmp_path, monkeypatch):
    setting = phrases.Setting({**CLIP, "text_config": {**CLIP["text_config"], "vocab_size": 512}}, [0, 1], 16, True)
    monkeypatch.setattr(phrases, "SETTINGS", {"tiny": setting})
    monkeypatch.setattr(phrases, "DECODERS", {name: phrases.DECODERS[name] for name in ("unet", "clipseg refined")})
    results = phrases.main(["--repetitions=1", f"--output={tmp_path / 'found.json'}"])
    assert json.loads((tmp_path / "found.json").read_text()) == results
    assert list(results) == ["tiny"] and set(results["tiny"]) == set(phrases.DECODERS)
    card = (tmp_path / "found.md").read_text()
    for name, row in results["tiny"].items():
        assert row["largest_difference"] < 1e-5 and 1 < row["ratio_of_operations"] < 10
        assert f"| {name} | {row['together_cpu_ms']:,.1f} | {row['one_by_one_cpu_ms']:,.1f} |" in card


def test_the_card_lists_where_the_expected_ratio_holds():
    row = {"together_cpu_ms": 1, "one_by_one_cpu_ms": 1, "ratio_of_operations": 1, "image_cpu_ms": 1}
    rows = {name: {**row, "decoder_cpu_ms": 1, "ratio": ratio} for name, ratio in (("fast", 5.0), ("slow", 4.99))}
    card = phrases.make_card({"small": rows, "other": {"slow": rows["slow"]}})
    assert "at least 5 times as fast: fast.\n" in card and "at least 5 times as fast: none.\n" in card
