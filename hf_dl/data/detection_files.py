"""Boxes in the files of PASCAL VOC (XML) and COCO (JSON), as rows with raw objects for `hf_dl.data.detection`."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .class_folders import file_stamp, shown_path
from .coco import read_coco
from .splits import SPLIT_NAMES


@dataclass(frozen=True)
class BoxSource:
    """The classes of a source with boxes.

    Attributes:
        names: Names of the classes in order.
        lookup: Index of the class by the category in the source: a name or an id.
        box_format: Format of the boxes in the source.
    """

    names: list[str]
    lookup: dict[Any, int]
    box_format: str

    @classmethod
    def build(
        cls, found: Mapping[Any, str], categories: Sequence[str] | None, box_format: str, source: str
    ) -> BoxSource:
        """Number the categories of a source from 0, without gaps.

        Args:
            found: Name by category of the source.
            categories: Names that the user chose, in order, or None for all in the order of `found`.
            box_format: Format of the boxes.
            source: Name of the source, for messages.

        Raises:
            ValueError: If a name occurs twice, or all categories are missing.
        """
        names = list(found.values()) if categories is None else list(categories)
        if not names:
            raise ValueError(f"{source!r} has no categories. Add them to it, or give categories=[...].")
        if len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"The category {double!r} of {source!r} occurs twice. Expected different names.")
        return cls(names, {key: names.index(name) for key, name in found.items() if name in names}, box_format)


def clean_objects(objects: Mapping[str, Any], name: str, box_format: str) -> dict[str, Any]:
    """Check the raw objects of an image, and convert their numbers to arrays.

    Args:
        objects: Lists of `bbox` and `category`, and optionally of `area`, `iscrowd` and `difficult`.
        name: Name of the image in messages.
        box_format: Format of the boxes, for messages.

    Returns:
        `bbox`, float64 (objects, 4); `category`, a list; `area`, float64 (objects,), NaN where it is missing; and
        `iscrowd` and `difficult`, bool (objects,).

    Raises:
        ValueError: If the lists differ in length, or a value is invalid. Boxes need four finite numbers, and areas
            must not be negative.
    """
    lists = {key: objects.get(key) for key in ("bbox", "category", "area", "iscrowd", "difficult")}
    for key, values in lists.items():
        if values is not None and not isinstance(values, list | tuple | np.ndarray):
            raise ValueError(f"Image {name} has {key}={values!r}. Expected a list with one entry per box.")
    count = 0 if lists["bbox"] is None else len(lists["bbox"])
    for key, values in lists.items():
        if values is None:
            lists[key] = values = [] if key in ("bbox", "category") else [None] * count
        if len(values) != count:
            raise ValueError(
                f"Image {name} has {count} boxes, but {len(values)} entries in {key!r}. Expected one per box."
            )
    try:
        boxes = np.array(lists["bbox"]) if count else np.zeros((0, 4))
    except ValueError:  # lists of different lengths
        boxes = np.zeros(0)
    if boxes.shape != (count, 4) or boxes.dtype.kind not in "iuf" or not np.isfinite(boxes).all():
        raise ValueError(f"Image {name} has a box that is not four finite numbers. Expected {box_format} in pixels.")
    for area in lists["area"]:
        if area is not None and (not isinstance(area, int | float | np.number) or area < 0 or area == np.inf):
            raise ValueError(f"Image {name} has area={area!r}. Expected a number of pixels, at least 0.")
    for key in ("iscrowd", "difficult"):
        for flag in lists[key]:
            if flag not in (None, False, True):
                raise ValueError(f"Image {name} has {key}={flag!r}. Expected true or false, or 1 or 0.")
        lists[key] = np.array(lists[key], dtype=bool)
    # None becomes NaN
    return lists | {"bbox": boxes.astype(np.float64), "area": np.array(lists["area"], dtype=np.float64)}


def find_voc(root: Path) -> Path | None:
    """Return the folder with `Annotations/` and `JPEGImages/` in or below a folder, or None."""
    for folder in (root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))):
        if (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir():
            return folder
    return None


def read_voc(root: Path, categories: Sequence[str] | None) -> tuple[BoxSource, dict[str, datasets.Dataset]]:
    """Read a folder of PASCAL VOC.

    Args:
        root: The folder with `Annotations/` and `JPEGImages/`.
        categories: Names of the classes, or None for all names in the files, sorted.

    Returns:
        The classes, and the rows per split in `ImageSets/Main/`. Without this folder, all images are training images.

    Raises:
        FileNotFoundError: If an image or an annotation of a split is missing.
        ValueError: If annotations are missing or damaged.
    """
    lists = {path.stem: path for path in sorted((root / "ImageSets" / "Main").glob("*.txt"))}
    splits = {name: _read_list(lists[name]) for names in SPLIT_NAMES.values() for name in names if name in lists}
    if not {"train", "training"} & splits.keys() and "trainval" in lists:
        splits["train"] = _read_list(lists["trainval"])
    splits = splits or {"train": sorted(path.stem for path in (root / "Annotations").glob("*.xml"))}
    rows = {split: [_read_xml(root, name) for name in names] for split, names in splits.items()}
    if not any(rows.values()):
        raise ValueError(f"source={str(root)!r} has no annotations. Expected Annotations/<image>.xml.")
    words = sorted({word for part in rows.values() for row in part for word in row["objects"]["category"]})
    source = BoxSource.build({word: word for word in words}, categories, "xyxy", str(root))
    kind = datasets.Value("string")
    return source, {split: _make_rows(part, kind) for split, part in rows.items() if part}


def _read_list(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_xml(root: Path, name: str) -> dict:
    path = root / "Annotations" / f"{name}.xml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Expected the annotation of an image in ImageSets/Main/.")
    images = root / "JPEGImages"
    objects: dict[str, list] = {"bbox": [], "category": [], "iscrowd": [], "difficult": []}
    try:
        tree = ET.parse(path).getroot()
        for item in tree.findall("object"):
            x0, y0, x1, y1 = (float(item.find("bndbox").find(key).text) for key in ("xmin", "ymin", "xmax", "ymax"))
            # the pixels of VOC count from 1, and the last one belongs to the box
            start = [max(low - 1, 0) if high > low else high for low, high in ((x0, x1), (y0, y1))]
            objects["bbox"].append([*start, x1, y1])
            objects["category"].append(item.find("name").text.strip())
            objects["difficult"].append((item.findtext("difficult") or "0").strip() == "1")
            objects["iscrowd"].append(False)
    except (ET.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged. Expected objects with a name and a bndbox. ({error})") from error
    written = images / (tree.findtext("filename") or "").strip()
    candidates = [images / f"{name}.jpg", written, images / f"{name}.png", images / f"{name}.jpeg"]
    image = next((candidate for candidate in candidates if candidate.is_file()), None)
    if image is None:
        raise FileNotFoundError(f"{candidates[0]} does not exist. Expected the image of {path.name}.")
    return {"image": shown_path(image), "image_id": name, "stamp": file_stamp(image), "objects": objects}


def find_coco(root: Path, annotations: str | os.PathLike | None, split: str) -> tuple[Path, Path]:
    """Return the folder of the images and the annotation file of a split.

    Args:
        root: Folder of the images, or a folder with `annotations/instances_<name>.json` and `<name>/`.
        annotations: COCO file, or None to find it.
        split: The split, such as "validation" for `instances_val2017.json`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If no file belongs to the split.
    """
    if annotations is not None:
        path = Path(annotations).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"annotations={str(annotations)!r} does not exist. Expected a COCO file (JSON).")
        return root, path
    files = {path.stem.removeprefix("instances_"): path for path in sorted(root.glob("annotations/instances_*.json"))}
    for name, path in files.items():
        if name.rstrip("0123456789") in SPLIT_NAMES[split]:
            return next((folder for folder in (root / name, root / "images") if folder.is_dir()), root), path
    raise ValueError(
        f"{str(root)!r} has no annotations of the split {split!r}. Found: {', '.join(files) or 'none'}. Choose one of "
        "them, or name the file with annotations."
    )


def is_coco_without_test(source: str | os.PathLike) -> bool:
    """Tell whether a source is a folder of COCO without annotations of test images, which COCO does not publish.

    Args:
        source: A folder, or any other source, for which the result is False.
    """
    files = sorted(Path(source).expanduser().glob("annotations/instances_*.json"))
    names = [path.stem.removeprefix("instances_").rstrip("0123456789") for path in files]
    return bool(names) and not any(name in SPLIT_NAMES["test"] for name in names)


def read_coco_boxes(
    root: Path, annotations: Path, categories: Sequence[str] | None
) -> tuple[BoxSource, datasets.Dataset]:
    """Read a COCO file. Ids of categories may have gaps: the classes count from 0, in the order of the ids.

    Args:
        root: Folder of the images.
        annotations: The file.
        categories: Names of the classes in order, or None for all in the file.

    Raises:
        FileNotFoundError: If an image is missing.
        ValueError: If the file is not a COCO file, or has no images.
    """
    needed = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id", "bbox")}
    content = read_coco(annotations, needed)
    found = {item["id"]: str(item["name"]) for item in sorted(content.get("categories", ()), key=lambda x: x["id"])}
    source = BoxSource.build(found, categories, "xywh", str(annotations))
    parts: dict[Any, list[dict]] = {}
    for record in content["annotations"]:
        parts.setdefault(record["image_id"], []).append(record)
    rows = []
    for picture in content["images"]:
        path, records = root / picture["file_name"], parts.get(picture["id"], [])
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. Expected image {picture['id']} of {annotations}.")
        objects = {
            "bbox": [record["bbox"] for record in records],
            "category": [record["category_id"] for record in records],
            "area": [record.get("area") for record in records],
            "iscrowd": [record.get("iscrowd") for record in records],
        }
        # as numbers, because `datasets` cannot say which image has a wrong one
        objects = clean_objects(objects, str(picture["id"]), source.box_format)
        for kind in objects["category"]:
            if not isinstance(kind, int | float) or kind % 1:
                raise ValueError(f"Image {picture['id']} has category_id={kind!r}. Expected an integer, as in COCO.")
        objects = {key: value if key == "category" else value.tolist() for key, value in objects.items()}
        picture = {"image_id": str(picture["id"]), "image": shown_path(path), "stamp": file_stamp(path)}
        rows.append(picture | {"objects": objects})
    if not rows:
        raise ValueError(f"{annotations} has no images. Expected COCO instances.")
    return source, _make_rows(rows, datasets.Value("int64"))


def _make_rows(rows: list[dict], category: datasets.Value) -> datasets.Dataset:
    numbers, flags = datasets.List(datasets.Value("float64")), datasets.List(datasets.Value("bool"))
    objects = {
        "bbox": datasets.List(numbers),
        "category": datasets.List(category),
        "area": numbers,
        "iscrowd": flags,
        "difficult": flags,
    }
    text = datasets.Value("string")
    features = datasets.Features({"image": text, "image_id": text, "stamp": text, "objects": objects})
    records = [{"area": [None] * len(row["objects"]["bbox"]), **row["objects"]} for row in rows]
    rows = [{**row, "objects": record} for row, record in zip(rows, records, strict=True)]
    data = datasets.Dataset.from_list(rows, features=features)
    return data.cast_column("image", datasets.Image(decode=False))
