"""Variational autoencoders of images: flags, data, model, scores of every convention, figures and report.

Papers and courses call different sums "the VAE loss". The report shows all of them, in nats per image:

- the summed squared error (SSE), half of it, and the binary cross-entropy (BCE), each with and without the KL;
- the ELBO of the model's own likelihood with its constant, and the importance-weighted bound.

The training loop is in scripts/train_vae.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from hf_dl.data import labeled_images, masked_images
from hf_dl.data.class_folders import is_flat
from hf_dl.data.image_arrays import LabeledImages
from hf_dl.metrics.latents import active_units, posterior_collapse
from hf_dl.models.image_vae import (
    ARCHITECTURES,
    LIKELIHOODS,
    ImageVaeConfig,
    ImageVaeModel,
    ImageVaeProcessor,
    gaussian_kl,
)
from hf_dl.progress import activity
from hf_dl.reporting.card import format_metric, run_card, usage_snippet
from hf_dl.reporting.experiment import read_curves, read_results
from hf_dl.reporting.grids import image_grid
from hf_dl.reporting.plots import plot_run

from .evaluation import checked_config, hide_progress_bars, report_data, split_size

SUMMARY = (
    "A variational autoencoder of images (Kingma & Welling 2014) encodes an image as a short code, decodes a code to "
    "an image, and generates new images from random codes."
)
CALLS = """\
inputs = processor(Image.open("image.png"), return_tensors="pt")
reconstruction = model(**inputs).reconstruction  # (1, channels, height, width), in [0, 1]
images = model.sample(8)  # new images"""
LIMITS = (
    "Its images are blurred: each one is the mean of all images that fit the code.",
    "The cross-entropy of gray pixels treats them as probabilities of white. It is not comparable with the likelihood "
    "of a density over gray levels.",
)
TAGS = ("vae", "variational-autoencoder", "unsupervised")
CURVES = {
    title: {"training": key, "validation": f"val_{key}"}
    for title, key in (("squared error", "sse"), ("cross-entropy", "bce"), ("KL", "kl"))
}
CONVENTIONS = {  # row of the table in the card: metric
    "SSE + KL": "sse_plus_kl",
    "SSE / 2 + KL": "half_sse_plus_kl",
    "BCE + KL": "bce_plus_kl",
    "SSE": "sse",
    "BCE": "bce",
    "KL": "kl",
    "ELBO of its own likelihood": "elbo",
    "importance-weighted bound": "iw_bound",
    "bits per dimension": "bits_per_dim",
    "active units": "active_units",
}
# Defaults of the optimizer per architecture. Courses use plain Adam. The deeper network needs the warm-up: without it,
# some latents collapse in the first steps and never recover.
OPTIMIZER_DEFAULTS = {
    "mlp": {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0},
    "conv": {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 200},
}
BOUND_IMAGES = 1000  # number of images for the importance-weighted bound, which needs K passes of the decoder each
MAP_IMAGES = 4000


@dataclass
class ImageFlags:
    """Flags that select the images. The training and the evaluation script share them."""

    source: str = field(
        default="synthetic",
        metadata={"help": "synthetic, a Hub id, or a folder: images with or without classes, parquet or idx files."},
    )
    image_size: int = field(default=32, metadata={"help": "Height and width of the images, in pixels."})
    num_channels: Literal[0, 1, 3] = field(
        default=0, metadata={"help": "1: gray images. 3: RGB images. 0: as in the source."}
    )
    num_train: int = field(
        default=0, metadata={"help": "Number of training images; 0: all images, or 10000 synthetic images."}
    )
    num_test: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of validation images, and of test images; 0: all images. Defaults to all, and to "
            "at most half of num_train."
        },
    )
    holdout: float = field(
        default=0.02, metadata={"help": "Fraction of the training images that replaces a missing split."}
    )
    corrupt: Literal["refuse", "skip"] = field(
        default="refuse", metadata={"help": "Damaged image files: refuse stops with an error, skip leaves them out."}
    )


