"""Scores of unsupervised segmentation for batches of masks: adjusted Rand index, mean IoU and mean best overlap.

A mask assigns a segment index to each pixel. The order of predicted segments is arbitrary: slots have no order. All
scores therefore compare the two partitions of the pixels by their contingency table
n[k, c] = number of pixels in predicted segment k and target segment c.

* Adjusted Rand index (ARI): Hubert & Arabie, "Comparing partitions", Journal of Classification 2, 1985.
* Foreground ARI: the ARI over the pixels of objects (Greff et al., "Multi-object representation learning with
  iterative variational inference", ICML 2019). It ignores the background: perfect objects on a background in four
  segments score 1. Read it together with the ARI over all pixels.
* Mean IoU with optimal matching, and mean best overlap: Pont-Tuset et al., "Multiscale combinatorial grouping", TPAMI
  2017. Seitzer et al., "Bridging the gap to real-world object-centric learning", ICLR 2023, use them for slots.

`hf_dl.metrics.spaces` publishes a copy of this file, so this file must not import hf_dl.
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# a CPU is twice as fast with chunks that fit into its cache; a GPU is faster with few large chunks
_PIXELS_PER_CHUNK = {"cpu": 2**19, "cuda": 2**24}
_SMALL_TABLE = 2**8
_MAX_CELLS = 2**24


def adjusted_rand_index(prediction: Tensor, target: Tensor, *, foreground_only: bool = False) -> Tensor:
    """Compute the adjusted Rand index of each image (Hubert & Arabie 1985).

    With a_k and b_c the row and column sums of the contingency table n, N the number of pixels, and
    C2(x) = x (x - 1) / 2:

        ARI = (sum C2(n_kc) - E) / ((sum C2(a_k) + sum C2(b_c)) / 2 - E),   E = sum C2(a_k) sum C2(b_c) / C2(N)

    Equal partitions score 1, and random labels score 0 on average. Negative scores are possible. As in scikit-learn,
    two equal trivial partitions score 1, and one segment against several scores 0.

    Args:
        prediction: Predicted segment of each pixel, integers >= 0 in any order, (batch, height, width).
        target: True segment of each pixel, integers >= 0, 0 = background, same shape and device.
        foreground_only: Whether to ignore pixels of the background of the target. Images with fewer than two visible
            objects then have the score NaN, because it would be 0 or 1 for any prediction.

    Returns:
        The scores, (batch,) float64, on the device of the masks.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or a label is negative.

    Example:
        >>> target = torch.tensor([[[0, 0, 1], [2, 2, 1]]])
        >>> adjusted_rand_index(target + 5, target)
        tensor([1.], dtype=torch.float64)
    """
    chunks = _chunks(*_checked(prediction, target))
    return _ari(torch.cat([_sums(*_counts(*chunk, foreground_only)) for chunk in chunks], dim=1), foreground_only)


def segmentation_scores(predictions: Tensor, references: Tensor, *, mask: str = "decoder") -> dict[str, float]:
    """Compute all segmentation scores of a set of images. Each is the mean of scores per image.

    The IoU of predicted segment k and target segment c is n_kc / (a_k + b_c - n_kc), over all pixels of the image.

    * `{mask}_ari`: ARI over all pixels, with the background as an additional segment. Mean over all images.
    * `{mask}_fg_ari`: ARI over the pixels of objects. Mean over the images with at least two visible objects.
    * `{mask}_miou`: IoU under the best one-to-one (Hungarian) matching of predicted to target segments, with the
      background. Mean over the visible target segments of an image (unmatched segments count as 0), then over images.
    * `{mask}_fg_miou`: the same with objects as the only targets. Mean over the images with a visible object.
    * `{mask}_mbo`: highest IoU of each visible object with any predicted segment. Several objects may share a
      segment. Mean over the objects of an image, then over the images with a visible object.
    * `images`: number of images.
    * `images_without_fg_ari`: number of images with fewer than two visible objects.

    With several processes, gather the masks first and call this function once. The mean of the means of the processes
    is not the mean over images.

    Args:
        predictions: Predicted segment of each pixel, integers >= 0 in any order, (batch, height, width).
        references: True segment of each pixel, integers >= 0, 0 = background, same shape and device.
        mask: Name of the masks in the keys: "decoder" (alpha masks), "attention", "posterior", ...

    Returns:
        The scores in [-1, 1] and the two counts. A score that is undefined for all images is NaN.

    Raises:
        ValueError: If `predictions` is empty, shapes, dtypes or devices do not match, a label is negative, or an image
            has too many segments to match.

    Example:
        >>> target = torch.tensor([[[0, 0, 1], [2, 2, 1]]])
        >>> segmentation_scores(target, target)["decoder_fg_ari"]
        1.0
    """
    predictions, references = _checked(predictions, references)
    if len(predictions) == 0:
        raise ValueError("predictions has no images. Expected at least one (batch, height, width).")
    names = ("ari", "fg_ari", "miou", "fg_miou", "mbo")
    per_image = torch.cat([_scores(*chunk) for chunk in _chunks(predictions, references)], dim=1)
    scores = {f"{mask}_{name}": values.nanmean().item() for name, values in zip(names, per_image, strict=True)}
    return scores | {"images": float(len(predictions)), "images_without_fg_ari": float(per_image[1].isnan().sum())}


def _checked(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Validate the masks and return them as (batch, pixels)."""
    for name, labels in (("prediction", prediction), ("target", target)):
        if not isinstance(labels, Tensor):
            raise ValueError(f"{name} is a {type(labels).__name__}. Expected a tensor: call torch.as_tensor first.")
        if labels.ndim != 3:
            raise ValueError(
                f"{name} has shape {tuple(labels.shape)}. Expected (batch, height, width). Use argmax over the slots, "
                "or add the batch dimension with labels[None]."
            )
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"{name} has dtype {labels.dtype}. Expected integers: use argmax or .long().")
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}. Expected the same "
            "shape: resize the prediction."
        )
    if prediction.device != target.device:
        raise ValueError(f"prediction is on {prediction.device} and target on {target.device}. Expected one device.")
    return prediction.flatten(1), target.flatten(1)


