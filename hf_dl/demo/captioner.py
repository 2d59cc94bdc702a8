"""Captions on a page: beams, an attention map per word, and the objects of the scene, without the layout."""

import functools
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..data import scenes
from ..data.scene_captions import parse_caption
from ..metrics.caption_objects import ATTRIBUTES, match_objects, relation_holds
from ..models.caption_decoder import ATTENTIONS
from ..models.caption_processor import ImageCaptionerProcessor
from ..models.image_captioner import ImageCaptionerConfig, ImageCaptionerForConditionalGeneration, word_maps
from ..pipelines.model_loading import load_config, one_line
from .checkpoints import describe_model
from .page import plain, show_scale
from .pictures import as_url, overlay, resize_heat
from .uploads import open_image

MAX_BEAMS = 10
BEAMS = 3
MAP_SIDE = 168  # longer side, in pixels, of the picture of a word
SCENE_SIDE = 192  # the model sees 64 pixels; larger scenes look better on the page
DIRECTIONS = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}
CSS = """
.words {display: grid; gap: 10px; margin: 4px 0 12px}
.words {grid-template-columns: repeat(auto-fill, minmax(88px, 1fr))}
.words figure {margin: 0; min-width: 0}
.words img {width: 100%; height: auto; border-radius: 4px; display: block}
.words figcaption {font-size: var(--text-sm); line-height: 1.25; margin-top: 3px; overflow-wrap: anywhere}
.words figcaption b {font-size: var(--text-md)}
.said {width: 100%; max-width: 640px; border-collapse: collapse; overflow-wrap: anywhere}
.said th, .said td {text-align: left; font-weight: normal; vertical-align: top}
.said th, .said td {padding: 5px 14px 5px 0 !important; border: none !important}
.said th {font-size: var(--text-sm); opacity: 0.75}
.said, .said tr {border: none !important}
.said tbody tr {border-top: 1px solid var(--border-color-primary) !important}
.said .right {color: #047857}
.said .wrong {color: #be123c; text-decoration: line-through}
.dark .said .right {color: #34d399}
.dark .said .wrong {color: #fb7185}
#beams label span {overflow-wrap: anywhere; white-space: normal}
"""


@dataclass(frozen=True, eq=False)
class Scene:
    """An image on the page.

    Attributes:
        image: The image.
        objects: The objects of a generated scene, as in `hf_dl.data.scenes`. None for an uploaded image.
    """

    image: Image.Image
    objects: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Captioner:
    """A captioner with its processor, and the folder or Hub id that it was loaded from."""

    model: ImageCaptionerForConditionalGeneration
    processor: ImageCaptionerProcessor
    name: str


@dataclass(frozen=True)
class Beam:
    """A caption that the search found.

    Attributes:
        text: The caption.
        score: Log-probability divided by the number of words, including the end.
        log_probability: Natural logarithm of the probability of the caption.
        words: The words and punctuation marks, without the end.
        probabilities: The probability of each word, given the words before it.
        maps: Attention per word in [0, 1], float32 (words, height, width). None for a model without attention.
    """

    text: str
    score: float
    log_probability: float
    words: tuple[str, ...]
    probabilities: tuple[float, ...]
    maps: np.ndarray | None


@functools.lru_cache(maxsize=16)
def draw_scenes(seed: int, count: int = 8) -> tuple[Scene, ...]:
    """Draw plain scenes with two to four objects, like the training images of the default model.

    Args:
        seed: Seed of the scenes.
        count: Number of scenes.
    """
    rows = scenes.load("test", size=SCENE_SIDE, num_scenes=count, seed=seed, streaming=True)
    return tuple(Scene(row["image"], tuple(row["objects"])) for row in rows)


def open_scene(file: str) -> Scene:
    """Open an uploaded image; see `open_image`."""
    return Scene(open_image(file))


# ---------------------------------------------------------------------------------------------------------------------
# Model and search


