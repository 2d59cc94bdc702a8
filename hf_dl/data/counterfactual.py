"""Render a generated scene again after an edit. The result is the exact answer of that edit.

    from hf_dl.data import scenes

    example, other = scenes.load("test", num_scenes=2)
    scenes.counterfactual(example, remove=0)
    scenes.counterfactual(example, move={1: (0.5, 2.0)})
    scenes.counterfactual(example, recolor={1: "red"})
    scenes.counterfactual(example, replace={0: (other, 1)})
    scenes.counterfactual(example, insert=(other, 1), at=(0.5, 2.0))

Camera, light and ground stay the same. Shadows follow their objects. Each object also hides a part of the sky from
the ground around it, so the ground near an edited object changes slightly outside of the shadow too.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

from PIL import Image

from .raycast import chunk_size, render
from .scene_annotations import annotate
from .scene_description import MAX_OBJECTS, Scene, SceneObject
from .surfaces import LINEAR_COLORS
from .surfaces import recolor as recolor_surface

_NEAR = 3.0  # smallest depth of an object's center: the object and its shadow must be in front of the camera


class Edit(TypedDict, total=False):
    """The arguments of `counterfactual` after the example."""

    remove: int | Sequence[int]
    move: Mapping[int, tuple[float, float]] | None
    recolor: Mapping[int, str] | None
    replace: Mapping[int, tuple[Mapping[str, Any], int]] | None
    insert: tuple[Mapping[str, Any], int] | None
    at: tuple[float, float] | None


def counterfactual(
    example: Mapping[str, Any],
    *,
    remove: int | Sequence[int] = (),
    move: Mapping[int, tuple[float, float]] | None = None,
    recolor: Mapping[int, str] | None = None,
    replace: Mapping[int, tuple[Mapping[str, Any], int]] | None = None,
    insert: tuple[Mapping[str, Any], int] | None = None,
    at: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Render the scene of an example again, after one or several edits.

    All indices are positions in `example["objects"]` before the edit. Several edits are applied in this order:
    replace, recolor, move, insert, remove. Objects after a removed object move down by one, in `objects` and in the
    mask. An inserted object becomes the last one. Without any edit, the result equals the example.

    Args:
        example: A row of `hf_dl.data.scenes.load`. Its columns `image` and `scene` are used.
        remove: Index of the object that disappears, or several indices.
        move: From object index to its new ground position (x, y) in world units, as in the column `objects`.
        recolor: From object index to the name of a color, a key of `hf_dl.data.scenes.COLORS`.
        replace: From object index i to (another example, object index j). Object j takes the place of object i.
        insert: (another example, object index j). A copy of object j is added.
        at: Ground position of the inserted object. Defaults to its position in its own scene.

    Returns:
        A row with the same columns. The image has the size of the example's image. An object that is hidden or outside
        of the image has 0 `visible_pixels` and the box [0, 0, 0, 0]; caption and phrases do not mention it.

    Raises:
        ValueError: If an example has no column `scene`, or an index or color is unknown. If a position is behind the
            camera, edits contradict each other, or an edited object would overlap another object.

    Example:
        >>> from hf_dl.data import scenes
        >>> example = scenes.load("test", num_scenes=1)[0]
        >>> len(example["objects"]) - len(scenes.counterfactual(example, remove=0)["objects"])
        1
    """
    edit = Edit(remove=remove, move=move, recolor=recolor, replace=replace, insert=insert, at=at)
    (row,) = _render_rows([_edit_example(example, edit)], _image_size(example))
    return row


