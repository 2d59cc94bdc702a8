"""Train a classifier with a faulty output layer: how low is the accuracy, and does anything else show the mistake?

    scripts/run accelerate launch scripts/train_broken_heads.py --mistake softmax_before_hierarchical

hf_dl/recipes/broken_heads.py explains each mistake and its correction. Choose none_softmax, none_gumbel,
none_hierarchical or none_adaptive for the correct layer. Two epochs on 100 classes take about a minute on one CPU
core. Most mistakes end near chance, an accuracy of 0.01; see model_cards/broken_heads.md. The run writes scores and
learning curves for that comparison. Its model is not meant to be used.
"""

from dataclasses import dataclass, field
from typing import Literal

from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import augment
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import classifier
from hf_dl.recipes.broken_heads import MISTAKES, find_mistake
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(classifier.ModelFlags, classifier.ImageFlags, classifier.ImageTrainingFlags, TrainingArgs):
    """Flags of this script. The mistake sets `head`."""

    mistake: str = field(
        default="softmax_before_hierarchical",
        metadata={"help": f"Mistake in the output layer; none_* is correct. Choose one of: {', '.join(MISTAKES)}."},
    )
    model: str = field(default="conv_classifier", metadata={"help": "Kind of network, one with an output layer."})
    num_classes: Literal[25, 100] = field(default=100, metadata={"help": "source=synthetic: number of classes."})
    max_steps: int = 0
    epochs: float = 2.0
    batch_size: int = 128
    learning_rate: float = 2e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 50
    eval_epochs: float = 1.0
    save_every: int = 0

    def __post_init__(self):
        self.head = find_mistake(self.mistake).head
        super().__post_init__()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train a classifier with a faulty output layer and write its scores to `output_dir`.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores of the last weights on the validation and test split.
    """
    args = parse_args(Args, argv)
    train, validation, test = (classifier.load_images(args, split) for split in ("train", "validation", "test"))
    model = classifier.make_model(args, train)
    processor = classifier.make_processor(args, train, model)
    name = "head" if hasattr(model, "head") else "classifier"  # the name of the output layer in the model
    setattr(model, name, find_mistake(args.mistake).make(getattr(model, name)))
    run = TrainingRun(args, model, train, collate=as_is, processor=processor)

    splits = {"val": validation, "test": test}
    loaders = {split: run.shard(data, classifier.BATCH_SIZE) for split, data in splits.items()}

    for batch in run:
        pixel_values = classifier.to_pixel_values(batch["image"], processor, run.device)
        pixel_values = augment(pixel_values, padding=args.crop_padding, flip=args.flip, generator=run.generator)

        # head=gumbel adds noise whose temperature falls from 1 to args.temperature. Other heads ignore it.
        temperature = 1 + (args.temperature - 1) * run.progress
        noise = {"temperature": temperature, "generator": run.generator}
        loss = run.model(pixel_values, labels=batch["labels"], **noise).loss  # most mistakes are in this loss
        run.step(loss, temperature=temperature)

        if run.evaluation_due:
            run.log(**classifier.watch(run, {"val": loaders["val"]}, processor))

    if args.monitor:
        run.load_best()
    metrics, confusion = classifier.evaluate_splits(run, loaders, processor)  # the last split is the test split
    if run.is_main:
        classifier.write_classes(confusion, train.names, run.folder)
    metrics = run.finish(metrics, confusion=classifier.confusion_record(confusion, train.names))
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
