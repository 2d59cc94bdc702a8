"""Train the probe of objects: a small classifier that reads the color and shape of an object from a crop.

    scripts/run accelerate launch scripts/train_probe.py

scripts/evaluate_editing.py uses it to read the objects of edited images, and trains it if it is missing. The default
run takes about four minutes on one CPU core. Scores to expect: model_cards/object_probe.md.
"""

from dataclasses import dataclass

from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import augment
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import object_probe
from hf_dl.recipes.classifier import to_pixel_values
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(object_probe.ProbeFlags, TrainingArgs):
    """Flags of this script."""

    max_steps: int = 3000
    batch_size: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 1.5e-3
    weight_decay: float = 1e-2
    schedule: Schedule = "cosine"
    warmup_steps: int = 100
    eval_every: int = 1000


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train the probe, and write the model, its accuracy and the report into `output_dir`."""
    args = parse_args(Args, argv)
    train, validation, test = (object_probe.load_crops(args, split) for split in ("train", "validation", "test"))
    model, processor = object_probe.make_model()
    run = TrainingRun(args, model, train["all"], collate=as_is, processor=processor)

    for batch in run:
        # Shifts and flips: the object is not exactly in the middle of a crop from an edited image.
        pixel_values = to_pixel_values(batch["image"], processor, run.device)
        pixel_values = augment(pixel_values, padding=2, flip=True, generator=run.generator)

        loss = run.model(pixel_values, labels=batch["labels"]).loss  # cross-entropy of the 32 pairs of color and shape
        run.step(loss)

        if run.evaluation_due:
            with run.averaged():
                probe = object_probe.ObjectProbe(run.unwrapped, processor)
                run.log(**object_probe.evaluate(probe, validation, "val"))

    if args.monitor:
        run.load_best()
    with run.averaged():
        metrics = object_probe.evaluate(object_probe.ObjectProbe(run.unwrapped, processor), test, "test")
    metrics = run.finish(metrics)
    if run.is_main:
        object_probe.write_report(run.folder)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
