"""Images with captions: generated scenes with captions of three levels of detail, or real captioned images.

The captions of a generated scene contain more or less of its information. Contrastive training on poor captions keeps
images and texts apart, as Schrodi et al. (2025, https://arxiv.org/abs/2404.07983) explain:

* "rich" captions name all objects by color and shape, and sometimes by size and position;
* "partial" captions name one object by color and shape;
* "poor" captions name one object by its color or by its shape.

Some combinations of color and shape occur in the test split only, see `HELD_OUT`. They test whether a model combines
the words and looks that it knows.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import datasets

from .captioned_images import FEATURES, load_captioned
from .decoded_images import CORRUPT
from .generation import counted, row_bar
from .object_crops import CLASSES
from .png import encode_png
from .raycast import chunk_size, shade
from .raycast_geometry import SceneBatch
from .scene_annotations import find_box, listing
from .scene_description import SHAPES, Scene
from .scenes import check_arguments, has_room, run_chunks, visible_scenes
from .splits import Source
from .surfaces import COLORS, LINEAR_COLORS, pick, recolor

Combination = tuple[str, str]  # color and shape

SPLITS = {"train": 16000, "validation": 500, "test": 1000}  # default numbers of generated pairs
COMBINATIONS: tuple[Combination, ...] = tuple(tuple(name.split()) for name in CLASSES)
# six of 32: each color still occurs with three or four shapes, and each shape with six or seven colors
HELD_OUT: tuple[Combination, ...] = (
    ("red", "cube"),
    ("blue", "cylinder"),
    ("green", "sphere"),
    ("gray", "cone"),
    ("purple", "cube"),
    ("yellow", "cylinder"),
)

OBJECT_SCALE = 1.5  # objects are larger than in `scenes.load`: in 64x64 pixels, the shape of a small one is unclear

VERSION = 2  # increase it when pixels or columns change: `datasets` caches by arguments, not by code
_TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image with {}",
    "{} on the floor",
    "a scene that shows {}",
)
_REPEATS = 20  # attempts to write a caption that the image does not have yet


def load(
    split: str = "train",
    source: Source = "synthetic",
    *,
    annotations: str | os.PathLike | None = None,
    detail: str = "rich",
    style: str = "plain",
    size: int | None = None,
    num_objects: tuple[int, int] = (1, 2),
    num_pairs: int | None = None,
    num_captions: int = 4,
    held_out: Sequence[Combination] | None = HELD_OUT,
    seed: int = 0,
    holdout: float = 0.1,
    image_column: str | None = None,
    caption_column: str | None = None,
    corrupt: str = "refuse",
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load images with captions.

    The kind of `source` is detected from its content:

    * "synthetic": generated scenes, see `hf_dl.data.scenes`;
    * a folder of images, if `annotations` names the file of their captions: COCO captions (JSON), a table such as
      results.csv or captions.txt, or a token file of Flickr;
    * a folder with such a file, or the folder of COCO that has `annotations/captions_train2017.json`;
    * a folder of parquet files, a dataset saved by `save_to_disk`, or images with a metadata.jsonl;
    * a `Dataset` that you already have, or a dictionary of splits;
    * anything else is a Hub id.

    If the source has no validation or test split, `holdout` of the training images are held out for it. The choice
    depends on `seed` only. A file in `annotations` has no splits, and the folder of COCO has training and validation
    images.

    Args:
        split: "train", "validation" or "test". Usual aliases in the source, such as "val", are recognized.
        source: "synthetic", a path, a Hub id, or a dataset that you already have. An `IterableDataset` is streamed.
        annotations: File of the captions, if `source` is a folder of images.
        detail: Information in the captions of generated scenes: "rich", "partial" or "poor", see `DETAILS`. The images
            are the same for each.
        style: Style of generated scenes, "plain" or "textured".
        size: Width and height of the images in pixels. Real images are cropped to a centered square and resized.
            Defaults to 64 for generated scenes, and to whole images in their own size otherwise.
        num_objects: Smallest and largest number of objects per generated scene.
        num_pairs: Number of images. Defaults to all, and to the count in `SPLITS` for generated scenes. A longer
            dataset starts with the images of a shorter one.
        num_captions: Number of captions per generated scene. They differ as far as possible.
        held_out: Combinations (color, shape) that the training and validation scenes do not contain. The test scenes
            contain all combinations. None holds out nothing.
        seed: Seed of the generated scenes and captions, and of the choice of held-out images.
        holdout: Share of the training images to hold out for a missing split, above 0 and below 0.5.
        image_column: Column of the images. Defaults to the first column with images.
        caption_column: Column with a text, or with a list of texts. Defaults to "captions", "caption", "text" and
            similar names, and to all of "caption_0", "caption_1", and so on.
        corrupt: Handling of rows whose image cannot be read or that have no caption. "refuse" raises an error that
            lists them. "skip" removes them and warns with a list.
        streaming: Render or decode while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns of `FEATURES`: `image_id`, `image` (RGB), `captions` (list of texts) and `objects`.
        Objects have a color, a shape, a size, and the box x0, y0, x1, y1 of their visible part in pixels, half-open.
        Real images have no objects.

    Raises:
        FileNotFoundError: If a folder or file does not exist.
        ValueError: If an argument, a column or a caption is invalid, or an image cannot be read.

    Example:
        >>> from hf_dl.data import captions
        >>> dataset = captions.load("test", num_pairs=8)
        >>> dataset[0]["captions"][0]
        'a photo of a brown cone right of a brown sphere'
    """
    for name, value, known in (("split", split, SPLITS), ("detail", detail, DETAILS), ("corrupt", corrupt, CORRUPT)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    for name, value in (("num_captions", num_captions), ("num_pairs", num_pairs), ("size", size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout={holdout} must be above 0 and below 0.5: the share of images to hold out.")
    if not isinstance(source, str) or source != "synthetic":
        return load_captioned(
            split,
            source,
            annotations=annotations,
            image_column=image_column,
            caption_column=caption_column,
            size=size,
            num_images=num_pairs,
            holdout=holdout,
            corrupt=corrupt,
            seed=seed,
            streaming=streaming,
        )
    if annotations is not None:
        raise ValueError(f"annotations={str(annotations)!r} needs a folder of images, but got source='synthetic'.")
    size = 64 if size is None else size
    count = SPLITS.get(split, 1) if num_pairs is None else num_pairs
    check_arguments(split, style=style, size=size, num_objects=num_objects, num_scenes=count)
    held_out = check_held_out(held_out or ())
    arguments = {
        "shards": [(start, min(start + 256, count)) for start in range(0, count, 256)],
        "split": split,
        "style": style,
        "size": size,
        "num_objects": tuple(num_objects),
        "held_out": () if split == "test" else held_out,
        "seed": seed,
        "version": VERSION,
    }
    name = datasets.NamedSplit(split)
    if streaming:
        arguments |= {"detail": detail, "num_captions": num_captions}
        return datasets.IterableDataset.from_generator(_pairs, features=FEATURES, gen_kwargs=arguments, split=name)
    features = datasets.Features({name: kind for name, kind in FEATURES.items() if name != "captions"})
    with row_bar(count, f"Rendering {split} scenes"):
        rows = datasets.Dataset.from_generator(_render, features=features, gen_kwargs=arguments, split=name)
    # the captions are not in the cache: three levels of detail share its images
    texts = [
        write_captions(row["objects"], row["image_id"], detail=detail, num_captions=num_captions, size=size)
        for row in rows.select_columns(["image_id", "objects"])
    ]
    return rows.add_column("captions", texts, feature=FEATURES["captions"]).select_columns(list(FEATURES))


def check_held_out(held_out: Sequence[Combination]) -> tuple[Combination, ...]:
    """Return combinations as tuples. Raise ValueError if one is unknown, or if none is left."""
    pairs = tuple(tuple(pair) if isinstance(pair, (tuple, list)) else pair for pair in held_out)
    for pair in pairs:
        if pair not in COMBINATIONS:
            raise ValueError(
                f"held_out has {pair!r}. Expected pairs of a color ({', '.join(COLORS)}) and a shape "
                f"({', '.join(SHAPES)})."
            )
    if len(set(pairs)) == len(COMBINATIONS):
        raise ValueError(f"held_out has all {len(COMBINATIONS)} combinations. Leave some for the training scenes.")
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Scenes


def recombine(scene: Scene, combinations: dict[int, Combination]) -> Scene | None:
    """Give objects other colors and shapes, at the same places.

    Args:
        scene: A description that `hf_dl.data.scenes.sample_scene` drew.
        combinations: From object index to its new color and shape.

    Returns:
        The new description, or None if an object is no longer inside the image.
    """
    objects = list(scene.objects)
    for i, (color, shape) in combinations.items():
        item = replace(objects[i], color=color, shape=shape, surface=recolor(objects[i].surface, LINEAR_COLORS[color]))
        item = replace(item, position=(*item.position[:2], item.extent[1]))
        if not has_room(scene, item, ()):  # sampled objects keep their distance to each other in any shape
            return None
        objects[i] = item
    return replace(scene, objects=tuple(objects))


def avoid_held_out(scene: Scene, held_out: tuple[Combination, ...]) -> Scene | None:
    """Replace each combination that is held out by a random other one, before anything is rendered."""
    allowed = [pair for pair in COMBINATIONS if pair not in held_out]
    drawn = {}
    for i, item in enumerate(scene.objects):
        if (item.color, item.shape) in held_out:
            drawn[i] = pick(random.Random(f"hf_dl.captions object {item.rotation} {item.position}"), allowed)
    return recombine(scene, drawn)


def _make_rows(
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
    rows = []
    for index, (scene, mask), image in zip(indices, drawn, images, strict=True):
        boxes = [find_box((mask == i).numpy()) for i in range(1, len(scene.objects) + 1)]
        objects = [
            {"color": item.color, "shape": item.shape, "size": item.size, "box": box}
            for item, box in zip(scene.objects, boxes, strict=True)
        ]
        name = f"scene-{style}-{seed}-{split}-{index}"
        rows.append({"image_id": name, "image": encode_png(image), "objects": objects})
    return rows


@counted
def _render(shards: list[tuple[int, int]], version: int, **arguments) -> Iterator[dict]:
    step = chunk_size(arguments["size"])
    chunks = [range(i, min(i + step, last)) for first, last in shards for i in range(first, last, step)]
    yield from run_chunks(_make_rows, chunks, **arguments)


def _pairs(detail: str, num_captions: int, **arguments) -> Iterator[dict]:
    options = {"detail": detail, "num_captions": num_captions, "size": arguments["size"]}
    for row in _render(**arguments):
        yield {**row, "captions": write_captions(row["objects"], row["image_id"], **options)}


# ---------------------------------------------------------------------------------------------------------------------
# Captions of scenes


def write_captions(
    objects: Sequence[dict], image_id: str, *, detail: str = "rich", num_captions: int = 4, size: int = 64
) -> list[str]:
    """Write captions of a generated scene. They depend on the arguments only.

    Args:
        objects: The objects: color, shape, size and box. There must be at least one.
        image_id: Name of the image. It determines the choice of the words.
        detail: A key of `DETAILS`.
        num_captions: Number of captions. More captions start with the same ones.
        size: Width and height of the image in pixels.

    Returns:
        The captions in lower case, without a period. They are different, unless the objects allow too few captions.

    Example:
        >>> write_captions([{"color": "red", "shape": "cube"}], "image 1", detail="partial", num_captions=2)
        ['a photo of a red cube', 'a scene that shows a red cube']
    """
    rng = random.Random(f"hf_dl.captions {detail} {image_id}")
    found: list[str] = []
    while len(found) < num_captions:
        for _ in range(_REPEATS):
            text = pick(rng, _TEMPLATES).format(DETAILS[detail](objects, rng, size))
            if text not in found:
                break
        found.append(text)
    return found


def _name_all(objects: Sequence[dict], rng: random.Random, size: int) -> str:
    with_size, with_place = rng.random() < 0.4, rng.random() < 0.4
    order = sorted(range(len(objects)), key=lambda _: rng.random())
    nouns = [f"{o['size']} {o['color']} {o['shape']}" if with_size else f"{o['color']} {o['shape']}" for o in objects]
    nouns = [nouns[i] for i in order]
    if not with_place or len(objects) < 2:
        return listing(nouns)
    places = _find_places(objects[order[0]]["box"], objects[order[1]]["box"], size)
    if not places:
        return listing(nouns)
    other = f"another {nouns[1]}" if nouns[1] == nouns[0] else f"a {nouns[1]}"
    rest = f", with {listing(nouns[2:])} nearby" if nouns[2:] else ""
    return f"a {nouns[0]} {pick(rng, places)} {other}{rest}"


def _find_places(box: Sequence[int], other: Sequence[int], size: int) -> list[str]:
    """Return the words for the place of an object relative to another one, such as "left of"."""
    # all objects stand on the same ground, so a lower bottom edge is nearer to the camera
    right, front = (box[0] + box[2] - other[0] - other[2]) / 2, box[3] - other[3]
    places = [] if abs(right) < size / 8 else ["right of" if right > 0 else "left of"]
    return places if abs(front) < size / 8 else [*places, "in front of" if front > 0 else "behind"]


def _name_one(objects: Sequence[dict], rng: random.Random, size: int) -> str:
    item = pick(rng, objects)
    return f"a {item['color']} {item['shape']}"


def _name_one_attribute(objects: Sequence[dict], rng: random.Random, size: int) -> str:
    item = pick(rng, objects)
    return pick(rng, (f"a {item['color']} object", f"a {item['shape']}"))


DETAILS = {"rich": _name_all, "partial": _name_one, "poor": _name_one_attribute}
