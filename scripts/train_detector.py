r"""Train an object detector.

    scripts/run accelerate launch scripts/train_detector.py
    scripts/run accelerate launch scripts/train_detector.py --method faster_rcnn
    scripts/run accelerate launch scripts/train_detector.py --source VOCdevkit/VOC2007 --image_size 320 \
        --backbone timm/resnet18 --pretrained --epochs 30

The first command trains a detector without anchors on generated scenes. It takes about 15 minutes on one CPU core.
The second command trains Faster R-CNN on the same images. `--method` also accepts yolo_v1, fast_rcnn, sliding_window
and rcnn, which scripts/fit_rcnn.py completes. The default is anchor_free. model_cards/detection_ladder.md lists times
and scores of all methods. The third command trains on photos with annotations in the layout of PASCAL VOC; folders of
COCO work too.

Use the model with `pipeline("object-detection", "runs/train_detector")` of transformers.
"""

from dataclasses import dataclass

from datasets import concatenate_datasets

from hf_dl.data.collate import as_is
from hf_dl.data.detection import class_names
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import detection as recipe
from hf_dl.recipes import detection_report
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun

# The terms of the loss and their weights. Each term is a mean over the images. hf_dl/models has the definitions.
LOSS_TERMS = {
    "anchor_free": {
        "classification": 1,  # sum of |y - p|^2 * BCE(p, y) over all cells / 9, with y = IoU or 0
        "box": 2,  # sum of 1 - CIoU over the cells of objects / 9
    },
    "yolo_v1": {
        "coordinates": 5,  # squared error of x, y, sqrt(w), sqrt(h) of the responsible box of each object
        "object": 1,  # (confidence - IoU)^2 of these boxes
        "no_object": 0.5,  # confidence^2 of all other boxes
        "class": 1,  # squared error of the classes of cells with an object
    },
    "fast_rcnn": {
        "classification": 1,  # cross-entropy of 64 regions, with classes and background
        "box": 1,  # smooth L1 of the codes of regions with an object / 64
    },
    "faster_rcnn": {
        "rpn_objectness": 1,  # binary cross-entropy of 256 anchors: object or not
        "rpn_box": 1,  # smooth L1 of the codes of anchors with an object / 256
        "classification": 1,  # as in fast_rcnn
        "box": 1,
    },
    "rcnn": {
        "classification": 1,  # cross-entropy of up to 32 crops, with the class "no object"; fit_rcnn.py does the rest
    },
    "sliding_window": {
        "classification": 1,  # cross-entropy of up to 24 windows, with the class "no object"
        "box": 1,  # smooth L1 of the codes of windows on objects / number of windows
    },
}


@dataclass
class Args(recipe.ModelFlags, recipe.DetectionFlags, recipe.TrainingDataFlags, TrainingArgs):
    """Flags of this script. Without --learning_rate, the method chooses it."""

    max_steps: int = 0
    epochs: float = 18.0
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    schedule: Schedule = "cosine"
    warmup_steps: int = 100
    max_grad_norm: float = 10.0
    eval_epochs: float = 3.0


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train a detector, and write the model, its processor, its scores and a report to `output_dir`.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores on the validation and the test split.
    """
    args = parse_args(Args, argv)
    method = recipe.complete_flags(args)
    rows = {
        split: recipe.load_rows(args, split, size=max(args.image_size)) for split in ("train", "validation", "test")
    }
    if args.with_validation:
        rows["train"] = concatenate_datasets([rows["train"], rows["validation"]])
    recipe.complete_anchors(args, rows["train"])
    model, processor = recipe.make_model(args, class_names(rows["train"]))
    train = recipe.DetectionImages(rows["train"], processor, recipe.make_augmentation(args))
    validation, test = (recipe.DetectionImages(rows[split], processor) for split in ("validation", "test"))
    run = TrainingRun(args, model, train, collate=as_is, processor=processor)
    threshold = method.score_threshold  # low, because average precision needs boxes with low scores, too

    for batch in run:  # pixel_values, and the classes and boxes of each image as labels
        terms = run.model(**batch).loss_dict
        loss = sum(terms[name] for name in LOSS_TERMS[args.method])  # the terms include their weights
        run.step(loss, **terms)

        if run.evaluation_due:
            with run.averaged():
                scores = recipe.watch(run.unwrapped, processor, validation, threshold=threshold)
            run.log(**{f"val_{name}": value for name, value in scores.items()})

    if args.monitor:
        run.load_best()
    with run.averaged():
        scores, found = recipe.evaluate(run.unwrapped, processor, test, threshold=threshold, stages=method.stages)
        watched = recipe.watch(run.unwrapped, processor, validation, threshold=threshold)
    if run.is_main:
        detection_report.write_pictures(test, found, run.folder)
    metrics = {f"val_{name}": value for name, value in watched.items()}
    metrics = run.finish(metrics | {f"test_{name}": value for name, value in scores.items()})
    if run.is_main:
        detection_report.write_report(run.folder, args.method)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
