"""Crops of the objects in generated scenes, labeled with color and shape, such as "red cube".

A classifier of these crops reads the color and shape of an object, also in an image that a model made or edited.
`hf_dl.metrics.editing` uses it as a probe.

A crop shows the square around the box of an object, so its content keeps its proportions, but not its size. Crops have
no mask, because the true mask shows the shape even if the image does not.
"""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import numpy as np
import torch
import torch.nn.functional as F

from . import scenes
from .generation import counted, row_bar
from .png import encode_png
from .scene_description import SHAPES
from .surfaces import COLORS

CLASSES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
MARGIN = 1.25  # side of a crop relative to the longer side of the box

_VERSION = 1  # increase it when pixels or columns change: `datasets` caches by arguments, not by code
_SHARD = 256  # scenes whose objects are cropped together


def load(
    split: str = "train",
    source: str = "synthetic",
    *,
    style: str = "plain",
    size: int = 32,
    image_size: int = 64,
    num_objects: tuple[int, int] = (2, 4),
    num_scenes: int | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """Crop all visible objects of generated scenes.

    Args:
        split: "train", "validation" or "test".
        source: Only "synthetic".
        style: "plain" or "textured", see `hf_dl.data.scenes`.
        size: Width and height of the crops in pixels.
        image_size: Width and height of the scenes in pixels.
        num_objects: Smallest and largest number of objects per scene.
        num_scenes: Number of scenes. Defaults to the count in `hf_dl.data.scenes.SPLITS`.
        seed: Seed of the scenes.

    Returns:
        A dataset with the columns `image` (RGB, size x size) and `label` (`ClassLabel` with the names in `CLASSES`).

    Raises:
        ValueError: If an argument is not one of the values above.

    Example:
        >>> from hf_dl.data import object_crops
        >>> dataset = object_crops.load("validation", num_scenes=8)
        >>> dataset.features["label"].names[4]
        'red sphere'
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel.")
    options = {"style": style, "size": image_size, "num_objects": tuple(num_objects), "seed": seed}
    found = scenes.load(split, source, num_scenes=num_scenes, **options)
    arguments = {
        "shards": [(start, min(start + _SHARD, len(found))) for start in range(0, len(found), _SHARD)],
        "found": found,
        "size": size,
        "version": _VERSION,
    }
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    count = sum(item["visible_pixels"] > 0 for items in found["objects"] for item in items)
    with row_bar(count, f"Cropping {split} objects"):
        return datasets.Dataset.from_generator(
            _crop, features=features, gen_kwargs=arguments, split=datasets.NamedSplit(split)
        )


@counted
def _crop(shards: list[tuple[int, int]], found: datasets.Dataset, size: int, version: int) -> Iterator[dict]:
    for start, end in shards:
        rows = found.select_columns(["image", "objects"])[start:end]
        places = [(i, item) for i, items in enumerate(rows["objects"]) for item in items if item["visible_pixels"]]
        images = torch.from_numpy(np.stack([np.asarray(image) for image in rows["image"]])).movedim(-1, 1)
        boxes = torch.tensor([item["box"] for _, item in places])
        crops = crop_objects(images[[i for i, _ in places]], boxes, size=size).movedim(1, -1)
        for crop, (_, item) in zip(crops.numpy(), places, strict=True):
            yield {"image": encode_png(crop), "label": f"{item['color']} {item['shape']}"}


def crop_objects(images: torch.Tensor, boxes: torch.Tensor, *, size: int = 32) -> torch.Tensor:
    """Crop the square around each box and resize it.

    Args:
        images: uint8 (crops, channels, height, width), one image per crop.
        boxes: Boxes x0, y0, x1, y1 in pixels, half-open, (crops, 4).
        size: Width and height of the crops in pixels.

    Returns:
        The crops, uint8 (crops, channels, size, size). Outside of an image, the pixels of its border are repeated.

    Raises:
        ValueError: If a box is empty.

    Example:
        >>> images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        >>> crop_objects(images, torch.tensor([[10, 20, 26, 30]])).shape
        torch.Size([1, 3, 32, 32])
    """
    low, high = boxes.to(images.device).float().split(2, dim=1)
    sides = high - low
    if (sides <= 0).any():
        wrong = int((sides <= 0).any(1).nonzero()[0])
        raise ValueError(f"boxes[{wrong}]={boxes[wrong].tolist()} is empty. Expected x0 < x1 and y0 < y1.")
    reach = MARGIN / 2 * sides.amax(1, keepdim=True)
    # 2x2 samples per pixel, so that a crop of a large object is smooth
    steps = (torch.arange(2 * size, device=images.device) + 0.5) / size - 1
    x, y = ((low + high) / 2)[:, :, None].add(reach[:, :, None] * steps).unbind(1)  # (crops, 2 * size), pixels
    height, width = images.shape[2:]
    x, y = 2 * x / width - 1, 2 * y / height - 1
    grid = torch.stack([x[:, None, :].expand(-1, 2 * size, -1), y[:, :, None].expand(-1, -1, 2 * size)], -1)
    crops = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(crops, 2).round().byte()
