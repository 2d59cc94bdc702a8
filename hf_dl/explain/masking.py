"""What a classifier says when parts of the image are taken away, and how that depends on the way they are taken.

A black square is not an absence: on a grid of patches it is a crossword. So evidence can be taken away as pixels
(black, gray, the image's mean color, its blur, noise), from the attention (no token reads the patch), or as tokens
(the patch is not there). The last two are the same to the logits of a network that reads its CLS token alone; a head
that also averages the patches still counts those that are only masked.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms.v2.functional import gaussian_blur

from .attention import attention_maps, self_attention_shape
from .calls import class_logits, evaluating, find_blocks, patch_size_of, pick_classes

FILLS = ("black", "gray", "mean", "blur", "noise")
WAYS = (*FILLS, "attention", "tokens")
PLACES = ("center", "random", "top", "bottom")


# ------------------------------------------------------------------------------------------------------- which patches


def _check_count(count: int, grid: tuple[int, int]) -> None:
    if not 0 <= count <= grid[0] * grid[1]:
        raise ValueError(f"count={count} must be from 0 to {grid[0] * grid[1]}, the patches of a {grid} grid.")


def _choose(order: torch.Tensor, count: int, grid: tuple[int, int]) -> torch.Tensor:
    """Mark the first `count` of an order of patches (..., patches) in a grid, bool (..., height, width)."""
    _check_count(count, grid)
    masks = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    return masks.scatter(-1, order[..., :count], True).unflatten(-1, grid)


def center_patches(grid: tuple[int, int], count: int) -> torch.Tensor:
    """Mark the `count` patches in the middle, bool (height, width): squares, and what lies around them in between.

    Example:
        ```python
        >>> center_patches((4, 4), 4).int().tolist()
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]

        ```
    """
    y = (torch.arange(grid[0]) - (grid[0] - 1) / 2).abs()[:, None].expand(grid)
    x = (torch.arange(grid[1]) - (grid[1] - 1) / 2).abs().expand(grid)
    distance = torch.maximum(x, y) + 1e-3 * (x.square() + y.square()).sqrt()
    return _choose(distance.flatten().argsort(stable=True), count, grid)


def random_patches(grid: tuple[int, int], count: int, *, generator: torch.Generator) -> torch.Tensor:
    """Mark `count` patches drawn without replacement; the same draw with a lower count is a part of it.

    Args:
        grid: Height and width of the grid of patches.
        count: How many.
        generator: Source of the draw.

    Returns:
        bool (height, width).
    """
    order = torch.randperm(grid[0] * grid[1], generator=generator, device=generator.device)
    return _choose(order, count, grid)


def ranked_patches(maps: torch.Tensor, count: int, *, largest: bool = True) -> torch.Tensor:
    """Mark the `count` patches with the largest or smallest values of maps, bool (batch, height, width) too."""
    order = maps.flatten(-2).argsort(dim=-1, descending=largest, stable=True)
    return _choose(order, count, tuple(maps.shape[-2:]))


# ------------------------------------------------------------------------------------------------ how they are taken


def _per_channel(values: float | Sequence[float], pixel_values: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=pixel_values.dtype, device=pixel_values.device).reshape(-1, 1, 1)


def _replacement(
    pixel_values: torch.Tensor,
    fill: str,
    image_mean: float | Sequence[float],
    image_std: float | Sequence[float],
    generator: torch.Generator | None,
) -> torch.Tensor:
    """What stands in place of the pixels, broadcast to the images."""
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r} is unknown; choose one of {', '.join(FILLS)}.")
    mean, std = _per_channel(image_mean, pixel_values), _per_channel(image_std, pixel_values)
    if fill == "mean":
        return pixel_values.mean(dim=(2, 3), keepdim=True)
    if fill == "blur":
        height, width = pixel_values.shape[-2:]
        sigma = min(height, width) / 8
        # Reflection cannot reach further than the image.
        kernel = [2 * min(round(3 * sigma), side - 1) + 1 for side in (width, height)]
        return gaussian_blur(pixel_values, kernel, [sigma, sigma])
    if fill == "noise":
        if generator is None:
            raise ValueError("generator=None cannot draw fill='noise'; give a torch.Generator.")
        shape = pixel_values.shape
        noise = torch.rand(shape, generator=generator, device=generator.device).to(pixel_values)
        return (noise - mean) / std
    return ((0.0 if fill == "black" else 0.5) - mean) / std


def fill_patches(
    pixel_values: torch.Tensor,
    masks: torch.Tensor,
    fill: str = "gray",
    *,
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Paint over patches of images.

    Args:
        pixel_values: Normalized images, (batch, channels, height, width).
        masks: What to paint over, bool (batch, rows, columns) or (rows, columns): of patches, or of pixels.
        fill: "black", "gray" (0.5), "mean" (each image's own mean color), "blur" (Gaussian, sigma an eighth of the
            shorter side) or "noise" (uniform, each pixel and channel its own).
        image_mean: By which the images were normalized, of [0, 1]; one value or one for each channel.
        image_std: Likewise.
        generator: Source of the noise.

    Returns:
        The images, painted.

    Raises:
        ValueError: If the fill is unknown, or noise lacks its generator.
    """
    masks = masks.to(pixel_values.device).float()
    masks = masks.expand(len(pixel_values), *masks.shape[-2:]).unsqueeze(1)
    masks = F.interpolate(masks, size=pixel_values.shape[-2:], mode="nearest-exact") > 0.5
    return torch.where(masks, _replacement(pixel_values, fill, image_mean, image_std, generator), pixel_values)


