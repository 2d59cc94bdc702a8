"""Small files in the binary formats of STL-10 and CIFAR, compared with the images that were written."""

import numpy as np
import pytest

from hf_dl.data import labeled_images

from .errors import failure

pytestmark = pytest.mark.usefixtures("private_cache")


def draw(count, side):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write_stl10(folder, labels=(3, 1, 10, 2, 1, 3)):
    folder.mkdir(parents=True)
    images = draw(len(labels), 96)
    # channels, then columns, then rows
    (folder / "test_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
    (folder / "test_y.bin").write_bytes(bytes(labels))
    (folder / "unlabeled_X.bin").write_bytes(b"unused")
    names = [f"class_{i}" for i in range(1, 11)]
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    return images


def write_cifar(folder, kind, labels=(3, 1, 9, 2)):
    folder.mkdir(parents=True)
    images = draw(len(labels), 32)
    coarse = [[label // 5] if kind == 100 else [] for label in labels]
    rows = [bytes([*c, n]) + i.transpose(2, 0, 1).tobytes() for c, n, i in zip(coarse, labels, images, strict=True)]
    if kind == 10:
        (folder / "data_batch_1.bin").write_bytes(b"".join(rows[:3]))
        (folder / "data_batch_2.bin").write_bytes(rows[3])
        (folder / "test_batch.bin").write_bytes(b"".join(rows))
    else:
        (folder / "test.bin").write_bytes(b"".join(rows))
    names = "batches.meta.txt" if kind == 10 else "fine_label_names.txt"
    (folder / names).write_text("\n".join(f"class_{i}" for i in range(kind)) + "\n\n")
    return images


def check(rows, images, labels, prefix=0):
    """The rows have these images in any order; prefix is the number of the first class name."""
    assert sorted(rows["label"][:]) == sorted(labels) and len(rows) == len(images)
    names = rows.features["label"].names
    expected = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for row in rows:
        assert expected[np.asarray(row["image"]).tobytes()] == row["label"]
        assert names[row["label"]] == f"class_{row['label'] + prefix}"


@pytest.mark.parametrize("outer", ["", "stl10_binary"])
def test_stl10(tmp_path, outer):
    images = write_stl10(tmp_path / "data" / outer)
    rows = labeled_images.load("test", tmp_path / "data", size=None)
    check(rows, images, [2, 0, 9, 1, 0, 2], prefix=1)


@pytest.mark.parametrize("kind, outer", [(10, "cifar-10-batches-bin"), (100, "")])
def test_cifar(tmp_path, kind, outer):
    images = write_cifar(tmp_path / "data" / outer, kind)
    check(labeled_images.load("test", tmp_path / "data", size=32), images, [3, 1, 9, 2])
    if kind == 10:
        check(labeled_images.load("train", tmp_path / "data", size=32), images, [3, 1, 9, 2])


def test_mistakes_are_explained(tmp_path):
    def message(folder, **changes):
        for name, content in changes.items():
            path = folder / name.replace("__", ".")
            path.unlink() if content is None else path.write_bytes(content)
        return failure(lambda: labeled_images.load("test", folder))

    stl, cifar = tmp_path / "a", tmp_path / "b"
    write_stl10(stl)
    assert "test_y.bin: label 1 is 0. Expected 1 to 10" in message(stl, test_y__bin=bytes([1, 0, 3, 4, 5, 6]))
    assert "has 6 images, but test_y.bin has 2 labels" in message(stl, test_y__bin=b"\1\2")
    assert "test_X.bin has 7 bytes. Expected a multiple of 27648" in message(stl, test_X__bin=b"damaged")
    assert "has no labels: test_y.bin is missing" in message(stl, test_y__bin=None)
    assert "class_names.txt has 1 class names. Expected 10" in message(stl, class_names__txt=b"x")
    write_cifar(cifar, 10)
    assert "label 0 is 12. Expected 0 to 9" in message(cifar, test_batch__bin=bytes([12]) + bytes(3072))
    (tmp_path / "c" / "cifar-10-batches-py").mkdir(parents=True)
    assert "has cifar-10-batches-py, the pickled version of CIFAR" in message(tmp_path / "c")
