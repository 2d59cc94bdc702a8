"""Scores of masks that a model draws for phrases, from the probability of each pixel.

A phrase is present if its mask has a pixel, and absent otherwise. The prediction for a phrase is the set of pixels
with a probability above the threshold. I and U are the sizes of its intersection and union with the mask.

* Mean IoU, cumulative IoU and precision at an IoU, by subset: Wu et al., "PhraseCut: Language-based image segmentation
  in the wild", CVPR 2020, https://arxiv.org/abs/2008.01187.
* The conventions of Lüddecke & Ecker, "Image segmentation using text and image prompts" (CLIPSeg), CVPR 2022,
  https://arxiv.org/abs/2112.10003, with `compat="clipseg"`.
* Average precision of all pixels, as `sklearn.metrics.average_precision_score`.

Difference from PhraseCut: absent phrases, which it does not have, are scored on their own. Choose the threshold on
validation data with `best_threshold`; the CLIPSeg paper also reports the best threshold of the test data.

`hf_dl.metrics.spaces` publishes a copy of this file, so this file must not import hf_dl.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

THRESHOLDS = tuple(number / 100 for number in range(1, 100))
COMPAT = ("clipseg",)
PRECISION_IOUS = (0.5, 0.7, 0.9)

_CLIPSEG_THRESHOLDS = slice(1, None, 2)  # 0.02, 0.04, ..., 0.98
_LEVELS = 2**16  # of the average precision
_LIMIT = 16.64  # the logit of the largest float32 below 1
_SMALL, _LARGE = 0.02, 0.2  # parts of the image that limit the sizes of PhraseCut

Maps = Tensor | Sequence[Tensor]


class PhraseCounts:
    """Counts of pixels from which all scores are computed, updated batch by batch. Masks need not stay in memory.

    A phrase takes 800 bytes, and a subset takes one megabyte. With several processes, gather the counts of all, and
    `merge` them.

    Example:
        >>> counts = PhraseCounts()
        >>> counts.update(torch.tensor([[[0.9, 0.4], [0.1, 0.1]]]), torch.tensor([[[1, 1], [0, 0]]]))
        >>> phrase_segmentation_scores(counts, threshold=0.5)["miou"]
        0.5
    """

    def __init__(self) -> None:
        self._pixels: list[np.ndarray] = []  # (phrases, 2, thresholds + 1): outside and inside of the mask, by level
        self._highest: list[np.ndarray] = []  # (phrases,): the highest probability
        self._subsets: list[tuple[str, ...]] = []
        self._levels: dict[str, np.ndarray] = {}  # subset -> (2, _LEVELS); the empty name is all present phrases

    def __len__(self) -> int:
        return len(self._subsets)

    def update(self, probabilities: Maps, masks: Maps, *, subsets: Sequence[Iterable[str]] | None = None) -> None:
        """Add a batch of phrases.

        Args:
            probabilities: Probability of each pixel, (phrases, height, width). For several sizes, one map per phrase.
            masks: True masks of the same shapes and on the same device. Pixels above 0.5 belong to the mask, so bool,
                0/1 and 0/255 are fine. The mask of an absent phrase is empty.
            subsets: Names of the subsets of each phrase, for scores by subset. The size of PhraseCut is added to them:
                "s_small" below 2 percent of the image, "s_large" above 20 percent, and "s_mid".

        Raises:
            ValueError: If shapes or numbers differ, or a probability is not in [0, 1].
        """
        if len(probabilities) != len(masks) or (subsets is not None and len(subsets) != len(masks)):
            given = "" if subsets is None else f", {len(subsets)} lists of subsets"
            raise ValueError(
                f"Got {len(probabilities)} maps of probabilities{given} and {len(masks)} masks. Expected one per "
                "phrase."
            )
        if isinstance(probabilities, Tensor) and isinstance(masks, Tensor):
            if len(masks):
                self._update(probabilities, masks, subsets)
            return
        for number, (one, mask) in enumerate(zip(probabilities, masks, strict=True)):
            self._update(one[None], mask[None], None if subsets is None else subsets[number : number + 1])

    def _update(self, probabilities: Tensor, masks: Tensor, subsets: Sequence[Iterable[str]] | None) -> None:
        values, inside = _flatten(probabilities, masks)
        width = len(THRESHOLDS) + 1
        # the level of a probability is the number of thresholds below it; CLIPSeg compares float32, too
        code = torch.bucketize(values, torch.tensor(THRESHOLDS, device=values.device)) + width * inside
        code += 2 * width * torch.arange(len(values), device=values.device)[:, None]
        pixels = code.flatten().bincount(minlength=2 * width * len(values)).view(-1, 2, width)
        self._pixels.append(pixels.cpu().numpy().astype(np.int32))
        self._highest.append(values.amax(1).cpu().numpy())

        areas, size = inside.sum(1).tolist(), values.shape[1]
        names = [() if subsets is None else (*subsets[i], _name_size(area / size)) for i, area in enumerate(areas)]
        self._subsets += names
        level = (torch.logit(values.double(), eps=2**-24) / _LIMIT + 1) * (_LEVELS / 2)
        level = level.long().clamp(0, _LEVELS - 1) + _LEVELS * inside
        for name in {"", *(name for own in names for name in own)}:
            rows = [i for i, own in enumerate(names) if areas[i] and (not name or name in own)]
            self._add(name, level[rows].flatten().bincount(minlength=2 * _LEVELS).view(2, _LEVELS).cpu().numpy())

    def merge(self, other: "PhraseCounts") -> None:
        """Add the phrases of another object, such as the counts of another process."""
        self._pixels += other._pixels
        self._highest += other._highest
        self._subsets += other._subsets
        for name, found in other._levels.items():
            self._add(name, found)

    def _add(self, subset: str, found: np.ndarray) -> None:
        if subset not in self._levels:
            self._levels[subset] = np.zeros((2, _LEVELS), np.int64)
        self._levels[subset] += found

    def confusion(self) -> dict[str, np.ndarray]:
        """Count the pixels of each phrase at each of the `THRESHOLDS`.

        Returns:
            `tp`, `fp`, `fn` and `tn`, int64 (phrases, thresholds).

        Raises:
            ValueError: If no phrase was added.
        """
        if not self._subsets:
            raise ValueError("No phrase was added. Expected at least one.")
        above = np.concatenate(self._pixels).astype(np.int64)[:, :, ::-1].cumsum(2)[:, :, ::-1]
        (fp, tp), (outside, inside) = above[:, :, 1:].swapaxes(0, 1), above[:, :, :1].swapaxes(0, 1)
        return {"tp": tp, "fp": fp, "fn": inside - tp, "tn": outside - fp}

    def average_precision(self, subset: str = "") -> float:
        """Compute the average precision of the pixels of the present phrases of a subset.

        The probabilities are rounded to 65,536 levels of their logits, because the counts of all values of a large
        dataset would not fit into memory. The result differs from `average_precision` by less than 0.0001.

        Args:
            subset: Name of the subset. Defaults to all phrases.
        """
        outside, inside = self._levels.get(subset, np.zeros((2, 1), np.int64))[:, ::-1]
        return _average_precision(inside, outside)

    def _at(self, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return IoU, intersection, union and predicted part of the image of each phrase at one threshold."""
        tp, fp, fn, tn = (counts[:, column] for counts in self.confusion().values())
        union = tp + fp + fn
        return np.where(union, tp / np.maximum(union, 1), 1.0), tp, union, (tp + fp) / (union + tn)


