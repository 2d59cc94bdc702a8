"""COCO instances as phrases: one phrase per image and category, whose mask is the union of its instances.

    annotations/instances_train2017.json    also instances_val2017.json
    train2017/<file_name>                    also in images/train2017, in images, or directly in the folder

All objects of the categories are annotated in COCO, also as regions of a crowd. A category without an instance is
therefore a negative phrase of an image.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from .class_folders import file_stamp
from .coco import read_coco
from .phrasecut_coverage import Coverage, FoundRows, choose_images, hold_out_images
from .phrasecut_phrases import count_negatives, name_subsets
from .splits import SPLIT_NAMES, SPLIT_OF, find_split

_NEEDED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "segmentation"),
    "categories": ("id", "name"),
}
_NAME = re.compile(r"instances_([a-z]+)(\d*)\.json")


def find_folder(source: Path) -> Path | None:
    """Return `source` if it has COCO instances in `annotations`."""
    return source if _list_files(source) else None


def _list_files(root: Path) -> dict[str, Path]:
    """Return the annotation files by the names of their splits."""
    found = {}
    for path in sorted(root.glob("annotations/instances_*.json")):
        match = _NAME.fullmatch(path.name)
        if match and match[1] in SPLIT_OF:
            found.setdefault(match[1], path)
    return found


def find_rows(
    root: Path, split: str, *, on_missing: str, max_images: int | None, holdout: float, seed: int
) -> FoundRows:
    """Find the images of a split that are on disk and have an instance.

    If the file of the validation or test split is missing, images of the training split are held out for it.

    Args:
        root: Result of `find_folder`.
        split: "train", "validation" or "test".
        on_missing: As in `choose_images`.
        max_images: As in `choose_images`.
        holdout: Share of the training images to hold out.
        seed: Seed of the choices.

    Raises:
        FileNotFoundError: If images or the file of the split are missing.
        ValueError: If the split is unknown, or a file is damaged.
    """
    if split not in SPLIT_NAMES:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLIT_NAMES)}.")
    files = _list_files(root)
    missing = [name for name in ("validation", "test") if find_split(files, name) is None]
    path = find_split(files, "train" if split in missing else split)
    if path is None:
        raise FileNotFoundError(f"{root}/annotations has no file for split={split!r}. Its splits: {', '.join(files)}.")
    content = read_coco(path, _NEEDED)
    categories = {category["id"] for category in content["categories"]}
    annotated: dict[int, set[int]] = {}
    for record in content["annotations"]:
        if record["category_id"] not in categories:
            raise ValueError(f"{path} has no category {record['category_id']!r}, which an annotation names.")
        annotated.setdefault(record["image_id"], set()).add(record["category_id"])
    names = {str(picture["id"]): picture for picture in content["images"] if picture["id"] in annotated}
    if path == find_split(files, "train") and missing:
        names = {name: names[name] for name in hold_out_images(list(names), split, missing, holdout, seed)}
    paths = {name: found for name, picture in names.items() if (found := _find_image(root, path, picture)) is not None}
    sizes = {name: (picture["width"], picture["height"]) for name, picture in names.items()}
    options = {"on_missing": on_missing, "max_images": max_images, "seed": seed, "where": str(root)}
    kept, found, wrong = choose_images(sizes, paths, **options)
    images = [(name, paths[name]) for name in kept]
    arguments = {"annotations": str(path.resolve()),
                 "stamp": file_stamp(path)}  # fmt: skip
    count, total = (sum(len(annotated[names[name]["id"]]) for name in group) for group in (kept, names))
    return FoundRows(make_rows, images, arguments, Coverage(len(names), found, wrong, len(kept), total, count))


def _find_image(root: Path, annotations: Path, picture: dict) -> str | None:
    folder = annotations.stem.removeprefix("instances_")
    places = (root / folder, root / "images" / folder, root / "images", root)
    return next(
        (str(place / picture["file_name"]) for place in places if (place / picture["file_name"]).is_file()), None
    )


def make_rows(
    shards: list[list[tuple[str, str]]], annotations: str, negatives: float, seed: int, stamp: str, version: int
) -> Iterator[dict]:
    """Yield the rows of `hf_dl.data.phrasecut` for COCO images.

    Args:
        shards: For each image its id and its file.
        annotations: The annotation file.
        negatives: Share of negative phrases.
        seed: Seed of the negative phrases.
        stamp: Changes with the annotation file.
        version: Version of the rows. Like `stamp`, it only changes the name of the cache.
    """
    images = [image for shard in shards for image in shard]
    content = read_coco(Path(annotations), _NEEDED)
    names = {category["id"]: category["name"] for category in content["categories"]}
    sizes = {str(picture["id"]): [picture["width"], picture["height"]] for picture in content["images"]}
    kept = {name for name, _ in images}
    parts: dict[str, dict[int, list]] = {}
    for record in content["annotations"]:
        if str(record["image_id"]) in kept:
            own = parts.setdefault(str(record["image_id"]), {})
            own.setdefault(record["category_id"], []).append(record["segmentation"])
    for name, path in images:
        size = sizes[name]
        image = {"path": path, "drawing": json.dumps({"size": size})}
        found = parts[name]
        rng = random.Random(f"hf_dl.phrasecut negatives {seed} {name}")
        absent = sorted(set(names) - set(found))
        chosen = rng.sample(absent, min(count_negatives(len(found), negatives, rng), len(absent)))
        for category in [*found, *chosen]:
            segmentations = found.get(category, [])
            kind = "name" if segmentations else "negative"
            yield {
                "image_id": name,
                "image": image,
                "phrase": names[category],
                "mask": {"drawing": json.dumps({"size": size, "segmentations": segmentations})},
                "kind": kind,
                "seen": True,
                "subsets": name_subsets(kind, len(segmentations), (), ()),
            }
