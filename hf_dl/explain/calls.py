"""Shared by all explanations: call a model, find the positions of its tokens, and choose its layers."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

MAX_PREFIX_TOKENS = 16  # most CLS, distillation and register tokens, if the patch size is unknown


def to_model(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Copy images to the device of a model, outside of inference mode, so that they can have gradients."""
    parameter = next(model.parameters(), pixel_values)
    with torch.inference_mode(False):
        return pixel_values.detach().clone().to(parameter.device)


def per_channel(values: float | Sequence[float], pixel_values: torch.Tensor) -> torch.Tensor:
    """Return one value or one value per channel as a tensor that broadcasts to images."""
    return torch.as_tensor(values, dtype=pixel_values.dtype, device=pixel_values.device).reshape(-1, 1, 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore the mode of each module at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def class_logits(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Call a classifier.

    If the image size differs from the config of the model, and its `forward` has `interpolate_pos_encoding`, position
    embeddings are interpolated.

    Args:
        model: Classifier.
        pixel_values: Images, (batch, channels, height, width).

    Returns:
        Logits, (batch, classes).

    Raises:
        ValueError: If the model returns no logits of that shape.

    Example:
        ```python
        >>> class_logits(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.zeros(2, 3, 2, 2)).shape
        torch.Size([2, 5])

        ```
    """
    options = {}
    size = getattr(getattr(model, "config", None), "image_size", None)
    if size is not None and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        size = (size, size) if isinstance(size, int) else tuple(size)
        if tuple(pixel_values.shape[-2:]) != size:
            options["interpolate_pos_encoding"] = True
    parameter = next(model.parameters(), pixel_values)
    output = model(pixel_values.to(parameter.device), **options)
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, (tuple, list)):
        logits = output[0]
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(pixel_values):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(output).__name__
        raise ValueError(
            f"model={type(model).__name__} returned {found}. Expected logits ({len(pixel_values)}, classes) or an "
            "output with logits."
        )
    return logits


def pick_classes(logits: torch.Tensor, classes: int | Sequence[int] | torch.Tensor | None) -> torch.Tensor:
    """Return the classes to explain, int64 (batch,): the given classes or, for None, the predicted classes.

    Raises:
        ValueError: If the number of classes is wrong, or the model does not have a class.
    """
    if classes is None:
        return logits.argmax(dim=-1)
    found = torch.as_tensor(classes, device=logits.device).long().reshape(-1)
    if len(found) == 1:
        found = found.expand(len(logits))
    if len(found) != len(logits) or found.min() < 0 or found.max() >= logits.shape[-1]:
        raise ValueError(
            f"classes={found.tolist()} is invalid. Expected one class for all images or one for each of the "
            f"{len(logits)} images, from 0 to {logits.shape[-1] - 1}."
        )
    return found


def patch_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Return height and width of the model's patches in pixels, or None if the patch size is unknown."""
    config = getattr(model, "config", None)
    places = (config, getattr(config, "vision_config", None), getattr(model, "patch_embed", None))
    size = next((place.patch_size for place in places if getattr(place, "patch_size", None)), None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else tuple(size)


def token_grid(
    num_tokens: int, image_size: tuple[int, int], patch_size: tuple[int, int] | None = None
) -> tuple[tuple[int, int], int]:
    """Find the grid of the tokens of an image.

    Args:
        num_tokens: Number of tokens of the layer.
        image_size: Height and width of the image, in pixels.
        patch_size: Height and width of a patch. If it is None, or the layer has merged patches, the grid
            has the aspect ratio of the image, with as few other tokens before it as possible.

    Returns:
        Height and width of the grid, and the number of tokens before it: CLS, distillation, registers.

    Raises:
        ValueError: If no grid fits.

    Example:
        ```python
        >>> token_grid(201, (224, 224), (16, 16))
        ((14, 14), 5)

        ```
    """
    height, width = image_size
    if patch_size is not None:
        grid = (height // patch_size[0], width // patch_size[1])
        if num_tokens >= grid[0] * grid[1] > 0:
            return grid, num_tokens - grid[0] * grid[1]
    for prefix in range(min(MAX_PREFIX_TOKENS, num_tokens - 1) + 1):
        count = num_tokens - prefix
        rows = round((count * height / width) ** 0.5)
        if rows and count % rows == 0 and rows * width == (count // rows) * height:
            return (rows, count // rows), prefix
    raise ValueError(
        f"num_tokens={num_tokens} does not match a grid of patches, after at most {MAX_PREFIX_TOKENS} other tokens, "
        f"in an image of {height}x{width} pixels. Set the patch size."
    )


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of a model: its longest list of modules of one class with an attention.

    Raises:
        ValueError: If the model has no such list.
    """
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0
    ]
    found = [
        blocks
        for blocks in lists
        if len({type(block) for block in blocks}) == 1
        and any("attention" in type(part).__name__.lower() for part in blocks[0].modules())
    ]
    if not found:
        raise ValueError(f"model={type(model).__name__} has no list of transformer blocks.")
    return max(found, key=len)


def modules_in_order(model: nn.Module, pixel_values: torch.Tensor, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Run a model, and return the modules in the order of their calls. A module occurs once for each call.

    Args:
        model: Classifier.
        pixel_values: Images, (batch, channels, height, width). The first image runs.
        modules: Modules to watch.
    """
    order: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda module, _: order.append(module)) for module in modules]
    try:
        with torch.no_grad(), evaluating(model):
            class_logits(model, pixel_values[:1])
    finally:
        for handle in handles:
            handle.remove()
    return order


def default_layers(model: nn.Module, pixel_values: torch.Tensor, count: int = 1) -> list[str]:
    """Return the default layers for Grad-CAM.

    - Vision transformers: the input of the attention in the last `count` blocks. After the last attention, only the
      CLS token affects the logits, so the gradients of all patches are zero.
    - Other networks: the last feature map for `count=1`. Otherwise the outputs of the last `count` convolutions larger
      than 1x1, the layers that He et al. 2015 count.

    Args:
        model: Classifier.
        pixel_values: Image, (1, channels, height, width), to find the layers that return feature maps.
        count: Number of layers.

    Returns:
        Names from `named_modules`, in their order in the network.

    Raises:
        ValueError: If the model has fewer layers.
    """
    names = {module: name for name, module in model.named_modules()}
    try:
        norms = []
        for block in find_blocks(model):
            norms += [names[part] for part in block.modules() if isinstance(part, nn.LayerNorm)][:1]
    except ValueError:
        norms = []
    if norms:
        found = norms
    else:
        maps, convolutions = [], []

        def look(module: nn.Module, _: tuple, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[-2:].numel() > 1:
                maps.append(names[module])
                if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
                    convolutions.append(names[module])

        handles = [module.register_forward_hook(look) for module in names]
        try:
            with torch.no_grad(), evaluating(model):
                class_logits(model, pixel_values[:1])
        finally:
            for handle in handles:
                handle.remove()
        found = maps if count == 1 else convolutions
        found = [
            name for name in found if maps.count(name) == 1
        ]  # without modules that run several times, such as a shared ReLU
    if not 1 <= count <= len(found):
        raise ValueError(f"count={count} layers of model={type(model).__name__} must be 1 to {len(found)}.")
    return found[-count:]


def find_layers(
    model: nn.Module, pixel_values: torch.Tensor, layers: object, *, flag: str = "layers"
) -> dict[str, nn.Module]:
    """Return the modules of layers by their names.

    Args:
        model: Classifier.
        pixel_values: Images, (batch, channels, height, width), to find the default layers.
        layers: Names or modules. An integer is the number of `default_layers`.
        flag: Name of the argument, for error messages.

    Raises:
        ValueError: If a layer is unknown, or the list is empty.
    """
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
            raise ValueError(f"{flag}={shown} is not a layer of {type(model).__name__}. See model.named_modules().")
        found[name] = by_name[name]
    if not found:
        raise ValueError(f"{flag}=[] must have at least one entry.")
    return found


def as_map(tensor: torch.Tensor, size: tuple[int, int], patch_size: tuple[int, int] | None) -> torch.Tensor:
    """Arrange patch tokens (batch, tokens, channels) as (batch, channels, height, width); drop all other tokens.

    Args:
        tensor: Tokens, or a feature map, which is returned unchanged.
        size: Height and width of the images in pixels.
        patch_size: Height and width of the patches in pixels, if known.

    Raises:
        ValueError: If the tokens do not match a grid.
    """
    if tensor.ndim == 4:
        return tensor
    grid, prefix = token_grid(tensor.shape[1], size, patch_size)
    return tensor[:, prefix:].transpose(1, 2).unflatten(2, grid)


def normalize(maps: torch.Tensor) -> torch.Tensor:
    """Scale each map (batch, height, width) to [0, 1]. A constant map becomes 0."""
    maps = maps - maps.amin(dim=(-2, -1), keepdim=True)
    # the package grad-cam uses the same constant, which affects the average over layers
    return maps / (maps.amax(dim=(-2, -1), keepdim=True) + 1e-7)


def upsample(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize maps (batch, height, width) to a size in pixels, with bilinear interpolation."""
    return F.interpolate(maps.unsqueeze(1), size=tuple(size), mode="bilinear", align_corners=False).squeeze(1)