class _KeyMask(TorchFunctionMode):
    """Keeps every self-attention from reading some patches."""

    def __init__(self, masks: torch.Tensor):
        super().__init__()
        self.masks, self.calls = masks, 0  # (batch, patches), True: not to be read

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        shape = self_attention_shape(func, args, kwargs, len(self.masks))
        if shape is None or shape[1] < self.masks.shape[1]:
            return func(*args, **kwargs)
        self.calls += 1
        prefix = shape[1] - self.masks.shape[1]
        hidden = F.pad(self.masks, (prefix, 0), value=False)[:, None, None, :]
        if func is F.scaled_dot_product_attention:
            given = args[3] if len(args) > 3 else kwargs.pop("attn_mask", None)
            if given is None:
                given = ~hidden
            elif given.dtype == torch.bool:
                given = given & ~hidden
            else:
                given = given.masked_fill(hidden, float("-inf"))
            if len(args) > 3:
                args = (*args[:3], given, *args[4:])
            else:
                kwargs["attn_mask"] = given
        elif args:
            args = (args[0].masked_fill(hidden, float("-inf")), *args[1:])
        else:
            kwargs["input"] = kwargs["input"].masked_fill(hidden, float("-inf"))
        return func(*args, **kwargs)


@contextmanager
def _dropped(model: nn.Module, masks: torch.Tensor) -> Iterator[None]:
    """Take patches (batch, patches) from the tokens that go into the first transformer block."""
    kept = (~masks).sum(dim=1)
    if kept.min() != kept.max():
        raise ValueError(
            f"masks take away {(masks.shape[1] - kept).tolist()} patches, expected the same number of each image with "
            "by='tokens'."
        )
    index = (~masks).int().argsort(dim=1, descending=True, stable=True)[:, : int(kept[0])]

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        tokens = args[0] if args else kwargs["hidden_states"]
        prefix = tokens.shape[1] - masks.shape[1]
        places = (index + prefix)[:, :, None].expand(-1, -1, tokens.shape[-1])
        tokens = torch.cat([tokens[:, :prefix], tokens.gather(1, places)], dim=1)
        return ((tokens, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": tokens})

    handle = find_blocks(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def masked_logits(
    model: nn.Module,
    pixel_values: torch.Tensor,
    masks: torch.Tensor,
    *,
    by: str = "gray",
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Classify images without some of their patches.

    Args:
        model: The classifier; a vision transformer for `by="attention"` and "tokens", which take patches that lie row
            by row after the other tokens; "tokens" takes absolute positions, added before the first block.
        pixel_values: Normalized images, (batch, channels, height, width).
        masks: What to take away, bool (batch, rows, columns) or (rows, columns) of the grid of patches.
        by: A fill of `fill_patches`, "attention" or "tokens".
        image_mean: As of `fill_patches`.
        image_std: As of `fill_patches`.
        generator: As of `fill_patches`.

    Returns:
        Logits, (batch, classes).

    Raises:
        ValueError: If the way is unknown, the masks do not fit, or the model shows no attention.
    """
    if by not in WAYS:
        raise ValueError(f"by={by!r} is unknown; choose one of {', '.join(WAYS)}.")
    with evaluating(model):
        if by in FILLS:
            options = {"image_mean": image_mean, "image_std": image_std, "generator": generator}
            return class_logits(model, fill_patches(pixel_values, masks, by, **options))
        patch_size = patch_size_of(model)
        if patch_size is not None:
            grid = tuple(side // patch for side, patch in zip(pixel_values.shape[-2:], patch_size, strict=True))
            if tuple(masks.shape[-2:]) != grid:
                raise ValueError(f"masks has shape {tuple(masks.shape)}, expected the grid of patches, {grid}.")
        parameter = next(model.parameters(), pixel_values)
        masks = masks.to(parameter.device).expand(len(pixel_values), *masks.shape[-2:]).flatten(1)
        if by == "tokens":
            with _dropped(model, masks):
                return class_logits(model, pixel_values)
        with _KeyMask(masks) as mode:
            logits = class_logits(model, pixel_values)
        if not mode.calls:
            raise ValueError(
                f"model={type(model).__name__} shows no attention, expected scaled_dot_product_attention or eager "
                "attention with by='attention'."
            )
        return logits


# -------------------------------------------------------------------------------------------------------- the report


def masking_report(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    counts: Sequence[int],
    seeds: int = 20,
    places: Sequence[str] = PLACES,
    ways: Sequence[str] = ("black", "gray", "attention"),
    maps: torch.Tensor | None = None,
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Take k patches away, at several places, in several ways, and say what becomes of the label.

    A seed draws the same patches for every way, and those of a lower count are a part of them, so that differences
    between ways and counts are of the ways and counts. What involves no draw is done once.

    Args:
        model: The classifier.
        pixel_values: Normalized images, (batch, channels, height, width).
        counts: Numbers of patches, k.
        seeds: R, draws of random patches and of noise: seeds 0 to R - 1.
        places: Of "center" (a block), "random", "top" and "bottom" (the patches with the most and the least in
            `maps`).
        ways: Of `WAYS`.
        maps: What ranks the patches, (batch, rows, columns) of the grid; the last layer's CLS attention if not given.
        image_mean: As of `fill_patches`.
        image_std: As of `fill_patches`.
        batch_size: Images at a time.

    Returns:
        Ready for JSON. `original`: for each image its label and probability. `trials`: for each image, way, place,
        count and seed, the label it got, and of the original label the probability and rank (1: still first), and the
        Kullback-Leibler divergence from the original probabilities, in nats. `summary`: for each way, place and count
        the number of trials, means of these, the share of changed labels, and `became`: how often which label came.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """
    for name, values, known in (("places", places, PLACES), ("ways", ways, WAYS)):
        unknown = [value for value in values if value not in known]
        if unknown:
            raise ValueError(f"{name}={unknown[0]!r} is unknown; choose from {', '.join(known)}.")
    if seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1.")
    if maps is None:
        maps, _ = attention_maps(model, pixel_values)
    maps = maps.cpu()
    grid = tuple(maps.shape[-2:])
    for count in counts:
        _check_count(count, grid)
    names = getattr(getattr(model, "config", None), "id2label", None) or {}

    def name_of(label: int) -> str:
        return str(names.get(label, label))

    with torch.no_grad(), evaluating(model):
        chunks = [class_logits(model, chunk) for chunk in pixel_values.split(batch_size)]
    before = torch.cat(chunks).double().log_softmax(dim=-1).cpu()
    labels = before.argmax(dim=-1)
    trials, summary = [], []
    for way in ways:
        for place in places:
            for count in counts:
                drawn = range(seeds if place == "random" or way == "noise" else 1)
                cell = [
                    {"image": image, "way": way, "place": place, "count": count, "seed": seed}
                    for image in range(len(pixel_values))
                    for seed in drawn
                ]
                for start in range(0, len(cell), batch_size):
                    part = cell[start : start + batch_size]
                    masks = torch.stack([_masks_of(trial, maps, grid) for trial in part])
                    images = pixel_values[[trial["image"] for trial in part]]
                    if way == "noise":  # each its own seed, whatever the size of the batches
                        images = torch.cat(
                            [
                                fill_patches(
                                    image[None],
                                    mask,
                                    "noise",
                                    image_mean=image_mean,
                                    image_std=image_std,
                                    generator=torch.Generator().manual_seed(trial["seed"]),
                                )
                                for image, mask, trial in zip(images, masks, part, strict=True)
                            ]
                        )
                        masks = torch.zeros_like(masks)
                    options = {"image_mean": image_mean, "image_std": image_std}
                    logits = masked_logits(model, images, masks, by="gray" if way == "noise" else way, **options)
                    after = logits.double().log_softmax(dim=-1).cpu()
                    for trial, row in zip(part, after, strict=True):
                        first, label = before[trial["image"]], int(labels[trial["image"]])
                        trial["label"] = name_of(int(row.argmax()))
                        trial["probability"] = row[label].exp().item()
                        trial["rank"] = int((row > row[label]).sum()) + 1
                        trial["kl"] = (first.exp() * (first - row)).sum().item()
                        trial["changed"] = bool(row.argmax() != label)
                trials += cell
                summary.append(
                    {"way": way, "place": place, "count": count, "trials": len(cell)}
                    | {
                        name: sum(trial[name] for trial in cell) / len(cell)
                        for name in ("probability", "rank", "kl", "changed")
                    }
                    | {"became": dict(Counter(trial["label"] for trial in cell).most_common())}
                )
    original = [
        {"label": name_of(int(label)), "probability": row[label].exp().item()}
        for label, row in zip(labels, before, strict=True)
    ]
    return {"grid": list(grid), "original": original, "trials": trials, "summary": summary}


def _masks_of(trial: dict[str, Any], maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    if trial["place"] == "center":
        return center_patches(grid, trial["count"])
    if trial["place"] == "random":
        # Images share seeds but not draws.
        seed = trial["seed"] + 1_000_003 * trial["image"]
        return random_patches(grid, trial["count"], generator=torch.Generator().manual_seed(seed))
    return ranked_patches(maps[trial["image"]], trial["count"], largest=trial["place"] == "top")


# --------------------------------------------------------------------------------------------------------- the curves


@dataclass
class CurveOutput:
    """What `curve` returns.

    Attributes:
        fractions: Parts of the pixels changed, (steps + 1,), from 0 to 1.
        probabilities: Of the classes, (batch, steps + 1).
        area: Under each curve, (batch,): low is good for deletion, high for insertion.
        classes: int64 (batch,).
    """

    fractions: torch.Tensor
    probabilities: torch.Tensor
    area: torch.Tensor
    classes: torch.Tensor


@torch.no_grad()
def curve(
    model: nn.Module,
    pixel_values: torch.Tensor,
    maps: torch.Tensor,
    *,
    mode: str = "deletion",
    steps: int = 20,
    fill: str | None = None,
    classes: int | Sequence[int] | torch.Tensor | None = None,
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
    generator: torch.Generator | None = None,
    batch_size: int = 32,
) -> CurveOutput:
    """Delete pixels in the order of a map, or insert them, and watch the class's probability (Petsiuk et al. 2018).

    Args:
        model: The classifier.
        pixel_values: Normalized images, (batch, channels, height, width).
        maps: What orders the pixels, largest first, (batch, height, width).
        mode: "deletion": from the image to nothing; "insertion": from nothing to the image.
        steps: How many times pixels are changed.
        fill: What nothing is, as of `fill_patches`; "gray" for deletion and "blur" for insertion when not given, as in
            the paper.
        classes: One for all images or one for each; those predicted for the whole images when not given.
        image_mean: As of `fill_patches`.
        image_std: As of `fill_patches`.
        generator: As of `fill_patches`.
        batch_size: Images at a time.

    Returns:
        See `CurveOutput`.

    Raises:
        ValueError: If an argument is unknown or does not fit.
    """
    if mode not in ("deletion", "insertion"):
        raise ValueError(f"mode={mode!r} is unknown; choose one of deletion, insertion.")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    if maps.shape != (len(pixel_values), *pixel_values.shape[-2:]):
        raise ValueError(
            f"maps has shape {tuple(maps.shape)}, expected {(len(pixel_values), *pixel_values.shape[-2:])}, that of "
            "the images."
        )
    fill = fill or {"deletion": "gray", "insertion": "blur"}[mode]
    nothing = _replacement(pixel_values, fill, image_mean, image_std, generator).expand_as(pixel_values)
    before, after = (pixel_values, nothing) if mode == "deletion" else (nothing, pixel_values)
    order = maps.to(pixel_values.device).flatten(1).argsort(dim=1, descending=True, stable=True)
    place = order.argsort(dim=1).view_as(maps).unsqueeze(1)  # of each pixel in the order
    fractions = torch.linspace(0, 1, steps + 1)
    changed = [round(fraction * order.shape[1]) for fraction in fractions.tolist()]
    with evaluating(model):
        picked = pick_classes(
            torch.cat([class_logits(model, chunk) for chunk in pixel_values.split(batch_size)]), classes
        )
        columns = []
        for count in changed:
            images = torch.where(place < count, after, before)
            logits = torch.cat([class_logits(model, chunk) for chunk in images.split(batch_size)])
            columns.append(logits.float().softmax(dim=-1).gather(1, picked[:, None])[:, 0])
    probabilities = torch.stack(columns, dim=1)
    area = torch.trapezoid(probabilities, fractions.to(probabilities.device), dim=1)
    return CurveOutput(fractions, probabilities, area, picked)
