r"""Train a variational autoencoder of images, by default a convolutional one on scenes of one object each.

scripts/run accelerate launch scripts/train_vae.py
scripts/run accelerate launch scripts/train_vae.py --source data/fashion_mnist --image_size 28 --likelihood gaussian \
    --architecture mlp

The second wants the four idx files of Fashion-MNIST in a folder, or the Hub id zalando-datasets/fashion_mnist as its
source; model_cards/vae.md says what both networks reach on it.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent))  # evaluate_vae is found also when a test imports this file
import evaluate_vae as vae

from hf_dl.data.collate import as_is
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(vae.ModelFlags, vae.ImageData, TrainingArgs):
    """Flags of this script."""

    kl_warmup: float = field(default=0.0, metadata={"help": "Part of the run in which beta rises from 0; 0: none."})
    importance_samples: int = field(default=50, metadata={"help": "K of the importance-weighted bound; 0: none."})
    epochs: float = 10.0
    batch_size: int = 128
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float | None = field(default=None, metadata={"help": "Peak rate; mlp: 1e-3, conv: 2e-3."})
    schedule: Schedule | None = field(default=None, metadata={"help": "After warm-up; mlp: constant, conv: cosine."})
    warmup_steps: int | None = field(default=None, metadata={"help": "Of the rate; mlp: 0, conv: 200."})
    eval_epochs: float = 1.0
    log_every: int = 10

    def __post_init__(self):
        vae.fill(self)  # what was not given is that of the architecture, and results.json tells it
        super().__post_init__()
        vae.check(self)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, score by every convention on training and test images, and leave model, report and pictures."""
    args = parse_args(Args, argv)
    train, validation, test = (vae.load_images(args, split) for split in ("train", "validation", "test"))
    model = vae.make_model(args, train)
    run = TrainingRun(args, model, train, collate=as_is, processor=vae.make_processor(model.config))
    batches = {"val": run.shard(validation, 250), "train": run.shard(vae.some(train, test), 250)}
    batches["test"] = run.shard(test, 250)

    for batch in run:
        pixel_values = vae.to_pixel_values(batch["image"], run.device)
        output = run.model(pixel_values, generator=run.generator)
        reconstruction_loss, kl = output.reconstruction_loss.mean(), output.kl.mean()
        beta = args.beta * min(1.0, run.progress / args.kl_warmup) if args.kl_warmup else args.beta
        run.step(reconstruction_loss + beta * kl, kl=kl, beta=beta, **vae.errors(pixel_values, output.logits))
        if run.evaluation_due:
            run.log(**vae.watch(run, batches["val"]))

    metrics = vae.conclude(run, batches, train, test)
    if run.is_main:
        vae.write_report(run.folder)
    return metrics


if __name__ == "__main__":
    main()
