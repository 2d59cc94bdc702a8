"""Real images with captions, from small files in the formats of COCO and Flickr, from tables and from the Hub."""

import io
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_dl.data import captioned_images, captions
from hf_dl.data.captions import load
from tests.loopback_hub import LoopbackHub

from .errors import failure

pytestmark = pytest.mark.usefixtures("private_cache")

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "validation", "test")
COCO_MINI = ROOT.parent / "shared" / "data" / "coco_mini"


def picture(number):
    return Image.new("RGB", (24, 16), (10 * number, 0, 255))


def write_images(folder, count, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        picture(number).save(folder / f"{number}.png")
    return folder


def numbers(rows):
    """The number of each image, from its color, which must be the number in its caption and in its file name."""
    found = []
    for row in rows:
        assert row["image"].mode == "RGB" and row["objects"] == []
        number = round(np.asarray(row["image"])[0, 0, 0] / 10)
        assert all(f"number {number}" in text for text in row["captions"]), row
        found.append(number)
    return found


# --- COCO ------------------------------------------------------------------------------------------------------------


def coco(count, start=0):
    ids = range(start, start + count)
    return {
        "images": [{"id": 100 + i, "file_name": f"{i}.png"} for i in ids],
        "annotations": [
            {"image_id": 100 + i, "caption": f" {a} of\nnumber {i} "} for a in ("Photo", "Art") for i in ids
        ],
    }


def write_coco(root):
    (root / "annotations").mkdir(parents=True)
    for split, count, start in (("train", 10, 0), ("val", 3, 10)):
        write_images(root / f"{split}2017", count, start)
        (root / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(coco(count, start)))
    return root


def test_a_coco_folder(tmp_path):
    root = write_coco(tmp_path / "coco")
    parts = {split: load(split, root) for split in SPLITS}
    found = {split: numbers(rows) for split, rows in parts.items()}
    assert {split: len(rows) for split, rows in found.items()} == {"train": 9, "validation": 3, "test": 1}
    assert sorted(sum(found.values(), [])) == list(range(13)) and found["validation"] == [10, 11, 12]
    row = parts["validation"][0]
    assert row["image_id"] == "110" and row["captions"] == ["Photo of number 10", "Art of number 10"]
    assert parts["train"].features == captions.FEATURES
    assert parts["train"].info.description == "9 images with 18 captions."
    assert load("train", root, num_pairs=4)["image_id"][:] == parts["train"]["image_id"][:4]


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="needs the photographs of coco_mini")
def test_captions_of_photographs():
    truth: dict[str, list[str]] = {}
    content = json.loads((COCO_MINI / "annotations" / "captions_val2017.json").read_text())
    for record in content["annotations"]:
        truth.setdefault(str(record["image_id"]), []).append(" ".join(record["caption"].split()))
    files = captioned_images.find_caption_files(COCO_MINI)
    assert {part: len(captioned_images.read_caption_file(*found)) for part, found in files.items()} == {
        "train": 80, "val": 79
    }  # fmt: skip
    rows = load("validation", COCO_MINI, size=16, num_pairs=8)
    assert len(content["images"]) == len(truth) == 79 and len(rows) == 8
    for row in rows:
        assert row["captions"] == truth[row["image_id"]] and len(row["captions"]) == 5
        assert row["image"].size == (16, 16) and row["image"].mode == "RGB"


def test_splits_of_one_coco_file_never_share_an_image(tmp_path):
    root = write_coco(tmp_path / "coco")
    options = {"annotations": root / "annotations" / "captions_train2017.json", "size": 8}
    parts = {split: numbers(load(split, root / "train2017", **options)) for split in SPLITS}
    assert [len(part) for part in parts.values()] == [8, 1, 1] and sorted(sum(parts.values(), [])) == list(range(10))
    stream = load("train", root / "train2017", **options, streaming=True)
    assert isinstance(stream, datasets.IterableDataset) and numbers(stream) == parts["train"]
    assert next(iter(stream))["image"].size == (8, 8)


def test_images_keep_their_size_and_content(tmp_path):
    root = write_coco(tmp_path / "coco")
    rows = load("validation", root).cast_column("image", datasets.Image(decode=False))
    assert rows[0]["image"]["bytes"] == (root / "val2017" / "10.png").read_bytes()
    # other modes and turned images are converted
    turned = picture(11)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "val2017" / "11.png", exif=exif)
    Image.new("LA", (5, 4), (0, 0)).save(root / "val2017" / "12.png")
    rows = load("validation", root)
    assert [image.size for image in rows["image"]] == [(24, 16), (16, 24), (5, 4)]
    assert [image.mode for image in rows["image"]] == ["RGB"] * 3 and rows[2]["image"].getpixel((0, 0)) == (255,) * 3


