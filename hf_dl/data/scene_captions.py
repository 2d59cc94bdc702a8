"""Captions of generated scenes: several references per scene, new captions for training, and a parser.

`hf_dl.data.scenes` has one caption per scene. `scene_captions` writes more of them from the same columns:

    A large red metal cube and two small blue rubber spheres stand on a gray floor.
    A red cube stands to the left of a blue sphere, with a blue sphere nearby.

`parse_caption` reads the objects and the relation of such a sentence back, also from captions with mistakes that a
model wrote. `hf_dl.metrics.caption_objects` compares them with the scene.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .materials import TEXTURES
from .scene_annotations import NUMBERS, RELATION_WORDS, write_caption
from .scene_description import SHAPES
from .surfaces import COLORS

_REPEATS = 20  # attempts to write a caption that the scene does not have yet

ATTRIBUTE_WORDS = {  # from attribute to its words
    "size": ("small", "medium", "large"),
    "color": tuple(COLORS),
    "material": ("rubber", "metal", *TEXTURES),
    "shape": SHAPES,
}
_ATTRIBUTE_OF = {word: name for name, words in ATTRIBUTE_WORDS.items() for word in words}
_COUNTS = {"a": 1, "an": 1, "another": 1, "the": 1} | {word: i for i, word in enumerate(NUMBERS) if i > 1}
_TOKEN = re.compile(r"\w+|[^\w\s]")
_PLACES = {
    "left": r"(?:to the )?left of",
    "right": r"(?:to the )?right of",
    "front": "in front of",
    "behind": "behind",
}
assert _PLACES.keys() == RELATION_WORDS.keys()
_RELATION = re.compile(
    r"N(\d+)(?: stands)? (?:" + "|".join(f"(?P<{name}>{words})" for name, words in _PLACES.items()) + r") N(\d+)"
)
_LISTING = r"N\d+(?: , N\d+)*(?: and N\d+)?"
_SENTENCE = re.compile(
    rf"(?:{_LISTING} stands? on G|a picture of {_LISTING} on G|an empty \w+ floor"
    rf"|N\d+ stands (?:{'|'.join(_PLACES.values())}) N\d+(?: , with {_LISTING} nearby)?)(?: \.)?"
)


def scene_captions(row: Mapping[str, Any], count: int, *, seed: int | None = None) -> list[str]:
    """Write captions of a scene. They depend on the arguments only.

    Args:
        row: A row of `hf_dl.data.scenes`, with the columns `caption`, `objects` and `scene`.
        count: Number of captions.
        seed: Seed of new captions, for training. None returns references: the first one is the column `caption`.

    Returns:
        The captions. They are different, unless the scene allows too few captions.

    Raises:
        ValueError: If `count` is less than 1.

    Example:
        >>> from hf_dl.data import scenes
        >>> row = scenes.load("validation", num_scenes=8)[1]
        >>> found = scene_captions(row, 5)
        >>> len(set(found)), found[0] == row["caption"]
        (5, True)
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1, the number of captions.")
    ground = json.loads(row["scene"])["ground"]["material"]
    found = [row["caption"]] if seed is None else []
    rng = random.Random(f"hf_dl.scene_captions {seed} {row['scene']}")
    while len(found) < count:
        for _ in range(_REPEATS):
            text = write_caption(row["objects"], rng, ground=ground, varied=True)
            if text not in found:
                break
        found.append(text)
    return found


@dataclass(frozen=True)
class ParsedCaption:
    """The content of a caption.

    Attributes:
        objects: One dictionary per object, from attribute to word. Only attributes that the caption names are keys.
        relation: (i, direction, j) if objects[i] stands in that direction from objects[j], or None.
        grammatical: Whether the caption is a sentence of the grammar.
        words: For each object, the indices of its words in `caption_words(text)`. "Two red cubes" gives two objects
            with the same words.
    """

    objects: tuple[dict[str, str], ...] = ()
    relation: tuple[int, str, int] | None = None
    grammatical: bool = False
    words: tuple[tuple[int, ...], ...] = field(default=(), repr=False)


def caption_words(text: str) -> list[str]:
    """Split a caption into lower-case words and punctuation marks."""
    return _TOKEN.findall(text.lower())


def parse_caption(text: str) -> ParsedCaption:
    """Read the objects and the relation of a caption.

    Noun phrases end with a shape. Unknown words inside a noun phrase end it without an object, and of two colors the
    last one counts. So any text can be parsed, and `grammatical` tells whether it was correct.

    Args:
        text: A caption that `scene_captions`, `hf_dl.data.captions` or a model wrote.

    Returns:
        The content.

    Example:
        >>> parsed = parse_caption("A red cube stands behind a small gray sphere.")
        >>> parsed.objects
        ({'color': 'red', 'shape': 'cube'}, {'size': 'small', 'color': 'gray', 'shape': 'sphere'})
        >>> parsed.relation, parsed.grammatical
        ((0, 'behind', 1), True)
    """
    words = caption_words(text)
    objects: list[dict[str, str]] = []
    indices: list[tuple[int, ...]] = []
    skeleton: list[str] = []  # noun phrases become N and the index of their first object
    wrong, position = False, 0
    while position < len(words):
        if words[position] not in _COUNTS:
            skeleton.append(words[position])
            position += 1
            continue
        count, end = _COUNTS[words[position]], position + 1
        named: dict[str, str] = {}
        while end < len(words) and "shape" not in named:
            word = words[end] if count == 1 else _singular(words[end])
            attribute = _ATTRIBUTE_OF.get(word)
            if attribute is None:
                break
            wrong = wrong or attribute in named
            named[attribute] = word
            end += 1
        if "shape" in named:
            skeleton.append(f"N{len(objects)}")
            objects += [dict(named) for _ in range(count)]
            indices += [tuple(range(position, end))] * count
        elif end < len(words) and words[end] == "floor":
            skeleton.append("G")  # "a gray floor"
            end += 1
        else:
            skeleton += words[position:end]
        position = end
    plain = " ".join(skeleton)
    relation = None
    if match := _RELATION.search(plain):
        direction = next(name for name in _PLACES if match[name])
        relation = (int(match[1]), direction, int(match[match.re.groups]))
    return ParsedCaption(tuple(objects), relation, not wrong and bool(_SENTENCE.fullmatch(plain)), tuple(indices))


def _singular(word: str) -> str:
    return word.removesuffix("s") if word.removesuffix("s") in SHAPES else word
