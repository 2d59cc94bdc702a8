"""Editing tasks: edits of generated scenes for a model to make, with the rendered truth to compare with.

    from hf_dl.data import editing_tasks

    edit = editing_tasks.load("test", kind="swap")[0]
    edit["image"], edit["mask"]               # the image, and the object to replace
    edit["other_image"], edit["other_mask"]   # another image, and the object that takes its place
    edit["truth"]                             # the result, rendered with the camera, light and ground of the image

The kinds of edits are in `KINDS`. The new object of a swap or an insertion appears at the pixel position that it has
in the other image. It touches no other object there, and none of the objects that stay, so no object hides it.
`hf_dl.metrics.editing` scores edited images. `edited_scenes` has other edits: it moves objects, and a replacement
takes the place of the old object.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from scipy.ndimage import binary_dilation

from . import scenes
from .generation import counted, row_bar
from .png import encode_png

KINDS = {
    "remove": "remove an object",
    "swap": "replace an object by an object of another image",
    "insert": "add an object of another image",
}
FEATURES = datasets.Features({
    "image": datasets.Image(),
    "mask": datasets.Image(),
    "other_image": datasets.Image(),
    "other_mask": datasets.Image(),
    "truth": datasets.Image(),
    "truth_mask": datasets.Image(),
    "objects": datasets.List({
        "box": datasets.List(datasets.Value("int32"), length=4),
        "color": datasets.Value("string"),
        "shape": datasets.Value("string"),
        "edited": datasets.Value("bool"),
    }),
})  # fmt: skip

_VERSION = 1  # increase it when pixels or columns change: `datasets` caches by arguments, not by code
_GAP = 1 / 32  # smallest distance of a new object to others, as a fraction of the image


def load(
    split: str = "test",
    source: str = "synthetic",
    *,
    kind: str = "remove",
    style: str = "plain",
    size: int = 64,
    num_objects: tuple[int, int] = (2, 4),
    num_scenes: int | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """Generate one edit for each scene of a split. Scenes without a possible edit are left out.

    Args:
        split: "train", "validation" or "test".
        source: Only "synthetic".
        kind: A key of `KINDS`.
        style: "plain" or "textured", see `hf_dl.data.scenes`.
        size: Width and height of the images in pixels.
        num_objects: Smallest and largest number of objects per scene.
        num_scenes: Number of scenes. Defaults to the count in `hf_dl.data.scenes.SPLITS`. The other images of swaps
            and insertions are scenes of the same split.
        seed: Seed of the scenes and of the choice of objects.

    Returns:
        A dataset with the columns of `FEATURES`. Masks are 8-bit, 1 on the object. `mask` belongs to `image` and is
        empty for an insertion. `other_mask` belongs to `other_image`; both are None for a removal. `truth_mask`
        belongs to `truth` and is empty for a removal. `objects` are the visible objects of the truth; `edited` is
        whether the object is new.

    Raises:
        ValueError: If an argument is not one of the values above, or no scene has a possible edit.

    Example:
        >>> from hf_dl.data import editing_tasks
        >>> edit = editing_tasks.load("validation", kind="remove", num_scenes=4)[0]
        >>> edit["truth"].size, edit["other_image"] is None
        ((64, 64), True)
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    options = {"style": style, "size": size, "num_objects": tuple(num_objects), "seed": seed}
    found = scenes.load(split, source, num_scenes=num_scenes, **options)
    arguments = {"found": found, "kind": kind, "stream": f"{style} {seed} {split}", "version": _VERSION}
    with row_bar(len(found), f"Rendering {split} edits ({kind})"):
        return datasets.Dataset.from_generator(
            _generate, features=FEATURES, gen_kwargs=arguments, split=datasets.NamedSplit(split)
        )


@counted
def _generate(found: datasets.Dataset, kind: str, stream: str, version: int) -> Iterator[dict[str, Any]]:
    rows = list(found)
    masks = [np.asarray(row["mask"]) for row in rows]
    free = [_free_objects(mask) for mask in masks] if kind != "remove" else []
    possible = False
    for number, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        rng = random.Random(f"hf_dl.editing_tasks {kind} {stream} {number}")
        target = None if kind == "insert" else int(rng.random() * len(row["objects"]))
        old = np.zeros_like(mask, dtype=bool) if target is None else mask == target + 1
        pictures = {"image": row["image"], "mask": old, "other_image": None, "other_mask": None}
        if kind == "remove":
            truth = scenes.counterfactual(row, remove=target)
            new = np.zeros_like(old)
        else:
            added = _add_object(rows, free, number, target, (mask > 0) & ~old, rng)
            if added is None:
                continue
            other, index, truth = added
            pictures |= {"other_image": rows[other]["image"], "other_mask": masks[other] == index + 1}
            new = np.asarray(truth["mask"]) == len(truth["objects"])
        pictures |= {"truth": truth["image"], "truth_mask": new}
        last = truth["objects"][-1] if new.any() else None  # the new object
        objects = [
            {name: item[name] for name in ("box", "color", "shape")} | {"edited": item is last}
            for item in truth["objects"]
            if item["visible_pixels"]
        ]
        yield {name: _encode(picture) for name, picture in pictures.items()} | {"objects": objects}
        possible = True
    if not possible:
        raise ValueError(
            f"kind={kind!r} is not possible in any of the {len(rows)} scenes, because their objects are too close. "
            "Use more scenes, or fewer objects per scene."
        )


def _free_objects(mask: np.ndarray) -> dict[int, np.ndarray]:
    """Return the objects that touch no other object, and the pixels of each with a margin, by index."""
    steps = max(1, round(len(mask) * _GAP))
    wide = {int(label) - 1: binary_dilation(mask == label, iterations=steps) for label in np.unique(mask[mask > 0])}
    return {index: area for index, area in wide.items() if np.isin(mask[area], (0, index + 1)).all()}


def _add_object(
    rows: list[dict[str, Any]],
    free: list[dict[int, np.ndarray]],
    number: int,
    target: int | None,
    blocked: np.ndarray,
    rng: random.Random,
) -> tuple[int, int, dict[str, Any]] | None:
    """Find an object of another scene that has room in a scene.

    Args:
        rows: All scenes.
        free: Result of `_free_objects` for all scenes.
        number: The scene to edit.
        target: The object that is removed, or None.
        blocked: Pixels of the objects that stay.
        rng: Source of randomness.

    Returns:
        The number of the other scene, the index of the object in it, and the edited scene. None if no object fits.
    """
    row = rows[number]
    for step in range(1, len(rows)):
        other = (number + step) % len(rows)
        for index in sorted(free[other], key=lambda _: rng.random()):
            if (free[other][index] & blocked).any():
                continue
            item = rows[other]["objects"][index]
            try:
                at = scenes.ground_position(row, *item["pixel_position"], height=item["position"][2])
                removed = () if target is None else target
                truth = scenes.counterfactual(row, remove=removed, insert=(rows[other], index), at=at)
            except ValueError:  # the objects share some space behind the visible pixels
                continue
            return other, index, truth
    return None


def _encode(picture: Any) -> Any:
    """Encode a mask as an image of zeros and ones. Images stay unchanged."""
    return encode_png(picture.astype(np.uint8)) if isinstance(picture, np.ndarray) else picture
