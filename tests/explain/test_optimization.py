import pytest
import torch
from torch import nn

from hf_dl.explain.optimization import (
    Ascent,
    activation_maximization,
    class_model,
    class_score,
    feature_inversion,
    total_variation,
)
from tests.explain.tiny import NETWORKS, assert_untouched, make_convnet, make_images, make_network

SIZE = (2, 3, 4, 4)


def make_linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).double()


def tv_gradient(x):
    """The derivative of the sum of squared differences, pixel by pixel."""
    found = torch.zeros_like(x)
    for dim in (2, 3):
        for i in range(x.shape[dim]):
            for j in (i - 1, i + 1):
                if 0 <= j < x.shape[dim]:
                    found.select(dim, i).add_(2 * (x.select(dim, i) - x.select(dim, j)))
    return found / 48


def test_the_class_model_of_a_linear_network_by_hand():
    """The gradient is w_c / std - decay * 2 (x - 0.5) / n - tv * dTV/dx; a step has a fixed length."""
    model, images = make_linear(), torch.zeros(*SIZE, dtype=torch.float64)
    ascent = Ascent(steps=6, learning_rate=0.05, decay=3.0, tv=0.7, jitter=0, blur=0, seed=5)
    output = class_model(model, images, classes=[1, 4], ascent=ascent, image_mean=0.3, image_std=0.25)
    x = (0.5 + 0.01 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5))).double().expand(SIZE)
    weights, bias = model[1].weight[[1, 4]].view(SIZE).detach(), model[1].bias[[1, 4]].detach()
    for step in range(6):
        scores = (weights * (x - 0.3) / 0.25).sum((1, 2, 3)) + bias
        torch.testing.assert_close(output.history[step], scores, rtol=1e-10, atol=1e-12)
        gradient = weights / 0.25 - 3.0 * 2 * (x - 0.5) / 48 - 0.7 * tv_gradient(x)
        x = (x + 0.05 * gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt()).clamp(0, 1)
    torch.testing.assert_close(output.pictures, x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output.scores, (weights * (x - 0.3) / 0.25).sum((1, 2, 3)) + bias)
    assert output.target.tolist() == [1, 4]


def test_jitter_moves_and_blur_smooths():
    model, images = make_linear(), torch.zeros(*SIZE, dtype=torch.float64)
    options = {"steps": 8, "learning_rate": 0.1, "tv": 0.0, "decay": 0.0}
    sharp = class_model(model, images, classes=0, ascent=Ascent(**options, jitter=0, blur=0))
    smooth = class_model(model, images, classes=0, ascent=Ascent(**options, jitter=0, blur=1.0))
    moved = class_model(model, images, classes=0, ascent=Ascent(**options, jitter=1, blur=0))
    assert (total_variation(smooth.pictures) < 0.7 * total_variation(sharp.pictures)).all()
    assert moved.scores.max() < sharp.scores.min()
    again = class_model(model, images, classes=0, ascent=Ascent(**options, jitter=1, blur=0))
    assert torch.equal(again.pictures, moved.pictures)


def test_a_page_can_stop_the_climb():
    model, images = make_linear(), torch.zeros(*SIZE, dtype=torch.float64)
    ascent, seen = Ascent(steps=50, jitter=0, tv=0), []
    for pictures, scores in ascent.climb(class_score(model, torch.tensor([0, 1])), ascent.start(images), 0.5, 0.5):
        seen.append(scores.sum().item())
        assert pictures.shape == SIZE and pictures.min() >= 0 and pictures.max() <= 1
        if len(seen) == 3:
            break
    assert seen[2] > seen[0]


