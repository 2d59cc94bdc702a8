"""Evaluate slot diffusion: segmentation scores, images drawn from their slots, edits, and scenes of known slots.

    scripts/run python scripts/evaluate_slot_diffusion.py --model runs/train_slot_diffusion

Draws with DPM-Solver++ in `num_inference_steps` steps. Writes reconstructions.png, edits.png, compositions.png,
slot_library/ and evaluation.json into the pipeline's folder.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from evaluate_autoencoder import load_autoencoder
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import HfArgumentParser

from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import ImageTensors
from hf_dl.metrics import perceptual
from hf_dl.metrics.images import default_features, fid
from hf_dl.metrics.segmentation import segmentation_scores
from hf_dl.models.latent_autoencoder import encode_latents
from hf_dl.models.layers_attention import attention_masks
from hf_dl.models.slot_autoencoder import SlotDecoderModel, SlotEncoderModel
from hf_dl.models.slot_config import ARCHITECTURES
from hf_dl.models.slot_library import SlotLibrary
from hf_dl.models.slot_segmentation import mixture_posterior
from hf_dl.models.slot_unet import ARCHITECTURES as UNETS
from hf_dl.models.slot_unet import SlotUNetModel
from hf_dl.pipelines.diffusion_sampling import noise_schedule
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from hf_dl.recipes.evaluation import checked_config
from hf_dl.recipes.scene_images import PERCEPTUAL_HELP, SceneFlags, load_images, to_pixel_values, to_uint8
from hf_dl.recipes.scene_images import mean_perceptual_distance as mean_distance
from hf_dl.reporting.card import LOCAL_ID, run_card
from hf_dl.reporting.experiment import portable, read_results
from hf_dl.reporting.grids import color_segments, image_grid
from hf_dl.reporting.plots import plot_run

SUMMARY = (
    "Slot diffusion (Wu et al. 2023; Jiang et al. 2023): it finds the objects of an image without labels, as slots, "
    "and draws images from slots by latent diffusion: the image again, without one of its objects, or with others."
)
USAGE = """\
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline

