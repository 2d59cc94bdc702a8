"""Train a detector of torchvision from random weights under a CPU budget, to compare our detectors with it.

    scripts/run python scripts/benchmarks/torchvision_detectors.py --source bccd --cpu_seconds 1800

It sees the same images and augmentation as our detectors, and has the same metric. The experiment detection_bccd.toml
runs it, and model_cards/detection_bccd.md shows its scores in the table of our detectors. The detectors of torchvision
resize the images to their own input size.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate.utils import set_seed
from datasets import concatenate_datasets
from torch import nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn, ssdlite320_mobilenet_v3_large

from hf_dl.metrics.detection import coco_scores
from hf_dl.models.detection_boxes import to_corners
from hf_dl.models.detection_processor import DetectionImageProcessor
from hf_dl.recipes import detection
from hf_dl.recipes.evaluation import write_evaluation
from hf_dl.reporting.experiment import portable
from hf_dl.training.args import parse_flags
from hf_dl.training.provenance import write_results

# low thresholds: average precision needs boxes with low scores, too
NETWORKS: dict[str, tuple[Callable[..., nn.Module], dict[str, float]]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": (
        fasterrcnn_mobilenet_v3_large_320_fpn,
        # with 512 regions per image, the default, a step takes 10 s: 64 is the number of our Faster R-CNN
        {"box_score_thresh": 0.01, "rpn_score_thresh": 0.0, "box_batch_size_per_image": 64},
    ),
    "ssdlite320_mobilenet_v3_large": (ssdlite320_mobilenet_v3_large, {"score_thresh": 0.001}),
}
WARMUP_STEPS, WEIGHT_DECAY, MAX_GRAD_NORM = 100, 0.02, 10.0  # as in scripts/train_detector.py


@dataclass
class Args(detection.DetectionFlags, detection.TrainingDataFlags):
    """Flags of this script."""

    network: str = field(
        default="fasterrcnn_mobilenet_v3_large_320_fpn", metadata={"help": f"Detector: {' or '.join(NETWORKS)}."}
    )
    image_size: list[int] = field(
        default_factory=lambda: [240, 320], metadata={"help": "Height and width of the images in pixels."}
    )
    batch_size: int = field(default=8, metadata={"help": "Images per step."})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate. It follows a cosine of the used share of the budget."}
    )
    cpu_seconds: float = field(default=1800.0, metadata={"help": "CPU time of the training."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights, the order of the images and their changes."})
    output_dir: str = field(default="runs/torchvision_detectors", metadata={"help": "Folder for the scores."})
    cpu_threads: int = field(default=1, metadata={"help": "Number of CPU threads."})

    def __post_init__(self):
        if self.network not in NETWORKS:
            raise ValueError(f"network={self.network!r} is unknown. Choose one of: {', '.join(NETWORKS)}.")
        if len(self.image_size) != 2:
            raise ValueError(f"image_size={self.image_size} is invalid. Expected height and width.")
        for name in ("batch_size", "learning_rate", "cpu_seconds", "cpu_threads"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")


def make_data(args: Args) -> tuple[detection.DetectionImages, detection.DetectionImages]:
    """Return the training and the test images."""
    rows = {
        split: detection.load_rows(args, split, size=max(args.image_size)) for split in ("train", "validation", "test")
    }
    train = concatenate_datasets([rows["train"], rows["validation"]]) if args.with_validation else rows["train"]
    # the networks expect pixels in [0, 1] and normalize them
    size = {"height": args.image_size[0], "width": args.image_size[1]}
    processor = DetectionImageProcessor(size=size, do_normalize=False)
    changes = detection.make_augmentation(args)
    return detection.DetectionImages(train, processor, changes), detection.DetectionImages(rows["test"], processor)


def to_targets(labels: Sequence[Mapping[str, torch.Tensor]], size: Sequence[int]) -> list[dict[str, torch.Tensor]]:
    """Convert labels of `DetectionImageProcessor` to labels of torchvision: pixels, and classes from 1."""
    sides = torch.tensor([size[1], size[0]] * 2)
    return [{"boxes": to_corners(row["boxes"]) * sides, "labels": row["class_labels"] + 1} for row in labels]


def train(model: nn.Module, data: detection.DetectionImages, args: Args) -> int:
    """Train a detector of torchvision until the budget is used, and return the number of steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, begin, step, order = torch.optim.AdamW(groups), time.process_time(), 0, []
    model.train()
    while (used := (time.process_time() - begin) / args.cpu_seconds) < 1:
        if len(order) < args.batch_size:
            order = torch.randperm(len(data)).tolist()
        chosen, order = order[: args.batch_size], order[args.batch_size :]
        batch = data.__getitems__(chosen)
        # the sum of the terms, as in torchvision's reference scripts
        loss = sum(model(list(batch["pixel_values"]), to_targets(batch["labels"], args.image_size)).values())
        if not loss.isfinite():
            raise ValueError(f"The loss is not finite at step {step}. Use learning_rate < {args.learning_rate}.")
        rate = args.learning_rate * min(1, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * used))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {100 * used:.0f} % of the budget, loss {loss.item():.3f}", flush=True)
    return step


@torch.no_grad()
def score(model: nn.Module, data: detection.DetectionImages, size: Sequence[int]) -> dict[str, float]:
    """Return the scores of a detector of torchvision, and its CPU milliseconds per image."""
    model.eval()
    found, seconds = [], 0.0
    for start in range(0, len(data), detection.BATCH_IMAGES):
        batch = data.__getitems__(range(start, min(start + detection.BATCH_IMAGES, len(data))))
        begin = time.process_time()
        outputs = model(list(batch["pixel_values"]))
        seconds += time.process_time() - begin
        for output, label in zip(outputs, batch["labels"], strict=True):
            height, width = label["orig_size"].tolist()
            scale = torch.tensor([width / size[1], height / size[0]] * 2)
            found.append({**output, "boxes": output["boxes"] * scale, "labels": output["labels"] - 1})
    scores = coco_scores(found, detection.references(data.rows))
    return {name: scores[name] for name in ("map_50", "map", "map_75")} | {"ms": 1000 * seconds / len(data)}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and score a detector, and write results.json and evaluation.json."""
    args = parse_flags(Args, argv)
    torch.set_num_threads(args.cpu_threads)
    set_seed(args.seed)
    train_data, test_data = make_data(args)
    make, fields = NETWORKS[args.network]
    model = make(weights=None, weights_backbone=None, num_classes=1 + len(train_data.names), **fields)
    begin, computed = time.monotonic(), time.process_time()
    steps = train(model, train_data, args)
    metrics = {f"test_{name}": value for name, value in score(model, test_data, args.image_size).items()}
    metrics |= {"epochs": steps * args.batch_size / len(train_data), "steps": steps}

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_evaluation(folder, args, metrics)
    seconds, cpu_seconds = time.monotonic() - begin, time.process_time() - computed
    write_results(folder, __file__, portable(asdict(args)), metrics, model, seconds=seconds, cpu_seconds=cpu_seconds)
    return metrics


if __name__ == "__main__":
    main()
