"""Images with boxes: the same columns from scenes, VOC, COCO and tables, and boxes that do not fit."""

import json
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.data import detection, scenes
from hf_dl.data.detection_augmentation import BoxAugmentation
from hf_dl.data.detection_files import read_coco_boxes, read_voc

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data"

pytestmark = pytest.mark.usefixtures("private_cache")

XML = """<annotation><filename>{name}.jpg</filename>{objects}</annotation>"""
OBJECT = """<object><name>{}</name><difficult>{}</difficult><part><bndbox><xmin>1</xmin></bndbox></part>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def write_voc(folder, images, splits):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / "VOC2007" / name).mkdir(parents=True)
    for name, objects in images.items():
        text = XML.format(name=name, objects="".join(OBJECT.format(*item) for item in objects))
        (folder / "VOC2007" / "Annotations" / f"{name}.xml").write_text(text)
        Image.new("RGB", (20, 10)).save(folder / "VOC2007" / "JPEGImages" / f"{name}.jpg")
    for split, names in splits.items():
        (folder / "VOC2007" / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    return folder


def write_coco(folder, annotations, *, categories=((3, "cat"), (90, "dog")), modes=("RGB", "L"), name="train2017"):
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / name).mkdir()
    images = []
    for number, mode in enumerate(modes):
        Image.new(mode, (20, 10)).save(folder / name / f"{number}.png")
        images.append({"id": 10 + number, "file_name": f"{number}.png", "width": 20, "height": 10})
    content = {"images": images, "categories": [{"id": i, "name": n} for i, n in categories]}
    content["annotations"] = [
        {"id": n, "image_id": image, "category_id": label, "bbox": box, **more}
        for n, (image, label, box, more) in enumerate(annotations)
    ]
    (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return folder


def test_boxes_of_scenes_are_the_boxes_of_the_masks():
    data = detection.load("test", num_images=6, size=48, classes="shape_color")
    masks = scenes.load("test", num_scenes=6, size=48, num_objects=(1, 6))
    assert detection.class_names(data)[:2] == ["gray sphere", "gray cube"] and len(detection.class_names(data)) == 32
    for row, scene in zip(data, masks, strict=True):
        objects = row["objects"]
        for number, item in enumerate(scene["objects"]):
            ys, xs = np.nonzero(np.asarray(scene["mask"]) == number + 1)
            assert objects["bbox"][number] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert objects["area"][number] == len(xs)
            name = detection.class_names(data)[objects["category"][number]]
            assert name == f"{item['color']} {item['shape']}"
    streamed = next(iter(detection.load("test", num_images=6, size=48, classes="shape_color", streaming=True)))
    assert streamed["objects"] == data[0]["objects"] and streamed["image_id"] == data[0]["image_id"]
    assert len(detection.class_names(detection.load("test", num_images=1, size=32, classes="shape_material"))) == 8


def test_voc(tmp_path):
    images = {
        "a": [("dog", 0, 1, 1, 20, 10), ("cat", 1, 5, 3, 8, 6)],
        "b": [("cat", 0, 4, 4, 4, 4), ("cat", 0, 11, 2, 30, 9)],
        "c": [],
    }
    splits = {"train": ["a", "b"], "val": ["c"], "test": ["c"], "trainval": ["a", "b", "c"]}
    root = write_voc(tmp_path / "voc", images, splits)
    with pytest.warns(UserWarning, match=r"1 images .*: b \(1 without area, 1 outside\)\."):
        data = detection.load("train", root)
    assert detection.class_names(data) == ["cat", "dog"] and "b (1 without area" in data.info.description
    everything = {row["image_id"]: row["objects"] for row in data}
    assert everything["a"] == {
        "bbox": [[0, 0, 20, 10], [4, 2, 8, 6]],  # VOC counts pixels from 1
        "category": [1, 0],
        "area": [200, 16],
        "iscrowd": [False, False],
        "difficult": [False, True],
    }
    assert everything["b"]["bbox"] == [[10, 1, 20, 9]]
    assert detection.load("validation", root)[0]["objects"]["bbox"] == []
    for split in ("train", "val", "test"):
        (root / "VOC2007" / "ImageSets" / "Main" / f"{split}.txt").unlink()
    with pytest.warns(UserWarning, match="Cut or dropped boxes of .*: b"):  # only trainval: the others are held out
        found = [
            row["image_id"]
            for name in ("train", "validation", "test")
            for row in detection.load(name, root, streaming=True)
        ]
    assert sorted(found) == ["a", "b", "c"]


def test_coco(tmp_path):
    boxes = [
        (10, 90, [1.5, 2, 4, 5], {"area": 7.5, "iscrowd": 0}),
        (10, 3, [0, 0, 20, 10], {"area": 99, "iscrowd": 1}),
        (11, 3, [2, 2, 4, 4], {}),
    ]
    root = write_coco(tmp_path / "coco", boxes)
    data = detection.load("train", root)
    assert detection.class_names(data) == ["cat", "dog"]  # 3 and 90 become 0 and 1
    assert data["image_id"][:] == ["10", "11"] and [image.mode for image in data["image"]] == ["RGB", "RGB"]
    assert data[0]["objects"]["bbox"] == [[1.5, 2, 5.5, 7], [0, 0, 20, 10]]
    assert data[0]["objects"]["category"] == [1, 0] and data[0]["objects"]["area"] == [7.5, 99]
    assert data[0]["objects"]["iscrowd"] == [False, True] and data[1]["objects"]["area"] == [16]
    assert list(detection.load("train", root, streaming=True)) == list(data)
    named = detection.load("train", root / "train2017", annotations=root / "annotations" / "instances_train2017.json")
    assert list(named) == list(data)
    again = detection.load("train", datasets.DatasetDict(train=data, validation=data, test=data))
    assert list(again) == list(data)  # our own columns are xyxy
    with pytest.raises(ValueError, match="no annotations of the split 'test'. Found: train2017"):
        detection.load("test", root)
    with pytest.raises(FileNotFoundError, match="annotations='x.json' does not exist"):
        detection.load("train", root, annotations="x.json")
    with pytest.raises(ValueError, match="Image 10 has the category 90, which is missing in the list: 3. Add it"):
        detection.load("train", root, categories=["cat"])


@pytest.mark.parametrize("shape", ["lists", "dictionaries"])
@pytest.mark.parametrize("streaming", [False, True])
def test_hub_format(shape, streaming):
    rows = [[([1, 2, 3, 4], 5), ([0, 0, 20, 10], 2)], []]
    if shape == "lists":
        objects = [{"bbox": [b for b, _ in row], "category": [c for _, c in row]} for row in rows]
        numbers = datasets.List(datasets.Value("float32"), length=4)
        kind = {"bbox": datasets.List(numbers), "category": datasets.List(datasets.Value("int64"))}
    else:
        objects = [[{"bbox": b, "category": c} for b, c in row] for row in rows]
        kind = datasets.List({"bbox": datasets.List(datasets.Value("float32")), "category": datasets.Value("int64")})
    images = [Image.new("RGB", (20, 10)), Image.new("P", (20, 10))]
    features = datasets.Features({"photo": datasets.Image(), "objects": kind})
    data = datasets.Dataset.from_dict({"photo": images, "objects": objects}, features=features)
    if streaming:
        with pytest.raises(ValueError, match="has no names of classes. Give them with categories"):
            detection.load("train", data.to_iterable_dataset())
        names = list("abcdef")
        result = list(detection.load("train", data.to_iterable_dataset(), categories=names))
        assert result[0]["objects"]["category"] == [5, 2]
    else:
        splits = {"train": data, "validation": data, "test": data}
        result = detection.load("train", splits)
        assert detection.class_names(result) == ["2", "5"] and result[0]["objects"]["category"] == [1, 0]
    assert result[0]["objects"]["bbox"] == [[1, 2, 4, 6], [0, 0, 20, 10]]
    assert result[1]["objects"]["bbox"] == [] and result[1]["image"].mode == "RGB"


def test_boxes_that_do_not_fit():
    def convert(*boxes, **options):
        options = {"lookup": {0: 0}, "box_format": "xyxy", "boxes": "clip"} | options
        objects = {"bbox": list(boxes), "category": [0] * len(boxes)}
        return detection.convert_objects(objects, (20, 10), "a.jpg", **options)

    good, over, flat, away = [1, 1, 5, 5], [-2, 0, 5, 12], [3, 3, 3, 8], [30, 0, 40, 5]
    kept, report = convert(good, over, flat, away)
    assert kept["bbox"] == [[1, 1, 5, 5], [0, 0, 5, 10]] and kept["area"] == [16, 50]
    assert report == "a.jpg (2 without area, 1 outside)"
    assert convert(good, over, flat, away, boxes="drop")[0]["bbox"] == [[1, 1, 5, 5]]
    assert convert(good) == ({**kept, **{key: value[:1] for key, value in kept.items()}}, None)
    assert convert([3, 3, 4, 2], box_format="cxcywh")[0]["bbox"] == [[1, 2, 5, 4]]
    assert convert([5, 5, 1, 1])[0]["bbox"] == []  # corners in the wrong order
    assert convert()[0]["bbox"] == []
    assert len(convert(*[good] * 10_000)[0]["bbox"]) == 10_000
    with pytest.raises(ValueError, match=r"Boxes of image a.jpg \(1 outside\) do not fit its 20x10 pixels"):
        convert(over, boxes="refuse")
    with pytest.raises(ValueError, match="Image a.jpg has a box that is not four finite numbers. Expected xyxy"):
        convert([1, 2, float("nan"), 4])
    with pytest.raises(ValueError, match="Image a.jpg has a box that is not four finite numbers"):
        convert([1, 2, 3])
    with pytest.raises(ValueError, match="Image a.jpg has the category 1, which is missing in the list: 0"):
        detection.convert_objects(
            {"bbox": [good], "category": [1]}, (20, 10), "a.jpg", lookup={0: 0}, box_format="xyxy", boxes="clip"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"area": [1]}, "Image a.jpg has 2 boxes, but 1 entries in 'area'. Expected one per box"),
        ({"iscrowd": [True] * 3}, "Image a.jpg has 2 boxes, but 3 entries in 'iscrowd'"),
        ({"difficult": []}, "Image a.jpg has 2 boxes, but 0 entries in 'difficult'"),
        ({"bbox": None}, "Image a.jpg has 0 boxes, but 2 entries in 'category'"),
        ({"area": 5}, "Image a.jpg has area=5. Expected a list with one entry per box"),
        ({"bbox": [[1, 1, 5, 5], ["1", 2, 3, 4]]}, "Image a.jpg has a box that is not four finite numbers"),
        ({"bbox": [[1, 1, 5, 5], "abcd"]}, "Image a.jpg has a box that is not four finite numbers"),
        ({"bbox": [5, 5]}, "Image a.jpg has a box that is not four finite numbers"),
        ({"bbox": [[1, 1, 5, 5], [[1], 2, 3, 4]]}, "Image a.jpg has a box that is not four finite numbers"),
        ({"area": [1, -2]}, "Image a.jpg has area=-2. Expected a number of pixels, at least 0"),
        ({"area": ["big", 1]}, "Image a.jpg has area='big'. Expected a number of pixels"),
        ({"iscrowd": ["no", True]}, "Image a.jpg has iscrowd='no'. Expected true or false, or 1 or 0"),
        ({"category": [0, [0]]}, r"Image a.jpg has the category \[0\], which is missing in the list: 0"),
    ],
)
def test_damaged_lists_of_objects(change, message):
    objects = {"bbox": [[1, 1, 5, 5], [2, 2, 6, 6]], "category": [0, 0]}
    options = {"lookup": {0: 0}, "box_format": "xyxy", "boxes": "clip"}
    kept, _ = detection.convert_objects(objects | {"area": [None, float("nan")]}, (20, 10), "a.jpg", **options)
    assert kept["area"] == [16, 16]  # of the box, where it is missing
    with pytest.raises(ValueError, match=message):
        detection.convert_objects(objects | change, (20, 10), "a.jpg", **options)


def test_wrong_numbers_in_coco_files_name_the_image(tmp_path):
    """`datasets` would raise an error of its table format."""
    for number, (record, message) in enumerate(
        [
            (
                (10, 3, ["a", 2, 5, 6], {}),
                "Image 10 has a box that is not four finite numbers. Expected xywh in pixels",
            ),
            ((11, 3, [1, 2, 5, 6], {"area": "big"}), "Image 11 has area='big'"),
            ((11, 3, [1, 2, 5, 6], {"iscrowd": "no"}), "Image 11 has iscrowd='no'"),
            ((10, "cat", [1, 2, 5, 6], {}), "Image 10 has category_id='cat'. Expected an integer, as in COCO"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(ValueError, match=message):
            detection.load("train", write_coco(tmp_path / str(number), [record]))


def read_photos(found, rows):
    """Return the objects and the reports of all images, of which only the size is read."""
    objects, reports = [], []
    for row in rows:
        with Image.open(row["image"]["path"]) as image:
            options = {"lookup": found.lookup, "box_format": found.box_format, "boxes": "clip"}
            kept, report = detection.convert_objects(row["objects"], image.size, row["image_id"], **options)
        objects.append(kept)
        reports += [report] if report else []
    return objects, reports


@pytest.mark.skipif(not (PHOTOS / "bccd").is_dir(), reason="needs the photographs of bccd")
def test_photographs_of_voc():
    """All objects of the files, but two boxes without area."""
    found, splits = read_voc(PHOTOS / "bccd", None)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 205, "val": 87, "test": 72}
    texts = [path.read_text() for path in (PHOTOS / "bccd" / "Annotations").glob("*.xml")]
    raw = Counter(name for text in texts for name in re.findall(r"<object>\s*<name>(\w+)</name>", text))
    objects, reports = read_photos(found, [row for rows in splits.values() for row in rows])
    kept = Counter(found.names[label] for each in objects for label in each["category"])
    assert len(objects) == len(texts) == 364
    assert raw.total() == 4888 and kept.total() == 4886 and (raw - kept).total() == 2 and kept <= raw
    assert sorted(reports) == ["BloodImage_00338 (1 without area)", "BloodImage_00343 (1 without area)"]
    assert found.names == sorted(raw)


@pytest.mark.skipif(not (PHOTOS / "coco_mini").is_dir(), reason="needs the photographs of coco_mini")
@pytest.mark.parametrize(("split", "images", "boxes", "crowds"), [("train2017", 80, 739, 8), ("val2017", 79, 624, 5)])
def test_photographs_of_coco(split, images, boxes, crowds):
    """The ids from 1 to 90 become 0 to 79, and the names are the ones of the file."""
    path = PHOTOS / "coco_mini" / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    found, rows = read_coco_boxes(PHOTOS / "coco_mini" / split, path, None)
    objects, reports = read_photos(found, rows)
    assert (len(objects), len(content["annotations"]), reports) == (images, boxes, [])
    assert sum(len(each["bbox"]) for each in objects) == boxes
    assert sum(sum(each["iscrowd"]) for each in objects) == crowds
    assert (min(found.lookup), max(found.lookup), sorted(found.lookup.values())) == (1, 90, list(range(80)))
    names = {category["id"]: category["name"] for category in content["categories"]}
    raw = Counter((str(item["image_id"]), names[item["category_id"]]) for item in content["annotations"])
    ids = [row["image_id"] for row in rows]
    assert raw == Counter(
        (name, found.names[label]) for name, each in zip(ids, objects, strict=True) for label in each["category"]
    )


def test_damaged_sources(tmp_path):
    root = write_voc(tmp_path / "voc", {"a": [("dog", 0, 1, 1, 5, 5)]}, {"train": ["a", "b"]})
    with pytest.raises(FileNotFoundError, match="b.xml does not exist"):
        detection.load("train", root)
    (root / "VOC2007" / "Annotations" / "b.xml").write_text("<annotation><object/></annotation>")
    with pytest.raises(ValueError, match="b.xml is damaged. Expected objects with a name and a bndbox"):
        detection.load("train", root)
    (root / "VOC2007" / "Annotations" / "b.xml").write_text("<annotation></annotation>")
    with pytest.raises(FileNotFoundError, match="b.jpg does not exist. Expected the image of b.xml"):
        detection.load("train", root)
    root = write_coco(tmp_path / "coco", [], categories=())
    with pytest.raises(ValueError, match="has no categories. Add them to it, or give"):
        detection.load("train", root)
    double = write_coco(tmp_path / "double", [], categories=((1, "cat"), (2, "cat")))
    with pytest.raises(ValueError, match="The category 'cat' of .* occurs twice"):
        detection.load("train", double)
    with pytest.raises(ValueError, match="Expected image and objects. Its columns: text"):
        detection.load("train", datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"]}))
    with pytest.raises(FileNotFoundError, match="does not exist. Expected a folder of PASCAL VOC"):
        detection.load("train", tmp_path / "none")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "dev"}, "split='dev' is unknown. Choose one of: train, validation, test"),
        ({"boxes": "cut"}, "boxes='cut' is unknown. Choose one of: clip, drop, refuse"),
        ({"box_format": "yolo"}, "box_format='yolo' is unknown. Choose one of: xyxy, xywh, cxcywh"),
        ({"classes": "color"}, "classes='color' is unknown"),
        ({"num_images": 0}, "num_images=0 must be at least 1"),
        ({"holdout": 0.9}, "holdout=0.9 must be above 0 and below 0.5"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        detection.load(**arguments)


def square_image(box):
    pixels = np.zeros((40, 60, 3), np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels)


def test_augmentation_moves_boxes_with_the_pixels():
    torch.manual_seed(0)
    box = [20, 10, 40, 22]
    augment = BoxAugmentation(flip=0.5, vertical_flip=0.5, shift=0.1, scale=(0.8, 1.2))
    places = set()
    for _ in range(12):
        image, objects = augment(square_image(box), {"bbox": [box], "category": [2], "area": [240.0]})
        ys, xs = np.nonzero(np.asarray(image)[..., 0] > 200)
        (moved,) = objects["bbox"]
        assert np.allclose(moved, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1.6)
        assert objects["area"][0] == pytest.approx((moved[2] - moved[0]) * (moved[3] - moved[1]), rel=1e-4)
        assert objects["category"] == [2] and image.size == (60, 40)
        places.add(tuple(np.round(moved)))
    assert len(places) > 6


def test_augmentation_drops_what_leaves_the_image():
    torch.manual_seed(0)
    augment = BoxAugmentation(flip=0, scale=(3.0, 3.0), min_visible=0.5)
    boxes = [[0, 0, 4, 4], [28, 18, 32, 22], [0, 15, 30, 25]]
    objects = {"bbox": boxes, "category": [0, 1, 2], "area": [16.0] * 3}
    assert augment(square_image(boxes[1]), objects)[1]["category"] == [1]
    assert (
        BoxAugmentation(color=0.5)(square_image(boxes[0]), {"bbox": [], "category": [], "area": []})[1]["bbox"] == []
    )
    with pytest.raises(ValueError, match="flip=2 must be from 0 to 1"):
        BoxAugmentation(flip=2)
    with pytest.raises(ValueError, match=r"scale=\(2, 1\) is invalid"):
        BoxAugmentation(scale=(2, 1))
