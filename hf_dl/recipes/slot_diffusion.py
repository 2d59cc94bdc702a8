"""Slot diffusion: flags, model, latents, evaluation, drawing and editing of images, figures and report.

The training loop and its loss are in scripts/train_slot_diffusion.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
    VQModel,
)
from torch import nn

from hf_dl.data.image_arrays import ImageTensors
from hf_dl.metrics import perceptual
from hf_dl.metrics.images import default_features, fid
from hf_dl.metrics.segmentation import segmentation_scores
from hf_dl.models.latent_autoencoder import downsampling_factor
from hf_dl.models.layers_attention import attention_masks
from hf_dl.models.slot_autoencoder import (
    SlotAutoencoderModel,
    SlotAutoencoderOutput,
    SlotDecoderModel,
    SlotEncoderModel,
)
from hf_dl.models.slot_inits import SLOT_INITS
from hf_dl.models.slot_library import SlotLibrary
from hf_dl.models.slot_unet import ARCHITECTURES as UNETS
from hf_dl.models.slot_unet import SlotUNetModel
from hf_dl.pipelines.diffusion_sampling import noise_schedule
from hf_dl.pipelines.model_loading import check_not_runs
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from hf_dl.progress import activity
from hf_dl.reporting.card import LOCAL_ID, run_card
from hf_dl.reporting.grids import color_segments, image_grid
from hf_dl.reporting.plots import plot_run

from .latent_autoencoder import load_autoencoder
from .scene_images import PERCEPTUAL_HELP, mean_perceptual_distance, quantize, to_pixel_values, to_uint8
from .slot_denoiser import SlotDenoiser, read_conditions
from .slot_diffusion_parts import find_part
from .slots import SlotFlags, make_config

SUMMARY = (
    "Slot diffusion (Wu et al. 2023; Jiang et al. 2023) finds the objects of an image as slots, without labels. "
    "Latent diffusion then draws images from slots: the same image, the image without an object, or a new one."
)
USAGE = """\
from diffusers import DPMSolverMultistepScheduler
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from PIL import Image

pipe = SlotDiffusionPipeline.from_pretrained("{local}")
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)  # 20 steps instead of 1000
image = Image.open("image.png")
segments = pipe.segment(image)  # the slot of each pixel
redrawn = pipe(image, num_inference_steps=20).images[0]  # the image, drawn from its slots
edited = pipe.edit(image, remove=[2], num_inference_steps=20).images[0]  # without the object in slot 2"""
LIMITS = (
    "Slots have no names. The slot of the background, and the slot of an object, differ between images.",
    "A redrawn image has the content of the slots. Other details are invented, and change with the noise.",
)
TAGS = ("slot-attention", "object-centric-learning", "latent-diffusion")
CURVES = {
    "loss of the denoiser": {"training": "denoising", "validation": "val_loss"},
    "attention masks": {"foreground ARI": "val_attention_fg_ari", "ARI": "val_attention_ari"},
}
PLAIN_TEMPERATURE = 0.3  # with all of the noise, a small U-Net makes plain objects mottled
LIBRARY_IMAGES = 2000  # number of training images whose slots fill the slot library


@dataclass
class DrawFlags:
    """Flags of the final images. The training and the evaluation script share them."""

    num_drawn: int = field(
        default=200, metadata={"help": "Number of test images that are redrawn, and of images that are composed."}
    )
    num_inference_steps: int = field(default=20, metadata={"help": "Steps of DPM-Solver++ per image."})
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the noise in sampling. Training saves it with the model; default: 0.3 for plain "
            "synthetic scenes with residual, else 1. In evaluation, the default is the value of the model."
        },
    )
    perceptual: str = field(default="random", metadata={"help": PERCEPTUAL_HELP})


