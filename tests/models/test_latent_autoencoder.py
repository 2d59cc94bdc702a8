import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, VQModel

from hf_dl.models import decode_latents, encode_latents, make_autoencoder
from tests.memory import aligned

TINY = {"sample_size": 16, "block_out_channels": (8, 8, 8), "norm_num_groups": 4}
KINDS = {"kl": AutoencoderKL, "vq": VQModel}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture, size", [("small", 64), ("clevrtex", 128)])
def test_named_sizes(kind, architecture, size):
    with torch.device("meta"):
        autoencoder = make_autoencoder(architecture, kind=kind)
        assert type(autoencoder) is KINDS[kind] and autoencoder.config.sample_size == size
        latents = encode_latents(autoencoder, torch.empty(2, 3, size, size))
        assert latents.shape == (2, 3, size // 4, size // 4)
    if kind == "kl":  # the codebook cannot be looked up without values
        assert decode_latents(autoencoder, latents).shape == (2, 3, size, size)


def test_latents_are_shifted_and_scaled():
    torch.manual_seed(0)
    autoencoder = make_autoencoder(**TINY, scaling_factor=0.5, shift_factor=2.0).eval()
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encode_latents(autoencoder, pixel_values)
    torch.testing.assert_close(latents, (autoencoder.encode(pixel_values).latent_dist.mean - 2) / 2)
    torch.testing.assert_close(decode_latents(autoencoder, latents), autoencoder(pixel_values).sample)
    assert torch.equal(encode_latents(autoencoder, pixel_values), latents)  # nothing is drawn


def test_a_codebook_quantizes_on_the_way_back():
    torch.manual_seed(0)
    autoencoder = make_autoencoder(kind="vq", **TINY, scaling_factor=4.0, num_vq_embeddings=16).eval()
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encode_latents(autoencoder, pixel_values)
    torch.testing.assert_close(latents, autoencoder.encode(pixel_values).latents * 4)
    torch.testing.assert_close(decode_latents(autoencoder, latents), autoencoder(pixel_values).sample)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_by_path(kind, tmp_path):
    autoencoder = make_autoencoder(kind=kind, **TINY).eval()
    autoencoder.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path))
    assert type(loaded) is KINDS[kind]
    pixel_values = torch.rand(1, 3, 16, 16)
    assert torch.equal(encode_latents(aligned(loaded), pixel_values), encode_latents(autoencoder, pixel_values))


def test_what_is_unknown_is_refused():
    with pytest.raises(ValueError, match="architecture='big' is unknown; choose one of small, clevrtex"):
        make_autoencoder("big")
    with pytest.raises(ValueError, match="kind='gan' is unknown; choose one of kl, vq"):
        make_autoencoder(kind="gan")
    with pytest.raises(TypeError, match="layer_per_block"):
        make_autoencoder(layer_per_block=2)
