import io

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_dl.data import decoded_images, labeled_images, object_images
from hf_dl.data.labeled_images import SPLITS, load

from .errors import failure


def array(image):
    return np.asarray(image)


def test_the_default_source_is_generated():
    rows, expected = (
        load("test", num_classes=100, num_images=4, size=32, seed=1),
        object_images.load("test", num_classes=100, num_images=4, size=32, seed=1),
    )
    assert rows.features == expected.features and rows["label"][:] == expected["label"][:]
    for row, other in zip(rows, expected, strict=True):
        assert np.array_equal(array(row["image"]), array(other["image"]))


def test_arguments_are_checked():
    assert "split='val' is unknown; choose one of train" in failure(lambda: load("val"))
    assert "corrupt='drop' is unknown; choose one of refuse, skip" in failure(lambda: load(corrupt="drop"))
    assert "num_classes=10 is unknown; choose one of 25, 100" in failure(lambda: load(num_classes=10))
    assert "size=16 must be from 32 to 256" in failure(lambda: load(size=16))
    assert "num_images=0 must be at least 1" in failure(lambda: load(num_images=0))
    assert "holdout=0.5 must be above 0 and below 0.5" in failure(lambda: load(holdout=0.5))
    assert "does not exist. Expected a folder" in failure(lambda: load(source="/no/such/folder"))


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
    parts = {split: load(split, root, size=16) for split in SPLITS}
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
    parts = {split: [array(row["image"])[0, 0, 0] for row in load(split, root, size=8)] for split in SPLITS}
    together = [value for values in parts.values() for value in values]
    assert sorted(together) == list(range(60))
    assert parts["test"] != [array(row["image"])[0, 0, 0] for row in load("test", root, size=8, seed=1)]
    some = [array(row["image"])[0, 0, 0] for row in load("train", root, size=8, num_images=10)]
    assert some == parts["train"][:10] and sum(value % 2 for value in some) == 5


@pytest.mark.parametrize("alias", ["valid", "val", "validation", "Dev"])
def test_a_folder_with_splits(tmp_path, alias):
    for split, count in (("train", 4), (alias, 2), ("test", 1)):
        write_folder(tmp_path / "b" / split, count=count)
    assert {split: len(load(split, tmp_path / "b", size=16)) for split in SPLITS} == {
        "train": 12, "validation": 6, "test": 3,
    }  # fmt: skip
    check_colors(load("validation", tmp_path / "b", size=16))


def test_a_class_of_very_few_images_is_only_trained_on(tmp_path):
    write_folder(tmp_path, count=10, classes=("ant", "bee"))
    write_folder(tmp_path, count=2, classes=("cat",))
    counts = {split: np.bincount(load(split, tmp_path, size=16)["label"][:], minlength=3) for split in SPLITS}
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
    decoded, decode_image = [], decoded_images.decode_image
    monkeypatch.setattr(decoded_images, "decode_image", lambda *given: decoded.append(given) or decode_image(*given))
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
    for split in SPLITS:
        try:
            load(split, tmp_path, size=16)
        except ValueError as error:
            count = int(str(error).split()[0])
            spoiled += count
            assert f"images of {str(tmp_path)!r} ({split}) cannot be read: " in str(error)
            assert str(error).count(str(tmp_path)) == count + 1  # the source and each file
            assert "or skip them with corrupt='skip'." in str(error)
    assert spoiled == 3


def test_corrupt_images_are_skipped_and_counted_each_time(tmp_path):
    write_folder(tmp_path, count=20)
    spoil(tmp_path)
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning) as caught:
            total = sum(len(load(split, tmp_path, size=16, corrupt="skip")) for split in SPLITS)
        assert total == 57
        text = " ".join(str(warning.message) for warning in caught)
        assert sum(int(str(warning.message).split()[0]) for warning in caught) == 3
        assert all(name in text for name in ("ant/0.jpg (", "bee/1.png (", "cat/2.png ("))
        assert "cannot be read and are skipped" in text


def test_corrupt_images_in_a_stream(tmp_path):
    write_folder(tmp_path, count=20)
    (tmp_path / "ant" / "0.jpg").write_text("not an image")
    splits = [split for split in SPLITS if _holds_a_spoiled_one(tmp_path, split)]
    assert len(splits) == 1
    stream = load(splits[0], tmp_path, size=16, corrupt="skip", streaming=True)
    with pytest.warns(UserWarning, match=r"cannot be read and is skipped: .*ant/0\.jpg \("):
        rows = list(stream)
    with pytest.warns(UserWarning, match="1 of "):
        assert len(rows) == len(load(splits[0], tmp_path, size=16, corrupt="skip"))