@dataclass
class VaeFlags:
    """Flags of the network and its likelihood."""

    architecture: Literal[tuple(ARCHITECTURES)] = field(
        default="conv", metadata={"help": "Encoder and decoder: dense layers, or convolutions."}
    )
    likelihood: Literal[tuple(LIKELIHOODS)] = field(
        default="bernoulli",
        metadata={"help": "Likelihood of the pixels. Its loss is BCE, or SSE / (2 pixel_std^2)."},
    )
    latent_size: int = field(default=20, metadata={"help": "Size of the code."})
    beta: float = field(default=1.0, metadata={"help": "Weight of the KL divergence."})
    pixel_std: float = field(default=0.5**0.5, metadata={"help": "gaussian: standard deviation of a pixel."})
    hidden_sizes: list[int] = field(
        default_factory=lambda: [400], metadata={"help": "mlp: units of the hidden layers."}
    )
    widths: list[int] = field(
        default_factory=lambda: [32, 64], metadata={"help": "conv: channels of the strided convolutions."}
    )
    num_blocks: int = field(
        default=1, metadata={"help": "conv: number of residual blocks in the encoder, and in the decoder."}
    )
    hidden_size: int = field(default=256, metadata={"help": "conv: units of the dense layer."})


def make_config(flags: Any, num_channels: int) -> ImageVaeConfig:
    """Create the config of the model.

    Args:
        flags: `VaeFlags` with `image_size`.
        num_channels: Channels of the images, 1 or 3.

    Raises:
        ValueError: If a size is invalid.
    """
    fields = {name: getattr(flags, name) for name in VaeFlags.__dataclass_fields__}
    return checked_config(ImageVaeConfig, image_size=flags.image_size, num_channels=num_channels, **fields)


def fill_defaults(flags: Any) -> None:
    """Replace flags that are None by the defaults of the architecture."""
    for name, value in OPTIMIZER_DEFAULTS.get(flags.architecture, {}).items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)


def check_flags(flags: Any) -> None:
    """Validate the flags of the training script before any image is loaded.

    Args:
        flags: `VaeFlags` and `ImageFlags`, with `kl_warmup` and `importance_samples`.

    Raises:
        ValueError: If a flag is out of range.
    """
    make_config(flags, flags.num_channels or 3)
    if not 0 <= flags.kl_warmup <= 1:
        raise ValueError(f"kl_warmup={flags.kl_warmup} must be a fraction of the run, 0 to 1.")
    if flags.importance_samples < 0:
        raise ValueError(f"importance_samples={flags.importance_samples} must be 0 or above.")


def load_images(flags: ImageFlags, split: str) -> LabeledImages:
    """Load one split of the source, decoded and kept in memory.

    Args:
        flags: Selects the source, the image size and the number of images. If `num_channels` is 0, it is set to 1 or 3
            by the first images.
        split: "train", "validation" or "test".

    Returns:
        The images, with labels.

    Raises:
        ValueError: If the split has fewer than two images, or the source is invalid.
    """
    hide_progress_bars()
    count = split_size(flags, split, labeled_images.SPLITS[split] if flags.source == "synthetic" else None)
    options = {"size": flags.image_size, "num_images": count, "holdout": flags.holdout, "corrupt": flags.corrupt}
    if is_flat(flags.source):  # all images get the same label
        data = masked_images.load(split, flags.source, **options).select_columns("image")
        data = data.add_column("label", [0] * len(data)).cast_column("label", datasets.ClassLabel(names=["image"]))
    else:
        data = labeled_images.load(split, flags.source, **options)
    if len(data) < 2:  # the scores compare images
        raise ValueError(
            f"The {split} split of source={flags.source!r} has 1 image. At least 2 are needed: use more images or a "
            f"larger holdout than {flags.holdout}."
        )
    report_data(data, split)
    if not flags.num_channels:
        samples = [np.asarray(image.convert("RGB")) for image in data[:100]["image"]]
        flags.num_channels = 1 if all((image == image[..., :1]).all() for image in samples) else 3
    return LabeledImages(data, channels=flags.num_channels)


def make_model(flags: Any, data: LabeledImages) -> ImageVaeModel:
    """Create the model for images with the channels of `data`."""
    return ImageVaeModel(make_config(flags, data.pixels.shape[1]))


def make_processor(config: ImageVaeConfig) -> ImageVaeProcessor:
    """Create the image processor that is saved with the weights."""
    size = {"height": config.image_size, "width": config.image_size}
    return ImageVaeProcessor(size=size, do_grayscale=config.num_channels == 1)


