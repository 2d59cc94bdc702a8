"""Files of PhraseCut that are written from scenes, with images that are missing, gray, rotated or damaged."""

import json
import random
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hf_dl.data import phrasecut, scenes
from hf_dl.data.phrasecut_features import draw_polygons
from hf_dl.data.phrasecut_phrases import draw_false_phrases, fold_words, name_subsets
from hf_dl.data.phrasecut_scenes import scene_phrases
from hf_dl.data.phrasecut_writer import trace_polygons

from .errors import failure


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def rows():
    data = scenes.load("test", num_scenes=12, size=32, num_objects=(1, 4), streaming=True)
    return list(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("phrasecut") / "VGPhraseCut_v0"
    phrasecut.write_phrasecut(
        folder, {"train": rows[:8], "validation": rows[8:9], "miniv": rows[9:10], "test": rows[10:]}
    )
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "VGPhraseCut_v0")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def official_mask(polygons, width, height):
    """The rule of the code of PhraseCut, which draws each polygon on its own."""
    total = np.zeros((height, width))
    for polygon in polygons:
        if len(polygon) < 2:
            continue
        image = Image.new("L", (width, height), 0)
        ImageDraw.Draw(image).polygon([(int(x), int(y)) for x, y in polygon], outline=1, fill=1)
        total += np.array(image)
    return total > 0


def test_polygons_are_drawn_by_the_official_rule():
    rng = np.random.default_rng(0)
    for _ in range(50):
        width, height = rng.integers(5, 40, 2).tolist()
        polygons = [(rng.uniform(-0.2, 1.2, (count, 2)) * [width, height]).tolist() for count in rng.integers(1, 9, 3)]
        mask = draw_polygons(polygons, width, height)
        assert mask.dtype == bool and np.array_equal(mask, official_mask(polygons, width, height))


def test_traced_polygons_are_the_mask():
    rng = np.random.default_rng(0)
    for _ in range(200):
        mask = rng.random(rng.integers(1, 16, 2)) < rng.random()
        assert np.array_equal(official_mask(trace_polygons(mask), *mask.shape[::-1]), mask)
    ring = np.ones((5, 5), dtype=bool)
    ring[2, 2] = False
    assert np.array_equal(official_mask(trace_polygons(ring), 5, 5), ring)


def test_the_written_files_are_the_official_ones(written, rows):
    assert {path.name for path in written.iterdir()} == {
        "image_data_split.json", "name_att_rel_count.json", "images",
        "refer_train.json", "refer_val.json", "refer_test.json", "refer_miniv.json",
    }  # fmt: skip
    images = json.loads((written / "image_data_split.json").read_text())
    assert [image["split"] for image in images] == ["train"] * 8 + ["val", "miniv", "test", "test"]
    assert images[3] == {"image_id": 4, "coco_id": None, "flickr_id": None, "width": 32, "height": 32, "url": None,
                         "split": "train"}  # fmt: skip
    tasks = json.loads((written / "refer_test.json").read_text())
    assert len({task["task_id"] for task in tasks}) == len(tasks)
    for task in tasks:
        assert task.keys() == {"task_id", "image_id", "ann_ids", "instance_boxes", "Polygons", "phrase",
                               "phrase_structure"}  # fmt: skip
        structure = task["phrase_structure"]
        assert structure.keys() == {"name", "attributes", "relation_ids", "relation_descriptions", "type"}
        relations = [word for pair in structure["relation_descriptions"] for word in pair]
        assert task["phrase"] == " ".join([*structure["attributes"], structure["name"], *relations])
        assert len(task["ann_ids"]) == len(task["instance_boxes"]) == len(task["Polygons"])
        for (x, y, width, height), polygons in zip(task["instance_boxes"], task["Polygons"], strict=True):
            points = np.concatenate(polygons)
            assert points.min(0).tolist() == [x, y] and points.max(0).tolist() == [x + width - 1, y + height - 1]
    counts = json.loads((written / "name_att_rel_count.json").read_text())
    assert counts.keys() == {"cat", "att", "rel"} and counts["cat"][0][0] == "object"


