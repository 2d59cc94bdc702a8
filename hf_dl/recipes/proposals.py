"""Regions for a whole dataset: the boxes of selective search, cached by `datasets`, and the sizes of anchors."""

import time
from collections.abc import Sequence

import datasets
import numpy as np

from hf_dl.models.selective_search import selective_search

MEASURED = 500  # images whose boxes choose the sizes of anchors
SMALLEST_ANCHOR = 4  # pixels
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


def choose_anchor_sizes(data: datasets.Dataset, *, image_size: Sequence[int], count: int = 3) -> list[int]:
    """Choose the sizes of anchors for the boxes of a dataset: k-means of log(side), at most `MEASURED` images.

    The logarithm is used because the IoU of two squares depends on the ratio of their sides.

    Args:
        data: Dataset with columns `image` and `objects`, see `hf_dl.data.detection`.
        image_size: Height and width of the input of the detector in pixels, or one number.
        count: Largest number of sizes.

    Returns:
        Square roots of areas in pixels of the input, ascending. Boxes of few sizes give fewer anchors. The list is
        empty without boxes.
    """
    from sklearn.cluster import KMeans  # here, because this import takes most of a second

    height, width = image_size[0], image_size[-1]
    rows = data.select(np.unique(np.linspace(0, len(data) - 1, min(MEASURED, len(data))).astype(int)))
    logs = []
    for row in rows:
        scale = width * height / (row["image"].width * row["image"].height)
        areas = [(x1 - x0) * (y1 - y0) * scale for x0, y0, x1, y1 in row["objects"]["bbox"]]
        logs += [0.5 * np.log(area) for area in areas if area > 0]
    if not logs:
        return []
    distinct = np.unique(np.round(logs, 3))
    # first centers over the whole range: most boxes may have one size
    first = np.linspace(distinct[0], distinct[-1], min(count, len(distinct)))
    found = KMeans(len(first), init=first[:, None], n_init=1).fit(np.reshape(logs, (-1, 1)))
    return sorted({max(SMALLEST_ANCHOR, round(float(size))) for size in np.exp(found.cluster_centers_[:, 0])})
