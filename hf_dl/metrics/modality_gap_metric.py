"""The scores of `hf_dl.metrics.modality_gap` as a metric of the library `evaluate`."""

from collections.abc import Hashable, Sequence

import datasets
import evaluate
import torch

from .modality_gap import modality_gap_scores


class ModalityGapMetric(evaluate.Metric):
    """`modality_gap_scores` as an `evaluate` metric.

    Example:
        >>> metric = ModalityGapMetric()
        >>> metric.add_batch(image_embeds=[[1.0, 0.0, 0.0, 0.0]], text_embeds=[[0.0, 0.0, 1.0, 0.0]])
        >>> metric.add_batch(image_embeds=[[0.0, 1.0, 0.0, 0.0]], text_embeds=[[0.0, 0.0, 0.0, 1.0]])
        >>> metric.compute()["rmg"]
        0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        embedding = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="Distance of centroids and pairs, relative modality gap, linear separability and cone widths.",
            citation="Liang et al., Mind the gap, NeurIPS 2022. Schrodi et al., Two effects, one trigger, ICLR 2025.",
            inputs_description=modality_gap_scores.__doc__,
            features=datasets.Features({"image_embeds": embedding, "text_embeds": embedding}),
        )

    def _compute(
        self,
        image_embeds: Sequence[Sequence[float]],
        text_embeds: Sequence[Sequence[float]],
        ids: Sequence[Hashable] | None = None,
        seed: int = 0,
    ) -> dict[str, float]:
        tensors = [torch.tensor(embeds, dtype=torch.float64) for embeds in (image_embeds, text_embeds)]
        return modality_gap_scores(*tensors, ids=ids, seed=seed)
