"""Small COCO files, compared with masks drawn by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_dl.data import coco

from .errors import failure

pytestmark = pytest.mark.usefixtures("private_cache")


def write_coco(folder):
    folder.mkdir()
    image = np.random.default_rng(2).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "a.jpg", quality=95)
    Image.fromarray(image).save(folder / "b.png")
    square = np.zeros((40, 60), int)
    square[20:30, 25:35] = 1
    runs, value = [0], 0
    for pixel in square.T.flatten():  # down the columns
        if pixel != value:
            runs, value = [*runs, 0], pixel
        runs[-1] += 1
    content = {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 60, "height": 40},
                   {"id": 9, "file_name": "b.png", "width": 60, "height": 40}],
        "annotations": [
            {"image_id": 5, "category_id": 2, "iscrowd": 0, "segmentation": {"size": [40, 60], "counts": runs}},
            {"image_id": 5, "category_id": 1, "iscrowd": 0, "segmentation": [[15, 10, 44, 10, 44, 34, 15, 34]]},
            {"image_id": 5, "category_id": 1, "iscrowd": 1, "segmentation": {"size": [40, 60], "counts": [0, 2400]}},
        ],
        "categories": [{"id": 1, "name": "table"}, {"id": 2, "name": "cup"}],
    }  # fmt: skip
    (folder / "instances.json").write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("streaming", [False, True])
def test_coco(tmp_path, streaming):
    write_coco(tmp_path / "coco")
    load = coco.load("test", tmp_path / "coco", size=40, crop=None, streaming=streaming,
                         annotations=tmp_path / "coco" / "instances.json")  # fmt: skip
    first, second = list(load)
    expected = np.zeros((40, 60), np.uint8)
    expected[10:35, 15:45] = 2  # the corners of a polygon are filled, as PIL draws it
    expected[20:30, 25:35] = 1  # the cup is painted over the table, which is larger
    assert np.array_equal(np.asarray(first["mask"]), expected[:, 10:50])
    assert [(o["label"], o["visible_pixels"]) for o in first["objects"]] == [("cup", 100), ("table", 650)]
    assert second["objects"] == [] and not np.asarray(second["mask"]).any()


def test_coco_mistakes(tmp_path):
    content = write_coco(tmp_path / "coco")
    path = tmp_path / "coco" / "instances.json"

    def load():
        return coco.load("test", tmp_path / "coco", size=40, crop=40, annotations=path)

    content["annotations"][0]["segmentation"]["counts"] = "compressed"
    path.write_text(json.dumps(content))
    assert "Decode compressed run lengths first" in failure(load)
    path.write_text("[]")
    assert "has no annotations and no images" in failure(load)
    path.unlink()
    assert "instances.json' does not exist" in failure(load)
