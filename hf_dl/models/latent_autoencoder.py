"""The autoencoder for latent diffusion: diffusers' `AutoencoderKL` or `VQModel` in our sizes.

It maps images in [-1, 1] to smaller latents: 3x64x64 <-> 4x32x32 and 3x128x128 <-> 3x32x32. The method is from
Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1. Any other checkpoint
of either class works too: load it with `diffusers.AutoModel.from_pretrained(path)`.

A network with 3 p^2 input channels takes images as patches of p x p pixels (`to_patches`). Patches shrink the largest
feature maps, where convolutions cost most. `encode_latents` and `decode_latents` take and return images for every
network.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel

ARCHITECTURES = {
    # 3x64x64 <-> 4x32x32, for a CPU. It takes patches of 2x2 pixels.
    "small": {
        "sample_size": 64,
        "in_channels": 12,
        "out_channels": 12,
        "latent_channels": 4,
        "block_out_channels": (48,),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    # 3x128x128 <-> 3x32x32, as in SlotDiffusion on CLEVRTex (Wu et al. 2023), which uses a VQModel.
    "clevrtex": {
        "sample_size": 128,
        "latent_channels": 3,
        "block_out_channels": (64, 128, 256),
        "layers_per_block": 2,
        "norm_num_groups": 32,
    },
}
"""Sizes of the networks by name."""

KINDS: dict[str, tuple[type[AutoencoderKL] | type[VQModel], dict[str, object]]] = {
    "kl": (AutoencoderKL, {}),
    "vq": (VQModel, {"num_vq_embeddings": 4096}),
}
"""Kinds of autoencoders by name: class, and fields of its config."""


def make_autoencoder(architecture: str = "small", *, kind: str = "kl", **fields: object) -> AutoencoderKL | VQModel:
    """Build a new autoencoder.

    Args:
        architecture: A key of `ARCHITECTURES`.
        kind: A key of `KINDS`: "kl" (Gaussian latents, `AutoencoderKL`) or "vq" (a codebook of 4096 latents,
            `VQModel`).
        **fields: Fields of the autoencoder's config to change. `scaling_factor` is 1 until the standard deviation of
            the latents is known.

    Returns:
        The autoencoder, in training mode.

    Raises:
        ValueError: If `architecture` or `kind` is unknown.

    Example:
        ```python
        >>> encode_latents(make_autoencoder("small"), torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 4, 32, 32])

        ```
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is unknown; choose one of {', '.join(ARCHITECTURES)}.")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    autoencoder, own_fields = KINDS[kind]
    merged = {"scaling_factor": 1.0, "mid_block_add_attention": False}
    merged |= own_fields | ARCHITECTURES[architecture] | fields
    levels = len(merged["block_out_channels"])
    merged.setdefault("down_block_types", ("DownEncoderBlock2D",) * levels)
    merged.setdefault("up_block_types", ("UpDecoderBlock2D",) * levels)
    return autoencoder(**merged)


def patch_size(autoencoder: AutoencoderKL | VQModel) -> int:
    """Return the height and width p of the patches that the network takes as pixels.

    Args:
        autoencoder: A network with 3 p^2 input channels. For an ordinary network, p is 1.

    Raises:
        ValueError: If the number of input channels is not 3 p^2.

    Example:
        ```python
        >>> patch_size(make_autoencoder("small"))
        2

        ```
    """
    channels = autoencoder.config.in_channels
    size = math.isqrt(channels // 3)
    if size == 0 or channels != 3 * size**2:
        raise ValueError(
            f"The autoencoder has in_channels={channels}; expected 3 p^2 for RGB images in patches of p x p pixels, "
            "such as 3, 12 or 27. Use another autoencoder."
        )
    return size


def downsampling_factor(autoencoder: AutoencoderKL | VQModel) -> int:
    """Return the ratio of image size to latent size: the patch size, doubled for each level after the first.

    Args:
        autoencoder: The autoencoder.

    Raises:
        ValueError: If the autoencoder takes no RGB images; see `patch_size`.

    Example:
        ```python
        >>> downsampling_factor(make_autoencoder("small")), downsampling_factor(make_autoencoder("clevrtex"))
        (2, 4)

        ```
    """
    return patch_size(autoencoder) * 2 ** (len(autoencoder.config.block_out_channels) - 1)


def to_patches(autoencoder: AutoencoderKL | VQModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Cut images into the patches that `autoencoder.encode` takes.

    Args:
        autoencoder: The autoencoder, with patches of p x p pixels.
        pixel_values: (batch, 3, height, width).

    Returns:
        (batch, 3 p^2, height / p, width / p). The images themselves if p is 1.

    Raises:
        ValueError: If height or width is not a multiple of p.
    """
    size, (height, width) = patch_size(autoencoder), pixel_values.shape[-2:]
    if height % size or width % size:
        raise ValueError(
            f"pixel_values has images of {height}x{width} pixels; height and width must be multiples of {size}, the "
            "patch size of the autoencoder. Resize or crop the images."
        )
    return F.pixel_unshuffle(pixel_values, size)


def from_patches(autoencoder: AutoencoderKL | VQModel, patches: torch.Tensor) -> torch.Tensor:
    """Assemble images from the patches that `autoencoder.decode` returns; the inverse of `to_patches`."""
    return F.pixel_shuffle(patches, patch_size(autoencoder))


def encode_latents(autoencoder: AutoencoderKL | VQModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Encode images as latents for the diffusion model.

    Args:
        autoencoder: The autoencoder. For `AutoencoderKL`, the result is the mean of the latents; for `VQModel`, the
            latents before quantization.
        pixel_values: (batch, 3, height, width), in [-1, 1].

    Returns:
        Latents, (batch, channels, height / f, width / f) for f = `downsampling_factor(autoencoder)`, shifted and
        scaled with the values in the config.

    Raises:
        ValueError: If the images cannot be cut into the patches of the network.
    """
    encoded = autoencoder.encode(to_patches(autoencoder, pixel_values))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents - (autoencoder.config.get("shift_factor") or 0.0)) * autoencoder.config.scaling_factor


def decode_latents(autoencoder: AutoencoderKL | VQModel, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents to images; the inverse of `encode_latents` up to the autoencoder's error.

    Args:
        autoencoder: The autoencoder. `VQModel` quantizes the latents first.
        latents: (batch, channels, height, width).

    Returns:
        Images, (batch, 3, f * height, f * width) for f = `downsampling_factor(autoencoder)`, in [-1, 1] up to the
        autoencoder's error.
    """
    latents = latents / autoencoder.config.scaling_factor + (autoencoder.config.get("shift_factor") or 0.0)
    return from_patches(autoencoder, autoencoder.decode(latents).sample)
