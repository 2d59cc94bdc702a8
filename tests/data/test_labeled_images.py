import gzip
import io
import struct

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.data import images
from hf_dl.data.images import CLASSES, LabeledImages, augment, load, sample_scene


def failure(action):
    """The message at the root of an error: `datasets` wraps what a generator raises."""
    with pytest.raises((ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError)) as caught:
        action()
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def array(image):
    return np.asarray(image)


# --- synthetic -------------------------------------------------------------------------------------------------------


def test_the_classes_are_shape_by_material_and_by_color():
    assert {number: len(set(names)) for number, names in CLASSES.items()} == {25: 25, 100: 100}
    assert all(CLASSES[100][c].split(maxsplit=1)[1] == CLASSES[25][c // 4] for c in range(100))


@pytest.mark.parametrize("num_classes", [25, 100])
def test_an_image_shows_what_its_class_says(num_classes):
    for index in range(2 * num_classes):
        scene, label = sample_scene(index, num_classes=num_classes)
        (item,) = scene.objects
        *color, material, shape = CLASSES[num_classes][label].split()
        assert item.surface.material == material and item.shape == ("cylinder" if shape == "disc" else shape)
        assert (item.extent[0] > 2 * item.extent[1]) == (shape == "disc")
        assert not color or item.color == color[0]
        assert scene.ground.material not in images.MATERIALS
        assert item.position[2] == pytest.approx(item.extent[1])  # it stands on the ground


def test_every_class_comes_equally_often_and_is_not_given_away_by_its_place():
    data = load("train", num_images=75, size=32)
    labels = np.array(data["label"][:])
    assert (np.bincount(labels) == 3).all()
    assert not np.array_equal(labels[:25], labels[25:50])
    assert data.features["label"].names == list(CLASSES[25])


def test_images_and_masks():
    data = load("test", num_images=25, size=48)
    assert data.column_names == ["image", "mask", "label"] and data.split == "test"
    for row in data:
        assert row["image"].mode == "RGB" and row["image"].size == (48, 48)
        mask = array(row["mask"])
        assert set(np.unique(mask)) == {0, 1}
        assert 0.02 < mask.mean() < 0.5
        assert not (mask[[0, -1]].any() or mask[:, [0, -1]].any())  # the object is whole
        assert array(row["image"]).std() > 10


def test_a_shorter_dataset_begins_a_longer_one_and_splits_and_seeds_differ():
    pictures = {
        name: [array(row["image"]) for row in load(split, num_images=count, seed=seed, size=32)]
        for name, split, count, seed in (
            ("long", "train", 8, 0), ("short", "train", 3, 0), ("other", "validation", 3, 0), ("seed", "train", 3, 1),
        )
    }  # fmt: skip
    assert all(np.array_equal(a, b) for a, b in zip(pictures["short"], pictures["long"][:3], strict=True))
    for name in ("other", "seed"):
        assert not any(np.array_equal(a, b) for a in pictures[name] for b in pictures["short"])


def test_streamed_synthetic_images_are_the_same():
    stream = load("validation", num_images=5, size=32, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    for one, other in zip(stream, load("validation", num_images=5, size=32), strict=True):
        assert one["label"] == other["label"]
        assert np.array_equal(array(one["image"]), array(other["image"]))


def test_arguments_are_checked():
    assert "split='val' is unknown; choose one of train" in failure(lambda: load("val"))
    assert "corrupt='drop' is unknown; choose one of refuse, skip" in failure(lambda: load(corrupt="drop"))
    assert "num_classes=10 is unknown; synthetic images have 25 or 100" in failure(lambda: load(num_classes=10))
    assert "size=16 is out of range" in failure(lambda: load(size=16))
    assert "num_images=0 is too small" in failure(lambda: load(num_images=0))
    assert "holdout=0.5 is out of range" in failure(lambda: load(holdout=0.5))
    assert "does not exist; expected a folder" in failure(lambda: load(source="/no/such/folder"))


# --- folders ---------------------------------------------------------------------------------------------------------

COLORS = {"ant": (200, 30, 30), "bee": (30, 200, 30), "cat": (30, 30, 200)}


def write_folder(root, count=10, classes=("ant", "bee", "cat")):
    """Images of all sizes and kinds; the color tells the class, the brightness of the red channel the number."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            size = tuple(int(v) for v in rng.integers(20, 60, 2))
            mode, suffix = (("RGB", "jpg"), ("RGBA", "png"), ("RGB", "png"))[i % 3]
            Image.new("RGB", size, COLORS[name]).convert(mode).save(root / name / f"{i}.{suffix}")
    return root


def check_colors(data):
    names = data.features["label"].names
    assert names == ["ant", "bee", "cat"]
    for row in data:
        assert row["image"].size == (16, 16) and row["image"].mode == "RGB"
        color = array(row["image"]).reshape(-1, 3).mean(0)
        assert np.abs(color - COLORS[names[row["label"]]]).max() < 8


def test_a_folder_without_splits_is_split_by_class(tmp_path):
    root = write_folder(tmp_path / "a", count=20)
    parts = {split: load(split, root, size=16) for split in images.SPLITS}
    assert {split: len(data) for split, data in parts.items()} == {"train": 48, "validation": 6, "test": 6}
    for data in parts.values():
        check_colors(data)
        counts = np.bincount(data["label"][:])
        assert len(set(counts.tolist())) == 1  # stratified
    larger = load("test", root, size=16, holdout=0.3)
    assert np.bincount(larger["label"][:]).tolist() == [6, 6, 6]


def test_splits_of_a_source_never_share_an_image(tmp_path):
    root = tmp_path / "numbered"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(30):
            Image.new("L", (8, 8), 2 * i + (name == "b")).save(root / name / f"{i}.png")
    parts = {split: [array(row["image"])[0, 0, 0] for row in load(split, root, size=8)] for split in images.SPLITS}
    together = [value for values in parts.values() for value in values]
    assert sorted(together) == list(range(60))
    assert parts["test"] != [array(row["image"])[0, 0, 0] for row in load("test", root, size=8, seed=1)]
    some = [array(row["image"])[0, 0, 0] for row in load("train", root, size=8, num_images=10)]
    assert some == parts["train"][:10] and sum(value % 2 for value in some) == 5


@pytest.mark.parametrize("alias", ["valid", "val", "validation", "Dev"])
def test_a_folder_with_splits(tmp_path, alias):
    for split, count in (("train", 4), (alias, 2), ("test", 1)):
        write_folder(tmp_path / "b" / split, count=count)
    assert {split: len(load(split, tmp_path / "b", size=16)) for split in images.SPLITS} == {
        "train": 12, "validation": 6, "test": 3,
    }  # fmt: skip
    check_colors(load("validation", tmp_path / "b", size=16))


def test_a_class_of_very_few_images_is_only_trained_on(tmp_path):
    write_folder(tmp_path, count=10, classes=("ant", "bee"))
    write_folder(tmp_path, count=2, classes=("cat",))
    counts = {split: np.bincount(load(split, tmp_path, size=16)["label"][:], minlength=3) for split in images.SPLITS}
    assert {split: count.tolist() for split, count in counts.items()} == {
        "train": [8, 8, 2], "validation": [1, 1, 0], "test": [1, 1, 0],
    }  # fmt: skip


def test_streaming_a_folder_gives_the_same_rows(tmp_path):
    write_folder(tmp_path)
    stream = load("train", tmp_path, size=16, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    check_colors(stream)
    for one, other in zip(stream, load("train", tmp_path, size=16), strict=True):
        assert one["label"] == other["label"] and np.array_equal(array(one["image"]), array(other["image"]))


def test_images_are_decoded_once_and_again_when_a_file_changed(tmp_path, monkeypatch):
    write_folder(tmp_path, count=4)
    decoded, square = [], images._square
    monkeypatch.setattr(images, "_square", lambda *given: decoded.append(given) or square(*given))
    for _ in range(2):
        load("train", tmp_path, size=16)
    assert len(decoded) == 6
    (tmp_path / "ant" / "0.jpg").write_bytes((tmp_path / "ant" / "1.png").read_bytes() + b" ")
    load("train", tmp_path, size=16)
    assert len(decoded) == 12


def test_wide_images_are_cut_to_their_middle_and_turned_upright(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            picture = Image.new("RGB", (90, 30), (255, 0, 0))
            picture.paste((0, 0, 255), (30, 0, 60, 30))
            picture.paste((0, 255, 0), (30, 0, 60, 15))  # its upper half
            exif = picture.getexif()
            exif[0x0112] = 3  # turned by 180 degrees
            picture.save(tmp_path / name / f"{i}.png", exif=exif)
    picture = array(load("train", tmp_path, size=10)[0]["image"])
    # resizing mixes what lies next to the border of the cut
    assert picture[0, 1:-1].tolist() == [[0, 0, 255]] * 8 and picture[-1, 1:-1].tolist() == [[0, 255, 0]] * 8
    assert picture[:, [0, -1], 0].max() < 40


def spoil(root):
    """Three images that cannot be read, of 30."""
    path = root / "ant" / "0.jpg"
    path.write_bytes(path.read_bytes()[:200])
    (root / "bee" / "1.png").write_bytes(b"")
    (root / "cat" / "2.png").write_text("not an image")


def test_corrupt_images_are_refused_by_name(tmp_path):
    write_folder(tmp_path)
    spoil(tmp_path)
    spoiled = 0
    for split in images.SPLITS:
        try:
            load(split, tmp_path, size=16)
        except ValueError as error:
            count = int(str(error).split()[0])
            spoiled += count
            assert f"images of {str(tmp_path)!r} ({split}) cannot be read: " in str(error)
            assert str(error).count(str(tmp_path)) == count + 1  # the source and each file
            assert "corrupt='skip' leaves them out." in str(error)
    assert spoiled == 3


def test_corrupt_images_are_skipped_and_counted_each_time(tmp_path):
    write_folder(tmp_path, count=20)
    spoil(tmp_path)
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning) as caught:
            total = sum(len(load(split, tmp_path, size=16, corrupt="skip")) for split in images.SPLITS)
        assert total == 57
        text = " ".join(str(warning.message) for warning in caught)
        assert sum(int(str(warning.message).split()[0]) for warning in caught) == 3
        assert all(name in text for name in ("ant/0.jpg (", "bee/1.png (", "cat/2.png ("))
        assert "are left out, since they cannot be read" in text


def test_corrupt_images_in_a_stream(tmp_path):
    write_folder(tmp_path, count=20)
    (tmp_path / "ant" / "0.jpg").write_text("not an image")
    splits = [split for split in images.SPLITS if _holds_a_spoiled_one(tmp_path, split)]
    assert len(splits) == 1
    stream = load(splits[0], tmp_path, size=16, corrupt="skip", streaming=True)
    with pytest.warns(UserWarning, match=r"is left out, since it cannot be read: .*ant/0\.jpg \("):
        rows = list(stream)
    with pytest.warns(UserWarning, match="1 of "):
        assert len(rows) == len(load(splits[0], tmp_path, size=16, corrupt="skip"))


def _holds_a_spoiled_one(root, split):
    try:
        list(load(split, root, size=16, streaming=True))
    except ValueError as error:
        assert "ant/0.jpg" in str(error) and "corrupt='skip' leaves it out" in str(error)
        return True
    return False


def test_folders_that_are_none_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no images in folders of classes" in failure(lambda: load(source=tmp_path / "empty"))
    (tmp_path / "file.zip").write_bytes(b"")
    assert "is a file; expected a parquet file or a folder" in failure(lambda: load(source=tmp_path / "file.zip"))
    write_folder(tmp_path / "c" / "test", count=2)
    assert "split='train' is not in" in failure(lambda: load("train", tmp_path / "c", size=16))


# --- idx files -------------------------------------------------------------------------------------------------------


def idx(values):
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_idx(folder, counts, pack=True, name="{}-{}-idx{}-ubyte"):
    """Splits of gray noise; returns their pixels and labels by the names of their files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, written = np.random.default_rng(0), {}
    for split, count in counts.items():
        pixels = rng.integers(0, 256, (count, 12, 12), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        written[split] = pixels, labels
        for kind, values in (("images", pixels), ("labels", labels)):
            path = folder / (name.format(split, kind, values.ndim) + (".gz" if pack else ""))
            path.write_bytes(gzip.compress(idx(values)) if pack else idx(values))
    return written


@pytest.mark.parametrize(
    "below, pack, name",
    [
        ("", True, "{}-{}-idx{}-ubyte"),
        ("", False, "{}-{}.idx{}-ubyte"),
        ("FashionMNIST/raw", False, "{}-{}-idx{}-ubyte"),
    ],
)
def test_idx_files_keep_every_gray(tmp_path, below, pack, name):
    written = write_idx(tmp_path / below, {"train": 40, "t10k": 20}, pack, name)
    data = {split: load(split, tmp_path, size=12, holdout=0.25) for split in images.SPLITS}
    assert {split: len(part) for split, part in data.items()} == {"train": 30, "validation": 10, "test": 20}
    assert data["test"].features["label"].names == [str(label) for label in range(10)]
    for split, part in data.items():
        pixels, labels = written["t10k" if split == "test" else "train"]
        known = {image.tobytes(): label for image, label in zip(pixels, labels, strict=True)}
        gray, rgb = LabeledImages(part, channels=1), LabeledImages(part)
        assert gray.pixels.shape == (len(part), 1, 12, 12) and rgb.pixels.shape == (len(part), 3, 12, 12)
        assert (gray.pixels == rgb.pixels).all()
        assert [known[image.tobytes()] for image in gray.pixels] == gray.labels.tolist()
        assert len(gray.channel_statistics()[0]) == 1


def test_fashion_mnist_is_known_by_its_labels(tmp_path, monkeypatch):
    _, labels = write_idx(tmp_path, {"train": 40})["train"]
    monkeypatch.setattr(images, "_FASHION_LABELS", (images.zlib.crc32(labels),))
    names = load("train", tmp_path, size=12).features["label"].names
    assert names == list(images.FASHION) and names[9] == "Ankle boot" and len(names) == 10


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    "name, damage, sentence",
    [
        (IMAGES, lambda raw: gzip.compress(raw)[:-30], f"{IMAGES} is cut short or damaged (Compressed file ended"),
        (IMAGES, lambda raw: raw, f"{IMAGES} is cut short or damaged (Not a gzipped file"),
        (IMAGES, lambda raw: gzip.compress(raw[:-5]), f"{IMAGES} has 5755 bytes of images, expected 5760; download"),
        (IMAGES, lambda raw: gzip.compress(raw + b"."), f"{IMAGES} has more bytes of images, expected 5760; download"),
        (IMAGES, lambda raw: gzip.compress(raw[:10]), f"{IMAGES} is cut short or damaged (Its header is not"),
        (IMAGES, lambda raw: gzip.compress(raw[:4] + b"\xff" * 12), "(4294967295, 4294967295, 4294967295), which"),
        (IMAGES, lambda raw: gzip.compress(raw[:4] + bytes(12)), f"{IMAGES} says that its shape is (0, 0, 0), which"),
        (IMAGES, lambda raw: gzip.compress(idx(np.zeros(40, np.uint8))), "begins with 00000801, expected 00000803"),
        (LABELS, lambda raw: gzip.compress(b""), f"{LABELS} begins with nothing, expected 00000801: it holds no lab"),
        (LABELS, lambda raw: gzip.compress(idx(np.zeros(9, np.uint8))), f"has 40 images, but {LABELS} 9 labels"),
        (LABELS, lambda raw: gzip.compress(raw[:-1] + b"\x0a"), f"{LABELS}: label 39 is 10; expected 0 to 9"),
    ],
)
def test_damaged_idx_files_are_a_sentence(tmp_path, name, damage, sentence):
    write_idx(tmp_path, {"train": 40})
    raw = gzip.decompress((tmp_path / name).read_bytes())
    (tmp_path / name).write_bytes(damage(raw))
    with pytest.raises(ValueError) as caught:
        load("train", tmp_path, size=12)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name, kind", [(IMAGES, "images"), (LABELS, "labels")])
def test_half_a_split_of_idx_files_is_a_sentence(tmp_path, name, kind):
    write_idx(tmp_path, {"train": 40})
    (tmp_path / name).unlink()
    other = {IMAGES, LABELS} - {name}
    sentence = f"has {other.pop()}, but not the {kind} that belong to it"
    assert sentence in failure(lambda: load("train", tmp_path, size=12))


# --- parquet, saved data sets, the Hub -------------------------------------------------------------------------------


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), color).save(buffer, "PNG")
    return buffer.getvalue()


def make_rows(count=8, **columns):
    """A dataset in which the label is named by the color."""
    labels = [i % 3 for i in range(3 * count)]
    pictures = [{"bytes": png(list(COLORS.values())[label]), "path": f"{i}.png"} for i, label in enumerate(labels)]
    features = datasets.Features(img=datasets.Image(), coarse_label=datasets.ClassLabel(names=["animal"]))
    data = datasets.Dataset.from_dict({"img": pictures, "coarse_label": [0] * len(labels)}, features)
    for name, (values, kind) in columns.items():
        data = data.add_column(name, [values[label] for label in labels]).cast_column(name, kind)
    return data


CLASS_LABEL = ([0, 1, 2], datasets.ClassLabel(names=list(COLORS)))


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_files(tmp_path, nested):
    folder = tmp_path / "deep" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    make_rows(fine_label=CLASS_LABEL).to_parquet(folder / "train-00000-of-00001.parquet")
    make_rows(2, fine_label=CLASS_LABEL).to_parquet(folder / "test-00000-of-00001.parquet")
    data = {split: load(split, tmp_path, size=16) for split in images.SPLITS}
    assert {split: len(part) for split, part in data.items()} == {"train": 21, "validation": 3, "test": 6}
    for part in data.values():
        check_colors(part)
    single = load("test", folder / "train-00000-of-00001.parquet", size=16, label_column="coarse_label")
    assert single.features["label"].names == ["animal"] and len(single) == 2


@pytest.mark.parametrize(
    "values, kind, names",
    [
        (["ant", "bee", "cat"], datasets.Value("string"), ["ant", "bee", "cat"]),
        ([10, 9, 100], datasets.Value("int64"), ["9", "10", "100"]),
    ],
)
def test_labels_without_names(tmp_path, values, kind, names):
    make_rows(species=(values, kind)).save_to_disk(tmp_path / "saved")
    data = load("train", tmp_path / "saved", size=16, label_column="species", image_column="img")
    assert data.features["label"].names == names
    for row in data:
        color = array(row["image"])[0, 0].tolist()
        number = [list(value) for value in COLORS.values()].index(color)
        assert names[row["label"]] == str(values[number])


def test_columns_and_labels_are_checked(tmp_path):
    make_rows(label=([0, -1, 2], datasets.ClassLabel(names=list(COLORS)))).save_to_disk(tmp_path / "a")
    assert "Row 1 of " in (message := failure(lambda: load("train", tmp_path / "a"))) and "the label -1" in message
    make_rows(weight=([0.5, 1, 2], datasets.Value("float64"))).save_to_disk(tmp_path / "b")
    load_b = {"source": tmp_path / "b"}
    assert "label_column='kind' is not in" in failure(lambda: load(**load_b, label_column="kind"))
    assert "expected names or whole numbers" in failure(lambda: load(**load_b, label_column="weight"))
    assert "image_column='weight' of" in failure(lambda: load(**load_b, image_column="weight"))
    make_rows().remove_columns("img").save_to_disk(tmp_path / "c")
    assert "has no column of images" in failure(lambda: load(source=tmp_path / "c"))
    make_rows().remove_columns("coarse_label").save_to_disk(tmp_path / "d")
    assert "say which one by label_column" in failure(lambda: load(source=tmp_path / "d"))


def test_splits_with_different_classes_are_refused(tmp_path):
    other = datasets.ClassLabel(names=["x", "y", "z"])
    parts = {"train": make_rows(label=CLASS_LABEL), "test": make_rows(label=([0, 1, 2], other))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert "have different classes" in failure(lambda: load("train", tmp_path / "saved"))


def test_a_hub_id(monkeypatch):
    parts = {"train": make_rows(fine_label=CLASS_LABEL), "test": make_rows(2, fine_label=CLASS_LABEL)}
    streams = {name: part.to_iterable_dataset() for name, part in parts.items()}
    asked = []

    def load_dataset(name, streaming=False):
        asked.append(name)
        return streams if streaming else datasets.DatasetDict(parts)

    monkeypatch.setattr(images.datasets, "load_dataset", load_dataset)
    check_colors(load("validation", "someone/animals", size=16))
    stream = load("test", "someone/animals", size=16, streaming=True, num_images=4)
    check_colors(stream)
    assert len(list(stream)) == 4 and set(asked) == {"someone/animals"}
    message = failure(lambda: load("train", "someone/animals", streaming=True))
    assert "has no validation split to stream, only train, test; with streaming=False" in message


# --- batches ---------------------------------------------------------------------------------------------------------


def test_labeled_images_hold_the_pixels(tmp_path):
    dataset = load("validation", num_images=30, size=32)
    data = LabeledImages(dataset)
    assert len(data) == 30 and data.names == list(CLASSES[25])
    assert isinstance(data.pixels, np.memmap) and data.pixels.shape == (30, 3, 32, 32)
    batch = data.__getitems__([4, 0, 29])
    assert batch["image"].dtype == torch.uint8 and batch["labels"].dtype == torch.int64
    for index, picture, label in zip([4, 0, 29], batch["image"], batch["labels"], strict=True):
        assert np.array_equal(array(dataset[index]["image"]), picture.permute(1, 2, 0).numpy())
        assert dataset[index]["label"] == label
    one = data[3]
    assert one["image"].shape == (3, 32, 32) and one["labels"].shape == ()
    batch["image"].zero_()  # it is a copy
    assert data.pixels.max() > 0


def test_one_channel_is_the_luma(tmp_path):
    dataset = load("validation", num_images=5, size=32)
    gray = LabeledImages(dataset, channels=1)
    for row, pixels in zip(dataset, gray.pixels, strict=True):
        assert np.array_equal(array(row["image"].convert("L")), pixels[0])
    with pytest.raises(ValueError, match="channels=2 is unknown; choose 1"):
        LabeledImages(dataset, channels=2)


def test_the_pixels_are_written_once(monkeypatch):
    data = LabeledImages(load("validation", num_images=20, size=32))
    monkeypatch.setattr(images, "_write_pixels", None)
    again = LabeledImages(load("validation", num_images=20, size=32))
    assert np.array_equal(data.pixels, again.pixels)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    columns = {"image": [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], "label": [0, 0]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["x"]))
    dataset = datasets.Dataset.from_dict(columns, features)
    with pytest.raises(ValueError, match=r"The images have several sizes \(\(8, 8\), \(9, 8\)\)"):
        images._write_pixels(dataset, tmp_path / "pixels.npy")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="'label' is missing"):
        LabeledImages(dataset.remove_columns("label"))


