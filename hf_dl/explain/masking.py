"""Predictions of a classifier without parts of the image, for several ways to remove them.

Black patches on a grid look like a crossword puzzle, so they add a pattern instead of removing one. Patches can be
removed as pixels (black, gray, the mean color of the image, blur, noise), from the attention (no token reads them), or
as tokens. The last two give the same logits for networks that classify by the CLS token alone. A head that averages
the patches still includes masked patches.
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
from .calls import class_logits, evaluating, find_blocks, patch_size_of, per_channel, pick_classes

FILLS = ("black", "gray", "mean", "blur", "noise")
WAYS = (*FILLS, "attention", "tokens")
PLACES = ("center", "random", "top", "bottom")


# ---------------------------------------------------------------------------------------------------------------------
# Choosing patches


def _check_count(count: int, grid: tuple[int, int]) -> None:
    if not 0 <= count <= grid[0] * grid[1]:
        raise ValueError(
            f"count={count} must be from 0 to {grid[0] * grid[1]}, the number of patches of a {grid} grid."
        )


def _choose(order: torch.Tensor, count: int, grid: tuple[int, int]) -> torch.Tensor:
    """Mark the first `count` patches of an order (..., patches) in a grid, bool (..., height, width)."""
    _check_count(count, grid)
    masks = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    return masks.scatter(-1, order[..., :count], True).unflatten(-1, grid)


def center_patches(grid: tuple[int, int], count: int) -> torch.Tensor:
    """Mark the `count` patches closest to the center, bool (height, width). Square numbers give squares.

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
    """Mark `count` random patches. With the same seed, a lower count gives a subset.

    Args:
        grid: Height and width of the grid of patches.
        count: Number of patches.
        generator: Random number generator.

    Returns:
        Bool (height, width).
    """
    order = torch.randperm(grid[0] * grid[1], generator=generator, device=generator.device)
    return _choose(order, count, grid)


def ranked_patches(maps: torch.Tensor, count: int, *, largest: bool = True) -> torch.Tensor:
    """Mark the `count` patches with the largest or smallest values of maps, bool of the shape of the maps."""
    order = maps.flatten(-2).argsort(dim=-1, descending=largest, stable=True)
    return _choose(order, count, tuple(maps.shape[-2:]))


# ---------------------------------------------------------------------------------------------------------------------
# Removing patches


