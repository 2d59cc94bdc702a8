import json

import numpy as np
import pytest
from PIL import Image

from hf_dl.demo import page
from hf_dl.demo.recordings import MAX_PICTURE, SMALL, Example, save_recordings, show_recordings

from ..spaces.pages import make_image

SCORES = {"Test accuracy": "test_accuracy"}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    results = {
        "script": "train_x.py", "commit": "0123456789", "args": {"output_dir": "/home/me/runs/x", "n": 2},
        "metrics": {"test_accuracy": 0.98765}, "seconds": 1.0,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_what_is_saved_is_shown(run, tmp_path):
    space = tmp_path / "space"
    (space / "examples").mkdir(parents=True)
    (space / "examples" / "9_9.png").write_bytes(b"an old picture")
    bars = ("Classes", [("cat", 0.123456), ("dog", 0.5)], "dog")
    examples = [
        Example("A <b>cat</b>.", {"Image": make_image((600, 300)), "Map": make_image()}, bars),
        Example("Words.", {"Wide": make_image((1200, 300))}, lines=["One & two."], wide=True),
    ]
    path = save_recordings(space, run, examples, title=make_image(), scores=SCORES)
    content = json.loads(path.read_text())
    assert content["run"] == {"script": "train_x.py", "commit": "0123456789", "args": {"output_dir": "x", "n": 2}}
    assert content["examples"][0]["bars"] == ["Classes", [["cat", 0.1235], ["dog", 0.5]], "dog"]
    files = sorted(path.name for path in (space / "examples").glob("*.png"))
    assert files == ["1_1.png", "1_2.png", "2_1.png", "title.png"]
    with Image.open(space / "examples" / "1_1.png") as picture:
        assert picture.size == (SMALL, SMALL // 2)
    shown = show_recordings(space)
    assert shown.count("data:image/png;base64,") == 3 and shown.count("class='wide'") == 1
    for text in ("A &lt;b&gt;cat&lt;/b&gt;.", "One &amp; two.", "commit <code>0123456</code>", "Test accuracy 0.988"):
        assert text in shown
    assert "12.3%" in shown and "train_x.py" in shown
    assert "data:image/png;base64," in page.title("Page", "Purpose.", space)


def test_without_recordings_nothing_is_shown(tmp_path):
    assert show_recordings(tmp_path) == "" and "<img" not in page.title("Page", "Purpose.", tmp_path)


def test_a_run_of_another_script(run, tmp_path):
    with pytest.raises(ValueError, match="has no metric 'test_answers'. Record a run of the page's default script"):
        save_recordings(tmp_path, run, [], title=make_image(), scores={"Answers": "test_answers"})


def test_a_picture_that_is_too_large(run, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=f"1_1.png has .* bytes. Expected at most {MAX_PICTURE:,}"):
        save_recordings(tmp_path, run, [Example("x", {"x": noise}, wide=True)], title=make_image(), scores=SCORES)
