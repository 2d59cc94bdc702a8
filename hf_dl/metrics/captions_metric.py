"""The scores of `hf_dl.metrics.captions` as a metric of the library `evaluate`."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from .captions import caption_scores


class CaptionMetric(evaluate.Metric):
    """`caption_scores` as an `evaluate` metric: one caption and a list of references per image.

    Example:
        >>> metric = CaptionMetric()
        >>> metric.add(prediction="a red cube", reference=["a red cube.", "a cube that is red."])
        >>> round(metric.compute()["rouge_l"], 4)
        1.0
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D of captions, as the COCO evaluation computes them.",
            citation="Chen et al., Microsoft COCO captions: Data collection and evaluation server, 2015.",
            inputs_description=caption_scores.__doc__,
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def _compute(self, predictions: Any, references: Any, tokenized: bool = False) -> dict[str, float]:
        words: dict[str, Any] = {"tokenize": str.split} if tokenized else {}
        texts: Sequence[Sequence[str]] = [list(row) for row in references]
        return caption_scores(list(predictions), texts, **words)