pipe = SlotDiffusionPipeline.from_pretrained("{local}")
segments = pipe.segment(image)                 # which slot has which pixel
redrawn = pipe(image).images[0]                # the image, drawn from its slots
edited = pipe.edit(image, remove=[2]).images[0]"""
LIMITS = (
    "Slots are not named: which of them is the background, and which object a slot holds, changes between images.",
    "What it draws is like the image in what the slots tell; the rest is made up, anew with each noise.",
)
TAGS = ("slot-attention", "object-centric-learning", "latent-diffusion")
CURVES = {
    "loss of the denoiser": {"training": "denoising", "validation": "val_loss"},
    "of the attention's masks": {"foreground ARI": "val_attention_fg_ari", "ARI": "val_attention_ari"},
}
LIBRARY_IMAGES = 2000  # training images whose slots fill the library


@dataclass
class Args(SceneFlags):
    """Flags of the evaluation."""

    model: str = field(default="runs/train_slot_diffusion", metadata={"help": "Folder or Hub id of the pipeline."})
    num_drawn: int = field(default=200, metadata={"help": "Test images that are drawn again, and scenes composed."})
    num_inference_steps: int = field(default=20, metadata={"help": "Steps of DPM-Solver++."})
    perceptual: str = field(default="random", metadata={"help": PERCEPTUAL_HELP})
    output_dir: str = field(default="", metadata={"help": "Where to write; default: the model's folder."})


@dataclass
class ModelFlags:
    """Flags of the training script that say which parts, and how they are tried in the end."""

    autoencoder: str = field(default="", metadata={"help": "Folder or Hub id; empty: runs/train_autoencoder."})
    cache_latents: bool = field(default=True, metadata={"help": "Compute the latents once, and keep them in memory."})
    architecture: Literal["small", "paper", "resnet18"] = field(default="small", metadata={"help": "Slot encoder."})
    slot_encoder: str = field(
        default="",
        metadata={"help": "Slot autoencoder to start from; empty: runs/train_slots; none: fresh slots."},
    )
    slot_init: Literal["gaussian", "learned"] = field(default="gaussian", metadata={"help": "Kind of fresh slots."})
    num_slots: int = field(default=5, metadata={"help": "Slots K: most objects, and one for the background."})
    num_iterations: int = field(default=3, metadata={"help": "Iterations T of slot attention."})
    unet: Literal["small", "clevrtex"] = field(default="small", metadata={"help": "Sizes of the U-Net."})
    denoiser: Literal["slot_unet", "unet2d"] = field(default="slot_unet", metadata={"help": "Ours, or diffusers'."})
    position_frequencies: int = field(default=4, metadata={"help": "Octaves of positions in the U-Net; -1: none."})
    encoder_learning_rate: float = field(default=2e-4, metadata={"help": "Peak rate of the slot encoder."})
    prediction_type: Literal["epsilon", "v_prediction"] = field(
        default="v_prediction", metadata={"help": "What the U-Net predicts: the noise, as published, or the velocity."}
    )
    broadcast_weight: float = field(default=10.0, metadata={"help": "Of the slot autoencoder's decoder; 0: none."})
    area_penalty: float = field(default=6e-3, metadata={"help": "Price of all masks of that decoder but the largest."})
    matching_weight: float = field(default=0.2, metadata={"help": "Of teaching the attention by these masks."})
    matching_power: float = field(default=0.75, metadata={"help": "Of areas in it; 1: pixels count alike, 0: slots."})
    beta_start: float = field(default=0.0015, metadata={"help": "Noise of the first step."})
    beta_end: float = field(default=0.0195, metadata={"help": "Noise of the last step; linear between."})
    num_timesteps: int = field(default=1000, metadata={"help": "Steps T of the noise schedule."})
    num_drawn: int = field(default=200, metadata={"help": "Test images that are drawn again in the end."})
    num_inference_steps: int = field(default=20, metadata={"help": "Steps of DPM-Solver++, with which they are."})
    perceptual: str = field(default="random", metadata={"help": PERCEPTUAL_HELP})


def check(args: Any) -> None:
    """Refuse flags of the training script that cannot be, and put the slot encoder's config beside them."""
    sizes = {"image_size": args.image_size, "num_slots": args.num_slots, "num_iterations": args.num_iterations}
    args.config = checked_config(ARCHITECTURES[args.architecture], **sizes, slot_init=args.slot_init)
    if not 0 < args.beta_start <= args.beta_end < 1:
        raise ValueError(f"beta_start={args.beta_start} and beta_end={args.beta_end} must rise within 0 to 1.")
    for name in ("broadcast_weight", "area_penalty", "matching_weight", "matching_power"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"{name}={getattr(args, name)} must be 0 or above.")
    for name in ("encoder_learning_rate", "num_timesteps", "num_drawn", "num_inference_steps"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name}={getattr(args, name)} must be above 0.")
    if args.num_drawn < 2:
        raise ValueError(f"num_drawn={args.num_drawn} must be at least 2: FID compares sets of images.")


class Denoised(NamedTuple):
    """What `SlotDenoiser` gives.

    Attributes:
        predicted: Of the noisy latents and of their shape: the noise, or the velocity, as the scheduler says.
        attention: Of the last iteration of slot attention, (batch, slots, tokens).
        drawn: Images as the guide draws them, (batch, 3, height, width); None without one, and in evaluation.
        masks: The guide's masks, (batch, slots, height, width), likewise.
        owners: Which slot explains which pixel best as far as the guide knows (`mixture_posterior`), int64 (batch,
            height, width), likewise.
    """

    predicted: torch.Tensor
    attention: torch.Tensor
    drawn: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    owners: torch.Tensor | None = None


