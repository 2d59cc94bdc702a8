"""Find the images of a folder and their masks: side by side, named by a metadata.jsonl, or without masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import datasets

from .class_folders import Skipped, file_stamp, find_images, shown_path, unwrap
from .splits import SPLIT_OF

_LOSSY = {".jpg", ".jpeg", ".jfif"}
_MASK_NAMES = ("{}", "{}_mask")  # names of the mask of an image, without suffix

Pair = tuple[Path, Path | None]  # an image and its mask


def read_mask_folder(source: Path, mask_column: str) -> tuple[dict[str, datasets.Dataset], str]:
    """List images and masks below a folder, without decoding them.

    The first of these layouts that fits is read. Each may be inside an outer folder, and inside one folder per split:

    * metadata.jsonl: one line per image with `file_name` and the path of its mask, both relative to the file;
    * `images/` and `masks/`: an image and its mask have the same name, except for the suffix and an added `_mask`;
    * images without masks, in any subfolders.

    Args:
        source: The folder.
        mask_column: Key of the masks in metadata.jsonl. The key followed by `_file_name` is recognized too.

    Returns:
        The splits, and a sentence about skipped files, or an empty text. The columns are `image` and `mask`, which are
        paths, and `stamp`, which changes with the files. Images without masks have no column `mask`.

    Raises:
        FileNotFoundError: If a file of metadata.jsonl is missing.
        ValueError: If the folder has no images, some images have no mask, or metadata.jsonl is invalid.
    """
    root, skipped = unwrap(source), Skipped()
    pairs = list(_read_metadata(root, mask_column)) or _read_pairs(root, skipped)
    pairs = pairs or [(path, None) for path in find_images(root, skipped)]
    if not pairs:
        raise ValueError(
            f"source={str(source)!r} has no images. Expected images/ and masks/, a metadata.jsonl, or images."
        )
    without = [image for image, mask in pairs if mask is None]
    if 0 < len(without) < len(pairs):
        raise ValueError(
            f"{len(without)} of {len(pairs)} images of {str(source)!r} have no mask, such as "
            f"{shown_path(without[0])}. Expected a mask for each image, or for none."
        )
    for _, mask in pairs:
        if mask is not None and mask.suffix.lower() in _LOSSY:
            raise ValueError(f"The mask {shown_path(mask)} is a JPEG file, which changes its values. Expected PNG.")
    parts: dict[str, list[Pair]] = {}
    for image, mask in pairs:
        parts.setdefault(_split_of(image.relative_to(source)), []).append((image, mask))
    return {split: _make_dataset(members) for split, members in parts.items()}, skipped.describe()


def _split_of(path: Path) -> str:
    """Return the split that a folder of the path names, or "train"."""
    return next((SPLIT_OF[part.lower()] for part in path.parts[:-1] if part.lower() in SPLIT_OF), "train")


def _read_metadata(root: Path, mask_column: str) -> Iterator[Pair]:
    for path in sorted(root.rglob("metadata.jsonl")):
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{shown_path(path)} is not UTF-8 text: {error}.") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"Line {number} of {shown_path(path)}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON: {error}.") from None
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise ValueError(f"{where} has no text in 'file_name'. Expected the path of an image.")
            mask = row.get(mask_column, row.get(f"{mask_column}_file_name"))
            if mask is not None and not isinstance(mask, str):
                raise ValueError(f"{where} has the mask {mask!r}. Expected the path of an image.")
            for name in filter(None, (row["file_name"], mask)):
                if not (path.parent / name).is_file():
                    raise FileNotFoundError(f"{where} names {name!r}, but {path.parent / name} does not exist.")
            yield path.parent / row["file_name"], None if mask is None else path.parent / mask


def _read_pairs(root: Path, skipped: Skipped) -> list[Pair]:
    """Pair the files of `images/` and `masks/`, directly in the root or in the folder of a split."""
    pairs: list[Pair] = []
    for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        if not ((folder / "images").is_dir() and (folder / "masks").is_dir()):
            continue
        masks = {path.relative_to(folder / "masks").with_suffix(""): path for path in find_images(folder / "masks")}
        for image in find_images(folder / "images", skipped):
            name = image.relative_to(folder / "images").with_suffix("")
            found = (masks.pop(name.with_name(form.format(name.name)), None) for form in _MASK_NAMES)
            pairs.append((image, next(filter(None, found), None)))
        for path in masks.values():
            skipped.add("masks without an image", path)
        if pairs and all(mask is None for _, mask in pairs):
            raise ValueError(
                f"No file of {shown_path(folder / 'masks')} has the name of an image, such as "
                f"{pairs[0][0].stem}.png. Expected the names of the images, with or without _mask."
            )
    return pairs


def _make_dataset(pairs: list[Pair]) -> datasets.Dataset:
    columns = {
        "image": [shown_path(image) for image, _ in pairs],
        "stamp": [f"{file_stamp(image)} {file_stamp(mask) if mask else ''}" for image, mask in pairs],
    }
    if pairs[0][1] is not None:
        columns["mask"] = [shown_path(mask) for _, mask in pairs]
    return datasets.Dataset.from_dict(columns)
