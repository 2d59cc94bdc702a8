"""Train a classifier whose output layer is wired wrongly on purpose, to see where accuracy ends: "why is it 1 %?".

scripts/run accelerate launch scripts/train_broken_heads.py --mistake softmax_before_hierarchical

The mistakes, and what is right in their place, are in scripts/mistakes.py; `none_softmax` and its kind are controls.
Two epochs on 100 classes: most mistakes end near chance, which is 0.01. The folder holds scores and curves for the
comparison, not a model to use.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent))  # its neighbors are found also when a test imports this file
import evaluate_classifier as classifiers
import mistakes

from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import augment
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(classifiers.ModelFlags, classifiers.ImageData, classifiers.Recipe, TrainingArgs):
    """Flags of this script."""

    mistake: Literal[tuple(mistakes.MISTAKES)] = field(
        default="softmax_before_hierarchical", metadata={"help": "What is wired wrongly; none_*: nothing."}
    )
    model: Literal["small_vit", "conv_classifier"] = field(
        default="conv_classifier", metadata={"help": "Kind of network."}
    )
    num_classes: Literal[25, 100] = field(default=100, metadata={"help": "Classes of synthetic images."})
    epochs: float = 2.0
    batch_size: int = 128
    learning_rate: float = 2e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 50
    eval_epochs: float = 1.0
    save_every: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.head = mistakes.MISTAKES[self.mistake][0]
        classifiers.config_fields(self)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, and score the last weights on all splits."""
    args = parse_args(Args, argv)
    train, validation, test = (classifiers.load_images(args, split) for split in ("train", "validation", "test"))
    processor = classifiers.make_processor(train)
    model = classifiers.make_model(args, train)
    name = "head" if hasattr(model, "head") else "classifier"
    setattr(model, name, mistakes.make_mistake(args.mistake, getattr(model, name)))
    run = TrainingRun(args, model, train, collate=as_is, processor=processor)
    batches = {"val": run.shard(validation, 250), "test": run.shard(test, 250)}

    for batch in run:
        pixel_values = classifiers.to_pixel_values(batch["image"], processor, run.device)
        pixel_values = augment(pixel_values, padding=args.crop_padding, flip=args.flip, generator=run.generator)
        temperature = 1 + (args.temperature - 1) * run.progress
        noise = {"temperature": temperature, "generator": run.generator}
        run.step(run.model(pixel_values, labels=batch["labels"], **noise).loss, temperature=temperature)
        if run.evaluation_due:
            run.log(**classifiers.watch(run, {"val": batches["val"]}, processor))

    return classifiers.conclude(run, batches, train.names, processor)


if __name__ == "__main__":
    main()
