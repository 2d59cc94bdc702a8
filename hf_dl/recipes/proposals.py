"""Proposals of selective search for a whole dataset, computed once and cached by `datasets`."""

import time

import datasets
import numpy as np

from hf_dl.models.selective_search import selective_search

_VERSION = 1  # increase it when the boxes of selective search change: `datasets` caches by arguments


def add_proposals(data: datasets.Dataset, *, num_proc: int | None = None) -> datasets.Dataset:
    """Add the boxes of selective search to images.

    Args:
        data: Dataset with a column `image`.
        num_proc: Number of processes. Defaults to this one.

    Returns:
        The dataset with a column `proposals`: boxes x0, y0, x1, y1 in pixels, half-open.
    """
    boxes = datasets.List(datasets.List(datasets.Value("float32"), length=4))
    return data.map(
        _propose,
        input_columns="image",
        features=datasets.Features({**data.features, "proposals": boxes}),
        fn_kwargs={"version": _VERSION},
        num_proc=num_proc,
        desc="Selective search",
    )


def _propose(image: object, version: int) -> dict[str, np.ndarray]:
    return {"proposals": selective_search(image)}


def time_proposals(data: datasets.Dataset, *, num_images: int = 8) -> float:
    """Return the CPU time of selective search in milliseconds per image.

    Args:
        data: Dataset with a column `image`.
        num_images: Number of images to measure.
    """
    images = data.select(range(min(num_images, len(data))))["image"][:]
    begin = time.process_time()
    for image in images:
        selective_search(image)
    return 1000 * (time.process_time() - begin) / len(images)
