"""Pictures on the pages: example scenes, tensors as pictures, and maps over images."""

import base64
import functools
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..data import object_images
from ..reporting.grids import color_heat

SIDE = 384  # longer side, in pixels, of the pictures on the pages


@dataclass
class Picture:
    """An image on a page, with the name of its object if that is known."""

    image: Image.Image
    truth: str = ""


@functools.lru_cache(maxsize=16)
def draw_examples(seed: int, count: int = 8) -> tuple[Picture, ...]:
    """Draw scenes with one object each, like the training images of the small default classifiers.

    Args:
        seed: Seed of the scenes.
        count: Number of scenes.
    """
    data = object_images.load("test", size=192, num_images=count, seed=seed, streaming=True)
    names = data.features["label"].names
    return tuple(Picture(row["image"], names[row["label"]]) for row in data)


def to_picture(image: torch.Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """Convert a tensor (3, height, width) in [0, 1] to a picture.

    Args:
        image: The tensor.
        size: Width and height of the picture. Defaults to the size of the tensor.
    """
    picture = Image.fromarray((image.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy())
    return picture.resize(size, Image.Resampling.BICUBIC) if size else picture


def as_url(picture: Image.Image, kind: str = "JPEG") -> str:
    """Return a picture as a data URL for HTML.

    Args:
        picture: The picture.
        kind: "JPEG" keeps a page with 20 pictures below half a megabyte. "PNG" keeps each pixel.
    """
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of an image on the page: its proportions, with a longer side of `SIDE` pixels."""
    return tuple(max(1, round(side * SIDE / max(image.size))) for side in image.size)


def resize_heat(heat: np.ndarray, size: tuple[int, int], *, smooth: bool = True) -> np.ndarray:
    """Resize a map (height, width) in [0, 1] to `size` (width, height).

    Args:
        heat: The map.
        size: Width and height of the result.
        smooth: Interpolate. If False, each value becomes a rectangle of one color.
    """
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.asarray(heat, dtype=np.float32)).resize(size, method)).clip(0, 1)


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Draw a map over an image of the same size. The image stays visible, darker where the map is low.

    Args:
        image: The image.
        heat: The map, (height, width) in [0, 1].
    """
    strength = 0.35 + 0.35 * heat[..., None]
    gray = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray(((1 - strength) * gray + strength * color_heat(heat)).round().astype(np.uint8))


def join_pictures(pictures: list[Image.Image], *, side: int, gap: int = 8) -> Image.Image:
    """Join pictures to one row on white, each cut to a square of `side` pixels around its center.

    Args:
        pictures: The pictures, from left to right.
        side: Width and height of each picture.
        gap: Pixels between two pictures.
    """
    row = Image.new("RGB", (len(pictures) * (side + gap) - gap, side), "white")
    for index, picture in enumerate(pictures):
        smallest = min(picture.size)
        left, top = (picture.width - smallest) // 2, (picture.height - smallest) // 2
        square = picture.convert("RGB").crop((left, top, left + smallest, top + smallest))
        row.paste(square.resize((side, side), Image.Resampling.LANCZOS), (index * (side + gap), 0))
    return row
