"""Images with masks from folders and columns, and the choice of a reader from the content of a source."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_dl.data import clevrtex, coco, masked_images

from .errors import failure
from .test_clevrtex import write_clevrtex
from .test_coco import write_coco

pytestmark = pytest.mark.usefixtures("private_cache")


def write_pairs(folder, count=4):
    rng = np.random.default_rng(1)
    (folder / "test").mkdir(parents=True)
    lines, pairs = [], []
    for i in range(count):
        image = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        mask = np.zeros((60, 80), np.uint8)
        mask[10:30, 20 + i : 40] = 7
        mask[35:50, 30:60] = 200
        Image.fromarray(image).save(folder / "test" / f"{i}.png")
        Image.fromarray(mask).save(folder / "test" / f"{i}_mask.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "mask_file_name": f"{i}_mask.png"}))
        pairs.append((image, mask))
    (folder / "test" / "metadata.jsonl").write_text("\n".join(lines))
    return pairs


def check_pairs(rows, pairs):
    for row, (image, mask) in zip(rows, pairs, strict=True):
        assert np.array_equal(np.asarray(row["image"]), image[5:55, 15:65])
        mask = mask[5:55, 15:65]
        assert np.array_equal(np.asarray(row["mask"]), np.select([mask == 7, mask == 200], [1, 2]).astype(np.uint8))
        assert [o["visible_pixels"] for o in row["objects"]] == [(mask == 7).sum(), (mask == 200).sum()]


@pytest.mark.parametrize("streaming", [False, True])
def test_image_folder_with_masks(tmp_path, streaming):
    pairs = write_pairs(tmp_path / "folder")
    check_pairs(masked_images.load("test", tmp_path / "folder", size=50, crop=50, streaming=streaming), pairs)


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets_and_column_names(tmp_path, streaming):
    pairs = write_pairs(tmp_path / "folder")
    palette = [Image.frombytes("P", (80, 60), mask.tobytes()) for _, mask in pairs]
    for image in palette:
        image.putpalette([255, 0, 0] * 256)
    columns = {"photo": [Image.fromarray(image) for image, _ in pairs], "parts": palette, "note": ["x"] * 4}
    features = datasets.Features(photo=datasets.Image(), parts=datasets.Image(), note=datasets.Value("string"))
    datasets.Dataset.from_dict(columns, features).save_to_disk(tmp_path / "saved")
    options = {"size": 50, "crop": 50, "streaming": streaming, "image_column": "photo"}
    check_pairs(masked_images.load("test", tmp_path / "saved", mask_column="parts", **options), pairs)
    with pytest.raises(ValueError, match="mask_column='mask' is not in .*. Its columns: photo, parts, note"):
        masked_images.load("test", tmp_path / "saved", **options)
    with pytest.raises(ValueError, match="Column 'note' has values of type str. Expected datasets.Image"):
        list(masked_images.load("test", tmp_path / "saved", mask_column="note", **options))


# --- the choice of a reader ------------------------------------------------------------------------------------------


def same_rows(rows, expected):
    return rows.features == expected.features and all(
        one["objects"] == other["objects"] and np.array_equal(np.asarray(one["mask"]), np.asarray(other["mask"]))
        for one, other in zip(rows, expected, strict=True)
    )


def test_a_folder_of_clevrtex_is_recognized(tmp_path):
    root = write_clevrtex(tmp_path, indices=range(10))
    assert same_rows(masked_images.load("test", root, size=32), clevrtex.load("test", root, size=32))


def test_annotations_mean_coco(tmp_path):
    write_coco(tmp_path / "coco")
    options = {"size": 40, "annotations": tmp_path / "coco" / "instances.json"}
    rows = masked_images.load("test", tmp_path / "coco", crop=None, **options)
    assert same_rows(rows, coco.load("test", tmp_path / "coco", **options))


def test_arguments_are_checked(tmp_path):
    assert "split='val' is unknown" in failure(lambda: masked_images.load("val", tmp_path))
    assert "size=0" in failure(lambda: masked_images.load("test", tmp_path, size=0))
    assert "is not a folder" in failure(lambda: masked_images.load("test", tmp_path / "nowhere"))
