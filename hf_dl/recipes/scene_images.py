"""Images with object masks for slots, slot diffusion and latent autoencoders: flags, loading and pixel values."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from hf_dl.data import masked_images, scenes
from hf_dl.data.image_arrays import ImageTensors
from hf_dl.metrics.perceptual import PerceptualDistance

from .evaluation import hide_progress_bars, report_data, split_size

PERCEPTUAL_HELP = (
    "Network of the perceptual distance: random; lpips (needs the package lpips); lpips:FOLDER, a folder or Hub id "
    "with the files squeezenet* and lpips*squeeze*; or the Hub id of an image classifier."
)


@dataclass
class SceneFlags:
    """Flags that select the images. Training and evaluation scripts share them."""

    source: str = field(
        default="synthetic",
        metadata={
            "help": "synthetic, a CLEVRTex folder, a folder with images/ and masks/ or a metadata.jsonl, a folder of "
            "images without masks, or a Hub dataset id."
        },
    )
    style: Literal["plain", "textured"] = field(default="plain", metadata={"help": "Look of the synthetic scenes."})
    image_size: int = field(default=64, metadata={"help": "Height and width of the images, in pixels."})
    crop: int | None = field(
        default=None,
        metadata={
            "help": "Size of the center crop of real images before resizing, in pixels; 0: the largest square. "
            "Defaults to 192 for CLEVRTex and 0 for others."
        },
    )
    num_objects: list[int] = field(
        default_factory=lambda: [2, 4],
        metadata={"help": "Fewest and most objects per synthetic scene."},
    )
    num_train: int = field(
        default=10_000, metadata={"help": "Number of training images; 0: all images of a real dataset."}
    )
    num_test: int | None = field(
        default=None,
        metadata={
            "help": "Number of validation images, and of test images; 0: all of a real dataset. Defaults to 500, and "
            "to at most half of num_train."
        },
    )
    corrupt: Literal["refuse", "skip"] = field(
        default="refuse", metadata={"help": "Damaged image files: refuse stops with an error, skip leaves them out."}
    )


def load_images(flags: SceneFlags, split: str) -> ImageTensors:
    """Load one split of the source, decoded and kept in memory.

    Args:
        flags: Selects the source, the image size and the number of images.
        split: "train", "validation" or "test".

    Returns:
        Rows with `image` (3, height, width) and, if the source has masks, `mask` (height, width), both uint8.

    Raises:
        FileNotFoundError: If the source is not a folder and is not on the Hub.
        ValueError: If a flag is out of range, or the split has fewer than two images.
    """
    hide_progress_bars()
    count = split_size(flags, split, 500)
    if flags.source == "synthetic":
        options = {"style": flags.style, "size": flags.image_size, "num_objects": tuple(flags.num_objects)}
        data = scenes.load(split, num_scenes=count, **options)
    else:
        options = {"size": flags.image_size, "crop": flags.crop, "num_images": count, "corrupt": flags.corrupt}
        data = masked_images.load(split, flags.source, **options)
    if len(data) < 2:  # the scores compare images
        raise ValueError(f"The {split} split of source={flags.source!r} has 1 image. At least 2 are needed.")
    report_data(data, split)
    return ImageTensors(data)


def to_pixel_values(images: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """Map uint8 images to [-1, 1], like the image processor of the models."""
    return images.to(device).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Convert images (..., 3, height, width) in [0, 1] to uint8 arrays (..., height, width, 3)."""
    return quantize(images).movedim(-3, -1).numpy()


def quantize(images: torch.Tensor) -> torch.Tensor:
    """Round images in [0, 1] to uint8 of the same shape, on the CPU."""
    return (images.clamp(0, 1) * 255).round().byte().cpu()


@torch.no_grad()
def mean_perceptual_distance(measure: PerceptualDistance, images: torch.Tensor, others: torch.Tensor) -> float:
    """Average the perceptual distance over pairs of images.

    Args:
        measure: The distance, see `hf_dl.metrics.perceptual.load`.
        images: uint8 (images, 3, height, width).
        others: uint8, same shape. Image i is compared with `others[i]`.

    Returns:
        The mean distance.
    """
    pairs = zip(images.split(50), others.split(50), strict=True)
    return torch.cat([measure(to_pixel_values(one), to_pixel_values(other)) for one, other in pairs]).mean().item()
