"""Compare the time of average precision with pycocotools, on 5,000 images with 20 boxes each.

    scripts/run --group dev python scripts/benchmarks/detection.py --output model_cards/benchmark_detection.json

The result is the CPU time of one thread, the minimum of interleaved repetitions. Both compute the twelve scores of
COCO. The index of pycocotools is made before its time is measured. The comparison takes half a minute.
"""

import argparse
import contextlib
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


def compare_metric(*, num_images: int = NUM_IMAGES, repetitions: int = 3) -> dict[str, float]:
    """Return the CPU seconds of our scores and of pycocotools, the minimum of interleaved repetitions."""
    try:
        import pycocotools  # noqa: F401
    except ModuleNotFoundError:
        command = "scripts/run --group dev python scripts/benchmarks/detection.py"
        raise ImportError(f"The package pycocotools is missing. Run `{command}`.") from None
    found, truth = make_boxes(num_images)
    with contextlib.redirect_stdout(io.StringIO()):
        indices = to_coco(found), to_coco(truth)
    methods = {
        "ours": lambda: list(coco_scores(found, truth).values()),
        "pycocotools": lambda: run_pycocotools(*indices),
    }
    seconds, scores = {name: [] for name in methods}, {}
    for _ in range(repetitions):
        for name, method in methods.items():
            begin = time.process_time()
            scores[name] = np.asarray(method())
            seconds[name].append(time.process_time() - begin)
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "images": num_images,
        "boxes_per_image": NUM_BOXES,
        "ours_cpu_seconds": round(best["ours"], 3),
        "pycocotools_cpu_seconds": round(best["pycocotools"], 3),
        "ratio": round(best["ours"] / best["pycocotools"], 3),
        "largest_difference": float(np.abs(np.nan_to_num(scores["ours"], nan=-1) - scores["pycocotools"]).max()),
    }


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
