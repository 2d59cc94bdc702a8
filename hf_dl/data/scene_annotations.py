"""Annotations of generated scenes: records of the objects, a caption and phrases.

Objects that an edit hides, or moves out of the image, stay in the records with zero visible pixels and the box
[0, 0, 0, 0]. Captions and phrases mention visible objects only.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np

from .scene_description import Scene
from .surfaces import pick

ATTRIBUTES = ("size", "color", "material", "shape")
DIRECTIONS = ("left", "right", "front", "behind")
GAP = 0.25  # smallest offset for "left of" and the other relations; sampled objects are at least this far apart

_SUBSETS = [a for n in range(5) for a in itertools.combinations(ATTRIBUTES, n)]  # from few attributes to many
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
RELATION_WORDS = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}


def annotate(scene: Scene, mask: np.ndarray) -> dict:
    """Return the columns that describe a rendered scene. They depend on the scene and the mask only.

    Args:
        scene: The description that was rendered.
        mask: Its mask (size, size), uint8: 0 on the ground, and i on the i-th object.

    Returns:
        The columns `objects`, `caption`, `phrases` and `scene` of `hf_dl.data.scenes.FEATURES`.
    """
    description = scene.to_json()
    records = _describe_objects(scene, mask)
    rng = random.Random(f"hf_dl.scenes words {description}")
    caption = write_caption(records, rng, ground=scene.ground.material)
    return {"objects": records, "caption": caption, "phrases": _phrases(records, rng), "scene": description}


def _describe_objects(scene: Scene, mask: np.ndarray) -> list[dict]:
    """Return the records of the column `objects`."""
    records = []
    for i, o in enumerate(scene.objects):
        here = mask == i + 1
        *pixel_position, depth = scene.project(o.position, mask.shape[0])
        aside = [other.position[0] - o.position[0] for other in scene.objects]
        beyond = [other.position[1] - o.position[1] for other in scene.objects]
        records.append(
            {
                "shape": o.shape,
                "material": o.surface.material,
                "color": o.color,
                "size": o.size,
                "radius": o.radius,
                "rotation": o.rotation,
                "position": list(o.position),
                "pixel_position": pixel_position,
                "depth": depth,
                "box": find_box(here),
                "visible_pixels": int(np.count_nonzero(here)),
                "relations": {
                    "left": [j for j, offset in enumerate(aside) if offset < -GAP],
                    "right": [j for j, offset in enumerate(aside) if offset > GAP],
                    "front": [j for j, offset in enumerate(beyond) if offset < -GAP],
                    "behind": [j for j, offset in enumerate(beyond) if offset > GAP],
                },
            }
        )
    return records


def find_box(mask: np.ndarray) -> list[int]:
    """Return the box (x0, y0, x1, y1, half-open) of a boolean mask (height, width), or [0, 0, 0, 0] if it is empty.

    Example:
        >>> find_box(np.array([[False, False, False], [False, True, True]]))
        [1, 1, 3, 2]
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _visible(records: Sequence[dict]) -> list[int]:
    return [i for i, record in enumerate(records) if record["visible_pixels"]]