@pytest.mark.parametrize("split", ["test", "miniv", "validation"])
def test_masks_of_files_are_the_masks_of_the_scenes(written, rows, split):
    first = {"test": 10, "miniv": 9, "validation": 8}[split]
    data = phrasecut.load(split, written.parent)  # the folder is found
    expected = [
        (str(number + 1), phrase, np.isin(np.asarray(row["mask"]), [i + 1 for i in phrase.objects]))
        for number, row in enumerate(rows)
        for phrase in scene_phrases(row["objects"], str(number + 1))
        if first <= number < first + (2 if split == "test" else 1)
    ]
    assert len(data) == len(expected) > 0
    for row, (image_id, phrase, mask) in zip(data, expected, strict=True):
        assert (row["image_id"], row["phrase"], row["kind"], row["seen"]) == (image_id, phrase.text, phrase.kind, True)
        assert np.array_equal(np.asarray(row["mask"]), 255 * mask)
        subsets = name_subsets(phrase.kind, len(phrase.objects), phrase.attributes, phrase.relations, rank=0)
        assert row["subsets"] == subsets and "c20" in subsets
        difference = np.asarray(row["image"], float) - np.asarray(rows[int(image_id) - 1]["image"], float)
        assert row["image"].mode == "RGB" and abs(difference).mean() < 10  # JPEG


def test_missing_images(folder):
    for name in ("1", "5"):
        (folder / "images" / f"{name}.jpg").unlink()
    (folder / "images").rename(folder / "VG_100K")
    (folder / "VG_100K_2").mkdir()
    (folder / "VG_100K" / "2.jpg").rename(folder / "VG_100K_2" / "2.jpg")
    data = phrasecut.load("train", folder)
    assert list(dict.fromkeys(data["image_id"])) == ["2", "3", "4", "6", "7", "8"]
    tasks = json.loads((folder / "refer_train.json").read_text())
    kept = sum(task["image_id"] not in (1, 5) for task in tasks)
    coverage = phrasecut.find_coverage(folder, "train")
    assert coverage == phrasecut.Coverage(8, 6, (), 6, len(tasks), kept) and len(data) == kept
    assert data.info.description == coverage.describe() == (
        f"6 of 8 images are on disk (75.0%). The dataset has 6 of them, with {kept} of {len(tasks)} phrases."
    )  # fmt: skip
    with pytest.raises(
        FileNotFoundError, match="2 of 8 images are missing in .*, such as image 1. Copy them there, or"
    ):
        phrasecut.load("train", folder, on_missing="raise")
    (folder / "VG_100K" / "1.jpg").write_bytes((folder / "VG_100K" / "3.jpg").read_bytes())
    assert "1" in phrasecut.load("train", folder)["image_id"]  # found without a change of the annotation
    shutil.rmtree(folder / "VG_100K")
    shutil.rmtree(folder / "VG_100K_2")
    with pytest.raises(FileNotFoundError, match="8 of 8 images are missing"):
        phrasecut.load("train", folder)


