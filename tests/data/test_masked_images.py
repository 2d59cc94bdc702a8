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
    data = datasets.Dataset.from_dict(columns, features, split=datasets.NamedSplit("test"))
    data.save_to_disk(tmp_path / "saved")
    options = {"size": 50, "crop": 50, "streaming": streaming, "image_column": "photo"}
    check_pairs(masked_images.load("test", tmp_path / "saved", mask_column="parts", **options), pairs)
    for given in (data, {"test": data}, {"test": data.to_iterable_dataset()}):
        check_pairs(masked_images.load("test", given, mask_column="parts", **options), pairs)
    with pytest.raises(ValueError, match="mask_column='mask' of .* does not exist. .* with images: photo, parts"):
        masked_images.load("test", tmp_path / "saved", mask_column="mask", **options)
    with pytest.raises(ValueError, match="mask_column='note' of .* has no images"):
        masked_images.load("test", tmp_path / "saved", mask_column="note", **options)
    images = masked_images.load("test", tmp_path / "saved", **options)  # no column "mask": no masks
    rows = [np.asarray(row["image"]) for row in images]
    assert all(np.array_equal(row, image[5:55, 15:65]) for row, (image, _) in zip(rows, pairs, strict=True))
    assert list(images.features) == ["image"]


# --- folders as people have them -------------------------------------------------------------------------------------


def write_image(path, number, *, mode="RGB", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, (number, 0, 0) if mode == "RGB" else 0)
    if mode == "L":
        image.paste(number, (10, 5, 20, 15))
    image.save(path)


def read(split, root, **options):
    return masked_images.load(split, root, size=16, **options)


def numbers(rows):
    return [int(np.asarray(row["image"])[0, 0, 0]) for row in rows]


