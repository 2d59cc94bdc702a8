r"""Train a network that finds a fixed number of objects by regression.

    scripts/run accelerate launch scripts/train_localizer.py
    scripts/run accelerate launch scripts/train_localizer.py --num_objects 3 --target point
    scripts/run accelerate launch scripts/train_localizer.py --per_class true --head_input pool --place_loss l2

The first command finds the class and the box of a single object. The second one finds the centers of three objects,
and the third one has a box per class, as in OverFeat. A run takes about five minutes on one CPU core. The scores to
expect are in model_cards/detection_localization.md.
"""

from dataclasses import dataclass, field

from hf_dl.data.collate import as_is
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import localizer
from hf_dl.recipes.box_images import flip_randomly, normalize
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(localizer.LocalizerFlags, TrainingArgs):
    """Flags of this script."""

    place_weight: float = field(default=1.0, metadata={"help": "Weight of the loss of boxes or points."})
    max_steps: int = 0
    epochs: float = 10.0
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 2e-2
    schedule: Schedule = "cosine"
    warmup_steps: int = 50
    max_grad_norm: float = 10.0
    eval_epochs: float = 1.0
    log_every: int = 20

    def __post_init__(self):
        super().__post_init__()
        if not self.place_weight >= 0:
            raise ValueError(f"place_weight={self.place_weight} must be 0 or above.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, score the test images, and write the model and the report into `output_dir`."""
    args = parse_args(Args, argv)
    (train, names), (validation, _), (test, _) = (
        localizer.load_images(args, split) for split in ("train", "validation", "test")
    )
    model, processor = localizer.make_model(args, names)
    run = TrainingRun(args, model, train, collate=as_is, processor=processor)

    for batch in run:
        images, labels = flip_randomly(batch["image"].to(run.device), batch["labels"].to(run.device))
        losses = run.model(normalize(images, processor, run.device), labels=labels).loss_dict

        # Classification: cross-entropy of each of the K outputs, with the class "no object" for unused outputs.
        classification_loss = losses["classification"]

        # Places: codes are (box - center box) / 0.1, in units of the image. For the true class of each output,
        # l2: sum of (code - target)^2 / 2. smooth_l1: |code - target| - 1/2 where the difference is above 1.
        place_loss = losses["box" if args.target == "box" else "point"]

        loss = classification_loss + args.place_weight * place_loss
        run.step(loss, classification=classification_loss, place=place_loss)

        if run.evaluation_due:
            with run.averaged():
                scores = localizer.evaluate(run.unwrapped, processor, validation)
            run.log(**{f"val_{name}": value for name, value in scores.items()})

    if args.monitor:
        run.load_best()
    with run.averaged():
        scores = localizer.evaluate(run.unwrapped, processor, test)
    metrics = run.finish({f"test_{name}": value for name, value in scores.items()})
    if run.is_main:
        localizer.write_report(run.folder)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
