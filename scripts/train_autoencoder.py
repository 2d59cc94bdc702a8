"""Train the autoencoder for latent diffusion: it encodes images as latents of half their height and width.

    scripts/run accelerate launch scripts/train_autoencoder.py

The default run takes about 6 minutes on one CPU core. The networks are `AutoencoderKL` or `VQModel` of diffusers, and
`diffusers.AutoModel` loads the folder of the run. The method is from Rombach et al. 2022, "High-Resolution Image
Synthesis with Latent Diffusion Models", section 3.1. Differences:

- The pixel term is the squared error, because diffusion cannot draw a texture that the autoencoder loses. Rombach et
  al. use the absolute error, a perceptual distance, which --perceptual_weight adds, and a discriminator.
- Training sees random crops (--crop_size).
- The small network takes patches of 2x2 pixels (`hf_dl.models.latent_autoencoder`).
"""

from dataclasses import dataclass

import torch.nn.functional as F

from hf_dl.data.collate import as_is
from hf_dl.metrics import perceptual
from hf_dl.models.latent_autoencoder import make_autoencoder
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import latent_autoencoder
from hf_dl.recipes.scene_images import SceneFlags, load_images, to_pixel_values
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(latent_autoencoder.AutoencoderFlags, SceneFlags, TrainingArgs):
    """Flags of this script."""

    max_steps: int = 3000
    batch_size: int = 16
    optimizer: str = "adam"
    learning_rate: float = 3e-3
    beta2: float = 0.99
    schedule: Schedule = "cosine"
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995
    eval_every: int = 750

    def __post_init__(self):
        super().__post_init__()
        latent_autoencoder.check_flags(self)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate on the test split, and write the model, the report and the pictures into `output_dir`."""
    args = parse_args(Args, argv)
    distance = perceptual.load(args.perceptual)
    train, validation, test = (load_images(args, split) for split in ("train", "validation", "test"))
    autoencoder = make_autoencoder(args.architecture, kind=args.kind, sample_size=args.image_size)
    run = TrainingRun(args, latent_autoencoder.LatentAutoencoder(autoencoder), train, collate=as_is)
    validation_batches, test_batches = run.shard(validation, 64), run.shard(test, 64)
    distance.to(run.device)
    regularizer_weight = args.kl_weight if args.kind == "kl" else 1.0

    for batch in run:
        images = latent_autoencoder.random_crops(batch["image"], args.crop_size, run.generator)
        pixel_values = to_pixel_values(images, run.device)  # (batch, 3, crop_size, crop_size), in [-1, 1]

        # Regularizer of the latents z. kl: KL(q(z|x) || N(0, 1)) per number of z. vq: |z - nearest codebook entry|^2.
        reconstruction, regularizer = run.model(pixel_values, generator=run.generator)

        # Squared error: mean (reconstruction - pixel_values)^2.
        terms = {"mse": F.mse_loss(reconstruction.float(), pixel_values), "regularizer": regularizer}
        loss = terms["mse"] + regularizer_weight * regularizer

        # Perceptual distance: mean squared difference between normalized features of a fixed network (LPIPS).
        if args.perceptual_weight:
            terms["perceptual"] = distance(reconstruction.float(), pixel_values).mean()
            loss = loss + args.perceptual_weight * terms["perceptual"]

        run.step(loss, **terms)

        if run.evaluation_due:
            with run.averaged():
                scores = latent_autoencoder.evaluate(run.unwrapped, validation_batches, distance, gather=run.gather)
            run.log(**{f"val_{name}": value for name, value in scores.items()})

    with run.averaged():
        latent_autoencoder.set_scale(autoencoder.eval(), train)
        scores = latent_autoencoder.evaluate(run.unwrapped, test_batches, distance, gather=run.gather)
        metrics = {f"test_{name}": value for name, value in scores.items()}
        if run.is_main:
            metrics |= latent_autoencoder.draw_and_measure(autoencoder, test, run.folder)
    metrics = run.finish(metrics)
    if run.is_main:
        latent_autoencoder.write_report(run.folder)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
