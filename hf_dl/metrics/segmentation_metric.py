"""The scores of `hf_dl.metrics.segmentation` as a metric of the library `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from .segmentation import segmentation_scores


class SegmentationMetric(evaluate.Metric):
    """`segmentation_scores` as an `evaluate` metric, for masks of one size.

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
                raise ValueError(f"{name} has masks of sizes {sorted(sizes)}. Expected one size: resize them first.")
            masks.append(torch.from_numpy(np.stack(images)))
        return segmentation_scores(*masks, mask=mask)
