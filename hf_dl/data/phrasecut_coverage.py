"""Choose the images of an annotation that are on disk, and report how many they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .phrasecut_features import make_features
from .splits import hold_out

ON_MISSING = ("skip", "raise")

_SHARDS = 16


@dataclass(frozen=True)
class Coverage:
    """How much of a split is on disk.

    Attributes:
        images: Number of annotated images.
        found: Number of image files on disk.
        wrong: Names of the files that are damaged, or whose size differs from the annotation. They are left out.
        kept: Number of images in the dataset: at most `max_images`.
        phrases: Number of annotated phrases.
        kept_phrases: Number of phrases of the kept images.
    """

    images: int
    found: int
    wrong: tuple[str, ...]
    kept: int
    phrases: int
    kept_phrases: int

    def describe(self) -> str:
        """Return the numbers as sentences."""
        text = (
            f"{self.found:,} of {self.images:,} images are on disk ({self.found / self.images:.1%}). The dataset has "
            f"{self.kept:,} of them, with {self.kept_phrases:,} of {self.phrases:,} phrases."
        )
        if not self.wrong:
            return text
        more = ", ..." if len(self.wrong) > 5 else ""
        return f"{text} Left out because of damage or another size: {', '.join(self.wrong[:5])}{more}."


@dataclass(frozen=True)
class FoundRows:
    """The rows of a split, before they are read.

    Attributes:
        generator: Function that yields the rows. It receives `shards`, which are lists of images, `arguments`,
            `negatives`, `seed` and `version`.
        images: The images, in the form that the function expects.
        arguments: Further arguments of the function.
        coverage: How much of the split the rows are.
    """

    generator: Callable[..., Iterator[dict]]
    images: list
    arguments: dict[str, Any]
    coverage: Coverage | None = None

    def build(
        self, split: str, *, size: int | None, negatives: float, seed: int, streaming: bool, version: int
    ) -> datasets.Dataset | datasets.IterableDataset:
        """Return the rows as a dataset with the columns of `hf_dl.data.phrasecut`.

        Args:
            split: Name of the split.
            size: Width and height of images and masks in pixels. Defaults to their own size.
            negatives: Share of negative phrases.
            seed: Seed of the negative phrases.
            streaming: Whether to read while iterating.
            version: Version of the rows; it only changes the name of the cache.
        """
        # each shard reads the annotation again, so only a stream has several: for the workers of a DataLoader
        step = -(-len(self.images) // _SHARDS) if streaming else len(self.images)
        shards = [self.images[start : start + step] for start in range(0, len(self.images), step)]
        options = {
            "features": make_features(size),
            "gen_kwargs": self.arguments
            | {"shards": shards, "negatives": negatives, "seed": seed, "version": version},
            "split": datasets.NamedSplit(split),
        }
        if streaming:
            data = datasets.IterableDataset.from_generator(self.generator, **options)
        else:
            data = datasets.Dataset.from_generator(self.generator, **options)
        data.info.description = self.coverage.describe() if self.coverage else ""
        return data


def choose_images(
    sizes: Mapping[str, Sequence[int]],
    paths: Mapping[str, str],
    *,
    on_missing: str,
    max_images: int | None,
    seed: int,
    where: str,
) -> tuple[list[str], int, tuple[str, ...]]:
    """Choose the images that are on disk and have the annotated size.

    Args:
        sizes: Annotated width and height of each image.
        paths: Files on disk by image.
        on_missing: "skip", or "raise" if an image is missing.
        max_images: Maximum number of images, which are chosen at random by `seed`.
        seed: Seed of the choice.
        where: The folder, for messages.

    Returns:
        The images in the order of `sizes`, the number of images on disk, and the names of the files that are damaged
        or have another size.

    Raises:
        FileNotFoundError: If no image is on disk, or if one is missing and `on_missing` is "raise".
        ValueError: If the annotation has no images, or if all images are damaged or have another size.
    """
    if not sizes:
        raise ValueError(f"The annotation in {where} has no images for this split. Choose another split.")
    found = [name for name in sizes if name in paths]
    missing = len(sizes) - len(found)
    if missing and (on_missing == "raise" or not found):
        example = next(name for name in sizes if name not in paths)
        advice = "." if not found else ", or use on_missing='skip'."
        raise FileNotFoundError(
            f"{missing:,} of {len(sizes):,} images are missing in {where}, such as image {example}. Copy them "
            f"there{advice}"
        )
    order = found if max_images is None else random.Random(f"hf_dl.phrasecut images {seed}").sample(found, len(found))
    kept, wrong = set(), []
    for name in order:
        if len(kept) == max_images:
            break
        if _read_size(paths[name]) == tuple(sizes[name]):
            kept.add(name)
        else:
            wrong.append(Path(paths[name]).name)
    if not kept:
        raise ValueError(f"All images in {where} are damaged, or differ in size from the annotation. Copy them again.")
    return [name for name in found if name in kept], len(found), tuple(wrong)


def _read_size(path: str) -> tuple[int, int] | None:
    """Return the size in the header of an image file, or None if it is damaged."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # decoders raise many types of errors for damaged files
        return None


def hold_out_images(names: Sequence[str], split: str, missing: Sequence[str], holdout: float, seed: int) -> list[str]:
    """Return the images of a split, if missing splits are held out of the training images.

    Args:
        names: All images of the training split.
        split: "train", or a missing split.
        missing: The missing splits.
        holdout: Share of the images for each of them.
        seed: Seed of the choice.

    Returns:
        The images in the order of `names`.

    Raises:
        ValueError: If the split would be empty.
    """
    order = np.random.default_rng([seed, 20_200_615]).permutation(len(names))
    chosen = [names[i] for i in sorted(hold_out(order, missing, holdout)[split])]
    if not chosen:
        raise ValueError(f"split={split!r} would be empty: the source has {len(names)} images. Use more images.")
    return chosen
