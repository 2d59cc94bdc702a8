"""Images with instance masks from any source: CLEVRTex, COCO, or a folder or dataset of images and masks."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
from PIL import Image

from ..models.image_input import open_image, to_rgb
from . import clevrtex, coco
from .class_folders import real_path
from .decoded_images import CORRUPT, is_fine, settle
from .instance_masks import check_arguments, crop_square, make_example
from .mask_folders import read_mask_folder
from .splits import (
    Rows,
    Source,
    find_local,
    find_split,
    given_splits,
    hold_out,
    load_from_hub,
    name_source,
    read_tables,
    streamed_split,
)

_VERSION = 4  # increase it when pixels or columns change: `datasets` caches by arguments, not by code


def load(
    split: str = "train",
    source: Source = "clevrtex_full",
    *,
    size: int = 128,
    crop: int | None = None,
    num_images: int | None = None,
    holdout: float = 0.1,
    seed: int = 0,
    image_column: str | None = None,
    mask_column: str | None = None,
    annotations: str | os.PathLike | None = None,
    corrupt: str = "refuse",
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load images with instance masks, cropped to a centered square and resized.

    The kind of `source` is detected from its content:

    * a folder of CLEVRTex;
    * a folder of images, if `annotations` names a COCO file;
    * a dataset saved by `save_to_disk`, a parquet file or a folder of parquet files;
    * a folder with `images/` and `masks/`, with a metadata.jsonl, or with images without masks, see
      `hf_dl.data.mask_folders`;
    * a `Dataset` that you already have, or a dictionary of splits;
    * anything else is a Hub id.

    If the source has no validation or test split, `holdout` of the training images are held out for it. The choice
    depends on `seed` only. CLEVRTex has its own splits.

    Args:
        split: "train", "validation" or "test". A COCO file has one split, so the name makes no difference there.
        source: Path, Hub id, or a dataset that you already have. A single `Dataset` without a split is the training
            split. An `IterableDataset` is streamed.
        size: Width and height of the results in pixels.
        crop: Side of the centered square in pixels of the original image. Defaults to 192 for CLEVRTex, as in its
            paper, and to the shorter side for other images. 0 always selects the shorter side.
        num_images: Maximum number of images. Defaults to all.
        holdout: Share of the training images to hold out for a missing split, above 0 and below 0.5.
        seed: Seed of the choice of held-out images.
        image_column: Column of the images. Defaults to "image", or to the first column with images.
        mask_column: Column of the masks: images of mode L, P, I or 1 whose pixel values are object indices. Defaults
            to "mask" if it exists; otherwise, the images have no masks.
        annotations: COCO file with polygons or uncompressed run lengths.
        corrupt: Handling of rows whose image or mask cannot be read. "refuse" raises an error. "skip" removes them and
            warns with a list. CLEVRTex and COCO support only "refuse".
        streaming: Read while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns `image` (RGB), `mask` (8-bit, 0 = background, i = objects[i - 1]) and `objects`.
        Objects outside of the crop are removed, and the others are renumbered without gaps, in the same order. Each
        object has a `box` (x0, y0, x1, y1 in pixels, half-open) and `visible_pixels`. CLEVRTex adds shape, material,
        size, rotation and 3-D position, and COCO adds a label. Without masks, the only column is `image`.

    Raises:
        FileNotFoundError: If a folder or file does not exist.
        ValueError: If a column, a mask or an argument is invalid.

    Example:
        >>> from hf_dl.data import masked_images
        >>> dataset = masked_images.load("validation", "/data/clevrtex_full")  # doctest: +SKIP
    """
    check_arguments(split, size, crop or None)
    if corrupt not in CORRUPT:
        raise ValueError(f"corrupt={corrupt!r} is unknown; choose one of {', '.join(CORRUPT)}.")
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images={num_images} must be at least 1.")
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout={holdout} must be above 0 and below 0.5: the share of images to hold out.")
    given, name = given_splits(source), name_source(source)
    root = Path(name).expanduser()
    expected = "a folder of CLEVRTex or of images, a parquet file, or a Hub id"
    if given is None and find_local(name, expected) is not None and root.is_file() and root.suffix != ".parquet":
        raise FileNotFoundError(f"source={name!r} is not a folder. Expected {expected}.")
    is_clevrtex = given is None and annotations is None and clevrtex.find_variant(root) is not None
    if corrupt != "refuse" and (annotations is not None or is_clevrtex):
        kind = "CLEVRTex" if is_clevrtex else "COCO annotations"
        raise ValueError(f"corrupt={corrupt!r} does not work with {kind}. Use corrupt='refuse'.")
    if annotations is not None:
        data = coco.load(split, name, annotations=annotations, size=size, crop=crop or None, streaming=streaming)
        return _first(data, num_images)
    if is_clevrtex:
        options = {} if crop is None else {"crop": crop or None}
        return _first(clevrtex.load(split, name, size=size, streaming=streaming, **options), num_images)
    skipped = ""
    if given is not None:
        found = given
    elif not root.exists():
        found = load_from_hub(name, expected, streaming=streaming)
    else:
        found = read_tables(root.resolve(), streaming=streaming)
        if found is None:
            found, skipped = read_mask_folder(root.resolve(), mask_column or "mask")
    if any(isinstance(rows, datasets.IterableDataset) for rows in found.values()):
        rows = _first(streamed_split(found, split, source), num_images)
    else:
        rows = _select(found, split, name, holdout, seed, num_images)
        rows = rows.to_iterable_dataset() if streaming else rows
    options = {"split": split, "size": size, "crop": crop or None, "corrupt": corrupt}
    data, unreadable = _crop_rows(rows, name, image_column, mask_column, **options)
    count = f"{len(data)} images" if isinstance(data, datasets.Dataset) else "Images"
    masks = "with masks" if "mask" in data.features else "without masks"
    data.info.description = " ".join(filter(None, (f"{count} {masks}.", skipped, unreadable)))
    return data


