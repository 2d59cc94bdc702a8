import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, VQModel

from hf_dl.models import decode_latents, encode_latents, make_autoencoder
from hf_dl.models.latent_autoencoder import downsampling_factor, from_patches, patch_size, to_patches
from tests.memory import aligned

TINY = {"sample_size": 16, "block_out_channels": (8, 8), "norm_num_groups": 4}
WITHOUT_PATCHES = {"in_channels": 3, "out_channels": 3}
KINDS = {"kl": AutoencoderKL, "vq": VQModel}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "architecture, size, shape", [("small", 64, (2, 4, 32, 32)), ("clevrtex", 128, (2, 3, 32, 32))]
)
def test_named_sizes(kind, architecture, size, shape):
    with torch.device("meta"):
        autoencoder = make_autoencoder(architecture, kind=kind)
        assert type(autoencoder) is KINDS[kind] and autoencoder.config.sample_size == size
        latents = encode_latents(autoencoder, torch.empty(2, 3, size, size))
        assert latents.shape == shape
        assert downsampling_factor(autoencoder) == size // 32
    if kind == "kl":  # the codebook cannot be looked up without values
        assert decode_latents(autoencoder, latents).shape == (2, 3, size, size)


def patches_by_hand(images, size):
    """Channel (c, i, j) of patch (y, x) is the pixel (size y + i, size x + j) of channel c."""
    batch, channels, height, width = images.shape
    patches = torch.zeros(batch, channels * size**2, height // size, width // size)
    for c in range(channels):
        for i in range(size):
            for j in range(size):
                patches[:, (c * size + i) * size + j] = images[:, c, i::size, j::size]
    return patches


@pytest.mark.parametrize("size", [1, 2, 3])
def test_patches_are_cut_and_assembled(size):
    channels = 3 * size**2
    autoencoder = make_autoencoder(**TINY, in_channels=channels, out_channels=channels)
    images = torch.rand(2, 3, 6, 12)
    patches = to_patches(autoencoder, images)
    assert torch.equal(patches, patches_by_hand(images, size))
    assert torch.equal(from_patches(autoencoder, patches), images)
    assert (patch_size(autoencoder), downsampling_factor(autoencoder)) == (size, 2 * size)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_sees_patches(kind):
    torch.manual_seed(0)
    autoencoder = make_autoencoder(kind=kind, **TINY).eval()
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encode_latents(autoencoder, pixel_values)
    assert latents.shape == (2, 4, 4, 4)
    made = autoencoder(patches_by_hand(pixel_values, 2)).sample
    torch.testing.assert_close(patches_by_hand(decode_latents(autoencoder, latents), 2), made)


@pytest.mark.parametrize("channels", [1, 4, 6, 13])
def test_numbers_of_channels_that_are_no_patches_are_refused(channels):
    autoencoder = make_autoencoder(**TINY, in_channels=channels)
    for use in (lambda: patch_size(autoencoder), lambda: encode_latents(autoencoder, torch.zeros(1, 3, 16, 16))):
        with pytest.raises(ValueError, match=f"in_channels={channels}; expected 3 p.2 for RGB images"):
            use()


@pytest.mark.parametrize("height, width", [(15, 16), (16, 15)])
def test_images_that_are_no_multiple_of_the_patch_are_refused(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} pixels; height and width must be multiples of 2"):
        encode_latents(make_autoencoder(**TINY), torch.zeros(1, 3, height, width))


def test_latents_are_shifted_and_scaled():
    torch.manual_seed(0)
    autoencoder = make_autoencoder(**TINY, **WITHOUT_PATCHES, scaling_factor=0.5, shift_factor=2.0).eval()
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encode_latents(autoencoder, pixel_values)
    torch.testing.assert_close(latents, (autoencoder.encode(pixel_values).latent_dist.mean - 2) / 2)
    torch.testing.assert_close(decode_latents(autoencoder, latents), autoencoder(pixel_values).sample)
    assert torch.equal(encode_latents(autoencoder, pixel_values), latents)  # nothing is drawn


def test_a_codebook_quantizes_on_the_way_back():
    torch.manual_seed(0)
    sizes = {"scaling_factor": 4.0, "num_vq_embeddings": 16}
    autoencoder = make_autoencoder(kind="vq", **TINY, **WITHOUT_PATCHES, **sizes).eval()
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
