"""How the explanations call a model, where its tokens lie in the image, and which of its layers are looked at."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

MAX_PREFIX_TOKENS = 16  # CLS, distillation and register tokens that are looked for where no patch size is known


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own on the way out."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def class_logits(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Call a classifier.

    Vision transformers of transformers that interpolate their positions on request are asked to when the images have
    another size than their config says.

    Args:
        model: The classifier.
        pixel_values: (batch, channels, height, width).

    Returns:
        Logits, (batch, classes).

    Raises:
        ValueError: If what the model returns holds no logits of that shape.

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
            f"model={type(model).__name__} returned {found}, expected logits ({len(pixel_values)}, classes) or an "
            "output that has them."
        )
    return logits


def pick_classes(logits: torch.Tensor, classes: int | Sequence[int] | torch.Tensor | None) -> torch.Tensor:
    """The classes to explain, int64 (batch,): those given, or the predicted ones.

    Raises:
        ValueError: If there is not one for each image, or one is not a class of the model.
    """
    if classes is None:
        return logits.argmax(dim=-1)
    found = torch.as_tensor(classes, device=logits.device).long().reshape(-1)
    if len(found) == 1:
        found = found.expand(len(logits))
    if len(found) != len(logits) or found.min() < 0 or found.max() >= logits.shape[-1]:
        raise ValueError(
            f"classes={found.tolist()} must be one class for all images or one for each of the {len(logits)}, from 0 "
            f"to {logits.shape[-1] - 1}."
        )
    return found


def patch_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the model's patches in pixels where it or its config says; None for other networks."""
    config = getattr(model, "config", None)
    places = (config, getattr(config, "vision_config", None), getattr(model, "patch_embed", None))
    size = next((place.patch_size for place in places if getattr(place, "patch_size", None)), None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else tuple(size)


def token_grid(
    num_tokens: int, image_size: tuple[int, int], patch_size: tuple[int, int] | None = None
) -> tuple[tuple[int, int], int]:
    """Where the tokens of an image lie.

    Args:
        num_tokens: Tokens of the layer.
        image_size: Height and width of the image, in pixels.
        patch_size: Height and width of a patch. Without it, or where the layer has fewer tokens than that makes
            (merged patches), the grid has the image's aspect ratio and as few tokens before it as possible.

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
        f"num_tokens={num_tokens} is no grid of patches with up to {MAX_PREFIX_TOKENS} tokens before it in an image "
        f"of {height}x{width} pixels; give the patch size."
    )


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model: its longest list of modules of one class that hold an attention.

    Raises:
        ValueError: If it has none.
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


def default_layers(model: nn.Module, pixel_values: torch.Tensor, count: int = 1) -> list[str]:
    """Name the layers that Grad-CAM looks at when nothing else is said.

    - Vision transformers: what goes into the last `count` blocks' attention. Behind the last attention only the CLS
      token reaches the logits, and the gradient of all patches is zero.
    - Other networks: for `count=1` the last feature map, for more the outputs of the last `count` convolutions larger
      than 1x1, the layers that He et al. 2015 count.

    Args:
        model: The classifier.
        pixel_values: An image, (1, channels, height, width), to see what the layers give.
        count: How many.

    Returns:
        Names as of `named_modules`, in the order in which they run.

    Raises:
        ValueError: If the model has fewer.
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
        found = [name for name in found if maps.count(name) == 1]  # a shared ReLU has no output of its own
    if not 1 <= count <= len(found):
        raise ValueError(f"count={count} layers of model={type(model).__name__} must be 1 to {len(found)}.")
    return found[-count:]


def normalize(maps: torch.Tensor) -> torch.Tensor:
    """Stretch each map (batch, height, width) to [0, 1]; a constant one becomes 0."""
    maps = maps - maps.amin(dim=(-2, -1), keepdim=True)
    # The constant is that of the package grad-cam, so that several layers are weighed alike.
    return maps / (maps.amax(dim=(-2, -1), keepdim=True) + 1e-7)


def upsample(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Enlarge maps (batch, height, width) bilinearly, pixels being areas, to a size in pixels."""
    return F.interpolate(maps.unsqueeze(1), size=tuple(size), mode="bilinear", align_corners=False).squeeze(1)