def replacement(
    pixel_values: torch.Tensor,
    fill: str,
    image_mean: float | Sequence[float],
    image_std: float | Sequence[float],
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Return the pixels of a fill, which can be broadcast to the images. See `fill_patches`."""
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r} is unknown; choose one of {', '.join(FILLS)}.")
    mean, std = per_channel(image_mean, pixel_values), per_channel(image_std, pixel_values)
    if fill == "mean":
        return pixel_values.mean(dim=(2, 3), keepdim=True)
    if fill == "blur":
        height, width = pixel_values.shape[-2:]
        sigma = min(height, width) / 8
        # reflection padding must be smaller than the image
        kernel = [2 * min(round(3 * sigma), side - 1) + 1 for side in (width, height)]
        return gaussian_blur(pixel_values, kernel, [sigma, sigma])
    if fill == "noise":
        if generator is None:
            raise ValueError("generator=None is not supported with fill='noise'. Pass a torch.Generator.")
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
    """Replace patches of images.

    Args:
        pixel_values: Normalized images, (batch, channels, height, width).
        masks: Patches or pixels to replace, bool (batch, rows, columns) or (rows, columns).
        fill: New pixels: "black", "gray" (0.5), "mean", "blur" or "noise". "mean" is the mean color of the image, and
            "blur" a Gaussian with sigma of an eighth of the shorter side. "noise" is uniform and independent for all
            pixels and channels.
        image_mean: Mean of the normalization of images in [0, 1]; one value or one per channel.
        image_std: Standard deviation of the normalization; one value or one per channel.
        generator: Random number generator of the noise.

    Returns:
        The images with replaced patches.

    Raises:
        ValueError: If `fill` is unknown, or "noise" has no generator.
    """
    masks = masks.to(pixel_values.device).float()
    masks = masks.expand(len(pixel_values), *masks.shape[-2:]).unsqueeze(1)
    masks = F.interpolate(masks, size=pixel_values.shape[-2:], mode="nearest-exact") > 0.5
    return torch.where(masks, replacement(pixel_values, fill, image_mean, image_std, generator), pixel_values)


class _KeyMask(TorchFunctionMode):
    """Masks patches as keys of all self-attention calls."""

    def __init__(self, masks: torch.Tensor):
        super().__init__()
        self.masks, self.calls = masks, 0  # (batch, patches), True for masked patches

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
    """Remove patches (batch, patches) from the input tokens of the first transformer block."""
    kept = (~masks).sum(dim=1)
    if kept.min() != kept.max():
        raise ValueError(
            f"masks remove {(masks.shape[1] - kept).tolist()} patches. Expected the same number for all images with "
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
        model: Classifier. `by="attention"` and `by="tokens"` need a vision transformer whose patches are its last
            tokens, row by row. "tokens" also needs absolute positions, which are added before the first block.
        pixel_values: Normalized images, (batch, channels, height, width).
        masks: Patches to remove, bool (batch, rows, columns) or (rows, columns) of the grid of patches.
        by: Way to remove patches: a fill of `fill_patches`, "attention" or "tokens".
        image_mean: Mean of the normalization, see `fill_patches`.
        image_std: Standard deviation of the normalization, see `fill_patches`.
        generator: Random number generator of the noise, see `fill_patches`.

    Returns:
        Logits, (batch, classes).

    Raises:
        ValueError: If `by` is unknown, the masks do not match the grid, or the model has no supported attention.
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
                raise ValueError(f"masks has shape {tuple(masks.shape)}. Expected the grid of patches, {grid}.")
        parameter = next(model.parameters(), pixel_values)
        masks = masks.to(parameter.device).expand(len(pixel_values), *masks.shape[-2:]).flatten(1)
        if by == "tokens":
            with _dropped(model, masks):
                return class_logits(model, pixel_values)
        with _KeyMask(masks) as mode:
            logits = class_logits(model, pixel_values)
        if not mode.calls:
            raise ValueError(
                f"model={type(model).__name__} has no supported attention. by='attention' needs "
                "scaled_dot_product_attention or eager attention."
            )
        return logits


# ---------------------------------------------------------------------------------------------------------------------
# Report


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
    """Remove k patches at several places and in several ways, and report the changes of the predicted label.

    A seed selects the same patches for all ways, and a lower count removes a subset of them. Different results
    therefore come from the way or the count only. Combinations without randomness run once.

    Args:
        model: Classifier.
        pixel_values: Normalized images, (batch, channels, height, width).
        counts: Numbers of patches k.
        seeds: Number of draws of random patches and noise. The seeds are 0 to `seeds` - 1.
        places: Places of the patches: "center", "random", "top" and "bottom". The last two are the patches with the
            highest and lowest values in `maps`.
        ways: Ways to remove patches, of `WAYS`.
        maps: Maps that rank the patches, (batch, rows, columns) of the grid. Defaults to the CLS attention of the last
            layer.
        image_mean: Mean of the normalization, see `fill_patches`.
        image_std: Standard deviation of the normalization, see `fill_patches`.
        batch_size: Images per forward pass.

    Returns:
        A dict that can be saved as JSON.

        * `original`: label and probability of each image.
        * `trials`: one entry per image, way, place, count and seed. It has the new label, the probability and rank of
          the original label (1 is the highest), and the Kullback-Leibler divergence from the original probabilities,
          in nats.
        * `summary`: one entry per way, place and count. It has the number of trials, the means of the values above,
          the share of changed labels, and `became`, the counts of the new labels.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """
    for name, values, known in (("places", places, PLACES), ("ways", ways, WAYS)):
        unknown = [value for value in values if value not in known]
        if unknown:
            raise ValueError(f"{name}={unknown[0]!r} is unknown; choose one of {', '.join(known)}.")
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
                    if way == "noise":  # one seed per image, independent of the batch size
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
        # each image has its own draws for the same seed
        seed = trial["seed"] + 1_000_003 * trial["image"]
        return random_patches(grid, trial["count"], generator=torch.Generator().manual_seed(seed))
    return ranked_patches(maps[trial["image"]], trial["count"], largest=trial["place"] == "top")


# ---------------------------------------------------------------------------------------------------------------------
# Curves


@dataclass
class CurveOutput:
    """Output of `curve`.

    Attributes:
        fractions: Shares of changed pixels, (steps + 1,), from 0 to 1.
        probabilities: Probabilities of the classes, (batch, steps + 1).
        area: Area under each curve, (batch,). Lower is better for deletion, and higher for insertion.
        classes: Classes, int64 (batch,).
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
    """Delete or insert pixels in the order of a map, and record the class probability (Petsiuk et al. 2018).

    Args:
        model: Classifier.
        pixel_values: Normalized images, (batch, channels, height, width).
        maps: Maps that order the pixels, largest first, (batch, height, width).
        mode: "deletion" removes pixels from the image, and "insertion" adds pixels to the fill.
        steps: Number of steps from the first to the last pixel.
        fill: Fill of removed pixels, see `fill_patches`. Defaults to "gray" for deletion and "blur" for insertion, as
            in the paper.
        classes: One class for all images or one for each image. Defaults to the classes predicted for whole images.
        image_mean: Mean of the normalization, see `fill_patches`.
        image_std: Standard deviation of the normalization, see `fill_patches`.
        generator: Random number generator of the noise, see `fill_patches`.
        batch_size: Images per forward pass.

    Returns:
        See `CurveOutput`.

    Raises:
        ValueError: If an argument is unknown, or a shape does not match.
    """
    if mode not in ("deletion", "insertion"):
        raise ValueError(f"mode={mode!r} is unknown; choose one of deletion, insertion.")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    if maps.shape != (len(pixel_values), *pixel_values.shape[-2:]):
        raise ValueError(
            f"maps has shape {tuple(maps.shape)}. Expected the size of the images, "
            f"{(len(pixel_values), *pixel_values.shape[-2:])}."
        )
    fill = fill or {"deletion": "gray", "insertion": "blur"}[mode]
    nothing = replacement(pixel_values, fill, image_mean, image_std, generator).expand_as(pixel_values)
    before, after = (pixel_values, nothing) if mode == "deletion" else (nothing, pixel_values)
    order = maps.to(pixel_values.device).flatten(1).argsort(dim=1, descending=True, stable=True)
    place = order.argsort(dim=1).view_as(maps).unsqueeze(1)  # position of each pixel in the order
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
