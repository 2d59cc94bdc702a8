import pytest
import torch
from torch import nn

from hf_dl.explain.filters import raw_filters
from hf_dl.explain.layer_reader import LayerReader, check_channels, split_batches
from tests.explain.tiny import NETWORKS, assert_untouched, make_convnet, make_images, make_network


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.unused, self.odd = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Identity()
        self.ran = 0

    def forward(self, x):
        self.odd("text")
        y = self.conv(self.conv(x)).mean(dim=(2, 3))
        self.ran += 1
        return y


def test_the_forward_pass_ends_at_the_layer():
    model, images = make_convnet(), make_images()
    reader = LayerReader(model, images, model.first)
    calls = []
    model.second.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(reader(images), model.first(images))
    assert reader.name == "first" and not calls
    assert not model.first._forward_hooks


def test_an_output_has_gradients_and_survives_operations_in_place():
    model, images = make_convnet(), make_images().requires_grad_()
    output = LayerReader(model, images, "first")(images)
    assert torch.autograd.grad(output.sum(), images)[0].abs().sum() > 0 and output.min() < 0


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ("conv", "layer='conv' runs 2 times in a forward pass. Choose a layer that runs once"),
        ("unused", "layer='unused' runs 0 times"),
        ("odd", "layer='odd' returns str. Expected a feature map, tokens or features"),
        ("cnov", "layer='cnov' is not a layer of Twice. See model.named_modules"),
    ],
)
def test_layers_that_cannot_be_read(layer, sentence):
    with pytest.raises(ValueError, match=sentence):
        LayerReader(Twice(), make_images(), layer)


def test_channels_and_batches():
    assert check_channels(2, 3, "a") == [2] and check_channels(torch.tensor([0, 1]), 3, "a") == [0, 1]
    with pytest.raises(ValueError, match="channels=\\[3\\] of layer='a' is invalid. Expected numbers from 0 to 2"):
        check_channels(3, 3, "a")
    assert [len(x) for x in split_batches(torch.zeros(5, 1), 2)] == [2, 2, 1]
    assert [len(x) for x in split_batches(iter([torch.zeros(3, 1), torch.zeros(1, 1)]), 2)] == [2, 1, 1]


@pytest.mark.parametrize("kind", NETWORKS)
def test_raw_filters_share_one_scale(kind):
    model, images = make_network(kind)
    modes = [module.training for module in model.modules()]
    output = raw_filters(model, images)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    torch.testing.assert_close(output.weights, first.weight.detach())
    largest = first.weight.abs().max()
    torch.testing.assert_close(output.pictures, (first.weight / largest / 2 + 0.5).detach())
    assert dict(model.named_modules())[output.layer] is first
    assert_untouched(model, modes)


def test_a_network_without_filters():
    with pytest.raises(ValueError, match="model=Sequential has no convolution of images with 3 channels"):
        raw_filters(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), make_images(1, 2, 2))
