"""Read the images that visitors upload. Damaged, hostile or huge files raise a ValueError with one clear sentence."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .pictures import SIDE

MAX_PIXELS = 50_000_000


def open_image(path: str | Path) -> Image.Image:
    """Read an image file in any format as an upright RGB image of at most `SIDE` x `SIDE` pixels.

    Transparent pixels become white. An animation gives its first frame.

    Raises:
        ValueError: If the file is empty, damaged or not an image, or has more than `MAX_PIXELS` pixels.
    """
    if os.path.getsize(path) == 0:
        raise ValueError("The file is empty. Choose a PNG, JPEG or WebP image.")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header, before anything is decoded
                raise Image.DecompressionBombError
            image = _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            f"The image has more than {MAX_PIXELS // 10**6} million pixels. Make it smaller and try again."
        ) from None
    except Exception as error:  # Pillow raises many types of errors on damaged files
        raise ValueError("The file is not an image that can be read. Choose a PNG, JPEG or WebP file.") from error
    image.thumbnail((SIDE, SIDE))
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # 16 or 32 bits per pixel, which Pillow would clip at 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        white = 65535 if image.mode[0] == "I" else max(1.0, float(values.max()))
        image = Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
