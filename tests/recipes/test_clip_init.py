import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from hf_dl.recipes.clip_init import OFFSETS, init_like_convolution, init_like_word_average


def make_encoder(**changes):
    fields = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    encoder = CLIPVisionModel(CLIPVisionConfig(**(fields | {"image_size": 48, "patch_size": 6} | changes)))
    encoder.set_attn_implementation("eager")
    return encoder.eval()


def test_each_head_attends_to_the_patch_at_its_offset():
    encoder = make_encoder()
    init_like_convolution(encoder, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = encoder(pixel_values=torch.randn(2, 3, 48, 48), output_attentions=True)
    for attention, offsets in zip(output.attentions, OFFSETS, strict=True):
        patches = attention[:, :, 1:, 1:].unflatten(2, (8, 8))
        for head, (down, right) in enumerate(offsets):
            for row, column in ((1, 1), (3, 4), (6, 6)):
                found = patches[:, head, row, column]
                assert found.argmax(1).tolist() == [8 * (row + down) + column + right] * 2 and found.max() > 0.5
        assert attention[:, :, 0].max() < 0.1  # the class token averages all patches


def test_patches_are_edges_in_gray_and_mean_colors():
    encoder = make_encoder()
    init_like_convolution(encoder, generator=torch.Generator().manual_seed(0))
    positions, edges, colors = encoder.embeddings.patch_embedding.weight.split([16, 36, 12])
    assert not positions.any()
    assert torch.equal(edges[:, 0], edges[:, 1]) and torch.equal(edges[:, 0], edges[:, 2])
    assert edges.sum((2, 3)).abs().max() < 1e-5 < edges.abs().mean()
    assert torch.equal(colors, colors[:, :, :1, :1].expand_as(colors)) and colors.std(1).min() > 0


def test_a_single_head_leaves_half_of_the_channels_to_the_content():
    encoder = make_encoder(hidden_size=8, num_attention_heads=1)
    init_like_convolution(encoder)
    positions, content = encoder.embeddings.patch_embedding.weight.split([4, 4])
    assert not positions.any() and content.any() and encoder.encoder.layers[0].self_attn.out_proj.weight[4:].any()


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 32}, {"patch_size": 48}, {"hidden_size": 4, "num_attention_heads": 1}]
)
def test_encoders_without_room_for_positions_are_refused(changes):
    with pytest.raises(ValueError, match="Expected hidden_size of at least 8, at least 4 channels and 2x2 patches"):
        init_like_convolution(make_encoder(**changes))


def test_texts_start_as_averages_of_their_words():
    torch.manual_seed(0)
    fields = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=20, eos_token_id=3, **fields)).eval()
    red_cube, red_cone, blue_cube, blue_cone = (torch.tensor([[1, 4, a, b, 3]]) for a in (5, 6) for b in (7, 8))

    def differences():
        with torch.no_grad():
            features = [text(input_ids=ids).pooler_output for ids in (red_cube, red_cone, blue_cube, blue_cone)]
        red, blue = features[0] - features[1], features[2] - features[3]
        return torch.cosine_similarity(red, blue).item(), (red.norm() / features[0].norm()).item()

    before = differences()
    init_like_word_average(text, [0, 1, 2, 3], generator=torch.Generator().manual_seed(0))
    same, size = differences()
    assert not text.embeddings.token_embedding.weight[:4].any()
    assert same > 0.8 and size > 0.4 > before[1]
