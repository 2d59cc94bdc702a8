r"""Train an image classifier, by default a residual network of 14 layers on scenes of one object each.

scripts/run accelerate launch scripts/train_classifier.py
scripts/run accelerate launch scripts/train_classifier.py --model small_vit --image_size 64 --optimizer adamw \
    --learning_rate 1e-3 --epochs 30
scripts/run accelerate launch scripts/train_classifier.py --model conv_classifier --head hierarchical --tree superclass

The second, a small ViT, stays near chance, 0.04, for some epochs before it learns.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).parent))  # evaluate_classifier is found also when a test imports this file
import evaluate_classifier as classifiers

from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import augment
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(classifiers.ModelFlags, classifiers.ImageData, classifiers.Recipe, TrainingArgs):
    """Flags of this script; the defaults are a run of some minutes on two CPU cores."""

    epochs: float = 10.0
    batch_size: int = 128
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 50
    eval_epochs: float = 1.0
    monitor: str = "val_accuracy"
    higher_is_better: bool = True

    def __post_init__(self):
        super().__post_init__()
        classifiers.config_fields(self)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, score the best epoch on all splits, and leave model, report and pictures in `output_dir`."""
    args = parse_args(Args, argv)
    train, validation, test = (classifiers.load_images(args, split) for split in ("train", "validation", "test"))
    processor = classifiers.make_processor(train)
    run = TrainingRun(args, classifiers.make_model(args, train), train, collate=as_is, processor=processor)
    batches = {"train": run.shard(train, 250), "val": run.shard(validation, 250), "test": run.shard(test, 250)}
    some = run.shard(Subset(train, range(min(args.eval_train, len(train)))), 250)

    for batch in run:
        pixel_values = classifiers.to_pixel_values(batch["image"], processor, run.device)
        pixel_values = augment(pixel_values, padding=args.crop_padding, flip=args.flip, generator=run.generator)
        temperature = 1 + (args.temperature - 1) * run.progress  # of the noise of head=gumbel; others have none
        noise = {"temperature": temperature, "generator": run.generator}
        output = run.model(pixel_values, labels=batch["labels"], **noise)
        run.step(classifiers.smoothed(output, args.label_smoothing), temperature=temperature)
        if run.evaluation_due:
            run.log(**classifiers.watch(run, {"train": some, "val": batches["val"]}, processor))

    metrics = classifiers.conclude(run, batches, train.names, processor)
    if run.is_main:
        classifiers.write_report(run.folder, args.model)
    return metrics


if __name__ == "__main__":
    main()
