"""Encode generated and resized images as PNG bytes, as the `Image` feature of `datasets` stores them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encode_png(array: np.ndarray, *, palette: bytes | None = None, compress_level: int = 1) -> dict:
    """Encode a uint8 array (height, width) or (height, width, 3).

    Args:
        array: The pixels.
        palette: Colors that viewers show for the values 0, 1, ... of a mask: three bytes each. The values stay.
        compress_level: From 0, the fastest, to 9, the smallest.

    Returns:
        A value of the feature `datasets.Image`.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette)
    image.save(buffer, format="PNG", compress_level=compress_level)
    return {"bytes": buffer.getvalue(), "path": None}
