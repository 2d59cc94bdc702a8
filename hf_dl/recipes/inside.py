"""Pages of figures that look inside an image classifier, one page per method of `hf_dl.explain.METHODS`.

`draw_pages` draws the pages of scripts/explain_image.py --methods. `PAGES` has the pages of methods without maps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_dl import explain
from hf_dl.data.class_folders import is_flat
from hf_dl.progress import activity
from hf_dl.reporting.grids import color_heat, image_grid

from .explanation import Explainer, load_study, open_images, overlay

EPSILONS = (1, 2, 4, 8, 16)  # of the success rates, in steps of 1/255
PATCHES = 9  # patches per channel, as in Zeiler & Fergus 2014
DEPTHS = 4  # layers of the page of inversion
NEIGHBORS = 6
# maps that also have signs
GRADIENTS = ("gradient", "smooth_grad", "integrated_gradients", "guided_backprop", "deconvolution")


@dataclass
class Page:
    """The data of all pages: a classifier and images.

    Attributes:
        explainer: The classifier, with the flags.
        skipped: One entry, `file` and `error`, for each file that could not be read.
    """

    explainer: Explainer
    skipped: list[dict[str, Any]]

    @property
    def of_files(self) -> bool:
        """Whether the images are files, without labels."""
        return bool(self.explainer.args.images) or is_flat(self.explainer.args.source)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield pixel values (batch, channels, height, width), and labels (batch,) if the images have labels."""
        if self.of_files:
            shape = None
            self.skipped.clear()
            for _, image in open_images(self.explainer, self.skipped):
                pixel_values = self.explainer.prepare([image])
                shape = shape or pixel_values.shape
                if pixel_values.shape == shape:  # a processor may keep different sizes
                    yield pixel_values, None
        else:
            for batch in load_study(self.explainer):
                pixel_values = self.explainer.prepare(batch["image"])
                yield pixel_values, torch.as_tensor(batch["label"], device=pixel_values.device)

    @cached_property
    def shown(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the pixel values and the labels of the first images."""
        count, images, labels = self.explainer.args.page_images, [], []
        for pixel_values, label in self.batches():
            images.append(pixel_values)
            labels.append(label)
            if sum(map(len, images)) >= count:
                break
        known = None if labels[0] is None else torch.cat(labels)[:count]
        return torch.cat(images)[:count], known

    def layers(self, count: int) -> list[str]:
        """Return the layers in --layers, or `count` layers at even distances."""
        layers = [layer for layer in self.explainer.args.layers if not layer.isdigit()]
        return layers or explain.spread_layers(self.explainer.model, self.shown[0], count)

    @property
    def middle(self) -> str:
        """Return the first layer in --layers, or a layer in the middle, whose patches are parts of the image."""
        layers = self.layers(3)
        return layers[0] if self.explainer.args.layers else layers[len(layers) // 2]

    def run(self, method: str, images: Any, target: Any = None, **options: Any) -> explain.Explanation:
        """Call `explain` with the normalization of the classifier."""
        pixels = {"image_mean": self.explainer.mean, "image_std": self.explainer.std}
        return explain.explain(self.explainer.model, images, method=method, target=target, **pixels, **options)

    def caption(self, logits: torch.Tensor) -> list[str]:
        """Return the predicted class and its probability for each image."""
        values, classes = logits.float().softmax(dim=1).max(dim=1)
        names = [self.explainer.names[c] for c in classes.tolist()]
        return [f"{name} {value:.2f}" for name, value in zip(names, values.tolist(), strict=True)]


def to_pictures(values: torch.Tensor) -> list[np.ndarray]:
    """Convert images in [0, 1], (batch, channels, height, width), to uint8 (height, width, 3)."""
    values = values if values.shape[1] == 3 else values.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return list((values.detach().float() * 255).round().byte().movedim(1, -1).cpu().numpy())


def to_signed_pictures(values: torch.Tensor) -> list[np.ndarray]:
    """Show signed values (batch, channels, height, width) around gray. A few outliers are cut."""
    top = values.detach().float().abs().flatten(1).quantile(0.995, dim=1)[:, None, None, None].clamp_min(1e-30)
    return to_pictures((0.5 + values / (2 * top)).clamp(0, 1))


def clip_outliers(heats: np.ndarray) -> np.ndarray:
    """Scale maps (batch, height, width) to [0, 1]. The largest 0.5 % become 1, because few pixels are much larger."""
    top = np.quantile(heats, 0.995, axis=(1, 2), keepdims=True)
    return np.clip(heats / np.maximum(top, 1e-30), 0, 1)


def to_square(pictures: Sequence[Any], longest: int = 12) -> list[list[Any]]:
    """Arrange pictures in rows of equal length, nearly as a square, with few empty places.

    Example:
        >>> to_square("abcdefg")
        [['a', 'b', 'c', 'd'], ['e', 'f', 'g']]
    """
    side = min(max(math.ceil(math.sqrt(len(pictures))), 1), longest)
    columns = min(range(side, min(side + 2, longest + 1)), key=lambda columns: -len(pictures) % columns)
    return [list(pictures[start : start + columns]) for start in range(0, len(pictures), columns)]


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def draw_maps(page: Page, method: str, path: Path) -> dict[str, float]:
    """Draw images, their maps and the overlays. Gradients are also shown in color around gray."""
    images, _ = page.shown
    found = page.explainer.look(images, method)
    pictures = list(page.explainer.show(images))
    heats = found.maps.float().cpu().numpy()
    if method in GRADIENTS:
        heats = clip_outliers(heats)
    rows = {
        "image": pictures,
        "map": [color_heat(heat) for heat in heats],
        "overlay": [overlay(picture, heat) for picture, heat in zip(pictures, heats, strict=True)],
    }
    if method in GRADIENTS:
        rows["by color"] = to_signed_pictures(found.output.attributions)
    captions = [page.caption(found.logits), *[[] for _ in range(len(rows) - 1)]]
    image_grid(list(rows.values()), path, labels=list(rows), captions=captions)
    return {}


def draw_filters(page: Page, path: Path) -> dict[str, float]:
    """Draw all filters of the first layer."""
    pictures = to_pictures(page.run("filters", page.shown[0]).pictures)
    image_grid(to_square(pictures), path, cell=0.6)
    return {"filters": float(len(pictures))}


def draw_class_models(page: Page, path: Path) -> dict[str, float]:
    """Draw images with large logits, one for each class of the study."""
    explainer, classes = page.explainer, page.explainer.study_classes()
    start = page.shown[0][:1].expand(len(classes), -1, -1, -1)
    found = page.run("class_model", start, classes)
    names = [explainer.names[c] for c in classes]
    captions = [f"{name} {score:.1f}" for name, score in zip(names, found.output.scores.tolist(), strict=True)]
    image_grid(to_square(to_pictures(found.pictures)), path, captions=to_square(captions), cell=1.3)
    return {"class_model_logit": found.output.scores.mean().item()}


def draw_activations(page: Page, path: Path) -> dict[str, float]:
    """Draw images that activate channels, one for each channel."""
    channels = page.explainer.args.channels
    found = page.run("activation", page.shown[0][:1], channels, layer=page.middle)
    captions = [f"channel {channel}" for channel in channels]
    image_grid(to_square(to_pictures(found.pictures)), path, captions=to_square(captions), cell=1.3)
    return {}


def draw_patches(page: Page, path: Path) -> dict[str, float]:
    """Draw the patches that activate channels most, one row for each channel."""
    channels = page.explainer.args.channels
    stream = (pixel_values for pixel_values, _ in page.batches())
    found = page.run("patches", stream, channels, layer=page.middle, k=PATCHES)
    pictures = to_pictures(found.pictures)
    count = len(pictures) // len(channels)
    rows = [pictures[start : start + count] for start in range(0, len(pictures), count)]
    captions = [[f"{value:.2f}" for value in row] for row in found.output.values.tolist()]
    image_grid(rows, path, labels=[f"channel {channel}" for channel in channels], captions=captions, cell=0.9)
    return {"patch_pixels": float(max(found.pictures.shape[-2:]))}


def draw_inversions(page: Page, path: Path) -> dict[str, float]:
    """Draw images with the same features as other images, one row for each layer."""
    explainer, (images, _) = page.explainer, page.shown
    layers = page.layers(DEPTHS)
    rows, captions, metrics = [list(explainer.show(images))], [[]], {}
    for number, layer in enumerate(layers, start=1):
        with activity(f"Inverting {layer}"):
            found = page.run("inversion", images, layer=layer)
        rows.append(to_pictures(found.pictures))
        captions.append([f"error {score:.3f}" for score in found.output.scores.tolist()])
        metrics[f"inversion_error_{number}"] = found.output.scores.mean().item()
    labels = ["image", *(layer if len(layer) <= 20 else "…" + layer[-19:] for layer in layers)]
    image_grid(rows, path, labels=labels, captions=captions)
    return metrics


def draw_attack(page: Page, method: str, path: Path) -> dict[str, float]:
    """Draw images, the change of their pixels, and the changed images; measure success rates."""
    explainer, (images, labels) = page.explainer, page.shown
    attack, epsilon = explain.ATTACKS[method], explainer.args.epsilon
    pixels = {"image_mean": explainer.mean, "image_std": explainer.std}
    found = attack(explainer.model, images, labels=labels, targets=explainer.target, epsilon=epsilon, **pixels)
    shown = list(explainer.show(images))
    change = found.pictures.cpu() - torch.from_numpy(np.stack(shown)).movedim(-1, 1)[:, : images.shape[1]] / 255
    rows = [shown, to_pictures((0.5 + change / (2 * max(epsilon, 1e-30))).clamp(0, 1)), to_pictures(found.pictures)]
    logits = [explain.class_logits(explainer.model, x).detach() for x in (images, found.pixel_values)]
    captions = [page.caption(logits[0]), [], page.caption(logits[1])]
    image_grid(rows, path, labels=["image", f"change, {255 * epsilon:.3g}/255", "changed image"], captions=captions)
    counts = dict.fromkeys(EPSILONS, 0)
    right = 0
    for pixel_values, known in page.batches():
        for step in EPSILONS:
            output = attack(explainer.model, pixel_values, labels=known, epsilon=step / 255, **pixels)
            counts[step] += output.success.sum().item()
        right += (output.before == output.labels).sum().item()
    return {f"{method}_success_{step}": count / right for step, count in counts.items() if right}


def draw_codes(page: Page, path: Path) -> dict[str, float]:
    """Draw the map of the data set, and the nearest neighbors of some images."""
    batches = list(page.batches())
    columns = min(32, max(4, round(1.6 * math.sqrt(sum(len(x) for x, _ in batches)))))
    layer = page.layers(1)[0] if page.explainer.args.layers else None
    found = page.run("codes", (x for x, _ in batches), layer=layer, columns=columns)
    image_grid([to_pictures(found.pictures)], path, cell=9)
    output, count = found.output, len(found.output.codes)
    k = min(NEIGHBORS, count - 1)
    queries = torch.arange(min(page.explainer.args.page_images, count))
    numbers, values = explain.nearest_neighbors(output.codes, queries, k)
    rows = torch.cat([queries[:, None], numbers], dim=1)
    captions = [["image", *(f"{value:.2f}" for value in row)] for row in values.tolist()]
    pictures = to_pictures(output.thumbnails)
    neighbors = path.with_name(f"{path.stem}_neighbors.png")
    image_grid([[pictures[i] for i in row] for row in rows.tolist()], neighbors, captions=captions, cell=0.9)
    if batches[0][1] is None:
        return {}
    labels = torch.cat([label for _, label in batches]).cpu()
    nearest, _ = explain.nearest_neighbors(output.codes, torch.arange(count), 1)
    return {"neighbor_same_class": (labels[nearest[:, 0]] == labels).float().mean().item()}


PAGES: dict[str, Callable[[Page, Path], dict[str, float]]] = {
    "filters": draw_filters,
    "class_model": draw_class_models,
    "activation": draw_activations,
    "inversion": draw_inversions,
    "fgsm": lambda page, path: draw_attack(page, "fgsm", path),
    "pgd": lambda page, path: draw_attack(page, "pgd", path),
    "patches": draw_patches,
    "codes": draw_codes,
}


def draw_pages(explainer: Explainer, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Draw one page, <method>.png, for each method in `args.methods`.

    Args:
        explainer: The classifier, with the flags.
        folder: The folder for the figures.

    Returns:
        The metrics, and one entry per page, with `error` for a method that does not fit the model.

    Raises:
        ValueError: If no image can be read, or no method fits the model.
    """
    page, metrics, entries = Page(explainer, []), {}, []
    if page.of_files:
        _ = page.shown  # raises an error now, and not once per method, if no image can be read
    for method in explainer.args.methods:
        path = folder / f"{method}.png"
        try:
            with activity(f"Drawing {path.name}"):
                draw = PAGES.get(method)
                metrics |= draw_maps(page, method, path) if draw is None else draw(page, path)
        except ValueError as error:
            entries.append({"method": method, "error": str(error)})
            if len(explainer.args.methods) > 1:  # otherwise the error below is the same sentence
                print(f"{method:22s} skipped: {error}")
            continue
        entries.append({"method": method, "figure": path.name, "summary": explain.METHODS[method].summary})
        print(f"{method:22s} {path.name}")
    if all("error" in entry for entry in entries):
        raise ValueError(entries[0]["error"])
    return {"pages": float(sum("figure" in entry for entry in entries)), **metrics}, [*entries, *page.skipped]
