import sys

import pytest
import torch
from torch import nn
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
