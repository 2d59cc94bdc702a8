r"""Train an image classifier.

    scripts/run accelerate launch scripts/train_classifier.py
    scripts/run accelerate launch scripts/train_classifier.py --model small_vit --image_size 64 --optimizer adamw \
        --learning_rate 1e-3 --epochs 30
    scripts/run accelerate launch scripts/train_classifier.py --model conv_classifier --head hierarchical \
        --tree superclass

The first command trains a residual network with 14 layers on generated images with one object each. It takes a few
minutes on two CPU cores. model_cards/norms.md lists times and scores for several normalizations.

The second command trains a small vision transformer. Its accuracy stays near chance, 0.04, in the first epochs. See
model_cards/small_vit.md. The third command compares output layers, see model_cards/softmax_heads.md.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch.utils.data import Subset

from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import augment
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import classifier
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(classifier.ModelFlags, classifier.ImageFlags, classifier.ImageTrainingFlags, TrainingArgs):
    """Flags of this script. The defaults train for a few minutes on two CPU cores."""

    label_smoothing: float = field(
        default=0.0, metadata={"help": "Weight of the uniform distribution in the target, from 0 to below 1."}
    )
    eval_train: int = field(
        default=1000, metadata={"help": "Number of training images that are scored after each epoch."}
    )
    max_steps: int = 0
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
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and less than 1.")
        if self.eval_train < 1:
            raise ValueError(f"eval_train={self.eval_train} must be at least 1.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train a classifier and write the best model, its scores and a report to `output_dir`.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores of the best epoch on the training, validation and test split.
    """
    args = parse_args(Args, argv)
    train, validation, test = (classifier.load_images(args, split) for split in ("train", "validation", "test"))
    processor = classifier.make_processor(train)
    model = classifier.make_model(args, train)
    run = TrainingRun(args, model, train, collate=as_is, processor=processor)

    splits = {"train": train, "val": validation, "test": test}
    loaders = {split: run.shard(data, classifier.BATCH_SIZE) for split, data in splits.items()}
    part = Subset(train, range(min(args.eval_train, len(train))))
    watched = {"train": run.shard(part, classifier.BATCH_SIZE), "val": loaders["val"]}

    for batch in run:
        pixel_values = classifier.to_pixel_values(batch["image"], processor, run.device)
        pixel_values = augment(pixel_values, padding=args.crop_padding, flip=args.flip, generator=run.generator)

        # head=gumbel adds noise whose temperature falls from 1 to args.temperature. Other heads ignore it.
        temperature = 1 + (args.temperature - 1) * run.progress
        noise = {"temperature": temperature, "generator": run.generator}
        output = run.model(pixel_values, labels=batch["labels"], **noise)

        loss = output.loss  # the mean of -log P(label) over the batch
        if args.label_smoothing:
            # Label smoothing (Szegedy et al. 2016, section 7). The target is (1 - s) * one_hot(label) + s / classes.
            # With the mean over the batch, the loss is (1 - s) * -log P(label) + s * mean over classes of -log P.
            log_prob = output.logits.float().log_softmax(dim=1)
            loss = (1 - args.label_smoothing) * loss - args.label_smoothing * log_prob.mean()
        run.step(loss, temperature=temperature)

        if run.evaluation_due:
            run.log(**classifier.watch(run, watched, processor))

    if args.monitor:
        run.load_best()
    metrics, confusion = classifier.evaluate_splits(run, loaders, processor)  # the last split is the test split
    if run.is_main:
        classifier.write_classes(confusion, train.names, run.folder)
    metrics = run.finish(metrics, confusion=classifier.confusion_record(confusion, train.names))
    if run.is_main:
        classifier.write_report(run.folder, args.model)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
