import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_dl.explain.backprop import deconvolution, gradient, guided_backprop, integrated_gradients, smooth_grad
from hf_dl.explain.backward_rules import BackwardRule
from tests.explain.tiny import TRANSFORMERS, assert_untouched, make_convnet, make_images, make_network

ALL = (gradient, deconvolution, guided_backprop, integrated_gradients, smooth_grad)


class Net(nn.Module):
    """Convolution, ReLU, max pooling, ReLU, linear; its formulas are below."""

    def __init__(self, relu=torch.relu):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4 * 9, 3)
        self.relu = relu

    def forward(self, x):
        pooled = F.max_pool2d(self.relu(self.conv(x)), 2)
        return self.head(self.relu(pooled - 0.1).flatten(1))


def by_hand(net, x, c, rule):
    """The chain rule for one image (channels, 6, 6), written out with loops over windows."""
    before = F.conv2d(x[None], net.conv.weight, net.conv.bias, padding=1)[0]
    after = before.clamp_min(0)
    second = F.max_pool2d(after[None], 2)[0] - 0.1

    def gate(flow, value):
        keep = {"gradient": value > 0, "deconvolution": flow > 0, "guided": (value > 0) & (flow > 0)}[rule]
        return flow * keep

    flow = gate(net.head.weight[c].view(4, 3, 3), second)
    unpooled = torch.zeros_like(after)
    for k in range(4):
        for i in range(3):
            for j in range(3):
                window = after[k, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                place = int(window.argmax())
                unpooled[k, 2 * i + place // 2, 2 * j + place % 2] = flow[k, i, j]
    flow = gate(unpooled, before)
    found = torch.zeros(2, 8, 8, dtype=x.dtype)
    for i in range(6):
        for j in range(6):
            found[:, i : i + 3, j : j + 3] += (flow[:, i, j, None, None, None] * net.conv.weight).sum(0)
    return found[:, 1:7, 1:7].detach()


def make_double():
    torch.manual_seed(0)
    return Net().double().eval(), torch.randn(2, 2, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "rule"), [(gradient, "gradient"), (deconvolution, "deconvolution"), (guided_backprop, "guided")]
)
def test_gradients_equal_the_chain_rule_by_hand(function, rule):
    net, images = make_double()
    output = function(net, images, classes=[0, 2])
    expected = torch.stack([by_hand(net, x, c, rule) for x, c in zip(images, (0, 2), strict=True)])
    torch.testing.assert_close(output.attributions, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(output.logits, net(images).detach())
    assert output.classes.tolist() == [0, 2]
    largest = expected.abs().amax(1)
    torch.testing.assert_close(output.maps.flatten(1).argmax(1), largest.flatten(1).argmax(1))


RELUS = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "Tensor.relu": torch.Tensor.relu,
    "Tensor.relu_": lambda x: x.relu_(),
    "nn.ReLU6": nn.ReLU6(),
    "F.relu6": F.relu6,
    "nn.Hardtanh(0, 6)": nn.Hardtanh(0.0, 6.0, inplace=True),
}


@pytest.mark.parametrize("name", RELUS)
def test_each_kind_of_relu_is_found(name):
    net, images = make_double()
    expected = guided_backprop(net, images, classes=1).attributions
    net.relu = RELUS[name]
    torch.testing.assert_close(guided_backprop(net, images, classes=1).attributions, expected)


def test_relu6_has_no_gradient_above_its_ceiling():
    x = torch.tensor([-1.0, 3.0, 7.0], requires_grad=True)
    with BackwardRule("guided_backprop"):
        y = F.relu6(x)
    assert y.tolist() == [0, 3, 6]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0, 1, 0]


def test_an_activation_in_place_changes_the_shortcut_too():
    """relu_(x) + x is 2 relu(x), as in the network itself."""
    net = nn.Module()
    net.forward = lambda x: torch.stack([(x * 1).relu_(), x], 1).flatten(1)

    class Block(nn.Module):
        def forward(self, x):
            x = x * 1
            return (F.relu(x, inplace=True) + x).flatten(1)

    images = make_images(1, 2, 2)
    output = guided_backprop(Block(), images, classes=4)
    torch.testing.assert_close(output.logits, 2 * images.relu().flatten(1))


def test_networks_without_relu_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.GELU(), nn.Linear(3 * 4, 2))
    for function in (deconvolution, guided_backprop):
        with pytest.raises(ValueError, match="model=Sequential has no ReLU, so method='.*' would equal the gradient"):
            function(model, make_images(1, 2, 2))


def test_smooth_grad_is_the_mean_over_noisy_copies():
    net, images = make_double()
    output = smooth_grad(net, images, classes=1, samples=5, noise=0.2, seed=3, batch_size=4)
    draw, total = torch.Generator().manual_seed(3), 0
    sigma = 0.2 * (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))
    for _ in range(5):
        noise = torch.randn(2, 6, 6, generator=draw).double()
        noisy = images + sigma[:, None, None, None] * noise
        total = total + torch.stack([by_hand(net, x, 1, "gradient") for x in noisy]) / 5
    torch.testing.assert_close(output.attributions, total, rtol=1e-10, atol=1e-12)
    without = smooth_grad(net, images, classes=1, samples=2, noise=0.0)
    torch.testing.assert_close(without.attributions, gradient(net, images, classes=1).attributions)
    alone = smooth_grad(net, images[1:], classes=1, samples=5, noise=0.2, seed=3)
    torch.testing.assert_close(alone.attributions, output.attributions[1:])


