"""Autoencoders for latent diffusion: flags, evaluation, the scale of the latents, figures and report.

The networks are `AutoencoderKL` and `VQModel` of diffusers. The training loop is in scripts/train_autoencoder.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn

from hf_dl.data.image_arrays import ImageTensors
from hf_dl.metrics.images import default_features, fid
from hf_dl.metrics.perceptual import PerceptualDistance
from hf_dl.models.latent_autoencoder import (
    ARCHITECTURES,
    KINDS,
    decode_latents,
    downsampling_factor,
    encode_latents,
    from_patches,
    make_autoencoder,
    to_patches,
)
from hf_dl.pipelines.model_loading import check_not_runs
from hf_dl.progress import activity
from hf_dl.reporting.card import LOCAL_ID, run_card
from hf_dl.reporting.grids import image_grid
from hf_dl.reporting.plots import plot_run

from .scene_images import PERCEPTUAL_HELP, quantize, to_pixel_values, to_uint8

SUMMARY = (
    "The autoencoder for latent diffusion (Rombach et al. 2022), a model of diffusers. It encodes an image as smaller "
    "latents, and decodes latents to an image. The default network halves height and width, and its latents have 4 "
    "channels."
)
USAGE = """\
import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from hf_dl.models import decode_latents, encode_latents
from PIL import Image

autoencoder = diffusers.AutoModel.from_pretrained("{local}").eval()
processor = VaeImageProcessor(do_convert_rgb=True)
size = autoencoder.config.sample_size
pixel_values = processor.preprocess(Image.open("image.png"), size, size)  # (1, 3, size, size), in [-1, 1]
with torch.no_grad():
    latents = encode_latents(autoencoder, pixel_values)
    reconstruction = processor.postprocess(decode_latents(autoencoder, latents))[0]"""
LIMITS = ("It reconstructs images like its training images. Photographs become blurred.",)
TAGS = ("autoencoder", "latent-diffusion")
CURVES = {
    "squared error": {"training": "mse", "validation": "val_mse"},
    "perceptual distance": {"training": "perceptual", "validation": "val_perceptual"},
    "standard deviation of the latents": {"validation": "val_latent_std"},
}
STATISTICS_IMAGES = 1000  # number of training images that the scale of the latents is measured on


@dataclass
class AutoencoderFlags:
    """Flags of the network and of its loss."""

    architecture: Literal[tuple(ARCHITECTURES)] = field(default="small", metadata={"help": "Sizes of the network."})
    kind: Literal[tuple(KINDS)] = field(
        default="kl", metadata={"help": "kl: Gaussian latents. vq: latents from a codebook of 4096 entries."}
    )
    kl_weight: float = field(
        default=1e-6, metadata={"help": "kl: weight of the KL divergence, in nats per number of the latents."}
    )
    perceptual: str = field(default="random", metadata={"help": PERCEPTUAL_HELP})
    perceptual_weight: float = field(
        default=0.0, metadata={"help": "Weight of the perceptual distance in the loss; 0: only for evaluation."}
    )
    crop_size: int = field(
        default=32,
        metadata={
            "help": "Size of the random crops that training sees, in pixels; 0: whole images. Images that are not "
            "larger stay whole."
        },
    )


def check_flags(flags: Any) -> None:
    """Validate the flags before any image is loaded.

    Args:
        flags: `AutoencoderFlags` with `image_size`.

    Raises:
        ValueError: If `image_size` or `crop_size` does not fit the architecture, or a weight is negative.
    """
    with torch.device("meta"):  # without weights
        factor = downsampling_factor(make_autoencoder(flags.architecture))
    if flags.image_size < factor or flags.image_size % factor:
        raise ValueError(
            f"image_size={flags.image_size} must be a multiple of {factor}: the latents are {factor} times smaller."
        )
    if flags.crop_size < 0 or flags.crop_size % factor:
        raise ValueError(
            f"crop_size={flags.crop_size} must be a multiple of {factor}, like image_size, or 0 for whole images."
        )
    for name in ("kl_weight", "perceptual_weight"):
        if not getattr(flags, name) >= 0:
            raise ValueError(f"{name}={getattr(flags, name)} must be at least 0.")


def random_crops(images: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Cut a square from a random place of each image.

    A convolution sees the same textures in a crop as in the image. In the same time, training on crops sees more
    images.

    Args:
        images: (batch, channels, height, width).
        size: Height and width of the crops, in pixels. Images that are not larger, and all images if it is 0, stay
            whole.
        generator: Source of the places.

    Returns:
        (batch, channels, size, size).

    Example:
        ```python
        >>> random_crops(torch.zeros(2, 3, 64, 64), 32, torch.Generator()).shape
        torch.Size([2, 3, 32, 32])

        ```
    """
    spare = images.shape[-1] - size  # scene images are square
    if not size or spare <= 0:
        return images
    places = torch.randint(spare + 1, (len(images), 2), generator=generator, device=generator.device).tolist()
    crops = [image[:, y : y + size, x : x + size] for image, (y, x) in zip(images, places, strict=True)]
    return torch.stack(crops)