def phrase_segmentation_scores(
    probabilities: PhraseCounts | Maps,
    masks: Maps | None = None,
    *,
    threshold: float,
    compat: str | None = None,
    subsets: Sequence[Iterable[str]] | None = None,
) -> dict[str, float]:
    """Compute the scores of masks for phrases.

    * `miou`: mean of I / U over the present phrases. `cum_iou`: sum of I divided by the sum of U.
    * `pr_50`, `pr_70` and `pr_90`: share of the present phrases with an IoU above 0.5, 0.7 and 0.9.
    * `ap`: average precision of all pixels of the present phrases, for all thresholds.
    * `false_area`: part of the image that is predicted for an absent phrase, mean over the absent phrases.
    * `absent_iou`: share of the absent phrases without any predicted pixel, whose IoU counts as 1.
    * `absent_auroc`: probability that the highest pixel of a present phrase is above that of an absent phrase.
    * `phrases`, `absent_phrases`: numbers of present and absent phrases. `threshold`: the threshold.

    Scores of a subset have the names `<subset>_miou`, `<subset>_cum_iou`, ..., `<subset>_ap` and `<subset>_phrases`.

    With `compat="clipseg"`, the scores of the code of CLIPSeg are added. Its ratios have 1 more in the denominator.
    Present and absent phrases count alike:

    * `clipseg_miou`: mean of I / (1 + U). `clipseg_iou_fg`: sum of I divided by 1 + the sum of U.
    * `clipseg_iou_bin`: mean of `clipseg_iou_fg` and of the same ratio for the background.
    * `clipseg_ap`: area under the curve of precision and recall at 49 thresholds, by Simpson's rule.

    Args:
        probabilities: Counts, or maps of probabilities as in `PhraseCounts.update`.
        masks: True masks, as in `PhraseCounts.update`. None for counts.
        threshold: One of `THRESHOLDS`. Pixels with a probability above it are predicted.
        compat: "clipseg", to add the scores of CLIPSeg.
        subsets: Names of the subsets of each phrase. None for counts.

    Returns:
        The scores in [0, 1] and the counts. Scores that no phrase defines are NaN.

    Raises:
        ValueError: If no phrase is given, `threshold` or `compat` is unknown, or as in `PhraseCounts.update`.

    Example:
        >>> probabilities = torch.tensor([[[0.9, 0.8], [0.6, 0.1]], [[0.7, 0.2], [0.1, 0.1]]])
        >>> masks = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
        >>> scores = phrase_segmentation_scores(probabilities, masks, threshold=0.5)
        >>> round(scores["miou"], 4), scores["false_area"], scores["ap"]
        (0.6667, 0.25, 1.0)
    """
    if compat is not None and compat not in COMPAT:
        raise ValueError(f"compat={compat!r} is unknown. Choose one of: {', '.join(COMPAT)}.")
    column = int(np.abs(np.subtract(THRESHOLDS, threshold)).argmin())
    if not abs(THRESHOLDS[column] - threshold) < 1e-6:
        raise ValueError(f"threshold={threshold} is not supported. Expected one of 0.01, 0.02, ..., 0.99.")
    counts = _count(probabilities, masks, subsets)
    iou, intersection, union, area = counts._at(column)
    present = np.concatenate(counts._pixels)[:, 1].any(1)
    members: dict[str, list[int]] = {}
    for i in np.flatnonzero(present).tolist():
        for name in dict.fromkeys(("", *counts._subsets[i])):
            members.setdefault(name, []).append(i)
    scores: dict[str, float] = {}
    for name in sorted({"", *members}):
        rows, prefix = np.array(members.get(name, []), dtype=int), f"{name}_" if name else ""
        scores[f"{prefix}miou"] = _mean(iou[rows])
        scores[f"{prefix}cum_iou"] = float(intersection[rows].sum() / union[rows].sum()) if len(rows) else np.nan
        scores |= {f"{prefix}pr_{100 * least:.0f}": _mean(iou[rows] > least) for least in PRECISION_IOUS}
        if masks is None:
            scores[f"{prefix}ap"] = counts.average_precision(name)
        else:
            scores[f"{prefix}ap"] = average_precision([probabilities[i] for i in rows], [masks[i] for i in rows])
        scores[f"{prefix}phrases"] = float(len(rows))
    scores["false_area"] = _mean(area[~present])
    scores["absent_iou"] = _mean(iou[~present])
    scores["absent_auroc"] = _auroc(np.concatenate(counts._highest), present)
    scores["absent_phrases"] = float((~present).sum())
    scores["threshold"] = THRESHOLDS[column]
    return scores | (_clipseg_scores(counts.confusion(), column) if compat == "clipseg" else {})


