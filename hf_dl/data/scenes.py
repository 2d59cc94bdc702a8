"""Ray-cast 3-D scenes on a ground plane, in the manner of CLEVR and CLEVRTex, rendered in torch.

The embedded data of this package: nothing is downloaded, every scene is a function of (seed, split, index), and every
annotation is exact because it comes from the geometry that was rendered.

* `load` gives a `datasets.Dataset` (or a streaming one) with images, instance masks, objects, captions and phrases.
* `sample_scene` draws the description of one scene; `render` turns descriptions into images and masks.

After CLEVR (Johnson et al. 2017, https://arxiv.org/abs/1612.06890) and CLEVRTex (Karazija et al. 2021,
https://arxiv.org/abs/2111.10265). Different from both: a closed-form ray caster instead of Blender, cones as a fourth
shape, square images, and soft shadows of one key light.

How they are rendered, and why a scene has the same bytes in any batch, is in `hf_dl.data.raycast`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import datasets
import numpy as np
import torch

from .materials import TEXTURES
from .png import encode_png
from .raycast import chunk_size, render, shade
from .raycast_geometry import SceneBatch
from .scene_description import HALF_FOV, SHAPES, Scene, SceneObject, Surface
from .surfaces import COLORS, LINEAR_COLORS, draw_ground, draw_surface, pick, uniform

SPLITS = {"train": 8000, "validation": 500, "test": 500}
STYLES = ("plain", "textured")
__all__ = ["Scene", "SceneObject", "Surface", "load", "render", "sample_scene"]


SIZES = {"plain": {"small": 0.5, "large": 0.85}, "textured": {"small": 0.45, "medium": 0.65, "large": 0.9}}
MATERIALS = {"plain": ("rubber", "metal"), "textured": tuple(TEXTURES)}
ATTRIBUTES = ("size", "color", "material", "shape")
DIRECTIONS = ("left", "right", "front", "behind")

_VERSION = 5  # bump with any change of the pixels or columns: `datasets` caches by arguments, not by this code
_GAP = 0.25  # smallest distance between footprints, and the offset from which one object is left of another
_MIN_AREA = 0.003  # smallest visible part of an object, as a fraction of the image
_MIN_VISIBLE = {"plain": 0.7, "textured": 0.4}  # smallest visible fraction of an object's own silhouette
_ATTEMPTS = 1000
_MAX_OBJECTS = 32
_SUBSETS = [a for n in range(5) for a in itertools.combinations(ATTRIBUTES, n)]  # from few to many
_NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
_RELATION_WORDS = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}


# ---------------------------------------------------------------------------------------------------------------------
# Drawing a scene


def sample_scene(
    index: int,
    split: str = "train",
    *,
    style: str = "plain",
    num_objects: tuple[int, int] = (2, 4),
    seed: int = 0,
    attempt: int = 0,
) -> Scene | None:
    """Draw the description of one scene: a pure function of its arguments.

    Args:
        index: Number of the scene inside its split.
        split: Name of the split; different splits draw from different streams.
        style: One of `STYLES`.
        num_objects: Smallest and largest number of objects.
        seed: Seed of the whole dataset.
        attempt: Number of the try; `load` counts up until every object is sufficiently visible.

    Returns:
        The scene, or None where this attempt found no room for its objects.
    """
    stream = f"hf_dl.scenes {style} {seed} {split} {index}"
    low, high = num_objects
    # drawn once per scene: redrawing it with each attempt would favor small numbers, which are rejected less
    count = low + int(random.Random(stream).random() * (high - low + 1))
    rng = random.Random(f"{stream} {attempt}")
    scene = Scene(
        objects=(),
        elevation=uniform(rng, 29, 35),
        distance=uniform(rng, 11.0, 12.0),
        target=(uniform(rng, -0.15, 0.15), uniform(rng, -0.1, 0.2), uniform(rng, 0.2, 0.4)),
        light_azimuth=uniform(rng, 200, 245),
        light_elevation=uniform(rng, 44, 60),
        ground=draw_ground(rng, style),
        ground_rotation=uniform(rng, 0, 360),
    )
    shrink = _shrink(count)
    objects: list[SceneObject] = []
    for _ in range(count):
        size, shape = pick(rng, tuple(SIZES[style])), pick(rng, SHAPES)
        material, color = pick(rng, MATERIALS[style]), pick(rng, tuple(COLORS))
        surface = draw_surface(rng, material, LINEAR_COLORS[color])
        draft = SceneObject(shape, color, size, SIZES[style][size] * shrink, uniform(rng, 0, 360), (0, 0, 0), surface)
        for _ in range(30):
            item = replace(draft, position=(uniform(rng, -2.8, 2.8), uniform(rng, -2.8, 3.6), draft.extent[1]))
            x, y, depth = scene.project(item.position, 2)  # the image is 2 wide: coordinates from 0 to 2
            inside = max(abs(x - 1), abs(y - 1)) + 1.05 * item.radius / (depth * HALF_FOV) < 0.97
            if inside and all(
                math.dist(item.position[:2], o.position[:2]) > item.radius + o.radius + _GAP * shrink for o in objects
            ):
                objects.append(item)
                break
        else:
            return None
    return replace(scene, objects=tuple(objects))


def _shrink(count: int) -> float:
    """How much smaller the objects of a crowd are: or they would not fit."""
    return min(1.0, math.sqrt(7 / count))


def _visible_scenes(
    indices: Sequence[int], split: str, style: str, size: int, num_objects: tuple[int, int], seed: int
) -> list[tuple[Scene, torch.Tensor]]:
    """For each index the first attempt in which every object is whole and sufficiently visible, and its mask."""
    accepted: dict[int, tuple[Scene, torch.Tensor]] = {}
    pending = dict.fromkeys(indices, 0)  # index -> attempt
    while pending:
        drawn: dict[int, Scene] = {}
        for index, attempt in pending.items():
            scene = None
            while scene is None:
                assert attempt < _ATTEMPTS, f"no room for the objects of scene {index} of {split}, {num_objects=}"
                scene = sample_scene(index, split, style=style, num_objects=num_objects, seed=seed, attempt=attempt)
                attempt += 1
            drawn[index], pending[index] = scene, attempt
        batch = SceneBatch(list(drawn.values()), size, "cpu")
        masks, silhouette = batch.masks()
        width = batch.slots + 1
        flat = masks.flatten(1) + torch.arange(len(drawn))[:, None] * width
        visible = torch.bincount(flat.flatten(), minlength=len(drawn) * width).view(-1, width)[:, 1:]
        visible = visible[batch.scene, batch.slot]
        shrink = torch.tensor([_shrink(len(scene.objects)) for scene in drawn.values()])[batch.scene]
        area, part = (_MIN_AREA * size**2 * shrink * shrink).clamp_min(1), _MIN_VISIBLE[style] * shrink
        enough = (visible >= area) & (visible >= part * silhouette)
        cut = (masks[:, [0, -1]].amax((1, 2)) | masks[:, :, [0, -1]].amax((1, 2))) > 0  # by the border of the image
        failed = {*batch.scene[~enough].tolist(), *cut.nonzero()[:, 0].tolist()}
        for number, (index, scene) in enumerate(drawn.items()):
            if number not in failed:
                accepted[index] = scene, masks[number]
                del pending[index]
    return [accepted[index] for index in indices]


# ---------------------------------------------------------------------------------------------------------------------
# Annotations


def _describe_objects(scene: Scene, mask: np.ndarray) -> list[dict]:
    """The records of the column `objects`."""
    records = []
    for i, o in enumerate(scene.objects):
        rows, columns = np.nonzero(mask == i + 1)
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
                "box": [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1],
                "visible_pixels": len(rows),
                "relations": {
                    "left": [j for j, offset in enumerate(aside) if offset < -_GAP],
                    "right": [j for j, offset in enumerate(aside) if offset > _GAP],
                    "front": [j for j, offset in enumerate(beyond) if offset < -_GAP],
                    "behind": [j for j, offset in enumerate(beyond) if offset > _GAP],
                },
            }
        )
    return records


def _noun(record: dict, attributes: Sequence[str], count: int = 1) -> str:
    """Such as "large red metal spheres"; shapes that are not named are objects."""
    words = [record[a] for a in ("size", "color", "material") if a in attributes]
    return " ".join([*words, record["shape"] if "shape" in attributes else "object"]) + "s" * (count != 1)


def _number(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def _phrases(records: list[dict], rng: random.Random) -> list[dict]:
    """Phrases with the objects that they refer to: all those of which they are true, and at least one."""
    everything = range(len(records))
    phrases: dict[str, list[int]] = {}

    def matches(record: dict, attributes: Sequence[str]) -> list[int]:
        return [i for i in everything if all(records[i][a] == record[a] for a in attributes)]

    def add(record: dict, attributes: Sequence[str], indices: list[int], before: str = "", after: str = "") -> None:
        several = "both" if len(indices) == 2 else pick(rng, ("all", f"the {_number(len(indices))}"))
        article = "the" if len(indices) == 1 else several
        words = (article, before, _noun(record, attributes, len(indices)), after)
        phrases[" ".join(word for word in words if word)] = indices

    def shortest(i: int) -> Sequence[str] | None:
        """Fewest attributes that tell an object from all others."""
        unique = [attributes for attributes in _SUBSETS if len(matches(records[i], attributes)) == 1]
        return pick(rng, [a for a in unique if len(a) == len(unique[0])]) if unique else None

    names = [shortest(i) for i in everything]
    for i, record in enumerate(records):
        add(record, ATTRIBUTES, matches(record, ATTRIBUTES))
        if names[i] is not None:
            add(record, names[i], [i])
    for _ in everything:  # some groups, and some places relative to another object
        record, attributes = pick(rng, records), pick(rng, _SUBSETS)
        add(record, attributes, matches(record, attributes))
        direction, other = pick(rng, DIRECTIONS), pick(rng, everything)
        found = [i for i in matches(record, attributes) if i in records[other]["relations"][direction]]
        if found and names[other] is not None:
            after = f"{_RELATION_WORDS[direction]} the {_noun(records[other], names[other])}"
            add(record, attributes, found, after=after)
    direction, attributes = pick(rng, ("left", "right")), pick(rng, ((), ("shape",)))
    group = matches(pick(rng, records), attributes)
    extreme = [i for i in group if set(group) - {i} <= {j for j in group if i in records[j]["relations"][direction]}]
    if len(group) > 1 and extreme:
        add(records[extreme[0]], attributes, extreme, before=f"{direction}most")
    return [{"phrase": phrase, "object_indices": indices} for phrase, indices in phrases.items()]


def _listing(nouns: Sequence[str]) -> str:
    """Such as "two red cubes, a gray cone and an object", where each noun is a singular."""
    counts = {noun: nouns.count(noun) for noun in nouns}
    items = [f"a {noun}" if n == 1 else f"{_number(n)} {noun}s" for noun, n in counts.items()]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _caption(scene: Scene, records: list[dict], rng: random.Random) -> str:
    """One sentence about all objects."""
    attributes = pick(
        rng, (ATTRIBUTES, ATTRIBUTES, ("color", "shape"), ("size", "color", "shape"), ("color", "material", "shape"))
    )
    nouns = [_noun(record, attributes) for record in records]
    ground = "gray" if scene.ground.material == "rubber" else scene.ground.material
    first = pick(rng, range(len(records)))
    direction = pick(rng, DIRECTIONS)
    others = records[first]["relations"][direction]
    template = pick(rng, ("stand", "picture", "relation", "relation"))
    if template == "relation" and others:
        second = pick(rng, others)  # the relations list what is, for example, left of the first
        rest = [noun for i, noun in enumerate(nouns) if i not in (first, second)]
        article = "another" if nouns[second] == nouns[first] else "a"
        place = {"left": "to the left of", "right": "to the right of"}.get(direction, _RELATION_WORDS[direction])
        end = f", with {_listing(rest)} nearby" if rest else ""
        return f"A {nouns[second]} stands {place} {article} {nouns[first]}{end}."
    if template == "picture":
        return f"A picture of {_listing(nouns)} on a {ground} floor."
    listing = _listing(nouns)
    return f"{listing[0].upper()}{listing[1:]} {'stands' if len(nouns) == 1 else 'stand'} on a {ground} floor."


def _examples(
    indices: range, split: str, style: str, size: int, num_objects: tuple[int, int], seed: int
) -> list[dict]:
    drawn = _visible_scenes(indices, split, style, size, num_objects, seed)
    images = shade(SceneBatch([scene for scene, _ in drawn], size, "cpu")).numpy()
    examples = []
    for index, (scene, mask), image in zip(indices, drawn, images, strict=True):
        mask = mask.numpy()
        records = _describe_objects(scene, mask)
        rng = random.Random(f"hf_dl.scenes words {style} {seed} {split} {index}")
        examples.append(
            {
                "image": encode_png(image),
                "mask": encode_png(mask),
                "objects": records,
                "caption": _caption(scene, records, rng),
                "phrases": _phrases(records, rng),
            }
        )
    return examples


def _generate(shards: list[tuple[int, int]], version: int, **arguments) -> Iterator[dict]:
    step = chunk_size(arguments["size"])
    chunks = [range(i, min(i + step, last)) for first, last in shards for i in range(first, last, step)]
    threads = torch.get_num_threads()
    if threads == 1:
        for chunk in chunks:
            yield from _examples(chunk, **arguments)
        return
    # a thread a chunk: torch's own threads cost more than they bring at this size of tensors
    workers = min(threads, 4)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            jobs: deque[Future] = deque()
            for chunk in chunks:
                jobs.append(pool.submit(_examples, chunk, **arguments))
                if len(jobs) > workers:
                    yield from jobs.popleft().result()
            while jobs:
                yield from jobs.popleft().result()
    finally:
        torch.set_num_threads(threads)  # what the workers set is also the default of threads to come


FEATURES = datasets.Features({
    "image": datasets.Image(),
    "mask": datasets.Image(),
    "objects": datasets.List({
        "shape": datasets.Value("string"),
        "material": datasets.Value("string"),
        "color": datasets.Value("string"),
        "size": datasets.Value("string"),
        "radius": datasets.Value("float64"),
        "rotation": datasets.Value("float64"),
        "position": datasets.List(datasets.Value("float64"), length=3),
        "pixel_position": datasets.List(datasets.Value("float64"), length=2),
        "depth": datasets.Value("float64"),
        "box": datasets.List(datasets.Value("int32"), length=4),
        "visible_pixels": datasets.Value("int32"),
        "relations": {direction: datasets.List(datasets.Value("int32")) for direction in DIRECTIONS},
    }),
    "caption": datasets.Value("string"),
    "phrases": datasets.List({
        "phrase": datasets.Value("string"),
        "object_indices": datasets.List(datasets.Value("int32")),
    }),
})  # fmt: skip


def load(
    split: str = "train",
    source: str = "synthetic",
    *,
    style: str = "plain",
    size: int = 64,
    num_objects: tuple[int, int] = (2, 4),
    num_scenes: int | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Scenes of simple objects with masks, boxes, relations, captions and phrases.

    Args:
        split: "train", "validation" or "test": different scenes by construction.
        source: "synthetic", the only one; `hf_dl.data.masked_images` reads real data of this kind.
        style: "plain" in the manner of CLEVR or "textured" in that of CLEVRTex.
        size: Width and height of the images in pixels, 32 to 256.
        num_objects: Smallest and largest number of objects of a scene.
        num_scenes: How many scenes; 8000 of train and 500 of the others where None. A longer dataset starts with
            the scenes of a shorter one.
        seed: Other seeds give other scenes.
        streaming: Render while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns of `FEATURES`: `image` (RGB), `mask` (8-bit, 0 = ground, i = objects[i - 1]),
        `objects`, `caption` and `phrases`. Boxes are x0, y0, x1, y1 of the visible part in pixels, half-open.

    Raises:
        ValueError: An argument is outside of what is described above.

    Example:
        >>> from hf_dl.data import scenes
        >>> dataset = scenes.load("validation", num_scenes=8)
        >>> dataset[0]["image"].size
        (64, 64)
    """
    if source != "synthetic":
        raise ValueError(
            f"source={source!r} is unknown; scenes are 'synthetic', hf_dl.data.masked_images reads real images."
        )
    for name, value, known in (("split", split, SPLITS), ("style", style, STYLES)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    if not 32 <= size <= 256:
        raise ValueError(f"size={size} is out of range; images are 32 to 256 pixels wide and high.")
    low, high = num_objects
    if not 1 <= low <= high <= _MAX_OBJECTS:
        raise ValueError(
            f"num_objects={tuple(num_objects)} is not a range of objects for which there is room; give (smallest, "
            f"largest) with 1 <= smallest <= largest <= {_MAX_OBJECTS}."
        )
    num_scenes = SPLITS[split] if num_scenes is None else num_scenes
    if num_scenes < 1:
        raise ValueError(f"num_scenes={num_scenes} is too small; ask for at least 1.")
    shards = [(start, min(start + 256, num_scenes)) for start in range(0, num_scenes, 256)]
    arguments = {
        "shards": shards,
        "split": split,
        "style": style,
        "size": size,
        "num_objects": (low, high),
        "seed": seed,
        "version": _VERSION,
    }
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    return kind.from_generator(_generate, features=FEATURES, gen_kwargs=arguments, split=datasets.NamedSplit(split))
