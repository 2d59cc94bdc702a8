"""Scores of detected boxes: average precision as COCO and PASCAL VOC define it, and ImageNet's localization error.

Boxes are (x0, y0, x1, y1), half-open: the width is x1 - x0, and no "+ 1" is needed anywhere.

* COCO: 101 recall levels, 10 IoUs from 0.5 to 0.95, three sizes of objects, average recall. Lin et al., "Microsoft
  COCO: Common objects in context", ECCV 2014, https://arxiv.org/abs/1405.0312. Equal to pycocotools.
* VOC: 11 recall levels (VOC 2007) or the area under the curve (VOC 2010 and later). Everingham et al., "The PASCAL
  visual object classes challenge", IJCV 2010.
* Localization error: Russakovsky et al., "ImageNet large scale visual recognition challenge", IJCV 2015,
  https://arxiv.org/abs/1409.0575.
* Generalized IoU: Rezatofighi et al., CVPR 2019, https://arxiv.org/abs/1902.09630.

Differences from pycocotools: all images and classes are matched at once, object ids play no role, and a score that no
object defines is NaN instead of -1. `hf_dl.metrics.detection_errors` explains the errors behind a low score.

`hf_dl.metrics.spaces` publishes a copy of this file, so this file must not import hf_dl.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# linspace, not arange / 100: other roundings of the same numbers change single precisions by up to 0.2
COCO_IOUS = np.linspace(0.5, 0.95, 10)
COCO_RECALLS = np.linspace(0.0, 1.0, 101)
COCO_AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
# arange has 0.30000000000000004, so a recall of 3/10 misses the level 0.3; published scores of VOC 2007 are like that
VOC07_RECALLS = np.arange(0.0, 1.1, 0.1)

_CELLS = 2**22  # of the largest array that matches boxes, to limit the memory

Images = Sequence[Mapping[str, Any]]


def box_iou(boxes: Tensor, others: Tensor, *, crowd: Tensor | None = None) -> Tensor:
    """Compute the IoU (intersection over union) of all pairs of boxes.

    Args:
        boxes: Boxes (..., n, 4) as x0, y0, x1, y1.
        others: Boxes (..., m, 4).
        crowd: Bool (..., m). The union with a crowd is the area of the box in `boxes` alone, as COCO defines it.

    Returns:
        The IoU (..., n, m) in [0, 1]. It is 0 for a box without area.

    Example:
        >>> box_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
        tensor([[0.3333]])
    """
    intersection, own, area = _intersect(boxes, others)
    union = own + area - intersection
    if crowd is not None:
        union = torch.where(crowd.unsqueeze(-2), own, union)
    return torch.where(intersection > 0, intersection / union, 0.0)


def generalized_box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the generalized IoU of all pairs of boxes: the IoU minus the empty share of the smallest enclosing box.

        GIoU = IoU - (C - U) / C, with the union U and the area C of the enclosing box

    Args:
        boxes: Boxes (..., n, 4) as x0, y0, x1, y1.
        others: Boxes (..., m, 4).

    Returns:
        The generalized IoU (..., n, m) in [-1, 1]. It is 0 where the enclosing box has no area.

    Example:
        >>> generalized_box_iou(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))
        tensor([[-0.3333]])
    """
    intersection, own, area = _intersect(boxes, others)
    union = own + area - intersection
    low = torch.minimum(boxes[..., :, None, :2], others[..., None, :, :2])
    high = torch.maximum(boxes[..., :, None, 2:], others[..., None, :, 2:])
    enclosing = (high - low).prod(-1)
    iou = torch.where(intersection > 0, intersection / union, 0.0)
    return iou - torch.where(enclosing > 0, (enclosing - union) / enclosing, 0.0)