def counterfactuals(examples: Sequence[Mapping[str, Any]], edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Render many edits together, which is faster than one call of `counterfactual` for each.

    Args:
        examples: Rows of `hf_dl.data.scenes.load`. Sizes and styles may differ.
        edits: One edit per example, with the arguments of `counterfactual`, for example `{"remove": 0}`.

    Returns:
        One row per edit, equal to the result of `counterfactual`.

    Raises:
        ValueError: As in `counterfactual`, with the position of the edit; or if the lengths differ.
    """
    if len(examples) != len(edits):
        raise ValueError(f"Got {len(examples)} examples and {len(edits)} edits. Expected one edit per example.")
    by_size: dict[int, list[int]] = {}
    edited: list[Scene] = []
    for number, (example, edit) in enumerate(zip(examples, edits, strict=True)):
        unknown = set(edit) - set(Edit.__annotations__)
        if unknown:
            known = ", ".join(Edit.__annotations__)
            raise ValueError(f"Edit {number} has the unknown key {sorted(unknown)[0]!r}. Choose from: {known}.")
        try:
            edited.append(_edit_example(example, edit))
            by_size.setdefault(_image_size(example), []).append(number)
        except ValueError as error:
            raise ValueError(f"Edit {number}: {error}") from error
    rows: dict[int, dict[str, Any]] = {}
    for size, numbers in by_size.items():
        rows.update(zip(numbers, _render_rows([edited[number] for number in numbers], size), strict=True))
    return [rows[number] for number in range(len(edits))]


def ground_position(example: Mapping[str, Any], x: float, y: float, *, height: float = 0.0) -> tuple[float, float]:
    """Turn a pixel position into a ground position, for example of an object that is dragged over the image.

    Args:
        example: A row of `hf_dl.data.scenes.load`.
        x: Pixel position from the left, in the image of the example.
        y: Pixel position from the top.
        height: Height above the ground of the point that should appear at the pixel. For the center of an object it
            is `example["objects"][i]["position"][2]`.

    Returns:
        The ground position (x, y) in world units, as `counterfactual` expects it.

    Raises:
        ValueError: If the example has no column `scene`, or the pixel is above the horizon.

    Example:
        >>> from hf_dl.data import scenes
        >>> example = scenes.load("test", num_scenes=1)[0]
        >>> record = example["objects"][0]
        >>> x, y = scenes.ground_position(example, *record["pixel_position"], height=record["position"][2])
        >>> abs(x - record["position"][0]) < 1e-9 and abs(y - record["position"][1]) < 1e-9
        True
    """
    return _read_scene(example).unproject(x, y, _image_size(example), height=height)


# ---------------------------------------------------------------------------------------------------------------------
# Reading an example, and rendering rows


def _read_scene(example: Mapping[str, Any]) -> Scene:
    if "scene" not in example:
        raise ValueError(
            f"The example has the columns {list(example)}; 'scene' is missing. Only generated scenes can be rendered "
            "again: load them with hf_dl.data.scenes.load."
        )
    return Scene.from_json(example["scene"])


def _image_size(example: Mapping[str, Any]) -> int:
    size = getattr(example.get("image"), "size", None)
    if not isinstance(size, tuple) or len(size) != 2 or size[0] != size[1]:
        raise ValueError(
            f"The image of the example is a {type(example.get('image')).__name__} of size {size}. Expected a square "
            "PIL image, as the rows of hf_dl.data.scenes.load have it."
        )
    return size[0]


def _render_rows(scenes: Sequence[Scene], size: int) -> Iterator[dict[str, Any]]:
    step = chunk_size(size)
    for start in range(0, len(scenes), step):
        chunk = scenes[start : start + step]
        images, masks = (batch.numpy() for batch in render(chunk, size))
        for scene, image, mask in zip(chunk, images, masks, strict=True):
            yield {"image": Image.fromarray(image), "mask": Image.fromarray(mask), **annotate(scene, mask)}


# ---------------------------------------------------------------------------------------------------------------------
# Edits of a description


def _edit_example(example: Mapping[str, Any], edit: Edit) -> Scene:
    """Return the edited scene of an example, with the objects of other examples."""
    insert, replace = edit.get("insert"), edit.get("replace") or {}
    return edit_scene(
        _read_scene(example),
        remove=edit.get("remove", ()),
        move=edit.get("move"),
        recolor=edit.get("recolor"),
        replace={i: _take_object(pair, "replace") for i, pair in replace.items()},
        insert=None if insert is None else _take_object(insert, "insert"),
        at=edit.get("at"),
    )


def edit_scene(
    scene: Scene,
    *,
    remove: int | Sequence[int] = (),
    move: Mapping[int, tuple[float, float]] | None = None,
    recolor: Mapping[int, str] | None = None,
    replace: Mapping[int, SceneObject] | None = None,
    insert: SceneObject | None = None,
    at: tuple[float, float] | None = None,
) -> Scene:
    """Edit the description of a scene without rendering it.

    Args:
        scene: The description.
        remove: As in `counterfactual`, like `move`, `recolor` and `at`.
        move: From object index to ground position.
        recolor: From object index to the name of a color.
        replace: From object index to the object that takes its place.
        insert: An object that is added.
        at: Ground position of the added object.

    Returns:
        The edited description.

    Raises:
        ValueError: As in `counterfactual`.
    """
    move, recolor, replace = move or {}, recolor or {}, replace or {}
    removed = {_check_index(scene, i, "remove") for i in (remove if isinstance(remove, Sequence) else [remove])}
    changed: set[int] = set()
    for name, edit in (("replace", replace), ("recolor", recolor), ("move", move)):
        changed |= {_check_index(scene, i, name) for i in edit}
    if changed & removed:
        raise ValueError(f"Object {min(changed & removed)} is removed and also edited. Choose one of both.")
    if at is not None and insert is None:
        raise ValueError(f"at={at} needs an object: use insert=(other example, index).")
    objects = list(scene.objects)
    for i, item in replace.items():
        objects[i] = _place(item, objects[i].position)
    for i, color in recolor.items():
        if color not in LINEAR_COLORS:
            raise ValueError(f"recolor={{{i}: {color!r}}} is unknown. Choose one of: {', '.join(LINEAR_COLORS)}.")
        surface = recolor_surface(objects[i].surface, LINEAR_COLORS[color])
        objects[i] = dataclasses.replace(objects[i], color=color, surface=surface)
    for i, position in move.items():
        objects[i] = _place(objects[i], _check_position(scene, position, f"move={{{i}: {position}}}"))
    if insert is not None:
        place = insert.position[:2] if at is None else at
        changed.add(len(objects))
        objects.append(_place(insert, _check_position(scene, place, f"at={place}")))
    kept = [i for i in range(len(objects)) if i not in removed]
    for i in sorted(changed):
        for j in kept:
            if i != j and objects[i].overlaps(objects[j]):
                raise ValueError(f"{_name(objects, i)} would overlap {_name(objects, j)}. Choose another position.")
    if len(kept) > MAX_OBJECTS:
        raise ValueError(f"The edited scene has {len(kept)} objects, but masks can number {MAX_OBJECTS}.")
    return dataclasses.replace(scene, objects=tuple(objects[i] for i in kept))


def _check_index(scene: Scene, index: int, name: str) -> int:
    try:
        number = operator.index(index)
    except TypeError:
        number = -1
    if not 0 <= number < len(scene.objects):
        expected = f"0 to {len(scene.objects) - 1}" if scene.objects else "none, because the scene is empty"
        raise ValueError(f"The object index {index!r} of {name} is unknown. Expected {expected}.")
    return number


def _check_position(scene: Scene, position: Sequence[float], name: str) -> tuple[float, float]:
    try:
        x, y = (float(v) for v in position)
    except (TypeError, ValueError):
        x = y = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise ValueError(f"{name} is no ground position. Expected two finite numbers (x, y).")
    depth = scene.project((x, y, 0.0), 1)[2]
    if depth < _NEAR:
        raise ValueError(
            f"{name} is behind the camera or too close to it: its depth is {depth:.1f}. Expected at least {_NEAR:g}."
        )
    return x, y


def _take_object(pair: tuple[Mapping[str, Any], int], name: str) -> SceneObject:
    if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], Mapping):
        raise ValueError(f"{name} got {type(pair).__name__}. Expected a pair (another example, index of its object).")
    other, index = pair
    scene = _read_scene(other)
    return scene.objects[_check_index(scene, index, name)]


def _place(item: SceneObject, position: Sequence[float]) -> SceneObject:
    """Put an object onto the ground at a position."""
    return dataclasses.replace(item, position=(position[0], position[1], item.extent[1]))


def _name(objects: Sequence[SceneObject], index: int) -> str:
    item = objects[index]
    return f"object {index} ({item.size} {item.color} {item.surface.material} {item.shape})"
