"""Write generated scenes, or other images with masks of objects, as the files of PhraseCut.

The reader of the real files can so be used without a download. The polygons of a mask, drawn by the rule of PhraseCut,
are the mask exactly.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from .phrasecut_files import FILES
from .phrasecut_scenes import scene_phrases
from .scene_annotations import find_box

Polygon = list[list[int]]


def write_phrasecut(
    folder: str | os.PathLike, scenes: Mapping[str, Iterable[dict]], *, first_image_id: int = 1
) -> dict[str, int]:
    """Write scenes as the files of PhraseCut, which `hf_dl.data.phrasecut.load` reads.

    Args:
        folder: A new or empty folder. The files are described in `hf_dl.data.phrasecut_files`.
        scenes: For each split, "train", "validation", "test" or "miniv", rows with `image`, `mask` and `objects`, such
            as results of `hf_dl.data.scenes.load`.
        first_image_id: Number of the first image.

    Returns:
        The number of phrases of each split.

    Raises:
        FileExistsError: If the folder is not empty.
        ValueError: If a split is unknown.

    Example:
        ```python
        >>> from hf_dl.data import phrasecut, scenes
        >>> write_phrasecut("scenes_as_phrasecut", {"test": scenes.load("test", num_scenes=8)})  # doctest: +SKIP
        >>> phrasecut.load("test", "scenes_as_phrasecut")  # doctest: +SKIP

        ```
    """
    for split in scenes:
        if split not in FILES:
            raise ValueError(f"scenes has the split {split!r}. Choose of {', '.join(FILES)}.")
    root = Path(folder).expanduser()
    (root / "images").mkdir(parents=True, exist_ok=True)
    if any(path != root / "images" for path in root.iterdir()) or any((root / "images").iterdir()):
        raise FileExistsError(f"folder={str(folder)!r} is not empty. Choose another one, or remove its files.")
    images, counts = [], {"cat": Counter(), "att": Counter(), "rel": Counter()}
    written = {}
    for split, rows in scenes.items():
        tasks = []
        for row in rows:
            image_id = first_image_id + len(images)
            row["image"].convert("RGB").save(root / "images" / f"{image_id}.jpg", quality=95)
            width, height = row["image"].size
            name = FILES[split].removeprefix("refer_").removesuffix(".json")
            images.append({"image_id": image_id, "coco_id": None, "flickr_id": None, "width": width, "height": height,
                           "url": None, "split": name})  # fmt: skip
            tasks += _make_tasks(image_id, np.asarray(row["mask"]), row["objects"])
        for task in tasks:
            structure = task["phrase_structure"]
            counts["cat"][structure["name"]] += 1
            counts["att"].update(structure["attributes"])
            counts["rel"].update(predicate for predicate, _ in structure["relation_descriptions"])
        _write_json(root / FILES[split], tasks)
        written[split] = len(tasks)
    _write_json(root / "image_data_split.json", images)
    _write_json(root / "name_att_rel_count.json", {name: count.most_common() for name, count in counts.items()})
    return written


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _make_tasks(image_id: int, mask: np.ndarray, objects: list[dict]) -> list[dict]:
    parts = [mask == i for i in range(1, len(objects) + 1)]
    polygons = [trace_polygons(part) for part in parts]
    tasks = []
    for number, phrase in enumerate(scene_phrases(objects, str(image_id))):
        boxes = [find_box(parts[i]) for i in phrase.objects]
        tasks.append(
            {
                "task_id": f"{image_id}__{number}",
                "image_id": image_id,
                "ann_ids": [1000 * image_id + i for i in phrase.objects],
                "instance_boxes": [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes],
                "Polygons": [polygons[i] for i in phrase.objects],
                "phrase": phrase.text,
                "phrase_structure": {
                    "name": phrase.name,
                    "attributes": list(phrase.attributes),
                    "relation_ids": [number + i for i in range(len(phrase.relations))],
                    "relation_descriptions": [list(pair) for pair in phrase.relations],
                    "type": phrase.kind,
                },
            }
        )
    return tasks


def trace_polygons(mask: np.ndarray) -> list[Polygon]:
    """Return polygons that are the mask exactly when they are drawn by the rule of PhraseCut.

    The mask is divided into parts with one run of pixels per row, because polygons cannot have holes.

    Args:
        mask: bool (height, width).

    Returns:
        Points [x, y] of each polygon. Its edges are horizontal and vertical.

    Example:
        >>> trace_polygons(np.array([[False, True, True], [True, True, True]]))
        [[[1, 0], [2, 0], [2, 1], [0, 1], [1, 1]]]
    """
    parts: list[list[tuple[int, int, int]]] = []  # runs: row, first and last column
    open_parts: list[list[tuple[int, int, int]]] = []
    for y, row in enumerate(mask):
        ends = np.flatnonzero(np.diff(row.astype(np.int8), prepend=0, append=0))
        extended = []
        for first, last in zip(ends[::2].tolist(), (ends[1::2] - 1).tolist(), strict=True):
            above = next((p for p in open_parts if p[-1][1] <= last and first <= p[-1][2]), None)
            if above is None:
                above = []
                parts.append(above)
            else:
                open_parts.remove(above)
            above.append((y, first, last))
            extended.append(above)
        open_parts = extended
    return [_outline(part) for part in parts]


def _outline(runs: list[tuple[int, int, int]]) -> Polygon:
    """Walk down the right ends and up the left ends of overlapping runs, along pixels that belong to them."""
    points: Polygon = []

    def add(x: int, y: int) -> None:
        if not points or points[-1] != [x, y]:
            points.append([x, y])

    add(runs[0][1], runs[0][0])
    for column, walk in ((2, runs), (1, runs[::-1])):
        for (y, *ends), following in zip(walk, [*walk[1:], None], strict=True):
            here = ends[column - 1]
            add(here, y)
            if following is not None:
                there = following[column]
                wider = there > here if column == 2 else there < here
                # move sideways in the longer of both rows
                add(there if not wider else here, y if not wider else following[0])
    while len(points) > 1 and points[-1] == points[0]:
        points.pop()
    return points if len(points) > 1 else points * 2  # PhraseCut ignores polygons of one point
