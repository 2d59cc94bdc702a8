"""The parts of the U-Net, compared with the parts of diffusers with the same weights, in float64."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as TheirAttention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from hf_dl.models.layers_unet import (
    Attention,
    ResidualBlock,
    SlotTransformer,
    SlotTransformerBlock,
    TimeEmbedding,
    norm_silu,
    sinusoids,
)
from tests.models.diffusers_weights import (
    copy,
    copy_attention,
    copy_block,
    copy_residual,
    copy_transformer,
)

EXACT = {"rtol": 0, "atol": 1e-10}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_sinusoids():
    times = torch.tensor([0, 1, 500, 999])
    assert torch.equal(sinusoids(times, 64), Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)(times))


def test_time_embedding():
    ours, theirs = TimeEmbedding(32, 48).double(), TimestepEmbedding(32, 48).double()
    copy(ours.linear_1, theirs.linear_1)
    copy(ours.linear_2, theirs.linear_2)
    times = torch.tensor([0, 7, 999])
    torch.testing.assert_close(ours(times, torch.float64), F.silu(theirs(sinusoids(times, 32).double())), **EXACT)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_norm_and_silu_in_one_step_back(memory_format):
    norm = nn.GroupNorm(4, 8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (random(3, 8, 5, 6, seed=1) * 3).to(memory_format=memory_format).requires_grad_()
    inputs, weight = (x, norm.weight, norm.bias), random(3, 8, 5, 6, seed=2)
    made, expected = norm_silu(norm, x), F.silu(norm(x))
    assert torch.equal(made, expected)
    assert made.is_contiguous(memory_format=memory_format)
    gradients = torch.autograd.grad((made * weight).sum(), inputs)
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    norm.requires_grad_(False)
    (alone,) = torch.autograd.grad((norm_silu(norm, x) * weight).sum(), x)
    torch.testing.assert_close(alone, gradients[0], rtol=1e-10, atol=1e-10)


def test_norm_and_silu_keep_one_map_for_the_way_back():
    def kept(function):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda _: None):
            function()
        return sum(size == x.numel() for size in sizes)

    norm, x = nn.GroupNorm(4, 8), torch.randn(2, 8, 6, 6, requires_grad=True)
    assert kept(lambda: norm_silu(norm, x)) == 1
    assert kept(lambda: F.silu(norm(x))) == 2


@pytest.mark.parametrize("channels", [(8, 8), (8, 12)])
def test_residual_block(channels):
    torch.manual_seed(0)
    ours = ResidualBlock(*channels, time_dim=16, groups=4).double()
    theirs = ResnetBlock2D(
        in_channels=channels[0], out_channels=channels[1], temb_channels=16, groups=4, eps=1e-5
    ).double()
    copy_residual(ours, theirs)
    x, time = random(2, 8, 6, 6), random(2, 16, seed=1)
    torch.testing.assert_close(ours(x, F.silu(time)), theirs(x, time), **EXACT)


@pytest.mark.parametrize("channels", [(8, 8), (8, 12)])
@pytest.mark.parametrize("resample, size", [("down", 3), ("up", 12)])
def test_resampling_stands_where_their_first_convolution_is(channels, resample, size):
    """With that convolution set to the identity, theirs is ours; with any other, it is not."""
    torch.manual_seed(0)
    ours = ResidualBlock(*channels, time_dim=16, groups=4, resample=resample).double()
    theirs = ResnetBlock2D(
        in_channels=channels[0],
        out_channels=channels[0],
        conv_2d_out_channels=channels[1],
        temb_channels=16,
        groups=4,
        eps=1e-5,
        **{resample: True},
    ).double()
    copy_residual(ours, theirs)
    x, time = random(2, 8, 6, 6), random(2, 16, seed=1)
    found = ours(x, F.silu(time))
    assert found.shape == (2, channels[1], size, size)
    assert not torch.allclose(found, theirs(x, time), atol=1e-3)
    nn.init.dirac_(theirs.conv1.weight)
    nn.init.zeros_(theirs.conv1.bias)
    torch.testing.assert_close(found, theirs(x, time), **EXACT)


def test_resampling_averages_and_repeats():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    down = ResidualBlock(1, 1, time_dim=1, groups=1, resample="down")
    up = ResidualBlock(1, 1, time_dim=1, groups=1, resample="up")
    time = torch.zeros(1, 1)
    assert down(x, time).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]  # a new block passes its input on
    assert torch.equal(up(x, time), x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_unknown_resampling_is_refused():
    with pytest.raises(ValueError, match="resample='half' is unknown; choose one of None, down, up"):
        ResidualBlock(8, 8, time_dim=8, groups=4, resample="half")


@pytest.mark.parametrize("context_dim", [None, 10])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(context_dim, masked):
    torch.manual_seed(0)
    ours = Attention(16, head_dim=4, context_dim=context_dim).double()
    theirs = TheirAttention(16, heads=4, dim_head=4, cross_attention_dim=context_dim).double()
    copy_attention(ours, theirs)
    tokens, context = random(2, 9, 16), None if context_dim is None else random(2, 9, 10, seed=1)
    keep = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.6 if masked else None
    bias = None if keep is None else torch.zeros(2, 1, 9).double().masked_fill(~keep[:, None], -10000.0)
    expected = theirs(tokens, encoder_hidden_states=context, attention_mask=bias)
    torch.testing.assert_close(ours(tokens, context, keep), expected, **EXACT)


def test_transformer_block():
    torch.manual_seed(0)
    ours = SlotTransformerBlock(16, 10, head_dim=4).double()
    theirs = BasicTransformerBlock(16, 4, 4, cross_attention_dim=10).double()
    copy_block(ours, theirs)
    tokens, slots = random(2, 9, 16), random(2, 5, 10, seed=1)
    torch.testing.assert_close(ours(tokens, slots), theirs(tokens, encoder_hidden_states=slots), **EXACT)


def test_transformer():
    torch.manual_seed(0)
    ours = SlotTransformer(16, 10, head_dim=4, depth=2, groups=4).double()
    theirs = Transformer2DModel(
        4, 4, in_channels=16, num_layers=2, cross_attention_dim=10, norm_num_groups=4, use_linear_projection=True
    ).double()
    copy_transformer(ours, theirs)
    x, slots = random(2, 16, 3, 5), random(2, 5, 10, seed=1)
    torch.testing.assert_close(ours(x, slots), theirs(x, slots, return_dict=False)[0], **EXACT)
    keep = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    expected = theirs(x, slots, encoder_attention_mask=keep, return_dict=False)[0]
    torch.testing.assert_close(ours(x, slots, keep), expected, **EXACT)


def test_positions_tell_cells_apart_that_are_alike():
    torch.manual_seed(0)
    x, slots = random(2, 16, 1, 1).expand(-1, -1, 4, 6), random(2, 3, 10)
    made = {}
    for frequencies in (None, 2):
        transformer = SlotTransformer(16, 10, head_dim=4, groups=4, position_frequencies=frequencies).double()
        torch.nn.init.normal_(transformer.project_out.weight)
        made[frequencies] = transformer(x, slots).flatten(2)
    torch.testing.assert_close(made[None], made[None][..., :1].expand(-1, -1, 24), **EXACT)
    distances = torch.cdist(made[2].transpose(1, 2), made[2].transpose(1, 2)) + torch.eye(24)
    assert distances.min() > 1e-3


def test_memory_format_is_kept():
    torch.manual_seed(0)
    time, slots = torch.randn(2, 16), torch.randn(2, 3, 10)
    transformer = SlotTransformer(16, 10, head_dim=4, groups=4)
    blocks = [ResidualBlock(16, 16, time_dim=16, groups=4, resample=how) for how in (None, "down", "up")]
    for channels_last in (False, True):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.randn(2, 16, 8, 8).to(memory_format=layout)
        assert transformer(x, slots).is_contiguous(memory_format=layout)
        for block in blocks:
            assert block.to(memory_format=layout)(x, time).is_contiguous(memory_format=layout)
