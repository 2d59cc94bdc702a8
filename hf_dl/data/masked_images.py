"""Images with instance masks from any source: CLEVRTex, COCO, or a dataset with an image and a mask column."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
from PIL import Image

from . import clevrtex, coco
from .instance_masks import check_arguments, make_example

_VERSION = 2  # increase it when pixels or columns change: `datasets` caches by arguments, not by code


def load(
    split: str = "train",
    source: str | os.PathLike = "clevrtex_full",
    *,
    size: int = 128,
    crop: int | None = 192,
    image_column: str = "image",
    mask_column: str = "mask",
    annotations: str | os.PathLike | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load images with instance masks, cropped to a centered square and resized.

    The kind of `source` is detected from its content:

    * a folder of CLEVRTex;
    * a folder of images, if `annotations` names a COCO file;
    * a dataset saved by `save_to_disk`;
    * anything that `datasets.load_dataset` reads: a Hub id, or a folder of images with a `metadata.jsonl` that has a
      `mask_file_name`.

    Args:
        split: "train", "validation" or "test". A COCO file has one split, so the name makes no difference there.
        source: Path or Hub id.
        size: Width and height of the results in pixels.
        crop: Side of the centered square in pixels of the original image. None crops to the shorter side.
        image_column: Column of the images.
        mask_column: Column of the masks: images of mode L, P, I or 1 whose pixel values are object indices.
        annotations: COCO file with polygons or uncompressed run lengths.
        streaming: Read while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns `image` (RGB), `mask` (8-bit, 0 = background, i = objects[i - 1]) and `objects`.
        Objects outside of the crop are removed, and the others are renumbered without gaps, in the same order. Each
        object has a `box` (x0, y0, x1, y1 in pixels, half-open) and `visible_pixels`. CLEVRTex adds shape, material,
        size, rotation and 3-D position, and COCO adds a label.

    Raises:
        FileNotFoundError: If a folder or file does not exist.
        ValueError: If a column, a mask or an argument is invalid.

    Example:
        >>> from hf_dl.data import masked_images
        >>> dataset = masked_images.load("validation", "/data/clevrtex_full")  # doctest: +SKIP
    """
    check_arguments(split, size, crop)
    root, options = Path(source).expanduser(), {"size": size, "crop": crop}
    local = root.is_absolute() or str(source).startswith((".", "~")) or len(root.parts) > 2
    if local and not root.is_dir():
        raise FileNotFoundError(
            f"source={str(source)!r} is not a folder. Expected a folder of CLEVRTex or of images with masks."
        )
    if annotations is not None:
        return coco.load(split, source, annotations=annotations, streaming=streaming, **options)
    if clevrtex.find_variant(root) is not None:
        return clevrtex.load(split, source, streaming=streaming, **options)
    source = root.resolve() if root.is_dir() else str(source)
    return _load_columns(split, source, (image_column, mask_column), options, streaming)


def _load_columns(split: str, source: Path | str, columns: tuple[str, str], options: dict, streaming: bool):
    if isinstance(source, Path) and any(
        (source / f"{kind}.json").is_file() for kind in ("dataset_info", "dataset_dict")
    ):
        dataset = datasets.load_from_disk(source)
        dataset = dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    else:
        dataset = datasets.load_dataset(str(source), split=split, streaming=streaming)
    names = dataset.column_names or list(next(iter(dataset)))
    for option, column in zip(("image_column", "mask_column"), columns, strict=True):
        if column not in names:
            raise ValueError(
                f"{option}={column!r} is not in {str(source)!r}. Its columns: {', '.join(names)}. A folder of images "
                "needs a metadata.jsonl with the keys file_name and mask_file_name."
            )
    arguments = {"columns": columns, "version": _VERSION, **options}
    return dataset.map(_from_columns, fn_kwargs=arguments, remove_columns=names, features=coco.FEATURES)


def _from_columns(row: dict, columns: tuple[str, str], crop: int | None, size: int, version: int) -> dict:
    image, mask = (row[column] for column in columns)
    for column, value in zip(columns, (image, mask), strict=True):
        if not isinstance(value, Image.Image):
            raise ValueError(f"Column {column!r} has values of type {type(value).__name__}. Expected datasets.Image.")
    example, _ = make_example(image, mask, f"the mask in column {columns[1]!r}", crop, size)
    for item in example["objects"]:
        item["label"] = None
    return example
