import pickle
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import squeezenet1_0, squeezenet1_1
from transformers import AutoImageProcessor, ViTImageProcessor

from hf_dl.metrics import perceptual
from hf_dl.metrics.perceptual import PerceptualDistance
from hf_dl.models import NormResNetConfig, NormResNetForImageClassification, SmallViTConfig
from hf_dl.models.small_vit import SmallViTForImageClassification, SmallViTImageProcessor


def by_hand(maps, others):
    """Equation 1 of the paper in loops, all weights 1."""
    total = 0.0
    for one, other in zip(maps, others, strict=True):
        height, width = one.shape[1:]
        for y in range(height):
            for x in range(width):
                a, b = (each[:, y, x] / each[:, y, x].norm().clamp(min=1e-12) for each in (one, other))
                total += float((a - b).square().sum()) / (height * width)
    return total


def test_it_is_the_formula_of_the_paper():
    network = nn.Conv2d(3, 4, 3, stride=2).double()
    distance = PerceptualDistance("own", network, lambda images: [images, network(images)])
    images, others = torch.rand(2, 2, 3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [
        by_hand([image, network(image[None])[0]], [other, network(other[None])[0]])
        for image, other in zip(images, others, strict=True)
    ]
    assert distance(images, others).tolist() == pytest.approx(expected, abs=1e-12)


def test_it_grows_with_what_is_done_to_an_image_and_is_zero_for_the_same():
    distance = perceptual.load("random")
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(1, 3, 32, 32, generator=generator)
    values = [distance(image, image + scale * noise).item() for scale in (0.0, 0.05, 0.2, 0.8)]
    assert values[0] == 0
    assert values == sorted(set(values))
    assert distance(image, image + 0.2 * noise).item() == distance(image + 0.2 * noise, image).item()


def test_images_get_gradients_and_the_network_none():
    distance = perceptual.load("random").train()
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    distance(images, torch.rand(2, 3, 16, 16)).sum().backward()
    assert images.grad.abs().sum() > 0
    assert not distance.training and not distance.network.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in distance.parameters())


