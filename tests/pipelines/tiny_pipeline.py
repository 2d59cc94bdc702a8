"""A tiny slot diffusion pipeline with random weights, and helpers for tests of it."""

import numpy as np
import torch
from PIL import Image

from hf_dl.models import SlotAutoencoderConfig, SlotAutoencoderModel, SlotEncoderModel, SlotUNetModel, make_autoencoder
from hf_dl.pipelines.diffusion_sampling import noise_schedule
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from tests.memory import aligned

ENCODER = {
    "image_size": 16,
    "decoder_size": 8,
    "encoder_channels": (8, 12),
    "token_dim": 12,
    "slot_dim": 12,
    "slot_mlp_dim": 16,
    "num_slots": 3,
    "num_draws": 2,
    "decoder_channels": (8,),
}
UNET = {
    "sample_size": 4,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "attention_resolutions": (),
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
# patches of 2x2 pixels and two levels: 3x16x16 <-> 3x4x4
SMALL_AUTOENCODER = {"sample_size": 16, "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 3}


def make_pipe(*, unet=None, encoder=SlotEncoderModel, scheduler=None, kind="kl"):
    torch.manual_seed(0)
    if unet is None:
        unet = SlotUNetModel(**UNET)
        with torch.no_grad():  # a new U-Net predicts zero noise for every input
            for parameter in unet.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    pipe = SlotDiffusionPipeline(
        encoder(SlotAutoencoderConfig(**ENCODER)).eval(),
        unet.eval(),
        make_autoencoder("small", kind=kind, **SMALL_AUTOENCODER).eval(),
        scheduler or noise_schedule(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_image(seed=0, size=(20, 14)):
    """A picture of random colors, size is (width, height)."""
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


FAST = {"num_inference_steps": 3, "output_type": "latent"}


def make_painting_pipe(**fields):
    """A pipeline whose U-Net gets what a slot autoencoder paints."""
    torch.manual_seed(0)
    channels = make_autoencoder("small", **SMALL_AUTOENCODER).config.latent_channels
    options = {"in_channels": channels, "sketch_channels": channels, "layout_channels": 5}
    unet = SlotUNetModel(**{**UNET, **options, **fields})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return make_pipe(unet=unet, encoder=SlotAutoencoderModel)


def same_weights(found, expected):
    for name in ("slot_encoder", "unet", "autoencoder"):
        a, b = getattr(found, name).state_dict(), getattr(expected, name).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return True


def align(pipe):
    for part in (pipe.slot_encoder, pipe.unet, pipe.autoencoder):
        aligned(part)