class SlotDenoiser(nn.Module):
    """Slot encoder and U-Net, which are trained together; the autoencoder is only passed through.

    Args:
        slot_encoder: Images to slots.
        unet: Noisy latents, time and slots to noise or velocity.
        autoencoder: Frozen; neither a part of this module nor of its checkpoints, but of the pipeline that is saved.
        scheduler: The noise schedule.
        guide: A decoder that draws the images from the slots at once, in training only. It says which slot explains
            which pixel, which a U-Net does not, as that takes what it needs from any slot.
    """

    def __init__(
        self,
        slot_encoder: SlotEncoderModel,
        unet: ModelMixin,
        autoencoder: AutoencoderKL | VQModel,
        scheduler: SchedulerMixin,
        guide: SlotDecoderModel | None = None,
    ):
        super().__init__()
        self.slot_encoder, self.unet, self.guide = slot_encoder, unet, guide
        self._others = autoencoder, scheduler  # in a tuple, so that torch does not see a part of the module
        self.pipeline()  # refuses parts that do not fit

    def forward(
        self,
        pixel_values: torch.Tensor,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> Denoised:
        """Predict the noise in latents, or the velocity, given the slots of their images.

        Args:
            pixel_values: (batch, 3, height, width), in [-1, 1].
            noisy: Latents with noise, (batch, channels, height / 4, width / 4).
            timesteps: (batch,).
            generator: Source of the draws of the slots.
        """
        output = self.slot_encoder(pixel_values, generator=generator)
        predicted = self.unet(noisy, timesteps, output.slots).sample
        if self.guide is None or not self.training:
            return Denoised(predicted, output.attentions[-1])
        drawn, masks, contents = self.guide(output.slots, return_dict=False)
        with torch.no_grad():
            posterior = mixture_posterior(pixel_values, contents, masks, pixel_std=self.guide.config.pixel_std)
            owners = posterior.argmax(dim=1)
        return Denoised(predicted, output.attentions[-1], drawn, masks, owners)

    @property
    def autoencoder(self) -> AutoencoderKL | VQModel:
        """The autoencoder of the latents."""
        return self._others[0]

    def pipeline(self) -> SlotDiffusionPipeline:
        """The pipeline of the parts."""
        autoencoder, scheduler = self._others
        pipe = SlotDiffusionPipeline(self.slot_encoder, self.unet, autoencoder, scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the pipeline."""
        self.pipeline().save_pretrained(folder)


class SceneLatents(Dataset):
    """Scenes with the latents that the frozen autoencoder makes of them, which `compute` fills in.

    Args:
        scenes: The images and masks.
        autoencoder: Where it is given, `compute` is called at once.

    Attributes:
        latents: float32 (images, channels, height / 4, width / 4).
    """

    def __init__(self, scenes: ImageTensors, autoencoder: AutoencoderKL | VQModel | None = None):
        self.scenes, self.latents = scenes, torch.empty(0)
        if autoencoder is not None:
            self.compute(autoencoder)

    def compute(self, autoencoder: AutoencoderKL | VQModel) -> float:
        """Compute the latents of all images, on the autoencoder's device; returns how many seconds it took."""
        start, parts = time.monotonic(), []
        for first in range(0, len(self.scenes), 64):
            images = self.scenes.__getitems__(range(first, min(first + 64, len(self.scenes))))["image"]
            with torch.no_grad():
                latents = encode_latents(autoencoder, to_pixel_values(images, autoencoder.device))
            parts.append(latents.float().cpu())
        self.latents = torch.cat(parts)
        return time.monotonic() - start

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Several rows at once: image and mask, uint8, and latents, float32."""
        return {**self.scenes.__getitems__(indices), "latents": self.latents[torch.as_tensor(indices)]}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One row: image, mask, latents."""
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}


def latents_of(batch: dict[str, torch.Tensor], pixel_values: torch.Tensor, autoencoder: ModelMixin) -> torch.Tensor:
    """The latents of a batch: those that were kept, or else what the autoencoder makes of its images now."""
    if "latents" in batch:
        return batch["latents"]
    with torch.no_grad():
        return encode_latents(autoencoder, pixel_values)


def make_unet(kind: str, fields: dict[str, Any]) -> ModelMixin:
    """Make our denoiser, or that of diffusers with the same widths, layers and attention.

    Args:
        kind: "slot_unet" or "unet2d".
        fields: Of the config of `SlotUNetModel`.

    Raises:
        ValueError: If the sizes do not fit together.
    """
    unet = SlotUNetModel(**fields)
    if kind == "slot_unet":
        return unet
    config, levels = unet.config, range(len(unet.config.block_out_channels))
    attends = [config.sample_size >> level in config.attention_resolutions for level in levels]
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
        # what diffusers calls attention_head_dim is the number of heads
        attention_head_dim=[width // config.attention_head_dim for width in config.block_out_channels],
        cross_attention_dim=config.cross_attention_dim,
        dropout=config.dropout,
        norm_num_groups=config.norm_num_groups,
    )


# What the script starts from: the flag that names it, the script that trains it, and flags that the two share.
SHARED = ("source", "style", "image_size", "crop", "num_train", "num_test", "seed", "cpu_threads")
PARTS = {
    "slot_encoder": ("train_slots", (*SHARED, "architecture", "num_slots", "num_iterations")),
    "autoencoder": ("train_autoencoder", SHARED),
}


def find_part(args: Any, name: str) -> str:
    """Find a trained part: the one that is named, or that of the default folder, where one is trained if none is.

    Args:
        args: Flags of the training script.
        name: Of `PARTS`.

    Raises:
        ValueError: If that of the default folder was trained on other images or for other slots, or several processes
            would train one.
    """
    script, shared = PARTS[name]
    if getattr(args, name):
        return getattr(args, name)
    folder, what = f"runs/{script}", name.replace("_", " ")
    if not Path(folder, "config.json").is_file():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"{folder} holds no {what}; with several processes, train it first.")
        print(f"{folder} holds no {what} yet; training one first.", file=sys.stderr, flush=True)
        flags = [f"--{flag}={getattr(args, flag)}" for flag in shared]
        flags += ["--num_objects", *map(str, args.num_objects), f"--output_dir={folder}"]
        flags += [f"--mixed_precision={args.mixed_precision}"] * bool(args.mixed_precision)
        importlib.import_module(script).main(flags)
        return folder
    with contextlib.suppress(FileNotFoundError):
        known = read_results(folder)["args"]
        for flag in ("source", "style", "image_size", "architecture", "num_slots", "num_iterations"):
            if flag in shared and known.get(flag, getattr(args, flag)) != getattr(args, flag):
                raise ValueError(
                    f"{folder} was trained with {flag}={known[flag]!r}, and here {flag}={getattr(args, flag)!r}; "
                    f"train another one with {script}.py --output_dir, and name it with --{name}."
                )
    print(f"Taking the {what} in {folder}; --{name} names another one.", file=sys.stderr, flush=True)
    return folder


