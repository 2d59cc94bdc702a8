"""Generated scenes with three edits each: an object is removed, an object is moved, and an object is replaced.

Every edit is rendered, so each row has the exact answers of three questions about its image. The original scenes are
the scenes of `hf_dl.data.scenes`. Rows 2k and 2k + 1 are partners: a replacement comes from the partner's scene.
Objects have the same number in all masks of a row, and the mask without an object lacks its number.
"""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import datasets

from .counterfactual import edit_scene
from .png import encode_png
from .raycast import chunk_size, render
from .scene_annotations import GAP, annotate
from .scene_description import Scene, SceneObject
from .scenes import FEATURES as SCENE_FEATURES
from .scenes import check_visible, has_room, run_chunks, visible_scenes
from .surfaces import pick, uniform

VERSION = 1  # increase it when edits or columns change
EDITS = ("removed", "moved", "replaced")
_FAR, _NEAR = 20, 40  # attempts to move an object anywhere, and then ever closer to its old position


def _palette(count: int = 256) -> bytes:
    """Return the colors of masks: black, and then colors whose neighbors differ clearly."""
    turns = [(0.618034 * i) % 1 for i in range(1, count)]
    colors = [colorsys.hsv_to_rgb(turn, 0.65, 0.95) for turn in turns]
    return bytes([0, 0, 0, *(round(255 * c) for color in colors for c in color)])


PALETTE = _palette()

FEATURES = datasets.Features({
    "image": datasets.Image(),
    "mask": datasets.Image(),
    "caption": datasets.Value("string"),
    "removed_image": datasets.Image(),
    "removed_mask": datasets.Image(),
    "removed_index": datasets.Value("int32"),
    "moved_image": datasets.Image(),
    "moved_mask": datasets.Image(),
    "moved_index": datasets.Value("int32"),
    "moved_to": datasets.List(datasets.Value("float64"), length=2),
    "replaced_image": datasets.Image(),
    "replaced_mask": datasets.Image(),
    "replaced_index": datasets.Value("int32"),
    "replaced_by": {"row": datasets.Value("int64"), "index": datasets.Value("int32")},
    **{name: SCENE_FEATURES[name] for name in ("objects", "phrases", "scene")},
})  # fmt: skip