def test_mistakes_in_coco_files_are_explained(tmp_path):
    root = write_images(tmp_path / "images", 3)
    path = tmp_path / "captions.json"

    def message(content=None, **changes):
        path.write_text(json.dumps({**coco(3), **changes}) if content is None else content)
        return failure(lambda: [load(split, root, annotations=path) for split in SPLITS])

    assert f"annotations='{tmp_path}/x.json' does not exist. Expected COCO captions" in failure(
        lambda: load("test", root, annotations=tmp_path / "x.json")
    )
    assert "is not JSON: " in message("{") and "has no annotations and no images" in message("{}")
    assert "Annotation 0 of " in (text := message(annotations=[{"image_id": 1, "bbox": []}]))
    assert "has no caption. Expected COCO captions, such as captions_val2017.json" in text
    assert "has the caption 7. Expected text" in message(annotations=[{"image_id": 100, "caption": 7}])
    assert "Image 0 of " in (text := message(images=[{"id": 1}])) and "has no file_name" in text
    assert "has no images. Expected COCO captions" in message(images=[])
    annotated = [{"image_id": 100, "caption": "number 0"}, {"image_id": 101, "caption": " "}]
    text = message(annotations=annotated)
    assert "1 of 1 images of " in text and (".png (it has no caption)") in text
    assert "needs a folder of images, but got source='synthetic'" in failure(lambda: load(annotations=path))
    assert "needs a folder of images, but got source='a/b'" in failure(lambda: load(source="a/b", annotations=path))
    assert "is not a folder. Expected the folder of the images" in failure(
        lambda: load("test", path, annotations=path)
    )


def test_images_that_cannot_be_used_are_refused_or_skipped(tmp_path):
    root = write_coco(tmp_path / "coco")
    (root / "val2017" / "11.png").unlink()
    content = coco(3, 10)
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] != 112]
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    text = failure(lambda: load("validation", root))
    assert "2 of 3 images of" in text and "11.png (the file does not exist)" in text and "(it has no caption)" in text
    with pytest.warns(UserWarning, match="2 of 3 images of .* cannot be read and are skipped: "):
        rows = load("validation", root, corrupt="skip")
    assert numbers(rows) == [10] and "are skipped: " in rows.info.description
    with pytest.warns(UserWarning, match="cannot be read and is skipped: .*"):
        assert numbers(load("validation", root, corrupt="skip", streaming=True)) == [10]
    assert "Skip it with corrupt='skip'" in failure(lambda: list(load("validation", root, streaming=True)))


# --- tables of Flickr ------------------------------------------------------------------------------------------------