class LatentAutoencoder(nn.Module):
    """An autoencoder of diffusers whose forward pass returns the reconstruction and the regularizer.

    Args:
        autoencoder: An `AutoencoderKL` or a `VQModel`.
    """

    def __init__(self, autoencoder: AutoencoderKL | VQModel):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(
        self, pixel_values: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruct images.

        Args:
            pixel_values: (batch, 3, height, width), in [-1, 1].
            generator: Source of the noise in the latents of `AutoencoderKL`.

        Returns:
            The reconstructions, and the regularizer, a scalar. For `AutoencoderKL` it is the KL divergence from the
            standard normal distribution, in nats per number of the latents. For `VQModel` it is the squared distance
            between latents and codebook entries.
        """
        encoded = self.autoencoder.encode(to_patches(self.autoencoder, pixel_values))
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.sample(generator)
            decoded = self.autoencoder.decode(latents)
            regularizer = encoded.latent_dist.kl().mean() / latents[0].numel()
        else:
            decoded = self.autoencoder.decode(encoded.latents)
            regularizer = decoded.commit_loss.mean()
        return from_patches(self.autoencoder, decoded.sample), regularizer

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the autoencoder for `diffusers.AutoModel.from_pretrained`."""
        self.autoencoder.save_pretrained(folder)


def load_autoencoder(name: str) -> AutoencoderKL | VQModel:
    """Load an autoencoder in evaluation mode, with frozen weights.

    Args:
        name: Folder or Hub id.

    Raises:
        ValueError: If the model is missing, or of another class.
    """
    check_not_runs(name)
    try:
        autoencoder = diffusers.AutoModel.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name!r} is not an autoencoder of diffusers ({reason}). Give a folder such as runs/train_autoencoder."
        ) from error
    if not isinstance(autoencoder, (AutoencoderKL, VQModel)):
        raise ValueError(f"{name!r} is a {type(autoencoder).__name__}; expected an AutoencoderKL or a VQModel.")
    return autoencoder.eval().requires_grad_(False)


