import inspect

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from hf_dl.explain import (
    METHODS,
    Ascent,
    attention_maps,
    class_model,
    explain,
    fgsm,
    grad_cam,
    normalize,
    occlusion,
    sanity_check,
    top_patches,
    upsample,
)
from hf_dl.explain.sanity import rank_correlation
from tests.explain.tiny import (
    NETWORKS,
    TRANSFORMERS,
    WITHOUT_RELU,
    assert_untouched,
    make_convnet,
    make_images,
    make_network,
)

FAST = {  # options that make a method cheap
    "occlusion": {"patch": 8, "stride": 8},
    "smooth_grad": {"samples": 2},
    "integrated_gradients": {"steps": 2},
    "class_model": {"steps": 2},
    "activation": {"steps": 2},
    "inversion": {"steps": 2},
    "pgd": {"steps": 2},
    "patches": {"k": 2},
    "codes": {"projection": "pca", "columns": 2, "thumbnail": 4},
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_each_method_on_each_network(kind):
    model, images = make_network(kind)
    modes = [module.training for module in model.modules()]
    for name, method in METHODS.items():
        given = torch.cat([images, images]) if name == "codes" else images
        if (method.relu and kind in WITHOUT_RELU) or (method.attention and kind not in TRANSFORMERS):
            with pytest.raises(ValueError, match="has no ReLU|has attention over no tokens"):
                explain(model, given, method=name, **FAST.get(name, {}))
        else:
            output = explain(model, given, method=name, **FAST.get(name, {}))
            assert output.method == name and (output.maps is None) == (method.kind != "map")
            shown = output.pictures if output.maps is None else output.maps
            assert shown.min() >= 0 and shown.max() <= 1 and shown.isfinite().all()
            if output.maps is not None:
                assert shown.shape == (2, *images.shape[-2:]) and output.logits.shape == (2, 5)
            else:
                assert shown.ndim == 4 and shown.shape[1] == 3
        assert_untouched(model, modes)


def test_it_calls_the_function_of_the_method():
    model, images = make_convnet(), make_images()
    pixels = {"image_mean": 0.3, "image_std": 0.2}
    found = explain(model, images, method="grad_cam", target=[1, 2], layers="second")
    torch.testing.assert_close(found.maps, grad_cam(model, images, classes=[1, 2], layers="second").maps)
    found = explain(model, images, method="occlusion", target=1, patch=4, fill="black", **pixels)
    expected = occlusion(model, images, classes=1, patch=4, fill="black", **pixels)
    torch.testing.assert_close(found.maps, expected.maps)
    found = explain(model, images, method="class_model", target=1, steps=3, blur=0, **pixels)
    expected = class_model(model, images, classes=1, ascent=Ascent(steps=3, blur=0), **pixels)
    torch.testing.assert_close(found.pictures, expected.pictures)
    found = explain(model, images, method="fgsm", target=4, epsilon=0.1, **pixels)
    torch.testing.assert_close(found.pictures, fgsm(model, images, targets=4, epsilon=0.1, **pixels).pictures)
    found = explain(model, iter(images.split(1)), method="patches", target=[1, 2], k=1, layer="second", **pixels)
    expected = top_patches(model, images, channels=[1, 2], k=1, layer="second", **pixels)
    torch.testing.assert_close(found.pictures, (expected.patches[:, 0] * 0.2 + 0.3).clamp(0, 1))
    model, images = make_network("vit")
    found = explain(model, images, method="rollout")
    maps, _ = attention_maps(model, images, method="rollout")
    torch.testing.assert_close(found.maps, normalize(upsample(maps, (16, 16))))


def test_one_image_without_a_batch():
    model, images = make_convnet(), make_images()
    found = explain(model, images[0], method="gradient")
    torch.testing.assert_close(found.maps, explain(model, images, method="gradient").maps[:1])


def test_each_entry_names_arguments_of_its_function():
    for name, method in METHODS.items():
        parameters = inspect.signature(method.run).parameters
        assert method.target is None or method.target in parameters, name
        assert {key for key, _ in method.fixed} <= set(parameters), name
        assert method.kind in ("map", "picture", "data") and method.summary.endswith("."), name


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "cam"}, "method='cam' is unknown; choose one of grad_cam, cls"),
        ({"method": "gradient", "steps": 3}, "steps=3 is not an option of method='gradient', which are: none"),
        (
            {"method": "occlusion", "step": 3},
            "step=3 is not an option of method='occlusion', which are: patch, stride",
        ),
        ({"method": "class_model", "rate": 3}, "rate=3 is not an option of .* steps, learning_rate"),
        ({"method": "filters", "target": 3}, "target=3 is not supported with method='filters', which has no target"),
    ],
)
def test_wrong_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        explain(make_convnet(), make_images(), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Sanity check


def test_rank_correlation_equals_scipy():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, 4, generator=draw).relu()  # with ties
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(rank_correlation(a, b), torch.tensor(expected, dtype=torch.float64))
    assert rank_correlation(a, torch.ones_like(a)).tolist() == [0, 0, 0]


class EdgeDetector(nn.Module):
    """A network whose only weights are in its last layer: the gradient keeps the shape of a fixed filter."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 2)
        self.register_buffer("window", torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return self.head((x.mean(1, keepdim=True) * self.window).sum((2, 3)))


def test_a_map_that_ignores_the_weights_fails():
    output = sanity_check(EdgeDetector(), make_images(2, 8, 8), method="gradient")
    assert output.final == pytest.approx(1) and not output.passed and output.names == ["head"]


def test_the_gradient_of_a_network_passes():
    model, images = make_convnet(), make_images(4, 12, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = sanity_check(model, images, method="gradient", stages=3, seed=1)
    assert output.layers == [1, 2, 3] and output.names == ["head", "second", "first"]
    assert output.correlations.shape == (3, 4) and output.maps.shape == (4, 4, 12, 12)
    assert output.final < 0.5 and output.passed
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    again = sanity_check(model, images, method="gradient", stages=3, seed=1)
    assert torch.equal(again.correlations, output.correlations)
    torch.testing.assert_close(output.maps[0], explain(model, images, method="gradient").maps)
    assert sanity_check(model, images, method="gradient", stages=1).layers == [3]


def test_the_explained_class_stays():
    """A new last layer changes the predictions, but not the class of the maps."""
    model, images = make_convnet(), make_images()
    classes = model(images).argmax(1)
    first = sanity_check(model, images, method="gradient", stages=2)
    fixed = sanity_check(model, images, method="gradient", stages=2, target=classes)
    assert torch.equal(first.correlations, fixed.correlations)


@pytest.mark.parametrize("kind", ["norm_resnet", "vgg", "small_vit"])
def test_networks_of_the_experiment(kind):
    model, images = make_network(kind)
    output = sanity_check(model, images, method="grad_cam", stages=3)
    names = [name for name, _ in model.named_modules()]
    assert output.layers[0] == 1 and len(output.layers) == 3 and set(output.names) <= set(names)
    assert output.names[0] in ("classifier", "small_vit.norm", "classifier.0")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "filters"}, "method='filters' is not a map; choose one of grad_cam, cls"),
        ({"stages": 0}, "stages=0 must be at least 1"),
    ],
)
def test_wrong_arguments_of_the_sanity_check(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        sanity_check(make_convnet(), make_images(), **options)
