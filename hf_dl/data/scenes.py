"""Generated scenes of several 3-D objects on a ground plane, similar to CLEVR and CLEVRTex.

Nothing is downloaded. Each scene depends on (seed, split, index) only, and all annotations are exact, because they
come from the rendered geometry.

* `load` returns a dataset with images, instance masks, objects, captions, phrases and descriptions of the scenes.
* `sample_scene` draws the description of one scene, and `render` renders descriptions to images and masks.
* `counterfactual` renders a scene again without an object, or with an object moved, recolored, replaced or inserted.

The scenes follow CLEVR (Johnson et al. 2017, https://arxiv.org/abs/1612.06890) and CLEVRTex (Karazija et al. 2021,
https://arxiv.org/abs/2111.10265). Differences from both: a ray caster in torch instead of Blender, cones as a fourth
shape, square images, and one key light with soft shadows. `hf_dl.data.raycast` describes the rendering.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import datasets
import torch

from .counterfactual import counterfactual, counterfactuals, ground_position
from .generation import counted, row_bar
from .materials import TEXTURES
from .png import encode_png
from .raycast import chunk_size, render, shade
from .raycast_geometry import SceneBatch
from .scene_annotations import DIRECTIONS, GAP, annotate
from .scene_description import HALF_FOV, SHAPES, Scene, SceneObject, Surface
from .surfaces import COLORS, LINEAR_COLORS, draw_ground, draw_surface, pick, uniform

SPLITS = {"train": 8000, "validation": 500, "test": 500}
STYLES = ("plain", "textured")
__all__ = [
    "Scene",
    "SceneObject",
    "Surface",
    "counterfactual",
    "counterfactuals",
    "ground_position",
    "load",
    "render",
    "sample_scene",
]

SIZES = {"plain": {"small": 0.5, "large": 0.85}, "textured": {"small": 0.45, "medium": 0.65, "large": 0.9}}
MATERIALS = {"plain": ("rubber", "metal"), "textured": tuple(TEXTURES)}

VERSION = 6  # increase it when pixels or columns change: `datasets` caches by arguments, not by code
_MIN_AREA = 0.003  # smallest visible area of an object, as a fraction of the image
_MIN_VISIBLE = {"plain": 0.7, "textured": 0.4}  # smallest visible fraction of an object
_ATTEMPTS = 1000
_MAX_OBJECTS = 32


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
    object_scale: float = 1.0,
) -> Scene | None:
    """Draw the description of one scene. The result depends on the arguments only.

    Args:
        index: Index of the scene in its split.
        split: Name of the split. Each split uses its own random stream.
        style: One of `STYLES`.
        num_objects: Smallest and largest number of objects.
        seed: Seed of the whole dataset.
        attempt: Index of the attempt. `load` tries again until every object is sufficiently visible.
        object_scale: Factor for the size of the objects if there are one or two. More objects grow less.

    Returns:
        The scene, or None if this attempt found no space for all objects.
    """
    stream = f"hf_dl.scenes {style} {seed} {split} {index}"
    low, high = num_objects
    # drawn once per scene: a new draw per attempt would favor small counts, which are rejected less often
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
    scale = shrink * max(1.0, object_scale * min(1.0, math.sqrt(2 / count)))
    objects: list[SceneObject] = []
    for _ in range(count):
        size, shape = pick(rng, tuple(SIZES[style])), pick(rng, SHAPES)
        material, color = pick(rng, MATERIALS[style]), pick(rng, tuple(COLORS))
        surface = draw_surface(rng, material, LINEAR_COLORS[color])
        draft = SceneObject(shape, color, size, SIZES[style][size] * scale, uniform(rng, 0, 360), (0, 0, 0), surface)
        for _ in range(30):
            item = replace(draft, position=(uniform(rng, -2.8, 2.8), uniform(rng, -2.8, 3.6), draft.extent[1]))
            if has_room(scene, item, objects, gap=GAP * shrink):
                objects.append(item)
                break
        else:
            return None
    return replace(scene, objects=tuple(objects))


def has_room(scene: Scene, item: SceneObject, others: Sequence[SceneObject], *, gap: float = 0.0) -> bool:
    """Return whether an object lies inside the image, and at least `gap` away from other objects."""
    x, y, depth = scene.project(item.position, 2)  # the image is 2 wide: coordinates from 0 to 2
    inside = max(abs(x - 1), abs(y - 1)) + 1.05 * item.radius / (depth * HALF_FOV) < 0.97
    return inside and all(math.dist(item.position[:2], o.position[:2]) > item.radius + o.radius + gap for o in others)


def _shrink(count: int) -> float:
    """Return the factor that makes many objects small enough to fit into a scene."""
    return min(1.0, math.sqrt(7 / count))


def check_visible(drawn: Sequence[Scene], style: str, size: int) -> tuple[torch.Tensor, list[bool]]:
    """Render masks, and test whether all objects are sufficiently visible.

    Args:
        drawn: Scenes with at least one object each.
        style: One of `STYLES`; it sets the smallest visible part of an object.
        size: Width and height of the masks in pixels.

    Returns:
        The masks (scenes, size, size), and for each scene whether all of its objects are inside the image and visible.
    """
    batch = SceneBatch(drawn, size, "cpu")
    masks, silhouette = batch.masks()
    width = batch.slots + 1
    flat = masks.flatten(1) + torch.arange(len(drawn))[:, None] * width
    visible = torch.bincount(flat.flatten(), minlength=len(drawn) * width).view(-1, width)[:, 1:]
    visible = visible[batch.scene, batch.slot]
    shrink = torch.tensor([_shrink(len(scene.objects)) for scene in drawn])[batch.scene]
    area, part = (_MIN_AREA * size**2 * shrink * shrink).clamp_min(1), _MIN_VISIBLE[style] * shrink
    enough = (visible >= area) & (visible >= part * silhouette)
    cut = (masks[:, [0, -1]].amax((1, 2)) | masks[:, :, [0, -1]].amax((1, 2))) > 0  # at the border of the image
    failed = {*batch.scene[~enough].tolist(), *cut.nonzero()[:, 0].tolist()}
    return masks, [number not in failed for number in range(len(drawn))]


def visible_scenes(
    indices: Sequence[int],
    split: str,
    style: str,
    size: int,
    num_objects: tuple[int, int],
    seed: int,
    *,
    adapt: Callable[[int, Scene], Scene | None] | None = None,
    object_scale: float = 1.0,
) -> list[tuple[Scene, torch.Tensor]]:
    """Return for each index the first attempt with all objects inside the image and visible, and its mask.

    `adapt(index, scene)` changes the description of each attempt before it is rendered, or rejects it with None.
    """
    accepted: dict[int, tuple[Scene, torch.Tensor]] = {}
    pending = dict.fromkeys(indices, 0)  # index -> attempt
    while pending:
        drawn: dict[int, Scene] = {}
        for index, attempt in pending.items():
            scene = None
            while scene is None:
                assert attempt < _ATTEMPTS, f"no room for the objects of scene {index} of {split}, {num_objects=}"
                options = {"style": style, "num_objects": num_objects, "seed": seed, "object_scale": object_scale}
                scene = sample_scene(index, split, attempt=attempt, **options)
                if scene is not None and adapt is not None:
                    scene = adapt(index, scene)
                attempt += 1
            drawn[index], pending[index] = scene, attempt
        masks, fine = check_visible(list(drawn.values()), style, size)
        for number, (index, scene) in enumerate(drawn.items()):
            if fine[number]:
                accepted[index] = scene, masks[number]
                del pending[index]
    return [accepted[index] for index in indices]


# ---------------------------------------------------------------------------------------------------------------------
# The dataset


def _examples(
    indices: range,
    split: str,
    style: str,
    size: int,
    num_objects: tuple[int, int],
    seed: int,
    object_scale: float = 1.0,
) -> list[dict]:
    drawn = visible_scenes(indices, split, style, size, num_objects, seed, object_scale=object_scale)
    images = shade(SceneBatch([scene for scene, _ in drawn], size, "cpu")).numpy()
    return [
        {"image": encode_png(image), "mask": encode_png(mask.numpy()), **annotate(scene, mask.numpy())}
        for (scene, mask), image in zip(drawn, images, strict=True)
    ]


@counted
def _generate(shards: list[tuple[int, int]], version: int, **arguments) -> Iterator[dict]:
    step = chunk_size(arguments["size"])
    chunks = [range(i, min(i + step, last)) for first, last in shards for i in range(first, last, step)]
    yield from run_chunks(_examples, chunks, **arguments)


def run_chunks(make_rows: Callable[..., list[dict]], chunks: Iterable[range], **arguments) -> Iterator[dict]:
    """Yield the rows `make_rows(chunk, **arguments)` of all chunks in order, made with one thread per chunk."""
    threads = torch.get_num_threads()
    if threads == 1:
        for chunk in chunks:
            yield from make_rows(chunk, **arguments)
        return
    # one thread per chunk: threads inside of torch operations are slower for tensors of this size
    workers = min(threads, 4)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            jobs: deque[Future] = deque()
            for chunk in chunks:
                jobs.append(pool.submit(make_rows, chunk, **arguments))
                if len(jobs) > workers:
                    yield from jobs.popleft().result()
            while jobs:
                yield from jobs.popleft().result()
    finally:
        torch.set_num_threads(threads)  # the workers also change the default for new threads


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
    "scene": datasets.Value("string"),
})  # fmt: skip


def check_arguments(split: str, *, style: str, size: int, num_objects: Sequence[int], num_scenes: int) -> None:
    """Raise ValueError if an argument of `load` is out of range."""
    for name, value, known in (("split", split, SPLITS), ("style", style, STYLES)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    if not 32 <= size <= 256:
        raise ValueError(f"size={size} must be from 32 to 256 pixels.")
    low, high = num_objects
    if not 1 <= low <= high <= _MAX_OBJECTS:
        raise ValueError(
            f"num_objects={tuple(num_objects)} is invalid. Expected (smallest, largest) with 1 <= smallest <= largest "
            f"<= {_MAX_OBJECTS}."
        )
    if num_scenes < 1:
        raise ValueError(f"num_scenes={num_scenes} must be at least 1.")


def load(
    split: str = "train",
    source: str = "synthetic",
    *,
    style: str = "plain",
    size: int = 64,
    num_objects: tuple[int, int] = (2, 4),
    num_scenes: int | None = None,
    seed: int = 0,
    object_scale: float = 1.0,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Generate scenes with masks, boxes, relations, captions and phrases.

    Args:
        split: "train", "validation" or "test". Each split has different scenes.
        source: Only "synthetic". `hf_dl.data.masked_images` reads real images with masks.
        style: "plain", similar to CLEVR, or "textured", similar to CLEVRTex.
        size: Width and height of the images in pixels, 32 to 256.
        num_objects: Smallest and largest number of objects per scene.
        num_scenes: Number of scenes. Defaults to 8000 for "train" and 500 for the others. A longer dataset starts with
            the scenes of a shorter one.
        seed: Seed of the whole dataset.
        object_scale: Factor for the size of the objects if a scene has one or two, at least 1 and at most 1.6. More
            objects grow less.
        streaming: Render while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns of `FEATURES`: `image` (RGB), `mask` (8-bit, 0 = ground, i = objects[i - 1]),
        `objects`, `caption`, `phrases` and `scene`. Boxes are x0, y0, x1, y1 of the visible part in pixels, half-open.
        `scene` is a JSON string for `Scene.from_json`.

    Raises:
        ValueError: If an argument is not one of the values above.

    Example:
        >>> from hf_dl.data import scenes
        >>> dataset = scenes.load("validation", num_scenes=8)
        >>> dataset[0]["image"].size
        (64, 64)
    """
    if source != "synthetic":
        raise ValueError(
            f"source={source!r} is unknown; use 'synthetic'. hf_dl.data.masked_images reads real images with masks."
        )
    num_scenes = SPLITS.get(split, 1) if num_scenes is None else num_scenes
    check_arguments(split, style=style, size=size, num_objects=num_objects, num_scenes=num_scenes)
    if not 1 <= object_scale <= 1.6:
        raise ValueError(f"object_scale={object_scale} must be from 1 to 1.6.")
    shards = [(start, min(start + 256, num_scenes)) for start in range(0, num_scenes, 256)]
    arguments = {
        "shards": shards,
        "split": split,
        "style": style,
        "size": size,
        "num_objects": tuple(num_objects),
        "seed": seed,
        "version": VERSION,
        **({"object_scale": object_scale} if object_scale != 1 else {}),  # the cache of other scenes stays valid
    }
    options = {"features": FEATURES, "gen_kwargs": arguments, "split": datasets.NamedSplit(split)}
    if streaming:
        return datasets.IterableDataset.from_generator(_generate, **options)
    with row_bar(num_scenes, f"Rendering {split} scenes"):
        return datasets.Dataset.from_generator(_generate, **options)
