"""Images with phrases, and one mask per phrase: generated scenes, or any part of PhraseCut that is on disk.

PhraseCut: Wu et al., "PhraseCut: Language-based image segmentation in the wild", CVPR 2020,
https://arxiv.org/abs/2008.01187.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets

from . import phrasecut_coco, phrasecut_files, phrasecut_scenes
from .captions import HELD_OUT, SPLITS, Combination, check_held_out
from .generation import row_bar
from .phrasecut_coverage import ON_MISSING, Coverage, FoundRows
from .phrasecut_features import make_features, materialize
from .phrasecut_phrases import KINDS, count_negatives, name_subsets
from .phrasecut_rows import load_rows
from .phrasecut_scenes import render_scenes, scene_negatives, scene_phrases
from .phrasecut_writer import write_phrasecut
from .scenes import check_arguments
from .splits import Source, find_local, given_splits, load_from_hub, name_source, read_tables

VERSION = 2  # increase it when pixels or columns change: `datasets` caches by arguments, not by code

__all__ = ["KINDS", "SPLITS", "Coverage", "find_coverage", "load", "materialize", "push_to_hub", "write_phrasecut"]


def load(
    split: str = "train",
    source: Source = "synthetic",
    *,
    on_missing: str = "skip",
    max_images: int | None = None,
    size: int | None = None,
    negatives: float = 0.0,
    holdout: float = 0.1,
    style: str = "plain",
    num_objects: tuple[int, int] = (1, 2),
    held_out: Sequence[Combination] | None = HELD_OUT,
    seed: int = 0,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load images with phrases and masks: one row per image and phrase. The rows of an image follow each other.

    The kind of `source` is detected from its content:

    * "synthetic": generated scenes. The images of a split are the images of `hf_dl.data.captions`;
    * a folder with files of PhraseCut, see `hf_dl.data.phrasecut_files`. The dataset has the images that are on disk;
    * a folder with COCO instances, whose phrases are the names of their categories, see `hf_dl.data.phrasecut_coco`;
    * a folder of parquet files, a dataset saved by `save_to_disk`, a `Dataset` that you already have, or a Hub id. Its
      columns are `image`, `phrase` and `mask`, and optionally the others below.

    If the validation or test split is missing, `holdout` of the training images are held out for it.

    Args:
        split: "train", "validation" or "test". Files of PhraseCut also have "miniv".
        source: As above.
        on_missing: "skip" leaves out images that are not on disk. "raise" raises an error.
        max_images: Maximum number of images. For generated scenes it defaults to `hf_dl.data.captions.SPLITS`.
        size: Width and height of images and masks in pixels. Defaults to 64 for generated scenes, and to the size of
            each image for other sources.
        negatives: Share of the rows whose phrase is false of the image, from 0 to below 1. Their masks are empty. Each
            phrase is checked: no object, phrase or category of the image has its name. The annotation of PhraseCut
            lists a part of the objects only. With the files scene_graphs_*.json on disk it lists more.
        holdout: Share of the training images to hold out for a missing split, above 0 and below 0.5.
        style: Style of generated scenes, "plain" or "textured".
        num_objects: Smallest and largest number of objects per generated scene.
        held_out: Combinations (color, shape) that training and validation scenes and their phrases do not contain.
        seed: Seed of generated scenes, of negative phrases and of the choice of images.
        streaming: Read or render while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with these columns. Images and masks are read and drawn when a row is accessed, see
        `hf_dl.data.phrasecut_features`.

        * `image_id` (string) and `image` (RGB);
        * `phrase`, and `mask` (8-bit, 255 on all pixels of the phrase and 0 elsewhere);
        * `kind`: one of `KINDS`: the type of the phrase in PhraseCut, or "negative". None if it is unknown;
        * `seen`: False if the phrase names a combination that is held out from training;
        * `subsets`: names of the subsets of PhraseCut, for scores by subset.

    Raises:
        FileNotFoundError: If a folder, a file of a split or, with on_missing="raise", an image is missing.
        ValueError: If an argument is not one of the values above, or a file or column is invalid.

    Example:
        >>> from hf_dl.data import phrasecut
        >>> dataset = phrasecut.load("test", max_images=2)
        >>> dataset[1]["phrase"], dataset[1]["mask"].size
        ('brown sphere', (64, 64))
    """
    if not 0 <= negatives < 1:
        raise ValueError(f"negatives={negatives} must be from 0 to below 1: the share of rows with a false phrase.")
    for name, value in (("max_images", max_images), ("size", size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if on_missing not in ON_MISSING:
        raise ValueError(f"on_missing={on_missing!r} is unknown; choose one of {', '.join(ON_MISSING)}.")
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout={holdout} must be above 0 and below 0.5: the share of images to hold out.")
    if source == "synthetic":
        scenes = {"style": style, "num_objects": num_objects, "held_out": check_held_out(held_out or ())}
        return _load_scenes(split, size or 64, max_images, negatives, seed, streaming, **scenes)
    found = given_splits(source)
    if found is None:
        found = _find(source, split, on_missing, max_images, holdout, seed, streaming)
    options = {"size": size, "negatives": negatives, "seed": seed, "streaming": streaming, "version": VERSION}
    if isinstance(found, FoundRows):
        return found.build(split, **options)
    return load_rows(found, split, name_source(source), max_images=max_images, holdout=holdout, **options)


def find_coverage(source: str | Path, split: str = "train") -> Coverage:
    """Count the images and phrases of a folder of PhraseCut or COCO that are on disk.

    Args:
        source: The folder.
        split: As in `load`.

    Raises:
        FileNotFoundError: If no image is on disk, or the file of the split is missing.
        ValueError: If `source` is another kind of folder, or a file is damaged.
    """
    found = _find(source, split, "skip", None, 0.1, 0, False)
    if not isinstance(found, FoundRows):
        raise ValueError(f"source={str(source)!r} is not a folder of PhraseCut or COCO, which have images on disk.")
    return found.coverage


def push_to_hub(splits: Mapping[str, datasets.Dataset], repo_id: str, **options: object) -> None:
    """Push datasets to the Hub with ordinary columns of images, which can be read without hf_dl.

    Args:
        splits: Results of `load` by the names of their splits.
        repo_id: The repository, as owner/name.
        options: Further arguments of `datasets.DatasetDict.push_to_hub`, such as `private`.

    Example:
        >>> push_to_hub({"test": load("test")}, "me/scene-phrases")  # doctest: +SKIP
    """
    datasets.DatasetDict({name: materialize(data) for name, data in splits.items()}).push_to_hub(repo_id, **options)


def _find(
    source: str | Path,
    split: str,
    on_missing: str,
    max_images: int | None,
    holdout: float,
    seed: int,
    streaming: bool,
) -> FoundRows | Mapping[str, datasets.Dataset | datasets.IterableDataset]:
    """Return the rows of a folder of PhraseCut or COCO, or the splits of another dataset."""
    root, name = Path(source).expanduser(), name_source(source)
    for files in (phrasecut_files, phrasecut_coco):
        folder = files.find_folder(root)
        if folder is not None:
            options = {"on_missing": on_missing, "max_images": max_images, "holdout": holdout, "seed": seed}
            return files.find_rows(folder, split, **options)
    if not root.exists():
        expected = "a folder of PhraseCut or COCO, parquet files, a Hub id, or 'synthetic'"
        find_local(name, expected)  # raises an error for a path
        return load_from_hub(name, expected, streaming=streaming)
    found = read_tables(root.resolve(), streaming=streaming)
    if found is None:
        raise ValueError(
            f"source={name!r} has no refer_*.json of PhraseCut, no annotations/instances_*.json of COCO, and no "
            "parquet files. Expected one of them."
        )
    return found


def _load_scenes(
    split: str,
    size: int,
    max_images: int | None,
    negatives: float,
    seed: int,
    streaming: bool,
    *,
    style: str,
    num_objects: tuple[int, int],
    held_out: tuple[Combination, ...],
) -> datasets.Dataset | datasets.IterableDataset:
    count = SPLITS.get(split, 1) if max_images is None else max_images
    check_arguments(split, style=style, size=size, num_objects=num_objects, num_scenes=count)
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
    phrases = {"negatives": negatives, "unseen": held_out, "hide": split != "test"}
    name = datasets.NamedSplit(split)
    if streaming:
        options = {"features": make_features(), "gen_kwargs": arguments | {"phrases": phrases}, "split": name}
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