def _intersect(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the areas of the intersections, (..., n, m), of `boxes`, (..., n, 1), and of `others`, (..., 1, m)."""
    low = torch.maximum(boxes[..., :, None, :2], others[..., None, :, :2])
    high = torch.minimum(boxes[..., :, None, 2:], others[..., None, :, 2:])
    own, area = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (boxes, others))
    return (high - low).clamp(min=0).prod(-1), own[..., :, None], area[..., None, :]


# ---------------------------------------------------------------------------------------------------------------------
# Boxes of all images as flat arrays


class FlatBoxes(NamedTuple):
    """The boxes of all images. Detections are sorted by image, class and descending score; objects keep their order.

    Attributes:
        labels: The classes of detections and objects, sorted.
        detections: Boxes (n, 4), with `scores` (n,), `images` (n,), `classes` (n,) and their rank in image and class.
        objects: Boxes (m, 4), with `areas` (m,), `object_images` (m,), `object_classes` (m,), `crowd` (m,) and
            `difficult` (m,).
    """

    labels: list[int]
    detections: np.ndarray
    scores: np.ndarray
    images: np.ndarray
    classes: np.ndarray
    ranks: np.ndarray
    objects: np.ndarray
    areas: np.ndarray
    object_images: np.ndarray
    object_classes: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray


def flatten_boxes(predictions: Images, references: Images, *, top: int | None = None) -> FlatBoxes:
    """Check the boxes of all images, and join them to flat arrays.

    Args:
        predictions: As in `coco_scores`.
        references: As in `coco_scores`.
        top: Number of detections per image and class to keep, the highest scores. Defaults to all.

    Returns:
        The arrays.

    Raises:
        ValueError: If numbers of boxes differ, a box is invalid, or a score is not a number.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"Got predictions of {len(predictions)} images and references of {len(references)}. Expected one of each "
            "per image."
        )
    boxes, scores, labels, images = _join(predictions, "predictions", ("scores", "labels"))
    objects, areas, crowd, difficult, names, object_images = _join(
        references, "references", ("area", "iscrowd", "difficult", "labels")
    )
    if np.isnan(scores).any():
        image = images[np.isnan(scores)][0]
        raise ValueError(f"predictions[{image}] has a score that is not a number. Expected finite scores.")
    known, classes = np.unique(np.concatenate([names, labels]).astype(np.int64), return_inverse=True)
    object_classes, place = np.split(classes.reshape(-1), [len(names)])
    own = (objects[:, 2:] - objects[:, :2]).prod(-1)
    order = np.lexsort((-scores, place, images))  # stable: equal scores keep their order
    boxes, scores, images, place = boxes[order], scores[order], images[order], place[order]
    group = images * max(len(known), 1) + place
    ranks = np.arange(len(group)) - np.searchsorted(group, group)
    chosen = slice(None) if top is None else ranks < top
    detections = (array[chosen] for array in (boxes, scores, images, place, ranks))
    areas = np.where(np.isnan(areas), own, areas)
    flags = (np.nan_to_num(flag) > 0 for flag in (crowd, difficult))
    return FlatBoxes(known.tolist(), *detections, objects, areas, object_images, object_classes, *flags)


