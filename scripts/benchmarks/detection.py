"""Compare the time of average precision with pycocotools and torchmetrics, on 5,000 images with 20 boxes each.

    scripts/run --group benchmark python scripts/benchmarks/detection.py --output model_cards/benchmark_detection.json

The result is the CPU time of one thread, the minimum of interleaved repetitions. All compute the twelve scores of
COCO. The index of pycocotools is made before its time is measured. torchmetrics makes it in `compute`, from tensors
that are made before. Without torchmetrics, the comparison leaves it out. It takes two minutes, and half a minute
without torchmetrics.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_dl.metrics.detection import coco_scores
from hf_dl.training.errors import explain_errors

NUM_IMAGES, NUM_BOXES, NUM_CLASSES = 5000, 20, 3
SCORES = [  # in the order of pycocotools
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
]


def make_boxes(num_images: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return random detections and objects, `NUM_BOXES` of each per image."""
    draw = np.random.default_rng(0)
    corners = draw.uniform(0, 400, (num_images, NUM_BOXES, 2))
    boxes = np.concatenate([corners, corners + draw.uniform(8, 120, corners.shape)], axis=-1)
    moved = boxes + draw.normal(0, 4, boxes.shape)
    moved[..., 2:] = np.maximum(moved[..., 2:], moved[..., :2] + 1)
    labels = draw.integers(0, NUM_CLASSES, (num_images, NUM_BOXES))
    confused = np.where(draw.random(labels.shape) < 0.1, (labels + 1) % NUM_CLASSES, labels)
    scores = draw.random(labels.shape)
    found = [{"boxes": b, "labels": k, "scores": s} for b, k, s in zip(moved, confused, scores, strict=True)]
    return found, [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]


def to_coco(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return the index of pycocotools for detections or objects."""
    from pycocotools.coco import COCO

    coco, annotations = COCO(), []
    for image, row in enumerate(rows):
        for number, (x0, y0, x1, y1) in enumerate(row["boxes"].tolist()):
            item = {"image_id": image, "category_id": int(row["labels"][number]), "id": len(annotations) + 1}
            item |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            annotations.append(item | ({"score": float(row["scores"][number])} if "scores" in row else {}))
    images = [{"id": image} for image in range(len(rows))]
    categories = [{"id": label} for label in range(NUM_CLASSES)]
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    return coco


def run_pycocotools(found: Any, truth: Any) -> np.ndarray:
    """Return the twelve scores. The indices are made before, so their time does not count."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def run_torchmetrics(found: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the twelve scores in the order of pycocotools, from detections and objects as tensors."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision()
    metric.update(found, truth)
    scores = metric.compute()
    return np.array([float(scores[name]) for name in SCORES])


def compare_metric(*, num_images: int = NUM_IMAGES, repetitions: int = 3) -> dict[str, float]:
    """Return the CPU seconds of our scores and the peers, the minimum of interleaved repetitions.

    Args:
        num_images: Number of images.
        repetitions: Number of repetitions.

    Returns:
        The seconds, our seconds as a share of each peer's, and the largest difference between the scores. torchmetrics
        rounds its scores to single precision. It is left out if it is not installed.

    Raises:
        ImportError: If pycocotools is missing.
    """
    try:
        import pycocotools  # noqa: F401
    except ModuleNotFoundError:
        command = "scripts/run --group benchmark python scripts/benchmarks/detection.py"
        raise ImportError(f"The package pycocotools is missing. Run `{command}`.") from None
    found, truth = make_boxes(num_images)
    with contextlib.redirect_stdout(io.StringIO()):
        indices = to_coco(found), to_coco(truth)
    methods = {
        "ours": lambda: list(coco_scores(found, truth).values()),
        "pycocotools": lambda: run_pycocotools(*indices),
    }
    if importlib.util.find_spec("torchmetrics") is not None:
        tensors = [
            [{key: torch.as_tensor(value) for key, value in row.items()} for row in rows] for rows in (found, truth)
        ]
        methods["torchmetrics"] = lambda: run_torchmetrics(*tensors)
    seconds, scores = {name: [] for name in methods}, {}
    for _ in range(repetitions):
        for name, method in methods.items():
            begin = time.process_time()
            scores[name] = np.asarray(method())
            seconds[name].append(time.process_time() - begin)
    best = {name: min(values) for name, values in seconds.items()}
    result = {"images": num_images, "boxes_per_image": NUM_BOXES, "ours_cpu_seconds": round(best["ours"], 3)}
    for peer in list(methods)[1:]:
        prefix = "" if peer == "pycocotools" else f"{peer}_"
        difference = float(np.abs(np.nan_to_num(scores["ours"], nan=-1) - scores[peer]).max())
        result |= {
            f"{peer}_cpu_seconds": round(best[peer], 3),
            f"{prefix}ratio": round(best["ours"] / best[peer], 3),
            f"{prefix}largest_difference": difference,
        }
    return result


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run the comparison, print it, and write it as JSON if `--output` is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repetitions", type=int, default=3, help="repetitions of the comparison")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    results = {"average precision": compare_metric(repetitions=args.repetitions)}
    print(json.dumps(results, indent=2))
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
