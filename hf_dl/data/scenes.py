"""Ray-cast 3-D scenes on a ground plane, in the manner of CLEVR and CLEVRTex, rendered in torch.

The embedded data of this package: nothing is downloaded, every scene is a function of (seed, split, index), and every
annotation is exact because it comes from the geometry that was rendered.

* `load` gives a `datasets.Dataset` (or a streaming one) with images, instance masks, objects, captions and phrases.
* `sample_scene` draws the description of one scene; `render` turns descriptions into images and masks.

After CLEVR (Johnson et al. 2017, https://arxiv.org/abs/1612.06890) and CLEVRTex (Karazija et al. 2021,
https://arxiv.org/abs/2111.10265). Different from both: a closed-form ray caster instead of Blender, cones as a fourth
shape, square images, and soft shadows of one key light.

World axes: x and y span the ground, z is up, the ground is z = 0; lengths are in units of CLEVR's scenes (the camera
stands about 11 away and sees about 6 across). A pixel (column i, row j) covers [i, i + 1) x [j, j + 1).

A scene's pixels do not depend on what else is in its batch: on the CPU all arithmetic between the description and
the pixels is IEEE-exact elementwise (+, -, *, /, sqrt, comparisons and table look-ups; no matmul, no exp), so
chunks, workers and streaming give the same bytes.
"""

from __future__ import annotations

import colorsys
import io
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import datasets
import numpy as np
import torch
from PIL import Image

from .materials import TEXTURES
from .raycast import _HALF_FOV, RGB, SHAPES, Scene, SceneObject, Surface, _Batch, _shade, chunk_size

