"""Read the images that visitors upload. Damaged, hostile or huge files raise a ValueError with one clear sentence."""

from pathlib import Path

from PIL import Image

from ..models import image_input
from .pictures import SIDE

MAX_PIXELS = 50_000_000


def open_image(path: str | Path) -> Image.Image:
    """Read an image file in any format as an upright RGB image of at most `SIDE` x `SIDE` pixels.

    Transparent pixels become white. An animation gives its first frame.

    Raises:
        ValueError: If the file is empty, damaged or not an image, or has more than `MAX_PIXELS` pixels.
    """
    try:
        image = image_input.open_image(path, max_pixels=MAX_PIXELS)
    except ValueError as error:
        raise ValueError(f"{error} Choose a PNG, JPEG or WebP image.") from error
    image.thumbnail((SIDE, SIDE))
    return image
