"""Scores of classifiers: accuracy, top-k, precision, recall and F1, all from the confusion matrix.

With n[c, k] = how many examples of class c were taken for class k:

    precision of c = n[c, c] / sum_i n[i, c],   recall of c = n[c, c] / sum_k n[c, k]
    F1 of c = 2 n[c, c] / (sum_i n[i, c] + sum_k n[c, k])

Macro F1 is the mean of the F1 of the classes; micro F1 puts the sums over all classes into the formula and is the
accuracy where each example has one label. Everything equals scikit-learn's scores of the same name.

A confusion matrix can be added up over batches and processes. `hf_dl.metrics.spaces` publishes this file as it is, so
it imports nothing of hf_dl.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor


def confusion_matrix(predictions: Tensor, references: Tensor, *, num_classes: int | None = None) -> Tensor:
    """Count how many examples of each class were taken for each class.

    Args:
        predictions: Predicted classes, integers >= 0, (examples,).
        references: True classes, likewise, on the same device.
        num_classes: Number of classes; one more than the highest label where None.

    Returns:
        The counts, (true class, predicted class) int64.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or a label is out of range.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
        tensor([[1, 1],
                [0, 1]])
    """
    for name, labels in (("predictions", predictions), ("references", references)):
        if not isinstance(labels, Tensor) or labels.ndim != 1:
            shape = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"type {type(labels).__name__}"
            raise ValueError(f"{name} has {shape}; expected a tensor of class numbers (examples,).")
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"{name} has dtype {labels.dtype}; expected integers. Take the argmax, or call .long().")
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions has {len(predictions)} examples and references {len(references)}; expected as many."
        )
    if predictions.device != references.device:
        raise ValueError(f"predictions is on {predictions.device} and references on {references.device}; move one.")
    highest = -1
    for name, labels in (("predictions", predictions), ("references", references)):
        low, high = (int(end) for end in labels.aminmax()) if len(labels) else (0, -1)
        if low < 0 or (num_classes is not None and high >= num_classes):
            known = "0 or above" if num_classes is None else f"0 to {num_classes - 1}"
            raise ValueError(f"{name} holds the label {low if low < 0 else high}; expected {known}.")
        highest = max(highest, high)
    count = highest + 1 if num_classes is None else num_classes
    codes = references.long() * count + predictions.long()
    return codes.bincount(minlength=count * count).view(count, count)


def per_class_scores(confusion: Tensor) -> dict[str, Tensor]:
    """Precision, recall, F1 and number of examples of each class.

    Args:
        confusion: Counts (true class, predicted class).

    Returns:
        `precision`, `recall` and `f1`, float64 (classes,), 0 where nothing could be divided by; and `support`, the
        examples of each class, int64.

    Raises:
        ValueError: If the matrix is not a square of counts.

    Example:
        >>> per_class_scores(torch.tensor([[1, 1], [0, 1]]))["precision"]
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"confusion has shape {tuple(confusion.shape)}; expected (classes, classes).")
    right, predicted, support = confusion.diagonal().double(), confusion.sum(0), confusion.sum(1)
    return {
        "precision": right / predicted.clamp(min=1),
        "recall": right / support.clamp(min=1),
        "f1": 2 * right / (predicted + support).clamp(min=1),
        "support": support,
    }


def classification_scores(confusion: Tensor) -> dict[str, float]:
    """The scores of a confusion matrix.

    * `accuracy` and `error`: the part of the examples that is right, and its complement.
    * `micro_f1`: F1 of the sums over all classes.
    * `macro_f1`, `macro_precision`, `macro_recall`: means over the classes that occur, be it as a truth or as a
      prediction; classes of which there is no trace say nothing.
    * `images`: how many examples there were.

    Args:
        confusion: Counts (true class, predicted class), as of `confusion_matrix`.

    Returns:
        The scores in [0, 1], and the count.

    Raises:
        ValueError: If the matrix is not a square of counts, or empty.

    Example:
        >>> classification_scores(torch.tensor([[1, 1], [0, 1]]))["macro_recall"]
        0.75
    """
    classes = per_class_scores(confusion)
    total, right = int(confusion.sum()), int(confusion.diagonal().sum())
    if total == 0:
        raise ValueError("confusion counts no example; expected at least one.")
    occur = (confusion.sum(0) + confusion.sum(1)) > 0
    wrong = total - right  # each error is a false positive of one class and a false negative of another
    return {
        "accuracy": right / total,
        "error": wrong / total,
        "micro_f1": 2 * right / (2 * right + wrong + wrong),
        **{f"macro_{name}": classes[name][occur].mean().item() for name in ("f1", "precision", "recall")},
        "images": float(total),
    }


