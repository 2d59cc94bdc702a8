"""Train two detectors of torchvision under a CPU budget, and compare the time of average precision with pycocotools.

    scripts/run python scripts/benchmarks/detection.py --source bccd --output model_cards/benchmark_detection.json

The peers start from random weights, as the detectors in model_cards/detection_bccd.md, and see the same images,
augmentation and metric: 240x320 pixels, with the validation images. They resize the images to their own input size.
Each run takes 30 CPU minutes on one thread (`--cpu_seconds`). `--cpu_seconds 0` only compares the metric, which takes
one minute. bccd is the folder of https://github.com/Shenggan/BCCD_Dataset.
"""

import argparse
import contextlib
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from torch import nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn, ssdlite320_mobilenet_v3_large

from hf_dl.data.detection import class_names
from hf_dl.metrics.detection import coco_scores
from hf_dl.models.detection_boxes import to_corners
from hf_dl.models.detection_processor import DetectionImageProcessor
from hf_dl.recipes.detection import (
    BATCH_IMAGES,
    DetectionFlags,
    DetectionImages,
    TrainingDataFlags,
    load_rows,
    make_augmentation,
    references,
)
from hf_dl.training.errors import explain_errors

# low thresholds: average precision needs boxes with low scores, too
PEERS: dict[str, tuple[Callable[..., nn.Module], dict[str, float]]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": (
        fasterrcnn_mobilenet_v3_large_320_fpn,
        # with 512 regions per image, the default, a step takes 10 s: 64 is the number of our Faster R-CNN
        {"box_score_thresh": 0.01, "rpn_score_thresh": 0.0, "box_batch_size_per_image": 64},
    ),
    "ssdlite320_mobilenet_v3_large": (ssdlite320_mobilenet_v3_large, {"score_thresh": 0.001}),
}
WARMUP_STEPS, WEIGHT_DECAY, MAX_GRAD_NORM = 100, 0.02, 10.0  # as in scripts/train_detector.py
BATCH = 8
NUM_IMAGES, NUM_BOXES, NUM_CLASSES = 5000, 20, 3  # of the comparison with pycocotools


def make_data(source: str, size: Sequence[int], seed: int) -> tuple[DetectionImages, DetectionImages]:
    """Return the training and the test images, with the augmentation of scripts/experiments/detection_bccd.toml.

    Args:
        source: Folder, see `hf_dl.data.detection`.
        size: Height and width of the images in pixels.
        seed: Seed of the augmentation.
    """
    torch.manual_seed(seed)
    flags = DetectionFlags(source=source)
    rows = {split: load_rows(flags, split, size=max(size)) for split in ("train", "validation", "test")}
    train = concatenate_datasets([rows["train"], rows["validation"]])
    # the peers expect pixels in [0, 1] and normalize them
    processor = DetectionImageProcessor(size={"height": size[0], "width": size[1]}, do_normalize=False)
    changes = make_augmentation(TrainingDataFlags(vertical_flip=0.5, color=0.2, shift=0.05, zoom=0.15))
    return DetectionImages(train, processor, changes), DetectionImages(rows["test"], processor)


def to_targets(labels: Sequence[Mapping[str, torch.Tensor]], size: Sequence[int]) -> list[dict[str, torch.Tensor]]:
    """Convert labels of `DetectionImageProcessor` to labels of torchvision: pixels, and classes from 1."""
    sides = torch.tensor([size[1], size[0]] * 2)
    return [{"boxes": to_corners(row["boxes"]) * sides, "labels": row["class_labels"] + 1} for row in labels]


def train_peer(
    model: nn.Module, data: DetectionImages, *, size: Sequence[int], cpu_seconds: float, learning_rate: float
) -> int:
    """Train a detector of torchvision until the budget is used, and return the number of steps.

    Args:
        model: The detector.
        data: The training images.
        size: Height and width of the images in pixels.
        cpu_seconds: CPU time, including the preparation of the images.
        learning_rate: Peak learning rate. It follows a cosine of the used share of the budget.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, begin, step, order = torch.optim.AdamW(groups, lr=learning_rate), time.process_time(), 0, []
    model.train()
    while (used := (time.process_time() - begin) / cpu_seconds) < 1:
        if len(order) < BATCH:
            order = torch.randperm(len(data)).tolist()
        chosen, order = order[:BATCH], order[BATCH:]
        batch = data.__getitems__(chosen)
        # the sum of the terms, as in torchvision's reference scripts
        loss = sum(model(list(batch["pixel_values"]), to_targets(batch["labels"], size)).values())
        if not loss.isfinite():
            raise ValueError(f"The loss is not finite at step {step}. Use a --learning_rate below {learning_rate}.")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * used))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {100 * used:.0f} % of the budget, loss {loss.item():.3f}", flush=True)
    return step


@torch.no_grad()
def score_peer(model: nn.Module, data: DetectionImages, *, size: Sequence[int]) -> dict[str, float]:
    """Return the scores of a detector of torchvision, and its CPU milliseconds per image."""
    model.eval()
    found, seconds = [], 0.0
    for start in range(0, len(data), BATCH_IMAGES):
        batch = data.__getitems__(range(start, min(start + BATCH_IMAGES, len(data))))
        begin = time.process_time()
        outputs = model(list(batch["pixel_values"]))
        seconds += time.process_time() - begin
        for output, label in zip(outputs, batch["labels"], strict=True):
            height, width = label["orig_size"].tolist()
            scale = torch.tensor([width / size[1], height / size[0]] * 2)
            found.append({**output, "boxes": output["boxes"] * scale, "labels": output["labels"] - 1})
    scores = coco_scores(found, references(data.rows))
    return {name: scores[name] for name in ("map_50", "map", "map_75")} | {"ms": 1000 * seconds / len(data)}


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
    """Run all measurements, print them, and write them as JSON if `--output` is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", default="bccd", help="folder with images and annotations")
    parser.add_argument("--cpu_seconds", type=float, default=1800, help="CPU time of each training; 0 trains nothing")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the order of the images")
    parser.add_argument("--image_size", type=int, nargs=2, default=[240, 320], help="height and width in pixels")
    parser.add_argument("--repetitions", type=int, default=3, help="repetitions of the comparison of the metric")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    results: dict[str, dict] = {"average precision": compare_metric(repetitions=args.repetitions), "peers": {}}
    print("average precision", results["average precision"], flush=True)
    for name, (make, fields) in PEERS.items() if args.cpu_seconds else ():
        train, test = make_data(args.source, args.image_size, args.seed)
        model = make(weights=None, weights_backbone=None, num_classes=1 + len(class_names(train.rows)), **fields)
        steps = train_peer(
            model, train, size=args.image_size, cpu_seconds=args.cpu_seconds, learning_rate=args.learning_rate
        )
        scores = {key: round(value, 4) for key, value in score_peer(model, test, size=args.image_size).items()}
        results["peers"][name] = scores | {
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "cpu_seconds": args.cpu_seconds,
            "steps": steps,
            "epochs": round(steps * BATCH / len(train), 1),
            "seed": args.seed,
        }
        print(name, results["peers"][name], flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
