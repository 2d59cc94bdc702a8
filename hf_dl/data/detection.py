"""Images with boxes from any source: generated scenes, PASCAL VOC folders, COCO files, tables or the Hub.

The columns are the same for each source:

* `image` (RGB) and `image_id` (string).
* `objects`: lists with one entry per object. `bbox` is x0, y0, x1, y1 in pixels, half-open, so the width is x1 - x0.
  `category` is a `ClassLabel` from 0. `area` in pixels is the area of the mask where the source has one. `iscrowd`
  marks a region with many objects, and `difficult` an object that VOC does not score. Ignore both in training and in
  scores.

An image without objects has empty lists. `hf_dl.data.detection_augmentation` moves boxes along with images.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import datasets
import numpy as np
from PIL import Image

from . import scenes
from .decoded_images import CORRUPT, decode_image, image_columns, is_fine, settle
from .detection_files import BoxSource, clean_objects, find_coco, find_voc, read_coco_boxes, read_voc
from .generation import counted, row_bar
from .scene_description import SHAPES
from .splits import (
    SPLIT_NAMES,
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
from .surfaces import COLORS

CLASSES = ("shape", "shape_color", "shape_material")  # the classes of generated scenes
BOXES = ("clip", "drop", "refuse")  # handling of boxes that cross the border of the image
FORMATS = ("xyxy", "xywh", "cxcywh")

_VERSION = 1  # increase it when pixels or columns change: `datasets` caches by arguments, not by code
_SHARD = 512
_NAMED = 10  # images that a report lists
_OURS = {"bbox", "category", "area", "iscrowd", "difficult"}


def make_features(names: list[str]) -> datasets.Features:
    """Return the columns of a dataset with these names of classes."""
    numbers, flags = datasets.List(datasets.Value("float32")), datasets.List(datasets.Value("bool"))
    objects = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
        "category": datasets.List(datasets.ClassLabel(names=names)),
        "area": numbers,
        "iscrowd": flags,
        "difficult": flags,
    }
    return datasets.Features({"image": datasets.Image(), "image_id": datasets.Value("string"), "objects": objects})


def class_names(data: Rows) -> list[str]:
    """Return the names of the classes of a dataset from `load`, in the order of the column `category`."""
    return data.features["objects"]["category"].feature.names


def load(
    split: str = "train",
    source: Source = "synthetic",
    *,
    annotations: str | os.PathLike | None = None,
    categories: list[str] | None = None,
    boxes: str = "clip",
    box_format: str | None = None,
    corrupt: str = "refuse",
    num_images: int | None = None,
    holdout: float = 0.1,
    classes: str = "shape",
    style: str = "plain",
    size: int = 128,
    num_objects: tuple[int, int] = (1, 6),
    seed: int = 0,
    streaming: bool = False,
) -> Rows:
    """Load images with boxes.

    The kind of `source` is detected from its content:

    * "synthetic": generated scenes. The box of an object is the box of its visible part;
    * a folder of PASCAL VOC, with `Annotations/`, `JPEGImages/` and `ImageSets/Main/`;
    * a folder of images, if `annotations` names a COCO file, or a folder with `annotations/instances_train2017.json`
      and `train2017/`;
    * a dataset saved by `save_to_disk`, parquet files, a `Dataset` that you already have, or a Hub id. Expected are a
      column with images and a column `objects` with `bbox` and `category`.

    If the source has no validation or test split, `holdout` of the training images are held out for it. COCO files
    have their own splits.

    Args:
        split: "train", "validation" or "test". With `annotations`, it only names the result.
        source: "synthetic", path, Hub id, or a dataset that you already have.
        annotations: COCO file.
        categories: Names of the classes in order. Defaults to the names in the source. Needed for streams of names.
        boxes: Handling of boxes that cross the border. "clip" cuts them, and drops boxes without area. "drop" drops
            both. "refuse" raises an error for both. A warning and `info.description` list the images.
        box_format: Format of `bbox` in tables: "xyxy", "xywh" as in COCO, or "cxcywh", in pixels. Defaults to "xyxy"
            for datasets with the columns of this function, and to "xywh" for others.
        corrupt: Handling of images that cannot be read. "refuse" raises an error, and "skip" removes them and warns.
        num_images: Maximum number of images. Defaults to all, or to the numbers of `hf_dl.data.scenes`.
        holdout: Share of the training images to hold out for a missing split, above 0 and below 0.5.
        classes: Classes of generated scenes: "shape" (4), "shape_color" (32) or "shape_material".
        style: Style of generated scenes, "plain" or "textured".
        size: Width and height of generated scenes in pixels. Other images keep their size.
        num_objects: Smallest and largest number of objects in generated scenes.
        seed: Seed of generated scenes, and of the choice of held-out images.
        streaming: Read or render while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns of `make_features`.

    Raises:
        FileNotFoundError: If a folder or file does not exist.
        ValueError: If a column, an annotation or an argument is invalid.

    Example:
        >>> from hf_dl.data import detection
        >>> data = detection.load("validation", num_images=4, size=32)
        >>> detection.class_names(data)
        ['sphere', 'cube', 'cylinder', 'cone']
        >>> sorted(data[0]["objects"])
        ['area', 'bbox', 'category', 'difficult', 'iscrowd']
    """
    choices = {"split": (split, SPLIT_NAMES), "boxes": (boxes, BOXES), "corrupt": (corrupt, CORRUPT)}
    choices |= {"classes": (classes, CLASSES)} | ({} if box_format is None else {"box_format": (box_format, FORMATS)})
    for option, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{option}={value!r} is unknown. Choose one of: {', '.join(known)}.")
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images={num_images} must be at least 1.")
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout={holdout} must be above 0 and below 0.5: the share of images to hold out.")
    if source == "synthetic":
        return _load_scenes(split, classes, style, size, num_objects, num_images, seed, streaming)
    name = name_source(source)
    found, rows = _open_source(split, source, annotations, categories, box_format, holdout, seed, streaming)
    features = make_features(found.names)
    options = {"lookup": found.lookup, "box_format": found.box_format, "boxes": boxes, "source": name}
    if isinstance(rows, datasets.IterableDataset):
        rows = rows if num_images is None else rows.take(num_images)
        return _stream(rows, features, corrupt, split, options)
    rows = rows.select(range(min(num_images or len(rows), len(rows))))
    if not len(rows):
        raise ValueError(f"split={split!r} of {name!r} would be empty. Choose another split.")
    shards = [(start, min(start + _SHARD, len(rows))) for start in range(0, len(rows), _SHARD)]
    options |= {"shards": shards, "rows": rows, "version": _VERSION}
    if streaming:
        options |= {"corrupt": corrupt}
        return datasets.IterableDataset.from_generator(
            _read_strictly, features=features, gen_kwargs=options, split=datasets.NamedSplit(split)
        )
    texts = {"problem": datasets.Value("string"), "report": datasets.Value("string")}
    try:
        with row_bar(len(rows), f"Reading {split} images"):
            data = datasets.Dataset.from_generator(
                _read,
                features=datasets.Features({**features, **texts}),
                gen_kwargs=options,
                split=datasets.NamedSplit(split),
            )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # a wrong annotation: show its sentence
            raise error.__cause__ from None
        raise
    data, unreadable = settle(data, corrupt, name, split)
    reports = [text for text in data["report"][:] if text]
    data = data.remove_columns("report")
    changed = ""
    if reports:
        listed = "; ".join(reports[:_NAMED]) + (f"; and {len(reports) - _NAMED} more" if len(reports) > _NAMED else "")
        changed = f"Cut or dropped boxes in {len(reports)} images of {name!r} ({split}): {listed}."
        warnings.warn(changed, stacklevel=2)
    data.info.description = " ".join(filter(None, (f"{len(data)} images.", unreadable, changed)))
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Generated scenes


def _load_scenes(
    split: str,
    classes: str,
    style: str,
    size: int,
    num_objects: tuple[int, int],
    num_images: int | None,
    seed: int,
    streaming: bool,
) -> Rows:
    options = {"style": style, "size": size, "num_objects": num_objects, "seed": seed, "streaming": streaming}
    data = scenes.load(split, num_scenes=num_images, **options)
    first = {"shape": (), "shape_color": tuple(COLORS), "shape_material": scenes.MATERIALS[style]}[classes]
    names = [f"{word} {shape}" for word in first for shape in SHAPES] if first else list(SHAPES)
    arguments = {"names": names, "kind": classes.removeprefix("shape_"), "prefix": f"scene-{style}-{seed}-{split}"}
    return data.map(
        _describe_scene,
        with_indices=True,
        input_columns=["objects"],
        remove_columns=["mask", "caption", "phrases", "scene"],
        features=make_features(names),
        fn_kwargs=arguments,
    )


def _describe_scene(objects: list[dict], index: int, names: list[str], kind: str, prefix: str) -> dict:
    words = [item["shape"] if kind == "shape" else f"{item[kind]} {item['shape']}" for item in objects]
    result = {
        "bbox": [item["box"] for item in objects],
        "category": [names.index(word) for word in words],
        "area": [item["visible_pixels"] for item in objects],
        "iscrowd": [False] * len(objects),
        "difficult": [False] * len(objects),
    }
    return {"image_id": f"{prefix}-{index}", "objects": result}


# ---------------------------------------------------------------------------------------------------------------------
# Sources with annotations


def _open_source(
    split: str,
    source: Source,
    annotations: str | os.PathLike | None,
    categories: list[str] | None,
    box_format: str | None,
    holdout: float,
    seed: int,
    streaming: bool,
) -> tuple[BoxSource, Rows]:
    """Return the classes of a source, and the rows of the split with an undecoded image, an id and raw objects."""
    given, name = given_splits(source), name_source(source)
    expected = "a folder of PASCAL VOC, of COCO or of tables, a Hub id, or 'synthetic'"
    root = None if given is not None else find_local(name, expected)
    if annotations is not None or (root is not None and (root / "annotations").is_dir() and find_voc(root) is None):
        if root is None:
            raise ValueError(f"annotations={str(annotations)!r} needs a folder of images. Got source={name!r}.")
        found, rows = read_coco_boxes(*find_coco(root, annotations, split), categories)
        return found, rows
    if root is not None and (voc := find_voc(root)) is not None:
        found, splits = read_voc(voc, categories)
        return found, _select(splits, split, name, holdout, seed)
    if given is not None:
        splits = given
    elif root is None:
        splits = load_from_hub(name, expected, streaming=streaming)
    else:
        splits = read_tables(root, streaming=streaming) or datasets.load_dataset(str(root), streaming=streaming)
    if any(isinstance(rows, datasets.IterableDataset) for rows in splits.values()):
        rows = streamed_split(splits, split, source)
    else:
        rows = _select(splits, split, name, holdout, seed)
    return _read_table(rows, splits, name, categories, box_format)


def _select(
    splits: dict[str, datasets.Dataset], split: str, source: str, holdout: float, seed: int
) -> datasets.Dataset:
    """Return the rows of a split. Missing splits are held out from the training rows."""
    rows = find_split(splits, split)
    missing = [other for other in ("validation", "test") if find_split(splits, other) is None]
    if rows is not None and (split != "train" or not missing):
        return rows
    train = find_split(splits, "train")
    if train is None:
        raise ValueError(f"{source!r} has no {split} split. Its splits: {', '.join(splits)}.")
    order = np.random.default_rng([seed, 20_200_615]).permutation(len(train))
    return train.select(sorted(hold_out(order, missing, holdout)[split]))


def _read_table(
    rows: Rows, splits: dict[str, Rows], source: str, categories: list[str] | None, box_format: str | None
) -> tuple[BoxSource, Rows]:
    features = rows.features
    if features is None or "objects" not in features:
        listed = "unknown" if features is None else ", ".join(features)
        raise ValueError(f"{source!r} has no column 'objects'. Expected image and objects. Its columns: {listed}.")
    fields = features["objects"]
    fields = getattr(fields, "feature", fields)
    if not isinstance(fields, dict) or not {"bbox", "category"} <= fields.keys():
        raise ValueError(f"The column 'objects' of {source!r} has no 'bbox' and 'category'. Expected lists of both.")
    kind = getattr(fields["category"], "feature", fields["category"])
    if isinstance(kind, datasets.ClassLabel):
        found = dict(enumerate(kind.names))
    elif categories is not None:
        found = dict(zip(categories if kind.dtype == "string" else range(len(categories)), categories, strict=True))
    elif isinstance(rows, datasets.IterableDataset):
        raise ValueError(f"The stream {source!r} has no names of classes. Give them with categories=[...].")
    else:  # of all splits, so that each split has the same classes
        found = {item: item for part in splits.values() for row in part["objects"] for item in _categories(row)}
        found = {item: str(item) for item in sorted(found)}
    image = "image" if "image" in features else image_columns(features, source, None)[0]
    rows = rows.cast_column(image, datasets.Image(decode=False))
    if isinstance(rows, datasets.Dataset):
        rows = rows.with_format(None)
    rows = rows.rename_column(image, "image") if image != "image" else rows
    chosen = box_format or ("xyxy" if fields.keys() >= _OURS else "xywh")
    return BoxSource.build(found, categories, chosen, source), rows


def _categories(objects: dict | list[dict]) -> list:
    return objects["category"] if isinstance(objects, dict) else [item["category"] for item in objects]


# ---------------------------------------------------------------------------------------------------------------------
# From raw rows to the columns


@counted
def _read(
    shards: list[tuple[int, int]],
    rows: datasets.Dataset,
    version: int,
    **options: Any,
) -> Iterator[dict]:
    """Yield rows with their image, or with the problem of a corrupt one, and a report of changed boxes."""
    for first, last in shards:
        for number in range(first, last):
            yield _convert(rows[number], number, **options)


def _read_strictly(corrupt: str, source: str, **options: Any) -> Iterator[dict]:
    yield from _settle_stream(_read(source=source, **options), corrupt, source)


def _stream(
    rows: datasets.IterableDataset, features: datasets.Features, corrupt: str, split: str, options: dict[str, Any]
) -> datasets.IterableDataset:
    def examples() -> Iterator[dict]:
        converted = (_convert(row, number, **options) for number, row in enumerate(rows))
        yield from _settle_stream(converted, corrupt, options["source"])

    return datasets.IterableDataset.from_generator(examples, features=features, split=datasets.NamedSplit(split))


def _settle_stream(rows: Iterable[dict], corrupt: str, source: str) -> Iterator[dict]:
    for row in rows:
        report = row.pop("report")
        if is_fine(row.pop("problem"), corrupt, source):
            if report:
                warnings.warn(f"Cut or dropped boxes of {source!r}: {report}.", stacklevel=2)
            yield row


def _convert(row: dict, number: int, lookup: dict, box_format: str, boxes: str, source: str) -> dict:
    place = (row["image"] or {}).get("path") or f"row {number}"
    name = str(row.get("image_id", number)) if row.get("image_id") is not None else str(number)
    image, problem = decode_image(row["image"], None)
    empty = {field: [] for field in sorted(_OURS)}
    if problem is not None:
        return {"image": None, "image_id": name, "objects": empty, "problem": f"{place} ({problem})", "report": None}
    with Image.open(io.BytesIO(image["bytes"])) as opened:
        size = opened.size
    objects, report = convert_objects(row["objects"], size, name, lookup=lookup, box_format=box_format, boxes=boxes)
    return {"image": image, "image_id": name, "objects": objects, "problem": None, "report": report}


def convert_objects(
    objects: dict | list[dict] | None,
    size: tuple[int, int],
    name: str,
    *,
    lookup: dict[Any, int],
    box_format: str,
    boxes: str,
) -> tuple[dict[str, list], str | None]:
    """Convert raw objects of one image to the column `objects`, and handle boxes outside of the image.

    Args:
        objects: Lists of `bbox` and `category`, and optionally of `area`, `iscrowd` and `difficult`. A list of
            dictionaries is fine, too.
        size: Width and height of the image.
        name: Name of the image in messages.
        lookup: Index of the class by raw category.
        box_format: One of `FORMATS`.
        boxes: One of `BOXES`.

    Returns:
        The lists, and a text about changed boxes or None.

    Raises:
        ValueError: If a category is unknown, `clean_objects` finds a wrong value, or a box is outside and `boxes` is
            "refuse".
    """
    if isinstance(objects, list):
        objects = {key: [item.get(key) for item in objects] for key in {key for item in objects for key in item}}
    objects = clean_objects(objects or {}, name, box_format)
    for value in objects["category"]:
        if not isinstance(value, Hashable) or value not in lookup:
            known = ", ".join(map(str, list(lookup)[:20]))
            raise ValueError(
                f"Image {name} has the category {value!r}, which is missing in the list: {known}. Add it."
            )
    if not len(objects["bbox"]):
        return {field: [] for field in sorted(_OURS)}, None
    box = _to_corners(objects["bbox"], box_format)
    limit = np.array([*size, *size])
    clipped = np.clip(box, 0, limit)
    outside = (np.abs(clipped - box) > 0.01).any(1)  # files round to hundredths
    empty = (clipped[:, 2:] <= clipped[:, :2]).any(1)
    changes = {"without area": empty, "outside": outside & ~empty}
    parts = [f"{int(chosen.sum())} {what}" for what, chosen in changes.items() if chosen.any()]
    report = f"{name} ({', '.join(parts)})" if parts else None
    if report and boxes == "refuse":
        raise ValueError(f"Boxes of image {report} do not fit its {size[0]}x{size[1]} pixels. Use boxes='clip'.")
    kept = ~empty if boxes == "clip" else ~(empty | outside)
    own = (clipped[:, 2:] - clipped[:, :2]).prod(1)
    values = objects | {
        "bbox": clipped,
        "category": np.array([lookup[value] for value in objects["category"]]),
        "area": np.where(np.isnan(objects["area"]), own, objects["area"]),
    }
    return {key: value[kept].tolist() for key, value in values.items()}, report


def _to_corners(box: np.ndarray, box_format: str) -> np.ndarray:
    if box_format == "xyxy":
        return box
    start, size = box[:, :2], box[:, 2:]
    start = start - size / 2 if box_format == "cxcywh" else start
    return np.concatenate([start, start + size], 1)
