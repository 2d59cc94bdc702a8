"""Real layouts on disk, in miniature, against an independent reading of the same files."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_dl.data import clevrtex


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_clevrtex(root, variant="full", indices=range(30), seed=0):
    """Scenes of 320x240 with four rectangles; the third lies outside of the central crop."""
    rng = np.random.default_rng(seed)
    palette = [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 0] + [9] * (3 * 251)
    for index in indices:
        folder = root / str(index // 1000)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"CLEVRTEX_{variant}_{index:06d}"
        small = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC))
        rgba = np.concatenate([image, rng.integers(0, 255, (240, 320, 1), dtype=np.uint8)], -1)
        Image.fromarray(rgba).save(folder / f"{stem}.png", compress_level=1)
        mask = np.zeros((240, 320), np.uint8)
        for label, x in ((1, 80), (2, 130), (4, 180)):
            y = int(rng.integers(40, 120))
            mask[y : y + 50, x : x + 40] = label
        mask[5:20, 5:40] = 3
        flat = Image.frombytes("P", (320, 240), mask.tobytes())
        flat.putpalette(palette)
        flat.save(folder / f"{stem}_flat.png")
        (folder / f"{stem}_depth_0001.png").write_bytes(b"")  # other passes lie beside it
        shapes = ("cube", "sphere", "monkey", "cylinder")
        objects = [
            {"shape": shape, "rotation": 10.0 * i, "size": "small", "3d_coords": [i, 2 * i, 0.5],
             "index": i, "color": "red", "material": f"material {i}"}
            for i, shape in enumerate(shapes, start=1)
        ]  # fmt: skip
        (folder / f"{stem}.json").write_text(json.dumps({"num_objects": 4, "image_index": index, "objects": objects}))
    return root


def read(root, index, variant="full", size=128):
    """The arrays of one scene: nearest and bilinear resizing by the definition of PIL, cropping by slices."""
    stem = root / str(index // 1000) / f"CLEVRTEX_{variant}_{index:06d}"
    image = np.asarray(Image.open(f"{stem}.png"))[24:216, 64:256, :3]
    mask = np.asarray(Image.open(f"{stem}_flat.png"))[24:216, 64:256]
    source = ((np.arange(size) + 0.5) * 192 / size).astype(int)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)), mask[source][:, source]


def test_images_masks_and_objects(tmp_path):
    root = write_clevrtex(tmp_path / "clevrtex_full")
    splits = {"test": range(0, 3), "validation": range(3, 6), "train": range(6, 30)}
    for split, indices in splits.items():
        dataset = clevrtex.load(split, root)
        assert dataset.features == clevrtex.FEATURES and len(dataset) == len(indices)
        for row, index in zip(dataset, indices, strict=True):
            image, mask = read(root, index)
            assert row["image"].mode == "RGB" and row["mask"].mode == "L"
            assert np.array_equal(np.asarray(row["image"]), image)
            # object 3 is cropped away, so 4 becomes 3
            assert 3 not in mask
            assert np.array_equal(np.asarray(row["mask"]), np.where(mask == 4, 3, mask))
            assert [o["shape"] for o in row["objects"]] == ["cube", "sphere", "cylinder"]
            assert [o["material"] for o in row["objects"]] == ["material 1", "material 2", "material 4"]
            assert row["objects"][2]["position"] == [4.0, 8.0, 0.5] and row["objects"][2]["rotation"] == 40.0
            assert row["objects"][0]["color"] is None  # drawn, but not used, in all variants but one
            for label, record in zip((1, 2, 4), row["objects"], strict=True):
                rows, columns = np.nonzero(mask == label)
                assert record["visible_pixels"] == len(rows)
                assert record["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_scenes_of_several_folders_are_found_by_their_number(tmp_path):
    root = write_clevrtex(tmp_path, indices=[0, *range(1000, 1010)])  # only what is opened need be there
    stream = clevrtex.load("train", root, size=16, streaming=True)
    assert stream.num_shards == 1
    shards = {split: clevrtex._split_range(clevrtex._count(root, "full"), split, "full") for split in clevrtex.SPLITS}
    assert shards == {"test": (0, 101), "validation": (101, 202), "train": (202, 1010)}
    (row,) = clevrtex._clevrtex([(1009, 1010)], str(root), "full", 192, 16, version=0)
    assert np.array_equal(np.asarray(row["image"]), read(root, 1009, size=16)[0])


@pytest.mark.parametrize("variant", clevrtex.VARIANTS)
def test_variants(tmp_path, variant):
    root = write_clevrtex(tmp_path, variant, range(10))
    dataset = clevrtex.load("test", root, size=32)
    assert len(dataset) == (10 if variant == "outd" else 1)
    assert dataset[0]["objects"][0]["color"] == ("red" if variant == "vbg" else None)
    assert np.array_equal(np.asarray(dataset[0]["image"]), read(root, 0, variant, 32)[0])


def test_streaming_gives_the_same_rows(tmp_path):
    root = write_clevrtex(tmp_path)
    stream = clevrtex.load("validation", root, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    for one, other in zip(stream, clevrtex.load("validation", root), strict=True):
        assert one["objects"] == other["objects"]
        assert np.array_equal(np.asarray(one["mask"]), np.asarray(other["mask"]))
        assert np.array_equal(np.asarray(one["image"]), np.asarray(other["image"]))


def test_metadata_is_optional(tmp_path):
    root = write_clevrtex(tmp_path, indices=range(10))
    (root / "0" / "CLEVRTEX_full_000000.json").unlink()
    (record, *_) = clevrtex.load("test", root)[0]["objects"]
    assert record["shape"] is None and record["visible_pixels"] > 0


def failure(action):
    """The message at the root of an error: `datasets` wraps what a generator raises."""
    with pytest.raises((ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError)) as caught:
        action()
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def test_what_is_missing_is_said(tmp_path):
    root = write_clevrtex(tmp_path / "a", indices=range(10))
    assert "split='val' is unknown" in failure(lambda: clevrtex.load("val", root))
    assert "size=0" in failure(lambda: clevrtex.load("test", root, size=0))
    assert "crop=241 is larger than an image of 320x240" in failure(lambda: clevrtex.load("test", root, crop=241))
    assert "is not a folder" in failure(lambda: clevrtex.load("test", tmp_path / "nowhere"))
    assert "too few images" in failure(lambda: clevrtex.load("test", write_clevrtex(tmp_path / "b", indices=range(9))))
    outd = write_clevrtex(tmp_path / "c", "outd", range(10))
    assert "use split='test'" in failure(lambda: clevrtex.load("train", outd))
    write_clevrtex(root, indices=[2000])
    assert "folders 0 to 2 but not 1" in failure(lambda: clevrtex.load("test", root))


def test_missing_files_and_colored_masks_are_refused(tmp_path):
    root = write_clevrtex(tmp_path / "a", indices=range(20))
    path = root / "0" / "CLEVRTEX_full_000001_flat.png"
    Image.open(path).convert("RGB").save(path)
    message = failure(lambda: clevrtex.load("test", root))
    assert "000001_flat.png is of mode RGB; expected a mask of mode P or L" in message
    path.unlink()
    message = failure(lambda: clevrtex.load("test", root, size=64))
    assert "FileNotFoundError" in message and "the mask of scene 1 of CLEVRTex" in message


# --- datasets with an image and a mask column ------------------------------------------------------------------------


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
    check_pairs(clevrtex.load("test", tmp_path / "folder", size=50, crop=50, streaming=streaming), pairs)


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
    check_pairs(clevrtex.load("test", tmp_path / "saved", mask_column="parts", **options), pairs)
    with pytest.raises(ValueError, match="mask_column='mask' is not in .*, whose columns are photo, parts, note"):
        clevrtex.load("test", tmp_path / "saved", **options)
    with pytest.raises(ValueError, match="Column 'note' holds str; expected images"):
        list(clevrtex.load("test", tmp_path / "saved", mask_column="note", **options))


# --- COCO ------------------------------------------------------------------------------------------------------------


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
    load = clevrtex.load("test", tmp_path / "coco", size=40, crop=None, streaming=streaming,
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
        return clevrtex.load("test", tmp_path / "coco", size=40, crop=40, annotations=path)

    content["annotations"][0]["segmentation"]["counts"] = "compressed"
    path.write_text(json.dumps(content))
    assert "decode compressed ones first" in failure(load)
    path.write_text("[]")
    assert "has no annotations and no images" in failure(load)
    path.unlink()
    assert "instances.json' is missing" in failure(load)
