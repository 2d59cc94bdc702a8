"""Scores of unsupervised segmentation: adjusted Rand index, mean IoU and mean best overlap, for batches of masks.

A mask gives every pixel a segment number. The numbers of a prediction mean nothing by themselves (slots come in any
order), so every score compares the two partitions of the pixels through their contingency table
n[k, c] = number of pixels in predicted segment k and target segment c.

* Adjusted Rand index: Hubert & Arabie, "Comparing partitions", Journal of Classification 2, 1985.
* Foreground ARI: the ARI over the pixels that belong to an object (Greff et al., "Multi-object representation learning
  with iterative variational inference", ICML 2019). It does not see the background at all: perfect objects on a
  background cut in four score 1, so read it beside the ARI of all pixels.
* mIoU with optimal matching, and mean best overlap: Pont-Tuset et al., "Multiscale combinatorial grouping",
  TPAMI 2017, as used for slots by Seitzer et al., "Bridging the gap to real-world object-centric learning", ICLR 2023.

`hf_dl.metrics.spaces` publishes this file as it is, so it imports nothing of hf_dl.
"""

from collections.abc import Iterator
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# A chunk that stays in the cache is twice as fast on a CPU; a GPU wants few and large launches.
_PIXELS_PER_CHUNK = {"cpu": 2**19, "cuda": 2**24}
_SMALL_TABLE = 2**8
_MAX_CELLS = 2**24


def adjusted_rand_index(prediction: Tensor, target: Tensor, *, foreground_only: bool = False) -> Tensor:
    """Adjusted Rand index of every image (Hubert & Arabie 1985).

    With a_k and b_c the row and column sums of the contingency table n, N the number of pixels, and
    C2(x) = x (x - 1) / 2:

        ARI = (sum C2(n_kc) - E) / ((sum C2(a_k) + sum C2(b_c)) / 2 - E),   E = sum C2(a_k) sum C2(b_c) / C2(N)

    1 is the same partition, 0 is what random labels reach on average; negative values are possible. Two identical
    trivial partitions score 1, one segment against many scores 0, as in scikit-learn.

    Args:
        prediction: Predicted segment of every pixel, integers >= 0 in any order, (batch, height, width).
        target: True segment of every pixel, integers >= 0, 0 = background, same shape and device.
        foreground_only: Count only pixels whose target is not background. Images with fewer than two visible objects
            have no meaningful score (it would be 0 or 1 whatever the model does) and give NaN.

    Returns:
        The scores, (batch,) float64, on the device of the masks.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or a label is negative.

    Example:
        >>> target = torch.tensor([[[0, 0, 1], [2, 2, 1]]])
        >>> adjusted_rand_index(target + 5, target)
        tensor([1.], dtype=torch.float64)
    """
    chunks = _chunks(*_checked(prediction, target))
    return _ari(torch.cat([_sums(*_counts(*chunk, foreground_only)) for chunk in chunks], dim=1), foreground_only)


def segmentation_scores(predictions: Tensor, references: Tensor, *, mask: str = "decoder") -> dict[str, float]:
    """All segmentation scores of a set of images, each the mean over images of a score per image.

    The IoU of predicted segment k and target segment c is n_kc / (a_k + b_c - n_kc), over all pixels of the image.

    * `{mask}_ari`: ARI over all pixels, background included as one more segment. Mean over all images.
    * `{mask}_fg_ari`: ARI over the pixels of objects. Mean over the images with at least two visible objects.
    * `{mask}_miou`: IoU under the best one-to-one (Hungarian) matching of predicted to target segments, background
      included; averaged over the visible target segments of an image (unmatched ones count 0), then over all images.
    * `{mask}_fg_miou`: the same with only the objects as targets; mean over the images with a visible object.
    * `{mask}_mbo`: every visible object's best IoU with any predicted segment, which several objects may share;
      averaged over the objects of an image, then over the images with a visible object.
    * `images`: how many images there were.
    * `images_without_fg_ari`: how many of them had fewer than two visible objects.

    With several processes, gather the masks first and call this once: means of means weigh images unequally.

    Args:
        predictions: Predicted segment of every pixel, integers >= 0 in any order, (batch, height, width).
        references: True segment of every pixel, integers >= 0, 0 = background, same shape and device.
        mask: Which of a model's masks this is, for the keys: "decoder" (alpha masks), "attention", "posterior", ...

    Returns:
        The scores in [-1, 1] and the two counts. A score that no image allows is NaN.

    Raises:
        ValueError: If there is no image, shapes, dtypes or devices do not fit, a label is negative, or one image has
            too many segments to match.

    Example:
        >>> target = torch.tensor([[[0, 0, 1], [2, 2, 1]]])
        >>> segmentation_scores(target, target)["decoder_fg_ari"]
        1.0
    """
    predictions, references = _checked(predictions, references)
    if len(predictions) == 0:
        raise ValueError("predictions has no images; expected at least one (batch, height, width).")
    names = ("ari", "fg_ari", "miou", "fg_miou", "mbo")
    per_image = torch.cat([_scores(*chunk) for chunk in _chunks(predictions, references)], dim=1)
    scores = {f"{mask}_{name}": values.nanmean().item() for name, values in zip(names, per_image, strict=True)}
    return scores | {"images": float(len(predictions)), "images_without_fg_ari": float(per_image[1].isnan().sum())}


