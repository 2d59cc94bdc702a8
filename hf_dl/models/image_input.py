"""Open images as people see them: upright, RGB with 8 bits per channel, and on white where they are transparent.

`Image.convert("RGB")` of Pillow clips 16-bit gray at 255, shows the hidden colors of transparent pixels, and ignores
the rotation in the EXIF data of photos. All parts of the package open images with this file. It is in hf_dl/models
because the image processors travel with checkpoints.
"""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import TorchvisionBackend
from transformers.image_utils import ImageInput

MAX_PIXELS = 178_956_970  # the limit above which Pillow raises an error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to upright RGB on a white background.

    Args:
        image: The image. Gray values of 16 bits are scaled to 8 bits. Floats are clipped to [0, 1], or scaled by their
            maximum if it is above 1. An animation gives its current frame, which is the first one of an opened file.

    Example:
        >>> to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 or 32 bits per pixel
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        white = 65535 if image.mode[0] == "I" else max(1.0, float(values.max()))
        image = Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(
    file: str | bytes | os.PathLike | BinaryIO, *, max_pixels: int = MAX_PIXELS, min_side: int | None = None
) -> Image.Image:
    """Read an image file in any format as upright RGB, see `to_rgb`.

    Args:
        file: Path, or a binary file that can seek.
        max_pixels: Largest number of pixels. It is compared with the header of the file, before anything is decoded.
        min_side: Decode a large JPEG file at a lower resolution with at least this width and height, which is faster.
            Defaults to the full resolution.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is empty, damaged, too large or not an image.
    """
    try:
        with Image.open(file) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            if min_side is not None:
                image.draft("RGB", (min_side, min_side))
            return to_rgb(image)
    except FileNotFoundError as error:
        is_link = isinstance(file, (str, bytes, os.PathLike)) and os.path.islink(file)
        problem = "The file is a link to a missing file." if is_link else "The file does not exist."
        raise FileNotFoundError(problem) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = max_pixels // 10**6
        raise ValueError(f"The image has more than {limit} million pixels. Make it smaller.") from None
    except UnidentifiedImageError as error:
        problem = "The file is empty." if _is_empty(file) else "The file is not an image that can be read."
        raise ValueError(problem) from error
    except Exception as error:  # decoders raise many types of errors for damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"The file is not an image that can be read: {reason.rstrip('.')}.") from error


def _is_empty(file: str | bytes | os.PathLike | BinaryIO) -> bool:
    if isinstance(file, (str, bytes, os.PathLike)):
        return os.path.getsize(file) == 0
    return file.seek(0, os.SEEK_END) == 0


def is_multiple(size: tuple[int, int], of: tuple[int, int]) -> bool:
    """Return whether both sides of a new size are whole multiples of the old sides.

    Such an image can be enlarged by repeating its pixels. Its edges stay sharp, where interpolation would blur an
    object of a few pixels.

    Example:
        >>> is_multiple((64, 64), of=(32, 16)), is_multiple((64, 64), of=(48, 64))
        (True, False)
    """
    return all(new % old == 0 for new, old in zip(size, of, strict=True))


class RgbImageProcessor(TorchvisionBackend):
    """Base class of our image processors. With `do_convert_rgb`, it converts images with `to_rgb`."""

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open local paths with `open_image`, and URLs as transformers does."""
        if isinstance(image_url_or_urls, str) and Path(image_url_or_urls).is_file():
            return open_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image: ImageInput, do_convert_rgb: bool | None = None, **kwargs: Any) -> torch.Tensor:
        """Convert an image to a tensor (channels, height, width)."""
        if do_convert_rgb and isinstance(image, Image.Image):
            image = to_rgb(image)
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)