class Cubic(nn.Module):
    """y = (w x)^3, so the gradient is 3 (w x)^2 w."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 12, dtype=torch.float64))

    def forward(self, x):
        return (x.flatten(1) @ self.weight.T) ** 3


def test_integrated_gradients_of_a_cubic_by_hand():
    torch.manual_seed(0)
    model, images = Cubic(), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    output = integrated_gradients(model, images, classes=[1, 0], steps=2)  # exact for polynomials up to degree 3
    start, x = -torch.ones(12, dtype=torch.float64), images.flatten(1)
    for row, c in enumerate((1, 0)):
        w = model.weight[c].detach()
        a, b = w @ start, w @ x[row]
        # the integral of 3 (a + t (b - a))^2 over t from 0 to 1 is (b^3 - a^3) / (b - a)
        expected = (x[row] - start) * w * (b**3 - a**3) / (b - a)
        torch.testing.assert_close(output.attributions[row].flatten(), expected, rtol=1e-10, atol=1e-10)
    assert output.error.abs().max() < 1e-9


@pytest.mark.parametrize("baseline", ["black", "gray", "mean", "blur"])
def test_integrated_gradients_are_complete(baseline):
    """The attributions sum to the difference of the logits; more steps reduce the error."""
    net, images = make_double()
    net.relu = F.softplus  # smooth, so that quadrature converges fast
    images = images.abs()
    output = integrated_gradients(net, images, baseline=baseline, steps=64, image_mean=0.2, image_std=0.3)
    starts = {"black": -0.2 / 0.3, "gray": 1.0, "mean": images.mean((2, 3), keepdim=True)}
    if baseline in starts:
        start = torch.zeros_like(images) + starts[baseline]
        difference = (net(images) - net(start)).gather(1, output.classes[:, None])[:, 0]
        torch.testing.assert_close(output.attributions.sum((1, 2, 3)), difference, rtol=1e-3, atol=1e-3)
    assert output.error.abs().max() < 1e-3
    few = integrated_gradients(net, images, baseline=baseline, steps=1, image_mean=0.2, image_std=0.3)
    assert few.error.abs().max() > output.error.abs().max()


def test_a_baseline_can_be_an_image_and_batches_do_not_matter():
    net, images = make_double()
    start = torch.full((1, 2, 6, 6), 0.3)
    whole = integrated_gradients(net, images, classes=1, baseline=start, steps=5)
    for size in (1, 4, 100):
        found = integrated_gradients(net, images, classes=1, baseline=start, steps=5, batch_size=size)
        torch.testing.assert_close(found.attributions, whole.attributions)
    alone = integrated_gradients(net, images[1:], classes=1, baseline=start, steps=5)
    torch.testing.assert_close(alone.attributions[0], whole.attributions[1])


@pytest.mark.parametrize("kind", ["norm_resnet", "vgg", "small_vit", "vit", "resnet", "torchvision", "module"])
def test_every_family_of_networks(kind):
    model, images = make_network(kind)
    model.train()
    modes = [module.training for module in model.modules()]
    for function in ALL:
        if kind in TRANSFORMERS and function in (deconvolution, guided_backprop):
            with pytest.raises(ValueError, match="has no ReLU"):
                function(model, images)
            assert_untouched(model, modes)
            continue
        options = {integrated_gradients: {"steps": 2}, smooth_grad: {"samples": 2}}.get(function, {})
        with torch.no_grad():
            output = function(model, images, **options)
        assert output.attributions.shape == images.shape and output.maps.shape == (2, *images.shape[-2:])
        assert output.maps.std() > 0.01 and output.maps.min() >= 0 and output.maps.max() <= 1
        assert not torch.is_inference(output.attributions) and not output.attributions.requires_grad
        assert_untouched(model, modes)
        with pytest.raises(ValueError, match="classes=\\[9, 9\\] is invalid"):
            function(model, images, classes=9, **options)
        assert_untouched(model, modes)


def test_it_works_in_inference_mode_and_for_frozen_models():
    model, images = make_convnet().requires_grad_(False), make_images()
    expected = guided_backprop(model, images).attributions
    with torch.inference_mode():
        torch.testing.assert_close(guided_backprop(model, images + 0).attributions, expected)


@pytest.mark.parametrize(
    ("function", "options", "sentence"),
    [
        (integrated_gradients, {"steps": 0}, "steps=0 must be at least 1"),
        (integrated_gradients, {"baseline": "white"}, "fill='white' is unknown; choose one of black"),
        (smooth_grad, {"samples": 0}, "samples=0 must be at least 1"),
        (smooth_grad, {"noise": -math.pi}, "noise=-3.14.* must be at least 0"),
    ],
)
def test_wrong_arguments(function, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        function(make_convnet(), make_images(), **options)
