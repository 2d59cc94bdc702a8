"""Does a phrase match an image? Scores of any CLIP or SigLIP model that can also say that no phrase matches.

The softmax over phrases always has a winner, even if no phrase is true of the image. And a cosine alone says little:
its scale differs between models. `match` therefore compares each phrase with near misses of itself, such as "blue
cube" and "red sphere" for "red cube":

    margin         (cosine of the phrase - mean cosine of its near misses) / their standard deviation
    probability    softmax over the phrase and its near misses, with the temperature of the model.
                   SigLIP: the sigmoid of the model, which needs no near misses.
    accepted       whether the margin reaches a threshold

`calibrate` chooses the threshold for a model from phrases with known answers. `mismatch_auroc` measures how well a
score separates true phrases from each kind of wrong phrase. Wrong phrases that share a word with the image are hard.

    results = match(model, processor, image, ["a red cube", "a blue cone"])
    print([result.phrase for result in results if result.accepted] or "not in the image")
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from ..models.clip_features import as_features, encode_texts, unknown_words
from ..models.image_input import open_image, to_rgb

THRESHOLD = 1.3  # of the margin, for models whose config has no `match_threshold`
MAX_NEGATIVES = 64  # near misses per phrase
MAX_CHARACTERS = 1000  # of a phrase
GROUPS = (  # a near miss replaces a word by another word of its group
    (
        "red", "green", "blue", "yellow", "purple", "cyan", "gray", "brown", "orange", "pink", "black", "white",
    ),
    ("sphere", "cube", "cylinder", "cone"),
    ("circle", "square", "triangle", "star", "ring", "cross"),
    ("dog", "cat", "bird", "horse", "cow", "sheep", "elephant", "bear", "zebra", "giraffe", "deer", "monkey", "frog"),
    ("car", "bus", "truck", "train", "boat", "ship", "airplane", "bicycle", "motorcycle"),
    ("man", "woman", "boy", "girl"),
    ("chair", "couch", "table", "bed", "lamp", "clock", "book", "cup", "bottle", "plate"),
    ("apple", "banana", "pizza", "cake", "sandwich", "carrot"),
    ("tree", "flower", "mountain", "beach", "street", "building", "bridge"),
)  # fmt: skip
KINDS = ("wrong_color", "wrong_shape", "both", "unrelated")  # of phrases that do not match


@dataclass(frozen=True)
class PhraseMatch:
    """How well a phrase matches an image.

    Attributes:
        phrase: The phrase.
        cosine: Cosine of the features of image and phrase, in [-1, 1].
        margin: Distance of the cosine from the mean of the near misses, in their standard deviations.
        probability: Probability of the phrase against its near misses. Of SigLIP, the probability of a match.
        threshold: Smallest margin of an accepted phrase.
        accepted: Whether the margin reaches the threshold and the tokenizer knows all words of the phrase.
        negatives: The near misses.
        unknown: Words that the tokenizer does not know.
    """

    phrase: str
    cosine: float
    margin: float
    probability: float
    threshold: float
    accepted: bool
    negatives: tuple[str, ...]
    unknown: tuple[str, ...] = ()


@torch.no_grad()
def match(
    model: PreTrainedModel,
    processor: Any,
    image: Image.Image | str | Path,
    phrases: Sequence[str],
    *,
    negatives: str | Sequence[str] = "auto",
    threshold: float | None = None,
    tokenizer: Any = None,
) -> list[PhraseMatch]:
    """Score phrases for one image, and decide for each phrase whether it is true of the image.

    Args:
        model: A CLIP or SigLIP model in evaluation mode.
        processor: Its processor, or its image processor.
        image: The image, or its file.
        phrases: The phrases.
        negatives: "auto" compares each phrase with its `near_misses`. Otherwise, at least two phrases to compare all
            phrases with, which are false of the image.
        threshold: Smallest margin of an accepted phrase, see `calibrate`. Defaults to `match_threshold` in the config
            of the model, which scripts/train_clip.py chooses on validation images, and else to `THRESHOLD`.
        tokenizer: Its tokenizer. Defaults to the tokenizer of the processor.

    Returns:
        One result per phrase, in the same order.

    Raises:
        ValueError: If `phrases` or a phrase is empty, or a phrase is too long. If `negatives` is unknown or has fewer
            than two phrases. If a phrase has no near misses: give `negatives` then.
    """
    phrases = [phrases] if isinstance(phrases, str) else list(phrases)
    if not phrases or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
        raise ValueError(f"phrases={phrases!r} must be at least one text, and none may be empty.")
    longest = max(map(len, phrases))
    if longest > MAX_CHARACTERS:
        raise ValueError(f"A phrase has {longest} characters. The limit is {MAX_CHARACTERS}.")
    if isinstance(negatives, str) and negatives != "auto":
        raise ValueError(f"negatives={negatives!r} is unknown. Use 'auto', or a list of at least two phrases.")
    if not isinstance(negatives, str) and len(set(negatives)) < 2:
        raise ValueError(f"negatives={list(negatives)!r} must have at least two different phrases, or be 'auto'.")
    if threshold is None:
        threshold = getattr(model.config, "match_threshold", THRESHOLD)
    tokenizer = tokenizer or processor.tokenizer
    others: dict[str, tuple[str, ...]] = {}
    for phrase in phrases:
        found = near_misses(phrase) if negatives == "auto" else dict.fromkeys(negatives)
        # A word that the tokenizer does not know gives the same features as any other such word.
        usable = (each for each in found if each != phrase and not unknown_words(each, tokenizer))
        known = tuple(itertools.islice(usable, MAX_NEGATIVES))
        if len(known) < 2:
            raise ValueError(
                f"phrase={phrase!r} has fewer than two near misses whose words the tokenizer knows. Set negatives to "
                "phrases that are false of the image."
            )
        others[phrase] = known

    texts = list(dict.fromkeys([*phrases, *(text for known in others.values() for text in known)]))
    features = _encode_image(model, processor, image) @ encode_texts(model, texts, tokenizer).double().T
    cosines = dict(zip(texts, features[0].tolist(), strict=True))
    results = []
    for phrase in phrases:
        rest = torch.tensor([cosines[text] for text in others[phrase]], dtype=torch.float64)
        margin = standard_margin(torch.tensor(cosines[phrase], dtype=torch.float64), rest).item()
        unknown = unknown_words(phrase, tokenizer)
        results.append(
            PhraseMatch(
                phrase=phrase,
                cosine=cosines[phrase],
                margin=margin,
                probability=_probability(model, cosines[phrase], rest),
                threshold=threshold,
                accepted=margin >= threshold and not unknown,
                negatives=others[phrase],
                unknown=unknown,
            )
        )
    return results


def near_misses(phrase: str) -> list[str]:
    """Write phrases that differ from a phrase in one word, such as another color or another shape.

    Args:
        phrase: The phrase. Its words are compared with `GROUPS`, in the singular or with the plural "s".

    Returns:
        The phrases, without duplicates: all replacements of the first word of a group, then of the second one, ...
        A phrase without a word of `GROUPS` has none.

    Example:
        >>> near_misses("a small cube")
        ['a small sphere', 'a small cylinder', 'a small cone']
        >>> near_misses("a red apple")[7], near_misses("two dogs")[:2]
        ('an orange apple', ['two cats', 'two birds'])
    """
    words = re.findall(r"\w+|\W+", phrase)  # words, and the characters between them
    found: dict[str, None] = {}
    for place, word in enumerate(words):
        group, plural = _find_group(word.lower())
        for other in group:
            changed = [*words[:place], other + plural, *words[place + 1 :]]
            if place >= 2 and words[place - 2].lower() in ("a", "an"):
                changed[place - 2] = "an" if other[0] in "aeiou" else "a"
            found["".join(changed)] = None
    found.pop(phrase, None)
    return list(found)


def _find_group(word: str) -> tuple[tuple[str, ...], str]:
    """Return the other words of the group of a word, and "s" if the word is a plural."""
    for singular, plural in ((word, ""), (word.removesuffix("s"), "s")):
        for group in GROUPS:
            if singular in group and singular + plural == word:
                return tuple(other for other in group if other != singular), plural
    return (), ""


def standard_margin(cosines: Tensor, negatives: Tensor) -> Tensor:
    """Compute the distance of cosines from the mean of their near misses, in standard deviations.

    Args:
        cosines: Cosines of phrases, (...,).
        negatives: Cosines of the near misses of each phrase, (..., near misses), at least two.

    Returns:
        The margins, (...,).

    Example:
        >>> standard_margin(torch.tensor(4.0), torch.tensor([0.0, 2.0]))
        tensor(3.)
    """
    return (cosines - negatives.mean(-1)) / negatives.std(-1, correction=0).clamp(min=1e-6)


def _probability(model: PreTrainedModel, cosine: float, negatives: Tensor) -> float:
    scale = model.logit_scale.detach().double().exp().cpu()
    if (bias := getattr(model, "logit_bias", None)) is not None:
        return (scale * cosine + bias.detach().double().cpu()).sigmoid().item()
    return (scale * torch.cat([negatives.new_tensor([cosine]), negatives])).softmax(0)[0].item()


def _encode_image(model: PreTrainedModel, processor: Any, image: Image.Image | str | Path) -> Tensor:
    image = to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
    process = getattr(processor, "image_processor", processor)
    pixels = process(images=image, return_tensors="pt")["pixel_values"]
    output = model.get_image_features(pixel_values=pixels.to(model.device, model.dtype))
    return torch.nn.functional.normalize(as_features(output).double().cpu())


def calibrate(
    scores: Tensor, matches: Tensor, *, kinds: Sequence[str] | None = None, false_acceptance: float = 0.05
) -> float:
    """Choose the smallest threshold that accepts few phrases that do not match.

    Args:
        scores: A score per image and phrase, such as the margin, (examples,).
        matches: Whether each phrase is true of its image, bool (examples,).
        kinds: The kind of each example, such as `mismatch_kind`. The fraction then holds for each kind of wrong
            phrase, so the hardest kind sets the threshold. Defaults to one fraction of all wrong phrases. If most of
            them are easy to reject, that threshold accepts many phrases of a hard kind.
        false_acceptance: Largest fraction of the wrong phrases that may be accepted.

    Returns:
        The threshold: a phrase is accepted if its score is at least this value.

    Raises:
        ValueError: If the shapes or numbers differ, all phrases match, or `false_acceptance` is not in [0, 1).

    Example:
        >>> scores, matches = torch.tensor([0.9, 0.8, 0.3, 0.2, 0.1]), torch.tensor([True, True, False, False, False])
        >>> threshold = calibrate(scores, matches, false_acceptance=0.4)
        >>> (scores >= threshold).tolist()
        [True, True, True, False, False]
        >>> kinds = ["match", "match", "wrong_shape", "both", "both"]
        >>> (scores >= calibrate(scores, matches, kinds=kinds, false_acceptance=0.4)).tolist()
        [True, True, False, False, False]
    """
    if scores.shape != matches.shape or scores.ndim != 1:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)} and matches {tuple(matches.shape)}. Expected (examples,) twice."
        )
    if not 0 <= false_acceptance < 1:
        raise ValueError(f"false_acceptance={false_acceptance} must be at least 0 and below 1, such as 0.05.")
    names = ["wrong"] * len(scores) if kinds is None else list(kinds)
    if len(names) != len(scores):
        raise ValueError(f"kinds has {len(names)} entries. Expected {len(scores)}, one per score.")
    groups: dict[str, list[int]] = {}
    for place in (~matches.bool()).nonzero().flatten().tolist():
        groups.setdefault(names[place], []).append(place)
    if not groups:
        raise ValueError("matches has no wrong phrases. Add phrases that do not match, such as near misses.")
    # All scores above this one are accepted, so it is the highest one of each kind that must be rejected.
    rejected = max(
        scores[places].sort(descending=True).values[int(false_acceptance * len(places))] for places in groups.values()
    )
    above = scores[scores > rejected]
    return ((rejected + above.min()) / 2 if len(above) else torch.nextafter(rejected, rejected + 1)).item()


def mismatch_auroc(scores: Tensor, kinds: Sequence[str]) -> dict[str, float]:
    """Compute how well a score separates matching phrases from each kind of wrong phrase.

    The area under the ROC curve is the probability that a matching phrase has a higher score than a wrong one. Ties
    count one half. 1/2 is chance.

    Args:
        scores: A score per image and phrase, such as the cosine or the margin, (examples,).
        kinds: "match", or the kind of the mismatch, such as one of `KINDS`, per example.

    Returns:
        The area for each kind of mismatch that occurs, and for `all` wrong phrases.

    Raises:
        ValueError: If the number of kinds is wrong, a score is NaN, or matching or wrong phrases are missing.

    Example:
        >>> scores = torch.tensor([0.9, 0.5, 0.6, 0.1])
        >>> mismatch_auroc(scores, ["match", "match", "wrong_shape", "both"])
        {'wrong_shape': 0.5, 'both': 1.0, 'all': 0.75}
    """
    kinds = list(kinds)
    if scores.shape != (len(kinds),):
        raise ValueError(f"scores has shape {tuple(scores.shape)}. Expected ({len(kinds)},), one per kind.")
    if scores.isnan().any():
        raise ValueError("scores has NaN values, which have no order. Check the features of the model.")
    groups = {kind: [] for kind in dict.fromkeys(kinds)}
    for place, kind in enumerate(kinds):
        groups[kind].append(place)
    if "match" not in groups or len(groups) < 2:
        raise ValueError(f"kinds has only {', '.join(groups) or 'no entries'}. Expected 'match' and another kind.")
    right = scores[groups.pop("match")].double()
    groups["all"] = [place for places in groups.values() for place in places]
    areas = {}
    for kind, places in groups.items():
        wrong = scores[places].double().sort().values
        below, up_to = (torch.searchsorted(wrong, right, right=side) for side in (False, True))
        areas[kind] = ((below + up_to).double().mean() / (2 * len(wrong))).item()
    return areas


def mismatch_kind(color: str | None, shape: str | None, objects: Sequence[dict[str, Any]]) -> str:
    """Return how a phrase about a color and a shape differs from an image with known objects.

    Args:
        color: Color in the phrase, or None.
        shape: Shape in the phrase, or None. A phrase with neither is unrelated.
        objects: Objects of the image with `color` and `shape`.

    Returns:
        "match", or a value of `KINDS`. If both words occur on different objects only, the color is wrong.

    Example:
        >>> [mismatch_kind(c, s, [{"color": "red", "shape": "cube"}]) for c, s in (("red", "cone"), ("blue", "cone"))]
        ['wrong_shape', 'both']
    """
    if color is None and shape is None:
        return "unrelated"
    same = [(color in (None, item["color"]), shape in (None, item["shape"])) for item in objects]
    if (True, True) in same:
        return "match"
    if any(right_shape for _, right_shape in same):
        return "wrong_color"
    return "wrong_shape" if any(right_color for right_color, _ in same) else "both"
