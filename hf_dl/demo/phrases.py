"""Phrases on a page: their masks in an image, and their cosines with the image, without the layout of the page."""

import functools
import html
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..data import captions
from ..data.captions import COLORS, SHAPES
from ..models.clip_features import encode_texts, unknown_words
from ..pipelines.phrase_matching import PhraseMatch, match, near_misses
from ..pipelines.phrase_segmentation import NOT_FOUND, PhraseSegmentationPipeline
from ..recipes.zero_shot_classifier import encode_images
from .checkpoints import describe_model
from .page import plain, show_scale
from .pictures import as_url, overlay
from .uploads import open_image

MAX_PHRASES = 20
VIEWS = ("masks", "probabilities")
EXAMPLE = "red cube"
FIRST_PHRASES = ("red cube", "blue sphere", "cylinder", "yellow cone")  # for uploaded images
CSS = """
.phrases {display: grid; gap: 14px; margin: 4px 0 12px}
.phrases {grid-template-columns: repeat(auto-fit, minmax(min(180px, 44%), 1fr))}
.phrases figure {margin: 0; min-width: 0; max-width: 300px}
.phrases img {width: 100%; height: auto; border-radius: 6px; display: block}
.phrases figcaption {font-size: var(--text-sm); overflow-wrap: anywhere; margin-top: 4px}
.phrases b {font-size: var(--text-md)}
.absent {opacity: 0.75}
.matches {width: 100%; border-collapse: collapse; table-layout: fixed; overflow-wrap: anywhere}
.matches th, .matches td {text-align: left; font-weight: normal; vertical-align: middle}
.matches th, .matches td {padding: 6px 8px 6px 0 !important; border: none !important}
.matches th {font-size: var(--text-sm); opacity: 0.75}
.matches, .matches tr {border: none !important}
.matches tbody tr {border-top: 1px solid var(--border-color-primary) !important}
.matches .number {text-align: right; white-space: nowrap; width: 4.5em; padding-right: 14px !important}
.matches .number {font-variant-numeric: tabular-nums}
.matches .share {width: 32%}
.matches .first td:first-child {font-weight: 600}
"""


@dataclass(frozen=True, eq=False)
class PhrasePicture:
    """An image on the page.

    Attributes:
        image: The image.
        phrases: Phrases to start with. Some of them are false of the image.
    """

    image: Image.Image
    phrases: tuple[str, ...] = FIRST_PHRASES


@dataclass(frozen=True)
class PhraseModel:
    """A model of phrases with the folder or Hub id that it was loaded from."""

    pipeline: PhraseSegmentationPipeline
    name: str

    @property
    def threshold(self) -> float:
        """Probability above which a pixel belongs to a mask, from the training."""
        return self.pipeline.model.config.threshold

    @property
    def temperature(self) -> float:
        """Temperature of the contrastive loss of CLIP."""
        return 1 / self.pipeline.model.clip.logit_scale.exp().item()


@dataclass(frozen=True)
class PhraseMap:
    """The pixels of a phrase.

    Attributes:
        phrase: The phrase.
        probability: Probability of each pixel of the image, float32 (height, width).
        unknown: Words of the phrase that the model does not know.
    """

    phrase: str
    probability: np.ndarray
    unknown: tuple[str, ...]

    @property
    def score(self) -> float:
        """The highest probability of a pixel."""
        return float(self.probability.max())

    def mask(self, threshold: float) -> np.ndarray:
        """Return the pixels whose probability is above the threshold, bool (height, width)."""
        return self.probability > threshold


@dataclass(frozen=True)
class ZeroShotMatch:
    """A phrase compared with an image.

    Attributes:
        phrase: The phrase.
        cosine: Cosine of the features of the image and the phrase.
        probability: Softmax over all phrases of the page, with the temperature of the model.
        near_misses: The comparison with near misses of the phrase, or None if it has too few.
        unknown: Words of the phrase that the model does not know.
    """

    phrase: str
    cosine: float
    probability: float
    near_misses: PhraseMatch | None
    unknown: tuple[str, ...]


@functools.lru_cache(maxsize=16)
def draw_scenes(seed: int, count: int = 8) -> tuple[PhrasePicture, ...]:
    """Draw scenes with one or two objects, like the training images of the small default model.

    Args:
        seed: Seed of the scenes.
        count: Number of scenes.
    """
    rows = captions.load("test", num_pairs=count, size=192, seed=seed, streaming=True)
    return tuple(PhrasePicture(row["image"], suggest_phrases(row["objects"])) for row in rows)


def suggest_phrases(objects: Sequence[dict[str, str]]) -> tuple[str, ...]:
    """Name the objects of a scene, and two things that are not in it.

    Args:
        objects: Objects with `color` and `shape`.

    Example:
        >>> suggest_phrases([{"color": "red", "shape": "cube"}])
        ('red cube', 'yellow cube', 'yellow sphere')
    """
    names = [f"{each['color']} {each['shape']}" for each in objects]
    colors, shapes = ({each[key] for each in objects} for key in ("color", "shape"))
    color = next(color for color in reversed(COLORS) if color not in colors)  # the first one is gray
    shape = next((shape for shape in SHAPES if shape not in shapes), SHAPES[0])
    return tuple(dict.fromkeys([*names, f"{color} {objects[0]['shape']}", f"{color} {shape}"]))