def _chunks(prediction: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Split labels (batch, pixels) into groups of images. Yield both labels and their numbers of segments."""
    pixels = max(target.shape[1], _SMALL_TABLE)
    size = max(1, _PIXELS_PER_CHUNK.get(target.device.type, 2**20) // pixels)
    for chunk in zip(prediction.split(size), target.split(size), strict=True):
        counts = [_num_labels(name, labels) for name, labels in zip(("prediction", "target"), chunk, strict=True)]
        if counts[0] * counts[1] > pixels:
            chunk = [_relabeled(labels) for labels in chunk]
            counts = [int(labels.max()) + 1 for labels in chunk]
        # the image with the most segments determines the table size of its chunk
        parts = len(chunk[0]) if len(chunk[0]) * counts[0] * counts[1] > _MAX_CELLS else 1
        for part in zip(*(labels.chunk(parts) for labels in chunk), strict=True):
            yield *part, *counts


def _num_labels(name: str, labels: Tensor) -> int:
    """Return the highest label plus one. Raise ValueError for negative labels."""
    if labels.numel() == 0:
        return 1
    if labels.dtype == torch.int64 and labels.device.type == "cpu":  # twice as fast as aminmax
        highest = int(labels.numpy().view(np.uint64).max())  # as unsigned, negative labels are at least 2**63
        if highest < 2**63:
            return highest + 1
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    if lowest < 0:
        raise ValueError(f"{name} has the label {lowest}. Expected labels >= 0.")
    return int(highest) + 1


def _relabeled(labels: Tensor) -> Tensor:
    """Renumber the segments of each row as 0, 1, 2, ... in order of their labels. 0 is used for label 0 only."""
    ordered, order = labels.long().sort(dim=1)
    ranks = torch.zeros_like(ordered)
    ranks[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(dim=1)
    ranks += ordered[:, :1] > 0
    return torch.empty_like(ranks).scatter_(1, order, ranks)


def _table(prediction: Tensor, target: Tensor, rows: int, columns: int) -> Tensor:
    """Compute contingency tables (batch, rows, columns) int64 of labels (batch, pixels)."""
    (batch, pixels), device = target.shape, target.device
    # Neighboring pixels often count in the same cell, and each count waits for the previous one. Four alternating
    # tables per image avoid this. Codes of two bytes instead of eight are also faster.
    lanes, dtype = (4, torch.int16) if 4 * batch * rows * columns < 2**15 else (1, torch.int32)
    table = torch.arange(lanes, dtype=dtype, device=device).repeat(-(-pixels // lanes))[:pixels]
    table = table + torch.arange(batch, dtype=dtype, device=device)[:, None] * lanes
    code = torch.add(target.to(dtype), prediction.to(dtype), alpha=columns).add_(table, alpha=rows * columns)
    counts = code.flatten().bincount(minlength=batch * lanes * rows * columns)
    return counts.view(batch, lanes, rows, columns).sum(1)


def _counts(
    prediction: Tensor, target: Tensor, rows: int, columns: int, foreground_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Count the pixels of all cells, rows and columns of the contingency tables, (batch, any) int64 each."""
    first = int(foreground_only)
    if len(target) * rows * columns <= _MAX_CELLS:
        table = _table(prediction, target, rows, columns)[:, :, first:]
        return table.flatten(1), table.sum(2), table.sum(1)
    # the table of one image with so many segments is nearly empty: count its non-zero cells only
    prediction, target = prediction[target >= first], target[target >= first]
    codes = (prediction * columns + target, prediction, target)
    return tuple(code.unique(return_counts=True)[1][None] for code in codes)


def _sums(cells: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return sums of squares of the three counts, pixels, and visible target segments: (5, batch) int64."""
    squares = [counts.square().sum(1) for counts in (cells, rows, columns)]
    return torch.stack([*squares, columns.sum(1), (columns > 0).sum(1)])


def _ari(sums: Tensor, foreground_only: bool) -> Tensor:
    """Compute the ARI (batch,) float64 from `_sums`."""
    if sums.device.type == "mps":  # MPS has no float64
        sums = sums.cpu()
    cells, rows, columns, pixels, segments = sums
    # ordered pairs of pixels in one segment: of both partitions, of the prediction only, of the target only, of none
    both, prediction_only, target_only = cells - pixels, rows - cells, columns - cells
    apart = pixels.square() - rows - columns + cells
    same = (prediction_only == 0) & (target_only == 0)
    # products would overflow int64 from 256 x 256 pixels on
    both, prediction_only, target_only, apart = (x.double() for x in (both, prediction_only, target_only, apart))
    denominator = (both + prediction_only) * (prediction_only + apart) + (both + target_only) * (target_only + apart)
    score = (2 * (both * apart - prediction_only * target_only) / denominator).masked_fill(same, 1.0)
    return score.masked_fill(segments < 2, torch.nan) if foreground_only else score


def _scores(prediction: Tensor, target: Tensor, rows: int, columns: int) -> Tensor:
    """Compute the five scores of each image of a chunk, (5, batch) float64 on the CPU."""
    if len(target) * rows * columns > _MAX_CELLS:
        raise ValueError(
            f"an image has {rows} predicted and {columns} target segments. Expected at most {_MAX_CELLS:,} pairs. "
            "Merge small segments."
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
    """Return the sum of IoUs (batch,) under the best one-to-one matching of rows and columns."""
    images = iou.numpy()
    return iou.new_tensor([image[linear_sum_assignment(image, maximize=True)].sum() for image in images])