def _holds_a_spoiled_one(root, split):
    try:
        list(load(split, root, size=16, streaming=True))
    except ValueError as error:
        assert "ant/0.jpg" in str(error) and "Skip it with corrupt='skip'" in str(error)
        return True
    return False


def test_folders_that_are_none_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no images in class folders" in failure(lambda: load(source=tmp_path / "empty"))
    (tmp_path / "file.zip").write_bytes(b"")
    assert "is not a parquet file. Expected a parquet file or a folder" in failure(
        lambda: load(source=tmp_path / "file.zip")
    )
    write_folder(tmp_path / "c" / "test", count=2)
    assert "has no train split. Its splits: test" in failure(lambda: load("train", tmp_path / "c", size=16))


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


def test_damaged_datasets_are_explained(tmp_path):
    for name, content in (("x.parquet", b"PAR1"), ("dataset_info.json", b"{"), ("dataset_dict.json", b"{}")):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{folder.name}' is a damaged dataset. Write it again. "):
            load("train", folder)


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_files(tmp_path, nested):
    folder = tmp_path / "deep" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    make_rows(fine_label=CLASS_LABEL).to_parquet(folder / "train-00000-of-00001.parquet")
    make_rows(2, fine_label=CLASS_LABEL).to_parquet(folder / "test-00000-of-00001.parquet")
    data = {split: load(split, tmp_path, size=16) for split in SPLITS}
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
    assert "label_column='kind' is not a column of" in failure(lambda: load(**load_b, label_column="kind"))
    assert "Expected names or integers" in failure(lambda: load(**load_b, label_column="weight"))
    assert "image_column='weight' of" in failure(lambda: load(**load_b, image_column="weight"))
    make_rows().remove_columns("img").save_to_disk(tmp_path / "c")
    assert "has no column with images" in failure(lambda: load(source=tmp_path / "c"))
    make_rows().remove_columns("coarse_label").save_to_disk(tmp_path / "d")
    assert "Set label_column" in failure(lambda: load(source=tmp_path / "d"))


def test_splits_with_different_classes_are_refused(tmp_path):
    other = datasets.ClassLabel(names=["x", "y", "z"])
    parts = {"train": make_rows(label=CLASS_LABEL), "test": make_rows(label=([0, 1, 2], other))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert "have different classes" in failure(lambda: load("train", tmp_path / "saved"))


def test_datasets_that_the_user_already_has():
    data = make_rows(20, fine_label=CLASS_LABEL)
    parts = {split: load(split, data.with_format("torch"), size=16) for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 48, "validation": 6, "test": 6}
    for part in parts.values():
        check_colors(part)
    both = {"train": data, "val": make_rows(2, fine_label=CLASS_LABEL)}
    for source in (both, datasets.DatasetDict(both)):
        assert [len(load(split, source, size=16)) for split in ("train", "validation")] == [54, 6]
    part = datasets.Dataset(data.data, split=datasets.NamedSplit("test"))
    assert len(load("test", part, size=16)) == 60
    assert "'Dataset' has no train split. Its splits: test" in failure(lambda: load("train", part))
    stream = load("train", data.to_iterable_dataset(), size=16, num_images=7)
    assert isinstance(stream, datasets.IterableDataset) and len(list(stream)) == 7
    check_colors(stream)
    named = load("train", load("train", data, size=16).to_iterable_dataset(), size=16)  # its columns: image, label
    assert [row["label"] for row in named] == parts["train"]["label"][:]
    message = failure(lambda: load("test", data.to_iterable_dataset(), size=16))
    assert "'IterableDataset' has no test split to stream, only train" in message
    unknown = datasets.IterableDataset.from_generator(lambda: iter(()))
    assert "has no features. Give its columns with `cast`" in failure(lambda: load("train", unknown))


def test_a_hub_id(monkeypatch):
    parts = {"train": make_rows(fine_label=CLASS_LABEL), "test": make_rows(2, fine_label=CLASS_LABEL)}
    streams = {name: part.to_iterable_dataset() for name, part in parts.items()}
    asked = []

    def load_dataset(name, streaming=False):
        asked.append(name)
        return streams if streaming else datasets.DatasetDict(parts)

    monkeypatch.setattr(labeled_images.datasets, "load_dataset", load_dataset)
    check_colors(load("validation", "someone/animals", size=16))
    stream = load("test", "someone/animals", size=16, streaming=True, num_images=4)
    check_colors(stream)
    assert len(list(stream)) == 4 and set(asked) == {"someone/animals"}
    message = failure(lambda: load("train", "someone/animals", streaming=True))
    assert "has no validation split to stream, only train, test. Use streaming=False" in message