def _first(rows: Rows, count: int | None) -> Rows:
    if count is None:
        return rows
    if isinstance(rows, datasets.IterableDataset):
        return rows.take(count)
    return rows.select(range(min(count, len(rows))))


def _select(
    found: Mapping[str, datasets.Dataset], split: str, source: str, holdout: float, seed: int, num_images: int | None
) -> datasets.Dataset:
    """Return the rows of a split. Missing splits are held out from the training rows."""
    rows, missing = find_split(found, split), [n for n in ("validation", "test") if find_split(found, n) is None]
    if rows is not None and (split != "train" or not missing):
        return _first(rows, num_images)
    rows = find_split(found, "train")
    if rows is None:
        wanted = " or ".join(dict.fromkeys([split, "train"]))
        raise ValueError(f"{source!r} has no {wanted} split. Its splits: {', '.join(found)}.")
    order = np.random.default_rng([seed, 20_200_615]).permutation(len(rows))
    chosen = hold_out(order, missing, holdout)[split]
    if not len(chosen):
        raise ValueError(f"split={split!r} of {source!r} would be empty. The source has {len(rows)} images.")
    return rows.select(chosen[:num_images])


def _crop_rows(
    rows: Rows,
    source: str,
    image_column: str | None,
    mask_column: str | None,
    *,
    split: str,
    size: int,
    crop: int | None,
    corrupt: str,
) -> tuple[Rows, str]:
    """Crop and resize all images and masks of a split; return them, and a sentence about skipped rows."""
    if rows.features is None:  # a stream whose columns are known after its first row
        kinds = {name: isinstance(value, Image.Image) for name, value in next(iter(rows)).items()}
    else:
        kinds = {name: isinstance(kind, datasets.Image) for name, kind in rows.features.items()}
    if "stamp" in kinds and not any(kinds.values()):  # paths from `read_mask_folder`
        image, mask = "image", "mask" if "mask" in kinds else None
    else:
        pictures = [name for name, is_picture in kinds.items() if is_picture]
        image = image_column or ("image" if "image" in kinds else next(iter(pictures), "image"))
        mask = mask_column or ("mask" if "mask" in kinds else None)
        for option, column in (("image_column", image), ("mask_column", mask)):
            if column is not None and column not in pictures:
                problem = "has no images" if column in kinds else "does not exist"
                listed = ", ".join(pictures) or "none"
                raise ValueError(f"{option}={column!r} of {source!r} {problem}. Its columns with images: {listed}.")
        rows = rows.with_format(None) if isinstance(rows, datasets.Dataset) else rows
        for column in filter(None, (image, mask)) if rows.features is not None else ():
            rows = rows.cast_column(column, datasets.Image(decode=False))
    features = datasets.Features(image=datasets.Image()) if mask is None else coco.FEATURES
    options = {"image": image, "mask": mask, "size": size, "crop": crop, "version": _VERSION}
    table = {"remove_columns": list(kinds), "with_indices": True}
    if corrupt == "refuse":
        return rows.map(partial(_read_row, **options), **table, features=features), ""
    features = datasets.Features({**features, "problem": datasets.Value("string")})
    data = rows.map(partial(_try_row, **options), **table, features=features)
    if isinstance(data, datasets.Dataset):
        return settle(data, corrupt, source, split)
    fine = partial(is_fine, corrupt=corrupt, source=source)
    return data.filter(fine, input_columns="problem").remove_columns("problem"), ""


