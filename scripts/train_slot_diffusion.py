"""Train slot diffusion: a slot encoder and the U-Net that draws images from its slots, on latents.

scripts/run accelerate launch scripts/train_slot_diffusion.py

It starts from the slots of runs/train_slots; the autoencoder of the latents, runs/train_autoencoder, stays as it is.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # its neighbors are found also when a test imports this file
import evaluate_slot_diffusion as diffusion

from hf_dl.data.collate import as_is
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(diffusion.ModelFlags, diffusion.SceneFlags, TrainingArgs):
    """Flags of this script; the learning rate is that of the U-Net."""

    max_steps: int = 1500
    batch_size: int = 16
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995
    eval_every: int = 500

    def __post_init__(self):
        super().__post_init__()
        diffusion.check(self)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate on the test split, and leave pipeline, report and pictures in `output_dir`."""
    args = parse_args(Args, argv)
    model = diffusion.make_model(args)
    train, validation, test = (diffusion.load_images(args, split) for split in ("train", "validation", "test"))
    data = diffusion.SceneLatents(train) if args.cache_latents else train
    rates = {f"{part}.": args.encoder_learning_rate for part in ("slot_encoder", "guide") if getattr(model, part)}
    run = TrainingRun(args, model, data, collate=as_is, learning_rates=rates)
    autoencoder = model.autoencoder.to(run.device)
    if args.cache_latents:
        run.say(f"The latents of {len(train)} images were computed once, in {data.compute(autoencoder):.1f} s.")
    held = [run.shard(diffusion.SceneLatents(split, autoencoder), 64) for split in (validation, test)]
    schedule = model.pipeline().scheduler

    for batch in run:
        pixel_values = diffusion.to_pixel_values(batch["image"], run.device)
        latents = diffusion.latents_of(batch, pixel_values, autoencoder)
        noise = torch.randn(latents.shape, generator=run.generator, device=run.device)
        times = torch.randint(args.num_timesteps, (len(latents),), generator=run.generator, device=run.device)
        output = run.model(pixel_values, schedule.add_noise(latents, noise, times), times, generator=run.generator)
        loss = F.mse_loss(output.predicted.float(), diffusion.target(schedule, latents, noise, times))
        run.step(loss + diffusion.guidance(output, pixel_values, args), denoising=loss)
        if run.evaluation_due:
            with run.averaged():
                scores = diffusion.evaluate(run.model, held[0], schedule, gather=run.gather)
            run.log(**{f"val_{name}": value for name, value in scores.items()})

    with run.averaged():
        scores = diffusion.evaluate(run.model, held[1], schedule, gather=run.gather)
        metrics = {f"test_{name}": value for name, value in scores.items()}
        if run.is_main:
            metrics |= diffusion.draw_and_measure(run.unwrapped.pipeline(), train, test, run.folder, args)
    metrics = run.finish(metrics)
    if run.is_main:
        diffusion.write_report(run.folder)
    return metrics


if __name__ == "__main__":
    main()
