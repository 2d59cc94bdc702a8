"""The subsets of PhraseCut that a phrase belongs to, and phrases that are false of an image."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence

KINDS = ("name", "attribute", "relation", "verbose", "negative")

_SUBSETS = {"name": "p_name", "attribute": "p_att+", "relation": "p_rel+", "verbose": "p_verbose"}
_RANKS = {"c20": (0, 20), "c21-100": (20, 100), "c101-500": (100, 500), "c100": (0, 100), "c500": (0, 500)}
_ATTEMPTS = 50  # draws per false phrase
# words that say nothing about the objects of an image
_LITTLE = frozenset("a an and at behind by front in is near next of on over the to under with".split())
_IRREGULAR = {"leaves": "leaf", "knives": "knife", "shelves": "shelf", "feet": "foot", "teeth": "tooth"}
_PEOPLE = frozenset(  # a man is a person, so "person" is true of an image with a man
    "person people man men woman women boy girl child children kid guy lady baby player adult human skier surfer"
    " snowboarder skateboarder batter catcher umpire".split()
)


def name_subsets(
    kind: str, instances: int, attributes: Sequence[str], relations: Sequence, *, rank: int | None = None
) -> list[str]:
    """Return the names of the subsets of PhraseCut that a phrase belongs to.

    Args:
        kind: One of `KINDS`.
        instances: Number of objects that the phrase is true of.
        attributes: Attributes of the phrase.
        relations: Relations of the phrase.
        rank: Place of the category among all categories, from 0 for the most frequent one. None if it is unknown.

    Returns:
        The kind ("p_name", "p_att+", "p_rel+" or "p_verbose"), "p_att" and "p_rel" for phrases with an attribute or a
        relation, and "i_single", "i_multi" and "i_many" (five and more). With a rank also "c20", "c21-100",
        "c101-500", "c100", "c500" and "c500+". Negative phrases are in no subset. The metric adds subsets by size.

    Example:
        >>> name_subsets("attribute", 2, ["red"], [])
        ['p_att+', 'p_att', 'i_multi']
    """
    if kind not in _SUBSETS:
        return []
    holds = {
        _SUBSETS[kind]: True,
        "p_att": bool(attributes),
        "p_rel": bool(relations),
        "i_single": instances == 1,
        "i_multi": instances > 1,
        "i_many": instances >= 5,
    }
    if rank is not None:
        holds |= {name: low <= rank < high for name, (low, high) in _RANKS.items()} | {"c500+": rank >= 500}
    return [name for name, holds_here in holds.items() if holds_here]


def count_negatives(positives: int, share: float, rng: random.Random) -> int:
    """Return the number of negative phrases of an image. Its mean gives them a share of all phrases."""
    expected = positives * share / (1 - share)
    return int(expected) + (rng.random() < expected % 1)


def fold_words(text: str) -> set[str]:
    """Return the words of a text in lower case, without words such as "of", and each also as a possible singular.

    Two texts may be about the same objects if they share a word. All words for people become "person".

    Example:
        >>> sorted(fold_words("The dishes of two women"))
        ['dish', 'dishe', 'dishes', 'person', 'two']
    """
    return {form for word in re.findall(r"[^\W_]+", text.lower()) if word not in _LITTLE for form in _forms(word)}


def _forms(word: str) -> set[str]:
    forms = {_IRREGULAR.get(word, word)}
    for end, singular in (("s", ""), ("es", ""), ("ies", "y")):
        if word.endswith(end) and len(word) > len(end):
            forms.add(word.removesuffix(end) + singular)
    return {"person"} if forms & _PEOPLE else forms


def draw_false_phrases(
    count: int, pool: Sequence[tuple[str, str]], known: Iterable[str], rng: random.Random
) -> list[str]:
    """Draw phrases that share no name with the texts that are known to be true of an image.

    Args:
        count: Number of phrases. There are fewer if the pool has too few.
        pool: Pairs of a phrase and the name in it, such as ("red car", "car").
        known: Texts about the image: its phrases, and the names of its objects.
        rng: Random number generator.

    Example:
        >>> pool = [("red car", "car"), ("cars", "cars"), ("old man", "man"), ("blue sky", "sky")]
        >>> draw_false_phrases(3, pool, ["a car", "two women"], random.Random(0))
        ['blue sky']
    """
    words = set().union(*map(fold_words, known))
    found: dict[str, None] = {}
    for _ in range(_ATTEMPTS * count if pool else 0):
        if len(found) == count:
            break
        phrase, name = pool[int(rng.random() * len(pool))]
        if not fold_words(name) & words:
            found[phrase] = None
    return list(found)
