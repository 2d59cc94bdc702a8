"""How well a CLIP model tells true phrases from phrases with a wrong color, a wrong shape, both, or unrelated words.

Images and classes come from the zero-shot classification of scenes. Each class is a phrase with a color and a shape,
and each image matches one class. The scores are from `hf_dl.pipelines.phrase_matching`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_dl.pipelines.phrase_matching import THRESHOLD, calibrate, mismatch_auroc, mismatch_kind, standard_margin

UNRELATED = ("dog", "airplane", "pizza", "mountain")  # names of classes for prompts that no scene matches


def split_names(names: Sequence[str]) -> list[tuple[str, str]] | None:
    """Split the names of classes into color and shape.

    Args:
        names: Names such as "red cube".

    Returns:
        Color and shape of each class. None if the classes are not all combinations of some colors and some shapes.

    Example:
        >>> split_names(["red cube", "red cone"]), split_names(["airplane", "sea lion"])
        ([('red', 'cube'), ('red', 'cone')], None)
    """
    pairs = [tuple(name.split()) for name in names]
    if any(len(pair) != 2 for pair in pairs):
        return None
    colors, shapes = (dict.fromkeys(words) for words in zip(*pairs, strict=True))
    return pairs if set(pairs) == {(color, shape) for color in colors for shape in shapes} else None


def mismatch_scores(
    cosines: Tensor,
    labels: Tensor,
    names: Sequence[str],
    unrelated: Tensor | None = None,
    *,
    threshold: float | None = THRESHOLD,
) -> dict[str, float]:
    """Compute how well cosines and margins separate true phrases from each kind of wrong phrase.

    Args:
        cosines: Cosine of each image and the phrase of each class (images, classes).
        labels: Class of each image (images,).
        names: Names of the classes, such as "red cube".
        unrelated: Cosines of phrases that no image matches (images, phrases). Defaults to no such phrases.
        threshold: Smallest margin of an accepted phrase. None chooses the threshold on these images, so that at most
            5 % of the wrong phrases of each kind are accepted.

    Returns:
        `auroc_<kind>` of the cosine and `margin_auroc_<kind>` of the margin for each kind of mismatch, and the shares
        of phrases that are accepted, `accepted_match` and `accepted_<kind>`. `match_threshold` is the threshold that
        was chosen, if `threshold` is None. Unrelated phrases have no
        near misses among the classes, so they have the cosine only. The result is empty if the classes are not all
        combinations of some colors and some shapes.
    """
    attributes = split_names(names)
    if attributes is None:
        return {}
    kinds_of = [
        [mismatch_kind(*other, [{"color": color, "shape": shape}]) for other in attributes]
        for color, shape in attributes
    ]
    near = [[i for i, kind in enumerate(kinds) if kind in ("wrong_color", "wrong_shape")] for kinds in kinds_of]
    kinds = [kind for label in labels.tolist() for kind in kinds_of[label]]
    scores = {}
    if len(near[0]) > 1:
        margins = standard_margin(cosines, cosines[:, torch.tensor(near)]).flatten()
        scores |= {f"margin_auroc_{kind}": area for kind, area in mismatch_auroc(margins, kinds).items()}
        if threshold is None:
            threshold = calibrate(margins, torch.tensor([kind == "match" for kind in kinds]), kinds=kinds)
            scores["match_threshold"] = threshold
        accepted = margins >= threshold
        for kind in dict.fromkeys(kinds):
            rows = torch.tensor([each == kind for each in kinds])
            scores[f"accepted_{kind}"] = accepted[rows].double().mean().item()
    values = cosines.flatten()
    if unrelated is not None:
        values, kinds = torch.cat([values, unrelated.flatten()]), kinds + ["unrelated"] * unrelated.numel()
    return scores | {f"auroc_{kind}": area for kind, area in mismatch_auroc(values, kinds).items()}
