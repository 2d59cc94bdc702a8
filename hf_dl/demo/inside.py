"""Looking inside a classifier on a page: `hf_dl.explain` for one image, as pictures and HTML, without the layout."""

import base64
import html
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..explain import (
    ATTACKS,
    MAP_METHODS,
    Arithmetic,
    Ascent,
    Explanation,
    LayerReader,
    arithmetic,
    class_logits,
    class_score,
    explain,
    spread_layers,
)
from ..explain.calls import per_channel
from ..recipes.arithmetic import draw, write
from ..recipes.inside import DEPTHS, GRADIENTS, PATCHES, clip_outliers, to_pictures, to_signed_pictures
from ..reporting.grids import color_heat
from .classifiers import Classifier
from .page import plain
from .pictures import as_url, overlay, resize_heat

PREDICTED = -1  # represents the predicted class in the list of classes
MAX_LAYERS = 12
MAX_FILTERS = 96  # filters on the page
NUM_IMAGES = 32  # generated scenes that the patches come from
WINDOWS = {"large": 4, "medium": 7, "small": 12}  # windows along the shorter side of the image
STEPS = 150
MAX_STEPS = 500
FRAME_SECONDS = 0.2  # time between two pictures of a class model
CSS = """
.shown {display: grid; gap: 14px; margin: 4px 0 12px}
.shown {grid-template-columns: repeat(auto-fill, minmax(min(150px, 44%), 1fr))}
.shown.small {grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 10px}
.shown.tiny {grid-template-columns: repeat(auto-fill, minmax(40px, 1fr)); gap: 6px}
.shown figure {margin: 0; min-width: 0}
.shown img {width: 100%; height: auto; border-radius: 4px; display: block; image-rendering: pixelated}
.shown figcaption {font-size: var(--text-sm); overflow-wrap: anywhere; margin-top: 4px}
.methods {display: grid; gap: 20px 28px; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr))}
.methods h4, .methods p {margin: 0 0 4px}
.methods section > p {font-size: var(--text-sm)}
.methods .shown {grid-template-columns: 1fr 1fr; gap: 8px}
.wide table {display: block; overflow-x: auto; width: 0 !important; min-width: 100%}
.wide td, .wide th {white-space: nowrap; overflow-wrap: normal; font-size: var(--text-sm)}
.wide td, .wide th {padding: 3px 7px !important; border-color: var(--border-color-primary) !important}
.wide td, .wide th {font-variant-numeric: tabular-nums}
.chart img {width: 100%; max-width: 820px; height: auto; background: white; border-radius: 6px}
"""


# ---------------------------------------------------------------------------------------------------------------------
# Methods


def run(classifier: Classifier, images: Any, method: str, target: int | None = None, **options: Any) -> Explanation:
    """Call `hf_dl.explain.explain` with the normalization of a classifier.

    Args:
        classifier: The model.
        images: Pixel values, or an iterable of batches.
        method: A name in `METHODS`.
        target: Class or channel. `PREDICTED` stands for the predicted class.
        **options: Options of the method.
    """
    mean, std = classifier.statistics
    target = None if target == PREDICTED else target
    return explain(classifier.model, images, method=method, target=target, image_mean=mean, image_std=std, **options)


def find_layers(classifier: Classifier) -> dict[str, int]:
    """Return the layers to choose from, in the order in which they run, with their numbers of channels."""
    blank = classifier.prepare(Image.new("RGB", (64, 64), "gray"))
    with torch.no_grad():
        return {
            layer: LayerReader(classifier.model, blank, layer).as_map(blank).shape[1]
            for layer in spread_layers(classifier.model, blank, MAX_LAYERS)
        }


