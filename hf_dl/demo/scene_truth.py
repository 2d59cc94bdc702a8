"""The true result of an edit of a generated scene: the scene rendered again after the same edit.

A slot stands for the object that it covers. An edit that moves, removes or adds other slots has no true result.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..data import scenes
from .slots import Explanation, get_frame, is_at

MIN_OVERLAP = 0.5  # smallest IoU of a slot with its object; above 1/2, a slot and an object have one partner at most


class Truth(NamedTuple):
    """A scene rendered after an edit, and a sentence about the edit."""

    image: Image.Image
    text: str


def match_slots(found: Explanation) -> list[int | None]:
    """Find the object that each slot covers.

    Args:
        found: The explanation of a generated scene.

    Returns:
        For each slot, its value in the mask of the scene: i + 1 for object i, and 0 for the background. None if the
        IoU of the slot with each of them is below `MIN_OVERLAP`, or if the slot covers most of several objects.
    """
    mask = np.asarray(found.scene["mask"].resize(found.segments.size, Image.Resampling.NEAREST)).astype(int)
    slots, regions = len(found.parts), len(found.scene["objects"]) + 1
    pairs = np.bincount((found.labels * regions + mask).ravel(), minlength=slots * regions)
    both = pairs.reshape(slots, regions)  # number of pixels of each slot in each region
    sizes = both.sum(axis=0)
    overlap = both / np.maximum(both.sum(axis=1, keepdims=True) + sizes - both, 1)
    several = (2 * both > sizes)[:, 1:].sum(axis=1) > 1
    best = overlap.argmax(axis=1)
    unclear = (overlap.max(axis=1) < MIN_OVERLAP) | (several & (best > 0))
    return [None if skip else int(region) for region, skip in zip(best, unclear, strict=True)]


def render_selection(*chosen: tuple[Explanation, Sequence[int]]) -> Truth:
    """Render the first scene without the objects of its other slots, and with objects of other scenes.

    Objects of other scenes appear at the pixel position that they have there.

    Args:
        *chosen: Explanations of generated scenes, each with the slots to keep. Unused slots of the first scene are
            ignored.

    Raises:
        ValueError: If a removed or added slot covers no single object, or if objects would overlap.
    """
    (first, keep), *others = chosen
    removed = _find_objects(first, [slot for slot in first.used if slot not in keep], several=bool(others))
    row, texts = _render(first.scene, remove=list(removed)), []
    if removed:
        texts.append(f"without {_join(_name(first.scene, index) for index in removed)}")
    for other, slots in others:
        added = _find_objects(other, slots, several=True, place="second")
        for index in added:
            item = other.scene["objects"][index]
            at = scenes.ground_position(row, *item["pixel_position"], height=item["position"][2])
            row = _render(row, insert=(other.scene, index), at=at)
        if added:
            texts.append(f"with {_join(_name(other.scene, index) for index in added)}")
    return Truth(row["image"], f"The scene {' and '.join(texts)}." if texts else "The original scene.")


def render_moved(found: Explanation, slot: int, x: float, y: float) -> Truth:
    """Render a scene with one object moved over the ground, as far in the image as its slot is moved.

    Args:
        found: The explanation of a generated scene, whose slots have frames.
        slot: The slot that is moved.
        x: New center of the slot from the left, as a fraction of the image.
        y: New center of the slot from the top, as a fraction of the image.

    Raises:
        ValueError: If the slot covers no single object, or if objects would overlap.
    """
    (index,) = _find_objects(found, [slot])
    if is_at(found, slot, x, y):
        return Truth(found.scene["image"], "The original scene.")
    item, size = found.scene["objects"][index], found.scene["image"].width
    old_x, old_y, _ = get_frame(found, slot)
    pixel_x, pixel_y = item["pixel_position"]
    place = pixel_x + size * (x - old_x), pixel_y + size * (y - old_y)
    at = scenes.ground_position(found.scene, *place, height=item["position"][2])
    return Truth(_render(found.scene, move={index: at})["image"], f"The scene with {_name(found.scene, index)} moved.")


def squared_error(first: Image.Image, second: Image.Image, *, size: int) -> float:
    """Return the mean squared difference of two images of one scene, for pixels in [0, 1].

    Args:
        first: An image of any size.
        second: An image of any size.
        size: Both images are first resized to this height and width, so that their resolutions do not matter.
    """
    small = [
        np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64) / 255
        for image in (first, second)
    ]
    return float(np.square(small[0] - small[1]).mean())


def _find_objects(
    found: Explanation, slots: Sequence[int], *, several: bool = False, place: str = "first"
) -> list[int]:
    """Return the indices of the objects that slots cover, or raise a ValueError if one of them covers none."""
    matches, objects = match_slots(found) if slots else [], []
    for slot in slots:
        if not matches[slot]:
            where = f" of the {place} image" if several else ""
            what = "no single object" if matches[slot] is None else "the background"
            raise ValueError(f"Slot {slot + 1}{where} covers {what}, so this edit has no true result.")
        objects.append(matches[slot] - 1)
    return sorted(set(objects))


def _render(row: Mapping[str, Any], **edit: Any) -> dict[str, Any]:
    try:
        return scenes.counterfactual(row, **edit)
    except ValueError as error:
        reason = re.sub(r"object \d+ \((.*?)\)", r"the \1", str(error).partition(". ")[0])
        raise ValueError(f"This edit has no true result: {reason}.") from error


def _name(row: Mapping[str, Any], index: int) -> str:
    item = row["objects"][index]
    return f"the {item['size']} {item['color']} {item['shape']}"


def _join(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
