"""Images with phrases, and one mask per phrase: generated scenes, or any part of PhraseCut that is on disk.

PhraseCut: Wu et al., "PhraseCut: Language-based image segmentation in the wild", CVPR 2020,
https://arxiv.org/abs/2008.01187.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import datasets

from . import phrasecut_scenes
from .captions import HELD_OUT, SPLITS, Combination, check_held_out
from .generation import row_bar
from .phrasecut_features import make_features
from .phrasecut_scenes import render_scenes, scene_negatives, scene_phrases
from .scenes import check_arguments

VERSION = 1  # increase it when pixels or columns change: `datasets` caches by arguments, not by code

KINDS = ("name", "attribute", "relation", "verbose", "negative")


def load(
    split: str = "train",
    source: str = "synthetic",
    *,
    max_images: int | None = None,
    size: int | None = None,
    negatives: float = 0.0,
    style: str = "plain",
    num_objects: tuple[int, int] = (1, 2),
    held_out: Sequence[Combination] | None = HELD_OUT,
    seed: int = 0,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load images with phrases and masks: one row per image and phrase. The rows of an image follow each other.

    Args:
        split: "train", "validation" or "test".
        source: "synthetic": generated scenes. The images of a split are the images of `hf_dl.data.captions`.
        max_images: Maximum number of images. For generated scenes it defaults to `hf_dl.data.captions.SPLITS`.
        size: Width and height of images and masks in pixels. Defaults to 64 for generated scenes.
        negatives: Share of the rows whose phrase is false of the image, from 0 to below 1. Their masks are empty. Each
            phrase is checked against the annotation of the image.
        style: Style of generated scenes, "plain" or "textured".
        num_objects: Smallest and largest number of objects per generated scene.
        held_out: Combinations (color, shape) that training and validation scenes and their phrases do not contain.
        seed: Seed of generated scenes, and of the choice of negative phrases.
        streaming: Read or render while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with these columns. Images and masks are read and drawn when a row is accessed, see
        `hf_dl.data.phrasecut_features`.

        * `image_id` (string) and `image` (RGB);
        * `phrase`, and `mask` (8-bit, 255 on all pixels of the phrase and 0 elsewhere);
        * `kind`: one of `KINDS`, the type of the phrase in PhraseCut, or "negative";
        * `seen`: False if the phrase names a combination that is held out from training;
        * `subsets`: names of the subsets of PhraseCut, for scores by subset.

    Raises:
        ValueError: If an argument is not one of the values above.

    Example:
        >>> from hf_dl.data import phrasecut
        >>> dataset = phrasecut.load("test", max_images=2)
        >>> dataset[1]["phrase"], dataset[1]["mask"].size
        ('yellow cylinder', (64, 64))
    """
    if not 0 <= negatives < 1:
        raise ValueError(f"negatives={negatives} must be from 0 to below 1: the share of rows with a false phrase.")
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images={max_images} must be at least 1.")
    if source != "synthetic":
        raise ValueError(f"source={source!r} is unknown; use 'synthetic'.")
    size = 64 if size is None else size
    count = SPLITS.get(split, 1) if max_images is None else max_images
    check_arguments(split, style=style, size=size, num_objects=num_objects, num_scenes=count)
    arguments = {
        "shards": [(start, min(start + 256, count)) for start in range(0, count, 256)],
        "split": split,
        "style": style,
        "size": size,
        "num_objects": tuple(num_objects),
        "held_out": () if split == "test" else check_held_out(held_out or ()),
        "seed": seed,
        "version": VERSION,
    }
    phrases = {"negatives": negatives, "unseen": check_held_out(held_out or ()), "hide": split != "test"}
    name = datasets.NamedSplit(split)
    if streaming:
        arguments |= {"phrases": phrases}
        options = {"features": make_features(), "gen_kwargs": arguments, "split": name}
        return datasets.IterableDataset.from_generator(_stream_scenes, **options)
    options = {"features": phrasecut_scenes.FEATURES, "gen_kwargs": arguments, "split": name}
    with row_bar(count, f"Rendering {split} scenes"):
        images = datasets.Dataset.from_generator(render_scenes, **options)
    rows = [
        row
        for place, record in zip(_places(images), images.select_columns(["image_id", "objects"]), strict=True)
        for row in _scene_rows(record, {"column": "image", **place}, {"column": "mask", **place}, **phrases, seed=seed)
    ]
    return datasets.Dataset.from_list(rows, features=make_features(), split=name)


def _places(dataset: datasets.Dataset) -> Iterator[dict]:
    """Yield the Arrow file and the row number of each row of a dataset in the cache."""
    for file in dataset.cache_files:
        path = file["filename"]
        yield from ({"path": path, "row": row} for row in range(len(datasets.Dataset.from_file(path))))


def _stream_scenes(shards: list[tuple[int, int]], seed: int, phrases: dict, **arguments: object) -> Iterator[dict]:
    for record in render_scenes(shards, seed=seed, **arguments):
        yield from _scene_rows(record, record["image"], record["mask"], **phrases, seed=seed)


def _scene_rows(
    record: dict,
    image: dict,
    mask: dict,
    negatives: float,
    unseen: Sequence[Combination],
    hide: bool,
    seed: int,
) -> Iterator[dict]:
    """Yield the rows of one scene. With `hide`, negative phrases name no combination that is held out."""
    found = scene_phrases(record["objects"], record["image_id"])
    rng = random.Random(f"hf_dl.phrasecut negatives {seed} {record['image_id']}")
    count = count_negatives(len(found), negatives, rng)
    found += scene_negatives(record["objects"], count, rng, held_out=unseen if hide else ())
    for phrase in found:
        labels = ", ".join(str(index + 1) for index in phrase.objects)
        yield {
            "image_id": record["image_id"],
            "image": image,
            "phrase": phrase.text,
            "mask": {**mask, "drawing": f'{{"labels": [{labels}]}}'},
            "kind": phrase.kind,
            "seen": not phrase.names_one_of(unseen),
            "subsets": name_subsets(phrase.kind, len(phrase.objects), phrase.attributes, phrase.relations),
        }


def count_negatives(positives: int, share: float, rng: random.Random) -> int:
    """Return the number of negative phrases of an image. Its mean gives them a share of all phrases."""
    expected = positives * share / (1 - share)
    return int(expected) + (rng.random() < expected % 1)


def name_subsets(kind: str, instances: int, attributes: Sequence[str], relations: Sequence) -> list[str]:
    """Return the names of the subsets of PhraseCut that a phrase belongs to.

    Args:
        kind: One of `KINDS`.
        instances: Number of objects that the phrase is true of.
        attributes: Attributes of the phrase.
        relations: Relations of the phrase.

    Returns:
        The kind ("p_name", "p_att+", "p_rel+" or "p_verbose"), "p_att" and "p_rel" for phrases with an attribute or a
        relation, and "i_single", "i_multi" and "i_many" (five and more). Negative phrases are in no subset.

    Example:
        >>> name_subsets("attribute", 2, ["red"], [])
        ['p_att+', 'p_att', 'i_multi']
    """
    if kind == "negative":
        return []
    names = [{"name": "p_name", "attribute": "p_att+", "relation": "p_rel+", "verbose": "p_verbose"}[kind]]
    for name, holds in (
        ("p_att", bool(attributes)),
        ("p_rel", bool(relations)),
        ("i_single", instances == 1),
        ("i_multi", instances > 1),
        ("i_many", instances >= 5),
    ):
        names += [name] * holds
    return names