@torch.no_grad()
def evaluate(
    model: LatentAutoencoder,
    batches: Iterable[dict],
    distance: PerceptualDistance,
    *,
    gather: Callable[[Any], Any] = lambda values: values,
) -> dict[str, float]:
    """Measure the reconstructions and the latents.

    Args:
        model: The autoencoder.
        batches: Batches with `image`, uint8.
        distance: The perceptual distance, on the device of the model.
        gather: Concatenates tensors of all processes. Defaults to a single process.

    Returns:
        `l1` and `mse` for pixels in [-1, 1], `psnr` of the mean squared error in decibels, and `perceptual`.
        `latent_std` is the standard deviation of all numbers of the scaled latents. For a `VQModel` also `used_codes`,
        the number of codebook entries in use.
    """
    model.eval()
    autoencoder, columns = model.autoencoder, []
    for batch in batches:
        pixel_values = to_pixel_values(batch["image"], next(model.parameters()).device)
        latents = encode_latents(autoencoder, pixel_values)
        made = decode_latents(autoencoder, latents).clamp(-1, 1)
        error = made - pixel_values
        row = [error.abs().mean((1, 2, 3)), error.square().mean((1, 2, 3)), distance(made, pixel_values)]
        row += [latents.mean((1, 2, 3)), latents.square().mean((1, 2, 3))]
        if isinstance(autoencoder, VQModel):
            codes = autoencoder.quantize(latents / autoencoder.config.scaling_factor)[2][2]
            row.append(codes.view(len(pixel_values), -1))
        columns.append(gather(tuple(row)))
    l1, mse, perceptual, mean, square, *codes = (torch.cat(column) for column in zip(*columns, strict=True))
    scores = {
        "l1": l1.mean().item(),
        "mse": mse.mean().item(),
        "psnr": 10 * math.log10(4 / max(mse.mean().item(), 1e-12)),
        "perceptual": perceptual.mean().item(),
        "latent_std": (square.mean() - mean.mean().square()).clamp(min=0).sqrt().item(),
    }
    if codes:
        scores["used_codes"] = float(len(codes[0].unique()))
    return scores


@torch.no_grad()
def set_scale(autoencoder: AutoencoderKL | VQModel, train: ImageTensors) -> None:
    """Write the scale of the latents into the config, so that diffusion sees a standard deviation of 1.

    The mean becomes 0 for `AutoencoderKL`, which has a field for it. Diffusion adds noise of standard deviation 1, and
    its schedule expects data with the same one (Rombach et al. 2022, appendix G).

    Args:
        autoencoder: The trained autoencoder.
        train: Training images. The first `STATISTICS_IMAGES` are encoded.
    """
    shifts = isinstance(autoencoder, AutoencoderKL)
    autoencoder.register_to_config(scaling_factor=1.0, **({"shift_factor": None} if shifts else {}))
    images = train.__getitems__(range(min(STATISTICS_IMAGES, len(train))))["image"]
    parts = [encode_latents(autoencoder, to_pixel_values(batch, autoencoder.device)) for batch in images.split(64)]
    latents = torch.cat(parts).double()
    mean = latents.mean().item() if shifts else 0.0
    spread = max(((latents - mean).square().mean() ** 0.5).item(), 1e-6)
    autoencoder.register_to_config(scaling_factor=1 / spread, **({"shift_factor": mean} if shifts else {}))


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL | VQModel, images: torch.Tensor) -> torch.Tensor:
    """Encode and decode images.

    Args:
        autoencoder: The autoencoder.
        images: uint8 (images, 3, height, width).

    Returns:
        The reconstructions, uint8, same shape.
    """
    made = []
    for batch in images.split(64):
        latents = encode_latents(autoencoder, to_pixel_values(batch, autoencoder.device))
        made.append(decode_latents(autoencoder, latents).cpu() / 2 + 0.5)
    return quantize(torch.cat(made))


def draw_and_measure(autoencoder: AutoencoderKL | VQModel, test: ImageTensors, folder: Path) -> dict[str, float]:
    """Write reconstructions.png into the folder, and return the FID of the reconstructed test images."""
    autoencoder.eval()
    images = test.__getitems__(range(len(test)))["image"]
    made = reconstruct(autoencoder, images)
    rows = [list(to_uint8(pictures[:8] / 255)) for pictures in (images, made)]
    image_grid(rows, folder / "reconstructions.png", labels=["test images", "reconstruction"])
    scores = fid(images, made, features=default_features())
    return {f"reconstruction_{name}": value for name, value in scores.items() if name.startswith("fid")}


@activity("Writing the report")
def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and print the paths."""
    plot_run(folder, folder / "curves.png", CURVES)
    usage = USAGE.format(local=LOCAL_ID)
    about = {"summary": SUMMARY, "usage": usage, "limits": LIMITS, "tags": TAGS}
    card = run_card(folder, **about, library="diffusers")
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (diffusers.AutoModel.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
    print(f"picture     {folder / 'reconstructions.png'}")
