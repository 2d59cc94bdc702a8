import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
)

from hf_dl.models import ClipSegmenterConfig, ClipSegmenterForImageSegmentation
from hf_dl.models.clip_decoders import DECODERS, TransformerBlock, make_head, to_grid
from hf_dl.models.clip_segmenter import SMALL_CLIP, dice_loss
from hf_dl.models.layers_conditioning import FiLM, MultiHeadAttention
from tests.models.contract import SAME_CODE, ModelContract

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 20, "max_position_embeddings": 6, "bos_token_id": 18, "eos_token_id": 19, "pad_token_id": 0}
CLIP = {
    "projection_dim": 8,
    "text_config": {**TOWER, **TEXT},
    "vision_config": {**TOWER, "image_size": 16, "patch_size": 4},
}
DECODER = {"layers": [0, 1], "reduce_dim": 16, "num_attention_heads": 2, "intermediate_size": 16}


def make_config(**fields):
    return ClipSegmenterConfig(clip=CLIP, **{**DECODER, **fields})


def make_phrases(count, seed=0):
    """Three words, the end, and padding."""
    phrases = torch.randint(1, 18, (count, 6), generator=torch.Generator().manual_seed(seed))
    phrases[:, 0], phrases[:, 4], phrases[:, 5] = 18, 19, 0
    return phrases


class OfClip:
    """The names of the parameters of CLIP, which are frozen."""

    def __contains__(self, name):
        return name.startswith("clip.")


class TestClipSeg(ModelContract):
    model_class = ClipSegmenterForImageSegmentation
    auto_classes = ("AutoModelForImageSegmentation",)
    frozen = OfClip()
    checkpoints = ("mlp_in",)
    overfit_steps = 120
    overfit_learning_rate = 1e-2
    overfit_ratio = 0.3

    def config(self):
        return make_config(dice_weight=0.5)

    def inputs(self, batch):
        """Images whose bright patches are the mask, with a phrase and a support image."""
        draw = torch.Generator().manual_seed(batch)
        patches = torch.randn(batch, 1, 4, 4, generator=draw)
        return {
            "pixel_values": F.interpolate(patches.expand(-1, 3, -1, -1), scale_factor=4.0),
            "input_ids": make_phrases(batch, batch),
            "conditional_pixel_values": torch.randn(batch, 3, 16, 16, generator=draw),
            "labels": F.interpolate((patches > 0).float(), scale_factor=4.0)[:, 0],
        }


class TestUNet(TestClipSeg):
    skipped = {
        **SAME_CODE,
        "compiles_to_the_same_numbers": "another class tests the same code",
        "runs_in_half_precision": "another class tests the same code",
        "save_and_load_give_every_parameter_and_buffer_back": "another class tests the same code",
        "adapters_train_with_gradient_checkpointing": "the decoder has no blocks",
        "adapters_and_quantization_reach_every_linear_layer": "another class tests the same code",
    }

    def config(self):
        return make_config(decoder_type="unet")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ClipSegmenterForImageSegmentation(make_config()).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def count_images(model):
    """Count the images that pass through the first block of the image tower."""
    rows = []
    block = model.clip.vision_model.encoder.layers[0]
    hook = block.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    yield rows
    hook.remove()


# --------------------------------------------------------------------------------------------------------- definitions


def test_film_scales_and_shifts_each_channel():
    film = FiLM(2, 3)
    with torch.no_grad():
        film.multiply.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        film.multiply.bias.fill_(0.5)
        film.add.weight.zero_()
        film.add.bias.copy_(torch.tensor([10.0, 20, 30]))
    found = film(torch.tensor([[[1.0, 2, 3], [0, 0, 1]]]), torch.tensor([[2.0, -1]]))
    assert found.tolist() == [[[12.5, 19.0, 34.5], [10.0, 20.0, 31.5]]]


def test_attention_equals_the_one_of_torch():
    torch.manual_seed(0)
    ours, oracle = (
        MultiHeadAttention(8, 2, memory_dim=6),
        nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True),
    )
    key, value = ours.key_value.weight.chunk(2)
    names = {
        "q_proj_weight": ours.query.weight,
        "k_proj_weight": key,
        "v_proj_weight": value,
        "in_proj_bias": torch.cat([ours.query.bias, ours.key_value.bias]),
        "out_proj.weight": ours.output.weight,
        "out_proj.bias": ours.output.bias,
    }
    oracle.load_state_dict(names)
    queries, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    torch.testing.assert_close(ours(queries, memory), oracle(queries, memory, memory)[0])


