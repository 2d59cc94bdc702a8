"""The scores of `hf_dl.metrics.classification` as a metric of the library `evaluate`."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch

from .classification import classification_scores, confusion_matrix, top_k_accuracy


class ClassificationMetric(evaluate.Metric):
    """`classification_scores` as an `evaluate` metric, for predicted classes or for scores of all classes.

    For scores, `compute` also returns `top_{k}_accuracy`.

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