def best_threshold(probabilities: PhraseCounts | Maps, masks: Maps | None = None) -> float:
    """Return the threshold with the highest mean IoU of the present phrases. Use validation data.

    Args:
        probabilities: Counts, or maps of probabilities as in `PhraseCounts.update`.
        masks: True masks, as in `PhraseCounts.update`. None for counts.

    Returns:
        One of `THRESHOLDS`: the smallest one, if several are equally good.

    Raises:
        ValueError: If no phrase is present, or as in `PhraseCounts.update`.

    Example:
        >>> best_threshold(torch.tensor([[[0.9, 0.4], [0.35, 0.1]]]), torch.tensor([[[1, 1], [0, 0]]]))
        0.35
    """
    counts = _count(probabilities, masks, None)
    confusion = counts.confusion()
    present = (confusion["tp"] + confusion["fn"])[:, 0] > 0
    if not present.any():
        raise ValueError(f"None of the {len(counts)} phrases is present. Expected masks with pixels.")
    tp, union = confusion["tp"][present], (confusion["tp"] + confusion["fp"] + confusion["fn"])[present]
    return THRESHOLDS[int((tp / union).mean(0).argmax())]


def average_precision(probabilities: Maps, masks: Maps) -> float:
    """Compute the average precision of all pixels, exactly: the pixels are sorted by their probabilities.

        AP = sum over the distinct probabilities v of (recall at v - recall above v) * precision at v

    Args:
        probabilities: Maps of probabilities, as in `PhraseCounts.update`.
        masks: True masks.

    Returns:
        The score in [0, 1], or NaN if no pixel belongs to a mask.

    Example:
        >>> average_precision(torch.tensor([[[0.9, 0.8, 0.7]]]), torch.tensor([[[1, 0, 1]]]))
        0.8333333333333333
    """
    pairs = [_flatten(one[None], mask[None]) for one, mask in zip(probabilities, masks, strict=True)]
    if not pairs:
        return float("nan")
    values, inside = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    values, order = values.sort(descending=True)
    _, number = values.unique_consecutive(return_inverse=True)
    cells = (2 * number + inside[order]).bincount(minlength=2 * int(number[-1]) + 2).view(-1, 2).cpu().numpy()
    return _average_precision(cells[:, 1], cells[:, 0])