def test_wrong_gray_and_rotated_images(folder):
    images = folder / "images"
    Image.new("RGB", (32, 31)).save(images / "1.jpg")  # a wrong size, as 17 images of the real data
    (images / "2.jpg").write_bytes(b"no image")
    gray = Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32))
    gray.save(images / "3.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(images / "4.jpg").save(images / "rotated.jpg", exif=exif, quality=95)
    (images / "rotated.jpg").replace(images / "4.jpg")
    data = phrasecut.load("train", folder)
    assert set(data["image_id"]) == {"3", "4", "5", "6", "7", "8"}
    assert "Left out because of damage or another size: 1.jpg, 2.jpg." in data.info.description
    assert phrasecut.find_coverage(folder).wrong == ("1.jpg", "2.jpg")
    by_name = {row["image_id"]: np.asarray(row["image"]) for row in data}
    assert by_name["3"].shape == (32, 32, 3) and abs(by_name["3"][..., 1] - np.asarray(gray, float)).mean() < 5
    with Image.open(images / "4.jpg") as stored:
        assert np.array_equal(by_name["4"], np.asarray(stored))  # polygons count the stored pixels
    Image.new("RGB", (9, 9)).save(images / "3.jpg")
    with pytest.raises(ValueError, match="3.jpg is 9x9, but its annotation is 32x32. Load the dataset again"):
        data[0]
    (images / "3.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="3.jpg does not exist any more. Load the dataset again"):
        data[0]


def test_max_images_size_and_streaming(folder):
    names = [set(phrasecut.load("train", folder, max_images=count)["image_id"]) for count in (2, 5, 50)]
    assert [len(found) for found in names] == [2, 5, 8] and names[0] < names[1] < names[2]
    assert set(phrasecut.load("train", folder, max_images=2, seed=1)["image_id"]) != names[0]
    options = {"max_images": 3, "negatives": 0.4, "size": 20}
    data = list(phrasecut.load("train", folder, **options))
    full = list(phrasecut.load("train", folder, **{**options, "size": None}))
    stream = phrasecut.load("train", folder, **options, streaming=True)
    assert stream.num_shards == 3
    for row, other, large in zip(data, stream, full, strict=True):
        assert row["image"].size == row["mask"].size == (20, 20)
        assert all(np.array_equal(np.asarray(row[name]), np.asarray(other[name])) for name in row)
        assert np.asarray(row["mask"]).any() == np.asarray(large["mask"]).any()  # small objects do not vanish
        assert set(np.unique(row["mask"])) <= {0, 255}


def test_missing_splits_are_held_out_by_image(folder):
    (folder / "refer_val.json").unlink()
    parts = {split: set(phrasecut.load(split, folder, holdout=0.25)["image_id"]) for split in ("train", "validation")}
    assert [len(part) for part in parts.values()] == [6, 2]
    assert parts["train"] | parts["validation"] == {str(i) for i in range(1, 9)}
    assert set(phrasecut.load("test", folder)["image_id"]) == {"11", "12"}
    graphs = [{"image_id": i, "objects": [{"names": ["object", "cube", "cone"]}]} for i in range(1, 9)]
    (folder / "scene_graphs_train.json").write_text(json.dumps(graphs))  # belongs to the images that are held out, too
    false = {row["phrase"].split()[-1] for row in phrasecut.load("validation", folder, holdout=0.25, negatives=0.9)
             if row["kind"] == "negative"}  # fmt: skip
    assert not false & {"object", "cube", "cone"}
    (folder / "refer_train.json").unlink()
    with pytest.raises(FileNotFoundError, match="no refer_val.json for split='validation'. Its splits: test, miniv"):
        phrasecut.load("validation", folder)


def test_negative_phrases_are_false_of_the_image(folder):
    names = ["dogs", "dog", "cat", "two men", "woman", "sky", "tree", "car"]
    tasks = json.loads((folder / "refer_train.json").read_text())
    first = {task["image_id"]: number for number, task in reversed(list(enumerate(tasks)))}

    def rename(content):
        content[:] = [content[number] for number in first.values()]
        for task, name in zip(content, names, strict=True):
            task["phrase_structure"] |= {"name": name, "attributes": ["big"], "relation_descriptions": []}
            task["phrase"] = f"big {name}"
        content[7]["phrase"] = "big car near trees"

    edit(folder / "refer_train.json", rename)
    shown = {str(image): name for image, name in zip(first, names, strict=True)}

    def negatives():
        found = {}
        for row in phrasecut.load("train", folder, negatives=0.95):
            if row["kind"] == "negative":
                assert not np.asarray(row["mask"]).any() and row["subsets"] == []
                found.setdefault(shown[row["image_id"]], set()).add(row["phrase"])
        return found

    found = negatives()
    everything = {f"big {name}" for name in names[:7]} | {"big car near trees"}
    assert found["dog"] == everything - {"big dog", "big dogs"}
    assert found["woman"] == everything - {"big woman", "big two men"}  # all are people
    assert found["car"] == everything - {"big car near trees", "big tree"}
    graphs = [{"image_id": int(image), "objects": [{"names": ["clouds"]}, {"names": ["the sky"]}]} for image in shown]
    (folder / "scene_graphs_train.json").write_text(json.dumps(graphs))
    assert negatives()["dog"] == everything - {"big dog", "big dogs", "big sky"}  # seen in the scene graph


def test_false_phrases():
    pairs = ["Glasses", "a glass"], ["BUS", "buses"], ["two houses", "house"], ["leaf", "dry leaves"]
    for one, other in *pairs, ["man", "babies"], ["lady", "people"], ["berry", "berries"], ["tomato", "tomatoes"]:
        assert fold_words(one) & fold_words(other), (one, other)
        assert draw_false_phrases(2, [(one, one), ("red sky", "sky")], [other], random.Random(0)) == ["red sky"]
    assert not fold_words("the top of a car") & fold_words("a horse in front of the man")
    assert draw_false_phrases(3, [], ["a"], random.Random(0)) == []


def test_mistakes(folder):
    assert "on_missing='ask' is unknown; choose one of skip, raise" in failure(
        lambda: phrasecut.load("train", folder, on_missing="ask")
    )
    assert "split='dev' is unknown; choose one of train, validation, test, miniv" in failure(
        lambda: phrasecut.load("dev", folder)
    )
    assert "holdout=0.5 must be above 0 and below 0.5" in failure(lambda: phrasecut.load("train", folder, holdout=0.5))
    assert "is not empty" in failure_of_write(folder, {})
    assert "scenes has the split 'val'. Choose" in failure_of_write(folder.parent / "new", {"val": []})
    edit(folder / "refer_train.json", lambda tasks: tasks[2].pop("Polygons"))
    assert "refer_train.json has no 'Polygons'. Expected a task" in failure(lambda: phrasecut.load("train", folder))
    for name, value in (("Polygons", [[[1, 2, 3, 4]]]), ("Polygons", [[[["a", 1]]]]), ("phrase", None)):
        edit(folder / "refer_val.json", lambda tasks, name=name, value=value: tasks[1].update({name: value}))
        assert "Record 1 of" in failure(lambda: phrasecut.load("validation", folder))
    (folder / "scene_graphs_test.json").write_text('[{"image_id": 1}, {"objects": []}]')
    assert "scene_graphs_test.json is damaged. Expected image_id" in failure(
        lambda: phrasecut.load("test", folder, negatives=0.5)
    )
    (folder / "refer_train.json").write_text("[{")
    assert "refer_train.json is damaged or ends too early" in failure(lambda: phrasecut.load("train", folder))
    (folder / "name_att_rel_count.json").write_text("[]")
    assert "name_att_rel_count.json is damaged. Copy it again" in failure(lambda: phrasecut.load("test", folder))
    (folder / "refer_miniv.json").write_text("[]")
    assert "refer_miniv.json has no phrases. Copy it again" in failure(lambda: phrasecut.load("miniv", folder))
    edit(folder / "image_data_split.json", lambda images: images[3].pop("width"))
    assert "Record 3 of" in failure(lambda: phrasecut.load("test", folder))
    (folder / "image_data_split.json").unlink()
    assert "has no image_data_split.json" in failure(lambda: phrasecut.load("test", folder))
    empty = folder.parent / "empty"
    empty.mkdir()
    assert "has no refer_*.json of PhraseCut, no annotations" in failure(lambda: phrasecut.load("test", empty))
    assert "does not exist. Expected a folder of PhraseCut or COCO" in failure(
        lambda: phrasecut.load("test", folder.parent / "nowhere")
    )
    with pytest.raises(ValueError, match="is not a folder of PhraseCut or COCO"):
        phrasecut.load("test", max_images=1, size=32).to_parquet(empty / "test.parquet")
        phrasecut.find_coverage(empty)


def failure_of_write(folder, scenes):
    with pytest.raises((ValueError, FileExistsError)) as caught:
        phrasecut.write_phrasecut(folder, scenes)
    return str(caught.value)
