"""Small folders in the published layout, compared with an independent reader of the same files."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_dl.data import clevrtex
from hf_dl.data.instance_masks import SPLITS

from .errors import failure

pytestmark = pytest.mark.usefixtures("private_cache")


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
        (folder / f"{stem}_depth_0001.png").write_bytes(b"")  # the folder also has other passes
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
    shards = {split: clevrtex._split_range(clevrtex._count(root, "full"), split, "full") for split in SPLITS}
    assert shards == {"test": (0, 101), "validation": (101, 202), "train": (202, 1010)}
    (row,) = clevrtex._generate([(1009, 1010)], str(root), "full", 192, 16, version=0)
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


def test_what_is_missing_is_said(tmp_path):
    root = write_clevrtex(tmp_path / "a", indices=range(10))
    assert "split='val' is unknown" in failure(lambda: clevrtex.load("val", root))
    assert "size=0" in failure(lambda: clevrtex.load("test", root, size=0))
    assert "crop=241 is larger than an image of 320x240" in failure(lambda: clevrtex.load("test", root, crop=241))
    assert "is not CLEVRTex" in failure(lambda: clevrtex.load("test", tmp_path / "nowhere"))
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
    assert "000001_flat.png has mode RGB. Expected a mask of mode P or L" in message
    path.unlink()
    message = failure(lambda: clevrtex.load("test", root, size=64))
    assert "FileNotFoundError" in message and "the mask of scene 1 of CLEVRTex" in message
