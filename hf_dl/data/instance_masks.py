"""Shared by all sources of masked images: crop images with instance masks, and list the remaining objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ..models.image_input import is_multiple, to_rgb
from .generation import row_bar

SPLITS = ("train", "validation", "test")

_VERSION = 3  # increase it when pixels or columns change: `datasets` caches by arguments, not by code
_SHARD = 1000  # images per shard; DataLoader workers share the shards


def make_features(**fields: object) -> datasets.Features:
    """Return the features of a dataset with instance masks, whose objects have these additional fields."""
    box = datasets.List(datasets.Value("int32"), length=4)
    objects = datasets.List({**fields, "box": box, "visible_pixels": datasets.Value("int32")})
    return datasets.Features({"image": datasets.Image(), "mask": datasets.Image(), "objects": objects})


def check_arguments(split: str, size: int, crop: int | None) -> None:
    """Raise ValueError if the split is unknown or a size is not positive."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    if size < 1 or (crop is not None and crop < 1):
        raise ValueError(f"size={size} and crop={crop} must be positive numbers of pixels.")


def build_dataset(
    generator: Callable[..., Iterator[dict]],
    rows: range,
    *,
    features: datasets.Features,
    split: str,
    streaming: bool,
    **arguments: object,
) -> datasets.Dataset | datasets.IterableDataset:
    """Build a dataset of a range of rows. The generator receives it as `shards`: pairs of first and last row."""
    if not rows:
        raise ValueError(f"split={split!r} would be empty: the source has too few images.")
    arguments |= {"shards": [(start, min(start + _SHARD, rows.stop)) for start in rows[::_SHARD]], "version": _VERSION}
    options = {"features": features, "gen_kwargs": arguments, "split": datasets.NamedSplit(split)}
    if streaming:
        return datasets.IterableDataset.from_generator(generator, **options)
    with row_bar(len(rows), f"Reading {split} images"):
        return datasets.Dataset.from_generator(generator, **options)


def crop_square(image: Image.Image, crop: int | None, size: int, resample: Image.Resampling) -> Image.Image:
    """Crop the centered square with a side of `crop` pixels, or the largest one, and resize it to `size` pixels.

    If `size` is a multiple of the side, each pixel is repeated, and `resample` is not used.
    """
    side = min(image.size) if crop is None else crop
    if side > min(image.size):
        raise ValueError(f"crop={crop} is larger than an image of {image.width}x{image.height}. Use a smaller crop.")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if is_multiple((size, size), of=(side, side)):
        resample = Image.Resampling.NEAREST
    return image.crop((left, top, left + side, top + side)).resize((size, size), resample)


def _indices(mask: Image.Image, name: str) -> Image.Image:
    """Return the stored values of a mask, in an image mode that keeps them when it is resized."""
    if mask.mode not in ("P", "L", "1", "I", "I;16"):
        raise ValueError(
            f"{name} has mode {mask.mode}. Expected a mask of mode P or L whose pixel values are object indices, with "
            "0 for the background. Colors do not identify objects."
        )
    return Image.fromarray(np.asarray(mask).astype(np.int32))


def _relabel(mask: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return the mask with labels 1 to n, and the old label of each."""
    kept = [int(label) for label in np.unique(mask) if label != 0]
    if len(kept) > 255:
        raise ValueError(f"A mask has {len(kept)} objects. At most 255 fit into an 8-bit mask.")
    return np.searchsorted([0, *kept], mask).astype(np.uint8), kept


def make_example(
    image: Image.Image, mask: Image.Image, name: str, crop: int | None, size: int
) -> tuple[dict, list[int]]:
    """Return image, mask and objects with box and visible pixels, and the index of each object in the source mask."""
    mask = _indices(mask, name)
    if image.size != mask.size:
        raise ValueError(f"{name} is {mask.width}x{mask.height} but its image is {image.width}x{image.height}.")
    picture = crop_square(to_rgb(image), crop, size, Image.Resampling.BILINEAR)
    labels, kept = _relabel(np.asarray(crop_square(mask, crop, size, Image.Resampling.NEAREST)))
    objects = []
    for label in range(1, len(kept) + 1):
        rows, columns = np.nonzero(labels == label)
        box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        objects.append({"box": box, "visible_pixels": len(rows)})
    return {"image": picture, "mask": Image.fromarray(labels), "objects": objects}, kept


def open_image(path: Path, expected: str) -> Image.Image:
    """Read an image or a mask with its stored values.

    Raises:
        FileNotFoundError: If the file does not exist. `expected` describes it in the message.
        ValueError: If the file is not an image.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Expected {expected}.")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # decoders raise many types of errors for damaged files
        raise ValueError(f"{path} is damaged. Expected {expected}. ({error})") from error
