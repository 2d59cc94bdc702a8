"""Images with phrases and masks from datasets that exist already, and datasets for the Hub."""

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_dl.data import phrasecut
from hf_dl.data.phrasecut_phrases import fold_words
from tests.loopback_hub import LoopbackHub

pytestmark = pytest.mark.usefixtures("private_cache")

PUSH = """
import sys
import datasets
import numpy as np
from hf_dl.data import phrasecut
options = {"max_images": 3, "size": 32, "negatives": 0.2}
splits = {split: phrasecut.load(split, **options) for split in ("validation", "test")}
phrasecut.push_to_hub(splits, "me/phrases", private=True)
again = phrasecut.load("test", "me/phrases")
assert all(np.array_equal(np.asarray(a[name]), np.asarray(b[name]))
           for a, b in zip(splits["test"], again, strict=True) for name in a)
assert next(iter(phrasecut.load("test", "me/phrases", streaming=True)))["phrase"] == again[0]["phrase"]
assert "hf_dl" in sys.modules
"""
READ = """
import sys
sys.modules["hf_dl"] = None  # an import of hf_dl raises ImportError
import datasets
rows = datasets.load_dataset("me/phrases", split="test")
assert rows.features["image"] == rows.features["mask"] == datasets.Image()
print(len(rows), rows[0]["image"].size, rows[0]["mask"].getextrema())
"""


@pytest.fixture
def plain():
    """A dataset of a user: gray images, masks of 0 and 1, and no names of the images."""
    rows = []
    for number in range(10):
        image = np.full((12, 16), 10 * number, dtype=np.uint8)
        for color in ("red", "blue"):
            mask = np.zeros((12, 16), dtype=np.uint8)
            mask[2:5, 3 : 4 + number] = 1
            rows.append(
                {"image": Image.fromarray(image), "text": f"{color} thing{number}", "mask": Image.fromarray(mask)}
            )
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "mask": datasets.Image()}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def test_a_dataset_of_the_user(plain):
    data = plain.rename_column("text", "phrase")
    parts = {split: phrasecut.load(split, data) for split in ("train", "validation", "test")}
    names = {split: set(part["image_id"]) for split, part in parts.items()}
    assert [len(part) for part in parts.values()] == [16, 2, 2]  # with both phrases of each image
    assert len(names["train"] | names["validation"] | names["test"]) == 10
    row = parts["test"][0]
    assert row["image"].mode == "RGB" and row["mask"].mode == "L" and row["seen"] and row["kind"] is None
    assert set(np.unique(row["mask"])) == {0, 255}
    small = phrasecut.load("train", data, size=8, max_images=3, negatives=0.5)
    assert len(set(small["image_id"])) == 3
    for one in small:
        assert one["image"].size == one["mask"].size == (8, 8)
        assert (one["kind"] == "negative") == (not np.asarray(one["mask"]).any())
    shown = {}
    for one in small:
        shown.setdefault(one["image_id"], {True: [], False: []})[one["kind"] == "negative"].append(one["phrase"])
    for phrases in shown.values():
        words = set().union(*map(fold_words, phrases[False]))
        assert all(not fold_words(phrase) & words for phrase in phrases[True])


def test_streams(plain):
    data = plain.rename_column("text", "phrase")
    stream = phrasecut.load("train", {"train": data.to_iterable_dataset(), "validation": data, "test": data}, size=8)
    whole = phrasecut.load("train", {"train": data, "validation": data, "test": data}, size=8)
    for one, other in zip(stream, whole, strict=True):
        assert np.array_equal(np.asarray(one["image"]), np.asarray(other["image"]))
        assert np.array_equal(np.asarray(one["mask"]), np.asarray(other["mask"]))
    with pytest.raises(ValueError, match="is a stream, from which images cannot be chosen or held out"):
        phrasecut.load("train", data.to_iterable_dataset(), max_images=2)
    with pytest.raises(ValueError, match="is a stream"):
        phrasecut.load("test", data.to_iterable_dataset())


def test_datasets_for_the_hub(tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(datasets.DatasetDict, "push_to_hub", lambda self, name, **options: pushed.update(
        {"splits": self, "name": name, **options}))  # fmt: skip
    data = phrasecut.load("test", max_images=3, size=32)
    phrasecut.push_to_hub({"test": data}, "me/phrases", private=True)
    assert pushed["name"] == "me/phrases" and pushed["private"]
    pushed["splits"]["test"].to_parquet(tmp_path / "test.parquet")
    found = datasets.load_dataset("parquet", data_files=str(tmp_path / "test.parquet"), split="train")
    assert found.features["image"] == found.features["mask"] == datasets.Image()  # readable without hf_dl
    again = phrasecut.load("test", {"test": found, "validation": found})
    for one, other, third in zip(data, found, again, strict=True):
        for name in one:
            assert np.array_equal(np.asarray(one[name]), np.asarray(other[name]))
            assert np.array_equal(np.asarray(one[name]), np.asarray(third[name]))


@pytest.mark.slow
def test_the_hub(tmp_path):
    with LoopbackHub() as hub:
        env = hub.env(tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        for code in (PUSH, READ):
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
        assert hub.repos["dataset", "me/phrases"].private
    data = phrasecut.load("test", max_images=3, size=32, negatives=0.2)
    assert done.stdout.split("\n")[0] == f"{len(data)} (32, 32) (0, 255)"


def test_saved_datasets(tmp_path):
    data = phrasecut.load("test", max_images=4, size=32)
    data.save_to_disk(tmp_path / "saved")
    again = phrasecut.load("test", tmp_path / "saved", negatives=0.5)
    kept = [row for row in again if row["kind"] != "negative"]
    assert len(again) > len(kept) > 0 and {row["image_id"] for row in kept} <= set(data["image_id"])
    assert all(np.asarray(row["mask"]).any() == (row["kind"] != "negative") for row in again)


def test_mistakes(plain):
    with pytest.raises(
        ValueError, match="'Dataset' has no column 'phrase', only image, text, mask. Use rename_column"
    ):
        phrasecut.load("train", plain)
    data = plain.rename_column("text", "phrase")
    with pytest.raises(ValueError, match="'dict' has no train split. Its splits: none."):
        phrasecut.load("train", {})
    with pytest.raises(ValueError, match="'dict' has no test split. Its splits: dev"):
        phrasecut.load("test", {"dev": data})
    with pytest.raises(ValueError, match="split='validation' would be empty: the source has 1 images"):
        phrasecut.load("validation", data.select([0, 1]))
    with pytest.raises(ValueError, match="The train split of 'dict' has no rows. Choose another split"):
        phrasecut.load("train", {name: data.select([]) for name in ("train", "validation", "test")})
    nameless = data.remove_columns("phrase").add_column("phrase", [None] * len(data))
    with pytest.raises(ValueError, match="Row 0 of 'Dataset' has the phrase None. Expected a text"):
        phrasecut.load("train", nameless)
    color = data.map(lambda row: {"mask": row["image"].convert("RGB")}, features=data.features)
    with pytest.raises(ValueError, match="A mask has the shape .* Expected a gray image"):
        phrasecut.load("train", color)[0]