@dataclass
class DiffusionFlags(SlotFlags, DrawFlags):
    """Flags of the model and of the loss."""

    autoencoder: str = field(
        default="", metadata={"help": "Folder or Hub id of the latents' autoencoder; default: runs/train_autoencoder."}
    )
    cache_latents: bool = field(
        default=True, metadata={"help": "Compute the latents of all training images once and keep them in memory."}
    )
    slot_encoder: str = field(
        default="",
        metadata={
            "help": "Slot autoencoder to start from, a folder or Hub id; default: runs/train_slots; none: new weights."
        },
    )
    slot_init: Literal[tuple(SLOT_INITS)] = field(
        default="gaussian", metadata={"help": "Initial slots if slot_encoder is none."}
    )
    unet: Literal[tuple(UNETS)] = field(default="small", metadata={"help": "Sizes of the U-Net."})
    denoiser: Literal["slot_unet", "unet2d"] = field(
        default="slot_unet", metadata={"help": "slot_unet: SlotUNetModel. unet2d: UNet2DConditionModel of diffusers."}
    )
    position_frequencies: int = field(
        default=4, metadata={"help": "Octaves of the position features in slot_unet; -1: no position features."}
    )
    sketch: bool = field(
        default=True, metadata={"help": "Give the U-Net the image that the slot autoencoder paints, as latents."}
    )
    residual: bool = field(
        default=True, metadata={"help": "With a sketch: draw the difference from the sketch, not the whole image."}
    )
    layout_channels: int = field(
        default=32, metadata={"help": "Channels of the slots that the U-Net gets where their masks are; 0: none."}
    )
    min_snr: float = field(
        default=5.0,
        metadata={"help": "Bound of the loss weights, min(SNR, bound) of the clean latents; 0: all timesteps alike."},
    )
    train_slots: bool = field(
        default=False,
        metadata={"help": "Train slots and U-Net together, as published. Needs --sketch false --layout_channels 0."},
    )
    encoder_learning_rate: float = field(
        default=2e-4,
        metadata={"help": "train_slots: peak learning rate of the slot encoder and the broadcast decoder."},
    )
    prediction_type: Literal["epsilon", "v_prediction"] = field(
        default="v_prediction", metadata={"help": "Target of the U-Net: the noise (as published), or the velocity."}
    )
    broadcast_weight: float = field(
        default=10.0,
        metadata={"help": "train_slots: weight of all loss terms of the broadcast decoder; 0: no broadcast decoder."},
    )
    area_penalty: float = field(
        default=6e-3, metadata={"help": "train_slots: weight of the area penalty on all masks except the largest."}
    )
    matching_weight: float = field(
        default=0.2,
        metadata={"help": "train_slots: weight of the matching term between attention masks and decoder segments."},
    )
    matching_power: float = field(
        default=0.75,
        metadata={"help": "train_slots: power of the area that weights slots in the matching term; 0: all alike."},
    )
    beta_start: float = field(default=0.0015, metadata={"help": "Variance of the noise in the first step."})
    beta_end: float = field(
        default=0.0195, metadata={"help": "Variance of the noise in the last step; linear in between."}
    )
    num_timesteps: int = field(default=1000, metadata={"help": "Steps T of the noise schedule."})


def check_flags(flags: Any) -> None:
    """Validate the flags of the training script before any image is loaded.

    Args:
        flags: `DiffusionFlags` and `SceneFlags`.

    Raises:
        ValueError: If a flag is out of range.
    """
    make_config(flags, slot_init=flags.slot_init)
    if not 0 < flags.beta_start <= flags.beta_end < 1:
        raise ValueError(
            f"beta_start={flags.beta_start} and beta_end={flags.beta_end} must satisfy 0 < beta_start <= beta_end < 1."
        )
    if flags.train_slots and (flags.sketch or flags.layout_channels):
        raise ValueError(
            "train_slots=True has no fixed painting that the U-Net could get; add --sketch false --layout_channels 0."
        )
    if flags.slot_encoder == "none" and not flags.train_slots:
        raise ValueError("slot_encoder='none' starts with new weights, which need --train_slots true.")
    if flags.denoiser != "slot_unet" and (flags.sketch or flags.layout_channels):
        raise ValueError(
            f"denoiser={flags.denoiser!r} takes no painting; add --sketch false --layout_channels 0, or leave it out."
        )
    for name in (
        "broadcast_weight",
        "area_penalty",
        "matching_weight",
        "matching_power",
        "layout_channels",
        "min_snr",
    ):
        if not getattr(flags, name) >= 0:
            raise ValueError(f"{name}={getattr(flags, name)} must be 0 or above.")
    check_draw_flags(flags)
    for name in ("encoder_learning_rate", "num_timesteps"):
        if not getattr(flags, name) > 0:
            raise ValueError(f"{name}={getattr(flags, name)} must be above 0.")


def check_draw_flags(flags: Any) -> None:
    """Validate the flags of the final images.

    Args:
        flags: `DrawFlags`.

    Raises:
        ValueError: If a flag is out of range.
    """
    if flags.num_drawn < 2:
        raise ValueError(f"num_drawn={flags.num_drawn} must be at least 2: FID compares sets of images.")
    if flags.num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={flags.num_inference_steps} must be at least 1.")
    if flags.temperature is not None and not 0 <= flags.temperature < math.inf:
        raise ValueError(f"temperature={flags.temperature} must be 0 or above.")


