import json
import re

import pytest

from hf_dl.demo.gap import GapResults, draw_points

from .tiny import make_gap


@pytest.fixture
def results(tmp_path):
    (tmp_path / "gap.json").write_text(json.dumps(make_gap()))
    return GapResults(tmp_path / "gap.json")


def test_the_dials_have_what_was_recorded(results):
    assert results.details == ["rich", "poor"] and results.temperatures == ["learned", "0.5"]
    assert results.get("poor", "0.5").seeds == 3 and results.commit == "0123456"
    sentence = "captions='rich' with temperature='0.5' have no recorded results. Choose one of: rich, learned; poor"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        results.draw("rich", "0.5", "centering")


def test_a_missing_file_gives_no_results(tmp_path):
    results = GapResults(tmp_path / "gap.json")
    assert not results.cells and results.details == results.temperatures == []
    with pytest.raises(ValueError, match="Choose one of: none"):
        results.get("rich", "learned")


def test_two_panels_of_one_scale_with_scores(results):
    text = results.draw("poor", "learned", "centering")
    assert text.count("<svg") == 2 and text.count("<circle") == 8 and text.count("<line") == 4
    assert "Before alignment" in text and "After centering" in text
    assert "<td>distance of the centroids</td><td>0.800</td>" in text and "<td>0.100</td>" in text
    assert "All 3 models of these settings" in text and "<td>70.0% ± 2.0%</td>" in text
    assert "The alignment was fitted on 5 &lt;scenes&gt;." in text and "The plots show the model with seed 0." in text
    # the images are at 100 + 95 before, and at an eighth of that after
    assert "cx='195.0'" in text and "cx='111.9'" in text and text != results.draw("poor", "learned", "rotation")


def test_one_model_has_no_deviation(tmp_path):
    content = make_gap()
    content["cells"][0]["seeds"] = 1
    (tmp_path / "gap.json").write_text(json.dumps(content))
    text = GapResults(tmp_path / "gap.json").draw("rich", "learned", "rotation")
    assert "Test scores of this model" in text and "<td>70.0%</td>" in text and "±" not in text


def test_points_at_zero_are_drawn():
    text = draw_points([0.0, 0.0], [0.0, 0.0], 0.0, "Before <b>")
    assert "cx='100.0' cy='100.0'" in text and "aria-label='Before &lt;b&gt;: 1 images and" in text