def top_k_accuracy(scores: Tensor, references: Tensor, *, k: int = 5) -> float:
    """The part of the examples whose class is among the k with the highest scores.

    Of equal scores that of the higher class counts as higher, as in scikit-learn.

    Args:
        scores: Logits or probabilities, (examples, classes).
        references: True classes, integers, (examples,).
        k: How many classes; at least all of them is always right.

    Returns:
        The accuracy in [0, 1].

    Raises:
        ValueError: If shapes do not fit, there is no example, a label is out of range, or a score is not a number.

    Example:
        >>> top_k_accuracy(torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1]]), torch.tensor([2, 2]), k=2)
        0.5
    """
    return top_k_hits(scores, references, k=k).double().mean().item()


def top_k_hits(scores: Tensor, references: Tensor, *, k: int = 5) -> Tensor:
    """Whether the class of each example is among its k highest scores: `top_k_accuracy` before the mean.

    Args:
        scores: Logits or probabilities, (examples, classes).
        references: True classes, integers, (examples,).
        k: How many classes.

    Returns:
        The hits, (examples,) bool.

    Raises:
        ValueError: As `top_k_accuracy`.

    Example:
        >>> top_k_hits(torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1]]), torch.tensor([2, 2]), k=2)
        tensor([ True, False])
    """
    if scores.ndim != 2 or scores.shape[:1] != references.shape or not len(scores):
        raise ValueError(
            f"scores has shape {tuple(scores.shape)} and references {tuple(references.shape)}; expected "
            "(examples, classes) and (examples,), with at least one example."
        )
    if k < 1:
        raise ValueError(f"k={k} is too small; ask for at least 1 class.")
    low, high = (int(end) for end in references.aminmax())
    if low < 0 or high >= scores.shape[1]:
        raise ValueError(
            f"references holds the label {low if low < 0 else high}; expected 0 to {scores.shape[1] - 1}."
        )
    if scores.isnan().any():
        raise ValueError("scores holds NaN, which has no order; look at the loss of the model.")
    own = scores.gather(1, references.long()[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (classes > references[:, None]))
    return before.sum(1) < k


class ClassificationMetric(evaluate.Metric):
    """`classification_scores` as an `evaluate` metric, for predicted classes or for scores of all classes.

    Given scores, `compute` adds `top_{k}_accuracy`.

    Example:
        >>> metric = ClassificationMetric()
        >>> metric.add_batch(predictions=[0, 1, 1], references=[0, 0, 1])
        >>> round(metric.compute()["accuracy"], 4)
        0.6667
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        kinds = (label, datasets.List(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description="Accuracy, error, micro and macro F1, macro precision and recall, top-k accuracy.",
            citation="Sokolova & Lapalme, A systematic analysis of performance measures, IPM 45, 2009.",
            inputs_description=classification_scores.__doc__,
            features=[datasets.Features({"predictions": kind, "references": label}) for kind in kinds],
        )

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[int], num_classes: int | None = None, k: int = 5
    ) -> dict[str, float]:
        given, references = torch.as_tensor(predictions), torch.as_tensor(references)
        classes = given.argmax(1) if given.ndim == 2 else given
        scores = classification_scores(confusion_matrix(classes, references, num_classes=num_classes))
        return scores | ({f"top_{k}_accuracy": top_k_accuracy(given, references, k=k)} if given.ndim == 2 else {})
