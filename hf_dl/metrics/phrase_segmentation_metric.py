"""The scores of `hf_dl.metrics.phrase_segmentation` as a metric of the library `evaluate`."""

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from .phrase_segmentation import phrase_segmentation_scores


class PhraseSegmentationMetric(evaluate.Metric):
    """`phrase_segmentation_scores` as an `evaluate` metric: predictions are probabilities, and references are masks.

    With several processes, gather predictions and references, and add them in the main process.

    Example:
        >>> metric = PhraseSegmentationMetric()
        >>> metric.add(predictions=[[0.9, 0.4], [0.1, 0.1]], references=[[1, 1], [0, 0]])
        >>> metric.compute(threshold=0.3)["miou"]
        1.0
    """

    def _info(self) -> evaluate.MetricInfo:
        maps = {"predictions": datasets.Value("float32"), "references": datasets.Value("uint8")}
        return evaluate.MetricInfo(
            description="Mean and cumulative IoU, precision at an IoU and average precision of masks for phrases.",
            citation="Wu et al., PhraseCut: Language-based image segmentation in the wild, CVPR 2020.",
            inputs_description=phrase_segmentation_scores.__doc__,
            features=datasets.Features({name: datasets.List(datasets.List(kind)) for name, kind in maps.items()}),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        threshold: float = 0.5,
        compat: str | None = None,
        subsets: Sequence[Iterable[str]] | None = None,
    ) -> dict[str, float]:
        maps = [[torch.as_tensor(np.array(rows)) for rows in given] for given in (predictions, references)]
        return phrase_segmentation_scores(*maps, threshold=threshold, compat=compat, subsets=subsets)
