r"""Train a variational autoencoder of images.

    scripts/run accelerate launch scripts/train_vae.py
    scripts/run accelerate launch scripts/train_vae.py --source data/fashion_mnist --image_size 28 \
        --likelihood gaussian --architecture mlp

The first command trains a convolutional model on synthetic images of one object. The second one needs the four idx
files of Fashion-MNIST in a folder; the Hub id zalando-datasets/fashion_mnist works as well. Times and scores of both
networks on Fashion-MNIST: model_cards/vae.md. The method is from Kingma & Welling 2014, "Auto-Encoding Variational
Bayes".
"""

import math
from dataclasses import dataclass, field

from hf_dl.data.collate import as_is
from hf_dl.metrics.latents import posterior_collapse
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import vae
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(vae.VaeFlags, vae.ImageFlags, TrainingArgs):
    """Flags of this script."""

    kl_warmup: float = field(
        default=0.0, metadata={"help": "Fraction of the run in which the weight of the KL rises from 0 to beta."}
    )
    importance_samples: int = field(
        default=50, metadata={"help": "Codes K per image for the importance-weighted bound; 0: no bound."}
    )
    max_steps: int = 0
    epochs: float = 10.0
    batch_size: int = 128
    optimizer: str = "adam"
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate; default: 1e-3 for mlp, 2e-3 for conv."}
    )
    schedule: Schedule | None = field(
        default=None, metadata={"help": "Schedule after warm-up; default: constant for mlp, cosine for conv."}
    )
    warmup_steps: int | None = field(
        default=None,
        metadata={"help": "Steps in which the learning rate rises from 0; default: 0 for mlp, 200 for conv."},
    )
    eval_epochs: float = 1.0
    log_every: int = 10

    def __post_init__(self):
        vae.fill_defaults(self)  # before the checks, and so that results.json has the values in use
        super().__post_init__()
        vae.check_flags(self)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, score training and test images, and write the model, the report and the pictures into `output_dir`."""
    args = parse_args(Args, argv)
    train, validation, test = (vae.load_images(args, split) for split in ("train", "validation", "test"))
    model = vae.make_model(args, train)
    run = TrainingRun(args, model, train, collate=as_is, processor=vae.make_processor(model.config))
    validation_batches = run.shard(validation, 250)
    train_batches, test_batches = run.shard(vae.first_images(train, test), 250), run.shard(test, 250)

    for batch in run:
        # Images x, (batch, channels, height, width), in [0, 1]. The model decodes the code z = mean + std * noise to
        # reconstructions y = sigmoid(logits).
        pixel_values = vae.to_pixel_values(batch["image"], run.device)
        output = run.model(pixel_values, generator=run.generator)

        # Reconstruction loss: -log p(x|z) in nats, summed over the pixels, without the constant of the Gaussian.
        # bernoulli: BCE = -sum(x log y + (1 - x) log(1 - y)). gaussian: SSE / (2 pixel_std^2), SSE = sum((x - y)^2).
        reconstruction_loss = output.reconstruction_loss.mean()

        # KL divergence: KL(q(z|x) || N(0, I)) = 1/2 sum(mean^2 + variance - 1 - log variance), in nats.
        kl = output.kl.mean()

        # Weight of the KL: rises from 0 to beta over the first `kl_warmup` of the run.
        beta = args.beta * min(1.0, run.progress / args.kl_warmup) if args.kl_warmup else args.beta

        loss = reconstruction_loss + beta * kl
        run.step(loss, kl=kl, beta=beta, **vae.mean_errors(pixel_values, output.logits))

        if run.evaluation_due:
            with run.averaged():
                scores = vae.evaluate(run.model, validation_batches, gather=run.gather)
            run.log(**{f"val_{name}": value for name, value in scores.items() if name != "images"})

    if args.monitor:
        run.load_best()
    metrics = {}
    with run.averaged():
        for split, batches in (("train", train_batches), ("test", test_batches)):
            scores = vae.evaluate(run.model, batches, importance_samples=args.importance_samples, gather=run.gather)
            metrics |= {f"{split}_{name}": value for name, value in scores.items()}
        if run.is_main:
            metrics |= vae.epoch_means(run.folder, math.ceil(len(train) / args.batch_size))
            vae.draw(run.unwrapped, test, run.folder)
    if warning := posterior_collapse(int(metrics["test_active_units"]), args.latent_size):
        run.event("posterior_collapse", warning)
    metrics = run.finish(metrics)
    if run.is_main:
        vae.write_report(run.folder)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