def open_picture(file: str) -> PhrasePicture:
    """Open an uploaded image; see `open_image`."""
    return PhrasePicture(open_image(file))


def split_lines(text: str) -> list[str]:
    """Split the phrases of the page, one per line. Empty lines are ignored."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def check_phrases(phrases: Sequence[str]) -> tuple[str, ...]:
    """Return phrases without repetitions and outer spaces.

    Raises:
        ValueError: If phrases are missing, one is empty, or there are more than `MAX_PHRASES`.
    """
    if not phrases:
        raise ValueError(f"The phrases are missing. Write at least one, such as {EXAMPLE!r}.")
    if len(phrases) > MAX_PHRASES:
        raise ValueError(f"There are {len(phrases):,} phrases. Write at most {MAX_PHRASES}.")
    if empty := [number for number, phrase in enumerate(phrases, start=1) if not phrase.strip()]:
        raise ValueError(f"Phrase {empty[0]} is empty. Write words such as {EXAMPLE!r}.")
    return tuple(dict.fromkeys(phrase.strip() for phrase in phrases))


def load_phrase_model(name: str) -> PhraseModel:
    """Load a model for evaluation, on the GPU if one is available.

    Args:
        name: A folder or a Hub id. Surrounding spaces are ignored.

    Raises:
        ValueError: If the model is missing, damaged, or of another kind.
    """
    name = name.strip()
    return PhraseModel(PhraseSegmentationPipeline.from_pretrained(name), name)


def check(model: PhraseModel) -> None:
    """Raise an error if a model does not fit the page."""
    image = Image.new("RGB", (64, 64), "gray")
    segment(model, image, (EXAMPLE,))
    compare(model, image, (EXAMPLE,))


def describe(model: PhraseModel) -> str:
    """Describe a model in one line of Markdown."""
    config = model.pipeline.model.config
    count = model.pipeline.model.num_parameters()
    return describe_model(model.name, f"decoder {config.decoder_type}", f"{count:,} parameters with CLIP")


def segment(model: PhraseModel, image: Image.Image, phrases: Sequence[str]) -> list[PhraseMap]:
    """Compute the probability of each pixel for each phrase.

    Args:
        model: The model.
        image: An RGB image.
        phrases: The phrases.

    Raises:
        ValueError: If a phrase is too long for the model.
    """
    tokenizer = model.pipeline.tokenizer
    found = model.pipeline(image, list(phrases))
    return [PhraseMap(each["label"], each["probability"], unknown_words(each["label"], tokenizer)) for each in found]


@torch.no_grad()
def compare(model: PhraseModel, image: Image.Image, phrases: Sequence[str]) -> list[ZeroShotMatch]:
    """Compare phrases with a whole image by the CLIP of the model.

    Args:
        model: The model.
        image: An RGB image.
        phrases: The phrases.

    Returns:
        One result per phrase, in the same order.
    """
    clip, tokenizer, processor = model.pipeline.model.clip, model.pipeline.tokenizer, model.pipeline.image_processor
    cosines = (encode_images(clip, [image], processor) @ encode_texts(clip, phrases, tokenizer).T)[0]
    probabilities = (cosines.double() / model.temperature).softmax(0)
    unknown = {phrase: unknown_words(phrase, tokenizer) for phrase in phrases}
    enough = [
        phrase
        for phrase in phrases
        if not unknown[phrase] and sum(not unknown_words(other, tokenizer) for other in near_misses(phrase)) >= 2
    ]
    matched = match(clip, processor, image, enough, tokenizer=tokenizer) if enough else []
    known = dict(zip(enough, matched, strict=True))
    return [
        ZeroShotMatch(phrase, cosine, probability, known.get(phrase), unknown[phrase])
        for phrase, cosine, probability in zip(phrases, cosines.tolist(), probabilities.tolist(), strict=True)
    ]


class Results:
    """The last results of the page, so that a new threshold needs no model call.

    Args:
        size: Number of images with their phrases to keep.
    """

    def __init__(self, size: int = 8):
        self._lock = threading.Lock()
        self._compute = functools.lru_cache(maxsize=size)(self._compute)

    def get(
        self, model: PhraseModel, picture: PhrasePicture, phrases: tuple[str, ...]
    ) -> tuple[list[PhraseMap], list[ZeroShotMatch]]:
        """Return the maps and the matches of phrases."""
        with self._lock:
            return self._compute(model, picture, phrases)

    def _compute(
        self, model: PhraseModel, picture: PhrasePicture, phrases: tuple[str, ...]
    ) -> tuple[list[PhraseMap], list[ZeroShotMatch]]:
        return segment(model, picture.image, phrases), compare(model, picture.image, phrases)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and tables


def draw_mask(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Keep the colors of a mask, draw its outline, and darken the rest of the image to gray.

    Args:
        image: An RGB image.
        mask: bool (height, width).
    """
    pixels = np.asarray(image, dtype=np.float32)
    rest = 0.4 * np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    drawn = np.where(mask[..., None], pixels, rest)
    drawn[outline(mask)] = (255, 200, 0)
    return Image.fromarray(drawn.round().astype(np.uint8))