FLICKR30K = """image_name| comment_number| comment
0.png| 0| Photo of "number 0" , in blue .
0.png| 1| Art | number 0
1.png| 0   Photo of number 1 .
2.png| 0| Photo of number 2
"""
FLICKR8K = (
    'image,caption\n0.png,"Photo of number 0, in ""blue"""\n0.png,Art of number 0\n1.png,number 1\n2.png,number 2\n'
)
TOKENS = "0.png#0\tPhoto of number 0\n0.png#1\tArt of number 0\n1.png#0\tnumber 1 .\n\n2.png#0\tnumber 2\n"
NO_HEADER = "0.png;Photo; number 0\n0.png;Art of number 0\n1.png;number 1\n2.png;number 2\n"
TABLES = {
    "results.csv": (FLICKR30K, ['Photo of "number 0" , in blue .', "Art | number 0"]),
    "captions.txt": (FLICKR8K, ['Photo of number 0, in "blue"', "Art of number 0"]),
    "Flickr8k.token.txt": (TOKENS, ["Photo of number 0", "Art of number 0"]),
    "plain.csv": (NO_HEADER, ["Photo; number 0", "Art of number 0"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_captions(tmp_path, name):
    content, expected = TABLES[name]
    write_images(tmp_path / "inner" / "images", 3)
    (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
    parts = {split: load(split, tmp_path) for split in SPLITS}
    assert sorted(sum((numbers(rows) for rows in parts.values()), [])) == [0, 1, 2]
    rows = {row["image_id"]: row["captions"] for rows in parts.values() for row in rows}
    assert rows["0.png"] == expected and len(rows["1.png"]) == len(rows["2.png"]) == 1
    for source, options in (
        (tmp_path / name, {}),  # the images are beside it
        (tmp_path / "inner", {"annotations": tmp_path / name}),
    ):
        assert load("train", source, **options)["image_id"][:] == parts["train"]["image_id"][:]


def test_columns_of_tables(tmp_path):
    write_images(tmp_path, 3)
    path = tmp_path / "table.tsv"
    path.write_text("url\tphoto\ttitle\n" + "".join(f"x\t{i}.png\tnumber {i}\n" for i in range(3)))
    assert "has the columns url, photo, title. Set image_column to one of them" in failure(lambda: load("train", path))
    options = {"image_column": "photo", "caption_column": "title"}
    assert len(numbers(load("train", path, **options))) == 1
    text = failure(lambda: load("train", path, image_column="photo", caption_column="name"))
    assert "caption_column='name' is not a column of" in text and "Its columns: url, photo, title" in text


def test_mistakes_in_tables_are_explained(tmp_path):
    write_images(tmp_path, 3)
    path = tmp_path / "captions.txt"

    def message(content):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return failure(lambda: load("train", tmp_path))

    assert "starts with 'hello'. Expected COCO captions (JSON), or a table" in message("hello\n")
    assert "Line 3 of " in (text := message("image,caption,x\n0.png,number 0,\n1.png,number 1\n"))
    assert "has 2 fields. Expected 3: image, caption, x" in text
    assert (
        "Line 2 of " in (text := message("0.png#0\tnumber 0\nhello\n")) and "is 'hello'. Expected name.jpg#0" in text
    )
    assert "is not UTF-8 text" in message(b"image,caption\n0.png,\xff\n")
    assert "has no images. Expected COCO captions" in message("image,caption\n")
    (tmp_path / "other.csv").write_text("")
    assert "has several caption files: captions.txt, other.csv. Set annotations" in message("x")
    assert "has no captions. Expected annotations/captions_*.json of COCO" in failure(
        lambda: load("train", write_images(tmp_path / "plain", 1))
    )


# --- datasets and the Hub --------------------------------------------------------------------------------------------


def table(count, start=0, **columns):
    """A dataset with images in the column `photo`, and further columns made from the number of the image."""
    ids = range(start, start + count)
    data = datasets.Dataset.from_dict({"photo": [picture(i) for i in ids]}, datasets.Features(photo=datasets.Image()))
    for name, make in columns.items():
        data = data.add_column(name, [make(i) for i in ids])
    return data


CAPTION_COLUMNS = {
    "text": {"text": lambda i: f"number {i}"},
    "list": {"caption": lambda i: [f"number {i}", f"Art of number {i}"]},
    "record": {"sentences": lambda i: {"raw": f"number {i}", "imgid": i}},
    "records": {"sentences": lambda i: [{"raw": f"number {i}"}, {"raw": f"Art of number {i}"}]},
    "numbered": {"caption_0": lambda i: f"number {i}", "caption_1": lambda i: f"Art of number {i}", "b": lambda i: i},
}


@pytest.mark.parametrize("kind", CAPTION_COLUMNS)
def test_columns_with_captions(kind):
    data = table(5, **CAPTION_COLUMNS[kind])
    expected = [f"number {i}" for i in range(5)], [f"Art of number {i}" for i in range(5)]
    rows = load("validation", {"val": data.with_format("numpy")})
    assert numbers(rows) == [0, 1, 2, 3, 4] and rows["image_id"][:3] == [
        "validation-0",
        "validation-1",
        "validation-2",
    ]
    several = kind in ("list", "records", "numbered")
    assert rows["captions"][:] == [list(texts) for texts in zip(*expected, strict=True)] if several else expected[0]
    stream = load("validation", {"val": data.to_iterable_dataset()})
    assert isinstance(stream, datasets.IterableDataset)
    for _ in range(2):  # a stream can be read again
        assert [row["captions"] for row in stream] == rows["captions"][:]


def test_rows_of_the_same_image_stay_in_one_split():
    data = datasets.concatenate_datasets([table(20, caption=lambda i: f"number {i}", img_id=lambda i: i)] * 2)
    parts = [numbers(load(split, data)) for split in SPLITS]
    assert [len(part) for part in parts] == [32, 4, 4]
    assert sum(len(set(part)) for part in parts) == len(set().union(*parts)) == 20
    assert load("test", data)["image_id"][:2] == [str(parts[2][0])] * 2


def test_wrong_columns_are_explained():
    data = table(3, caption=lambda i: i, title=lambda i: f"number {i}")
    text = failure(lambda: load("train", data))
    assert "caption_column='caption' of 'Dataset' has the type Value('int64'). Expected text or lists of text" in text
    assert len(load("train", data, caption_column="title")) == 1
    assert "caption_column='x' is not a column of" in failure(lambda: load("train", data, caption_column="x"))
    assert "image_column='title' of 'Dataset' has no images" in failure(
        lambda: load("train", data, image_column="title")
    )
    alone = table(3)
    assert "'Dataset' has the columns photo. Set caption_column" in failure(lambda: load("train", alone))
    empty = table(3, captions=lambda i: [] if i == 1 else [f"number {i}"])
    assert "1 of 3 images of 'dict' (test) cannot be read: row 1 (it has no caption)" in failure(
        lambda: load("test", {"test": empty})
    )
    stream = load("train", empty.to_iterable_dataset())
    assert "An image of 'IterableDataset' cannot be read: row 1 (it has no caption)" in failure(lambda: list(stream))
    assert "has no test split to stream" in failure(lambda: load("test", empty.to_iterable_dataset()))
    unknown = datasets.IterableDataset.from_generator(lambda: iter(()))
    assert "has no features. Give its columns with `cast`" in failure(lambda: load("train", unknown))
    assert "has no train split. Its splits: test" in failure(lambda: load("train", {"test": empty}))
    assert "split='test' of 'Dataset' would be empty. The source has 1 images" in failure(
        lambda: load("test", table(1, caption=lambda i: "x"))
    )


def test_arguments_are_checked():
    for name, value, text in (
        ("corrupt", "drop", "corrupt='drop' is unknown; choose one of refuse, skip"),
        ("holdout", 0.5, "holdout=0.5 must be above 0 and below 0.5"),
        ("size", 0, "size=0 must be at least 1"),
        ("source", "/no/such/folder", "source='/no/such/folder' does not exist. Expected a folder with annotations/"),
    ):
        assert text in failure(lambda name=name, value=value: load("train", **{name: value}))


@pytest.mark.parametrize("kind", ["parquet", "saved", "metadata"])
def test_local_datasets(tmp_path, kind):
    tmp_path = tmp_path / "data"
    if kind == "metadata":
        write_images(tmp_path / "train", 5)
        rows = [{"file_name": f"{i}.png", "caption": f"number {i}"} for i in range(5)]
        (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        data = datasets.DatasetDict(train=table(5, caption=lambda i: f"number {i}"))
        tmp_path.mkdir()
        data.save_to_disk(tmp_path) if kind == "saved" else data["train"].to_parquet(tmp_path / "train.parquet")
    parts = [numbers(load(split, tmp_path)) for split in SPLITS]
    assert sorted(sum(parts, [])) == [0, 1, 2, 3, 4] and [len(part) for part in parts] == [3, 1, 1]
    if kind == "metadata":
        (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "x.png", "caption": "a"}')
        assert "The metadata of source=" in (text := failure(lambda: load("train", tmp_path))) or "x.png" in text


def test_published_pairs_of_scenes_are_read_again(tmp_path, monkeypatch):
    pairs = {split: captions.load(split, num_pairs=3, size=32) for split in SPLITS}
    (tmp_path / "data").mkdir()
    for split, rows in pairs.items():
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")  # as `push_to_hub` does
    published = datasets.DatasetDict(pairs)
    streams = {split: rows.to_iterable_dataset() for split, rows in pairs.items()}
    monkeypatch.setattr(
        captioned_images.datasets,
        "load_dataset",
        lambda name, streaming=False: streams if streaming else published,
    )
    for split, expected in pairs.items():
        versions = [load(split, "someone/scenes", streaming=streaming) for streaming in (False, True)]
        for rows in versions:
            assert rows.features == expected.features
            for row, other in zip(rows, expected, strict=True):
                assert np.array_equal(row.pop("image"), other.pop("image")) and row == other
    monkeypatch.undo()
    for row, other in zip(load("test", tmp_path / "data"), pairs["test"], strict=True):
        assert np.array_equal(row.pop("image"), other.pop("image")) and row == other


def test_images_given_as_bytes_with_many_rows_per_image():
    buffer = io.BytesIO()
    picture(3).save(buffer, "PNG")
    record = {"bytes": buffer.getvalue(), "path": "3.png"}
    data = datasets.Dataset.from_dict({"image": [record] * 2, "text": ["number 3", None]})
    with pytest.warns(UserWarning, match=r"3\.png \(it has no caption\)"):
        rows = load("train", {"train": data, "val": data, "test": data}, corrupt="skip")
    assert numbers(rows) == [3]


PUBLISH = """
import numpy as np
from hf_dl.data import captions, zero_shot

pairs = {split: captions.load(split, num_pairs=3, size=32) for split in ("train", "validation", "test")}
images = zero_shot.load("test", num_images=8, size=32)
for rows in pairs.values():
    rows.push_to_hub("me/pairs")
images.push_to_hub("me/images")
for streaming in (False, True):
    versions = [(captions.load(split, "me/pairs", streaming=streaming), rows) for split, rows in pairs.items()]
    if streaming:  # another order would be loaded otherwise
        versions.append((zero_shot.load("test", "me/images", streaming=True), images))
    for rows, expected in versions:
        assert rows.features == expected.features
        for row, other in zip(rows, expected, strict=True):
            assert np.array_equal(row.pop("image"), other.pop("image")) and row == other
"""


@pytest.mark.slow
def test_pairs_and_labeled_images_come_back_from_the_hub(tmp_path):
    with LoopbackHub() as hub:
        env = {**hub.env(tmp_path), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", PUBLISH], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
