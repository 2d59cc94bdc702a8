"""Scores of captions whose objects are known: attributes, relations, and objects that are not in the image.

BLEU and similar scores compare words, so a caption with the wrong color scores almost as high as the correct one. For
generated scenes, the caption is parsed instead, and its objects are matched one to one with the objects of the scene.
Rohrbach et al. (EMNLP 2018, https://arxiv.org/abs/1809.02156) count objects that are not in a photograph. Here, the
attributes and relations count as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from scipy.optimize import linear_sum_assignment

ATTRIBUTES = ("size", "color", "material", "shape")
_WHOLE = 100  # an object with all attributes right counts more than any number of single attributes


class Parsed(Protocol):
    """The content of a caption, such as `hf_dl.data.scene_captions.ParsedCaption`."""

    objects: Sequence[Mapping[str, str]]
    relation: tuple[int, str, int] | None
    grammatical: bool


def match_objects(said: Sequence[Mapping[str, str]], truth: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Match the objects of a caption with the objects of the scene, one to one.

    The Hungarian method finds the largest number of objects with all named attributes right, and among those
    solutions the largest number of attributes.

    Args:
        said: The named attributes of each object in the caption.
        truth: All attributes of each object in the scene.

    Returns:
        Pairs (index in `said`, index in `truth`), as many as the smaller number of objects.

    Example:
        >>> cube, cone = {"color": "red", "shape": "cube"}, {"color": "blue", "shape": "cone"}
        >>> match_objects([{"color": "blue", "shape": "cube"}, {"color": "red"}], [cube, cone])
        [(0, 1), (1, 0)]
    """
    if not said or not truth:
        return []
    scores = np.array([[_alike(one, other) for other in truth] for one in said])
    rows, columns = linear_sum_assignment(-scores)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True)]


def _right(said: Mapping[str, str], truth: Mapping[str, Any]) -> int:
    return sum(truth.get(name) == value for name, value in said.items())


def _alike(said: Mapping[str, str], truth: Mapping[str, Any]) -> float:
    right = _right(said, truth)
    return right / max(len(said), 1) + _WHOLE * (right == len(said))


def relation_holds(
    relation: tuple[int, str, int], said: Sequence[Mapping[str, str]], truth: Sequence[Mapping[str, Any]]
) -> bool:
    """Return whether some pair of objects in the scene has all named attributes and the relation.

    Args:
        relation: (i, direction, j): said[i] stands in that direction from said[j].
        said: The named attributes of each object in the caption.
        truth: The objects of the scene. `relations` lists the objects in each direction.
    """
    i, direction, j = relation
    return any(
        first != second
        and _right(said[i], truth[first]) == len(said[i])
        and _right(said[j], truth[second]) == len(said[j])
        for second in range(len(truth))
        for first in truth[second]["relations"][direction]
    )


def caption_object_scores(parsed: Sequence[Parsed], truth: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Compute the scores of captions of scenes with known objects.

    Args:
        parsed: The content of one caption per scene.
        truth: The objects of each scene: size, color, material and shape, and `relations` for the scores of relations.

    Returns:
        All scores are fractions. NaN marks a score without a case.

        - `attribute_accuracy`: right ones among the named attributes of matched objects. `size_accuracy` and so on
          are the same for single attributes.
        - `hallucinated`: objects of the captions that match no object of the scene in all named attributes.
        - `covered`: objects of the scenes that the captions name without a mistake.
        - `all_right`: captions that name all objects once, without any mistake.
        - `count_accuracy`: captions with the right number of objects.
        - `relation_accuracy`: right ones among the named relations; `relations_said`: captions that name one.
        - `grammatical`: captions that are sentences of the grammar.

    Raises:
        ValueError: If the numbers of captions and scenes differ, or are zero.
    """
    if len(parsed) != len(truth) or not len(parsed):
        raise ValueError(
            f"Got {len(parsed)} captions and {len(truth)} scenes. Expected one caption per scene, and at least one."
        )
    right, named = dict.fromkeys(ATTRIBUTES, 0), dict.fromkeys(ATTRIBUTES, 0)
    whole = said_objects = all_right = same_count = true_relations = relations = 0
    for caption, objects in zip(parsed, truth, strict=True):
        found = 0
        for i, j in match_objects(caption.objects, objects):
            one = caption.objects[i]
            found += _right(one, objects[j]) == len(one)
            for name, value in one.items():
                named[name] += 1
                right[name] += objects[j].get(name) == value
        holds = True
        if caption.relation is not None:
            holds = relation_holds(caption.relation, caption.objects, objects)
            relations, true_relations = relations + 1, true_relations + holds
        whole, said_objects = whole + found, said_objects + len(caption.objects)
        same_count += len(caption.objects) == len(objects)
        all_right += found == len(caption.objects) == len(objects) and holds

    def share(part: float, total: float) -> float:
        return part / total if total else float("nan")

    return {
        "attribute_accuracy": share(sum(right.values()), sum(named.values())),
        **{f"{name}_accuracy": share(right[name], named[name]) for name in ATTRIBUTES},
        "hallucinated": share(said_objects - whole, said_objects),
        "covered": share(whole, sum(map(len, truth))),
        "all_right": all_right / len(parsed),
        "count_accuracy": same_count / len(parsed),
        "relation_accuracy": share(true_relations, relations),
        "relations_said": relations / len(parsed),
        "grammatical": sum(caption.grammatical for caption in parsed) / len(parsed),
    }