def load_captioner(name: str) -> Captioner:
    """Load a captioner for evaluation, on the GPU if one is available. Code in the repository is not run.

    Args:
        name: A folder or a Hub id. Surrounding spaces are ignored.

    Raises:
        ValueError: If the model is missing, damaged, or of another kind.
    """
    name = name.strip()
    config = load_config(name, [ImageCaptionerConfig.model_type])
    try:
        model, info = ImageCaptionerForConditionalGeneration.from_pretrained(
            name, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        processor = ImageCaptionerProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each library reports damaged files with its own type of error
        raise ValueError(f"The model {name!r} cannot be loaded ({one_line(error)}).") from error
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ValueError(
            f"The model {name!r} lacks {len(wrong)} tensors, or they have the wrong shape. Train and save it again."
        )
    if len(processor.tokenizer) != config.vocab_size:
        raise ValueError(
            f"The model {name!r} has {config.vocab_size} words, but its tokenizer has {len(processor.tokenizer)}. "
            "Use the tokenizer that was saved with the model."
        )
    return Captioner(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor, name)


def check(captioner: Captioner) -> None:
    """Raise an error if a model does not work on this page."""
    search(captioner, Image.new("RGB", (32, 32), "gray"), 1)


def describe(captioner: Captioner) -> str:
    """Describe a captioner in one line of Markdown."""
    config, count = captioner.model.config, captioner.model.num_parameters()
    kind = config.conditioning.replace("_", " ")
    return describe_model(captioner.name, kind, f"{config.vocab_size} words", f"{count:,} parameters")


@torch.no_grad()
def search(captioner: Captioner, image: Image.Image, num_beams: int = BEAMS) -> list[Beam]:
    """Search for the most probable captions of an image.

    Args:
        captioner: The model.
        image: An RGB image.
        num_beams: Number of captions to keep and return, from 1 to `MAX_BEAMS`.

    Returns:
        The captions, best first.

    Raises:
        ValueError: If `num_beams` is out of range.
    """
    if not 1 <= num_beams <= MAX_BEAMS:
        raise ValueError(f"num_beams={num_beams} is out of range. Choose a number from 1 to {MAX_BEAMS}.")
    model, tokenizer, config = captioner.model, captioner.processor.tokenizer, captioner.model.config
    pixel_values = captioner.processor(images=[image])["pixel_values"].to(model.device)
    found = model.beam_search(pixel_values, num_beams=num_beams, num_return_sequences=num_beams)
    kept = [row for row, length in enumerate(found.lengths[0].tolist()) if length]  # few words give few captions
    sequences, lengths, scores = (values[0, kept] for values in (found.sequences, found.lengths, found.scores))
    start = F.pad(sequences[:, :-1], (1, 0), value=config.decoder_start_token_id)
    attends = config.conditioning in ATTENTIONS
    output = model(pixel_values, start, output_attentions=attends)
    log_probabilities = output.logits.log_softmax(dim=-1).gather(2, sequences[..., None])[..., 0]
    beams = []
    for row, length in enumerate(lengths.tolist()):
        ids = sequences[row, :length].tolist()
        values = log_probabilities[row, :length].tolist()
        said = length - (ids[-1] == config.eos_token_id)  # the longest captions have no end
        maps = None
        if attends:
            size = (config.image_size,) * 2
            cells = output.cross_attentions[0][row, :, :said].cpu()
            maps = word_maps(cells, size)[0]
            maps = (maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)).numpy()
        beams.append(
            Beam(
                text=tokenizer.decode(ids, skip_special_tokens=True),
                score=scores[row].item(),
                log_probability=sum(values),
                words=tuple(tokenizer.convert_ids_to_tokens(ids[:said])),
                probabilities=tuple(np.exp(values[:said]).tolist()),
                maps=maps,
            )
        )
    return beams


# ---------------------------------------------------------------------------------------------------------------------
# The caption and the scene


@dataclass(frozen=True)
class Comparison:
    """The objects of a caption, compared with a generated scene.

    Attributes:
        pairs: The named attributes of each object of the caption, and the object of the scene that fits best. It is
            None if the caption has more objects than the scene.
        missing: Objects of the scene without an object of the caption that is right in all named attributes.
        relation: The relation that the caption names, in words, or an empty string.
        holds: Whether this relation is true.
    """

    pairs: tuple[tuple[Mapping[str, str], Mapping[str, Any] | None], ...]
    missing: tuple[Mapping[str, Any], ...]
    relation: str
    holds: bool

    @property
    def found(self) -> int:
        """Number of objects of the caption that are right in all named attributes."""
        return sum(_is_right(said, truth) for said, truth in self.pairs)

    @property
    def hallucinated(self) -> int:
        """Number of objects of the caption that are not in the scene."""
        return len(self.pairs) - self.found

    def count(self, attribute: str) -> tuple[int, int]:
        """Return how many values of an attribute are right, and how many the caption names."""
        named = [(said[attribute], truth) for said, truth in self.pairs if attribute in said]
        return sum(truth is not None and truth[attribute] == value for value, truth in named), len(named)


def _is_right(said: Mapping[str, str], truth: Mapping[str, Any] | None) -> bool:
    return truth is not None and all(truth[name] == value for name, value in said.items())


