"""COCO instances as phrases: a small folder with masks drawn by hand, and real photographs where they are present."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_dl.data import phrasecut

COCO_MINI = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_mini"

pytestmark = pytest.mark.usefixtures("private_cache")


def square(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    names = {1: "person", 2: "cup", 3: "dining table", 4: "dog"}
    for part, first in (("train2017", 0), ("val2017", 100)):
        (root / part).mkdir()
        images, records = [], []
        for number in range(first, first + 8):
            images.append({"id": number, "file_name": f"{number:03}.jpg", "width": 30, "height": 20})
            Image.new("L" if number % 2 else "RGB", (30, 20), 50).save(root / part / f"{number:03}.jpg")
            # two cups, and a crowd of persons, which is given as run lengths: 40 pixels down the columns, then 60 more
            for box in ((1, 1, 4, 3), (3, 2, 8, 6)):
                records.append({"image_id": number, "category_id": 2, "iscrowd": 0, "segmentation": square(*box)})
            records.append({"image_id": number, "category_id": 1, "iscrowd": 1,
                            "segmentation": {"size": [20, 30], "counts": [40, 60, 500]}})  # fmt: skip
        images.append({"id": first + 9, "file_name": "none.jpg", "width": 30, "height": 20})  # nothing is annotated
        categories = [{"id": number, "name": name} for number, name in names.items()]
        content = {"images": images, "annotations": records, "categories": categories}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


def test_categories_are_phrases(folder):
    data = phrasecut.load("validation", folder, negatives=0.5)
    cup, crowd = np.zeros((2, 20, 30), dtype=np.uint8)
    cup[1:4, 1:5] = cup[2:7, 3:9] = 255
    crowd[:, 2:5] = 255
    assert len(data) == 32 and data.info.description.startswith("8 of 8 images are on disk (100.0%)")
    for number, row in enumerate(data):
        assert row["image_id"] == str(100 + number // 4) and row["image"].mode == "RGB"
        if number % 4 < 2:
            assert row["phrase"] == ("cup", "person")[number % 4] and row["kind"] == "name" and row["seen"]
            assert np.array_equal(np.asarray(row["mask"]), (cup, crowd)[number % 4])
            assert row["subsets"] == [["p_name", "i_multi"], ["p_name", "i_single"]][number % 4]
        else:
            assert row["phrase"] in ("dining table", "dog") and row["kind"] == "negative"
            assert not np.asarray(row["mask"]).any() and row["mask"].size == (30, 20)


def test_images_of_coco(folder):
    parts = {split: set(phrasecut.load(split, folder)["image_id"]) for split in ("train", "validation", "test")}
    assert parts["train"] | parts["test"] == {str(i) for i in range(8)} and len(parts["test"]) == 1
    assert parts["validation"] == {str(i) for i in range(100, 108)}
    (folder / "val2017" / "100.jpg").unlink()
    (folder / "images").mkdir()
    (folder / "val2017").rename(folder / "images" / "val2017")
    data = phrasecut.load("validation", folder, size=16, max_images=5, streaming=True)
    assert len(list(data)) == 10 and next(iter(data))["image"].size == next(iter(data))["mask"].size == (16, 16)
    assert phrasecut.find_coverage(folder, "validation") == phrasecut.Coverage(8, 7, (), 7, 16, 14)
    with pytest.raises(FileNotFoundError, match="1 of 8 images are missing in .*, such as image 100"):
        phrasecut.load("validation", folder, on_missing="raise")
    with pytest.raises(ValueError, match="split='miniv' is unknown; choose one of train, validation, test"):
        phrasecut.load("miniv", folder)
    (folder / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no file for split='test'. Its splits: val"):
        phrasecut.load("test", folder)


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="needs the photographs of coco_mini")
def test_photographs():
    data = phrasecut.load("validation", COCO_MINI, negatives=0.2, max_images=6)
    names = json.loads((COCO_MINI / "annotations" / "instances_val2017.json").read_text())
    names = {image["id"]: set() for image in names["images"]}, names
    for record in names[1]["annotations"]:
        names[0][record["image_id"]].add(record["category_id"])
    categories = {category["name"]: category["id"] for category in names[1]["categories"]}
    for row in data:
        present = categories[row["phrase"]] in names[0][int(row["image_id"])]
        assert present == (row["kind"] == "name") == bool(np.asarray(row["mask"]).any())
        assert row["image"].size == row["mask"].size and row["image"].mode == "RGB"
    assert len(set(data["image_id"])) == 6


def test_an_annotation_without_objects(folder):
    path = folder / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    with pytest.raises(ValueError, match="has no images for this split. Choose another split"):
        phrasecut.load("validation", folder)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("images", {"width": None}, r"images\[1\] of .* has no width. Expected COCO instances"),
        ("annotations", {"image_id": None}, r"annotations\[1\] of .* has no image_id"),
        ("annotations", {"category_id": 9}, "has no category 9, which an annotation names"),
        ("annotations", {"segmentation": [[1, 2, 3]]}, "is not polygons x, y, x, y, ... or uncompressed run lengths"),
        ("annotations", {"segmentation": {"size": [20, 30]}}, "is not polygons x, y, x, y, ... or uncompressed"),
    ],
)
def test_damaged_records(folder, place, change, message):
    path = folder / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content[place][1].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        phrasecut.load("validation", folder)[0]


def test_ids_that_are_texts(folder):
    path = folder / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"] = [{**image, "id": f"a{image['id']}"} for image in content["images"]]
    content["annotations"] = [{**each, "image_id": f"a{each['image_id']}"} for each in content["annotations"]]
    path.write_text(json.dumps(content))
    assert phrasecut.load("validation", folder)[0]["image_id"] == "a100"