SPLITS = {"train": 8000, "validation": 500, "test": 500}
STYLES = ("plain", "textured")
COLORS = {  # sRGB of CLEVR
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
SIZES = {"plain": {"small": 0.5, "large": 0.85}, "textured": {"small": 0.45, "medium": 0.65, "large": 0.9}}
MATERIALS = {"plain": ("rubber", "metal"), "textured": tuple(TEXTURES)}
DIRECTIONS = ("left", "right", "front", "behind")

_VERSION = 1  # bump with any change of the pixels or columns: `datasets` caches by arguments, not by this code
_GAP = 0.25  # smallest distance between footprints, and the offset from which one object is left of another
_MIN_AREA = 0.003  # smallest visible part of an object, as a fraction of the image
_MIN_VISIBLE = {"plain": 0.7, "textured": 0.4}  # smallest visible fraction of an object's own silhouette
_ATTEMPTS = 200


def _to_linear(rgb: Sequence[int]) -> tuple[float, float, float]:
    srgb = [c / 255 for c in rgb]
    return tuple(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in srgb)


_LINEAR = {name: _to_linear(rgb) for name, rgb in COLORS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Drawing a scene


def _uniform(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _pick(rng: random.Random, options: Sequence):
    # random.choice has changed between versions of Python; random.random has not
    return options[int(rng.random() * len(options))]


def _draw_surface(rng: random.Random, material: str, color: RGB) -> Surface:
    if material not in TEXTURES:
        return Surface(material, color)
    # the accent has no hue of its own, or the name of the colour would be open to dispute
    dark = tuple(0.18 * c + 0.01 for c in color)
    light = tuple(0.25 * c + 0.55 for c in color)
    brightness = 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2]
    accent = dark if brightness > 0.3 else light if brightness < 0.05 else _pick(rng, (dark, light))
    return Surface(material, color, accent, _uniform(rng, 1.0, 1.5), tuple(_uniform(rng, 0, 32) for _ in range(3)))


def _draw_ground(rng: random.Random, style: str) -> Surface:
    gray = _uniform(rng, 0.42, 0.52)
    if style == "plain":
        return Surface("rubber", (gray * _uniform(rng, 0.97, 1.03), gray, gray * _uniform(rng, 0.97, 1.03)))
    colors = [
        _to_linear([255 * c for c in colorsys.hsv_to_rgb(rng.random(), _uniform(rng, 0.08, 0.4), value)])
        for value in (_uniform(rng, 0.35, 0.75), _uniform(rng, 0.35, 0.75))
    ]
    offset = tuple(_uniform(rng, 0, 32) for _ in range(3))
    return Surface(_pick(rng, tuple(TEXTURES)), *colors, _uniform(rng, 0.5, 0.9), offset)


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
    stream = f"hf_dl.scenes {_VERSION} {style} {seed} {split} {index}"
    low, high = num_objects
    # drawn once per scene: redrawing it with each attempt would favour small numbers, which are rejected less
    count = low + int(random.Random(stream).random() * (high - low + 1))
    rng = random.Random(f"{stream} {attempt}")
    azimuth = _uniform(rng, -102, -78)
    ground = _draw_ground(rng, style)
    scene = Scene(
        objects=(),
        azimuth=azimuth,
        elevation=_uniform(rng, 29, 35),
        distance=_uniform(rng, 11.0, 12.0),
        target=(_uniform(rng, -0.15, 0.15), _uniform(rng, -0.1, 0.2), _uniform(rng, 0.2, 0.4)),
        light_azimuth=azimuth - _uniform(rng, 20, 75),
        light_elevation=_uniform(rng, 44, 60),
        ground=ground,
    )
    eye, right, up, forward = scene.camera()
    depth_axis = (-right[1], right[0])  # away from the camera, on the ground
    shrink = min(1.0, math.sqrt(10 / count))  # crowds are made of smaller objects, or they would not fit
    objects: list[SceneObject] = []
    for _ in range(count):
        size = _pick(rng, tuple(SIZES[style]))
        radius = SIZES[style][size] * shrink
        shape, material, color = _pick(rng, SHAPES), _pick(rng, MATERIALS[style]), _pick(rng, tuple(COLORS))
        rotation = _uniform(rng, 0, 360)
        surface = _draw_surface(rng, material, _LINEAR[color])
        draft = SceneObject(shape, color, size, radius, rotation, (0.0, 0.0, 0.0), surface)
        height = draft.extent[1]
        for _ in range(30):
            across, away = _uniform(rng, -2.8, 2.8), _uniform(rng, -2.8, 3.6)
            x, y = (across * right[i] + away * depth_axis[i] for i in (0, 1))
            rel = (x - eye[0], y - eye[1], height - eye[2])
            depth = sum(r * f for r, f in zip(rel, forward, strict=True))
            sideways = abs(sum(r * a for r, a in zip(rel, right, strict=True)))
            vertical = abs(sum(r * a for r, a in zip(rel, up, strict=True)))
            if max(sideways, vertical) + 1.05 * radius > 0.97 * _HALF_FOV * depth:
                continue
            if all(math.dist((x, y), o.position[:2]) > radius + o.radius + _GAP * shrink for o in objects):
                objects.append(replace(draft, position=(x, y, height)))
                break
        else:
            return None
    return replace(scene, objects=tuple(objects))


def _visible_scenes(
    indices: Sequence[int], split: str, style: str, size: int, num_objects: tuple[int, int], seed: int
) -> list[tuple[Scene, torch.Tensor]]:
    """For each index the first attempt in which every object is sufficiently visible, and its mask."""
    accepted: dict[int, tuple[Scene, torch.Tensor]] = {}
    pending = dict.fromkeys(indices, 0)  # index -> attempt
    while pending:
        drawn: dict[int, Scene] = {}
        for index, attempt in pending.items():
            scene = None
            while scene is None:
                if attempt >= _ATTEMPTS:
                    raise ValueError(
                        f"num_objects={num_objects} cannot be placed visibly in a {size}x{size} image: scene {index} "
                        f"of {split!r} failed {_ATTEMPTS} times; use fewer objects or a larger size."
                    )
                scene = sample_scene(index, split, style=style, num_objects=num_objects, seed=seed, attempt=attempt)
                attempt += 1
            drawn[index], pending[index] = scene, attempt
        batch = _Batch(list(drawn.values()), size, "cpu")
        masks, silhouette = batch.masks()
        width = batch.slots + 1
        flat = masks.flatten(1) + torch.arange(len(drawn))[:, None] * width
        visible = torch.bincount(flat.flatten(), minlength=len(drawn) * width).view(-1, width)[:, 1:]
        visible = visible[batch.scene, batch.slot]
        enough = (visible >= _MIN_AREA * size**2) & (visible >= _MIN_VISIBLE[style] * silhouette)
        failed = set(batch.scene[~enough].tolist())
        for number, (index, scene) in enumerate(drawn.items()):
            if number not in failed:
                accepted[index] = scene, masks[number]
                del pending[index]
    return [accepted[index] for index in indices]


# ---------------------------------------------------------------------------------------------------------------------
# Annotations


def _describe_objects(scene: Scene, mask: np.ndarray) -> list[dict]:
    size = mask.shape[0]
    _, right, _, _ = scene.camera()
    axes = {"right": right[:2], "behind": (-right[1], right[0])}
    axes |= {"left": tuple(-a for a in axes["right"]), "front": tuple(-a for a in axes["behind"])}
    records = []
    for i, o in enumerate(scene.objects):
        rows, columns = np.nonzero(mask == i + 1)
        x, y, depth = scene.project(o.position, size)
        relations = {
            direction: [
                j
                for j, other in enumerate(scene.objects)
                if sum(
                    (q - p) * axes[direction][k]
                    for k, (p, q) in enumerate(zip(o.position[:2], other.position[:2], strict=True))
                )
                > _GAP
            ]
            for direction in DIRECTIONS
        }
        records.append({
            "shape": o.shape, "material": o.surface.material, "color": o.color, "size": o.size, "radius": o.radius,
            "rotation": o.rotation, "position": list(o.position), "pixel_position": [x, y], "depth": depth,
            "box": [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1],
            "visible_pixels": len(rows), "relations": relations,
        })  # fmt: skip
    return records


ATTRIBUTES = ("size", "color", "material", "shape")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_RELATION_WORDS = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}


def _words(record: dict, attributes: Sequence[str]) -> str:
    """Such as "large red metal sphere"; "object" stands for a shape that is not named."""
    return " ".join(record[a] for a in ATTRIBUTES[:3] if a in attributes) + (
        " " + (record["shape"] if "shape" in attributes else "object")
    )


def _matching(records: list[dict], record: dict, attributes: Sequence[str]) -> list[int]:
    return [i for i, r in enumerate(records) if all(r[a] == record[a] for a in attributes)]


def _phrases(records: list[dict], rng: random.Random) -> list[dict]:
    phrases: dict[str, list[int]] = {}

    def add(words: str, indices: list[int]) -> None:
        words = " ".join(words.split())
        phrases[f"the {words}" if len(indices) == 1 else f"all {words}"] = indices

    for record in records:
        subsets = [ATTRIBUTES] + [tuple(a for a in ATTRIBUTES if rng.random() < 0.5) for _ in range(2)]
        for subset in subsets:
            found = _matching(records, record, subset)
            plural = "" if len(found) == 1 else "s"
            add(_words(record, subset) + plural, found)
    return [{"phrase": phrase, "object_indices": indices} for phrase, indices in phrases.items()]


def _caption(records: list[dict], rng: random.Random) -> str:
    names = [f"a{'n' if r['size'][0] in 'aeiou' else ''} {_words(r, ATTRIBUTES)}" for r in records]
    listed = ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
    return _pick(rng, ("{}.", "A picture of {}.", "There {verb} {}.")).format(
        listed, verb="is" if len(names) == 1 else "are"
    )


def _png(array: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def _generate(
    shards: list[tuple[int, int]],
    split: str,
    style: str,
    size: int,
    num_objects: tuple[int, int],
    seed: int,
    version: int,
) -> Iterator[dict]:
    for first, last in shards:
        for start in range(first, last, chunk_size(size)):
            indices = range(start, min(start + chunk_size(size), last))
            drawn = _visible_scenes(indices, split, style, size, num_objects, seed)
            batch = _Batch([scene for scene, _ in drawn], size, "cpu")
            images = _shade(batch).numpy()
            for index, (scene, mask), image in zip(indices, drawn, images, strict=True):
                mask = mask.numpy()
                records = _describe_objects(scene, mask)
                rng = random.Random(f"words {seed} {split} {index}")
                caption, phrases = _caption(records, rng), _phrases(records, rng)
                yield {
                    "image": _png(image),
                    "mask": _png(mask),
                    "objects": records,
                    "caption": caption,
                    "phrases": phrases,
                }


FEATURES = datasets.Features({
    "image": datasets.Image(),
    "mask": datasets.Image(),
    "objects": datasets.List({
        "shape": datasets.Value("string"),
        "material": datasets.Value("string"),
        "color": datasets.Value("string"),
        "size": datasets.Value("string"),
        "radius": datasets.Value("float32"),
        "rotation": datasets.Value("float32"),
        "position": datasets.List(datasets.Value("float32"), length=3),
        "pixel_position": datasets.List(datasets.Value("float32"), length=2),
        "depth": datasets.Value("float32"),
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
        source: "synthetic", the only one; real data of this kind is read by `hf_dl.data.clevrtex`.
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
            f"source={source!r} is unknown; scenes are 'synthetic', others are read by hf_dl.data.clevrtex."
        )
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown; choose one of {', '.join(STYLES)}.")
    if not 32 <= size <= 256:
        raise ValueError(f"size={size} is out of range; images are 32 to 256 pixels wide and high.")
    low, high = num_objects
    if not 1 <= low <= high:
        raise ValueError(
            f"num_objects={num_objects} is not a range; give (smallest, largest) with 1 <= smallest <= largest."
        )
    if high > 32:
        raise ValueError(f"num_objects={num_objects} asks for more than 32 objects, for which there is no room.")
    num_scenes = SPLITS[split] if num_scenes is None else num_scenes
    if num_scenes < 1:
        raise ValueError(f"num_scenes={num_scenes} must be at least 1.")
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