def test_images_and_masks_side_by_side_are_split_with_a_fixed_seed(tmp_path):
    root = tmp_path / "data-main" / "shapes"
    for number in range(1, 21):
        write_image(root / "images" / f"{number}.{'bmp' if number % 2 else 'png'}", number)
        write_image(root / "masks" / (f"{number}.png" if number % 3 else f"{number}_mask.png"), number, mode="L")
    write_image(root / "masks" / "99.png", 1, mode="L")
    (root / "images" / "about.txt").write_text("notes")
    parts = {split: read(split, tmp_path / "data-main") for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [16, 2, 2]
    assert sorted(number for part in parts.values() for number in numbers(part)) == [*range(1, 21)]
    for part in parts.values():  # 10x10 of 30x30 pixels are 5x5 or 6x6 of 16x16
        assert all(len(row["objects"]) == 1 and 25 <= row["objects"][0]["visible_pixels"] <= 36 for row in part)
    assert parts["test"].info.description == (
        "2 images with masks. Skipped files that are not images: 1 (about.txt); masks without an image: 1 (99.png)."
    )
    assert numbers(read("test", tmp_path / "data-main", seed=1)) != numbers(parts["test"])
    assert numbers(read("train", root, num_images=3)) == numbers(parts["train"])[:3]
    assert numbers(read("train", root, streaming=True)) == numbers(parts["train"])


def test_splits_of_images_and_masks(tmp_path):
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        for number in range(count):
            write_image(tmp_path / split / "images" / f"{number}.png", number)
            write_image(tmp_path / split / "masks" / f"{number}.png", number + 1, mode="L")
    counts = {split: len(read(split, tmp_path)) for split in ("train", "validation", "test")}
    assert counts == {"train": 4, "validation": 2, "test": 1}


@pytest.mark.parametrize("key", ["mask", "mask_file_name"])
def test_metadata_with_a_column_of_masks(tmp_path, key):
    for number in range(8):
        write_image(tmp_path / "in" / f"{number}.png", number)
        write_image(tmp_path / "out" / f"m{number}.png", number + 1, mode="L")
    lines = [{"file_name": f"in/{number}.png", key: f"out/m{number}.png", "note": 1} for number in range(8)]
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    rows = read("train", tmp_path)
    assert len(rows) == 6 and all(len(row["objects"]) == 1 for row in rows)
    for change, problem in (
        ({"file_name": None}, "Line 2 of .* has no text in 'file_name'"),
        ({key: "out/none.png"}, "Line 2 of .* names 'out/none.png', but .* does not exist"),
        ({key: 3}, "Line 2 of .* has the mask 3. Expected the path of an image"),
        ({key: None}, "1 of 2 images of .* have no mask, such as .*in/1.png"),
    ):
        path.write_text("\n".join(json.dumps(line) for line in (lines[0], lines[1] | change)))
        with pytest.raises((ValueError, FileNotFoundError), match=problem):
            read("train", tmp_path)
    for content, problem in ((b"{", "Line 1 of .* is not JSON"), (b'{"a": "\xff"}', "is not UTF-8 text")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=problem):
            read("train", tmp_path)


def test_images_without_masks(tmp_path):
    for number in range(10):
        write_image(tmp_path / "photos" / str(number % 2) / f"{number}.png", number, size=(20 + number, 30))
    rows = read("validation", tmp_path)
    assert list(rows.features) == ["image"] and len(rows) == 1
    assert rows.info.description == "1 images without masks."
    assert list(read("train", tmp_path, streaming=True).features) == ["image"]
    assert "crop=25 is larger than an image of 2" in failure(lambda: read("train", tmp_path, crop=25))
    for number in range(10):
        (tmp_path / "photos" / str(number % 2) / f"{number}.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"photos/./.\.png cannot be read as an image. The file is not an image"):
        read("train", tmp_path)


@pytest.mark.parametrize("masks", [True, False])
def test_damaged_files_are_skipped_and_listed(tmp_path, masks):
    for number in range(10):
        write_image(tmp_path / "images" / f"{number}.png", number)
        if masks:
            write_image(tmp_path / "masks" / f"{number}.png", number, mode="L")
    order = numbers(read("train", tmp_path))
    gone = order[1:4:2]
    (tmp_path / "images" / f"{gone[0]}.png").write_bytes(b"damaged")
    (tmp_path / ("masks" if masks else "images") / f"{gone[1]}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{gone[0]}.png cannot be read as an image.*remove it, or.* corrupt='skip'"):
        read("train", tmp_path)
    with pytest.warns(UserWarning, match=f"2 of 8 images of .*(train).* are skipped: .*{gone[0]}.png.*{gone[1]}.png"):
        rows = read("train", tmp_path, corrupt="skip")
    assert numbers(rows) == [number for number in order if number not in gone]
    assert "6 images with" in rows.info.description and f"{gone[0]}.png" in rows.info.description
    assert list(rows.features) == (["image", "mask", "objects"] if masks else ["image"])
    with pytest.warns(UserWarning, match="cannot be read and is skipped"):
        assert numbers(read("train", tmp_path, corrupt="skip", streaming=True)) == numbers(rows)


def test_damaged_images_of_a_table_are_skipped(tmp_path):
    write_image(tmp_path / "1.png", 1)
    records = [{"bytes": (tmp_path / "1.png").read_bytes(), "path": None}, {"bytes": b"damaged", "path": None}, None]
    data = datasets.Dataset.from_dict({"image": records}, datasets.Features(image=datasets.Image(decode=False)))
    data = {"test": data.cast_column("image", datasets.Image())}
    with pytest.raises(ValueError, match="The image of row 1 cannot be read as an image"):
        read("test", data)
    with pytest.warns(UserWarning, match="2 of 3 images .*The image of row 1 cannot.*The image of row 2 is missing"):
        assert numbers(read("test", data, corrupt="skip")) == [1]


def test_folders_that_do_not_fit_are_explained(tmp_path):
    assert "has no images. Expected images/ and masks/" in failure(lambda: read("train", tmp_path))
    write_image(tmp_path / "images" / "1.png", 1)
    write_image(tmp_path / "masks" / "one.png", 1, mode="L")
    assert "has the name of an image, such as 1.png. Expected" in failure(lambda: read("train", tmp_path))
    write_image(tmp_path / "images" / "2.png", 1)
    write_image(tmp_path / "masks" / "1.png", 1, mode="L")
    assert "1 of 2 images of " in failure(lambda: read("train", tmp_path))
    write_image(tmp_path / "masks" / "2.jpg", 1, mode="L")
    assert "2.jpg is a JPEG file, which changes its values" in failure(lambda: read("train", tmp_path))
    for path in (tmp_path / "masks" / "2.jpg", tmp_path / "images" / "2.png"):
        path.unlink()
    message = failure(lambda: read("test", tmp_path))
    assert "split='test' of " in message and "would be empty. The source has 1 images" in message
    assert "holdout=0.5 must be" in failure(lambda: read("test", tmp_path, holdout=0.5))
    assert "num_images=0 must be" in failure(lambda: read("test", tmp_path, num_images=0))


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
    assert "corrupt='drop' is unknown; choose one of refuse, skip" in failure(
        lambda: masked_images.load("train", tmp_path, corrupt="drop")
    )
    assert "split='val' is unknown" in failure(lambda: masked_images.load("val", tmp_path))
    assert "size=0" in failure(lambda: masked_images.load("test", tmp_path, size=0))
    assert "does not exist" in failure(lambda: masked_images.load("test", tmp_path / "nowhere"))


def test_small_images_are_enlarged_by_repeating_pixels(tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "folder"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    images, masks = rng.integers(0, 256, (20, 8, 8, 3), np.uint8), rng.integers(0, 3, (20, 8, 8), np.uint8)
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        Image.fromarray(image).save(root / "images" / f"{number:02d}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number:02d}.png")
    for split in ("train", "test"):
        for row in masked_images.load(split, root, size=24):
            small = np.asarray(row["image"])[::3, ::3]
            number = next(index for index, image in enumerate(images) if np.array_equal(image, small))
            assert np.array_equal(row["image"], small.repeat(3, 0).repeat(3, 1))
            assert np.array_equal(row["mask"], masks[number].repeat(3, 0).repeat(3, 1))
