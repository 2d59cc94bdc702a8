"""Read the files of PhraseCut, for the images that are on disk.

    VGPhraseCut_v0/
      image_data_split.json        image_id, width, height, split, ... of all images
      refer_train.json             phrases with polygons; also refer_val.json, refer_test.json and refer_miniv.json
      name_att_rel_count.json      optional: frequencies of the categories, for the subsets c20, c100, ...
      scene_graphs_train.json      optional: names of all objects, for a better check of negative phrases
      images/<image_id>.jpg        the folders VG_100K and VG_100K_2 of Visual Genome are read as well

The file of the training phrases has 344 MB. It is read piece by piece, and written once to the cache of `datasets`.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets

from .class_folders import file_stamp
from .generation import counted, row_bar
from .json_records import stream_records
from .phrasecut_coverage import Coverage, FoundRows, choose_images, hold_out_images
from .phrasecut_phrases import KINDS, count_negatives, draw_false_phrases, name_subsets

FILES = {
    "train": "refer_train.json",
    "validation": "refer_val.json",
    "test": "refer_test.json",
    "miniv": "refer_miniv.json",  # 100 images of validation for tests; refer_val.json does not contain them
}
COUNTS = "name_att_rel_count.json"
IMAGE_FOLDERS = ("images", "VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2")

_INDEX = datasets.Features(
    image_id=datasets.Value("int64"),
    phrase=datasets.Value("string"),
    name=datasets.Value("string"),
    kind=datasets.Value("string"),
    attributes=datasets.List(datasets.Value("string")),
    relations=datasets.Value("int32"),
    instances=datasets.Value("int32"),
    size=datasets.List(datasets.Value("int32"), length=2),
    drawing=datasets.Value("string"),
)


def find_folder(source: Path) -> Path | None:
    """Return the folder with the files of PhraseCut: `source`, or VGPhraseCut_v0 in it or in its folder `data`."""
    for folder in (source, source / "VGPhraseCut_v0", source / "data" / "VGPhraseCut_v0"):
        if any((folder / name).is_file() for name in FILES.values()):
            return folder
    return None


def list_images(root: Path) -> dict[str, str]:
    """Return the paths of all image files by their names without suffix, such as "2415".

    Args:
        root: Folder with one or more of `IMAGE_FOLDERS`.
    """
    found: dict[str, str] = {}
    for name in IMAGE_FOLDERS:
        if (root / name).is_dir():
            with os.scandir(root / name) as entries:
                for entry in entries:
                    stem, suffix = os.path.splitext(entry.name)
                    if suffix.lower() in (".jpg", ".jpeg", ".png"):
                        found.setdefault(stem, entry.path)
    return found


def read_index(root: Path, split: str) -> datasets.Dataset:
    """Return the phrases of a split as a table in the cache of `datasets`, whether or not their images are on disk.

    Args:
        root: Result of `find_folder`.
        split: A key of `FILES`.

    Raises:
        FileNotFoundError: If image_data_split.json is missing.
        ValueError: If a file is damaged, or a record has no polygons.
    """
    sizes = next(iter(sorted(root.glob("image_data_split*.json"))), None)
    if sizes is None:
        raise FileNotFoundError(f"{root} has no image_data_split.json, the list of the images. Copy it there.")
    paths = {"path": root / FILES[split], "sizes": sizes}
    stamp = " ".join(file_stamp(path) for path in paths.values())  # changed files are read again
    arguments = {name: str(path.resolve()) for name, path in paths.items()} | {"stamp": stamp, "version": 1}
    with row_bar(_count_tasks(root / FILES[split]), f"Reading {split} phrases"):
        return datasets.Dataset.from_generator(
            _index, features=_INDEX, gen_kwargs=arguments, split=datasets.NamedSplit(split)
        )


def _count_tasks(path: Path) -> int:
    """Return the number of phrases of a file, without parsing it."""
    key, count, rest = b'"task_id"', 0, b""
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            rest += chunk
            count += rest.count(key)
            rest = rest[1 - len(key) :]  # a key may lie across two chunks
    return count


@counted
def _index(path: str, sizes: str, stamp: str, version: int) -> Iterator[dict]:
    known = _read_sizes(Path(sizes))
    number = -1
    for number, task in enumerate(stream_records(Path(path))):
        try:
            structure, size = task["phrase_structure"], known[task["image_id"]]
            polygons = [polygon for instance in task["Polygons"] for polygon in instance]
            for x, y in (point for polygon in polygons for point in polygon):
                int(x), int(y)  # as draw_polygons does
            if not isinstance(task["phrase"], str):
                raise TypeError(f"its phrase is {task['phrase']!r}, which is no text")
            yield {
                "image_id": task["image_id"],
                "phrase": task["phrase"],
                "name": structure["name"],
                "kind": structure["type"],
                "attributes": structure["attributes"],
                "relations": len(structure["relation_descriptions"]),
                "instances": len(task["instance_boxes"]),
                "size": size,
                "drawing": json.dumps({"size": size, "polygons": polygons}, separators=(",", ":")),
            }
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            problem = f"has no {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
            raise ValueError(
                f"Record {number} of {path} {problem}. Expected a task of PhraseCut with image_id, phrase, "
                f"phrase_structure, instance_boxes and Polygons of points [x, y], and its image in {Path(sizes).name}."
            ) from None
    if number < 0:
        raise ValueError(f"{path} has no phrases. Copy it again, or choose another split.")


def _read_sizes(path: Path) -> dict[int, list[int]]:
    """Return width and height of each image in image_data_split.json."""
    known = {}
    for number, record in enumerate(stream_records(path)):
        try:
            known[record["image_id"]] = [int(record["width"]), int(record["height"])]
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"Record {number} of {path} is damaged. Expected an image with image_id, width and height."
            ) from None
    return known


def find_rows(
    root: Path, split: str, *, on_missing: str, max_images: int | None, holdout: float, seed: int
) -> FoundRows:
    """Find the phrases of a split whose images are on disk.

    Args:
        root: Result of `find_folder`.
        split: A key of `FILES`.
        on_missing: As in `choose_images`.
        max_images: As in `choose_images`.
        holdout: As in `choose_split`.
        seed: Seed of the choices.

    Raises:
        FileNotFoundError: If images or the file of the split are missing.
        ValueError: If the split is unknown, or a file is damaged.
    """
    if split not in FILES:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(FILES)}.")
    index, groups = choose_split(root, split, holdout, seed)
    sizes = index.data.column("size")
    sizes = {name: tuple(sizes[rows[0]].as_py()) for name, rows in groups.items()}
    paths = list_images(root)
    options = {"on_missing": on_missing, "max_images": max_images, "seed": seed, "where": str(root / "images")}
    kept, found, wrong = choose_images(sizes, paths, **options)
    images = [(name, paths[name], groups[name]) for name in kept]
    extra = root / FILES[str(index.split)].replace("refer", "scene_graphs")
    arguments = {"index": index, "root": str(root.resolve()), "scene_graphs": str(extra.resolve()),
                 "stamp": f"{file_stamp(root / COUNTS)} {file_stamp(extra)}"}  # fmt: skip
    count, total = sum(len(rows) for _, _, rows in images), sum(map(len, groups.values()))
    return FoundRows(make_rows, images, arguments, Coverage(len(groups), found, wrong, len(kept), total, count))


def choose_split(root: Path, split: str, holdout: float, seed: int) -> tuple[datasets.Dataset, dict[str, list[int]]]:
    """Return the index of a split, and the row numbers of each of its images.

    If the file of the validation or test split is missing, images of the training split are held out for it.

    Args:
        root: Result of `find_folder`.
        split: A key of `FILES`.
        holdout: Share of the training images to hold out.
        seed: Seed of the choice.

    Raises:
        FileNotFoundError: If the file of the split, and the file of the training split, are missing.
    """
    missing = [name for name in ("validation", "test") if not (root / FILES[name]).is_file()]
    needed = "train" if split in missing else split
    if not (root / FILES[needed]).is_file():
        present = ", ".join(name for name, file in FILES.items() if (root / file).is_file())
        raise FileNotFoundError(f"{root} has no {FILES[split]} for split={split!r}. Its splits: {present}.")
    index = read_index(root, needed)
    groups = group_rows(index)
    if needed == "train" and missing:
        groups = {name: groups[name] for name in hold_out_images(list(groups), split, missing, holdout, seed)}
    return index, groups


def group_rows(index: datasets.Dataset) -> dict[str, list[int]]:
    """Return the row numbers of each image, in the order of their first rows."""
    groups: dict[str, list[int]] = {}
    for row, image in enumerate(index.data.column("image_id").to_pylist()):
        groups.setdefault(str(image), []).append(row)
    return groups


def make_rows(
    index: datasets.Dataset,
    shards: list[list[tuple[str, str, list[int]]]],
    negatives: float,
    seed: int,
    root: str,
    scene_graphs: str,
    stamp: str,
    version: int,
) -> Iterator[dict]:
    """Yield the rows of `hf_dl.data.phrasecut` for images on disk.

    Args:
        index: Result of `read_index`.
        shards: For each image its name, its file, and the numbers of its rows in the index.
        negatives: Share of negative phrases.
        seed: Seed of the negative phrases.
        root: Folder of the files.
        scene_graphs: File with the scene graphs of the split, which may be missing.
        stamp: Changes with the optional files.
        version: Version of the rows. Like `stamp`, it only changes the name of the cache.
    """
    images = [image for shard in shards for image in shard]
    ranks = _read_ranks(Path(root))
    pool, names = [], {}
    if negatives:
        pool = list(zip(index["phrase"], index["name"], strict=True))
        names = _read_object_names(Path(scene_graphs), {name for name, _, _ in images})
    for name, path, rows in images:
        columns = index[rows]
        tasks = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        size = tasks[0]["size"]
        image = {"path": path, "drawing": json.dumps({"size": size})}
        for task in tasks:
            kind = task["kind"] if task["kind"] in KINDS else "verbose"
            words = task["attributes"], range(task["relations"])
            rank = ranks.get(task["name"], len(ranks)) if ranks else None
            subsets = name_subsets(kind, task["instances"], *words, rank=rank)
            yield _row(name, image, task["phrase"], task["drawing"], kind, subsets)
        rng = random.Random(f"hf_dl.phrasecut negatives {seed} {name}")
        known = [*(task["phrase"] for task in tasks), *names.get(name, ())]
        drawing = json.dumps({"size": size, "polygons": []})
        for phrase in draw_false_phrases(count_negatives(len(tasks), negatives, rng), pool, known, rng):
            yield _row(name, image, phrase, drawing, "negative", [])


def _row(name: str, image: dict, phrase: str, drawing: str, kind: str, subsets: Iterable[str]) -> dict:
    mask = {"drawing": drawing}
    return {"image_id": name, "image": image, "phrase": phrase, "mask": mask, "kind": kind, "seen": True,
            "subsets": list(subsets)}  # fmt: skip


def _read_ranks(root: Path) -> dict[str, int]:
    """Return the rank of each category in name_att_rel_count.json, or nothing without the file."""
    path = root / COUNTS
    if not path.is_file():
        return {}
    try:
        return {name: rank for rank, (name, _) in enumerate(json.loads(path.read_text(encoding="utf-8"))["cat"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged. Copy it again, or remove it. ({error})") from None


def _read_object_names(path: Path, images: set[str]) -> dict[str, list[str]]:
    """Return the names of the objects in the scene graph of each image, or nothing without the file."""
    if not path.is_file():
        return {}
    found = {}
    for number, graph in enumerate(stream_records(path)):
        try:
            name = str(graph["image_id"])
            if name in images:
                found[name] = [text for item in graph["objects"] for text in item.get("names", [item.get("name", "")])]
        except (KeyError, TypeError, AttributeError):
            raise ValueError(
                f"Record {number} of {path} is damaged. Expected image_id, and objects with names. Copy the file "
                "again, or remove it."
            ) from None
    return found
