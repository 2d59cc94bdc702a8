"""Train slot diffusion: a slot encoder, and a U-Net that draws images from its slots by latent diffusion.

    scripts/run accelerate launch scripts/train_slot_diffusion.py --prepare

The run starts from the slot autoencoder in runs/train_slots and the latents' autoencoder in runs/train_autoencoder.
--prepare trains them first if they are missing. Both are frozen, so slots and latents are computed once per image. The
U-Net also gets the image that the slot autoencoder paints, as in Pandey et al. 2022, "DiffuseVAE". Scores to expect:
model_cards/slot_diffusion.md. Textured scenes need slots that are trained for longer, and `--unet wide`: see
scripts/experiments/slot_diffusion_texture.toml.

Diffusion on slots is from Wu et al. 2023, "SlotDiffusion", and Jiang et al. 2023, "Object-Centric Slot Diffusion".
They train the slots together with the U-Net, which --train_slots true does. The loss terms of the broadcast decoder in
this case are ours; they are for small models and short runs.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.training_utils import compute_snr

from hf_dl.data.collate import as_is
from hf_dl.models.layers_attention import attention_masks
from hf_dl.publishing.runs import push_run
from hf_dl.recipes import slot_diffusion
from hf_dl.recipes.scene_images import SceneFlags, load_images, to_pixel_values
from hf_dl.recipes.slot_denoiser import TRAINING_DRAWS, SceneLatents, compute_columns, read_conditions
from hf_dl.recipes.slot_diffusion_parts import prepare_parts
from hf_dl.training.args import Schedule, TrainingArgs, parse_args, script_path
from hf_dl.training.run import TrainingRun


@dataclass
class Args(slot_diffusion.DiffusionFlags, SceneFlags, TrainingArgs):
    """Flags of this script. `learning_rate` is the rate of the U-Net."""

    prepare: bool = field(
        default=False,
        metadata={"help": "Train the slot autoencoder and the latents' autoencoder if they are missing."},
    )
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
        slot_diffusion.check_flags(self)


def matching_loss(attention: torch.Tensor, owners: torch.Tensor, *, image_size: int, power: float) -> torch.Tensor:
    """Compute the matching term: the cross-entropy between attention masks and the decoder's segments.

    Without it, several slots share the ground in the attention, even if one slot paints it. SPOT
    (Kakogeorgiou et al. 2024) trains the attention of the encoder by the decoder as well.

    Let a_k(x) be the attention mask of slot k at pixel x, and S_k the pixels that slot k owns. The term is the mean
    over images of sum_k w_k L_k / sum_k w_k. L_k is the mean of -log a_k(x) over the pixels of S_k, and the weight w_k
    is |S_k|^power. Most pixels are ground; a power below 1 gives small objects more weight.

    Args:
        attention: (batch, slots, tokens).
        owners: Slot of each pixel, int64 (batch, height, width).
        image_size: Height and width of the images, in pixels.
        power: 1 weights all pixels alike, 0 weights all slots alike.

    Returns:
        A scalar.
    """
    masks = attention_masks(attention, owners.shape[-2:], image_size=image_size)  # a_k(x)
    owned = F.one_hot(owners, masks.shape[1]).movedim(-1, 1).float()  # 1 where x is in S_k; (batch, slots, h, w)
    areas = owned.mean((2, 3)).clamp_min(1 / owned[0, 0].numel())  # |S_k| as a fraction of the image
    cross_entropy = -(owned * masks.clamp_min(1e-6).log()).mean((2, 3)) / areas  # L_k
    weights = areas**power * owned.amax((2, 3))  # 0 for slots without pixels
    return ((weights * cross_entropy).sum(1) / weights.sum(1)).mean()


def min_snr_weights(scheduler: SchedulerMixin, times: torch.Tensor, bound: float) -> torch.Tensor:
    """Compute the weights of timesteps in the loss: min(SNR_t, bound) for the error of the clean latents.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy". SNR_t = a_t / (1 - a_t). The error
    of the clean latents is the error of the noise divided by SNR_t, and the error of the velocity divided by
    SNR_t + 1.

    Args:
        scheduler: The noise schedule.
        times: Timesteps, int64 (batch,).
        bound: The largest weight; 0 gives all timesteps the weight 1.

    Returns:
        (batch,).
    """
    if not bound:
        return torch.ones_like(times, dtype=torch.float32)
    snr = compute_snr(scheduler, times)
    shift = 0 if scheduler.config.prediction_type == "epsilon" else 1
    return snr.clamp(max=bound) / (snr + shift)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate on the test split, and write the pipeline, the report and the pictures into `output_dir`."""
    args = parse_args(Args, argv)
    prepare_parts(args, script_path(Args).parent)
    model = slot_diffusion.make_model(args)
    train, validation, test = (load_images(args, split) for split in ("train", "validation", "test"))
    data = SceneLatents(train, num_draws=TRAINING_DRAWS) if args.cache_latents else train
    pretrained = [name for name in ("slot_encoder", "decoder") if getattr(model, name, None) is not None]
    rates = {f"{name}.": args.encoder_learning_rate for name in pretrained}  # the U-Net has args.learning_rate
    run = TrainingRun(args, model, data, collate=as_is, learning_rates=rates)
    scheduler = model.place(run.device).scheduler
    if args.sketch and args.residual:
        model.measure_residual(train)
    if args.cache_latents:
        run.say(f"The frozen parts computed their share of {len(train)} images once, in {data.compute(model):.1f} s.")
    validation_batches = run.shard(SceneLatents(validation, model), 64)
    test_batches = run.shard(SceneLatents(test, model), 64)

    for batch in run:
        pixel_values = to_pixel_values(batch["image"], run.device)  # (batch, 3, height, width), in [-1, 1]
        known = batch if args.cache_latents else compute_columns(model, pixel_values, num_draws=TRAINING_DRAWS)
        # z, (batch, channels, rows, columns): the latents, or with --residual (latents - sketch) / their scale.
        latents = known["latents"].to(run.device)

        # Noisy latents: z_t = sqrt(a_t) z + sqrt(1 - a_t) noise, with a_t = (1 - beta_1) ... (1 - beta_t).
        noise = torch.randn(latents.shape, generator=run.generator, device=run.device)
        times = torch.randint(args.num_timesteps, (len(latents),), generator=run.generator, device=run.device)
        noisy = scheduler.add_noise(latents, noise, times)
        output = run.model(
            noisy,
            times,
            conditions=read_conditions(known, run.device),  # None if the slots are trained
            pixel_values=pixel_values,
            generator=run.generator,
        )

        # Denoising loss: mean w_t (predicted - target)^2. The target is the noise (Ho et al. 2020) or the velocity
        # sqrt(a_t) noise - sqrt(1 - a_t) z (Salimans & Ho 2022). The weights w_t are in `min_snr_weights`.
        target = noise if args.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, times)
        errors = (output.predicted.float() - target).square().mean((1, 2, 3))
        denoising_loss = (min_snr_weights(scheduler, times, args.min_snr) * errors).mean()
        loss = denoising_loss

        if output.reconstruction is not None:  # the slots are trained, with a broadcast decoder
            # Decoder error: mean (reconstruction - pixel_values)^2.
            decoder_error = F.mse_loss(output.reconstruction.float(), pixel_values)
            # Area penalty: 1 - max_k mean_xy mask_k, the area of all masks except the largest, as in train_slots.py.
            area_penalty = 1 - output.masks.float().mean((2, 3)).amax(1).mean()
            # Matching term: cross-entropy between attention masks and the decoder's segments.
            matching = matching_loss(
                output.attention, output.owners, image_size=args.image_size, power=args.matching_power
            )
            decoder_loss = decoder_error + args.area_penalty * area_penalty + args.matching_weight * matching
            loss = loss + args.broadcast_weight * decoder_loss

        run.step(loss, denoising=denoising_loss)

        if run.evaluation_due:
            with run.averaged():
                scores = slot_diffusion.evaluate(run.model, validation_batches, scheduler, gather=run.gather)
            run.log(**{f"val_{name}": value for name, value in scores.items()})

    with run.averaged():
        scores = slot_diffusion.evaluate(run.model, test_batches, scheduler, gather=run.gather)
        metrics = {f"test_{name}": value for name, value in scores.items()}
        if run.is_main:
            metrics |= slot_diffusion.draw_and_measure(run.unwrapped.pipeline(), train, test, run.folder, args)
    metrics = run.finish(metrics)
    if run.is_main:
        slot_diffusion.write_report(run.folder)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
