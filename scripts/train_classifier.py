r"""Train an image classifier.

    scripts/run accelerate launch scripts/train_classifier.py
    scripts/run accelerate launch scripts/train_classifier.py --model small_vit --image_size 64 --optimizer adamw \
        --learning_rate 1e-3 --epochs 30
    scripts/run accelerate launch scripts/train_classifier.py --model conv_classifier --head hierarchical \
        --tree superclass

The first command trains a residual network with 14 layers on generated images with one object each. It takes a few
minutes on two CPU cores. model_cards/norms.md lists times and scores for several normalizations.

The flag `--model` also accepts classifiers of transformers and timm:

    scripts/run accelerate launch scripts/train_classifier.py --model timm/resnet18.a1_in1k --image_size 64
    scripts/run accelerate launch scripts/train_classifier.py --model timm/resnet18.a1_in1k --pretrained false

The second command trains a small vision transformer. Its accuracy stays near chance, 0.04, in the first epochs. See
model_cards/small_vit.md. The third command compares output layers, see model_cards/softmax_heads.md.
"""

from dataclasses import dataclass, field

from torch.utils.data import Subset

from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import augment
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import classifier
from hf_dl.recipes.augmentation import Augmentation, AugmentationFlags
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(
    classifier.ModelFlags, classifier.ImageFlags, classifier.ImageTrainingFlags, AugmentationFlags, TrainingArgs
):
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
    optimizer: str = "sgd"
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
    model = classifier.make_model(args, train)
    processor = classifier.make_processor(args, train, model)
    augmentation = Augmentation(args, len(train.names))
    run = TrainingRun(args, model, train, collate=as_is, processor=processor)

    splits = {"train": train, "val": validation, "test": test}
    loaders = {split: run.shard(data, classifier.BATCH_SIZE) for split, data in splits.items()}
    part = Subset(train, range(min(args.eval_train, len(train))))
    watched = {"train": run.shard(part, classifier.BATCH_SIZE), "val": loaders["val"]}

    for batch in run:
        pictures = augmentation.change_pictures(batch["image"])
        pixel_values = classifier.to_pixel_values(pictures, processor, run.device)
        pixel_values = augment(pixel_values, padding=args.crop_padding, flip=args.flip, generator=run.generator)
        pixel_values, targets = augmentation.mix(pixel_values, batch["labels"])  # targets: (batch, classes)

        # head=gumbel adds noise whose temperature falls from 1 to args.temperature.
        temperature = 1 + (args.temperature - 1) * run.progress
        noise = {"temperature": temperature, "generator": run.generator} if args.head == "gumbel" else {}
        output = run.model(pixel_values, labels=batch["labels"], **noise)

        loss = output.loss  # the mean of -log P(label) over the batch
        log_prob = output.logits.float().log_softmax(dim=1)
        if args.mixup or args.cutmix:
            # Mixup (Zhang et al. 2017) and CutMix (Yun et al. 2019). The target of a mixed image has two classes.
            loss = -(targets * log_prob).sum(dim=1).mean()
        if args.label_smoothing:
            # Label smoothing (Szegedy et al. 2016, section 7). The target is (1 - s) * target + s / classes.
            # With the mean over the batch, the loss is (1 - s) * loss + s * mean over classes of -log P.
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
