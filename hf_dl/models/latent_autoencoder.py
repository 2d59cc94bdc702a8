"""The autoencoder for latent diffusion: diffusers' `AutoencoderKL` or `VQModel` in our sizes.

It maps images in [-1, 1] to latents with three channels and a quarter of the height and width: 3x128x128 <-> 3x32x32
and 3x64x64 <-> 3x16x16 (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section
3.1). Any other checkpoint of either class works too: load it with `diffusers.AutoModel.from_pretrained(path)`.
"""

import torch
from diffusers import AutoencoderKL, VQModel

ARCHITECTURES = {
    # 3x64x64 <-> 3x16x16, for a CPU.
    "small": {
        "sample_size": 64,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    # 3x128x128 <-> 3x32x32, as in SlotDiffusion on CLEVRTex (Wu et al. 2023), which uses a VQModel.
    "clevrtex": {
        "sample_size": 128,
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
        torch.Size([2, 3, 16, 16])

        ```
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is unknown; choose one of {', '.join(ARCHITECTURES)}.")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    autoencoder, own_fields = KINDS[kind]
    merged = {"scaling_factor": 1.0, "mid_block_add_attention": False, "latent_channels": 3}
    merged |= own_fields | ARCHITECTURES[architecture] | fields
    levels = len(merged["block_out_channels"])
    merged.setdefault("down_block_types", ("DownEncoderBlock2D",) * levels)
    merged.setdefault("up_block_types", ("UpDecoderBlock2D",) * levels)
    return autoencoder(**merged)


def encode_latents(autoencoder: AutoencoderKL | VQModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Encode images as latents for the diffusion model.

    Args:
        autoencoder: The autoencoder. For `AutoencoderKL`, the result is the mean of the latents; for `VQModel`, the
            latents before quantization.
        pixel_values: (batch, 3, height, width), in [-1, 1].

    Returns:
        Latents, (batch, channels, height / 4, width / 4), shifted and scaled with the values in the config.
    """
    encoded = autoencoder.encode(pixel_values)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents - (autoencoder.config.get("shift_factor") or 0.0)) * autoencoder.config.scaling_factor


def decode_latents(autoencoder: AutoencoderKL | VQModel, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents to images; the inverse of `encode_latents` up to the autoencoder's error.

    Args:
        autoencoder: The autoencoder. `VQModel` quantizes the latents first.
        latents: (batch, channels, height, width).

    Returns:
        Images, (batch, 3, 4 * height, 4 * width), in [-1, 1] up to the autoencoder's error.
    """
    latents = latents / autoencoder.config.scaling_factor + (autoencoder.config.get("shift_factor") or 0.0)
    return autoencoder.decode(latents).sample