def test_the_feature_maps_of_a_classifier(tmp_path):
    model = NormResNetForImageClassification(NormResNetConfig(n=1, widths=[4, 8, 8], num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    distance = perceptual.load(str(tmp_path))
    images, others = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    expected = [
        by_hand(*([maps[0] for maps in states(model, each, tmp_path)] for each in pair))
        for pair in zip(images, others, strict=True)
    ]
    assert distance(images, others).tolist() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def states(model, image, folder):
    processor = AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images=[(image + 1) / 2], return_tensors="pt", do_rescale=False, do_resize=False)
    return model(**inputs, output_hidden_states=True).hidden_states


def test_what_has_no_feature_maps_is_refused(tmp_path):
    config = SmallViTConfig(image_size=64, patch_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    SmallViTForImageClassification(config).save_pretrained(tmp_path)
    SmallViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SmallViTForImageClassification does not return feature maps"):
        perceptual.load(str(tmp_path))


def test_bad_input_is_a_sentence(monkeypatch):
    distance = perceptual.load("random")
    with pytest.raises(ValueError, match=r"images has shape \(1, 3, 8, 8\) and others \(1, 3, 8, 9\)"):
        distance(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match=r"Expected the same shape \(batch, 3, height, width\)"):
        distance(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips"):
        perceptual.load("lpips")


class TestSqueezeNetFiles:
    """LPIPS from weight files, against the code of the package `lpips` 0.1.4 written out, with random weights."""

    CHANNELS = (64, 128, 256, 384, 384, 512, 512)  # lpips.LPIPS(net="squeeze").chns

    @pytest.fixture(scope="class")
    @classmethod
    def heads(cls):
        generator = torch.Generator().manual_seed(1)
        return {
            f"lin{number}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator)
            for number, channels in enumerate(cls.CHANNELS)
        }

    @pytest.fixture(scope="class")
    @classmethod
    def images(cls):
        return torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    @staticmethod
    def write(folder, network, heads, *, suffix=".npz"):
        arrays = {name: value.numpy() for name, value in network.state_dict().items()}
        if suffix == ".npz":
            np.savez(folder / "squeezenet.npz", **arrays)
        else:
            save_file(network.state_dict(), folder / "squeezenet.safetensors")
        torch.save(heads, folder / "lpips_squeeze.pth")
        return f"lpips:{folder}"

    @staticmethod
    @torch.no_grad()
    def oracle(layers, slices, weights, images, others):
        """`LPIPS.forward` of the package: scale, slices of the trunk, unit vectors, 1x1 convolutions, spatial mean."""
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        states, total = [(each - shift) / scale for each in (images, others)], 0
        for (first, last), weight in zip(slices, weights, strict=True):
            states = [layers[first:last](each) for each in states]
            one, other = (each / (each.square().sum(1, keepdim=True).sqrt() + 1e-10) for each in states)
            total = total + nn.functional.conv2d((one - other).square(), weight).mean((2, 3)).flatten()
        return total

    @pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
    def test_version_1_1_is_lpips(self, tmp_path, heads, images, suffix):
        torch.manual_seed(0)
        network = squeezenet1_1().eval()
        distance = perceptual.load(self.write(tmp_path, network, heads, suffix=suffix))
        slices = [(0, 2), (2, 5), (5, 8), (8, 10), (10, 11), (11, 12), (12, 13)]
        expected = self.oracle(network.features, slices, heads.values(), *images)
        assert distance.name == "lpips_squeeze_1_1"
        torch.testing.assert_close(distance(*images), expected, rtol=1e-4, atol=1e-6)
        assert not any(parameter.requires_grad for parameter in distance.parameters())

    def test_version_1_0_has_the_mean_weight_of_each_layer(self, tmp_path, heads, images):
        torch.manual_seed(0)
        network = squeezenet1_0().eval()
        distance = perceptual.load(self.write(tmp_path, network, heads))
        slices = [(0, 2), (2, 5), (5, 8), (8, 9), (9, 10), (10, 11), (11, 13)]
        widths = (96, *self.CHANNELS[1:])
        means = [head.mean().expand(1, width, 1, 1) for head, width in zip(heads.values(), widths, strict=True)]
        expected = self.oracle(network.features, slices, means, *images)
        assert distance.name == "lpips_layers_squeeze_1_0"
        torch.testing.assert_close(distance(*images), expected, rtol=1e-4, atol=1e-6)

    def test_files_from_the_hub(self, tmp_path, heads, monkeypatch):
        self.write(tmp_path, squeezenet1_1(), heads)
        calls = []
        monkeypatch.setattr(perceptual, "snapshot_download", lambda *a, **k: calls.append((a, k)) or str(tmp_path))
        assert perceptual.load("lpips:me/weights").name == "lpips_squeeze_1_1"
        assert calls == [(("me/weights",), {"allow_patterns": ["squeezenet*", "lpips*squeeze*"]})]

    def test_missing_files(self, tmp_path, heads):
        with pytest.raises(
            ValueError, match=r"has 0 files squeezenet\* with the suffix .safetensors, .npz, .pth. Exp"
        ):
            perceptual.load(f"lpips:{tmp_path}")
        self.write(tmp_path, squeezenet1_1(), heads)
        torch.save({}, tmp_path / "lpips_other_squeeze.pth")
        with pytest.raises(ValueError, match=r"has 2 files lpips\*squeeze\*"):
            perceptual.load(f"lpips:{tmp_path}")

    def test_wrong_weights(self, tmp_path, heads):
        for network, weights in ((nn.Linear(2, 2), heads), (squeezenet1_1(), {"lin0.model.1.weight": torch.ones(1)})):
            self.write(tmp_path, network, weights)
            with pytest.raises(ValueError, match="has wrong weights. Expected the state dict of torchvision's"):
                perceptual.load(f"lpips:{tmp_path}")

    def test_a_file_with_code_is_not_unpickled(self, tmp_path, heads):
        self.write(tmp_path, squeezenet1_1(), heads)
        torch.save({"lin0.model.1.weight": nn.Linear(1, 1)}, tmp_path / "lpips_squeeze.pth")
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            perceptual.load(f"lpips:{tmp_path}")
