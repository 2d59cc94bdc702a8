"""Phrases for generated scenes, in the structure of PhraseCut, and phrases that are false of a scene.

A phrase names all objects that it is true of: "red cube" is every red cube of the image. The scenes are the scenes of
`hf_dl.data.captions`, so a CLIP model that was trained on them has seen the same training images only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets

from .captions import COMBINATIONS, OBJECT_SCALE, Combination, avoid_held_out
from .generation import counted
from .png import encode_png
from .raycast import chunk_size, shade
from .raycast_geometry import SceneBatch
from .scene_annotations import DIRECTIONS, annotate
from .scenes import FEATURES as SCENE_FEATURES
from .scenes import run_chunks, visible_scenes
from .surfaces import pick

FEATURES = datasets.Features(
    {"image_id": datasets.Value("string"), **{name: SCENE_FEATURES[name] for name in ("image", "mask", "objects")}}
)
RELATION_WORDS = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}
OBJECT = "object"  # the name in phrases such as "red object"

_ATTEMPTS = 100  # draws of a false phrase


@dataclass(frozen=True)
class Phrase:
    """A phrase and its structure.

    Attributes:
        name: The name of the category.
        attributes: Words before the name.
        relations: Pairs (predicate, supporting object) after the name.
        kind: "name", "attribute", "relation" or "verbose". A verbose phrase has an attribute that it does not need.
        objects: Indices of the objects that the phrase is true of, from 0.
    """

    name: str
    attributes: tuple[str, ...] = ()
    relations: tuple[tuple[str, str], ...] = ()
    kind: str = "name"
    objects: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """Return the words, such as "red cube left of blue cone"."""
        return " ".join([*self.attributes, self.name, *(word for pair in self.relations for word in pair)])

    def names_one_of(self, combinations: Sequence[Combination]) -> bool:
        """Return whether the phrase names a combination of color and shape, also as a supporting object."""
        words = f" {self.text} "
        return any(f" {color} {shape} " in words for color, shape in combinations)


def scene_phrases(objects: Sequence[dict], name: str) -> list[Phrase]:
    """Return phrases for a scene: for all shapes, colors and their combinations, one relation and one size.

    Args:
        objects: Records of the objects, as in `hf_dl.data.scenes.FEATURES`.
        name: Name of the image. It determines the choice of the relation and of the size.
    """
    visible = [i for i, item in enumerate(objects) if item["visible_pixels"]]
    if not visible:
        return []
    rng = random.Random(f"hf_dl.phrasecut {name}")

    def matches(**wanted: str) -> tuple[int, ...]:
        return tuple(i for i in visible if all(objects[i][key] == value for key, value in wanted.items()))

    found: dict[str, Phrase] = {}

    def add(phrase: Phrase) -> None:
        if phrase.objects:
            found.setdefault(phrase.text, phrase)

    for i in visible:
        color, shape = objects[i]["color"], objects[i]["shape"]
        add(Phrase(shape, objects=matches(shape=shape)))
        add(Phrase(shape, (color,), (), "attribute", matches(color=color, shape=shape)))
        add(Phrase(OBJECT, (color,), (), "attribute", matches(color=color)))
    item = objects[pick(rng, visible)]
    size, color, shape = item["size"], item["color"], item["shape"]
    sized = matches(size=size, color=color, shape=shape)
    kind = "verbose" if sized == matches(color=color, shape=shape) else "attribute"
    add(Phrase(shape, (size, color), (), kind, sized))
    support, direction = pick(rng, visible), pick(rng, DIRECTIONS)
    color, shape = objects[support]["color"], objects[support]["shape"]
    beside = [i for i in visible if i in objects[support]["relations"][direction]]
    if beside and len(matches(color=color, shape=shape)) == 1:
        other = objects[pick(rng, beside)]["shape"]
        related = tuple(i for i in beside if objects[i]["shape"] == other)
        add(Phrase(other, (), ((RELATION_WORDS[direction], f"{color} {shape}"),), "relation", related))
    return list(found.values())


def scene_negatives(
    objects: Sequence[dict], count: int, rng: random.Random, *, held_out: Sequence[Combination] = ()
) -> list[Phrase]:
    """Draw phrases that are true of no object of a scene. Half of them differ from an object in color or shape only.

    Args:
        objects: Records of the objects.
        count: Number of phrases. There are fewer if the scene has nearly everything.
        rng: Random number generator.
        held_out: Combinations that the phrases must not name.
    """
    present = {(item["color"], item["shape"]) for item in objects if item["visible_pixels"]}
    words = {word for pair in present for word in pair}
    found: dict[str, Phrase] = {}
    for _ in range(_ATTEMPTS * count):
        if len(found) == count:
            break
        color, shape = pick(rng, COMBINATIONS)
        draw = rng.random()
        if draw < 0.5 and present:
            near = pick(rng, sorted(present))
            color, shape = (near[0], shape) if draw < 0.25 else (color, near[1])
        if draw < 0.7:
            phrase, false = Phrase(shape, (color,), (), "negative"), (color, shape) not in present
        elif draw < 0.85:
            phrase, false = Phrase(shape, kind="negative"), shape not in words
        else:
            phrase, false = Phrase(OBJECT, (color,), (), "negative"), color not in words
        if false and not phrase.names_one_of(held_out):
            found.setdefault(phrase.text, phrase)
    return list(found.values())


def _examples(
    indices: range,
    split: str,
    style: str,
    size: int,
    num_objects: tuple[int, int],
    held_out: tuple[Combination, ...],
    seed: int,
) -> list[dict]:
    drawn = visible_scenes(
        indices,
        split,
        style,
        size,
        num_objects,
        seed,
        adapt=lambda index, scene: avoid_held_out(scene, held_out),
        object_scale=OBJECT_SCALE,
    )
    images = shade(SceneBatch([scene for scene, _ in drawn], size, "cpu")).numpy()
    return [
        {
            "image_id": f"scene-{style}-{seed}-{split}-{index}",
            "image": encode_png(image),
            "mask": encode_png(mask.numpy()),
            "objects": annotate(scene, mask.numpy())["objects"],
        }
        for index, (scene, mask), image in zip(indices, drawn, images, strict=True)
    ]


@counted
def render_scenes(shards: list[tuple[int, int]], version: int, **arguments: object) -> Iterator[dict]:
    """Yield the rows of `FEATURES` of generated scenes.

    Args:
        shards: Pairs of first and last index.
        version: Version of the pixels; it only changes the name of the cache.
        arguments: split, style, size, num_objects, held_out and seed, as in `hf_dl.data.captions.load`.
    """
    step = chunk_size(arguments["size"])
    chunks = [range(i, min(i + step, last)) for first, last in shards for i in range(first, last, step)]
    yield from run_chunks(_examples, chunks, **arguments)
