"""Columns of images and masks that are read and drawn when a row is accessed.

The rows of one image share its file: a row has a path, and a mask is a list of polygons until it is needed. `datasets`
decodes these columns in all its functions, such as `map` and `to_iterable_dataset`. `materialize` replaces them with
ordinary images, which can be read without hf_dl.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
from datasets.features.features import register_feature
from PIL import Image, ImageDraw

from ..models.image_input import to_rgb
from .coco import rasterize
from .generation import counted, row_bar
from .png import encode_png

_STORAGE = pa.struct(
    {"bytes": pa.binary(), "path": pa.string(), "row": pa.int64(), "column": pa.string(), "drawing": pa.string()}
)
_EXIF_ORIENTATION = 0x0112


def make_features(size: int | None = None) -> datasets.Features:
    """Return the features of rows (image, phrase), with images and masks of a size in pixels, or of their own size."""
    return datasets.Features(
        image_id=datasets.Value("string"),
        image=PhraseImage(size),
        phrase=datasets.Value("string"),
        mask=PhraseMask(size),
        kind=datasets.Value("string"),
        seen=datasets.Value("bool"),
        subsets=datasets.List(datasets.Value("string")),
    )


@dataclass
class _LazyImage:
    """Base class of the two kinds of columns.

    The stored value is a dict with one of these sources:

    * `bytes`: the content of an image file;
    * `path`: an image file, or, with `row` and `column`, an Arrow file of `datasets` with a column of images.

    `drawing` is a JSON object. Its `size` is the width and height that the image must have. For a mask, it also has
    `polygons`, COCO `segmentations`, or `labels` of the objects in a stored mask of object indices. `empty` erases the
    mask.
    """

    size: int | None = None
    dtype: ClassVar[str] = "PIL.Image.Image"
    pa_type: ClassVar[Any] = _STORAGE

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: dict | Image.Image) -> dict:
        """Return the stored form of a value of this column."""
        if isinstance(value, Image.Image):
            value = encode_png(np.asarray(self._convert(value)))
        return {name: value.get(name) for name in _STORAGE.names}

    def _convert(self, image: Image.Image) -> Image.Image:
        return image

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        """Convert a column of ordinary images, or return a column of this kind unchanged."""
        if not pa.types.is_struct(storage.type):
            raise ValueError(f"A column of type {storage.type} cannot be converted to images.")
        present = [storage.type.field(i).name for i in range(storage.type.num_fields)]
        columns = [
            storage.field(name).cast(_STORAGE.field(name).type)
            if name in present
            else pa.nulls(len(storage), _STORAGE.field(name).type)
            for name in _STORAGE.names
        ]
        return pa.StructArray.from_arrays(columns, _STORAGE.names, mask=storage.is_null())


@dataclass
class PhraseImage(_LazyImage):
    """A column of RGB images. Gray images are converted.

    Args:
        size: Width and height of the images in pixels. Defaults to the size of each file.
    """

    _type: str = field(default="PhraseImage", init=False, repr=False)

    def _convert(self, image: Image.Image) -> Image.Image:
        return to_rgb(image)

    def decode_example(self, value: Any, token_per_repo_id: dict | None = None) -> Image.Image:
        """Return the image of a stored value. Values that are images already are returned unchanged."""
        if isinstance(value, Image.Image):
            return value
        drawing = json.loads(value["drawing"] or "{}")
        image = _read(value, "size" in drawing)
        _check_size(image, drawing, value)
        return image.copy() if self.size is None else image.resize((self.size, self.size), Image.Resampling.BILINEAR)


@dataclass
class PhraseMask(_LazyImage):
    """A column of masks: 8-bit images, 255 inside and 0 outside of the mask.

    Args:
        size: Width and height of the masks in pixels. Defaults to the size of each image.
    """

    _type: str = field(default="PhraseMask", init=False, repr=False)

    def decode_example(self, value: Any, token_per_repo_id: dict | None = None) -> Image.Image:
        """Draw the mask of a stored value. Values that are images already are returned unchanged."""
        if isinstance(value, Image.Image):
            return value
        drawing = json.loads(value["drawing"] or "{}")
        if "polygons" in drawing:
            inside = draw_polygons(drawing["polygons"], *drawing["size"])
        elif "segmentations" in drawing:
            parts = [rasterize(part, tuple(drawing["size"]), "a phrase") for part in drawing["segmentations"]]
            inside = np.any(parts, axis=0) if parts else np.zeros(drawing["size"][::-1], dtype=bool)
        else:
            stored = np.asarray(_read_stored(value))
            inside = np.isin(stored, drawing["labels"]) if "labels" in drawing else stored > 0
            if inside.ndim != 2:
                raise ValueError(
                    f"A mask has the shape {inside.shape}. Expected a gray image, nonzero on the pixels of the phrase."
                )
        if drawing.get("empty"):
            inside = np.zeros_like(inside)
        mask = Image.fromarray(inside.astype(np.uint8) * 255)
        return mask if self.size is None else _resize_mask(mask, self.size)


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="'register_feature' is experimental", category=UserWarning)
    for _kind in (PhraseImage, PhraseMask):
        register_feature(_kind, _kind.__name__)


def draw_polygons(polygons: list[list[list[float]]], width: int, height: int) -> np.ndarray:
    """Draw polygons by the rule of PhraseCut: coordinates are truncated, and the border belongs to the polygon.

    Args:
        polygons: Points (x, y) of each polygon. Polygons of fewer than two points are ignored.
        width: Width of the mask in pixels.
        height: Height of the mask in pixels.

    Returns:
        The union of all polygons, bool (height, width).

    Example:
        >>> draw_polygons([[[0, 0], [1.9, 0], [1.9, 1], [0, 1]]], 4, 2).tolist()
        [[True, True, False, False], [True, True, False, False]]
    """
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        if len(polygon) >= 2:
            draw.polygon([(int(x), int(y)) for x, y in polygon], outline=1, fill=1)
    return np.asarray(canvas) > 0


def materialize(dataset: datasets.Dataset) -> datasets.Dataset:
    """Read and draw all images and masks once, so that the result has ordinary columns of images.

    Each row then has its own copy of the image. Files are copied without changes, if the dataset does not resize them.

    Args:
        dataset: A result of `hf_dl.data.phrasecut.load`.

    Returns:
        A dataset with the same rows, in the cache of `datasets`.
    """
    features = datasets.Features(
        {name: datasets.Image() if isinstance(kind, _LazyImage) else kind for name, kind in dataset.features.items()}
    )
    options = {"features": features, "gen_kwargs": {"dataset": dataset}, "split": dataset.split}
    with row_bar(len(dataset), "Drawing masks"):
        return datasets.Dataset.from_generator(_materialized, **options)


@counted
def _materialized(dataset: datasets.Dataset) -> Iterator[dict]:
    lazy = [name for name, kind in dataset.features.items() if isinstance(kind, _LazyImage)]
    for row, table in zip(dataset, dataset.with_format("arrow"), strict=True):
        for name in lazy:
            value = table[name][0].as_py()
            own = isinstance(dataset.features[name], PhraseImage) and dataset.features[name].size is None
            if own and value["path"] is not None and value["row"] is None and row[name].mode == "RGB":
                with open(value["path"], "rb") as file:
                    row[name] = {"bytes": file.read(), "path": None}
            else:
                row[name] = encode_png(np.asarray(row[name]))
        yield row


def _read(value: dict, as_stored: bool) -> Image.Image:
    """Return an image as RGB. `as_stored` ignores a rotation in the EXIF data: annotations count stored pixels."""
    if value["bytes"] is not None:
        return _to_rgb(_read_stored(value), as_stored)
    return _read_file(value["path"], value["row"], value["column"], _stamp(value["path"]), as_stored)


def _read_stored(value: dict) -> Image.Image:
    if value["bytes"] is not None:
        return _open(io.BytesIO(value["bytes"]), "An image")
    return _read_file(value["path"], value["row"], value["column"], _stamp(value["path"]), None)


@lru_cache(maxsize=8)  # the rows of one image follow each other
def _read_file(path: str, row: int | None, column: str | None, stamp: int, as_stored: bool | None) -> Image.Image:
    image = _open(path, path) if row is None else _open_table(path, column, stamp)[row][column]
    return image if as_stored is None else _to_rgb(image, as_stored)


@lru_cache(maxsize=4)
def _open_table(path: str, column: str, stamp: int) -> datasets.Dataset:
    return datasets.Dataset.from_file(path).select_columns([column])


def _to_rgb(image: Image.Image, as_stored: bool) -> Image.Image:
    if as_stored:
        image.getexif().pop(_EXIF_ORIENTATION, None)
    return to_rgb(image)


def _stamp(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        raise FileNotFoundError(f"{path} does not exist any more. Load the dataset again.") from None


def _open(file: str | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except Exception as error:  # decoders raise many types of errors for damaged files
        raise ValueError(f"{name} is damaged. Repair or remove it. ({error})") from error


def _check_size(image: Image.Image, drawing: dict, value: dict) -> None:
    if image.size != tuple(drawing.get("size", image.size)):
        expected = "x".join(map(str, drawing["size"]))
        raise ValueError(
            f"{value['path']} is {image.width}x{image.height}, but its annotation is {expected}. Load the dataset "
            "again to leave the image out, or replace the file."
        )


def _resize_mask(mask: Image.Image, size: int) -> Image.Image:
    """Resize a mask. A pixel belongs to it if half of its area does; a mask with pixels keeps at least one."""
    part = np.asarray(mask.resize((size, size), Image.Resampling.BOX))
    least = min(128, max(1, int(part.max())))
    return Image.fromarray((part >= least).astype(np.uint8) * 255)
