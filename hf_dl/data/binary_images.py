"""Read the binary files in which the authors of STL-10, CIFAR-10 and CIFAR-100 publish them."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np

_FOLDERS = ("", "stl10_binary", "cifar-10-batches-bin", "cifar-100-binary")
_CIFAR = {  # per file of class names: files per split, number of labels per image, number of classes
    "batches.meta.txt": ({"train": "data_batch_*.bin", "test": "test_batch.bin"}, 1, 10),
    "fine_label_names.txt": ({"train": "train.bin", "test": "test.bin"}, 2, 100),
}


def read_binary_folder(source: Path) -> dict[str, datasets.Dataset]:
    """Read the binary files of STL-10, CIFAR-10 or CIFAR-100 in a folder, or in the subfolder of their archive.

    Args:
        source: The folder.

    Returns:
        The datasets "train" and "test", with undecoded images and labels. Empty if the folder has no such files. The
        unlabeled images of STL-10 are ignored, and the labels of CIFAR-100 are the 100 fine ones.

    Raises:
        ValueError: If a file is missing or damaged, or a label is out of range.
    """
    for name in _FOLDERS:
        root = source / name
        if (root / "train_X.bin").is_file() or (root / "test_X.bin").is_file():
            return _read_stl10(root)
        for meta, (files, num_labels, count) in _CIFAR.items():
            if (root / meta).is_file():
                names = _read_names(root / meta, count)
                found = {split: sorted(root.glob(pattern)) for split, pattern in files.items()}
                return {split: _read_cifar(paths, num_labels, names) for split, paths in found.items() if paths}
    pickled = [*source.glob("cifar-*-python*"), *source.glob("cifar-10-batches-py"), *source.glob("batches.meta")]
    if pickled:
        raise ValueError(
            f"source={str(source)!r} has {pickled[0].name}, the pickled version of CIFAR, which could run any code. "
            "Expected its binary version, such as cifar-10-batches-bin, or parquet files."
        )
    return {}


def _read_names(path: Path, count: int) -> list[str]:
    names = path.read_text(encoding="utf-8").split() if path.is_file() else []
    if len(names) != count:
        raise ValueError(f"{path} has {len(names)} class names. Expected {count}. Download the archive again.")
    return names


def _read_stl10(root: Path) -> dict[str, datasets.Dataset]:
    names, found = _read_names(root / "class_names.txt", 10), {}
    for split in ("train", "test"):
        images, labels = root / f"{split}_X.bin", root / f"{split}_y.bin"
        if not images.is_file():
            continue
        if not labels.is_file():
            raise ValueError(f"{images} has no labels: {labels.name} is missing. Download the archive again.")
        numbers = np.fromfile(labels, np.uint8)
        # each channel is stored column by column
        pixels = _read_rows(images, 3 * 96 * 96).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
        if len(pixels) != len(numbers):
            raise ValueError(f"{images} has {len(pixels)} images, but {labels.name} has {len(numbers)} labels.")
        # labels start at 1; 0 wraps around to 255, which is out of range
        found[split] = _make_dataset(pixels, numbers - np.uint8(1), names, labels, first=1)
    return found


def _read_cifar(paths: list[Path], num_labels: int, names: list[str]) -> datasets.Dataset:
    rows = np.concatenate([_read_rows(path, num_labels + 3 * 32 * 32) for path in paths])
    pixels = rows[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _make_dataset(pixels, rows[:, num_labels - 1], names, paths[0].parent, first=0)


def _read_rows(path: Path, width: int) -> np.ndarray:
    content = np.fromfile(path, np.uint8)
    if len(content) % width or not len(content):
        raise ValueError(f"{path} has {len(content)} bytes. Expected a multiple of {width}. Download it again.")
    return content.reshape(-1, width)


def _make_dataset(
    pixels: np.ndarray, labels: np.ndarray, names: list[str], path: Path, *, first: int
) -> datasets.Dataset:
    if labels.max() >= len(names):
        row = int(np.argmax(labels >= len(names)))
        shown = (int(labels[row]) + first) % 256
        raise ValueError(f"{path}: label {row} is {shown}. Expected {first} to {len(names) - 1 + first}.")
    # with a header of one line, the raw pixels become a PPM file, which Pillow reads
    header = b"P6 %d %d 255\n" % pixels.shape[2:0:-1]
    columns = {"image": [{"bytes": header + image.tobytes(), "path": None} for image in pixels], "label": labels}
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=names))
    return datasets.Dataset.from_dict(columns, features)
