"""Evaluate the autoencoder under latent diffusion: how well it gives images back, and what its latents are like.

    scripts/run python scripts/evaluate_autoencoder.py --model runs/train_autoencoder

The model is one of diffusers, `AutoencoderKL` or `VQModel`, from a folder or a Hub id. Writes reconstructions.png and
evaluation.json into its folder.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import ImageTensors
from hf_dl.metrics import perceptual
from hf_dl.metrics.images import default_features, fid
from hf_dl.models.latent_autoencoder import ARCHITECTURES, decode_latents, encode_latents
from hf_dl.recipes.scene_images import SceneFlags, load_images, to_pixel_values, to_uint8
from hf_dl.reporting.card import LOCAL_ID, run_card
from hf_dl.reporting.experiment import portable
from hf_dl.reporting.grids import image_grid
from hf_dl.reporting.plots import plot_run

SUMMARY = (
    "The autoencoder under latent diffusion (Rombach et al. 2022), a model of diffusers: it makes latents, a quarter "
    "as high and wide, of an image, and the image of the latents."
)
USAGE = """\
import diffusers

autoencoder = diffusers.AutoModel.from_pretrained("{local}")
latents = autoencoder.encode(pixel_values)  # images (batch, 3, height, width) in [-1, 1]"""
LIMITS = ("It gives back what is like its training images; on photographs it blurs.",)
TAGS = ("autoencoder", "latent-diffusion")
CURVES = {
    "absolute error": {"training": "l1", "validation": "val_l1"},
    "perceptual distance": {"training": "perceptual", "validation": "val_perceptual"},
    "spread of the latents": {"validation": "val_latent_std"},
}
STATISTICS_IMAGES = 1000  # training images of which the spread of the latents is measured


@dataclass
class Args(SceneFlags):
    """Flags of the evaluation."""

    model: str = field(default="runs/train_autoencoder", metadata={"help": "Folder or Hub id of the autoencoder."})
    output_dir: str = field(default="", metadata={"help": "Where to write; default: the model's folder."})


@dataclass
class ModelFlags:
    """Flags of the training script that say which network, and what its loss is."""

    architecture: Literal["small", "clevrtex"] = field(default="small", metadata={"help": "Kind of network."})
    kind: Literal["kl", "vq"] = field(default="kl", metadata={"help": "Gaussian latents, or a codebook of 4096."})
    kl_weight: float = field(default=1e-4, metadata={"help": "kl: weight of the divergence, a number of the latents."})
    perceptual: str = field(default="random", metadata={"help": "random, lpips, or an image classifier; none."})
    perceptual_weight: float = field(default=0.1, metadata={"help": "Weight of the perceptual distance."})


def check(args: Any) -> None:
    """Refuse flags of the training script that cannot be, before any image is loaded."""
    factor = 2 ** (len(ARCHITECTURES[args.architecture]["block_out_channels"]) - 1)
    if args.image_size < factor or args.image_size % factor:
        raise ValueError(f"image_size={args.image_size} must be a multiple of {factor}: latents are that coarse.")
    for name in ("kl_weight", "perceptual_weight"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"{name}={getattr(args, name)} must be at least 0.")


class LatentAutoencoder(nn.Module):
    """An autoencoder of diffusers as it is trained: a forward pass that gives its regularizer too.

    Args:
        autoencoder: An `AutoencoderKL` or a `VQModel`.
    """

    def __init__(self, autoencoder: AutoencoderKL | VQModel):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(
        self, pixel_values: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruct images.

        Args:
            pixel_values: (batch, 3, height, width), in [-1, 1].
            generator: Source of the noise of `AutoencoderKL`.

        Returns:
            The reconstructions, and the regularizer, a scalar: of `AutoencoderKL` the divergence from the normal
            distribution, in nats a number of the latents; of `VQModel` the distance from the codebook.
        """
        encoded = self.autoencoder.encode(pixel_values)
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.sample(generator)
            return self.autoencoder.decode(latents).sample, encoded.latent_dist.kl().mean() / latents[0].numel()
        decoded = self.autoencoder.decode(encoded.latents)
        return decoded.sample, decoded.commit_loss.mean()

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the autoencoder, for `diffusers.AutoModel.from_pretrained`."""
        self.autoencoder.save_pretrained(folder)


def load_autoencoder(name: str) -> AutoencoderKL | VQModel:
    """Load an autoencoder from a folder or the Hub, frozen, in evaluation mode.

    Raises:
        ValueError: If there is none, or it is of another kind.
    """
    try:
        autoencoder = diffusers.AutoModel.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name!r} is no autoencoder of diffusers ({reason}); name a folder such as runs/train_autoencoder."
        ) from error
    if not isinstance(autoencoder, (AutoencoderKL, VQModel)):
        raise ValueError(f"{name!r} is a {type(autoencoder).__name__}; expected an AutoencoderKL or a VQModel.")
    return autoencoder.eval().requires_grad_(False)