def _join(rows: Images, name: str, fields: tuple[str, ...]) -> list[np.ndarray]:
    """Return the boxes of all rows, each of the fields, and the row numbers, as flat arrays."""
    boxes: list[np.ndarray] = []
    values: dict[str, list[np.ndarray]] = {field: [] for field in fields}
    needed = ["boxes", *(field for field in fields if field in ("scores", "labels"))]
    for number, row in enumerate(rows):
        for key in needed:
            if row.get(key) is None:
                raise ValueError(f"{name}[{number}] has no {key!r}. Expected the keys {', '.join(needed)}.")
        found = _array(row["boxes"])
        if found.size and (found.ndim != 2 or found.shape[1] != 4):
            raise ValueError(f"The boxes of {name}[{number}] have the shape {found.shape}. Expected (boxes, 4).")
        boxes.append(found.reshape(-1, 4))
        for field in fields:
            value = row.get(field)
            value = np.full(len(boxes[-1]), np.nan) if value is None else _array(value).reshape(-1)
            if len(value) != len(boxes[-1]):
                raise ValueError(
                    f"{name}[{number}] has {len(boxes[-1])} boxes and {len(value)} {field}. Expected one per box."
                )
            values[field].append(value)
    joined = np.concatenate(boxes) if boxes else np.zeros((0, 4))
    images = np.repeat(np.arange(len(boxes)), [len(found) for found in boxes])
    bad = ~np.isfinite(joined).all(1) | (joined[:, 2:] < joined[:, :2]).any(1)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{name}[{images[at]}] has the box {joined[at].tolist()}. Expected finite x0, y0, x1, y1 with x0 <= x1 "
            "and y0 <= y1."
        )
    return [joined, *(np.concatenate(found) if found else np.zeros(0) for found in values.values()), images]


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64).numpy()
    return np.asarray(value, np.float64)  # a tensor would round the numbers of a list to float32


# ---------------------------------------------------------------------------------------------------------------------
# Matching of detections and objects


