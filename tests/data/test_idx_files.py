import gzip
import struct
import zlib

import numpy as np
import pytest

from hf_dl.data import idx_files
from hf_dl.data.image_arrays import LabeledImages
from hf_dl.data.labeled_images import SPLITS, load

from .errors import failure


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
    data = {split: load(split, tmp_path, size=12, holdout=0.25) for split in SPLITS}
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
    monkeypatch.setattr(idx_files, "_FASHION_LABELS", (zlib.crc32(labels),))
    names = load("train", tmp_path, size=12).features["label"].names
    assert names == list(idx_files.FASHION) and names[9] == "Ankle boot" and len(names) == 10


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    "name, damage, sentence",
    [
        (IMAGES, lambda raw: gzip.compress(raw)[:-30], f"{IMAGES} is damaged (Compressed file ended"),
        (IMAGES, lambda raw: raw, f"{IMAGES} is damaged (Not a gzipped file"),
        (IMAGES, lambda raw: gzip.compress(raw[:-5]), f"{IMAGES} has 5755 bytes of images, expected 5760. Download"),
        (IMAGES, lambda raw: gzip.compress(raw + b"."), f"{IMAGES} has more bytes of images, expected 5760. Download"),
        (IMAGES, lambda raw: gzip.compress(raw[:10]), f"{IMAGES} is damaged (The header is incomplete"),
        (
            IMAGES,
            lambda raw: gzip.compress(raw[:4] + b"\xff" * 12),
            "has the invalid shape (4294967295, 4294967295, 4294967295)",
        ),
        (IMAGES, lambda raw: gzip.compress(raw[:4] + bytes(12)), f"{IMAGES} has the invalid shape (0, 0, 0)"),
        (IMAGES, lambda raw: gzip.compress(idx(np.zeros(40, np.uint8))), "starts with 00000801, expected 00000803"),
        (LABELS, lambda raw: gzip.compress(b""), f"{LABELS} starts with nothing, expected 00000801. It has no lab"),
        (LABELS, lambda raw: gzip.compress(idx(np.zeros(9, np.uint8))), f"has 40 images, but {LABELS} has 9 labels"),
        (LABELS, lambda raw: gzip.compress(raw[:-1] + b"\x0a"), f"{LABELS}: label 39 is 10. Expected 0 to 9"),
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
    sentence = f"has {other.pop()}, but the file with its {kind} is missing"
    assert sentence in failure(lambda: load("train", tmp_path, size=12))
