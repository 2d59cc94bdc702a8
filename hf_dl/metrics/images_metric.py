"""The scores of `hf_dl.metrics.images` as a metric of the library `evaluate`."""

from typing import Any

import datasets
import evaluate
from torch import nn

from .images import FEATURES, default_features, fid


class FrechetDistance(evaluate.Metric):
    """`fid` as an `evaluate` metric. Predictions are generated images, and references the same number of real images.

    Images are PIL images or uint8 arrays (height, width, 3). `features` is an extractor, or its name in `FEATURES`.
    Defaults to `default_features()`.

    Example:
        >>> from PIL import Image
        >>> from hf_dl.metrics.images import RandomConvFeatures
        >>> metric = FrechetDistance()
        >>> images = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in range(4)]
        >>> scores = metric.compute(predictions=images, references=images, features=RandomConvFeatures())
        >>> round(abs(scores["fid_random_conv_v1"]), 6), scores["fake_images"]
        (0.0, 4.0)
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fréchet distance between the features of generated and real images.",
            citation="Heusel et al., GANs trained by a two time-scale update rule, NeurIPS 2017.",
            inputs_description=fid.__doc__,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions: Any, references: Any, features: nn.Module | str | None = None) -> dict[str, float]:
        if isinstance(features, str):
            if features not in FEATURES:
                raise ValueError(f"features={features!r} is unknown. Choose one of: {', '.join(FEATURES)}.")
            features = FEATURES[features]()
        return fid(references, predictions, features=features or default_features())
