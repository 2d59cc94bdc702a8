"""Grad-CAM (Selvaraju et al. 2017): where a convolutional or transformer layer holds evidence for a class.

The weight of channel k is the mean gradient of the class's logit y over the places of the layer's output A,
alpha_k = mean_ij dy / dA^k_ij, and the map is ReLU(sum_k alpha_k A^k). Several layers: each map is stretched to [0, 1]
and to the size of the image, and they are averaged, as the package grad-cam does.

It costs a forward pass and the part of a backward pass that lies above the layers: nothing is kept below the first of
them, and no gradient of a weight is computed. Images, layers and maps stay on the model's device, a batch at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .calls import (
    class_logits,
    default_layers,
    evaluating,
    normalize,
    patch_size_of,
    pick_classes,
    token_grid,
    upsample,
)

ENGINES = ("hf_dl", "grad-cam")


@dataclass
class GradCamOutput:
    """What `grad_cam` returns.

    Attributes:
        maps: (batch, height, width) of the images, in [0, 1].
        classes: The classes explained, int64 (batch,).
        logits: (batch, classes).
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
    """Map the evidence for a class.

    Args:
        model: The classifier.
        pixel_values: (batch, channels, height, width).
        layers: Names or modules whose outputs, feature maps (batch, channels, height, width) or tokens (batch, tokens,
            channels), are looked at; or how many of `default_layers`.
        classes: One for all images or one for each; the predicted ones when not given.
        engine: "hf_dl", or "grad-cam", the PyPI package, which gives the same maps.

    Returns:
        See `GradCamOutput`.

    Raises:
        ValueError: If a layer is unknown, did not run once, or gives something else; or if an argument is not one of
            those named.
        ImportError: If the engine is not installed.

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
    modules = _find_layers(model, pixel_values, layers)
    run = _run if engine == "hf_dl" else _run_package
    with evaluating(model):
        maps, picked, logits = run(model, pixel_values, modules, classes)
    return GradCamOutput(maps=maps, classes=picked, logits=logits, layers=tuple(modules))


def _find_layers(model: nn.Module, pixel_values: torch.Tensor, layers: object) -> dict[str, nn.Module]:
    if isinstance(layers, int):
        layers = default_layers(model, pixel_values, layers)
    elif isinstance(layers, (str, nn.Module)):
        layers = [layers]
    by_name = dict(model.named_modules())
    names = {module: name for name, module in by_name.items()}
    found = {}
    for layer in layers:
        name = names.get(layer) if isinstance(layer, nn.Module) else layer
        if name not in by_name:
            shown = repr(layer) if isinstance(layer, str) else type(layer).__name__
            raise ValueError(f"layers={shown} is no layer of {type(model).__name__}; see model.named_modules().")
        found[name] = by_name[name]
    if not found:
        raise ValueError("layers=[] must have at least one entry.")
    return found


def _run(
    model: nn.Module, pixel_values: torch.Tensor, modules: dict[str, nn.Module], classes: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    activations: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> object:
            if name in activations:
                raise ValueError(f"layers={name!r} runs more than once in a forward pass; choose one that runs once.")
            tensor = output[0] if isinstance(output, (tuple, list)) else output
            if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (3, 4):
                shown = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ValueError(f"layers={name!r} gives {shown}, expected a feature map or tokens.")
            # The graph begins here: below, nothing was kept.
            torch.set_grad_enabled(True)
            tensor = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
            activations[name] = tensor
            # What follows may work in place (ReLU), and must not change what is looked at.
            tensor = tensor.clone()
            return type(output)([tensor, *output[1:]]) if isinstance(output, (tuple, list)) else tensor

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        with torch.inference_mode(False), torch.no_grad():  # ends what the hooks enabled
            logits = class_logits(model, pixel_values)
            missing = [name for name in modules if name not in activations]
            if missing:
                raise ValueError(f"layers={missing[0]!r} did not run in a forward pass.")
            picked = pick_classes(logits.detach(), classes)
            # Rows are independent in evaluation mode: the gradient of the sum is each row's own.
            with torch.enable_grad():
                score = logits.gather(1, picked[:, None]).sum()
            gradients = torch.autograd.grad(score, list(activations.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    size, patch_size, maps = tuple(pixel_values.shape[-2:]), patch_size_of(model), []
    for (name, activation), gradient in zip(activations.items(), gradients, strict=True):
        if gradient is None:
            raise ValueError(f"layers={name!r} does not reach the logits.")
        activation, gradient = (
            _as_map(tensor.detach(), size, patch_size).float() for tensor in (activation, gradient)
        )
        alphas = gradient.mean(dim=(2, 3))
        maps.append(upsample(normalize(torch.einsum("bk,bkij->bij", alphas, activation).relu()), size))
    return normalize(torch.stack(maps).mean(dim=0)), picked, logits.detach()


def _as_map(tensor: torch.Tensor, size: tuple[int, int], patch_size: tuple[int, int] | None) -> torch.Tensor:
    """Lay tokens (batch, tokens, channels) out as (batch, channels, height, width), without those of no place."""
    if tensor.ndim == 4:
        return tensor
    grid, prefix = token_grid(tensor.shape[1], size, patch_size)
    return tensor[:, prefix:].transpose(1, 2).unflatten(2, grid)


class _Logits(nn.Module):
    """A classifier that returns bare logits, as the package grad-cam expects."""

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
        cam = GradCAM(wrapped, list(modules.values()), reshape_transform=lambda x: _as_map(x, size, patch_size))
        try:
            # A frozen model would have no graph at all.
            maps = cam(pixel_values.detach().clone().requires_grad_(), targets=targets)
        finally:
            cam.activations_and_grads.release()
            for p, gradient in weights:  # it leaves the gradients of all weights behind
                p.grad = gradient
    logits = wrapped.logits.detach()
    return torch.from_numpy(maps).to(logits.device), pick_classes(logits, classes), logits