def match_boxes(
    flat: FlatBoxes, thresholds: np.ndarray, areas: Sequence[tuple[float, float]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Match the detections of each image and class with its objects as COCO does, by descending score.

    A detection takes the free object with the highest IoU, if this reaches the threshold. The last one wins a tie.
    Crowds, difficult objects and objects outside of the range of areas are ignored. A detection takes one of them only
    if no other object is left, and is then ignored as well. A crowd is never used up.

    Args:
        flat: The boxes.
        thresholds: Smallest IoUs of a match, (thresholds,).
        areas: Smallest and largest area per range, both inclusive.

    Returns:
        For each detection, range and threshold, (n, areas, thresholds): the row of the matched object or -1, and
        whether the detection is ignored. For each object and range, (m, areas): whether it is ignored.
    """
    count, limits = max(len(flat.labels), 1), np.array(areas, dtype=float).reshape(-1, 2)
    shape = (len(flat.scores), len(limits), len(thresholds))
    matched, ignored = np.full(shape, -1, np.int32), np.zeros(shape, bool)
    outside = (flat.areas[:, None] < limits[:, 0]) | (flat.areas[:, None] > limits[:, 1])
    unwanted = outside | (flat.crowd | flat.difficult)[:, None]
    group, object_group = flat.images * count + flat.classes, flat.object_images * count + flat.object_classes
    rows = np.argsort(object_group, kind="stable")
    keys, first, sizes = np.unique(object_group[rows], return_index=True, return_counts=True)
    start, stop = np.searchsorted(group, keys, "left"), np.searchsorted(group, keys, "right")
    lengths = stop - start
    for chosen in _chunks(lengths, sizes, cells=limits.shape[0] * len(thresholds)):
        depth, width = lengths[chosen].max(), sizes[chosen].max()
        columns = first[chosen, None] + np.minimum(np.arange(width), sizes[chosen, None] - 1)
        lines = start[chosen, None] + np.minimum(np.arange(depth), lengths[chosen, None] - 1)
        found = rows[columns]
        iou = box_iou(
            *(torch.from_numpy(x) for x in (flat.detections[lines], flat.objects[found])),
            crowd=torch.from_numpy(flat.crowd[found]),
        ).numpy()
        iou[np.broadcast_to((np.arange(width) >= sizes[chosen, None])[:, None], iou.shape)] = -1
        iou[np.arange(depth) >= lengths[chosen, None]] = -1
        best = _take(iou, thresholds, flat.crowd[found], unwanted[found].swapaxes(1, 2))
        valid = np.arange(depth) < lengths[chosen, None]
        taken = np.take_along_axis(found[:, None, None], np.maximum(best, 0), -1)
        matched[lines[valid]] = np.where(best < 0, -1, taken)[valid]
    sizes = (flat.detections[:, 2:] - flat.detections[:, :2]).prod(-1)[:, None]
    strange = (sizes < limits[:, 0]) | (sizes > limits[:, 1])
    for number in range(len(limits)):
        own = matched[:, number]
        of_match = unwanted[:, number][np.maximum(own, 0)] if len(unwanted) else False
        ignored[:, number] = np.where(own < 0, strange[:, number, None], of_match)
    return matched, ignored, unwanted


def _chunks(lengths: np.ndarray, sizes: np.ndarray, cells: int) -> list[np.ndarray]:
    """Divide the groups with detections into chunks of similar size, which are padded and matched together."""
    kept = np.flatnonzero(lengths)
    kept = kept[np.lexsort((lengths[kept], sizes[kept]))]
    chunks, begin = [], 0
    while begin < len(kept):
        width = sizes[kept[begin]]
        end = begin + np.searchsorted(sizes[kept[begin:]], width + max(1, width // 4), "right")
        depth = lengths[kept[begin:end]].max()
        end = min(end, begin + max(1, _CELLS // int(sizes[kept[end - 1]] * max(cells, depth))))
        chunks.append(kept[begin:end])
        begin = end
    return chunks


def _take(iou: np.ndarray, thresholds: np.ndarray, crowd: np.ndarray, unwanted: np.ndarray) -> np.ndarray:
    """Match detections in order.

    Args:
        iou: (groups, detections, objects), -1 for padding.
        thresholds: (thresholds,).
        crowd: (groups, objects).
        unwanted: Objects to ignore, (groups, areas, objects).

    Returns:
        The column of the matched object or -1, (groups, detections, areas, thresholds).
    """
    groups, depth, width = iou.shape
    least = np.minimum(thresholds, 1 - 1e-10)[:, None]
    rank = np.empty(iou.shape, np.int32)  # of the IoU among the objects; the last of equal ones has the highest
    np.put_along_axis(rank, iou.argsort(-1, kind="stable"), np.arange(width, dtype=np.int32)[None, None], -1)
    bonus = np.where(unwanted, 0, width).astype(np.int32)[:, :, None]  # real objects before ignored ones
    free = np.ones((groups, unwanted.shape[1], len(thresholds), width), bool)
    best = np.full((groups, depth, unwanted.shape[1], len(thresholds)), -1, np.int64)
    for number in range(depth):
        some = np.flatnonzero(iou[:, number].max(-1) >= least.min())
        if not len(some):
            continue
        near = iou[some, number, None] >= least  # (some, thresholds, objects)
        usable = near[:, None] & (free[some] | crowd[some, None, None])
        value = np.where(usable, rank[some, number, None, None] + bonus[some], -1)
        column = value.argmax(-1)
        hit = np.take_along_axis(value, column[..., None], -1)[..., 0] >= 0
        best[some, number] = np.where(hit, column, -1)
        i, j, k = np.nonzero(hit)
        free[some[i], j, k, column[hit]] = False
    return best


# ---------------------------------------------------------------------------------------------------------------------
# COCO


class CocoEvaluation(NamedTuple):
    """Precision and recall of each class, NaN where no object of the class is counted.

    Attributes:
        labels: The classes of detections and objects, sorted.
        precision: (10 IoUs, 101 recalls, classes, 4 areas), with the most detections.
        recall: (10 IoUs, classes, 4 areas, numbers of detections).
        max_detections: The numbers of detections per image and class.
    """

    labels: list[int]
    precision: np.ndarray
    recall: np.ndarray
    max_detections: tuple[int, ...]

    def average_precision(self, *, iou: float | None = None, area: str = "all", label: int | None = None) -> float:
        """Return the mean precision over recalls, IoUs and classes.

        Args:
            iou: One of `COCO_IOUS`. Defaults to the mean of all.
            area: A key of `COCO_AREAS`.
            label: One class. Defaults to the mean of all.

        Raises:
            ValueError: If `iou`, `area` or `label` is unknown.
        """
        if area not in COCO_AREAS:
            raise ValueError(f"area={area!r} is unknown. Choose one of: {', '.join(COCO_AREAS)}.")
        if label is not None and label not in self.labels:
            raise ValueError(f"label={label!r} is unknown. Choose one of: {', '.join(map(str, self.labels))}.")
        rows = np.ones(len(COCO_IOUS), bool) if iou is None else np.abs(COCO_IOUS - iou) < 1e-6
        if not rows.any():
            raise ValueError(f"iou={iou} is not supported. Expected one of 0.5, 0.55, ..., 0.95.")
        values = self.precision[rows][..., list(COCO_AREAS).index(area)]
        return _mean(values if label is None else values[..., self.labels.index(label)])

    def average_recall(self, *, max_detections: int, area: str = "all") -> float:
        """Return the mean recall over IoUs and classes with at most this many detections per image and class."""
        values = self.recall[:, :, list(COCO_AREAS).index(area), self.max_detections.index(max_detections)]
        return _mean(values)


def coco_evaluation(
    predictions: Images, references: Images, *, max_detections: tuple[int, ...] = (1, 10, 100)
) -> CocoEvaluation:
    """Compute precision and recall of all classes, IoUs and areas, as `pycocotools.cocoeval.COCOeval` does.

    Args:
        predictions: As in `coco_scores`.
        references: As in `coco_scores`.
        max_detections: Numbers of detections per image and class, ascending. The precision uses the last one.

    Returns:
        The arrays, see `CocoEvaluation`.

    Raises:
        ValueError: If `max_detections` is not ascending, or as in `coco_scores`.
    """
    if not max_detections or min(max_detections) < 1 or list(max_detections) != sorted(set(max_detections)):
        raise ValueError(f"max_detections={max_detections} is invalid. Expected ascending positive numbers.")
    flat = flatten_boxes(predictions, references, top=max_detections[-1])
    matched, ignored, unwanted = match_boxes(flat, COCO_IOUS, list(COCO_AREAS.values()))
    shape = len(COCO_IOUS), len(flat.labels), len(COCO_AREAS)
    precision = np.full((shape[0], len(COCO_RECALLS), *shape[1:]), np.nan)
    recall = np.full((*shape, len(max_detections)), np.nan)
    hits, misses = (matched >= 0) & ~ignored, (matched < 0) & ~ignored
    for number in range(len(flat.labels)):
        rows = np.flatnonzero(flat.classes == number)
        rows = rows[np.argsort(-flat.scores[rows], kind="stable")]
        positives = (~unwanted[flat.object_classes == number]).sum(0)
        for area in np.flatnonzero(positives):
            hit = hits[rows, area]
            for column, most in enumerate(max_detections):
                recall[:, number, area, column] = hit[flat.ranks[rows] < most].sum(0) / positives[area]
            curve = interpolate(hit, misses[rows, area], int(positives[area]))
            precision[:, :, number, area] = curve.T
    return CocoEvaluation(flat.labels, precision, recall, tuple(max_detections))


def interpolate(hits: np.ndarray, misses: np.ndarray, positives: int) -> np.ndarray:
    """Return the precision at 101 recalls: the highest precision at this or a higher recall, as COCO defines it.

    Args:
        hits: Whether each detection is right, by descending score, (detections, curves).
        misses: Whether it is wrong. Ignored detections are neither.
        positives: Number of objects.

    Returns:
        The precision (101, curves). It is 0 at recalls that are not reached.
    """
    right, wrong = hits.cumsum(0, dtype=float), misses.cumsum(0, dtype=float)
    recall, precision = right / positives, right / (right + wrong + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    result = np.zeros((len(COCO_RECALLS), hits.shape[1]))
    for column in range(hits.shape[1]):
        place = np.searchsorted(recall[:, column], COCO_RECALLS, "left")
        reached = place < len(recall)
        result[reached, column] = precision[place[reached], column]
    return result


def coco_scores(predictions: Images, references: Images) -> dict[str, float]:
    """Compute the twelve scores of COCO. The result equals pycocotools.

    * `map`: mean average precision over IoUs from 0.5 to 0.95. `map_50`, `map_75`: at one IoU.
    * `map_small`, `map_medium`, `map_large`: for objects with an area up to 32², up to 96² and above.
    * `mar_1`, `mar_10`, `mar_100`: mean of the highest recall with 1, 10 and 100 detections per image and class.
    * `mar_small`, `mar_medium`, `mar_large`: the same by area, with 100 detections.

    Args:
        predictions: One dictionary per image with `boxes` (n, 4) as x0, y0, x1, y1, `scores` (n,) and `labels` (n,).
            `post_process_object_detection` returns it. Keep low scores: a threshold above 0.05 lowers the result.
        references: One dictionary per image with `boxes` (m, 4) and `labels` (m,). Optional: `area` (m,), defaults to
            the area of the box; `iscrowd` (m,) and `difficult` (m,), objects to ignore. COCO has no difficult objects:
            they are ignored like objects of another size.

    Returns:
        The scores in [0, 1], and NaN where no object defines a score.

    Raises:
        ValueError: If the numbers of images or boxes differ, a key is missing, or a box is invalid.

    Example:
        >>> found = {"boxes": [[0, 0, 10, 10], [5, 5, 9, 9]], "scores": [0.9, 0.4], "labels": [1, 1]}
        >>> truth = {"boxes": [[0, 0, 10, 9]], "labels": [1]}
        >>> scores = coco_scores([found], [truth])
        >>> round(scores["map"], 4), round(scores["map_50"], 4)
        (0.9, 1.0)
    """
    found = coco_evaluation(predictions, references)
    scores = {"map": found.average_precision()}
    scores |= {f"map_{100 * iou:.0f}": found.average_precision(iou=iou) for iou in (0.5, 0.75)}
    sizes = [area for area in COCO_AREAS if area != "all"]
    scores |= {f"map_{area}": found.average_precision(area=area) for area in sizes}
    scores |= {f"mar_{most}": found.average_recall(max_detections=most) for most in found.max_detections}
    most = found.max_detections[-1]
    return scores | {f"mar_{area}": found.average_recall(max_detections=most, area=area) for area in sizes}


# ---------------------------------------------------------------------------------------------------------------------
# PASCAL VOC


def voc_average_precisions(
    predictions: Images, references: Images, *, protocol: str = "voc10", iou: float = 0.5
) -> dict[int, float]:
    """Compute the average precision of each class as PASCAL VOC defines it.

    Each detection is compared with the object of its class with the highest IoU, which must be above `iou`. Only the
    first detection of an object is right. A detection whose best object is difficult (or a crowd) is ignored.

    Args:
        predictions: As in `coco_scores`.
        references: As in `coco_scores`.
        protocol: "voc07", the mean of 11 precisions, or "voc10", the area under the curve.
        iou: IoU that a match must exceed.

    Returns:
        The average precision by label. It is NaN for a class without an object that counts.

    Raises:
        ValueError: If `protocol` is unknown, or as in `coco_scores`.

    Example:
        >>> found = {"boxes": [[0, 0, 10, 10]], "scores": [0.9], "labels": [1]}
        >>> voc_average_precisions([found], [{"boxes": [[0, 0, 10, 9], [20, 20, 30, 30]], "labels": [1, 1]}])
        {1: 0.5}
    """
    if protocol not in ("voc07", "voc10"):
        raise ValueError(f"protocol={protocol!r} is unknown. Choose one of: voc07, voc10.")
    flat = flatten_boxes(predictions, references)
    unwanted = flat.crowd | flat.difficult
    best, overlap = _best_objects(flat)
    close = overlap > iou
    result = {}
    for number, label in enumerate(flat.labels):
        positives = int((~unwanted[flat.object_classes == number]).sum())
        if not positives:
            result[label] = float("nan")
            continue
        rows = np.flatnonzero(flat.classes == number)
        rows = rows[np.argsort(-flat.scores[rows], kind="stable")]
        claims = np.where(close[rows], best[rows], -1)
        _, first = np.unique(claims, return_index=True)
        hit = np.zeros(len(rows), bool)
        hit[first] = True
        skip = (claims >= 0) & unwanted[claims]
        hit &= (claims >= 0) & ~skip
        result[label] = _voc_average(hit, ~hit & ~skip, positives, protocol)
    return result


def _best_objects(flat: FlatBoxes) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of the object of its image and class with the highest IoU, and this IoU, for each detection."""
    count = max(len(flat.labels), 1)
    group, object_group = flat.images * count + flat.classes, flat.object_images * count + flat.object_classes
    rows = np.argsort(object_group, kind="stable")
    keys, first, sizes = np.unique(object_group[rows], return_index=True, return_counts=True)
    start, stop = np.searchsorted(group, keys, "left"), np.searchsorted(group, keys, "right")
    best, overlap = np.full(len(group), -1), np.zeros(len(group))
    for chosen in _chunks(stop - start, sizes, cells=1):
        lengths = (stop - start)[chosen, None]
        # padding repeats the last box, so the first of equal objects stays the first
        found = rows[first[chosen, None] + np.minimum(np.arange(sizes[chosen].max()), sizes[chosen, None] - 1)]
        lines = start[chosen, None] + np.minimum(np.arange(lengths.max()), lengths - 1)
        iou = box_iou(*(torch.from_numpy(x) for x in (flat.detections[lines], flat.objects[found]))).numpy()
        best[lines] = np.take_along_axis(found, iou.argmax(-1), 1)
        overlap[lines] = iou.max(-1)
    return best, overlap


def _voc_average(hits: np.ndarray, misses: np.ndarray, positives: int, protocol: str) -> float:
    right, wrong = hits.cumsum(dtype=float), misses.cumsum(dtype=float)
    recall, precision = right / positives, right / np.maximum(right + wrong, np.finfo(float).eps)
    if protocol == "voc07":
        return float(np.mean([precision[recall >= level].max(initial=0.0) for level in VOC07_RECALLS]))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def voc_scores(predictions: Images, references: Images, *, protocol: str = "voc10") -> dict[str, float]:
    """Compute the mean average precision at IoU 0.5 as PASCAL VOC defines it.

    Args:
        predictions: As in `coco_scores`.
        references: As in `coco_scores`.
        protocol: "voc07" or "voc10", as in `voc_average_precisions`.

    Returns:
        `map_50`, and NaN if no object is counted.

    Raises:
        ValueError: As in `voc_average_precisions`.
    """
    found = voc_average_precisions(predictions, references, protocol=protocol)
    return {"map_50": _mean(np.array(list(found.values())))}


PROTOCOLS = {
    "coco": coco_scores,
    "voc07": lambda predictions, references: voc_scores(predictions, references, protocol="voc07"),
    "voc10": lambda predictions, references: voc_scores(predictions, references, protocol="voc10"),
}


def detection_scores(predictions: Images, references: Images, *, protocol: str = "coco") -> dict[str, float]:
    """Compute the scores of a benchmark.

    Args:
        predictions: As in `coco_scores`.
        references: As in `coco_scores`.
        protocol: "coco", see `coco_scores`, or "voc07" or "voc10", see `voc_scores`.

    Returns:
        The scores in [0, 1], and NaN where no object defines a score.

    Raises:
        ValueError: If `protocol` is unknown, or as in `coco_scores`.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r} is unknown. Choose one of: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[protocol](predictions, references)


def precision_recall_curves(
    predictions: Images, references: Images, *, iou: float = 0.5
) -> dict[int, dict[str, np.ndarray]]:
    """Compute the curve of precision and recall of each class, with the matching of COCO.

    Args:
        predictions: As in `coco_scores`. All detections are counted.
        references: As in `coco_scores`.
        iou: Smallest IoU of a match.

    Returns:
        `recall`, `precision` and `scores` of the detections that are not ignored, by label and by descending score.
        The recall is NaN for a class without an object that counts.

    Raises:
        ValueError: As in `coco_scores`.

    Example:
        >>> found = {"boxes": [[0, 0, 10, 10], [50, 50, 60, 60]], "scores": [0.9, 0.4], "labels": [1, 1]}
        >>> curve = precision_recall_curves([found], [{"boxes": [[0, 0, 10, 9]], "labels": [1]}])[1]
        >>> curve["precision"].tolist(), curve["recall"].tolist()
        ([1.0, 0.5], [1.0, 1.0])
    """
    flat = flatten_boxes(predictions, references)
    matched, ignored, unwanted = match_boxes(flat, np.array([iou]), [COCO_AREAS["all"]])
    curves = {}
    for number, label in enumerate(flat.labels):
        rows = np.flatnonzero((flat.classes == number) & ~ignored[:, 0, 0])
        rows = rows[np.argsort(-flat.scores[rows], kind="stable")]
        right = (matched[rows, 0, 0] >= 0).cumsum()
        positives = (~unwanted[flat.object_classes == number]).sum()
        curves[label] = {
            "recall": right / positives if positives else np.full(len(rows), np.nan),
            "precision": right / np.arange(1, len(rows) + 1),
            "scores": flat.scores[rows],
        }
    return curves


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet


def localization_error(
    predictions: Images, references: Images, *, guesses: int = 5, iou: float = 0.5
) -> dict[str, float]:
    """Compute the localization error of ImageNet: a guess is right if its class and its box are right.

    For an image with several classes, the error is the share of its classes that no guess finds. A box is right if its
    IoU with one object of the class is at least `iou`.

    Args:
        predictions: As in `coco_scores`. The guesses with the highest scores are used.
        references: As in `coco_scores`. Images without objects are left out.
        guesses: Number of guesses per image.
        iou: Smallest IoU of a right box.

    Returns:
        `localization_error`, and `classification_error`, which ignores the boxes. NaN if no image has an object.

    Raises:
        ValueError: If `guesses` is not positive, or as in `coco_scores`.

    Example:
        >>> found = {"boxes": [[0, 0, 10, 10], [0, 0, 4, 4]], "scores": [0.9, 0.4], "labels": [1, 2]}
        >>> localization_error([found], [{"boxes": [[0, 0, 10, 9]], "labels": [2]}])
        {'localization_error': 1.0, 'classification_error': 0.0}
    """
    if guesses < 1:
        raise ValueError(f"guesses={guesses} must be at least 1.")
    flatten_boxes(predictions, references)  # checks all boxes
    missed, unnamed = [], []
    for row, truth in zip(predictions, references, strict=True):
        labels = _array(truth["labels"])
        if not labels.size:
            continue
        chosen = np.argsort(-_array(row["scores"]).reshape(-1), kind="stable")[:guesses]
        boxes, named = (_array(row[key])[chosen] for key in ("boxes", "labels"))
        right = named[:, None] == labels
        close = box_iou(*(torch.from_numpy(x.reshape(-1, 4)) for x in (boxes, _array(truth["boxes"])))).numpy() >= iou
        classes = np.unique(labels)
        missed.append(np.mean([not (right & close)[:, labels == label].any() for label in classes]))
        unnamed.append(np.mean([label not in named for label in classes]))
    return {"localization_error": _mean(np.array(missed)), "classification_error": _mean(np.array(unnamed))}


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
