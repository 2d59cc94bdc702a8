"""Proposals of selective search for a whole dataset, computed once and cached by `datasets`."""

from collections.abc import Sequence

import datasets
import numpy as np
import torch

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


def stack_proposals(
    proposals: Sequence[Sequence[Sequence[float]]], sizes: Sequence[tuple[int, int]], *, count: int
) -> torch.Tensor:
    """Bring the proposals of a batch to one number per image, as the input of a detector.

    Args:
        proposals: Boxes of each image, x0, y0, x1, y1 in pixels.
        sizes: Height and width of each image.
        count: Number of boxes per image. Later boxes are left out.

    Returns:
        Center x, center y, width and height, divided by the size of the image, (images, count, 4). Rows of zeros fill
        images with fewer boxes.

    Example:
        >>> stack_proposals([[[0, 0, 8, 4]], []], [(8, 16), (8, 8)], count=1)
        tensor([[[0.2500, 0.2500, 0.5000, 0.5000]],
        <BLANKLINE>
                [[0.0000, 0.0000, 0.0000, 0.0000]]])
    """
    result = torch.zeros(len(proposals), count, 4)
    for row, boxes, (height, width) in zip(result, proposals, sizes, strict=True):
        corners = torch.as_tensor(np.asarray(boxes[:count], np.float32).reshape(-1, 4))
        corners = corners / torch.tensor([width, height, width, height])
        row[: len(corners)] = torch.cat(
            [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1
        )
    return result
