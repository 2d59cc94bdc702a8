"""The scores of `hf_dl.metrics.detection` as a metric of the library `evaluate`."""

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate

from .detection import detection_scores

_OPTIONAL = ("area", "iscrowd", "difficult")


def _plain(row: Mapping[str, Any], optional: tuple[str, ...] = ()) -> dict[str, list | None]:
    """Return the row with lists instead of tensors and arrays, and None for missing optional keys."""
    lists = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}
    return dict.fromkeys(optional) | lists


class DetectionMetric(evaluate.Metric):
    """`detection_scores` as an `evaluate` metric: one dictionary of boxes per image.

    With several processes, gather predictions and references, and add them in the main process.

    Example:
        >>> metric = DetectionMetric()
        >>> metric.add(
        ...     prediction={"boxes": [[0, 0, 10, 10]], "scores": [0.9], "labels": [1]},
        ...     reference={"boxes": [[0, 0, 10, 9]], "labels": [1]},
        ... )
        >>> metric.compute(protocol="voc10")["map_50"]
        1.0
    """

    def _info(self) -> evaluate.MetricInfo:
        boxes = datasets.List(datasets.List(datasets.Value("float64")))
        numbers, labels = datasets.List(datasets.Value("float64")), datasets.List(datasets.Value("int64"))
        features = {
            "predictions": {"boxes": boxes, "scores": numbers, "labels": labels},
            "references": {
                "boxes": boxes, "labels": labels, "area": numbers, "iscrowd": labels, "difficult": labels,
            },
        }  # fmt: skip
        return evaluate.MetricInfo(
            description="Mean average precision of boxes as COCO and PASCAL VOC define it, and mean recall.",
            citation="Lin et al., Microsoft COCO: Common objects in context, ECCV 2014.",
            inputs_description=detection_scores.__doc__,
            features=datasets.Features(features),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one image. The keys `area`, `iscrowd` and `difficult` of the reference are optional."""
        super().add(prediction=_plain(prediction), reference=_plain(reference, _OPTIONAL), **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add several images. The keys `area`, `iscrowd` and `difficult` of the references are optional."""
        references = [_plain(row, _OPTIONAL) for row in references]
        super().add_batch(predictions=[_plain(row) for row in predictions], references=references, **kwargs)

    def _compute(self, predictions: Any, references: Any, protocol: str = "coco") -> dict[str, float]:
        return detection_scores(predictions, references, protocol=protocol)