# ---------------------------------------------------------------------------------------------------------------------
# Model


def make_unet(kind: str, fields: dict[str, Any]) -> ModelMixin:
    """Create the denoiser.

    Args:
        kind: "slot_unet" for `SlotUNetModel`, or "unet2d" for `UNet2DConditionModel` with the same widths, layers and
            attention.
        fields: Fields of the config of `SlotUNetModel`.

    Raises:
        ValueError: If the sizes do not fit together.
    """
    unet = SlotUNetModel(**fields)
    if kind == "slot_unet":
        return unet
    config, levels = unet.config, range(len(unet.config.block_out_channels))
    sizes = [config.sample_size // config.patch_size >> level for level in levels]
    attends = [size in config.attention_resolutions for size in sizes]  # the network of diffusers has no patches
    down = ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends]
    up = ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)]
    return UNet2DConditionModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=down,
        up_block_types=up,
        transformer_layers_per_block=config.transformer_layers_per_block,
        # diffusers' attention_head_dim is the number of heads
        attention_head_dim=[width // config.attention_head_dim for width in config.block_out_channels],
        cross_attention_dim=config.cross_attention_dim,
        dropout=config.dropout,
        norm_num_groups=config.norm_num_groups,
    )


def make_slots(args: Any) -> tuple[SlotEncoderModel | SlotAutoencoderModel, SlotDecoderModel | None]:
    """Create the slot encoder and the broadcast decoder from a trained slot autoencoder.

    Args:
        args: `DiffusionFlags` and `SceneFlags`.

    Returns:
        With frozen slots, the slot autoencoder and None. With `train_slots`, the encoder and the decoder. If
        `slot_encoder` is "none", the encoder has new weights and the decoder is None. If `broadcast_weight` is 0, the
        decoder is None.

    Raises:
        ValueError: If the slot autoencoder has another image size, number of slots or number of iterations, or no
            decoder.
    """
    if args.slot_encoder == "none":
        return SlotEncoderModel(make_config(args, slot_init=args.slot_init)), None
    folder = find_part(args, "slot_encoder")
    check_not_runs(folder)
    kind = SlotEncoderModel if args.train_slots else SlotAutoencoderModel
    encoder, report = kind.from_pretrained(folder, output_loading_info=True)
    for flag in ("image_size", "num_slots", "num_iterations"):
        if getattr(encoder.config, flag) != getattr(args, flag):
            raise ValueError(
                f"slot_encoder={folder!r} has {flag}={getattr(encoder.config, flag)}, but this run has "
                f"{flag}={getattr(args, flag)}. Both must be equal."
            )
    if args.train_slots and not args.broadcast_weight:
        return encoder, None
    decoder = None
    if args.train_slots:
        decoder, report = SlotDecoderModel.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"]:
        way = "--broadcast_weight 0" if args.train_slots else "--train_slots true --broadcast_weight 0"
        raise ValueError(
            f"slot_encoder={folder!r} has no decoder. Give a slot autoencoder, or train without the decoder by {way}."
        )
    return encoder, decoder