def _count(
    probabilities: PhraseCounts | Maps, masks: Maps | None, subsets: Sequence[Iterable[str]] | None
) -> PhraseCounts:
    if isinstance(probabilities, PhraseCounts):
        if masks is not None or subsets is not None:
            raise ValueError(
                "masks and subsets are part of the counts already. Give them to PhraseCounts.update only."
            )
        return probabilities
    if masks is None:
        raise ValueError("masks is missing. Expected one mask per map of probabilities.")
    counts = PhraseCounts()
    counts.update(probabilities, masks, subsets=subsets)
    return counts


def _flatten(probabilities: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Validate maps of one size. Return probabilities, float32, and masks, int64, as (phrases, pixels)."""
    if probabilities.shape != masks.shape or masks.ndim != 3 or not masks[0].numel():
        raise ValueError(
            f"The probabilities have shape {tuple(probabilities.shape)} and the masks {tuple(masks.shape)}. Expected "
            "(phrases, height, width) for both: resize the probabilities to the masks."
        )
    if masks.device.type == "mps":  # MPS has no float64
        probabilities, masks = probabilities.cpu(), masks.cpu()
    values = probabilities.detach().float()
    lowest, highest = values.aminmax()
    if not (lowest >= 0 and highest <= 1):  # also for NaN
        raise ValueError(
            f"The probabilities are from {lowest.item():g} to {highest.item():g}. Expected values in [0, 1]: use "
            "logits.sigmoid()."
        )
    return values.flatten(1), (masks > 0.5).flatten(1).long()


def _name_size(part: float) -> str:
    return "s_small" if part < _SMALL else "s_large" if part > _LARGE else "s_mid"


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _average_precision(inside: np.ndarray, outside: np.ndarray) -> float:
    """Compute the average precision from the numbers of pixels of each value, from the highest value to the lowest."""
    if not inside.sum():
        return float("nan")
    tp = inside.cumsum()
    return float((inside / tp[-1] * (tp / np.maximum(tp + outside.cumsum(), 1))).sum())


def _auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Compute the probability that a positive score is above a negative one. Ties count one half."""
    if positive.all() or not positive.any():
        return float("nan")
    below = np.sort(scores[~positive])
    wins = [np.searchsorted(below, scores[positive], side=side).mean() for side in ("left", "right")]
    return float(sum(wins) / 2 / len(below))


def _clipseg_scores(confusion: dict[str, np.ndarray], column: int) -> dict[str, float]:
    """Compute the scores of `FixedIntervalMetrics` in the code of CLIPSeg."""
    tp, fp, fn, _ = (counts[:, column] for counts in confusion.values())
    total = {name: counts.sum(0) for name, counts in confusion.items()}
    foreground, background = (
        total[name][column] / (1 + total[name][column] + total["fp"][column] + total["fn"][column])
        for name in ("tp", "tn")
    )
    tps, fps, fns = (total[name][_CLIPSEG_THRESHOLDS] for name in ("tp", "fp", "fn"))
    drawn = tps + fps > 0
    curve = np.stack([tps / (1 + tps + fns), tps / (1 + tps + fps)], axis=1)[drawn]
    recalls, precisions = np.unique(curve, axis=0).T  # sorted by recall, without duplicates
    return {
        "clipseg_miou": float((tp / (1 + tp + fp + fn)).mean()),
        "clipseg_iou_fg": float(foreground),
        "clipseg_iou_bin": float((foreground + background) / 2),
        "clipseg_ap": _integrate(precisions, recalls),
    }


def _integrate(y: np.ndarray, x: np.ndarray) -> float:
    """Integrate by Simpson's rule as SciPy did in 2022: an even number of points is averaged over both ends."""
    from scipy.integrate import simpson  # takes half a second to import

    if len(y) < 2:
        return 0.0
    if len(y) % 2:
        return float(simpson(y, x=x))
    first, last = (x[1] - x[0]) * (y[0] + y[1]) / 2, (x[-1] - x[-2]) * (y[-1] + y[-2]) / 2
    return (_integrate(y[:-1], x[:-1]) + last + first + _integrate(y[1:], x[1:])) / 2
