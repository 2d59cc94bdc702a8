"""Generated labeled images: each shows one textured object on a ground with another texture.

The class is the shape and material of the object, and its color for 100 classes. Position, size, rotation, light and
ground vary within a class.

* 25 classes: 5 shapes x 5 materials, such as "striped cone". The fifth shape, a disc, is a flat cylinder.
* 100 classes: the same x 4 colors, such as "red striped cone". Class c of the 100 belongs to class c // 4 of the 25.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import datasets

from .generation import counted, row_bar
from .materials import TEXTURES
from .png import encode_png
from .raycast import chunk_size, render
from .scene_description import Scene, SceneObject, Surface
from .surfaces import COLORS, LINEAR_COLORS, draw_ground, draw_surface, pick, uniform

SPLITS = {"train": 10_000, "validation": 1000, "test": 2000}  # default numbers of images
SHAPES = ("sphere", "cube", "cylinder", "cone", "disc")
MATERIALS = ("checkered", "striped", "dotted", "brick", "marble")
CLASS_COLORS = ("red", "green", "blue", "yellow")
CLASSES = {  # by number of classes
    25: tuple(f"{material} {shape}" for shape in SHAPES for material in MATERIALS),
    100: tuple(f"{c} {material} {shape}" for shape in SHAPES for material in MATERIALS for c in CLASS_COLORS),
}

_VERSION = 1  # increase it when pixels or columns change: `datasets` caches by arguments, not by code
_GROUNDS = tuple(name for name in TEXTURES if name not in MATERIALS)
_SHARD = 512  # rows that are rendered together


def load(
    split: str = "train",
    source: str = "synthetic",
    *,
    size: int = 64,
    num_classes: int = 25,
    num_images: int | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Generate labeled images of one object each.

    Args:
        split: "train", "validation" or "test". Each split draws different images.
        source: Only "synthetic". `hf_dl.data.labeled_images` reads other sources.
        size: Width and height of the images in pixels, 32 to 256.
        num_classes: Number of classes, 25 or 100.
        num_images: Number of images. Defaults to the count in `SPLITS`. A longer dataset starts with the images of a
            shorter one.
        seed: Seed of the whole dataset.
        streaming: Render while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns `image` (RGB), `mask` (8-bit, 1 on the object) and `label` (`ClassLabel`).

    Raises:
        ValueError: If an argument is not one of the values above.

    Example:
        >>> from hf_dl.data import object_images
        >>> object_images.load("test", num_images=25, size=32).features["label"].names[1]
        'striped sphere'
    """
    for name, value, known in (("split", split, SPLITS), ("source", source, ("synthetic",))):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    if num_classes not in CLASSES:
        raise ValueError(f"num_classes={num_classes} is unknown; choose one of {', '.join(map(str, CLASSES))}.")
    if not 32 <= size <= 256:
        raise ValueError(f"size={size} must be from 32 to 256 pixels for synthetic images.")
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images={num_images} must be at least 1.")
    count = SPLITS[split] if num_images is None else num_images
    arguments = {
        "shards": [(start, min(start + _SHARD, count)) for start in range(0, count, _SHARD)],
        "split": split,
        "size": size,
        "num_classes": num_classes,
        "seed": seed,
        "version": _VERSION,
    }
    features = datasets.Features(
        image=datasets.Image(), mask=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES[num_classes]))
    )
    options = {"features": features, "gen_kwargs": arguments, "split": datasets.NamedSplit(split)}
    if streaming:
        return datasets.IterableDataset.from_generator(_render, **options)
    with row_bar(count, f"Rendering {split} images"):
        return datasets.Dataset.from_generator(_render, **options)


class _Disc(SceneObject):
    """A flat cylinder. The ray caster scales its unit shapes to any extent."""

    @property
    def extent(self) -> tuple[float, float]:
        return self.radius, 0.3 * self.radius


def _label(index: int, split: str, num_classes: int, seed: int) -> int:
    """Return the class of an image. Each class occurs once in every `num_classes` images."""
    block, place = divmod(index, num_classes)
    # the seed strings here and below determine all images: a change of them needs a new _VERSION
    rng = random.Random(f"hf_dl.images order {num_classes} {seed} {split} {block}")
    return sorted(range(num_classes), key=lambda _: rng.random())[place]


def sample_scene(index: int, split: str = "train", *, num_classes: int = 25, seed: int = 0) -> tuple[Scene, int]:
    """Draw the description of one image. The result depends on the arguments only.

    Args:
        index: Index of the image in its split.
        split: Name of the split. Each split uses its own random stream.
        num_classes: 25 or 100.
        seed: Seed of the whole dataset.

    Returns:
        The scene with one object, and its class.
    """
    label = _label(index, split, num_classes, seed)
    rng = random.Random(f"hf_dl.images {num_classes} {seed} {split} {index}")
    *color, material, shape = CLASSES[num_classes][label].split()
    color = color[0] if color else pick(rng, tuple(COLORS))
    surface = draw_surface(rng, material, LINEAR_COLORS[color])
    radius = uniform(rng, 0.65, 0.95)
    kind, shape = (_Disc, "cylinder") if shape == "disc" else (SceneObject, shape)
    draft = kind(shape, color, "medium", radius, uniform(rng, 0, 360), (0, 0, 0), surface)
    position = (uniform(rng, -0.4, 0.4), uniform(rng, -0.4, 0.4), draft.extent[1])
    ground = draw_ground(rng, "textured")
    if ground.material in MATERIALS:  # the materials of the classes occur on objects only
        ground = Surface(pick(rng, _GROUNDS), ground.color, ground.accent, ground.scale, ground.offset)
    scene = Scene(
        objects=(kind(shape, color, "medium", radius, draft.rotation, position, surface),),
        elevation=uniform(rng, 22, 40),
        distance=uniform(rng, 5.5, 6.5),
        target=(0.0, 0.0, uniform(rng, 0.35, 0.6)),
        light_azimuth=uniform(rng, 190, 260),
        light_elevation=uniform(rng, 44, 60),
        ground=ground,
        ground_rotation=uniform(rng, 0, 360),
    )
    return scene, label


@counted
def _render(
    shards: list[tuple[int, int]], split: str, size: int, num_classes: int, seed: int, version: int
) -> Iterator[dict]:
    step = chunk_size(size)
    for first, last in shards:
        for start in range(first, last, step):
            drawn = [
                sample_scene(i, split, num_classes=num_classes, seed=seed)
                for i in range(start, min(start + step, last))
            ]
            pictures, masks = render([scene for scene, _ in drawn], size)
            for (_, label), picture, mask in zip(drawn, pictures.numpy(), masks.numpy(), strict=True):
                yield {"image": encode_png(picture), "mask": encode_png(mask), "label": label}