def generate(
    rows: range, split: str, *, style: str, size: int, num_objects: tuple[int, int], seed: int
) -> Iterator[dict[str, Any]]:
    """Yield rows with the columns of `FEATURES`. Each row depends on its index and the arguments only.

    Args:
        rows: Row indices. The first one and the number of rows must be even, because two rows are partners.
        split: As in `hf_dl.data.scenes.load`, like the other arguments.
        style: "plain" or "textured".
        size: Width and height of the images in pixels.
        num_objects: Smallest and largest number of objects.
        seed: Seed of the dataset.

    Yields:
        Rows whose images are encoded as PNG. Masks have a palette, so viewers show colors; `numpy.asarray` of a mask
        gives the object numbers.

    Raises:
        ValueError: If the rows do not consist of pairs of partners.
    """
    if rows.start % 2 or len(rows) % 2 or rows.step != 1:
        raise ValueError(f"rows={rows} must start at an even number and contain an even number of rows.")
    step = max(2, chunk_size(size) // 2 * 2)
    chunks = [rows[start : start + step] for start in range(0, len(rows), step)]
    arguments = {"split": split, "style": style, "size": size, "num_objects": num_objects, "seed": seed}
    return run_chunks(_make_rows, chunks, **arguments)


def _make_rows(
    indices: range, split: str, style: str, size: int, num_objects: tuple[int, int], seed: int
) -> list[dict[str, Any]]:
    originals = [scene for scene, _ in visible_scenes(indices, split, style, size, num_objects, seed)]
    rngs = [random.Random(f"hf_dl.edited_scenes {style} {seed} {split} {index}") for index in indices]
    removed = [pick(rng, range(len(scene.objects))) for rng, scene in zip(rngs, originals, strict=True)]
    without = [edit_scene(scene, remove=i) for scene, i in zip(originals, removed, strict=True)]
    drafts = [_draw_moves(scene, rng) for scene, rng in zip(originals, rngs, strict=True)]
    moves, moved = zip(*_first_visible(drafts, style, size), strict=True)
    drafts = [_draw_replacements(originals[n], originals[n ^ 1], rng) for n, rng in enumerate(rngs)]
    swaps, replaced = zip(*_first_visible(drafts, style, size), strict=True)
    versions = {"": originals, "removed_": without, "moved_": moved, "replaced_": replaced}
    pictures = {name: [part.numpy() for part in render(edited, size)] for name, edited in versions.items()}
    masks = pictures["removed_"][1]
    for mask, i in zip(masks, removed, strict=True):
        mask += mask > i  # the other objects keep their numbers
    rows = []
    for n, index in enumerate(indices):
        row = annotate(originals[n], pictures[""][1][n])
        for name, (images, masks) in pictures.items():
            row[name + "image"] = encode_png(images[n], compress_level=6)
            row[name + "mask"] = encode_png(masks[n], palette=PALETTE, compress_level=6)
        row["removed_index"] = removed[n]
        row["moved_index"], row["moved_to"] = moves[n]
        row["replaced_index"], by_partner, other = swaps[n]
        row["replaced_by"] = {"row": index ^ 1 if by_partner else index, "index": other}
        rows.append({name: row[name] for name in FEATURES})
    return rows


Draft = tuple[tuple, Scene]  # the edit, and the edited scene


def _first_visible(drafts: Sequence[Iterator[Draft]], style: str, size: int) -> list[Draft]:
    """Return for each row the first draft in which all objects are visible, or else the last draft."""
    chosen: dict[int, Draft] = {}
    pending = range(len(drafts))
    while pending:
        drawn = {n: draft for n in pending if (draft := next(drafts[n], None)) is not None}
        chosen.update(drawn)
        if not drawn:
            break
        _, fine = check_visible([scene for _, scene in drawn.values()], style, size)
        pending = [n for n, visible in zip(drawn, fine, strict=True) if not visible]
    return [chosen[n] for n in range(len(drafts))]


def _draw_moves(scene: Scene, rng: random.Random) -> Iterator[Draft]:
    """Yield moves of random objects: first to any place at least 1 away, then to places ever closer to the old one."""
    for attempt in range(_FAR + _NEAR):
        i = pick(rng, range(len(scene.objects)))
        item = scene.objects[i]
        x, y, z = item.position
        others = [other for j, other in enumerate(scene.objects) if j != i]
        for _ in range(30):
            if attempt < _FAR:
                place = uniform(rng, -2.8, 2.8), uniform(rng, -2.8, 3.6)
            else:
                reach = 0.9 ** (attempt - _FAR)
                place = x + uniform(rng, -reach, reach), y + uniform(rng, -reach, reach)
            far = attempt >= _FAR or math.dist(place, (x, y)) > 1
            gap = GAP if attempt < _FAR else 0.0
            if far and has_room(scene, replace(item, position=(*place, z)), others, gap=gap):
                yield (i, list(place)), edit_scene(scene, move={i: place})
                break


def _draw_replacements(scene: Scene, partner: Scene, rng: random.Random) -> Iterator[Draft]:
    """Yield replacements by objects of the partner, and then of the scene itself, in random order.

    Objects that look the same are tried last. If none fits into the image, the smallest one is taken.
    """
    everything = range(len(scene.objects))
    pairs = [(True, i, j) for i in everything for j in range(len(partner.objects))]
    pairs += [(False, i, j) for i in everything for j in everything if i != j]
    order = {pair: rng.random() for pair in pairs}

    def donor(pair: tuple[bool, int, int]) -> SceneObject:
        return (partner if pair[0] else scene).objects[pair[2]]

    def draft(pair: tuple[bool, int, int]) -> Draft:
        by_partner, i, j = pair
        return (i, by_partner, j), edit_scene(scene, replace={i: donor(pair)})

    found = False
    ranked = sorted(
        pairs, key=lambda pair: (_look(scene.objects[pair[1]]) == _look(donor(pair)), not pair[0], order[pair])
    )
    for pair in ranked:
        old = scene.objects[pair[1]]
        item = replace(donor(pair), position=(*old.position[:2], donor(pair).extent[1]))
        if has_room(scene, item, [other for other in scene.objects if other is not old]):
            found = True
            yield draft(pair)
    if not found:
        yield draft(min(ranked, key=lambda pair: donor(pair).radius - scene.objects[pair[1]].radius))


def _look(item: SceneObject) -> tuple[str, ...]:
    return item.shape, item.color, item.size, item.surface.material
