import numpy as np
import pytest
import torch

from hf_dl.explain import attention_maps, gradient_rollout, record_attention, rollout
from tests.explain.tiny import PREFIX, VITS, make_convnet, make_images, make_vit


def eager_attentions(kind, images, **options):
    """Return the attention that the model itself returns: eager attention for transformers, our own for ours."""
    model = make_vit(kind, attention=None if kind == "small_vit" else "eager")
    return model, model(images, output_attentions=True, **options)


@pytest.mark.parametrize("kind", VITS)
def test_attention_under_sdpa_is_the_eager_one(kind):
    model, images = make_vit(kind), make_images()
    if kind != "small_vit":
        assert model.config._attn_implementation == "sdpa"
    _, expected = eager_attentions(kind, images)
    output = record_attention(model, images)
    assert len(output.attentions) == 3 and output.num_prefix_tokens == PREFIX[kind] and output.grid == (4, 4)
    for ours, theirs in zip(output.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
    only = record_attention(model, images, only_cls=True)
    for row, whole in zip(only.attentions, output.attentions, strict=True):
        assert row.shape[2] == 1
        torch.testing.assert_close(row[:, :, 0], whole[:, :, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2"])
def test_a_model_that_runs_eager_is_read_too(kind):
    images = make_images()
    model, expected = eager_attentions(kind, images)
    output = record_attention(model, images)
    for ours, theirs in zip(output.attentions, expected.attentions, strict=True):
        assert torch.equal(ours, theirs)
    by_sdpa = record_attention(make_vit(kind), images, gradients=True, classes=2)
    by_eager = record_attention(model, images, gradients=True, classes=2)
    for one, other in zip(by_sdpa.gradients, by_eager.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", VITS)
def test_gradients_are_those_of_the_attention_itself(kind):
    images, classes = make_images(), [1, 3]
    model, expected = eager_attentions(kind, images)
    score = expected.logits[0, 1] + expected.logits[1, 3]
    gradients = torch.autograd.grad(score, expected.attentions)
    frozen = make_vit(kind).requires_grad_(False)
    output = record_attention(frozen, images, gradients=True, classes=classes)
    assert output.classes.tolist() == classes
    for ours, theirs in zip(output.gradients, gradients, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())
    assert images.grad is None and not images.requires_grad


@pytest.mark.parametrize("kind", VITS)
def test_images_that_are_not_square(kind):
    images = make_images(2, 12, 24)
    options = {"interpolate_pos_encoding": True} if kind in ("vit", "deit") else {}
    _, expected = eager_attentions(kind, images, **options)
    maps, output = attention_maps(make_vit(kind), images, layer=1, head=1)
    assert output.grid == (3, 6) and maps.shape == (2, 3, 6)
    wanted = expected.attentions[1][:, 1, 0, PREFIX[kind] :].reshape(2, 3, 6)
    torch.testing.assert_close(maps, wanted, rtol=0, atol=1e-6)


def test_rollout_of_two_layers_by_hand():
    draw = np.random.default_rng(0)
    a, b = (draw.random((2, 3, 5, 5)) for _ in range(2))
    a, b = a / a.sum(-1, keepdims=True), b / b.sum(-1, keepdims=True)
    expected = ((b.mean(1) + np.eye(5)) / 2) @ ((a.mean(1) + np.eye(5)) / 2)
    found = rollout([torch.tensor(a).float(), torch.tensor(b).float()])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("heads", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.5, 0.9])
def test_rows_of_a_rollout_sum_to_one(heads, discard):
    output = record_attention(make_vit("dinov2"), make_images())
    rows = rollout(output.attentions, heads=heads, discard=discard).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-5)


def test_discarding_keeps_the_largest_entries():
    attention = torch.tensor([[[[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.25, 0.25, 0.5]]]])
    found = rollout([attention], discard=0.5)  # four of nine entries go: 0.1, 0.1, 0.2, one 0.25
    assert found[0, 0, 2] == 0 and found[0, 1, 2] == 0 and found[0, 1, 0] == 0
    torch.testing.assert_close(found[0, 0, 0], torch.tensor((0.6 / 0.9 + 1) / 2))


def test_gradient_rollout_of_two_layers_by_hand():
    draw = np.random.default_rng(1)
    a, b = draw.random((2, 1, 3, 4, 4))
    g, h = draw.standard_normal((2, 1, 3, 4, 4))
    first = np.eye(4) + np.maximum(a * g, 0).mean(1)
    expected = first + np.maximum(b * h, 0).mean(1) @ first
    tensors = [[torch.tensor(x) for x in pair] for pair in ((a, b), (g, h))]
    np.testing.assert_allclose(gradient_rollout(*tensors), expected)


def test_gradient_rollout_asks_for_a_class_and_attention_does_not():
    model, images = make_vit("vit"), make_images()
    one, other = (attention_maps(model, images, method="gradient_rollout", classes=c)[0] for c in (0, 1))
    assert one.shape == (2, 4, 4) and (one >= 0).all() and not torch.allclose(one, other, rtol=1e-2)
    for method in ("cls", "rollout"):
        one, other = (attention_maps(model, images, method=method, classes=c)[0] for c in (0, 1))
        assert torch.equal(one, other)


def test_maps_of_a_layer_are_the_mean_of_its_heads_and_of_a_batch_its_rows():
    model, images = make_vit("deit"), make_images(3)
    maps, _ = attention_maps(model, images, layer=0)
    heads = [attention_maps(model, images, layer=0, head=head)[0] for head in range(2)]
    torch.testing.assert_close(maps, sum(heads) / 2)
    for method in ("cls", "rollout", "gradient_rollout"):
        together, _ = attention_maps(model, images, method=method)
        for row in range(3):
            alone, _ = attention_maps(model, images[row : row + 1], method=method)
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-6)


def test_an_attention_mask_of_the_model_is_seen():
    images = make_images()
    keep = torch.ones(2, 17, dtype=torch.bool)
    keep[:, 6] = False

    class Masked(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, pixel_values):
            return self.model(pixel_values, attention_mask=keep)

    for kind in ("vit", "small_vit"):
        model = make_vit(kind)
        _, expected = eager_attentions(kind, images, attention_mask=keep)
        output = record_attention(Masked(model), images)
        for ours, theirs in zip(output.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
            assert (ours[..., 6] == 0).all()


def test_the_model_is_left_as_it_was():
    model = make_vit("vit").train()
    attention_maps(model, make_images(), method="gradient_rollout")
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "flow"}, "method='flow' is unknown; choose one of cls, rollout, gradient_rollout"),
        ({"layer": 3}, "layer=3 must be from -3 to 2"),
        ({"head": 2}, "head=2 must be from 0 to 1"),
        ({"method": "gradient_rollout", "classes": 5}, "classes=\\[5, 5\\] is invalid. Expected one class"),
    ],
)
def test_what_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        attention_maps(make_vit("vit"), make_images(), **options)


def test_models_without_attention_or_cls_token_are_refused():
    with pytest.raises(ValueError, match="model=ConvNet has attention over no tokens"):
        attention_maps(make_convnet(), make_images())

    class Bare(torch.nn.Module):
        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)[:, None]
            return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mean(1)

    with pytest.raises(ValueError, match="model=Bare has no CLS token"):
        attention_maps(Bare(), make_images())
    with pytest.raises(ValueError, match="only_cls=True with gradients=True"):
        record_attention(Bare(), make_images(), only_cls=True, gradients=True)
    with pytest.raises(ValueError, match="heads='sum' is unknown"):
        rollout([torch.ones(1, 1, 2, 2)], heads="sum")
    with pytest.raises(ValueError, match="discard=1 must be at least 0 and below 1"):
        rollout([torch.ones(1, 1, 2, 2)], discard=1)
