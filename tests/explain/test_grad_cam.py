import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet18

from hf_dl.explain import grad_cam
from tests.explain.tiny import PREFIX, VITS, make_convnet, make_images, make_resnet, make_vit, shake


def oracle(model, images, layers, classes, prefix=None):
    """Grad-CAM by the formula: full graph, one image and one layer at a time, in float64 numpy."""
    found = []
    for image, c in zip(images, classes, strict=True):
        total = 0.0
        for layer in layers:
            kept = []
            handle = layer.register_forward_hook(
                lambda m, a, out, kept=kept: kept.append(out.clone()) or kept[0].clone()
            )
            output = model(image[None])
            handle.remove()
            logits = output if isinstance(output, torch.Tensor) else output.logits
            (gradient,) = torch.autograd.grad(logits[0, c], kept[0])
            act, gradient = kept[0][0].detach().double().numpy(), gradient[0].double().numpy()
            if act.ndim == 2:
                side = (image.shape[-2] // 4, image.shape[-1] // 4)
                act, gradient = (x[prefix:].T.reshape(-1, *side) for x in (act, gradient))
            cam = np.maximum((gradient.mean(axis=(1, 2))[:, None, None] * act).sum(axis=0), 0)
            cam = (cam - cam.min()) / (cam.max() - cam.min() + 1e-7)
            cam = F.interpolate(torch.tensor(cam)[None, None], size=image.shape[-2:], mode="bilinear")[0, 0]
            total = total + cam.numpy() / len(layers)
        found.append((total - total.min()) / (total.max() - total.min() + 1e-7))
    return torch.tensor(np.stack(found), dtype=torch.float32)


def test_a_convolutional_network_by_the_formula():
    model, images = make_convnet(), make_images()
    layers = [model.first, model.second]
    output = grad_cam(model, images, layers=layers, classes=[1, 4])
    torch.testing.assert_close(output.maps, oracle(model, images, layers, [1, 4]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, model(images))
    assert output.layers == ("first", "second") and output.classes.tolist() == [1, 4]
    assert output.maps.std() > 0.1


def test_several_layers_of_a_resnet_of_transformers():
    model, images = make_resnet(), make_images(3, 64, 96)
    layers = list(model.resnet.encoder.stages)
    output = grad_cam(model, images, layers=layers, classes=2)
    torch.testing.assert_close(output.maps, oracle(model, images, layers, [2] * 3), rtol=1e-4, atol=1e-5)
    assert output.maps.shape == (3, 64, 96)


@pytest.mark.parametrize("kind", VITS)
def test_vision_transformers_with_registers_and_images_that_are_not_square(kind):
    model = make_vit(kind)
    images = make_images(2, 16, 16) if kind in ("vit", "deit") else make_images(2, 16, 24)
    layers = grad_cam(model, images, layers=2).layers
    modules = [dict(model.named_modules())[name] for name in layers]
    output = grad_cam(model, images, layers=layers, classes=[0, 3])
    expected = oracle(model, images, modules, [0, 3], PREFIX[kind])
    torch.testing.assert_close(output.maps, expected, rtol=1e-4, atol=1e-5)
    assert output.maps.std() > 0.1


def test_predicted_classes_are_the_default():
    model, images = make_convnet(), make_images()
    predicted = model(images).argmax(-1)
    output = grad_cam(model, images)
    assert torch.equal(output.classes, predicted)
    torch.testing.assert_close(output.maps, grad_cam(model, images, classes=predicted).maps)


def test_nothing_of_the_model_changes():
    model, images = make_resnet().train(), make_images(2, 32, 32)
    model.resnet.embedder.eval()
    modes = [module.training for module in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    grad_cam(model, images)
    with pytest.raises(ValueError):
        grad_cam(model, images, classes=9)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_it_works_where_gradients_are_off_and_for_frozen_models():
    model, images = make_convnet(), make_images()
    expected = grad_cam(model, images).maps
    with torch.no_grad():
        torch.testing.assert_close(grad_cam(model, images).maps, expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        torch.testing.assert_close(grad_cam(model, images + 0).maps, expected)
    model.requires_grad_(False)
    torch.testing.assert_close(grad_cam(model, images).maps, expected)


def test_no_weight_gradient_and_nothing_below_the_layers_is_computed():
    """The backward pass never reaches an operation that cannot be differentiated."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("a gradient was computed that is not needed")

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.above = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3)

        def forward(self, x):
            x = self.below(Broken.apply(x.requires_grad_() if torch.is_grad_enabled() else x))
            return F.conv2d(x, Broken.apply(self.above.weight)).mean(dim=(2, 3))

    model = Network()
    assert grad_cam(model, make_images(), layers="below").maps.shape == (2, 16, 16)


def test_a_layer_before_an_operation_in_place():
    torch.manual_seed(0)
    model, images = shake(resnet18(num_classes=5)), make_images(2, 64, 64)
    layers = [model.layer4[-1].bn2, model.layer4[-1]]  # out += identity, relu in place
    output = grad_cam(model, images, layers=layers, classes=[1, 2])
    torch.testing.assert_close(output.maps, oracle(model, images, layers, [1, 2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["convnet", "resnet", "vit", "dinov2", "small_vit"])
def test_the_package_grad_cam_agrees(kind):
    pytest.importorskip("pytorch_grad_cam")
    # Operations in place would change the tensors that the package keeps, so this network has none.
    made = {"convnet": lambda: make_convnet(inplace=False), "resnet": make_resnet}
    model = made[kind]() if kind in made else make_vit(kind)
    images = make_images(2, 64, 64) if kind == "resnet" else make_images()
    for classes in (None, [3, 0]):
        ours = grad_cam(model, images, layers=2, classes=classes)
        theirs = grad_cam(model, images, layers=2, classes=classes, engine="grad-cam")
        torch.testing.assert_close(ours.maps, theirs.maps, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.logits, theirs.logits)
        assert torch.equal(ours.classes, theirs.classes) and ours.layers == theirs.layers
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ImportError, match="engine='grad-cam' needs the package grad-cam: pip install grad-cam"):
        grad_cam(make_convnet(), make_images(), engine="grad-cam")


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.unused = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)
        self.aside = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x):
        self.aside(x)
        return self.conv(self.conv(x)).mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": "cnov"}, "layers='cnov' is not a layer of Twice. See model.named_modules"),
        ({"layers": torch.nn.Conv2d(1, 1, 1)}, "layers=Conv2d is not a layer of Twice"),
        ({"layers": []}, "layers=\\[\\] must have at least one entry"),
        ({"layers": "conv"}, "layers='conv' runs more than once"),
        ({"layers": "unused"}, "layers='unused' did not run"),
        ({"layers": "aside"}, "layers='aside' does not affect the logits"),
        ({"layers": ""}, "layers='' returns \\(2, 3\\). Expected a feature map or tokens"),
        (
            {"layers": "aside", "classes": [1, 2, 0]},
            "classes=\\[1, 2, 0\\] is invalid. Expected one class for all images",
        ),
        ({"layers": "aside", "classes": 3}, "classes=\\[3, 3\\] is invalid. .* from 0 to 2"),
        ({"engine": "captum"}, "engine='captum' is unknown; choose one of hf_dl, grad-cam"),
    ],
)
def test_what_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        grad_cam(Twice(), make_images(), **options)