def test_channel_statistics():
    data = LabeledImages(load("validation", num_images=20, size=32))
    mean, std = data.channel_statistics()
    pixels = data.pixels.astype(np.float64) / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)), abs=1e-4)
    assert std == pytest.approx(pixels.std((0, 2, 3)), abs=1e-3)


# --- augmentation ----------------------------------------------------------------------------------------------------


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_image_is_a_crop_of_its_padded_self_maybe_mirrored(dtype):
    given = torch.randint(1, 255, (40, 3, 9, 7), generator=generator()).to(dtype)
    shifts = set()
    for image, changed in zip(given, augment(given, padding=2, generator=generator(1)), strict=True):
        padded = torch.nn.functional.pad(image, (2,) * 4)
        found = [
            (y, x, flip)
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
            if torch.equal(
                changed, padded[:, y : y + 9, x : x + 7].flip(2) if flip else padded[:, y : y + 9, x : x + 7]
            )
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 20 and {flip for _, _, flip in shifts} == {False, True}


def test_augmentation_follows_its_generator_alone():
    given = torch.randn(16, 3, 8, 8)
    first = augment(given, generator=generator(3))
    torch.rand(5)
    assert torch.equal(first, augment(given, generator=generator(3)))
    assert not torch.equal(first, augment(given, generator=generator(4)))
    assert torch.equal(augment(given, padding=0, flip=False), given)


def test_padding_has_limits():
    for padding in (-1, 8):
        with pytest.raises(ValueError, match=f"padding={padding} is out of range; give 0 to less than the 8x9"):
            augment(torch.zeros(1, 3, 8, 9), padding=padding)
