"""Folders of images as people have them: unpacked archives, empty folders, odd names, links and other files."""

import os
import re

import pytest
from PIL import Image

from hf_dl.data import labeled_images
from hf_dl.data.class_folders import count_classes, find_images, is_flat, real_path, shown_path

from .errors import failure


def write(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(os.fsencode(folder) + b"/" + os.fsencode(name), "PNG")


def write_classes(root, count=3):
    for name in ("ant", "bee"):
        write(root / name, *(f"{i}.png" for i in range(count)))


def load(root, split="train", **options):
    return labeled_images.load(split, root, size=8, **options)


def test_outer_folders_of_archives_are_not_classes(tmp_path):
    write_classes(tmp_path / "zip" / "pictures-master" / "pictures")
    write(tmp_path / "zip" / "__MACOSX" / "pictures" / "ant", "._0.png")
    (tmp_path / "zip" / "empty").mkdir()
    (tmp_path / "zip" / "README.txt").write_text("about the pictures")
    data = load(tmp_path / "zip")
    assert data.features["label"].names == ["ant", "bee"] and len(data) == 2
    assert data.info.description == "2 images of 2 classes: ant 1, bee 1."


def test_outer_folders_around_and_inside_of_splits(tmp_path):
    for split in ("Train", "val"):
        write_classes(tmp_path / "animals" / split / "pictures")
    write(tmp_path / "animals" / "raw", "a.png")
    assert load(tmp_path, "validation").features["label"].names == ["ant", "bee"]
    assert len(load(tmp_path)) == 4
    assert load(tmp_path, "validation").info.description == (
        "6 images of 2 classes: ant 3, bee 3. Skipped folders beside the splits: 1 (raw)."
    )


def test_what_is_skipped_is_reported(tmp_path):
    write_classes(tmp_path)
    write(tmp_path, "cover.png")
    write(tmp_path / ".thumbnails", "0.png")
    write(tmp_path / "ant" / ".ipynb_checkpoints", "0.png")
    write(tmp_path / "ant" / "__MACOSX", "0.png")
    write(tmp_path / "bee", "._0.png")
    (tmp_path / "cat").mkdir()
    (tmp_path / "ant" / "folder.png").mkdir()
    for name in ("ant/notes.txt", "bee/photo.heic", ".DS_Store"):
        (tmp_path / name).write_text("no image")
    write(tmp_path / "ant" / "deep" / "deeper", "9.png")
    data = load(tmp_path)
    assert data.info.description == (
        "3 images of 2 classes: ant 2, bee 1. Skipped files that are not images: 2 (notes.txt, photo.heic); "
        "folders without images: 1 (cat); images outside of class folders: 1 (cover.png)."
    )
    assert len(find_images(tmp_path / "ant")) == 4
    stream = load(tmp_path, streaming=True)
    assert stream.info.description.startswith("Skipped files") and len(list(stream)) == 3


def test_names_that_are_not_utf8(tmp_path):
    write_classes(tmp_path, count=6)
    write(tmp_path / os.fsdecode(b"caf\xe9"), *(os.fsdecode(b"%d \xff.png" % i) for i in range(6)))
    data = load(tmp_path)
    assert data.features["label"].names == ["ant", "bee", r"caf\xe9"]
    assert data.info.description == r"12 images of 3 classes: ant 4, bee 4, caf\xe9 4."
    path = os.fsencode(tmp_path / "ant") + b"/b\xe4d.png"
    with open(path, "wb") as file:
        file.write(b"no image")
    problems = [failure(lambda split=split: load(tmp_path, split)) for split in ("train",)]
    assert r"ant/b\xe4d.png (the file is not an image that can be read)" in problems[0]
    assert real_path(shown_path(path)) == path and real_path(str(tmp_path)) == str(tmp_path)


def test_dangling_links_are_images_that_cannot_be_read(tmp_path):
    write_classes(tmp_path, count=1)
    for name in ("ant", "bee"):
        (tmp_path / name / "link.png").symlink_to(tmp_path / "nowhere.png")
    message = failure(lambda: load(tmp_path))
    assert re.search(r"ant/link\.png \(the file is a link to a missing file\)", message), message
    assert "skip them with corrupt='skip'" in message
    with pytest.warns(UserWarning, match="2 of 4 images of .* cannot be read and are skipped"):
        data = load(tmp_path, corrupt="skip")
    assert len(data) == 2 and "2 of 4 images" in data.info.description


@pytest.mark.parametrize(
    ("folders", "problem"),
    [
        ([], "has no images in class folders and no parquet files"),
        (["."], "has no images in class folders .*Skipped .*images outside of class folders: 1"),
        (["photos"], "has no images in class folders"),
        (["a/ant", "b"], None),
        (["train/ant", "val/ant"], "has one class, 'ant' and no parquet files. Expected <class>/<image>"),
        (["train/a", "Training/b"], "several folders of the train split: 'Train.*Keep or join one"),
    ],
)
def test_fewer_than_two_classes_are_refused(tmp_path, folders, problem):
    (tmp_path / "empty").mkdir()
    for folder in folders:
        write(tmp_path / folder, "0.png")
    if problem is None:
        assert load(tmp_path).features["label"].names == ["a", "b"]
    else:
        assert re.search(problem, failure(lambda: load(tmp_path)))


def test_a_flat_folder_is_recognized(tmp_path):
    assert not is_flat("synthetic") and not is_flat(tmp_path / "nowhere")
    write(tmp_path / "flat" / "photos", "0.png", "1.png")
    write_classes(tmp_path / "classes")
    assert is_flat(tmp_path / "flat") and not is_flat(tmp_path / "classes")


def test_many_classes_are_summarized():
    names = [str(number) for number in range(30)]
    assert count_classes([0, 0, *range(30)], names) == "32 images of 30 classes: 1 to 3 images per class."