def outline(mask: np.ndarray, width: int = 2) -> np.ndarray:
    """Return the pixels around a mask, bool (height, width).

    Args:
        mask: bool (height, width).
        width: Width of the line in pixels.

    Example:
        >>> outline(np.array([[False, True, False, False]]), width=1)
        array([[ True, False,  True, False]])
    """
    grown = mask
    for _ in range(width):
        padded = np.pad(grown, 1)
        grown = grown | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
    return grown & ~mask


def draw_view(image: Image.Image, found: PhraseMap, threshold: float, view: str = "masks") -> Image.Image:
    """Draw a phrase over its image.

    Args:
        image: The image.
        found: The pixels of the phrase.
        threshold: Probability above which a pixel belongs to the mask.
        view: One of `VIEWS`.
    """
    if view == "probabilities":
        return overlay(image, found.probability)
    return draw_mask(image, found.mask(threshold))


def summarize(maps: Sequence[PhraseMap], threshold: float) -> str:
    """Summarize in Markdown how many phrases have a mask."""
    count = sum(found.score > threshold for found in maps)
    if len(maps) == 1:
        text = f"### “{plain(maps[0].phrase)}” is {'in the image' if count else NOT_FOUND}"
    elif not count:
        text = f"### None of the {len(maps)} phrases is in the image"
    else:
        text = f"### {count} of {len(maps)} phrases {'is' if count == 1 else 'are'} in the image"
    if any(found.unknown for found in maps):
        text += "\nThe model does not know all words. Ignore the masks of phrases with unknown words."
    return text


def summarize_matches(matches: Sequence[ZeroShotMatch], temperature: float) -> str:
    """Summarize in Markdown which phrase has the highest probability.

    Args:
        matches: The phrases.
        temperature: Temperature of the softmax.
    """
    best = max(matches, key=lambda found: found.probability)
    text = f"### Most likely phrase: {plain(best.phrase)}, {best.probability:.0%}"
    return f"{text}\nCosine {best.cosine:.3f}. The probabilities are a softmax with temperature {temperature:.3g}."


def show_maps(image: Image.Image, maps: Sequence[PhraseMap], threshold: float, view: str = "masks") -> str:
    """Show one picture per phrase, as HTML.

    Args:
        image: The image.
        maps: The pixels of the phrases.
        threshold: Probability above which a pixel belongs to a mask.
        view: One of `VIEWS`.
    """
    figures = []
    for found in maps:
        mask, phrase = found.mask(threshold), html.escape(found.phrase)
        area = f"{mask.mean():.1%} of the image" if mask.any() else f"<i>{NOT_FOUND}</i>"
        lines = [f"<b>{phrase}</b>", area, f"highest probability {found.score:.0%}", *_list_unknown(found.unknown)]
        picture = as_url(draw_view(image, found, threshold, view))
        figures.append(
            f"<figure{'' if mask.any() else ' class=absent'}><img src='{picture}' alt='{phrase}'>"
            f"<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
        )
    scale = show_scale("probability 0%", "100%") if view == "probabilities" else ""
    return f"<div class='phrases'>{''.join(figures)}</div>{scale}"


def show_matches(matches: Sequence[ZeroShotMatch]) -> str:
    """Show probability, cosine and decision of each phrase, as an HTML table."""
    best = max(matches, key=lambda found: found.probability)
    rows = [
        f"<tr{' class=first' if found is best else ''}><td>{html.escape(found.phrase)}</td>"
        f"<td class='share'><div class='bar'><div style='width: {found.probability:.2%}'></div></div>"
        f"{found.probability:.1%}</td><td class='number'>{found.cosine:.3f}</td><td>{_decide(found)}</td></tr>"
        for found in matches
    ]
    return (
        "<table class='matches'><thead><tr><th>phrase</th><th class='share'>probability</th>"
        f"<th class='number'>cosine</th><th>decision</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _decide(found: ZeroShotMatch) -> str:
    if found.unknown:
        return "".join(_list_unknown(found.unknown))
    if found.near_misses is None:
        return "no near misses"
    margin, threshold = found.near_misses.margin, found.near_misses.threshold
    if found.near_misses.accepted:
        return f"accepted<br>margin {margin:.2f}, at least {threshold:.2f}"
    return f"<i>rejected</i><br>margin {margin:.2f}, below {threshold:.2f}"


def _list_unknown(words: Sequence[str]) -> list[str]:
    if not words:
        return []
    shown = ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")
    return [f"unknown word{'s' if len(words) > 1 else ''}: {html.escape(shown)}"]