@torch.no_grad()
def evaluate(
    model: LatentAutoencoder,
    batches: Iterable[dict],
    distance: perceptual.PerceptualDistance,
    *,
    gather: Callable[[Any], Any] = lambda values: values,
) -> dict[str, float]:
    """Measure reconstructions.

    Args:
        model: The autoencoder as it is trained.
        batches: With `image`, uint8.
        distance: The perceptual distance, on the model's device.
        gather: Joins what several processes computed.

    Returns:
        `l1` and `mse` of pixels in [-1, 1], `psnr` in decibels of the mean error, `perceptual`, `latent_std`, the
        spread of all numbers of the latents as diffusion takes them; of a `VQModel` also `used_codes`.
    """
    model.eval()
    autoencoder, columns = model.autoencoder, []
    for batch in batches:
        pixel_values = to_pixel_values(batch["image"], next(model.parameters()).device)
        latents = encode_latents(autoencoder, pixel_values)
        made = decode_latents(autoencoder, latents).clamp(-1, 1)
        error = made - pixel_values
        row = [error.abs().mean((1, 2, 3)), error.square().mean((1, 2, 3)), distance(made, pixel_values)]
        row += [latents.mean((1, 2, 3)), latents.square().mean((1, 2, 3))]
        if isinstance(autoencoder, VQModel):
            codes = autoencoder.quantize(latents / autoencoder.config.scaling_factor)[2][2]
            row.append(codes.view(len(pixel_values), -1))
        columns.append(gather(tuple(row)))
    l1, mse, perceptual, mean, square, *codes = (torch.cat(column) for column in zip(*columns, strict=True))
    scores = {
        "l1": l1.mean().item(),
        "mse": mse.mean().item(),
        "psnr": 10 * math.log10(4 / max(mse.mean().item(), 1e-12)),
        "perceptual": perceptual.mean().item(),
        "latent_std": (square.mean() - mean.mean().square()).clamp(min=0).sqrt().item(),
    }
    if codes:
        scores["used_codes"] = float(len(codes[0].unique()))
    return scores


@torch.no_grad()
def set_scale(autoencoder: AutoencoderKL | VQModel, train: ImageTensors) -> None:
    """Write into the config what brings the latents to mean 0 (of `AutoencoderKL`) and standard deviation 1.

    Diffusion adds noise of standard deviation 1, whose schedule is made for data of that spread (Rombach et al. 2022,
    appendix G).
    """
    shifts = isinstance(autoencoder, AutoencoderKL)
    autoencoder.register_to_config(scaling_factor=1.0, **({"shift_factor": None} if shifts else {}))
    images = train.__getitems__(range(min(STATISTICS_IMAGES, len(train))))["image"]
    parts = [encode_latents(autoencoder, to_pixel_values(batch, autoencoder.device)) for batch in images.split(64)]
    latents = torch.cat(parts).double()
    mean = latents.mean().item() if shifts else 0.0
    spread = max(((latents - mean).square().mean() ** 0.5).item(), 1e-6)
    autoencoder.register_to_config(scaling_factor=1 / spread, **({"shift_factor": mean} if shifts else {}))


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL | VQModel, images: torch.Tensor) -> torch.Tensor:
    """Encode and decode uint8 images (batch, 3, height, width), to uint8."""
    made = []
    for batch in images.split(64):
        latents = encode_latents(autoencoder, to_pixel_values(batch, autoencoder.device))
        made.append(decode_latents(autoencoder, latents).cpu() / 2 + 0.5)
    return (torch.cat(made).clamp(0, 1) * 255).round().byte()


def draw_and_measure(autoencoder: AutoencoderKL | VQModel, test: ImageTensors, folder: Path) -> dict[str, float]:
    """Write reconstructions.png into the folder, and measure the FID of the reconstructions of the test images."""
    autoencoder.eval()
    images = test.__getitems__(range(len(test)))["image"]
    made = reconstruct(autoencoder, images)
    rows = [list(to_uint8(pictures[:8] / 255)) for pictures in (images, made)]
    image_grid(rows, folder / "reconstructions.png", labels=["test images", "reconstruction"])
    scores = fid(images, made, features=default_features())
    return {f"reconstruction_{name}": value for name, value in scores.items() if name.startswith("fid")}


def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and say where everything is."""
    plot_run(folder, folder / "curves.png", CURVES)
    usage = USAGE.format(local=LOCAL_ID)
    about = {"summary": SUMMARY, "usage": usage, "limits": LIMITS, "tags": TAGS}
    card = run_card(folder, **about, pipeline_tag="image-to-image", library="diffusers")
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (diffusers.AutoModel.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
    print(f"picture     {folder / 'reconstructions.png'}")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate the autoencoder that the flags name, and write what was found beside it."""
    args = Args(**vars(HfArgumentParser(Args, allow_abbrev=False).parse_args(argv)))
    autoencoder = load_autoencoder(args.model)
    folder = Path(args.output_dir or args.model)
    folder.mkdir(parents=True, exist_ok=True)
    args.image_size = autoencoder.config.sample_size
    test = load_images(args, "test")
    loader = DataLoader(test, 50, collate_fn=as_is)
    scores = evaluate(LatentAutoencoder(autoencoder), loader, perceptual.load("random"))
    metrics = {f"test_{name}": value for name, value in scores.items()} | draw_and_measure(autoencoder, test, folder)
    found = {"args": portable(asdict(args)), "metrics": metrics}
    (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, value in metrics.items():
        print(f"{name:40s} {value:.4f}")
    print(f"reconstructions.png and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
