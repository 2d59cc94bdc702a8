"""Train slot diffusion: a slot encoder and the U-Net that draws images from its slots, on latents.

scripts/run accelerate launch scripts/train_autoencoder.py
scripts/run accelerate launch scripts/train_slot_diffusion.py

The autoencoder is frozen, and its latents are computed once. With --autoencoder left empty and none in
runs/train_autoencoder, one is trained first.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found also when a test imports this file
import evaluate_slot_diffusion as diffusion

from hf_dl.data.collate import as_is
from hf_dl.models import slot_unet
from hf_dl.models.latent_autoencoder import encode_latents
from hf_dl.models.slot_autoencoder import ARCHITECTURES, SlotEncoderModel
from hf_dl.pipelines.slot_diffusion import noise_schedule
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(diffusion.SlotData, TrainingArgs):
    """Flags of this script; the learning rate is that of the U-Net."""

    autoencoder: str = field(default="", metadata={"help": "Folder or Hub id; empty: runs/train_autoencoder."})
    cache_latents: bool = field(default=True, metadata={"help": "Compute the latents once, and keep them in memory."})
    architecture: Literal["small", "paper", "resnet18"] = field(default="small", metadata={"help": "Slot encoder."})
    slot_encoder: str = field(default="", metadata={"help": "Trained slot encoder or autoencoder to start from."})
    slot_init: Literal["gaussian", "learned"] = field(default="gaussian", metadata={"help": "Slots to begin with."})
    num_slots: int = field(default=5, metadata={"help": "Slots K: most objects, and one for the background."})
    num_iterations: int = field(default=3, metadata={"help": "Iterations T of slot attention."})
    unet: Literal["small", "clevrtex"] = field(default="small", metadata={"help": "Sizes of the U-Net."})
    denoiser: Literal["slot_unet", "unet2d"] = field(default="slot_unet", metadata={"help": "Ours, or diffusers'."})
    encoder_learning_rate: float = field(default=1e-4, metadata={"help": "Peak rate of the slot encoder."})
    beta_start: float = field(default=0.0015, metadata={"help": "Noise of the first step."})
    beta_end: float = field(default=0.0195, metadata={"help": "Noise of the last step; linear between."})
    num_timesteps: int = field(default=1000, metadata={"help": "Steps T of the noise schedule."})
    num_drawn: int = field(default=200, metadata={"help": "Test images that are drawn again in the end."})
    num_inference_steps: int = field(default=20, metadata={"help": "Steps of DPM-Solver++, with which they are."})
    max_steps: int = 4000
    batch_size: int = 16
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    eval_every: int = 1000

    def __post_init__(self):
        super().__post_init__()
        sizes = {"image_size": self.image_size, "num_slots": self.num_slots, "num_iterations": self.num_iterations}
        self.config = diffusion.checked(ARCHITECTURES[self.architecture], **sizes, slot_init=self.slot_init)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start={self.beta_start} and beta_end={self.beta_end} must rise within 0 to 1.")
        for name in ("encoder_learning_rate", "num_timesteps", "num_drawn", "num_inference_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.num_drawn < 2:
            raise ValueError(f"num_drawn={self.num_drawn} must be at least 2: FID compares sets of images.")


def find_autoencoder(args: Args) -> str:
    """The folder of the autoencoder; where none is named and none is there, one is trained."""
    folder = args.autoencoder or "runs/train_autoencoder"
    if not args.autoencoder and not Path(folder, "config.json").is_file():
        import train_autoencoder

        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"{folder} holds no autoencoder; with several processes, train it first.")
        print(f"{folder} holds no autoencoder yet; training one first.", file=sys.stderr, flush=True)
        shared = ("source", "style", "image_size", "crop", "num_train", "num_test", "seed", "cpu_threads")
        flags = [f"--{name}={getattr(args, name)}" for name in shared]
        flags += ["--num_objects", *map(str, args.num_objects), f"--output_dir={folder}"]
        train_autoencoder.main([*flags, *([f"--mixed_precision={args.mixed_precision}"] * bool(args.mixed_precision))])
    return folder


def make_model(args: Args, autoencoder: torch.nn.Module) -> diffusion.SlotDenoiser:
    """Make slot encoder and U-Net as the flags say, for the latents of the autoencoder."""
    encoder = SlotEncoderModel(args.config)
    if args.slot_encoder:
        encoder = SlotEncoderModel.from_pretrained(args.slot_encoder)
        if encoder.config.image_size != args.image_size:
            raise ValueError(
                f"slot_encoder={args.slot_encoder!r} is for images of {encoder.config.image_size} pixels, and "
                f"image_size={args.image_size}; give both alike."
            )
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if autoencoder.config.in_channels != 3 or args.image_size % factor:
        raise ValueError(
            f"image_size={args.image_size} does not fit the autoencoder, which takes images of "
            f"{autoencoder.config.in_channels} channels and a multiple of {factor} pixels."
        )
    fields = slot_unet.ARCHITECTURES[args.unet] | {
        "sample_size": args.image_size // factor,
        "in_channels": autoencoder.config.latent_channels,
        "cross_attention_dim": encoder.config.slot_dim,
        "num_train_timesteps": args.num_timesteps,
    }
    halvings = slot_unet.ARCHITECTURES[args.unet]["sample_size"] / fields["sample_size"]
    sizes = slot_unet.ARCHITECTURES[args.unet]["attention_resolutions"]
    fields["attention_resolutions"] = tuple(max(1, int(size / halvings)) for size in sizes)
    schedule = noise_schedule(
        num_train_timesteps=args.num_timesteps, beta_start=args.beta_start, beta_end=args.beta_end
    )
    return diffusion.SlotDenoiser(encoder, diffusion.make_unet(args.denoiser, fields), autoencoder, schedule)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate on the test split, and leave pipeline, report and pictures in `output_dir`."""
    args = parse_args(Args, argv)
    autoencoder = diffusion.load_autoencoder(find_autoencoder(args))
    model = make_model(args, autoencoder)
    train, validation, test = (diffusion.load_images(args, split) for split in ("train", "validation", "test"))
    data = diffusion.SceneLatents(train) if args.cache_latents else train
    rates = {"slot_encoder.": args.encoder_learning_rate}
    run = TrainingRun(args, model, data, collate=as_is, learning_rates=rates)
    autoencoder.to(run.device)
    if args.cache_latents:
        seconds = data.compute(autoencoder)
        run.say(f"The latents of {len(train)} images were computed once, in {seconds:.1f} s, and are kept.")
    held = [diffusion.SceneLatents(split) for split in (validation, test)]
    for split in held:
        split.compute(autoencoder)
    validation_batches, test_batches = (run.shard(split, 64) for split in held)
    schedule = model.pipeline().scheduler

    for batch in run:
        pixel_values = diffusion.to_pixel_values(batch["image"], run.device)
        if args.cache_latents:
            latents = batch["latents"]
        else:
            with torch.no_grad():
                latents = encode_latents(autoencoder, pixel_values)
        noise = torch.randn(latents.shape, generator=run.generator, device=run.device)
        times = torch.randint(args.num_timesteps, (len(latents),), generator=run.generator, device=run.device)
        noisy = schedule.add_noise(latents, noise, times)
        epsilon, _ = run.model(pixel_values, noisy, times, generator=run.generator)
        run.step(F.mse_loss(epsilon.float(), noise))
        if run.evaluation_due:
            with run.averaged():
                scores = diffusion.evaluate(run.model, validation_batches, schedule, gather=run.gather)
            run.log(**{f"val_{name}": value for name, value in scores.items()})

    with run.averaged():
        scores = diffusion.evaluate(run.model, test_batches, schedule, gather=run.gather)
        metrics = {f"test_{name}": value for name, value in scores.items()}
        if run.is_main:
            options = {"num_drawn": args.num_drawn, "num_inference_steps": args.num_inference_steps}
            metrics |= diffusion.draw_and_measure(run.unwrapped.pipeline(), train, test, run.folder, **options)
    metrics = run.finish(metrics)
    if run.is_main:
        diffusion.write_report(run.folder)
    return metrics


if __name__ == "__main__":
    main()