def first_images(train: LabeledImages, test: LabeledImages) -> Subset:
    """Select as many training images as there are test images, so that both scores have the same precision."""
    return Subset(train, range(min(len(train), len(test))))


def to_pixel_values(pictures: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """Map uint8 images to [0, 1], like the image processor of the model."""
    return pictures.to(device).float() / 255


@torch.no_grad()
def mean_errors(pixel_values: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute SSE and BCE of reconstructions for the log, for both likelihoods.

    Args:
        pixel_values: The images, in [0, 1].
        logits: The reconstructions before the sigmoid, same shape.

    Returns:
        `sse` and `bce`, summed over each image and averaged over the batch.
    """
    sse, bce = errors_per_image(pixel_values, logits)
    return {"sse": sse.mean(), "bce": bce.mean()}


def errors_per_image(pixel_values: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed squared error and the summed binary cross-entropy per image, each (batch,)."""
    logits = logits.float()
    sse = (logits.sigmoid() - pixel_values).square().flatten(1).sum(1)
    return sse, F.binary_cross_entropy_with_logits(logits, pixel_values, reduction="none").flatten(1).sum(1)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[dict],
    *,
    importance_samples: int = 0,
    gather: Callable[[Any], Any] = lambda values: values,
) -> dict[str, float]:
    """Compute the scores of all conventions, with one code drawn per image.

    Args:
        model: The model, wrapped for several devices or not.
        batches: Batches with `image`, uint8.
        importance_samples: Number of codes K per image for the importance-weighted bound, which is computed on the
            first `BOUND_IMAGES` images. 0 disables it.
        gather: Concatenates tensors of all processes. Defaults to a single process.

    Returns:
        Means over the images, in nats: `loss` (the training loss), `sse`, `half_sse`, `bce`, `kl`, and each error plus
        the KL (`sse_plus_kl`, ...). `elbo` includes the constant of the likelihood. `bits_per_dim` is the negative
        ELBO per pixel; a gray level counts as an interval of width 1/255 under the Gaussian likelihood. Also
        `active_units` and `images`. If `importance_samples` is above 0, `iw_gain` is the difference between the
        importance-weighted bound and the ELBO on the first images. `iw_bound` is the ELBO of all images plus this
        difference.
    """
    model.eval()
    module = getattr(model, "module", model)  # inside a data-parallel wrapper
    config = module.config
    generator = torch.Generator(device=module.device).manual_seed(0)
    columns, bounds, seen = [], [], 0
    for batch in batches:
        pixel_values = to_pixel_values(batch["image"], module.device)
        # Call the parts, not `forward`: scores then have full precision also for a model in mixed precision.
        mean, log_variance = module.encode(pixel_values)
        logits = module.decoder(module.draw(mean, log_variance, generator=generator))
        kl = gaussian_kl(mean, log_variance).sum(1)
        elbo = module.log_likelihood(pixel_values, logits) - kl
        columns.append(gather((*errors_per_image(pixel_values, logits), kl, elbo, mean)))
        if importance_samples and seen < BOUND_IMAGES:
            bound = module.importance_weighted_bound(pixel_values, importance_samples, generator=generator)
            bounds.append(gather(bound))
        seen += len(columns[-1][0])
    sse, bce, kl, elbo, means = (torch.cat(column).double() for column in zip(*columns, strict=True))
    scores = {"sse": sse.mean(), "half_sse": sse.mean() / 2, "bce": bce.mean()}
    scores |= {f"{name}_plus_kl": value + kl.mean() for name, value in scores.items()}
    own = scores["bce"] if config.likelihood == "bernoulli" else scores["sse"] / (2 * config.pixel_std**2)
    scores |= {"kl": kl.mean(), "loss": own + config.beta * kl.mean(), "elbo": elbo.mean()}
    scores["bits_per_dim"] = -elbo.mean() / (config.num_pixels * math.log(2))
    if config.likelihood == "gaussian":
        scores["bits_per_dim"] += math.log2(255)
    if bounds:
        bound = torch.cat(bounds)[:BOUND_IMAGES].double()
        gain = (bound - elbo[: len(bound)]).mean()  # varies less between images than each bound
        scores |= {"iw_bound": elbo.mean() + gain, "iw_gain": gain}
    scores |= {"active_units": active_units(means).sum(), "images": len(sse)}
    return {name: float(value) for name, value in scores.items()}


def epoch_means(folder: Path, steps: int) -> dict[str, float]:
    """Average the logged training errors over the first and the last epoch.

    The weights change during an epoch, so these values differ from an evaluation after it.

    Args:
        folder: The folder of the run.
        steps: Steps per epoch. A line of the log that ends in the next epoch is left out.

    Returns:
        `first_epoch_sse_plus_kl`, `last_epoch_sse_plus_kl`, and the same for the other conventions.
    """
    curves = read_curves(folder, ["sse", "bce", "kl"], points=10**9)
    at, (sse, bce, kl) = np.array(curves["kl"][0]), (np.array(curves[name][1]) for name in ("sse", "bce", "kl"))
    series = {"sse": sse, "bce": bce, "kl": kl}
    series |= {"sse_plus_kl": sse + kl, "half_sse_plus_kl": sse / 2 + kl, "bce_plus_kl": bce + kl}
    epochs = {"first": at <= max(steps, at[0]), "last": at > min(at[-1] - steps, at[-1] - 1)}
    return {
        f"{epoch}_epoch_{name}": float(values[chosen].mean())
        for epoch, chosen in epochs.items()
        for name, values in series.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """Convert images (..., channels, height, width) in [0, 1] to uint8 arrays (..., height, width, 3)."""
    pixels = (pictures.clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()
    return pixels if pixels.shape[-1] == 3 else pixels.repeat(3, axis=-1)


@torch.no_grad()
def draw(model: ImageVaeModel, test: LabeledImages, folder: Path) -> None:
    """Write reconstructions.png, samples.png, interpolations.png and latent_map.png into the folder."""
    model.eval()
    images = to_pixel_values(test.__getitems__(range(min(12, len(test))))["image"], model.device)
    means = model.encode(images)[0]
    rows = [list(to_uint8(images)), list(to_uint8(model.decode(means)))]
    image_grid(rows, folder / "reconstructions.png", labels=["input", "output"], cell=0.7)
    samples = to_uint8(model.sample(60, generator=torch.Generator().manual_seed(0)))
    image_grid([list(samples[start : start + 12]) for start in range(0, 60, 12)], folder / "samples.png", cell=0.7)
    half = len(means) // 2
    ways = model.interpolate(means[:half], means[half : 2 * half], 10)
    inputs = to_uint8(images)
    rows = [[inputs[pair], *to_uint8(way), inputs[half + pair]] for pair, way in enumerate(ways)]
    titles = ["input", *[""] * 10, "input"]
    image_grid(rows, folder / "interpolations.png", titles=titles, cell=0.7)
    draw_map(model, test, folder / "latent_map.png")


@torch.no_grad()
def draw_map(model: ImageVaeModel, data: LabeledImages, path: Path, *, side: int = 15) -> Path:
    """Draw the plane of the first two principal components of the posterior means.

    The left panel shows the codes of the images, with one color per class. The right panel shows decoded images for a
    grid on this plane.

    Args:
        model: The model.
        data: The images. The first `MAP_IMAGES` are encoded.
        path: The PNG file to write.
        side: Rows and columns of the grid.

    Returns:
        The path.
    """
    indices = range(min(MAP_IMAGES, len(data)))
    batches = [data.__getitems__(range(i, min(i + 250, len(indices))))["image"] for i in range(0, len(indices), 250)]
    means = torch.cat([model.encode(to_pixel_values(batch, model.device))[0].cpu() for batch in batches]).double()
    center = means.mean(dim=0)
    _, spread, axes = torch.linalg.svd(means - center, full_matrices=False)
    if len(axes) < 2:  # a code of size 1
        axes = torch.cat([axes, torch.zeros_like(axes)])
        spread = torch.cat([spread, torch.zeros_like(spread)])
    shares, places = spread.square() / spread.square().sum().clamp(min=1e-12), (means - center) @ axes[:2].T
    low, high = (torch.quantile(places, part, dim=0).tolist() for part in (0.01, 0.99))
    steps = [torch.linspace(low[axis], high[axis], side, dtype=torch.float64) for axis in (0, 1)]
    y, x = torch.meshgrid(steps[1].flip(0), steps[0], indexing="ij")
    codes = center + x.reshape(-1, 1) * axes[0] + y.reshape(-1, 1) * axes[1]
    tiles = to_uint8(model.decode(codes.float().to(model.device)))
    size = tiles.shape[1]
    sheet = tiles.reshape(side, side, size, size, 3).swapaxes(1, 2).reshape(side * size, side * size, 3)

    from matplotlib import colormaps  # here, because this import takes most of a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.9), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    groups, names = class_groups(data.labels[: len(indices)], data.names)
    colors = colormaps["tab10" if len(names) <= 10 else "tab20"]
    for number, name in enumerate(names):
        mine = groups == number
        left.scatter(
            *places[mine].T.numpy(), s=4, linewidths=0, alpha=0.6, color=colors(number % colors.N), label=name
        )
    for limit, axis in ((left.set_xlim, 0), (left.set_ylim, 1)):
        if high[axis] > low[axis]:
            limit(low[axis], high[axis])
    left.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    left.set_ylabel(f"second ({shares[1]:.0%})")
    left.set_title("posterior means of test images", fontsize=10)
    if len(names) <= 20:
        legend = figure.legend(loc="outside center left", fontsize=8, markerscale=3, frameon=False)
        for handle in legend.legend_handles:
            handle.set_alpha(1)
    right.imshow(sheet, interpolation="nearest")
    right.set_axis_off()
    right.set_title("decoded points of this plane", fontsize=10)
    figure.savefig(path, metadata={"Software": None})
    return path


def class_groups(labels: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, list[str]]:
    """Return a group per image and the names of the groups: classes, or last words of the names of over 20 classes."""
    if len(names) > 20:
        ends = [name.split()[-1] for name in names]
        if len(set(ends)) <= 20:
            groups = list(dict.fromkeys(ends))
            return torch.tensor([groups.index(end) for end in ends])[labels], groups
    return labels, names


# ---------------------------------------------------------------------------------------------------------------------
# Report


def conventions_table(metrics: dict[str, float], importance_samples: int) -> str:
    """Format the scores of all conventions as a Markdown table.

    Args:
        metrics: The final metrics of a run.
        importance_samples: Number of codes K of the importance-weighted bound.

    Returns:
        The table: one row per convention, with columns for the first and last epoch, training images and test images.
    """
    epochs, splits = ("first", "last"), ("train", "test")
    names = ["convention", "first epoch", "last epoch", "training images", "test images"]
    lines = [names, ["---"] + ["---:"] * 4]
    for name, key in CONVENTIONS.items():
        values = [metrics.get(f"{epoch}_epoch_{key}") for epoch in epochs]
        values += [metrics.get(f"{split}_{key}") for split in splits]
        if any(value is not None for value in values):
            name += f", K = {importance_samples}" if key == "iw_bound" else ""
            lines.append([name, *("" if value is None else format_metric(value) for value in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@activity("Writing the report")
def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and print the paths."""
    plot_run(folder, folder / "curves.png", CURVES)
    results = read_results(folder)
    metrics, args = results["metrics"], results["args"]
    collapse = posterior_collapse(int(metrics["test_active_units"]), args["latent_size"])
    limits = ([collapse] if collapse else []) + list(LIMITS)
    usage = usage_snippet(folder, "ImageVaeModel", calls=CALLS)
    card = run_card(folder, summary=SUMMARY, usage=usage, limits=limits, tags=TAGS)
    card.text += (
        "\n\n## The loss in all conventions\n\n"
        "Errors and likelihoods are summed over the pixels of an image, in nats, "
        "and averaged over images, with one code drawn per image. The columns of the epochs average over training "
        "batches while the weights change. The distance between the bound and the ELBO is measured on the first "
        f"{BOUND_IMAGES} images.\n\n" + conventions_table(metrics, args["importance_samples"]) + "\n"
    )
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (AutoModel.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
    print(f"pictures    {folder / 'reconstructions.png'}, samples.png, interpolations.png, latent_map.png")