def _noun(record: dict, attributes: Sequence[str], count: int = 1) -> str:
    """Return a noun such as "large red metal spheres"; without the shape, "large red metal objects"."""
    words = [record[a] for a in ("size", "color", "material") if a in attributes]
    return " ".join([*words, record["shape"] if "shape" in attributes else "object"]) + "s" * (count != 1)


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _phrases(records: list[dict], rng: random.Random) -> list[dict]:
    """Return phrases with the indices of all visible objects that they describe, at least one each."""
    everything = _visible(records)
    if not everything:
        return []
    phrases: dict[str, list[int]] = {}

    def matches(record: dict, attributes: Sequence[str]) -> list[int]:
        return [i for i in everything if all(records[i][a] == record[a] for a in attributes)]

    def add(record: dict, attributes: Sequence[str], indices: list[int], before: str = "", after: str = "") -> None:
        several = "both" if len(indices) == 2 else pick(rng, ("all", f"the {_number(len(indices))}"))
        article = "the" if len(indices) == 1 else several
        words = (article, before, _noun(record, attributes, len(indices)), after)
        phrases[" ".join(word for word in words if word)] = indices

    def shortest(i: int) -> Sequence[str] | None:
        """Return the smallest set of attributes that no other object has."""
        unique = [attributes for attributes in _SUBSETS if len(matches(records[i], attributes)) == 1]
        return pick(rng, [a for a in unique if len(a) == len(unique[0])]) if unique else None

    names = {i: shortest(i) for i in everything}
    for i in everything:
        add(records[i], ATTRIBUTES, matches(records[i], ATTRIBUTES))
        if names[i] is not None:
            add(records[i], names[i], [i])
    for _ in everything:  # phrases for groups, and for positions relative to another object
        record, attributes = records[pick(rng, everything)], pick(rng, _SUBSETS)
        add(record, attributes, matches(record, attributes))
        direction, other = pick(rng, DIRECTIONS), pick(rng, everything)
        found = [i for i in matches(record, attributes) if i in records[other]["relations"][direction]]
        if found and names[other] is not None:
            after = f"{RELATION_WORDS[direction]} the {_noun(records[other], names[other])}"
            add(record, attributes, found, after=after)
    direction, attributes = pick(rng, ("left", "right")), pick(rng, ((), ("shape",)))
    group = matches(records[pick(rng, everything)], attributes)
    extreme = [i for i in group if set(group) - {i} <= {j for j in group if i in records[j]["relations"][direction]}]
    if len(group) > 1 and extreme:
        add(records[extreme[0]], attributes, extreme, before=f"{direction}most")
    return [{"phrase": phrase, "object_indices": indices} for phrase, indices in phrases.items()]


def listing(nouns: Sequence[str]) -> str:
    """Join singular nouns that start with a consonant.

    Example:
        >>> listing(["red cube", "gray cone", "red cube"])
        'two red cubes and a gray cone'
    """
    counts = {noun: nouns.count(noun) for noun in nouns}
    items = [f"a {noun}" if n == 1 else f"{_number(n)} {noun}s" for noun, n in counts.items()]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def write_caption(records: Sequence[dict], rng: random.Random, *, ground: str, varied: bool = False) -> str:
    """Write one sentence about all visible objects.

    Args:
        records: The column `objects` of a scene.
        rng: Source of the choice of words.
        ground: Material of the ground. "rubber" is called gray.
        varied: Also vary the order of the objects. Half of the sentences then name a relation, if one exists.

    Returns:
        The sentence, such as "A red cube stands behind a large gray sphere, with a blue cone nearby."
    """
    ground = "gray" if ground == "rubber" else ground
    visible = _visible(records)
    if not visible:
        return f"An empty {ground} floor."
    if varied:
        visible = sorted(visible, key=lambda _: rng.random())
    attributes = pick(
        rng, (ATTRIBUTES, ATTRIBUTES, ("color", "shape"), ("size", "color", "shape"), ("color", "material", "shape"))
    )
    nouns = {i: _noun(records[i], attributes) for i in visible}
    pairs = [(i, direction) for i in visible for direction in DIRECTIONS if _others(records, i, direction)]
    if varied and pairs:
        first, direction = pick(rng, pairs)
    else:
        first = pick(rng, visible)
        direction = pick(rng, DIRECTIONS)
    others = _others(records, first, direction)
    template = pick(rng, ("stand", "picture", "relation", "relation"))
    if template == "relation" and others:
        second = pick(rng, others)  # `others` lists, for example, the objects left of the first
        rest = [noun for i, noun in nouns.items() if i not in (first, second)]
        article = "another" if nouns[second] == nouns[first] else "a"
        place = {"left": "to the left of", "right": "to the right of"}.get(direction, RELATION_WORDS[direction])
        end = f", with {listing(rest)} nearby" if rest else ""
        return f"A {nouns[second]} stands {place} {article} {nouns[first]}{end}."
    text = listing(list(nouns.values()))
    if template == "picture":
        return f"A picture of {text} on a {ground} floor."
    return f"{text[0].upper()}{text[1:]} {'stands' if len(nouns) == 1 else 'stand'} on a {ground} floor."


def _others(records: Sequence[dict], first: int, direction: str) -> list[int]:
    """Return the visible objects that stand in a direction from the first one."""
    return [i for i in records[first]["relations"][direction] if records[i]["visible_pixels"]]
