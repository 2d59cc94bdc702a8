"""Images with the instance masks of a COCO annotation file: polygons or uncompressed run lengths."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw

from .generation import counted
from .instance_masks import build_dataset, check_arguments, make_example, make_features, open_image

FEATURES = make_features(label=datasets.Value("string"))


def load(
    split: str = "train",
    source: str | os.PathLike = "coco",
    *,
    annotations: str | os.PathLike,
    size: int = 128,
    crop: int | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load images with instance masks, cropped to a centered square and resized.

    Args:
        split: "train", "validation" or "test". It only names the result: a COCO file holds one split.
        source: Folder of the images.
        annotations: COCO file with polygons or uncompressed run lengths.
        size: Width and height of the results in pixels.
        crop: Side of the centered square in pixels of the original image. Defaults to the shorter side.
        streaming: Read while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns of `FEATURES`, as `hf_dl.data.masked_images.load` describes them.

    Raises:
        FileNotFoundError: If the annotation file or an image is missing.
        ValueError: If an argument is out of range, or `annotations` is not a COCO file.
    """
    check_arguments(split, size, crop)
    annotations = Path(annotations).expanduser()
    if not annotations.is_file():
        raise FileNotFoundError(f"annotations={str(annotations)!r} does not exist. Expected a COCO file (JSON).")
    count = len(read_coco(annotations)["images"])
    stat = annotations.stat()
    return build_dataset(
        _generate,
        range(count),
        features=FEATURES,
        split=split,
        streaming=streaming,
        root=str(Path(source).expanduser().resolve()),
        annotations=str(annotations.resolve()),
        crop=crop,
        size=size,
        stamp=(stat.st_size, stat.st_mtime_ns),  # a changed file is read again
    )


_NEEDED = {"images": ("id", "file_name"), "annotations": ("image_id", "segmentation")}


def read_coco(path: Path, needed: Mapping[str, Sequence[str]] = _NEEDED) -> dict:
    """Read an annotation file.

    Args:
        path: The file.
        needed: The lists that the file must have, and the fields of their records.

    Raises:
        ValueError: If the file is not JSON, or lacks a list or a field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of the encoding
        raise ValueError(f"{path} is not JSON: {error}. Expected COCO instances.") from None
    missing = set(needed) - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(sorted(missing))}. Expected COCO instances.")
    for name, fields in needed.items():
        for number, record in enumerate(content[name]):
            absent = [each for each in fields if not isinstance(record, dict) or record.get(each) is None]
            if absent:
                raise ValueError(
                    f"{name}[{number}] of {path} has no {' and no '.join(absent)}. Expected COCO instances."
                )
    return content


@counted
def _generate(
    shards: list[tuple[int, int]], root: str, annotations: str, crop: int | None, size: int, stamp: tuple, version: int
) -> Iterator[dict]:
    content = read_coco(Path(annotations))
    names = {category["id"]: category["name"] for category in content.get("categories", ())}
    parts: dict[int, list[dict]] = {}
    for record in content["annotations"]:
        if not record.get("iscrowd"):  # a crowd is a region, not one object
            parts.setdefault(record["image_id"], []).append(record)
    for first, last in shards:
        for picture in content["images"][first:last]:
            image = open_image(Path(root, picture["file_name"]), f"image {picture['id']} of {annotations}")
            records = parts.get(picture["id"], [])
            mask = _paint([record["segmentation"] for record in records], image.size, picture["file_name"])
            example, kept = make_example(image, mask, f"the mask of {picture['file_name']}", crop, size)
            for item, label in zip(example["objects"], kept, strict=True):
                item["label"] = names.get(records[label - 1].get("category_id"))
            yield example


def _paint(segmentations: list, size: tuple[int, int], name: str) -> Image.Image:
    """Paint all objects into one mask, small ones last: objects overlap, and small ones are usually in front."""
    shapes = [rasterize(segmentation, size, name) for segmentation in segmentations]
    mask = np.zeros(size[::-1], dtype=np.int32)
    for label in sorted(range(len(shapes)), key=lambda i: -shapes[i].sum()):
        mask[shapes[label]] = label + 1
    return Image.fromarray(mask)


def rasterize(segmentation: list | dict, size: tuple[int, int], name: str) -> np.ndarray:
    """Draw the segmentation of a COCO annotation.

    Args:
        segmentation: Polygons, each as x, y, x, y, ..., or uncompressed run lengths.
        size: Width and height of the image in pixels.
        name: Name of the image in error messages.

    Returns:
        The mask, bool (height, width).

    Raises:
        ValueError: If the polygons are invalid, or the run lengths are compressed or have another number of pixels.
    """
    width, height = size
    problem = ValueError(
        f"A segmentation of {name} is not polygons x, y, x, y, ... or uncompressed run lengths of {width * height} "
        "pixels. Decode compressed run lengths first, for example with pycocotools."
    )
    if isinstance(segmentation, list):
        canvas = Image.new("1", size)
        try:
            for polygon in segmentation:
                ImageDraw.Draw(canvas).polygon(polygon, fill=1)
        except (TypeError, ValueError):
            raise problem from None
        return np.asarray(canvas)
    runs = segmentation.get("counts") if isinstance(segmentation, dict) else None
    if not isinstance(runs, list) or sum(runs) != width * height:
        raise problem
    # runs alternate between zeros and ones, column by column
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
