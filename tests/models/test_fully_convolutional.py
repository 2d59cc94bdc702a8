import pytest
import torch

from hf_dl.models.classic_cnn import ClassicCNNConfig, ClassicCNNForImageClassification
from hf_dl.models.fully_convolutional import to_fully_convolutional
from tests.models.test_classic_cnn import TINY


def make(architecture, **fields):
    torch.manual_seed(0)
    fields = {"num_channels": 3, "num_labels": 3, **fields}
    return ClassicCNNForImageClassification(ClassicCNNConfig(architecture=architecture, **fields)).eval()


@pytest.mark.parametrize("size", [(32, 32), (52, 52), (45, 38)])
def test_each_window_has_the_logits_of_its_crop(size):
    model = make("lenet5", image_size=32, width_multiplier=0.5)
    images = torch.randn(2, 3, *size)
    network = to_fully_convolutional(model)
    with torch.no_grad():
        logits = network(images)
        assert (network.window, network.stride) == (32, 4)
        assert logits.shape == (2, 3, *((side - 32) // 4 + 1 for side in size))
        for row in range(logits.shape[2]):
            for column in range(logits.shape[3]):
                crop = images[:, :, 4 * row : 4 * row + 32, 4 * column : 4 * column + 32]
                torch.testing.assert_close(logits[:, :, row, column], model(crop).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", TINY)
def test_a_single_window_has_the_logits_of_the_network(architecture):
    model = make(architecture, **TINY[architecture])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        logits = to_fully_convolutional(model)(images)
        torch.testing.assert_close(logits[:, :, 0, 0], model(images).logits, rtol=1e-5, atol=1e-5)
    assert logits.shape == (2, 3, 1, 1)


def test_vgg16_has_6x6_windows_in_384_pixels():
    with torch.device("meta"):
        network = to_fully_convolutional(make("vgg16", num_labels=1000))
        assert network(torch.zeros(1, 3, 384, 384)).shape == (1, 1000, 6, 6) and network.stride == 32
    assert "windows of 224 pixels, stride 32" in repr(network)
    kernels = [m.weight.shape[2] for m in network.classifier.modules() if isinstance(m, torch.nn.Conv2d)]
    assert kernels == [7, 1, 1] and sum(p.numel() for p in network.parameters()) == 138_357_544


def test_padding_changes_the_border_of_crops_only():
    """Inside a crop, where no value depends on padding, the features are those of the whole image."""
    model = make("vgg11", image_size=64, width_multiplier=0.06)
    features = to_fully_convolutional(model).features[:2]  # fields of 10 pixels, stride 4
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        whole, crop = features(images), features(images[:, :, 16:48, 16:48])
    torch.testing.assert_close(crop[:, :, 1:-1, 1:-1], whole[:, :, 5:11, 5:11], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(crop, whole[:, :, 4:12, 4:12], atol=1e-3)


def test_the_network_is_a_copy_in_the_same_mode():
    model = make("alexnet", **TINY["alexnet"] | {"dropout": 0.5}).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = to_fully_convolutional(model)
    assert network.training
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_small_images_raise_an_error():
    with pytest.raises(ValueError, match=r"shape \(1, 3, 16, 15\), expected .* with at least 16x16 pixels"):
        to_fully_convolutional(make("lenet5", **TINY["lenet5"]))(torch.zeros(1, 3, 16, 15))
