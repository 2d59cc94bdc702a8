"""Read idx files, the format in which MNIST and Fashion-MNIST are published."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path

import datasets
import numpy as np

FASHION = (  # class names of Fashion-MNIST, as in its Hub dataset; idx files have no names
    "T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_NAME = re.compile(r"(train|t10k|test)-(images|labels)[.-]idx[13]-ubyte(\.gz)?")
_MAGIC = {"images": b"\0\0\x08\x03", "labels": b"\0\0\x08\x01"}  # unsigned bytes in 3 dimensions, or in 1
_FASHION_LABELS = (0x2ED6E46A, 0x242BC73F)  # CRC-32 of the labels of its two splits


def read_idx_folder(root: Path) -> dict[str, datasets.Dataset]:
    """Read the idx files of a folder, or of its subfolder `raw` or `FashionMNIST/raw`.

    Returns:
        The datasets "train" and "test", with undecoded images and labels. Empty if the folder has no idx files.

    Raises:
        FileNotFoundError: If the file of the images or of the labels is missing.
        ValueError: If a file is damaged, or images and labels do not match.
    """
    files: dict[str, dict[str, Path]] = {}
    for folder in (root, root / "raw", root / "FashionMNIST" / "raw"):
        for path in sorted(folder.iterdir()) if folder.is_dir() and not files else ():
            if match := _NAME.fullmatch(path.name):
                files.setdefault(match[1], {}).setdefault(match[2], path)
    found = {}
    for split, parts in files.items():
        for kind in _MAGIC:
            if kind not in parts:
                there = next(iter(parts.values()))
                raise FileNotFoundError(
                    f"source={str(root)!r} has {there.name}, but the file with its {kind} is missing."
                )
        images, labels = _read_idx(parts["images"], "images"), _read_idx(parts["labels"], "labels")
        if len(images) != len(labels):
            raise ValueError(
                f"{parts['images'].name} has {len(images)} images, but {parts['labels'].name} has {len(labels)} "
                "labels. Expected the same number."
            )
        if labels.max(initial=0) > 9:
            row = int(np.argmax(labels > 9))
            raise ValueError(f"{parts['labels'].name}: label {row} is {labels[row]}. Expected 0 to 9.")
        names = FASHION if zlib.crc32(labels) in _FASHION_LABELS else [str(label) for label in range(10)]
        # with a header of one line, the raw pixels become a PGM file, which Pillow reads
        header = b"P5 %d %d 255\n" % images.shape[:0:-1]
        columns = {
            "image": [{"bytes": header + image.tobytes(), "path": None} for image in images],
            "label": labels.tolist(),
        }
        features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=list(names)))
        found[split.replace("t10k", "test")] = datasets.Dataset.from_dict(columns, features)
    return found


def _read_idx(path: Path, kind: str) -> np.ndarray:
    """Return the bytes of an idx file: images (count, height, width) or labels (count,)."""
    magic = _MAGIC[kind]
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(4)
            if head != magic:
                raise ValueError(
                    f"{path.name} starts with {head.hex() or 'nothing'}, expected {magic.hex()}. It has no {kind}."
                )
            sizes = file.read(4 * magic[3])
            if len(sizes) < 4 * magic[3]:
                raise EOFError("The header is incomplete")
            shape = tuple(int.from_bytes(sizes[start : start + 4], "big") for start in range(0, len(sizes), 4))
            count = math.prod(shape)
            if not 0 < count < 2**32:
                raise ValueError(f"{path.name} has the invalid shape {shape}. Download it again.")
            content = file.read(count + 1)  # limits the memory for a malicious .gz
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path.name} is damaged ({error}). Download it again.") from error
    if len(content) != count:
        more = "more" if len(content) > count else f"{len(content)}"
        raise ValueError(f"{path.name} has {more} bytes of {kind}, expected {count}. Download it again.")
    return np.frombuffer(content, np.uint8).reshape(shape)
