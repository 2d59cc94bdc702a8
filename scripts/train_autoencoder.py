"""Train the autoencoder under latent diffusion: images to latents a quarter as high and wide, and back.

scripts/run accelerate launch scripts/train_autoencoder.py

The networks are diffusers' own, `AutoencoderKL` or `VQModel`; the folder loads with `diffusers.AutoModel`. The loss is
the absolute error of the pixels, a perceptual distance, and a regularizer of the latents: Rombach et al. 2022,
"High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1, without their discriminator.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # evaluate_autoencoder is found also when a test imports this file
import evaluate_autoencoder as latent

from hf_dl.data.collate import as_is
from hf_dl.metrics import perceptual
from hf_dl.models.latent_autoencoder import make_autoencoder
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(latent.ModelFlags, latent.SceneFlags, TrainingArgs):
    """Flags of this script."""

    max_steps: int = 1200
    batch_size: int = 16
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    eval_every: int = 300

    def __post_init__(self):
        super().__post_init__()
        latent.check(self)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate on the test split, and leave model, report and pictures in `output_dir`."""
    args = parse_args(Args, argv)
    measure = perceptual.load("random" if args.perceptual == "none" else args.perceptual)
    train, validation, test = (latent.load_images(args, split) for split in ("train", "validation", "test"))
    autoencoder = make_autoencoder(args.architecture, kind=args.kind, sample_size=args.image_size)
    run = TrainingRun(args, latent.LatentAutoencoder(autoencoder), train, collate=as_is)
    validation_batches, test_batches = run.shard(validation, 64), run.shard(test, 64)
    measure.to(run.device)
    weights = {"kl": args.kl_weight, "vq": 1.0}[args.kind], args.perceptual_weight * (args.perceptual != "none")

    for batch in run:
        pixel_values = latent.to_pixel_values(batch["image"], run.device)
        made, regularizer = run.model(pixel_values, generator=run.generator)
        l1, distance = F.l1_loss(made, pixel_values), measure(made.float(), pixel_values).mean()
        loss = l1 + weights[0] * regularizer + weights[1] * distance
        run.step(loss, l1=l1, perceptual=distance, regularizer=regularizer)
        if run.evaluation_due:
            with run.averaged():
                scores = latent.evaluate(run.unwrapped, validation_batches, measure, gather=run.gather)
            run.log(**{f"val_{name}": value for name, value in scores.items()})

    with run.averaged():
        latent.set_scale(autoencoder.eval(), train)
        scores = latent.evaluate(run.unwrapped, test_batches, measure, gather=run.gather)
        metrics = {f"test_{name}": value for name, value in scores.items()}
        if run.is_main:
            metrics |= latent.draw_and_measure(autoencoder, test, run.folder)
    metrics = run.finish(metrics)
    if run.is_main:
        latent.write_report(run.folder)
    return metrics


if __name__ == "__main__":
    main()