def test_a_block_equals_the_post_norm_layer_of_torch():
    torch.manual_seed(0)
    block, oracle = TransformerBlock(8, 2, 12), nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    attention = block.attention
    names = {
        "self_attn.in_proj_weight": torch.cat([attention.query.weight, attention.key_value.weight]),
        "self_attn.in_proj_bias": torch.cat([attention.query.bias, attention.key_value.bias]),
        "self_attn.out_proj.weight": attention.output.weight,
        "self_attn.out_proj.bias": attention.output.bias,
        "linear1.weight": block.mlp_in.weight,
        "linear1.bias": block.mlp_in.bias,
        "linear2.weight": block.mlp_out.weight,
        "linear2.bias": block.mlp_out.bias,
        **{f"norm1.{name}": value for name, value in block.attention_norm.named_parameters()},
        **{f"norm2.{name}": value for name, value in block.mlp_norm.named_parameters()},
    }
    oracle.load_state_dict(names)
    tokens = torch.randn(2, 5, 8)
    torch.testing.assert_close(block(tokens), oracle(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patch_size", [1, 2, 7, 8, 14, 16, 32])
def test_the_heads_draw_every_pixel(patch_size):
    for refined in (False, True):
        assert make_head(4, patch_size, refined)(torch.zeros(1, 4, 2, 3)).shape == (
            1,
            1,
            2 * patch_size,
            3 * patch_size,
        )


@pytest.mark.parametrize("patch_size", [1, 2, 8, 14])
def test_the_unet_draws_every_pixel(patch_size):
    decoder = DECODERS["unet"](1, 6, 5, patch_size, reduce_dim=8)
    shape = decoder(torch.randn(2, 1, 1 + 2 * 3, 6), torch.randn(2, 5), (2, 3)).shape
    assert shape == (2, 2 * patch_size, 3 * patch_size)


@pytest.mark.parametrize("patch_size", [8, 14])
def test_the_unet_equals_its_definition(patch_size):
    """Nearest enlargement, concatenation and one convolution per stage, all of them once per phrase."""
    torch.manual_seed(0)
    decoder, index, grid = (
        DECODERS["unet"](3, 6, 5, patch_size, reduce_dim=16).double(),
        torch.tensor([1, 0, 1]),
        (2, 3),
    )
    features, prompt = torch.randn(2, 3, 1 + 2 * 3, 6).double().requires_grad_(), torch.randn(3, 5).double()
    tokens = [reduce(features[index, -1 - depth]) for depth, reduce in enumerate(decoder.reduces)]
    x = decoder.bottleneck(to_grid(decoder.film(tokens[0], prompt), grid)).relu()
    for stage, conv in enumerate(decoder.stages, start=1):
        x, join = F.interpolate(x, size=[side * decoder.scales[stage] for side in grid]), stage - decoder.first_join
        if join >= 0:
            x = torch.cat([x, decoder.enlarge[join](to_grid(tokens[1 + join], grid))], dim=1)
        x = conv(x).relu()
    expected, found = decoder.output(x)[:, 0], decoder(features, prompt, grid, index)
    torch.testing.assert_close(found, expected)
    parts = [features, *decoder.parameters()]
    for left, right in zip(*(torch.autograd.grad(y.square().sum(), parts) for y in (found, expected)), strict=True):
        torch.testing.assert_close(left, right)


def count_operations(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_parts_of_the_unet_without_the_phrase_run_once_per_image():
    decoder = DECODERS["unet"](3, 64, 64, 8, reduce_dim=64)
    features, prompt, grid = torch.randn(1, 3, 65, 64), torch.randn(10, 64), (8, 8)
    one, ten, apart = (
        count_operations(
            lambda features=features, count=count, index=index: decoder(features, prompt[:count], grid, index)
        )
        for features, count, index in (
            (features, 1, None),
            (features, 10, torch.zeros(10).long()),
            (features.expand(10, -1, -1, -1), 10, None),
        )
    )
    assert apart == 10 * one and ten < 0.7 * apart


# -------------------------------------------------------------------------------- the model of the paper, as published


def test_the_decoder_has_the_size_of_the_published_one():
    with torch.device("meta"):
        for refined, count in ((False, 1_073_153), (True, 1_127_009)):
            config = ClipSegmenterConfig(clip={"vision_config": {"patch_size": 16}}, refined=refined)
            model = ClipSegmenterForImageSegmentation(config)
            assert config.layers == [3, 6, 9]
            assert sum(parameter.numel() for parameter in model.patch_decoder.parameters()) == count
            assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == count


def make_clipseg(refined, extract_layers=(0, 2)):
    tower = {**TOWER, "num_hidden_layers": 4}
    torch.manual_seed(0)
    config = CLIPSegConfig(
        text_config={**tower, **TEXT},
        vision_config={**tower, "image_size": 48, "patch_size": 16},
        projection_dim=8,
        extract_layers=list(extract_layers),
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
        use_complex_transposed_convolution=refined,
    )
    model = CLIPSegForImageSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases are zero initially, which would hide an error
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("refined, layers", [(False, (0, 2)), (True, (0, 1, 3))])
def test_a_converted_clipseg_gives_the_same_outputs(refined, layers, tmp_path):
    theirs = make_clipseg(refined, layers)
    theirs.save_pretrained(tmp_path)
    ours = ClipSegmenterForImageSegmentation.from_clipseg(tmp_path, threshold=0.4)
    assert ours.config.refined == refined and ours.config.layers == list(layers) and ours.config.threshold == 0.4
    images, phrases, masks = torch.randn(2, 3, 48, 48), make_phrases(2), torch.randint(2, (2, 48, 48)).float()
    expected = theirs(pixel_values=images, input_ids=phrases, labels=masks)
    found = ours(images, phrases, labels=masks)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.prompt_embeds, expected.conditional_embeddings, rtol=1e-5, atol=1e-5)
    support = torch.randn(2, 3, 48, 48)
    expected = theirs(pixel_values=images, conditional_pixel_values=support).logits
    found = ours(images, conditional_pixel_values=support).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert ours.patch_decoder.film.multiply.weight.requires_grad and not ours.clip.logit_scale.requires_grad


def test_a_clipseg_that_cannot_be_converted_is_refused():
    theirs = make_clipseg(False)
    theirs.config.conditional_layer = 1
    with pytest.raises(ValueError, match="conditional_layer=1 is not supported. Expected 0"):
        ClipSegmenterForImageSegmentation.from_clipseg(theirs)
    theirs = make_clipseg(True)
    theirs.config.vision_config.patch_size = 32
    with pytest.raises(ValueError, match="patch_size=32 is not supported. Expected 16"):
        ClipSegmenterForImageSegmentation.from_clipseg(theirs)


# ----------------------------------------------------------------------------------------------------- the frozen CLIP


def test_any_clip_is_taken(tmp_path):
    clip = CLIPModel(CLIPConfig.from_dict(CLIP))
    clip.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 16}).save_pretrained(tmp_path)
    model = ClipSegmenterForImageSegmentation.from_clip(tmp_path, **DECODER)
    assert not model.training
    for name, weight in clip.state_dict().items():
        assert torch.equal(model.clip.state_dict()[name], weight), name
    found, expected = model.clip.config.to_dict(), clip.config.to_dict()
    assert found["vision_config"]["patch_size"] == 4 and found["text_config"] == expected["text_config"] | {
        "dtype": None
    }
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is CLIPImageProcessor
    with torch.no_grad():
        clip.logit_scale.fill_(1.5)
    again = ClipSegmenterForImageSegmentation.from_clip(clip, decoder_type="deconv", **DECODER)
    assert again.clip.logit_scale == 1.5 and again.config.feature_layers == [1]
    make_clipseg(False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'clipseg'. Expected a folder or Hub id of a 'clip'"):
        ClipSegmenterForImageSegmentation.from_clip(tmp_path)
    with pytest.raises(ValueError, match="clip is a CLIPSegForImageSegmentation. Expected a CLIPModel"):
        ClipSegmenterForImageSegmentation.from_clip(make_clipseg(False))


def test_clip_is_frozen_also_after_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = ClipSegmenterForImageSegmentation.from_pretrained(tmp_path)
    for each in (copy.deepcopy(model), loaded):
        each.train()
        assert each.training and each.patch_decoder.training
        assert not any(module.training for module in each.clip.modules())
        trained = [name for name, parameter in each.named_parameters() if parameter.requires_grad]
        assert trained == [f"patch_decoder.{name}" for name, _ in each.patch_decoder.named_parameters()]


def test_one_image_with_many_phrases_is_encoded_once(model, images, count_images):
    phrases = make_phrases(10)
    found = model(images[:1], phrases).logits
    assert count_images == [1]
    one_by_one = torch.cat([model(images[:1], phrase[None]).logits for phrase in phrases])
    assert len(count_images) == 11
    torch.testing.assert_close(found, one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoder_type", DECODERS)
def test_phrases_find_their_image(decoder_type, images):
    model = ClipSegmenterForImageSegmentation(make_config(decoder_type=decoder_type)).eval()
    phrases, index = make_phrases(3), torch.tensor([1, 0, 1])
    found = model(images, phrases, image_index=index).logits
    torch.testing.assert_close(found, model(images[index], phrases).logits, rtol=1e-4, atol=1e-5)


def test_stored_features_take_the_place_of_the_image(model, images, count_images):
    phrases = make_phrases(2)
    expected = model(images, phrases)
    features = model.encode_images(images)
    assert features.shape == (2, 2, 17, 16)
    count_images.clear()
    found = model(vision_features=features, prompt_embeds=expected.prompt_embeds)
    assert not count_images
    torch.testing.assert_close(found.logits, expected.logits)
    assert features.grad_fn is None and expected.prompt_embeds.grad_fn is None


def test_only_the_blocks_that_are_read_run(images):
    model = ClipSegmenterForImageSegmentation(make_config(layers=[0], reduce_dim=8)).eval()
    model.clip.vision_model.encoder.layers[1].forward = None
    assert model.encode_images(images).shape == (2, 1, 17, 16)


def test_rectangular_images_interpolate_the_positions(model, images):
    wide = torch.cat([images[:1], images[1:]], dim=3)  # 16x32
    phrases = make_phrases(1)
    found = model(wide, phrases)
    assert found.logits.shape == (1, 16, 32)
    full = model.clip.vision_model(pixel_values=wide, interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(model.encode_images(wide)[:, 1], full.hidden_states[2], rtol=1e-5, atol=1e-5)
    stored = model(vision_features=model.encode_images(wide), image_size=(16, 32), input_ids=phrases)
    torch.testing.assert_close(stored.logits, found.logits)
    tall = model(wide.transpose(2, 3), phrases).logits
    assert tall.shape == (1, 32, 16)


def test_a_phrase_and_a_support_image_are_mixed(model, images):
    phrases = make_phrases(2)
    text, image = model.encode_prompts(phrases), model.encode_prompts(conditional_pixel_values=images)
    found = model.encode_prompts(phrases, None, images, text_weight=0.25)
    torch.testing.assert_close(found, 0.25 * text + 0.75 * image)
    found = model(images, phrases, conditional_pixel_values=images, text_weight=torch.tensor([1.0, 0.0])).prompt_embeds
    torch.testing.assert_close(found, torch.stack([text[0], image[1]]))


# ------------------------------------------------------------------------------------------------------------ the loss


def test_the_loss_is_cross_entropy_with_optional_dice(images):
    torch.manual_seed(0)
    model, phrases = ClipSegmenterForImageSegmentation(make_config()).eval(), make_phrases(2)
    masks = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    plain = model(images, phrases, labels=masks)
    torch.testing.assert_close(plain.loss, F.binary_cross_entropy_with_logits(plain.logits, masks.float()))
    model.config.dice_weight = 2.0
    found = model(images, phrases, labels=masks).loss
    torch.testing.assert_close(found, plain.loss + 2 * dice_loss(plain.logits, masks.float()))
    small = model(images, phrases, labels=masks[:, ::2, ::2]).loss
    assert small.isfinite() and small != found


def test_dice_by_hand():
    logits = torch.tensor([[[99.0, 99.0, -99.0, -99.0]], [[-99.0] * 4]])
    masks = torch.tensor([[[1.0, 0, 1, 0]], [[0.0] * 4]])
    assert dice_loss(logits, masks).item() == pytest.approx(((1 - 3 / 5) + 0) / 2)


# --------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"decoder_type": "mlp"}, "decoder_type='mlp' is unknown. Choose one of: clipseg, deconv, unet."),
        (
            {"layers": [0, 2]},
            "layers=[0, 2] must be different blocks of the image tower in ascending order, from 0 to 1",
        ),
        ({"layers": [1, 0]}, "layers=[1, 0] must be different blocks"),
        ({"layers": []}, "layers=[] must be different blocks"),
        ({"reduce_dim": 0}, "reduce_dim=0 must be at least 1."),
        ({"reduce_dim": 15}, "reduce_dim=15 must be a multiple of num_attention_heads=2."),
        ({"dice_weight": -1.0}, "dice_weight=-1.0 must be at least 0."),
        ({"threshold": 1.0}, "threshold=1.0 must be above 0 and below 1."),
        ({"decoder_type": "unet", "refined": True}, "refined=True does not work with decoder_type='unet'"),
    ],
)
def test_a_wrong_config_is_refused(fields, sentence):
    with pytest.raises(Exception, match=re.escape(sentence)):
        make_config(**fields)


def test_too_many_layers_for_the_unet_are_refused():
    clip = {**CLIP, "vision_config": {**CLIP["vision_config"], "patch_size": 1}}
    with pytest.raises(Exception, match="layers has 2 entries, but decoder_type='unet' has 1 resolutions"):
        ClipSegmenterConfig(clip=clip, decoder_type="unet", layers=[0, 1])


@pytest.mark.parametrize(
    "inputs, sentence",
    [
        ({}, "Pass either pixel_values or vision_features."),
        ({"pixel_values": torch.zeros(1, 1, 16, 16)}, "pixel_values has shape (1, 1, 16, 16). Expected (images, 3"),
        ({"pixel_values": torch.zeros(1, 3, 16, 18)}, "height 16 and width 18. Expected multiples of patch_size=4."),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, "There are 2 images and 3 phrases. Pass image_index"),
        ({"image_index": torch.zeros(2).long()}, "image_index has shape (2,). Expected (3,)."),
        ({"image_index": torch.tensor([0, 0, 1])}, "image_index has the value 1. Expected numbers from 0 to 0."),
        ({"image_index": torch.tensor([0, -1, 0])}, "image_index has the value -1. Expected numbers from 0 to 0."),
        ({"input_ids": None}, "No phrase is given. Pass input_ids"),
        ({"labels": torch.zeros(1, 16, 16)}, "labels has shape (1, 16, 16). Expected (3, height, width)"),
        (
            {"labels": torch.full((3, 16, 16), 255)},
            "labels has the value 255. Expected masks in [0, 1]; divide by 255.",
        ),
        (
            {"vision_features": torch.zeros(1, 2, 16, 16)},
            "vision_features has shape (1, 2, 16, 16). Expected (images, 2, 17, 16) for images of 16x16 pixels.",
        ),
        ({"labels": torch.full((3, 16, 16), torch.nan)}, "labels has the value nan. Expected masks in [0, 1]."),
        ({"labels": -torch.ones(3, 16, 16)}, "labels has the value -1. Expected masks in [0, 1]."),
        ({"input_ids": torch.full((3, 4), 20)}, "input_ids has the value 20. Expected ids from 0 to 19; use the"),
        ({"input_ids": -torch.ones(3, 4).long()}, "input_ids has the value -1. Expected ids from 0 to 19"),
        ({"input_ids": torch.ones(3, 4)}, "input_ids has dtype torch.float32. Expected int64 token ids."),
        ({"input_ids": torch.ones(4).long()}, "input_ids has shape (4,). Expected (phrases, length)"),
        (
            {"input_ids": torch.ones(3, 7).long()},
            "input_ids has shape (3, 7). Expected (phrases, length) of at most 6",
        ),
        ({"attention_mask": torch.ones(3, 5)}, "attention_mask has shape (3, 5). Expected (3, 6)."),
        ({"conditional_pixel_values": torch.zeros(3, 3, 4, 6)}, "height 4 and width 6. Expected multiples"),
        ({"conditional_pixel_values": torch.zeros(2, 3, 4, 4)}, "There are 2 support images and 3 phrases."),
        (
            {"conditional_pixel_values": torch.zeros(3, 3, 4, 4), "text_weight": torch.ones(2)},
            "text_weight has shape (2,). Expected a number, or (3,).",
        ),
        ({"prompt_embeds": torch.zeros(3, 7)}, "prompt_embeds has shape (3, 7). Expected (phrases, 8)."),
    ],
)
def test_wrong_inputs_are_refused(inputs, sentence, model):
    if inputs and "vision_features" not in inputs:
        inputs = {"pixel_values": torch.zeros(1, 3, 16, 16), **inputs}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model(**{"input_ids": make_phrases(3), **inputs})


def test_the_default_clip_reads_small_images():
    config = ClipSegmenterConfig()
    assert config.layers == [1, 2, 3] and config.clip["vision_config"]["image_size"] == 64
    assert config.clip_config.to_dict() == CLIPConfig.from_dict(dict(SMALL_CLIP)).to_dict()
    assert "attn_implementation" not in SMALL_CLIP
