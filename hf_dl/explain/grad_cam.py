"""Grad-CAM (Selvaraju et al. 2017): maps of the evidence for a class in convolutional or transformer layers.

The weight of channel k is the mean gradient of the class logit y over the positions of the layer output A,
alpha_k = mean_ij dy / dA^k_ij. The map is ReLU(sum_k alpha_k A^k). For several layers, each map is scaled to [0, 1],
resized to the image, and averaged, as in the package grad-cam.

The cost is a forward pass, and a backward pass down to the first of the layers. Gradients of weights are not computed.
All computations run in batches on the device of the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .calls import as_map, class_logits, evaluating, find_layers, normalize, patch_size_of, pick_classes, upsample

ENGINES = ("hf_dl", "grad-cam")


@dataclass
class GradCamOutput:
    """Output of `grad_cam`.

    Attributes:
        maps: Maps of the size of the images, (batch, height, width), in [0, 1].
        classes: Explained classes, int64 (batch,).
        logits: Logits, (batch, classes).
        layers: Names of the layers.
    """

    maps: torch.Tensor
    classes: torch.Tensor
    logits: torch.Tensor
    layers: tuple[str, ...]


def grad_cam(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    layers: int | str | nn.Module | Sequence[str | nn.Module] = 1,
    classes: int | Sequence[int] | torch.Tensor | None = None,
    engine: str = "hf_dl",
) -> GradCamOutput:
    """Compute maps of the evidence for a class.

    Args:
        model: Classifier.
        pixel_values: Images, (batch, channels, height, width).
        layers: Names or modules. Their outputs are feature maps (batch, channels, height, width) or tokens (batch,
            tokens, channels). An integer is the number of `default_layers`.
        classes: One class for all images or one for each image. Defaults to the predicted classes.
        engine: "hf_dl", or "grad-cam" for the PyPI package, which computes the same maps.

    Returns:
        See `GradCamOutput`.

    Raises:
        ValueError: If an argument or a layer is unknown, or a layer does not run exactly once or has another output.
        ImportError: If the package grad-cam is not installed.

    Example:
        ```python
        >>> from torchvision.models import resnet18
        >>> output = grad_cam(resnet18(), torch.randn(2, 3, 64, 64), layers="layer4", classes=7)
        >>> output.maps.shape
        torch.Size([2, 64, 64])

        ```
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; choose one of {', '.join(ENGINES)}.")
    modules = find_layers(model, pixel_values, layers)
    run = _run if engine == "hf_dl" else _run_package
    with evaluating(model):
        maps, picked, logits = run(model, pixel_values, modules, classes)
    return GradCamOutput(maps=maps, classes=picked, logits=logits, layers=tuple(modules))


def _run(
    model: nn.Module, pixel_values: torch.Tensor, modules: dict[str, nn.Module], classes: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    activations: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> object:
            if name in activations:
                raise ValueError(
                    f"layers={name!r} runs more than once in a forward pass. Choose a layer that runs once."
                )
            tensor = output[0] if isinstance(output, (tuple, list)) else output
            if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (3, 4):
                shown = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ValueError(f"layers={name!r} returns {shown}. Expected a feature map or tokens.")
            # the graph starts here; nothing is stored for earlier layers
            torch.set_grad_enabled(True)
            tensor = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
            activations[name] = tensor
            # a copy, because later modules may change it in place (ReLU)
            tensor = tensor.clone()
            return type(output)([tensor, *output[1:]]) if isinstance(output, (tuple, list)) else tensor

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        with torch.inference_mode(False), torch.no_grad():  # also ends the grad mode that the hooks enable
            logits = class_logits(model, pixel_values)
            missing = [name for name in modules if name not in activations]
            if missing:
                raise ValueError(f"layers={missing[0]!r} did not run in a forward pass.")
            picked = pick_classes(logits.detach(), classes)
            # images are independent in evaluation mode, so the sum gives the gradient of each image
            with torch.enable_grad():
                score = logits.gather(1, picked[:, None]).sum()
            gradients = torch.autograd.grad(score, list(activations.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    size, patch_size, maps = tuple(pixel_values.shape[-2:]), patch_size_of(model), []
    for (name, activation), gradient in zip(activations.items(), gradients, strict=True):
        if gradient is None:
            raise ValueError(f"layers={name!r} does not affect the logits.")
        activation, gradient = (as_map(tensor.detach(), size, patch_size).float() for tensor in (activation, gradient))
        alphas = gradient.mean(dim=(2, 3))
        maps.append(upsample(normalize(torch.einsum("bk,bkij->bij", alphas, activation).relu()), size))
    return normalize(torch.stack(maps).mean(dim=0)), picked, logits.detach()


class _Logits(nn.Module):
    """A classifier that returns a tensor of logits, as the package grad-cam expects."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.logits = class_logits(self.model, pixel_values)
        return self.logits


def _run_package(
    model: nn.Module, pixel_values: torch.Tensor, modules: dict[str, nn.Module], classes: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise ImportError("engine='grad-cam' needs the package grad-cam: pip install grad-cam.") from error
    wrapped, size, patch_size = _Logits(model), tuple(pixel_values.shape[-2:]), patch_size_of(model)
    targets = None
    if classes is not None:
        with torch.no_grad():
            picked = pick_classes(class_logits(model, pixel_values), classes)
        targets = [ClassifierOutputTarget(c) for c in picked.tolist()]
    weights = [(p, p.grad) for p in model.parameters()]
    with torch.enable_grad():
        cam = GradCAM(wrapped, list(modules.values()), reshape_transform=lambda x: as_map(x, size, patch_size))
        try:
            # the input requires gradients, because a frozen model would have no graph
            maps = cam(pixel_values.detach().clone().requires_grad_(), targets=targets)
        finally:
            cam.activations_and_grads.release()
            for p, gradient in weights:  # the package sets the gradients of all weights
                p.grad = gradient
    logits = wrapped.logits.detach()
    return torch.from_numpy(maps).to(logits.device), pick_classes(logits, classes), logits
