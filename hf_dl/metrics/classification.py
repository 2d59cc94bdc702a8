"""Scores of classifiers from the confusion matrix: accuracy, precision, recall and F1; and top-k accuracy.

With n[c, k] = number of examples of class c that were classified as k:

    precision of c = n[c, c] / sum_i n[i, c],   recall of c = n[c, c] / sum_k n[c, k]
    F1 of c = 2 n[c, c] / (sum_i n[i, c] + sum_k n[c, k])

Macro F1 is the mean F1 of the classes. Micro F1 uses the sums over all classes in the formula, and equals the accuracy
if each example has one label. All scores equal the scores of scikit-learn with the same name.

Confusion matrices of batches and processes can be added. `hf_dl.metrics.spaces` publishes a copy of this file, so this
file must not import hf_dl.
"""

import torch
from torch import Tensor


def confusion_matrix(predictions: Tensor, references: Tensor, *, num_classes: int | None = None) -> Tensor:
    """Count the examples of each pair of true and predicted class.

    Args:
        predictions: Predicted classes, integers >= 0, (examples,).
        references: True classes, of the same shape and on the same device.
        num_classes: Number of classes. Defaults to the highest label plus one.

    Returns:
        Counts, (true class, predicted class) int64.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or a label is out of range.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
        tensor([[1, 1],
                [0, 1]])
    """
    for name, labels in (("predictions", predictions), ("references", references)):
        if not isinstance(labels, Tensor) or labels.ndim != 1:
            shape = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"type {type(labels).__name__}"
            raise ValueError(f"{name} has {shape}. Expected a tensor of class indices (examples,).")
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"{name} has dtype {labels.dtype}. Expected integers: use argmax or .long().")
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions has {len(predictions)} examples and references {len(references)}. Expected the same number."
        )
    if predictions.device != references.device:
        raise ValueError(
            f"predictions is on {predictions.device} and references on {references.device}. Expected the same device."
        )
    highest = -1
    for name, labels in (("predictions", predictions), ("references", references)):
        low, high = (int(end) for end in labels.aminmax()) if len(labels) else (0, -1)
        if low < 0 or (num_classes is not None and high >= num_classes):
            known = "0 or above" if num_classes is None else f"0 to {num_classes - 1}"
            raise ValueError(f"{name} has the label {low if low < 0 else high}. Expected {known}.")
        highest = max(highest, high)
    count = highest + 1 if num_classes is None else num_classes
    codes = references.long() * count + predictions.long()
    return codes.bincount(minlength=count * count).view(count, count)


def per_class_scores(confusion: Tensor) -> dict[str, Tensor]:
    """Compute precision, recall, F1 and number of examples of each class.

    Args:
        confusion: Counts (true class, predicted class).

    Returns:
        `precision`, `recall` and `f1`, float64 (classes,), which are 0 if their denominator is 0; and `support`, the
        number of examples of each class, int64.

    Raises:
        ValueError: If the matrix is not square.

    Example:
        >>> per_class_scores(torch.tensor([[1, 1], [0, 1]]))["precision"]
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"confusion has shape {tuple(confusion.shape)}. Expected (classes, classes).")
    right, predicted, support = confusion.diagonal().double(), confusion.sum(0), confusion.sum(1)
    return {
        "precision": right / predicted.clamp(min=1),
        "recall": right / support.clamp(min=1),
        "f1": 2 * right / (predicted + support).clamp(min=1),
        "support": support,
    }


def classification_scores(confusion: Tensor) -> dict[str, float]:
    """Compute the scores of a confusion matrix.

    * `accuracy` and `error`: share of correct examples, and of wrong examples.
    * `micro_f1`: F1 of the sums over all classes.
    * `macro_f1`, `macro_precision`, `macro_recall`: means over the classes that occur as true or predicted class.
    * `images`: number of examples.

    Args:
        confusion: Counts (true class, predicted class) from `confusion_matrix`.

    Returns:
        The scores in [0, 1], and the count.

    Raises:
        ValueError: If the matrix is not square, or its counts are all 0.

    Example:
        >>> classification_scores(torch.tensor([[1, 1], [0, 1]]))["macro_recall"]
        0.75
    """
    classes = per_class_scores(confusion)
    total, right = int(confusion.sum()), int(confusion.diagonal().sum())
    if total == 0:
        raise ValueError("confusion has no examples. Expected at least one.")
    occur = (confusion.sum(0) + confusion.sum(1)) > 0
    wrong = total - right  # an error is a false positive of one class and a false negative of another
    return {
        "accuracy": right / total,
        "error": wrong / total,
        "micro_f1": 2 * right / (2 * right + wrong + wrong),
        **{f"macro_{name}": classes[name][occur].mean().item() for name in ("f1", "precision", "recall")},
        "images": float(total),
    }


def top_k_accuracy(scores: Tensor, references: Tensor, *, k: int = 5) -> float:
    """Compute the share of examples whose true class is among the k highest scores.

    Ties are resolved in favor of the higher class, as in scikit-learn.

    Args:
        scores: Logits or probabilities, (examples, classes).
        references: True classes, integers, (examples,).
        k: Number of classes that count.

    Returns:
        The accuracy in [0, 1].

    Raises:
        ValueError: If shapes do not match, `scores` is empty, a label is out of range, or a score is NaN.

    Example:
        >>> top_k_accuracy(torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1]]), torch.tensor([2, 2]), k=2)
        0.5
    """
    return top_k_hits(scores, references, k=k).double().mean().item()


def top_k_hits(scores: Tensor, references: Tensor, *, k: int = 5) -> Tensor:
    """Return whether the true class of each example is among its k highest scores.

    Args:
        scores: Logits or probabilities, (examples, classes).
        references: True classes, integers, (examples,).
        k: Number of classes that count.

    Returns:
        The hits, (examples,) bool. Their mean is `top_k_accuracy`.

    Raises:
        ValueError: As in `top_k_accuracy`.

    Example:
        >>> top_k_hits(torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1]]), torch.tensor([2, 2]), k=2)
        tensor([ True, False])
    """
    if scores.ndim != 2 or scores.shape[:1] != references.shape or not len(scores):
        raise ValueError(
            f"scores has shape {tuple(scores.shape)} and references {tuple(references.shape)}. Expected "
            "(examples, classes) and (examples,), with at least one example."
        )
    if k < 1:
        raise ValueError(f"k={k} must be at least 1.")
    low, high = (int(end) for end in references.aminmax())
    if low < 0 or high >= scores.shape[1]:
        raise ValueError(f"references has the label {low if low < 0 else high}. Expected 0 to {scores.shape[1] - 1}.")
    if scores.isnan().any():
        raise ValueError("scores has NaN values, which have no order. Check the loss of the model.")
    own = scores.gather(1, references.long()[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (classes > references[:, None]))
    return before.sum(1) < k
