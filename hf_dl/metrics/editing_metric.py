"""The scores of `hf_dl.metrics.editing` as a metric of the library `evaluate`."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from .editing import ATTRIBUTES, Probe, editing_scores, identity_scores


class EditingMetric(evaluate.Metric):
    """`editing_scores` and `identity_scores` as an `evaluate` metric, for images of one size.

    Images are PIL images or uint8 arrays (height, width, 3). Masks are PIL images or uint8 arrays (height, width),
    nonzero on the object. `objects`, the records of `identity_scores`, are optional and need a `probe`.

    Example:
        >>> metric = EditingMetric()
        >>> before, truth = np.zeros((2, 16, 16, 3), np.uint8)
        >>> truth[4:8, 4:8] = 200
        >>> inputs = {"references": [truth], "images": [before]}
        >>> inputs |= {"masks_before": [np.zeros((16, 16), np.uint8)], "masks_after": [truth[..., 0]]}
        >>> metric.compute(predictions=[truth], **inputs)["success"]
        1.0
        >>> metric.compute(predictions=[before], **inputs)["success"]
        0.0
    """

    def _info(self) -> evaluate.MetricInfo:
        names = ("predictions", "references", "images", "masks_before", "masks_after")
        pictures = {name: datasets.Image() for name in names}
        record = {
            "box": datasets.List(datasets.Value("int32")),
            **{name: datasets.Value("string") for name in ATTRIBUTES},
            "edited": datasets.Value("bool"),
        }
        return evaluate.MetricInfo(
            description="Success, error and PSNR of image edits against rendered truths; identity of the objects.",
            citation="hf_dl: edits of generated scenes with a rendered ground truth.",
            inputs_description=editing_scores.__doc__,
            features=[
                datasets.Features(pictures),
                datasets.Features({**pictures, "objects": datasets.List(record)}),
            ],
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        images: Any,
        masks_before: Any,
        masks_after: Any,
        objects: Any = None,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        probe: Probe | None = None,
    ) -> dict[str, float]:
        if (objects is None) != (probe is None):
            raise ValueError("objects and probe belong together. Give both, or none of them.")
        given = {"predictions": predictions, "references": references, "images": images}
        pictures = {name: _stack(name, values, "RGB").movedim(-1, 1) for name, values in given.items()}
        given = {"masks_before": masks_before, "masks_after": masks_after}
        masks = {name: _stack(name, values, "L") > 0 for name, values in given.items()}
        scores = editing_scores(**pictures, **masks, distance=distance)
        return scores if probe is None else scores | identity_scores(pictures["predictions"], objects, probe)


def _stack(name: str, images: Any, mode: str) -> Tensor:
    arrays = [np.asarray(image.convert(mode)) for image in images]
    sizes = {array.shape[1::-1] for array in arrays}
    if len(sizes) > 1:
        raise ValueError(f"{name} has images of sizes {sorted(sizes)}. Expected one size: resize them first.")
    return torch.from_numpy(np.stack(arrays))