def compare(text: str, objects: Sequence[Mapping[str, Any]]) -> Comparison:
    """Compare the objects and the relation of a caption with a scene, as `hf_dl.metrics.caption_objects` does.

    Args:
        text: The caption.
        objects: The objects of the scene.
    """
    parsed = parse_caption(text)
    partner = dict(match_objects(parsed.objects, objects))
    pairs = tuple(
        (said, objects[partner[place]] if place in partner else None) for place, said in enumerate(parsed.objects)
    )
    right = {partner[place] for place, (said, truth) in enumerate(pairs) if _is_right(said, truth)}
    missing = tuple(each for place, each in enumerate(objects) if place not in right)
    if parsed.relation is None:
        return Comparison(pairs, missing, "", True)
    first, direction, second = parsed.relation
    words = f"{name_object(parsed.objects[first])} {DIRECTIONS[direction]} {name_object(parsed.objects[second])}"
    return Comparison(pairs, missing, words, relation_holds(parsed.relation, parsed.objects, objects))


def name_object(item: Mapping[str, Any]) -> str:
    """Name an object by its attributes, such as "small red metal cube"."""
    return " ".join(item[name] for name in ATTRIBUTES if name in item)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and tables


def summarize(scene: Scene, beam: Beam) -> str:
    """Summarize a caption in Markdown, and compare it with a generated scene."""
    text = f"### {plain(beam.text) or 'An empty caption'}"
    if scene.objects is None:
        return text
    found, total = compare(beam.text, scene.objects), len(scene.objects)
    facts = [f"Found {found.found} of {total} objects, hallucinated {found.hallucinated}."]
    for name in ("color", "shape"):
        right, named = found.count(name)
        if named:
            facts.append(f"Right {name}s: {right} of {named}.")
    return f"{text}\n{' '.join(facts)}"


def show_beams(beams: Sequence[Beam]) -> list[tuple[str, int]]:
    """Return the captions with their scores, as choices of a `gr.Radio`."""
    return [(f"{beam.text} ({beam.score:.3f})", place) for place, beam in enumerate(beams)]


def draw_word(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Draw the attention of a word over the image.

    Args:
        image: The image.
        heat: The map, (height, width) in [0, 1]. It covers the whole image.
    """
    small = image.copy()
    small.thumbnail((MAP_SIDE, MAP_SIDE))
    return overlay(small, resize_heat(heat, small.size))


def show_words(scene: Scene, beam: Beam) -> str:
    """Show the words of a caption one after the other, each with its probability and its attention, as HTML."""
    if not beam.words:
        return "<p>The caption has no words.</p>"
    figures = []
    maps = [None] * len(beam.words) if beam.maps is None else beam.maps
    for word, probability, heat in zip(beam.words, beam.probabilities, maps, strict=True):
        shown = html.escape(word)
        picture = "" if heat is None else f"<img src='{as_url(draw_word(scene.image, heat))}' alt='{shown}'>"
        figures.append(f"<figure>{picture}<figcaption><b>{shown}</b><br>{probability:.0%}</figcaption></figure>")
    scale = show_scale("no attention", "most attention of the word")
    note = scale if beam.maps is not None else "<p>This model has no attention, so the page cannot show maps.</p>"
    return f"<div class='words'>{''.join(figures)}</div>{note}"


def show_truth(scene: Scene, beam: Beam) -> str:
    """Compare the objects of a caption with the objects of its scene, as an HTML table. Empty for uploaded images."""
    if scene.objects is None:
        return ""
    found, rows = compare(beam.text, scene.objects), []
    for said, truth in found.pairs:
        words = " ".join(
            f"<span class='{'right' if truth is not None and truth[name] == said[name] else 'wrong'}'>"
            f"{html.escape(said[name])}</span>"
            for name in ATTRIBUTES
            if name in said
        )
        verdict = "right" if _is_right(said, truth) else "not in the scene"
        rows.append((words, "none left" if truth is None else name_object(truth), verdict))
    matched = [truth for _, truth in found.pairs if truth is not None]
    rows += [
        ("—", name_object(each), "not mentioned")
        for each in found.missing
        if all(each is not truth for truth in matched)
    ]
    if found.relation:
        words = f"<span class='{'right' if found.holds else 'wrong'}'>{html.escape(found.relation)}</span>"
        rows.append((words, "", "true" if found.holds else "false"))
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        "<table class='said'><thead><tr><th>the caption says</th><th>closest object</th><th></th></tr></thead>"
        f"<tbody>{lines}</tbody></table>"
    )