def make_slots(args: Any) -> tuple[SlotEncoderModel, SlotDecoderModel | None]:
    """Make the slot encoder, and the decoder that guides it, where there shall be one: both of a trained autoencoder.

    Raises:
        ValueError: If the trained one is for other images or other numbers of slots or iterations, or has no decoder.
    """
    if args.slot_encoder == "none":
        return SlotEncoderModel(args.config), None
    folder = find_part(args, "slot_encoder")
    encoder = SlotEncoderModel.from_pretrained(folder)
    for flag in ("image_size", "num_slots", "num_iterations"):
        if getattr(encoder.config, flag) != getattr(args, flag):
            raise ValueError(
                f"slot_encoder={folder!r} has {flag}={getattr(encoder.config, flag)}, and here "
                f"{flag}={getattr(args, flag)}; give both alike."
            )
    if not args.broadcast_weight:
        return encoder, None
    guide, report = SlotDecoderModel.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"slot_encoder={folder!r} has no decoder, which teaches the attention; name a slot autoencoder, or train "
            "without one by --broadcast_weight=0."
        )
    return encoder, guide


def make_model(args: Any, autoencoder: AutoencoderKL | VQModel | None = None) -> SlotDenoiser:
    """Make slot encoder and U-Net as the flags say, for the latents of the autoencoder, by default the one they name.

    Raises:
        ValueError: If the parts do not fit together, or one of them cannot be had.
    """
    if autoencoder is None:
        autoencoder = load_autoencoder(find_part(args, "autoencoder"))
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if autoencoder.config.in_channels != 3 or args.image_size % factor:
        raise ValueError(
            f"image_size={args.image_size} does not fit the autoencoder, which takes images of "
            f"{autoencoder.config.in_channels} channels and a multiple of {factor} pixels."
        )
    encoder, guide = make_slots(args)
    sizes_of = UNETS[args.unet]
    positions = None if args.position_frequencies < 0 else args.position_frequencies
    fields = sizes_of | {
        "position_frequencies": positions,
        "sample_size": args.image_size // factor,
        "in_channels": autoencoder.config.latent_channels,
        "cross_attention_dim": encoder.config.slot_dim,
        "num_train_timesteps": args.num_timesteps,
    }
    halvings = sizes_of["sample_size"] / fields["sample_size"]
    sizes = sizes_of["attention_resolutions"]
    fields["attention_resolutions"] = tuple(max(1, int(size / halvings)) for size in sizes)
    schedule = noise_schedule(
        num_train_timesteps=args.num_timesteps,
        beta_start=args.beta_start,
        beta_end=args.beta_end,
        prediction_type=args.prediction_type,
    )
    return SlotDenoiser(encoder, make_unet(args.denoiser, fields), autoencoder, schedule, guide)