class SegmentationMetric(evaluate.Metric):
    """`segmentation_scores` as an `evaluate` metric; masks of one size, given at once or with `add_batch`.

    With several processes, gather predictions and references, and add them in the main process.

    Example:
        >>> metric = SegmentationMetric()
        >>> masks = torch.zeros(2, 8, 8, dtype=torch.long)
        >>> metric.add_batch(predictions=masks, references=masks)
        >>> metric.compute(mask="attention")["attention_ari"]
        1.0
    """

    def _info(self) -> evaluate.MetricInfo:
        labels = datasets.List(datasets.List(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Adjusted Rand index, mean IoU and mean best overlap of predicted segments.",
            citation="Hubert & Arabie, Comparing partitions, Journal of Classification 2, 1985.",
            inputs_description=segmentation_scores.__doc__,
            features=datasets.Features({"predictions": labels, "references": labels}),
        )

    def _compute(self, predictions: Any, references: Any, mask: str = "decoder") -> dict[str, float]:
        masks = []
        for name, images in (("predictions", predictions), ("references", references)):
            images = [np.array(image) for image in images]
            sizes = {image.shape for image in images}
            if len(sizes) > 1:
                raise ValueError(f"{name} has masks of sizes {sorted(sizes)}; expected one size. Resize them first.")
            masks.append(torch.from_numpy(np.stack(images)))
        return segmentation_scores(*masks, mask=mask)


def _checked(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Masks as (batch, pixels), or a sentence that says what is wrong with them."""
    for name, labels in (("prediction", prediction), ("target", target)):
        if not isinstance(labels, Tensor):
            raise ValueError(f"{name} is a {type(labels).__name__}; expected a tensor. Call torch.as_tensor first.")
        if labels.ndim != 3:
            raise ValueError(
                f"{name} has shape {tuple(labels.shape)}; expected (batch, height, width). "
                "Take the argmax over slots, or add the batch dimension with labels[None]."
            )
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"{name} has dtype {labels.dtype}; expected integers. Take the argmax, or call .long().")
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}; expected the same. "
            "Resize the prediction to the target."
        )
    if prediction.device != target.device:
        raise ValueError(f"prediction is on {prediction.device} and target on {target.device}; move them together.")
    return prediction.flatten(1), target.flatten(1)


def _chunks(prediction: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Cut (batch, pixels) labels into groups of images; yield both and the number of segments of each."""
    pixels = max(target.shape[1], _SMALL_TABLE)
    size = max(1, _PIXELS_PER_CHUNK.get(target.device.type, 2**20) // pixels)
    for chunk in zip(prediction.split(size), target.split(size), strict=True):
        counts = [_num_labels(name, labels) for name, labels in zip(("prediction", "target"), chunk, strict=True)]
        if counts[0] * counts[1] > pixels:
            chunk = [_relabeled(labels) for labels in chunk]
            counts = [int(labels.max()) + 1 for labels in chunk]
        # The worst image of a chunk sets the size of every table of the chunk.
        parts = len(chunk[0]) if len(chunk[0]) * counts[0] * counts[1] > _MAX_CELLS else 1
        for part in zip(*(labels.chunk(parts) for labels in chunk), strict=True):
            yield *part, *counts


def _num_labels(name: str, labels: Tensor) -> int:
    """One more than the highest label; refuses negative ones."""
    if labels.numel() == 0:
        return 1
    if labels.dtype == torch.int64 and labels.device.type == "cpu":  # torch takes twice as long for both ends
        highest = int(labels.numpy().view(np.uint64).max())  # where a negative label is huge
        if highest < 2**63:
            return highest + 1
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    if lowest < 0:
        raise ValueError(f"{name} holds the label {lowest}; expected labels >= 0. Number the segments from 0.")
    return int(highest) + 1


def _relabeled(labels: Tensor) -> Tensor:
    """Number the segments of each row 0, 1, 2, ... in order of their labels; 0 and only 0 stays 0."""
    ordered, order = labels.long().sort(dim=1)
    ranks = torch.zeros_like(ordered)
    ranks[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(dim=1)
    ranks += ordered[:, :1] > 0
    return torch.empty_like(ranks).scatter_(1, order, ranks)


def _table(prediction: Tensor, target: Tensor, rows: int, columns: int) -> Tensor:
    """Contingency tables (batch, rows, columns) int64 of labels (batch, pixels)."""
    (batch, pixels), device = target.shape, target.device
    # Neighboring pixels mostly fall into one cell, and each count of a cell waits for the one before: hence four
    # tables an image, taken in turn. Codes of two bytes instead of eight make the passes over them cheap.
    lanes, dtype = (4, torch.int16) if 4 * batch * rows * columns < 2**15 else (1, torch.int32)
    table = torch.arange(lanes, dtype=dtype, device=device).repeat(-(-pixels // lanes))[:pixels]
    table = table + torch.arange(batch, dtype=dtype, device=device)[:, None] * lanes
    code = torch.add(target.to(dtype), prediction.to(dtype), alpha=columns).add_(table, alpha=rows * columns)
    counts = code.flatten().bincount(minlength=batch * lanes * rows * columns)
    return counts.view(batch, lanes, rows, columns).sum(1)


def _counts(
    prediction: Tensor, target: Tensor, rows: int, columns: int, foreground_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of every cell, row and column of the contingency tables, (batch, any) int64 each."""
    first = int(foreground_only)
    if len(target) * rows * columns <= _MAX_CELLS:
        table = _table(prediction, target, rows, columns)[:, :, first:]
        return table.flatten(1), table.sum(2), table.sum(1)
    # A single image with so many segments has a nearly empty table: only its non-zero cells.
    prediction, target = prediction[target >= first], target[target >= first]
    codes = (prediction * columns + target, prediction, target)
    return tuple(code.unique(return_counts=True)[1][None] for code in codes)


def _sums(cells: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sums of squares of the three counts, the pixels, the visible target segments: (5, batch) int64."""
    squares = [counts.square().sum(1) for counts in (cells, rows, columns)]
    return torch.stack([*squares, columns.sum(1), (columns > 0).sum(1)])


def _ari(sums: Tensor, foreground_only: bool) -> Tensor:
    """ARI (batch,) float64 from `_sums`."""
    if sums.device.type == "mps":  # has no float64
        sums = sums.cpu()
    cells, rows, columns, pixels, segments = sums
    # Ordered pairs of pixels: together in both partitions, in the prediction only, in the target only, in neither.
    both, prediction_only, target_only = cells - pixels, rows - cells, columns - cells
    apart = pixels.square() - rows - columns + cells
    same = (prediction_only == 0) & (target_only == 0)
    # Their products overflow int64 from 256 x 256 pixels on.
    both, prediction_only, target_only, apart = (x.double() for x in (both, prediction_only, target_only, apart))
    denominator = (both + prediction_only) * (prediction_only + apart) + (both + target_only) * (target_only + apart)
    score = (2 * (both * apart - prediction_only * target_only) / denominator).masked_fill(same, 1.0)
    return score.masked_fill(segments < 2, torch.nan) if foreground_only else score


def _scores(prediction: Tensor, target: Tensor, rows: int, columns: int) -> Tensor:
    """The five scores of every image of a chunk, (5, batch) float64 on the CPU."""
    if len(target) * rows * columns > _MAX_CELLS:
        raise ValueError(
            f"an image has {rows} predicted and {columns} target segments; expected at most {_MAX_CELLS:,} pairs "
            "to match. Merge the small segments."
        )
    table = _table(prediction, target, rows, columns).cpu()
    objects = table[:, :, 1:]
    areas = table.sum(1)
    union = table.sum(2, keepdim=True) + areas[:, None] - table
    iou = table.double() / union.clamp(min=1)
    visible = (areas > 0).double()
    num_objects = visible[:, 1:].sum(1)
    best = iou[:, :, 1:].amax(1).sum(1)  # (batch,)
    return torch.stack(
        [
            _ari(_sums(table.flatten(1), table.sum(2), areas), False),
            _ari(_sums(objects.flatten(1), objects.sum(2), areas[:, 1:]), True),
            _matched(iou) / visible.sum(1),
            _matched(iou[:, :, 1:]) / num_objects,
            best / num_objects,
        ]
    )


def _matched(iou: Tensor) -> Tensor:
    """Sum of IoUs (batch,) under the one-to-one matching of rows to columns that makes it highest."""
    images = iou.numpy()
    return iou.new_tensor([image[linear_sum_assignment(image, maximize=True)].sum() for image in images])