@pytest.mark.parametrize("position", [None, (1, 2)])
def test_a_neuron_of_a_linear_layer_by_hand(position):
    """A 1x1 convolution: only its position moves, or all positions alike, in the direction of the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(), nn.Linear(6 * 16, 2)).double()
    images = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    ascent = Ascent(steps=1, learning_rate=0.01, decay=0, tv=0, jitter=0, blur=0)
    output = activation_maximization(model, images, channels=[5, 2], layer="0", position=position, ascent=ascent)
    change = output.pictures - ascent.start(images)
    for row, channel in enumerate((5, 2)):
        direction = torch.zeros(3, 4, 4, dtype=torch.float64)
        weights = model[0].weight[channel].detach()
        if position is None:
            direction += weights
        else:
            direction[:, 1, 2] = weights[:, 0, 0]
        torch.testing.assert_close(change[row], 0.01 * direction / direction.square().mean().sqrt())
    values = model[0](2 * output.pictures - 1).detach()[torch.arange(2), [5, 2]]
    torch.testing.assert_close(output.scores, values.sum((1, 2)) if position is None else values[:, 1, 2])


def test_inversion_descends_the_loss_of_the_paper_by_hand():
    """Adam's first step is the learning rate times the sign of the gradient, (1 - beta) cancels."""
    model = make_linear()
    images = torch.rand(*SIZE, generator=torch.Generator().manual_seed(1)).double()
    one = feature_inversion(model, images, layer="1", steps=1, learning_rate=0.02, alpha=50.0, tv=3.0, seed=2)
    x = (0.5 + 0.01 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(2))).double().expand(SIZE)
    w, wanted = model[1].weight.detach(), model(images).detach()
    gap = model(2 * x - 1).detach() - wanted
    norm = wanted.square().sum(1)
    torch.testing.assert_close(one.history[0], gap.square().sum(1) / norm)
    gradient = (2 * (gap @ w) / norm[:, None] * 2).view(SIZE)
    gradient = gradient + 50 * 6 * (x - 0.5) ** 5 / 48 + 3.0 * tv_gradient(x)
    torch.testing.assert_close(one.pictures, x - 0.02 * gradient.sign(), rtol=1e-5, atol=1e-7)


def test_inversion_of_an_invertible_layer_returns_the_image():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.LazyLinear(2)).double()
    images = make_images(2, 6, 6).double().clamp(-1, 1)
    output = feature_inversion(model, images, layer="0", steps=300, alpha=0, tv=0)
    assert output.scores.max() < 1e-4
    assert (2 * output.pictures - 1 - images).abs().mean() < 0.03


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_family_of_networks(kind):
    model, images = make_network(kind)
    model.train()
    modes = [module.training for module in model.modules()]
    ascent = Ascent(steps=2)
    with torch.no_grad():
        outputs = [
            class_model(model, images, ascent=ascent),
            activation_maximization(model, images, channels=[0, 1], ascent=ascent),
            feature_inversion(model, images, steps=2),
        ]
    for output in outputs:
        assert output.pictures.shape == images.shape and output.history.shape == (2, 2)
        assert output.pictures.min() >= 0 and output.pictures.max() <= 1 and not output.pictures.requires_grad
    assert_untouched(model, modes)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda: Ascent(steps=0), "steps=0 must be at least 1"),
        (lambda: Ascent(learning_rate=0), "learning_rate=0 must be greater than 0"),
        (lambda: Ascent(jitter=-1), "jitter=-1 must be at least 0"),
        (lambda: feature_inversion(make_convnet(), make_images(), steps=0), "steps=0 must be at least 1"),
        (lambda: class_model(make_convnet(), make_images(), classes=5), "classes=\\[5, 5\\] is invalid"),
        (
            lambda: activation_maximization(make_convnet(), make_images(), channels=8, layer="second"),
            "channels=\\[8\\] of layer='second' is invalid. Expected numbers from 0 to 7",
        ),
        (
            lambda: activation_maximization(
                make_convnet(), make_images(), channels=0, layer="second", position=(8, 0)
            ),
            "position=\\(8, 0\\) of layer='second' is invalid. Expected a row and a column of the 8x8",
        ),
    ],
)
def test_wrong_arguments(function, sentence):
    with pytest.raises(ValueError, match=sentence):
        function()