class _UnreadableError(ValueError):
    """An image or a mask that cannot be read."""


def _read_row(row: dict, index: int, **options: Any) -> dict:
    try:
        return _crop_row(row, index, **options)
    except _UnreadableError as error:
        raise ValueError(f"{error} Repair or remove it, or skip it with corrupt='skip'.") from error


def _try_row(row: dict, index: int, mask: str | None, **options: Any) -> dict:
    try:
        return {**_crop_row(row, index, mask=mask, **options), "problem": None}
    except _UnreadableError as error:
        empty = {"image": None} if mask is None else {"image": None, "mask": None, "objects": []}
        return {**empty, "problem": str(error).rstrip(".")}


def _crop_row(row: dict, index: int, image: str, mask: str | None, size: int, crop: int | None, version: int) -> dict:
    picture = _open(row[image], f"The image of row {index}", open_image)
    if mask is None:
        return {"image": crop_square(to_rgb(picture), crop, size, Image.Resampling.BILINEAR)}
    labels = _open(row[mask], f"The mask of row {index}", _open_mask)
    name = f"the mask {row[mask]}" if isinstance(row[mask], str) else f"the mask in column {mask!r}"
    example, _ = make_example(picture, labels, name, crop, size)
    for item in example["objects"]:
        item["label"] = None
    return example


def _open(
    given: str | dict | Image.Image | None, place: str, read: Callable[[BinaryIO | str | bytes], Image.Image]
) -> Image.Image:
    """Open an image that is a path, a value of an undecoded column, or decoded; `place` describes it."""
    if isinstance(given, Image.Image):
        return given
    record = {"path": given, "bytes": None} if isinstance(given, str) else given
    if record is None or (record["path"] is None and record["bytes"] is None):
        raise _UnreadableError(f"{place} is missing. Expected an image in each row.")
    place = record["path"] or place
    try:
        return read(real_path(record["path"]) if record["bytes"] is None else io.BytesIO(record["bytes"]))
    except (OSError, ValueError) as error:
        raise _UnreadableError(f"{place} cannot be read as an image. {error}") from error


def _open_mask(file: BinaryIO | str | bytes) -> Image.Image:
    """Read a mask with its stored values."""
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except Exception as error:  # decoders raise many types of errors for damaged files
        raise ValueError(f"The mask is damaged: {str(error).rstrip('.')}.") from error