def make_model(args: Any, autoencoder: AutoencoderKL | VQModel | None = None) -> SlotDenoiser:
    """Create slot encoder, U-Net and noise schedule for the latents of an autoencoder.

    Args:
        args: `DiffusionFlags` and `SceneFlags`.
        autoencoder: The autoencoder of the latents. Defaults to the autoencoder in `args.autoencoder`.

    Raises:
        ValueError: If a part is missing, or the parts do not fit together.
    """
    if autoencoder is None:
        autoencoder = load_autoencoder(find_part(args, "autoencoder"))
    factor = downsampling_factor(autoencoder)
    if args.image_size % factor:
        raise ValueError(
            f"image_size={args.image_size} does not fit the autoencoder. Its image sizes are multiples of {factor}."
        )
    encoder, decoder = make_slots(args)
    sizes_of = UNETS[args.unet]
    positions = None if args.position_frequencies < 0 else args.position_frequencies
    fields = sizes_of | {
        "position_frequencies": positions,
        "sample_size": args.image_size // factor,
        "in_channels": autoencoder.config.latent_channels,
        "cross_attention_dim": encoder.config.slot_dim,
        "num_train_timesteps": args.num_timesteps,
    }
    if args.sketch:
        fields["sketch_channels"] = fields["in_channels"]
        if args.residual and args.temperature is None and args.source == "synthetic" and args.style == "plain":
            fields["temperature"] = PLAIN_TEMPERATURE
    if args.temperature is not None:
        fields["temperature"] = args.temperature
    fields["layout_channels"] = args.layout_channels
    halvings = sizes_of["sample_size"] / fields["sample_size"]
    sizes = sizes_of["attention_resolutions"]
    fields["attention_resolutions"] = tuple(max(1, int(size / halvings)) for size in sizes)
    scheduler = noise_schedule(
        num_train_timesteps=args.num_timesteps,
        beta_start=args.beta_start,
        beta_end=args.beta_end,
        prediction_type=args.prediction_type,
    )
    unet = make_unet(args.denoiser, fields)
    return SlotDenoiser(encoder, unet, autoencoder, scheduler, decoder, train_slots=args.train_slots)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def denoising_target(
    scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
) -> torch.Tensor:
    """Return the target of the U-Net: the noise, or the velocity, as set by `prediction_type` of the scheduler."""
    return noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, times)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict],
    scheduler: SchedulerMixin,
    *,
    gather: Callable[[Any], Any] = lambda values: values,
) -> dict[str, float]:
    """Measure the error of the denoiser, and compare the attention masks with the true masks.

    Args:
        model: The `SlotDenoiser`, wrapped for several devices or not.
        batches: Batches of `SceneLatents`.
        scheduler: The noise schedule.
        gather: Concatenates tensors of all processes. Defaults to a single process.

    Returns:
        `loss`, the mean squared error of the prediction at times that are spread evenly over the schedule, and the
        number of images. With true masks, also `attention_ari`, `attention_fg_ari`, `attention_miou` and
        `attention_mbo`.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(0)
    columns, count = [], scheduler.config.num_train_timesteps
    for batch in batches:
        latents = batch["latents"].to(device)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        places = torch.rand(1, generator=generator, device=device) + torch.arange(len(latents), device=device)
        timesteps = (places / len(latents) % 1 * count).long().clamp(max=count - 1)
        pixel_values = to_pixel_values(batch["image"], device)
        output = model(
            scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            conditions=read_conditions(batch, device),
            pixel_values=pixel_values,
        )
        error = output.predicted.float() - denoising_target(scheduler, latents, noise, timesteps)
        error = error.square().mean((1, 2, 3))
        segments = ()
        if "mask" in batch:
            size = batch["mask"].shape[1:]
            masks = attention_masks(output.attention, size, image_size=pixel_values.shape[-1])
            segments = masks.argmax(1), batch["mask"].to(device)
        columns.append(gather((error, *segments)))
    error, *segments = map(torch.cat, zip(*columns, strict=True))
    scores = {"loss": error.mean().item(), "images": float(len(error))}
    if segments:
        found = segmentation_scores(segments[0], segments[1].long(), mask="attention")
        scores |= {name: value for name, value in found.items() if not math.isnan(value)}
    return scores


@activity("Sampling and measuring images")
@torch.no_grad()
def draw_and_measure(
    pipe: SlotDiffusionPipeline,
    train: ImageTensors,
    test: ImageTensors,
    folder: Path,
    args: DrawFlags,
) -> dict[str, float]:
    """Redraw test images from their slots, edit some of them, compose new images, and measure the results.

    Args:
        pipe: The pipeline.
        train: Images whose slots fill the slot library.
        test: Images to redraw.
        folder: Folder for reconstructions.png, edits.png, compositions.png and slot_library/.
        args: `DrawFlags`.

    Returns:
        `reconstruction_mse` for pixels in [-1, 1], and `reconstruction_perceptual`. The FID of redrawn images
        (`reconstruction_fid_...`), of compositions with one slot per cluster (`per_cluster_fid_...`), and of
        compositions with one background (`background_aware_fid_...`). FID depends on the number of images,
        `drawn_images`.
    """
    measure = perceptual.load(args.perceptual)
    original = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(original.config, solver_order=2)
    options = {"num_inference_steps": args.num_inference_steps, "temperature": args.temperature, "output_type": "pt"}
    images = test.__getitems__(range(min(args.num_drawn, len(test))))["image"]
    generator = torch.Generator().manual_seed(0)
    made = {"reconstruction": []}
    for batch in images.split(50):
        pixel_values = to_pixel_values(batch, pipe.device)
        made["reconstruction"].append(quantize(pipe(image=pixel_values, generator=generator, **options).images))
    redrawn = torch.cat(made["reconstruction"])
    metrics = {
        "reconstruction_mse": (to_pixel_values(redrawn) - to_pixel_values(images)).square().mean().item(),
        "reconstruction_perceptual": mean_perceptual_distance(measure, redrawn, images),
    }
    segments = pipe.segment(to_pixel_values(images[:8], pipe.device))
    rows = [
        [to_uint8(image / 255), color_segments(segment.cpu().numpy()), to_uint8(again / 255)]
        for image, segment, again in zip(images[:8], segments, redrawn, strict=False)
    ]
    columns = [list(column) for column in zip(*rows, strict=True)]
    image_grid(columns, folder / "reconstructions.png", labels=["test images", "segments", "redrawn"])
    _draw_edits(pipe, images, folder / "edits.png", options)

    slots, masks = [], []
    for first in range(0, min(LIBRARY_IMAGES, len(train)), 64):
        rows_of = range(first, min(first + 64, LIBRARY_IMAGES, len(train)))
        output = pipe.encode(to_pixel_values(train.__getitems__(rows_of)["image"], pipe.device))
        slots.append(output.slots.cpu())
        if isinstance(output, SlotAutoencoderOutput):
            masks.append(F.interpolate(output.masks.cpu(), size=16, mode="area"))
        else:
            masks.append(attention_masks(output.attentions[-1], (16, 16), image_size=images.shape[-1]).cpu())
    library = SlotLibrary().fit(torch.cat(slots), torch.cat(masks), num_clusters=slots[0].shape[1], seed=0)
    library.save_pretrained(folder / "slot_library")
    for mode in ("per_cluster", "background_aware"):
        extra = {"max_iou": 0.1} if mode == "background_aware" else {}
        counts = [min(50, len(images) - first) for first in range(0, len(images), 50)]
        made[mode] = [
            quantize(pipe.compose(library, n, mode=mode, generator=generator, **extra, **options).images)
            for n in counts
        ]
    features, pictures = default_features(), [list(to_uint8(images[:8] / 255))]
    for mode, batches in made.items():
        scores = fid(images, torch.cat(batches), features=features)
        metrics |= {f"{mode}_{name}": value for name, value in scores.items() if name.startswith("fid")}
        pictures.append(list(to_uint8(torch.cat(batches)[:8] / 255)))
    labels = ["test images", "redrawn", *(mode.replace("_", " ") for mode in list(made)[1:])]
    image_grid(pictures, folder / "compositions.png", labels=labels)
    pipe.scheduler = original
    return {**metrics, "drawn_images": float(len(images))}


def _draw_edits(pipe: SlotDiffusionPipeline, images: torch.Tensor, path: Path, options: dict[str, Any]) -> None:
    """Draw the first images complete and without each of their slots, from the same noise."""
    rows, size = [], pipe.unet.config.sample_size
    for number in range(min(4, len(images))):
        pixel_values = to_pixel_values(images[number : number + 1], pipe.device)
        found = pipe.encode(pixel_values)
        slots, count = found.slots, found.slots.shape[1]
        keep = torch.cat([torch.ones(1, count), 1 - torch.eye(count)]).bool().to(slots.device)
        keep = keep & getattr(found, "keep", keep[:1])
        keep = keep.where(keep.any(1, keepdim=True), keep[:1])  # an image with one slot keeps it
        noise = torch.randn(1, pipe.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
        drawn = pipe(
            slots=slots.expand(len(keep), -1, -1), keep=keep, latents=noise.expand(len(keep), -1, -1, -1), **options
        ).images
        segments = color_segments(pipe.segment(pixel_values)[0].cpu().numpy())
        rows.append([to_uint8(images[number] / 255), segments, *to_uint8(quantize(drawn) / 255)])
    titles = ["input", "segments", "drawn", *(f"without {slot + 1}" for slot in range(len(rows[0]) - 3))]
    image_grid(rows, path, titles=titles)


@activity("Writing the report")
def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and print the paths."""
    plot_run(folder, folder / "curves.png", CURVES)
    usage = USAGE.format(local=LOCAL_ID)
    about = {"summary": SUMMARY, "usage": usage, "limits": LIMITS, "tags": TAGS}
    card = run_card(folder, **about, library="diffusers")
    card.save(folder / "README.md")
    print(f"pipeline    {folder}  (SlotDiffusionPipeline.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
    print(f"pictures    {folder / 'reconstructions.png'}, edits.png, compositions.png")
