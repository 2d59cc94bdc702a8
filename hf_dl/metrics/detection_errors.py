"""The kinds of errors behind a low average precision, and how much each of them costs.

Bolya et al., "TIDE: A general toolbox for identifying object detection errors", ECCV 2020,
https://arxiv.org/abs/2008.08115. Each wrong detection has one kind, the first of this list that fits:

* `localization`: an object of its class with an IoU from 0.1 to 0.5.
* `class`: an object of another class with an IoU of at least 0.5.
* `duplicate`: an object of its class with an IoU of at least 0.5, which a better detection has taken.
* `background`: no object with an IoU above 0.1.
* `both`: everything else, such as an object of another class with an IoU of 0.3.

`missed` are the objects without a detection that one of the first two repairs would make right. The cost of a kind is
the gain in average precision at IoU 0.5 if an oracle repaired all errors of this kind and no others.

Differences from the authors' code: detections and objects are matched as in COCO, and classes without an object are
left out of the mean.
"""

import numpy as np
import torch

from .detection import COCO_AREAS, FlatBoxes, Images, box_iou, flatten_boxes, interpolate, match_boxes

ERRORS = ("class", "localization", "both", "duplicate", "background", "missed")


def detection_errors(
    predictions: Images, references: Images, *, iou: float = 0.5, background: float = 0.1
) -> dict[str, float]:
    """Count the errors of each kind, and compute the average precision that each of them costs.

    Args:
        predictions: As in `hf_dl.metrics.detection.coco_scores`. The best 100 per image and class are used.
        references: As in `hf_dl.metrics.detection.coco_scores`.
        iou: Smallest IoU of a right detection.
        background: Largest IoU of a detection of the background.

    Returns:
        `ap`, the mean average precision at this IoU. For each of `ERRORS`, `<kind>`, the gain of an oracle, and
        `<kind>_count`. `false_positive` and `false_negative` are the gains of perfect precision and perfect recall.

    Raises:
        ValueError: If not 0 < `background` < `iou` < 1, or as in `coco_scores`.

    Example:
        >>> found = {"boxes": [[0, 0, 9, 9], [20, 0, 30, 10]], "scores": [0.9, 0.8], "labels": [1, 1]}
        >>> truth = {"boxes": [[0, 0, 9, 9], [25, 0, 35, 10]], "labels": [1, 1]}
        >>> errors = detection_errors([found], [truth])
        >>> round(errors["ap"], 3), round(errors["localization"], 3), errors["localization_count"]
        (0.505, 0.495, 1.0)
    """
    if not 0 < background < iou < 1:
        raise ValueError(f"background={background} and iou={iou} are invalid. Expected 0 < background < iou < 1.")
    flat = flatten_boxes(predictions, references, top=100)
    matched, ignored, unwanted = (found[:, 0] for found in match_boxes(flat, np.array([iou]), [COCO_AREAS["all"]]))
    matched, skipped = matched[:, 0], ignored[:, 0]
    used = np.zeros(len(flat.objects), bool)
    used[matched[(matched >= 0) & ~skipped]] = True
    kind, target = _sort_errors(flat, (matched < 0) & ~skipped, used, ~unwanted, iou, background)

    # an oracle makes the best detection of an object right, and removes the others
    repaired = np.zeros(len(kind), bool)
    candidates = np.flatnonzero((target >= 0) & ~used[target]) if len(used) else np.zeros(0, int)
    candidates = candidates[np.argsort(-flat.scores[candidates], kind="stable")]
    repaired[candidates[np.unique(target[candidates], return_index=True)[1]]] = True
    missed = ~unwanted & ~used
    unfound = missed.copy()
    missed[target[candidates]] = False

    positives = np.bincount(flat.object_classes[~unwanted], minlength=len(flat.labels))
    hit = (matched >= 0) & ~skipped
    base = _average(flat.classes, flat.scores, hit, ~skipped, positives, positives)
    result = {"ap": base}
    for number, name in enumerate(ERRORS[:-1]):
        chosen = kind == number
        classes = flat.classes.copy()
        moved = chosen & repaired
        classes[moved] = flat.object_classes[target[moved]]
        kept = ~skipped & (~chosen | repaired)
        result[name] = _average(classes, flat.scores, hit | moved, kept, positives, positives) - base
        result[f"{name}_count"] = float(chosen.sum())
    for name, gone in (("missed", missed), ("false_negative", unfound)):
        fewer = positives - np.bincount(flat.object_classes[gone], minlength=len(flat.labels))
        result[name] = _average(flat.classes, flat.scores, hit, ~skipped, positives, fewer) - base
    result["missed_count"] = float(missed.sum())
    result["false_positive"] = _average(flat.classes, hit.astype(float), hit, ~skipped, positives, positives) - base
    gains = (*ERRORS, "false_positive", "false_negative")
    return {name: max(value, 0.0) if name in gains else value for name, value in result.items()}


def _sort_errors(
    flat: FlatBoxes, wrong: np.ndarray, used: np.ndarray, real: np.ndarray, iou: float, background: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the kind of each wrong detection or -1, and the object that would make it right or -1."""
    kind, target = np.full(len(wrong), -1), np.full(len(wrong), -1)
    kinds = {name: number for number, name in enumerate(ERRORS)}
    rows_of, objects_of = np.flatnonzero(wrong), np.flatnonzero(real)
    kind[rows_of] = kinds["background"]  # of images without objects
    for image in np.intersect1d(flat.images[rows_of], flat.object_images[objects_of]):
        rows = rows_of[slice(*np.searchsorted(flat.images[rows_of], [image, image + 1]))]
        items = objects_of[slice(*np.searchsorted(flat.object_images[objects_of], [image, image + 1]))]
        overlap = box_iou(torch.from_numpy(flat.detections[rows]), torch.from_numpy(flat.objects[items])).numpy()
        same = flat.classes[rows][:, None] == flat.object_classes[items]
        own, other = np.where(same, overlap, 0.0), np.where(same, 0.0, overlap)
        tests = {
            "localization": (own.max(1) >= background) & (own.max(1) < iou),
            "class": other.max(1) >= iou,
            "duplicate": np.where(used[items], own, 0.0).max(1) >= iou,
            "background": overlap.max(1) <= background,
        }
        kind[rows] = np.select(list(tests.values()), [kinds[name] for name in tests], kinds["both"])
        close = np.where(kind[rows] == kinds["localization"], own.argmax(1), other.argmax(1))
        fixable = np.isin(kind[rows], [kinds["localization"], kinds["class"]])
        target[rows] = np.where(fixable, items[close], -1)
    return kind, target


def _average(
    classes: np.ndarray,
    scores: np.ndarray,
    hit: np.ndarray,
    kept: np.ndarray,
    positives: np.ndarray,
    found: np.ndarray,
) -> float:
    """Return the mean average precision of the classes with `positives`, from the numbers of objects in `found`."""
    values = []
    for number in np.flatnonzero(positives):
        rows = np.flatnonzero((classes == number) & kept)
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        right = hit[rows, None]
        values.append(interpolate(right, ~right, int(found[number])).mean() if found[number] else 0.0)
    return float(np.mean(values)) if values else float("nan")
