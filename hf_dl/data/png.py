"""Encode generated and resized images as PNG bytes, as the `Image` feature of `datasets` stores them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encode_png(array: np.ndarray) -> dict:
    """Encode a uint8 array (height, width) or (height, width, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
