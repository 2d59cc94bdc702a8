import pytest
import torch
from torch import nn

from hf_dl.explain import class_logits, default_layers, find_blocks, normalize, token_grid, upsample
from tests.explain.tiny import PREFIX, VITS, make_convnet, make_images, make_resnet, make_vit


@pytest.mark.parametrize(
    ("tokens", "size", "patch", "expected"),
    [
        (197, (224, 224), None, ((14, 14), 1)),
        (197, (224, 224), (16, 16), ((14, 14), 1)),
        (201, (224, 224), (16, 16), ((14, 14), 5)),
        (26, (64, 96), (16, 16), ((4, 6), 2)),
        (25, (64, 96), None, ((4, 6), 1)),
        (17, (32, 64), (8, 16), ((4, 4), 1)),
        (49, (224, 224), (4, 4), ((7, 7), 0)),  # merged patches
        (196, (224, 224), None, ((14, 14), 0)),
    ],
)
def test_token_grid(tokens, size, patch, expected):
    assert token_grid(tokens, size, patch) == expected


def test_a_number_of_tokens_that_is_no_grid_is_refused():
    with pytest.raises(ValueError, match="num_tokens=150 does not match a grid .* 64x200 pixels. Set the patch size"):
        token_grid(150, (64, 200))


@pytest.mark.parametrize("kind", VITS)
def test_logits_of_models_of_transformers(kind):
    model, images = make_vit(kind), make_images()
    torch.testing.assert_close(class_logits(model, images), model(images).logits)
    wide = make_images(1, 8, 24)
    assert class_logits(model, wide).shape == (1, 5)
    if kind in ("vit", "deit"):
        expected = model(wide, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(class_logits(model, wide), expected)


def test_logits_may_come_bare_or_first_of_a_tuple_but_not_otherwise():
    class Returns(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, pixel_values):
            return self.value

    images = make_images()
    assert class_logits(Returns((torch.ones(2, 3), None)), images).shape == (2, 3)
    with pytest.raises(ValueError, match="model=Returns returned \\(2, 3, 4\\). Expected logits \\(2, classes\\)"):
        class_logits(Returns(torch.ones(2, 3, 4)), images)
    with pytest.raises(ValueError, match="model=Returns returned dict. Expected logits"):
        class_logits(Returns({}), images)


@pytest.mark.parametrize("kind", VITS)
def test_blocks_are_found(kind):
    assert len(find_blocks(make_vit(kind))) == 3


def test_default_layers():
    images = make_images()
    assert default_layers(make_vit("vit"), images, 2) == [
        "vit.layers.1.layernorm_before",
        "vit.layers.2.layernorm_before",
    ]
    assert default_layers(make_vit("small_vit"), images) == ["small_vit.blocks.2.attention_norm"]
    assert default_layers(make_convnet(), images) == ["second"]
    assert default_layers(make_convnet(), images, 2) == ["first", "second"]
    resnet = make_resnet()
    last = dict(resnet.named_modules())[default_layers(resnet, make_images(1, 64, 64))[0]]
    assert last in (resnet.resnet.encoder.stages[-1], resnet.resnet.encoder.stages[-1].layers)
    with pytest.raises(ValueError, match="count=4 layers of model=ViTForImageClassification must be 1 to 3"):
        default_layers(make_vit("vit"), images, 4)
    with pytest.raises(ValueError, match="model=ConvNet has no list of transformer blocks"):
        find_blocks(make_convnet())


def test_normalize_and_upsample():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]])
    torch.testing.assert_close(normalize(maps)[0], torch.tensor([[0.0, 1.0], [0.5, 0.0]]))
    assert (normalize(maps)[1] == 0).all()
    large = upsample(maps, (4, 8))
    assert large.shape == (2, 4, 8)
    torch.testing.assert_close(large[1], torch.full((4, 8), 5.0))


def test_prefixes_are_what_the_tests_think():
    for kind, prefix in PREFIX.items():
        model = make_vit(kind)
        base = getattr(model, model.base_model_prefix)
        assert base(make_images()).last_hidden_state.shape[1] == 16 + prefix