def target(scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """What the U-Net shall predict: the noise, or the velocity, as the scheduler's `prediction_type` says."""
    return noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, times)


def guidance(output: Denoised, pixel_values: torch.Tensor, args: Any) -> torch.Tensor:
    """What is added to the loss so that the guide stays and teaches the attention, a scalar; 0 without a guide.

    Args:
        output: Of the `SlotDenoiser` in training.
        pixel_values: The images, which the guide should have drawn.
        args: `broadcast_weight`, the factor of all that follows; `area_penalty`, the price of what all of the guide's
            masks but the largest cover, as in train_slots.py; and `matching_weight`, of the cross-entropy between the
            attention's masks and who explains each pixel best, as far as the guide knows. Without it the attention of
            several slots shares the ground, whatever the decoder does with it (Kakogeorgiou et al. 2024, "SPOT", teach
            the encoder's attention by the decoder's as well). It is the mean over the pixels of each slot, and of
            these with their areas to the `matching_power` as weights, as most pixels are ground.
    """
    if output.drawn is None:
        return pixel_values.new_zeros(())
    rest = 1 - output.masks.float().mean((2, 3)).amax(1).mean()
    seen = attention_masks(output.attention, pixel_values.shape[-2:], image_size=pixel_values.shape[-1])
    owners = F.one_hot(output.owners, seen.shape[1]).movedim(-1, 1).float()
    areas = owners.mean((2, 3)).clamp_min(1 / owners[0, 0].numel())
    surprise = -(owners * seen.clamp_min(1e-6).log()).mean((2, 3)) / areas
    weights = areas**args.matching_power * owners.amax((2, 3))  # nothing for a slot without pixels
    surprise = ((weights * surprise).sum(1) / weights.sum(1)).mean()
    error = F.mse_loss(output.drawn.float(), pixel_values)
    return args.broadcast_weight * (error + args.area_penalty * rest + args.matching_weight * surprise)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict],
    scheduler: SchedulerMixin,
    *,
    gather: Callable[[Any], Any] = lambda values: values,
) -> dict[str, float]:
    """Score the noise that is predicted and the masks of the attention.

    Args:
        model: The `SlotDenoiser`, wrapped or not.
        batches: With `image` and `mask`, uint8, and `latents`.
        scheduler: The noise schedule.
        gather: Joins what several processes computed.

    Returns:
        `loss`, the mean squared error of what is predicted at times spread evenly over the schedule, and
        `attention_ari`, `attention_fg_ari`, `attention_miou`, `attention_mbo`, image counts.
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
        output = model(pixel_values, scheduler.add_noise(latents, noise, timesteps), timesteps)
        size = batch["mask"].shape[1:]
        segments = attention_masks(output.attention, size, image_size=pixel_values.shape[-1]).argmax(1)
        error = output.predicted.float() - target(scheduler, latents, noise, timesteps)
        error = error.square().mean((1, 2, 3))
        columns.append(gather((error, segments, batch["mask"].to(device))))
    error, segments, truth = map(torch.cat, zip(*columns, strict=True))
    return {"loss": error.mean().item(), **segmentation_scores(segments, truth.long(), mask="attention")}


def _uint8(images: torch.Tensor) -> torch.Tensor:
    return (images.clamp(0, 1) * 255).round().byte().cpu()


@torch.no_grad()
def draw_and_measure(
    pipe: SlotDiffusionPipeline,
    train: ImageTensors,
    test: ImageTensors,
    folder: Path,
    args: Any,
) -> dict[str, float]:
    """Draw test images from their slots, edit some, compose scenes of training images' slots, and measure.

    Args:
        pipe: The pipeline.
        train: Images whose slots fill the library.
        test: Images to draw again.
        folder: Gets reconstructions.png, edits.png, compositions.png and slot_library/.
        args: `num_drawn`, how many test images are drawn again and how many scenes composed, `num_inference_steps`
            of DPM-Solver++, and `perceptual`, as of `hf_dl.metrics.perceptual.load`.

    Returns:
        `reconstruction_mse` (pixels in [-1, 1]), `reconstruction_perceptual`, `reconstruction_fid_...` and, for the
        recipes of `SlotLibrary`, `per_cluster_fid_...` and `background_aware_fid_...`; `drawn_images`, as FID depends
        on how many there are.
    """
    measure = perceptual.load(args.perceptual)
    original = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(original.config, solver_order=2)
    options = {"num_inference_steps": args.num_inference_steps, "output_type": "pt"}
    images = test.__getitems__(range(min(args.num_drawn, len(test))))["image"]
    generator = torch.Generator().manual_seed(0)
    made = {"reconstruction": []}
    for batch in images.split(50):
        pixel_values = to_pixel_values(batch, pipe.device)
        made["reconstruction"].append(_uint8(pipe(image=pixel_values, generator=generator, **options).images))
    redrawn = torch.cat(made["reconstruction"])
    metrics = {
        "reconstruction_mse": (to_pixel_values(redrawn) - to_pixel_values(images)).square().mean().item(),
        "reconstruction_perceptual": mean_distance(measure, redrawn, images),
    }
    segments = pipe.segment(to_pixel_values(images[:8], pipe.device))
    rows = [
        [to_uint8(image / 255), color_segments(segment.cpu().numpy()), to_uint8(again / 255)]
        for image, segment, again in zip(images[:8], segments, redrawn, strict=False)
    ]
    columns = [list(column) for column in zip(*rows, strict=True)]
    image_grid(columns, folder / "reconstructions.png", labels=["test images", "segments", "drawn from slots"])
    _draw_edits(pipe, images, folder / "edits.png", args.num_inference_steps)

    slots, masks = [], []
    for first in range(0, min(LIBRARY_IMAGES, len(train)), 64):
        rows_of = range(first, min(first + 64, LIBRARY_IMAGES, len(train)))
        output = pipe.encode(to_pixel_values(train.__getitems__(rows_of)["image"], pipe.device))
        slots.append(output.slots.cpu())
        masks.append(attention_masks(output.attentions[-1], (16, 16), image_size=images.shape[-1]).cpu())
    library = SlotLibrary().fit(torch.cat(slots), torch.cat(masks), num_clusters=slots[0].shape[1], seed=0)
    library.save_pretrained(folder / "slot_library")
    for mode in ("per_cluster", "background_aware"):
        extra = {"max_iou": 0.1} if mode == "background_aware" else {}
        counts = [min(50, len(images) - first) for first in range(0, len(images), 50)]
        made[mode] = [
            _uint8(pipe.compose(library, n, mode=mode, generator=generator, **extra, **options).images) for n in counts
        ]
    features, pictures = default_features(), [list(to_uint8(images[:8] / 255))]
    for mode, batches in made.items():
        scores = fid(images, torch.cat(batches), features=features)
        metrics |= {f"{mode}_{name}": value for name, value in scores.items() if name.startswith("fid")}
        pictures.append(list(to_uint8(torch.cat(batches)[:8] / 255)))
    labels = ["test images", "drawn from slots", *(mode.replace("_", " ") for mode in list(made)[1:])]
    image_grid(pictures, folder / "compositions.png", labels=labels)
    pipe.scheduler = original
    return {**metrics, "drawn_images": float(len(images))}


def _draw_edits(pipe: SlotDiffusionPipeline, images: torch.Tensor, path: Path, num_inference_steps: int) -> None:
    """Draw a few images without each of their slots, always from the same noise."""
    rows, size = [], pipe.unet.config.sample_size
    options = {"num_inference_steps": num_inference_steps, "output_type": "pt"}
    for number in range(min(4, len(images))):
        pixel_values = to_pixel_values(images[number : number + 1], pipe.device)
        slots = pipe.encode(pixel_values).slots
        count = slots.shape[1]
        keep = torch.cat([torch.ones(1, count), 1 - torch.eye(count)]).bool()
        if count == 1:
            keep = keep[:1]
        noise = torch.randn(1, pipe.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
        drawn = pipe(
            slots=slots.expand(len(keep), -1, -1), keep=keep, latents=noise.expand(len(keep), -1, -1, -1), **options
        ).images
        segments = color_segments(pipe.segment(pixel_values)[0].cpu().numpy())
        rows.append([to_uint8(images[number] / 255), segments, *to_uint8(_uint8(drawn) / 255)])
    titles = ["input", "segments", "drawn", *(f"without {slot + 1}" for slot in range(len(rows[0]) - 3))]
    image_grid(rows, path, titles=titles)


def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and say where everything is."""
    plot_run(folder, folder / "curves.png", CURVES)
    usage = USAGE.format(local=LOCAL_ID)
    about = {"summary": SUMMARY, "usage": usage, "limits": LIMITS, "tags": TAGS}
    card = run_card(folder, **about, pipeline_tag="image-to-image", library="diffusers")
    card.save(folder / "README.md")
    print(f"pipeline    {folder}  (SlotDiffusionPipeline.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
    print(f"pictures    {folder / 'reconstructions.png'}, edits.png, compositions.png")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate the pipeline that the flags name, and write what was found beside it."""
    args = Args(**vars(HfArgumentParser(Args, allow_abbrev=False).parse_args(argv)))
    pipe = SlotDiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    folder = Path(args.output_dir or args.model)
    folder.mkdir(parents=True, exist_ok=True)
    args.image_size = pipe.slot_encoder.config.image_size
    train, test = load_images(args, "train"), load_images(args, "test")
    model = SlotDenoiser(pipe.slot_encoder, pipe.unet, pipe.autoencoder, pipe.scheduler)
    loader = DataLoader(SceneLatents(test, pipe.autoencoder), 50, collate_fn=as_is)
    metrics = {f"test_{name}": value for name, value in evaluate(model, loader, pipe.scheduler).items()}
    metrics |= draw_and_measure(pipe, train, test, folder, args)
    found = {"args": portable(asdict(args)), "metrics": metrics}
    (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, value in metrics.items():
        print(f"{name:40s} {value:.4f}")
    print(f"Pictures, slot library and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