def middle(layers: Sequence[str]) -> str:
    """Return the layer in the middle, whose patches are parts of the image."""
    return list(layers)[len(layers) // 2]


def check(classifier: Classifier) -> None:
    """Raise an error if the page does not work for a classifier."""
    layers = find_layers(classifier)
    blank = classifier.prepare(Image.new("RGB", (64, 64), "gray"))
    run(classifier, blank, "gradient")
    run(classifier, blank, "patches", 0, layer=middle(layers), k=1)


@torch.no_grad()
def predict(classifier: Classifier, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the logits of one image, (classes,)."""
    return class_logits(classifier.model, pixel_values)[0]


def enlarge(pixels: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """Convert pixels in [0, 1], (1, channels, height, width), to a picture of `size`, without smoothing."""
    return Image.fromarray(to_pictures(pixels)[0]).resize(size, Image.Resampling.NEAREST)


def find_filters(classifier: Classifier) -> list[Image.Image]:
    """Return the filters of the first convolution as small pictures. They share one scale."""
    blank = classifier.prepare(Image.new("RGB", (64, 64), "gray"))
    return [Image.fromarray(each) for each in to_pictures(run(classifier, blank, "filters").pictures)]


def find_patches(
    classifier: Classifier, layer: str, channel: int, images: Sequence[Image.Image]
) -> list[tuple[float, Image.Image]]:
    """Find the patches of images that activate a channel most.

    Args:
        classifier: The model.
        layer: Name of the layer.
        channel: Number of the channel, from 0.
        images: Images of one size.

    Returns:
        Activations and patches, largest first.

    Raises:
        ValueError: If the layer or the channel is unknown.
    """
    batches = (
        torch.cat([classifier.prepare(image) for image in images[i : i + 32]]) for i in range(0, len(images), 32)
    )
    found = run(classifier, batches, "patches", channel, layer=layer, k=PATCHES)
    patches = [Image.fromarray(each) for each in to_pictures(found.pictures)]
    return list(zip(found.output.values[0].tolist(), patches, strict=True))


@dataclass
class Evidence:
    """A map of evidence for a class.

    Attributes:
        method: A name in `MAP_METHODS`.
        label: Name of the class.
        heat: The map in color.
        overlay: The map over the image.
        signed: For gradients, the signed values of each color around gray.
        output: Output of the method.
        logits: Logits of the image, (classes,).
    """

    method: str
    label: str
    heat: Image.Image
    overlay: Image.Image
    signed: Image.Image | None
    output: Any
    logits: torch.Tensor


def find_evidence(
    classifier: Classifier, image: Image.Image, method: str, label: int = PREDICTED, **options: Any
) -> Evidence:
    """Map the evidence for a class in an image.

    Args:
        classifier: The model.
        image: An RGB image of any size.
        method: A name in `MAP_METHODS`.
        label: Index of the class. Defaults to the predicted class.
        **options: Options of the method.

    Raises:
        ValueError: If the method is unknown or does not fit the model, or the class is unknown.
    """
    if method not in MAP_METHODS:
        raise ValueError(f"method={method!r} is unknown. Choose one of: {', '.join(MAP_METHODS)}.")
    found = run(classifier, classifier.prepare(image), method, label, **options)
    maps, seen = found.maps.float().cpu().numpy(), classifier.crop(image)
    heat = resize_heat((clip_outliers(maps) if method in GRADIENTS else maps)[0], seen.size)
    signed = None
    if method in GRADIENTS:
        signed = Image.fromarray(to_signed_pictures(found.output.attributions)[0])
        signed = signed.resize(seen.size, Image.Resampling.NEAREST)
    return Evidence(
        method=method,
        label=classifier.names[int(found.logits[0].argmax()) if label == PREDICTED else label],
        heat=Image.fromarray(color_heat(heat)),
        overlay=overlay(seen, heat),
        signed=signed,
        output=found.output,
        logits=found.logits[0].detach(),
    )


def occlude(classifier: Classifier, image: Image.Image, label: int, window: str) -> Evidence:
    """Cover each part of an image; see `find_evidence`.

    Args:
        classifier: The model.
        image: An RGB image of any size.
        label: Index of the class, or `PREDICTED`.
        window: Size of the window, a key of `WINDOWS`.
    """
    side = min(classifier.prepare(image).shape[-2:])
    return find_evidence(classifier, image, "occlusion", label, patch=max(round(side / WINDOWS[window]), 1))


@dataclass
class Frame:
    """A picture on the way to the image of a class.

    Attributes:
        picture: The picture, enlarged.
        step: Finished steps.
        steps: Number of all steps.
        label: Name of the class.
        score: Logit of the class.
        top: Most likely classes of the picture, with probabilities.
    """

    picture: Image.Image
    step: int
    steps: int
    label: str
    score: float
    top: list[tuple[str, float]]


def climb(classifier: Classifier, image: Image.Image, label: int, steps: int) -> Iterator[Frame]:
    """Make an image with a large class logit, and yield the pictures on the way.

    Args:
        classifier: The model.
        image: Gives the size and the predicted class.
        label: Index of the class, or `PREDICTED`.
        steps: Number of steps.
    """
    pixel_values, size = classifier.prepare(image), classifier.crop(image).size
    number = int(predict(classifier, pixel_values).argmax()) if label == PREDICTED else label
    ascent, (mean, std) = Ascent(steps=steps), classifier.statistics
    classes = torch.tensor([number], device=pixel_values.device)
    frames = ascent.climb(class_score(classifier.model, classes), ascent.start(pixel_values), mean, std)
    shown = time.monotonic()
    for step, (pixels, _) in enumerate(frames, start=1):
        if step < steps and step > 1 and time.monotonic() < shown + FRAME_SECONDS:
            continue
        logits = predict(classifier, (pixels - per_channel(mean, pixels)) / per_channel(std, pixels))
        name, top = classifier.names[number], classifier.top(logits)
        yield Frame(enlarge(pixels, size), step, steps, name, logits[number].item(), top)
        shown = time.monotonic()


@dataclass
class Inversion:
    """An image with the same features in a layer: the layer, the picture, and its relative squared error."""

    layer: str
    picture: Image.Image
    error: float


def invert(classifier: Classifier, image: Image.Image, steps: int, layers: Sequence[str] = ()) -> Iterator[Inversion]:
    """Invert layers, from the first to the last.

    Args:
        classifier: The model.
        image: An RGB image of any size.
        steps: Number of steps per layer.
        layers: Names of layers. Defaults to `DEPTHS` layers at even distances.

    Raises:
        ValueError: If a layer is unknown.
    """
    pixel_values, size = classifier.prepare(image), classifier.crop(image).size
    for layer in list(layers) or spread_layers(classifier.model, pixel_values, DEPTHS):
        found = run(classifier, pixel_values, "inversion", layer=layer, steps=steps)
        yield Inversion(layer, enlarge(found.pictures, size), found.output.scores[0].item())


@dataclass
class Attack:
    """An adversarial example.

    Attributes:
        before: Most likely classes of the image, with probabilities.
        after: Most likely classes of the changed image.
        flipped: Whether the prediction changed.
        target: Name of the class to reach, or None for any other class.
        image: The image.
        change: The change of the pixels, around gray.
        changed: The changed image.
    """

    before: list[tuple[str, float]]
    after: list[tuple[str, float]]
    flipped: bool
    target: str | None
    image: Image.Image
    change: Image.Image
    changed: Image.Image


def attack(classifier: Classifier, image: Image.Image, method: str, epsilon: float, label: int = PREDICTED) -> Attack:
    """Change an image a little, so that its prediction changes.

    Args:
        classifier: The model.
        image: An RGB image of any size.
        method: A name in `ATTACKS`.
        epsilon: Largest change of a pixel, in steps of 1/255.
        label: Index of the class to reach. By default, and if it is the predicted class, any other class.

    Raises:
        ValueError: If the method is unknown, or epsilon is out of range.
    """
    if method not in ATTACKS:
        raise ValueError(f"method={method!r} is unknown. Choose one of: {', '.join(ATTACKS)}.")
    if not 0 <= epsilon <= 255:
        raise ValueError(f"epsilon={epsilon} is out of range. Choose a number from 0 to 255, in steps of 1/255.")
    pixel_values, size = classifier.prepare(image), classifier.crop(image).size
    logits = predict(classifier, pixel_values)
    target = None if label in (PREDICTED, int(logits.argmax())) else label
    found = run(classifier, pixel_values, method, target, epsilon=epsilon / 255)
    change = found.pictures - classifier.to_pixels(pixel_values)
    return Attack(
        before=classifier.top(logits),
        after=classifier.top(predict(classifier, found.output.pixel_values)),
        flipped=bool(found.output.after != found.output.before),
        target=None if target is None else classifier.names[target],
        image=classifier.show(pixel_values, size),
        change=enlarge((0.5 + 127 * change / max(epsilon, 1e-9)).clamp(0, 1), size),
        changed=enlarge(found.pictures, size),
    )


def count(classifier: Classifier, image: Image.Image) -> Arithmetic:
    """Compute the arithmetic of a classifier for the size of an image."""
    return arithmetic(classifier.model, classifier.prepare(image))


# ---------------------------------------------------------------------------------------------------------------------
# HTML


def show_pictures(pictures: Sequence[tuple[str, Image.Image]], size: str = "") -> str:
    """Show pictures in a grid, each with a caption of HTML; `size` is "", "small" or "tiny"."""
    figures = "".join(
        f"<figure><img src='{as_url(picture, 'PNG')}' alt=''>"
        f"{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"
        for caption, picture in pictures
    )
    return f"<div class='shown {size}'>{figures}</div>"


def show_progress(part: float, text: str) -> str:
    """Show a progress bar with a line of text."""
    return f"<div class='bar'><div style='width: {part:.1%}'></div></div><p>{html.escape(text)}</p>"


def show_filters(classifier: Classifier) -> str:
    """Show the filters of the first convolution, or a sentence if there are none."""
    try:
        filters = find_filters(classifier)
    except ValueError as error:
        return f"<p>{html.escape(str(error))}</p>"
    more = f"<p>The first {MAX_FILTERS} of {len(filters)} filters.</p>" if len(filters) > MAX_FILTERS else ""
    return show_pictures([("", each) for each in filters[:MAX_FILTERS]], "tiny") + more


def show_patches(patches: Sequence[tuple[float, Image.Image]]) -> str:
    """Show patches with their activations."""
    return show_pictures([(f"{value:.2f}", patch) for value, patch in patches], "small")


def show_gradients(classifier: Classifier, image: Image.Image, label: int) -> str:
    """Show all maps by gradients. A method that does not fit the model gets a sentence instead of pictures."""
    parts = []
    for method in GRADIENTS:
        try:
            found = find_evidence(classifier, image, method, label)
            shown = show_pictures([("over the image", found.overlay), ("by color", found.signed)])
        except ValueError as error:
            shown = f"<p>{html.escape(str(error))}</p>"
        head = f"<h4>{method.replace('_', ' ').capitalize()}</h4><p>{html.escape(MAP_METHODS[method].summary)}</p>"
        parts.append(f"<section>{head}{shown}</section>")
    return f"<div class='methods'>{''.join(parts)}</div>"


def summarize_occlusion(found: Evidence) -> str:
    """Summarize how much the logit falls, in Markdown."""
    drop, label = found.output.drops.max().item(), plain(found.label)
    if drop <= 0:
        return f"### No window lowers the logit of {label}"
    return f"### The most important window lowers the logit of {label} by {drop:.1f}"


def summarize_attack(found: Attack) -> str:
    """Summarize in Markdown whether the label flips."""
    (old, old_part), (new, new_part) = found.before[0], found.after[0]
    goal = f" The attack aims at {plain(found.target)}." if found.target else ""
    if found.flipped:
        return f"### Flipped: {plain(old)} ({old_part:.0%}) becomes {plain(new)} ({new_part:.0%})\n{goal}"
    return f"### Not flipped: {plain(old)} ({old_part:.0%}, now {new_part:.0%})\n{goal}"


def show_attack(found: Attack) -> str:
    """Show the image, the change and the changed image."""
    shown = {"image": found.image, "change, scaled to the full range": found.change, "changed image": found.changed}
    return show_pictures(list(shown.items()))


def show_inversions(image: Image.Image, found: Sequence[Inversion], prefix: str = "") -> str:
    """Show an image, and the inversions of its layers with their errors. The names are shown without the prefix."""
    inverted = [
        (f"{html.escape(each.layer.removeprefix(prefix))}<br>error {each.error:.3f}", each.picture) for each in found
    ]
    return show_pictures([("image", image), *inverted])


def show_arithmetic(result: Arithmetic, *, formulas: bool) -> tuple[str, str]:
    """Return the chart as HTML, and the tables in Markdown.

    Args:
        result: The arithmetic.
        formulas: Whether to add the formulas with the numbers put in.
    """
    with tempfile.TemporaryDirectory() as folder:
        chart = base64.b64encode(draw(Path(folder) / "chart.svg", result).read_bytes()).decode()
    image = f"<img src='data:image/svg+xml;base64,{chart}' alt='Memory and parameters of each layer'>"
    return f"<div class='chart'>{image}</div>", write(result, style="markdown", formulas=formulas)
