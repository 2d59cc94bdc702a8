"""Evaluate a variational autoencoder of images by every convention in use, and draw what it does.

    scripts/run python scripts/evaluate_vae.py --model runs/train_vae --source synthetic

Papers and courses call different sums "the VAE loss"; here they stand side by side, in nats an image: the summed
squared error (SSE), half of it, the binary cross-entropy (BCE), each with and without the KL, the ELBO of the model's
own likelihood with its constant, and the importance-weighted bound. Writes reconstructions.png, samples.png,
interpolations.png, latent_map.png and evaluation.json into the model's folder.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, Subset
from transformers import HfArgumentParser

from hf_dl.data import labeled_images
from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import LabeledImages
from hf_dl.metrics.latents import active_units, posterior_collapse
from hf_dl.models.image_vae import ImageVaeConfig, ImageVaeModel, ImageVaeProcessor, gaussian_kl
from hf_dl.reporting.card import format_metric, run_card
from hf_dl.reporting.experiment import portable, read_curves, read_results
from hf_dl.reporting.grids import image_grid
from hf_dl.reporting.plots import plot_run

SUMMARY = (
    "A variational autoencoder of images (Kingma & Welling 2014): it makes a short code of an image, an image of a "
    "code, and new images of random codes."
)
LIMITS = (
    "Its images are means over what a code leaves open, and so are blurred.",
    "The cross-entropy of gray pixels is that of images made black and white at random, which no density of gray "
    "images compares with.",
)
TAGS = ("vae", "variational-autoencoder", "unsupervised")
CURVES = {
    title: {"training": key, "validation": f"val_{key}"}
    for title, key in (("squared error", "sse"), ("cross-entropy", "bce"), ("KL", "kl"))
}
CONVENTIONS = {  # what stands in the card's table
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
RECIPES = {  # plain Adam as in courses; the deeper network loses latents for good where it starts at full speed
    "mlp": {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0},
    "conv": {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 200},
}
BOUND_IMAGES = 1000  # of which the importance-weighted bound is taken: it costs K passes of the decoder
MAP_IMAGES = 4000


@dataclass
class ImageData:
    """Flags that say which images, shared with the training script."""

    source: str = field(
        default="synthetic", metadata={"help": "synthetic, a Hub id, or a folder of images, parquet or idx files."}
    )
    image_size: int = field(default=32, metadata={"help": "Height and width of the images, in pixels."})
    num_channels: Literal[0, 1, 3] = field(default=0, metadata={"help": "1: gray, 3: RGB, 0: as the images are."})
    num_train: int = field(default=0, metadata={"help": "Training images; 0: all, which is 10000 synthetic ones."})
    num_test: int = field(default=0, metadata={"help": "Validation and test images, at most, each; 0: all."})
    holdout: float = field(default=0.02, metadata={"help": "Part of the training images that a missing split takes."})


@dataclass
class ModelFlags:
    """Flags that say which network."""

    architecture: Literal["mlp", "conv"] = field(default="conv", metadata={"help": "Kind of network."})
    likelihood: Literal["bernoulli", "gaussian"] = field(
        default="bernoulli", metadata={"help": "Of the pixels: trains with BCE, or with SSE / (2 pixel_std^2)."}
    )
    latent_size: int = field(default=20, metadata={"help": "Numbers of a code."})
    beta: float = field(default=1.0, metadata={"help": "Weight of the KL."})
    pixel_std: float = field(default=0.5**0.5, metadata={"help": "gaussian: standard deviation of a pixel."})
    hidden_sizes: list[int] = field(default_factory=lambda: [400], metadata={"help": "mlp: hidden units."})
    widths: list[int] = field(default_factory=lambda: [32, 64], metadata={"help": "conv: channels of its grids."})
    num_blocks: int = field(default=1, metadata={"help": "conv: residual blocks, of encoder and decoder each."})
    hidden_size: int = field(default=256, metadata={"help": "conv: units of the dense layer."})


@dataclass
class Args(ImageData):
    """Flags of the evaluation."""

    model: str = field(default="runs/train_vae", metadata={"help": "Folder or Hub id of the model."})
    importance_samples: int = field(default=50, metadata={"help": "K of the importance-weighted bound; 0: none."})
    output_dir: str = field(default="", metadata={"help": "Where to write; default: the model's folder."})


def make_config(args: Any, num_channels: int) -> ImageVaeConfig:
    """Make the config that the flags describe; its refusal becomes a ValueError of one sentence."""
    fields = {name: getattr(args, name) for name in ModelFlags.__dataclass_fields__}
    try:
        return ImageVaeConfig(image_size=args.image_size, num_channels=num_channels, **fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def fill(args: Any) -> None:
    """Put the recipe of the architecture where the flags of the training script say nothing."""
    for name, value in RECIPES.get(args.architecture, {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check(args: Any) -> None:
    """Refuse flags of the training script that cannot be, before any image is loaded."""
    make_config(args, args.num_channels or 3)
    if not 0 <= args.kl_warmup <= 1:
        raise ValueError(f"kl_warmup={args.kl_warmup} must be a part of the run, 0 to 1.")
    if args.importance_samples < 0:
        raise ValueError(f"importance_samples={args.importance_samples} must be 0 or above.")


def load_images(args: ImageData, split: str) -> LabeledImages:
    """Load a split of the source that the flags name, with one channel where its images are gray."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    count = (args.num_train if split == "train" else args.num_test) or None
    data = labeled_images.load(split, args.source, size=args.image_size, num_images=count, holdout=args.holdout)
    if not args.num_channels:
        some_images = [np.asarray(image.convert("RGB")) for image in data[:100]["image"]]
        args.num_channels = 1 if all((image == image[..., :1]).all() for image in some_images) else 3
    return LabeledImages(data, channels=args.num_channels)


def make_model(args: Any, data: LabeledImages) -> ImageVaeModel:
    """Make the network that the flags describe, for these images."""
    return ImageVaeModel(make_config(args, data.pixels.shape[1]))


def make_processor(config: ImageVaeConfig) -> ImageVaeProcessor:
    """Make the processor that is saved beside the weights."""
    size = {"height": config.image_size, "width": config.image_size}
    return ImageVaeProcessor(size=size, do_grayscale=config.num_channels == 1)


def some(train: LabeledImages, test: LabeledImages) -> Subset:
    """Take as many training images as there are test images, to score both alike."""
    return Subset(train, range(min(len(train), len(test))))


def to_pixel_values(pictures: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """Map uint8 images to [0, 1], as the model's processor does."""
    return pictures.to(device).float() / 255


@torch.no_grad()
def errors(pixel_values: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute SSE and BCE, whichever the model was trained with: sums over an image, means over the batch."""
    sse, bce = per_image(pixel_values, logits)
    return {"sse": sse.mean(), "bce": bce.mean()}


def per_image(pixel_values: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed squared error and binary cross-entropy of each image."""
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
    """Score a model by every convention, with one code drawn for each image.

    Args:
        model: The model, wrapped or not.
        batches: With `image`, uint8.
        importance_samples: K of the importance-weighted bound, of the first `BOUND_IMAGES` images; 0 for none.
        gather: Joins what several processes computed.

    Returns:
        `loss` (what it is trained with), `sse`, `half_sse`, `bce`, `kl`, each error `..._plus_kl`, `elbo` with the
        constant of the likelihood, `bits_per_dim` of that, `active_units`, `images`; with K also `iw_gain`, by how
        much the importance-weighted bound of some images is above their ELBO, and `iw_bound`, the ELBO of all images
        and that gain. `bits_per_dim` of a Gaussian takes a gray level
        for an interval of width 1/255, that of a Bernoulli is of images made black and white.
    """
    model.eval()
    module = getattr(model, "module", model)  # of a data-parallel wrapper
    config = module.config
    generator = torch.Generator(device=module.device).manual_seed(0)
    columns, bounds, seen = [], [], 0
    for batch in batches:
        pixel_values = to_pixel_values(batch["image"], module.device)
        # the parts of the model, not its forward, so that scores are of full precision whatever it trains with
        mean, log_variance = module.encode(pixel_values)
        logits = module.decoder(module.draw(mean, log_variance, generator=generator))
        kl = gaussian_kl(mean, log_variance).sum(1)
        elbo = module.log_likelihood(pixel_values, logits) - kl
        columns.append(gather((*per_image(pixel_values, logits), kl, elbo, mean)))
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
        gain = (bound - elbo[: len(bound)]).mean()  # varies far less between images than either bound does
        scores |= {"iw_bound": elbo.mean() + gain, "iw_gain": gain}
    scores |= {"active_units": active_units(means).sum(), "images": len(sse)}
    return {name: float(value) for name, value in scores.items()}


def watch(run: Any, batches: Iterable[dict]) -> dict[str, float]:
    """Score the validation images while a run goes on."""
    with run.averaged():
        scores = evaluate(run.model, batches, gather=run.gather)
    return {f"val_{name}": value for name, value in scores.items() if name != "images"}


def conclude(
    run: Any, batches: dict[str, Iterable[dict]], train: LabeledImages, test: LabeledImages
) -> dict[str, float]:
    """Score training and test images by every convention, say whether the posterior collapsed, draw, and end."""
    metrics = {}
    with run.averaged():
        for split in ("train", "test"):
            scores = evaluate(
                run.model, batches[split], importance_samples=run.args.importance_samples, gather=run.gather
            )
            metrics |= {f"{split}_{name}": value for name, value in scores.items()}
        if run.is_main:
            metrics |= epoch_means(run.folder, math.ceil(len(train) / run.args.batch_size))
            draw(run.unwrapped, test, run.folder)
    if warning := posterior_collapse(int(metrics["test_active_units"]), run.args.latent_size):
        run.event("posterior_collapse", warning)
    return run.finish(metrics)


def epoch_means(folder: Path, steps: int) -> dict[str, float]:
    """Average what was logged of the batches over the first and the last epoch, while the weights changed.

    Args:
        folder: The folder of the run.
        steps: Steps of an epoch; a line of the log that ends in the next epoch is left out.

    Returns:
        `first_epoch_sse_plus_kl`, `last_epoch_sse_plus_kl`, and likewise the other conventions.
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
# Pictures


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """Turn images (..., channels, height, width) in [0, 1] into uint8 (..., height, width, 3)."""
    pixels = (pictures.clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()
    return pixels if pixels.shape[-1] == 3 else pixels.repeat(3, axis=-1)


@torch.no_grad()
def draw(model: ImageVaeModel, test: LabeledImages, folder: Path) -> None:
    """Write reconstructions.png, samples.png, interpolations.png and latent_map.png into a folder."""
    model.eval()
    some_images = to_pixel_values(test.__getitems__(range(min(12, len(test))))["image"], model.device)
    means = model.encode(some_images)[0]
    rows = [list(to_uint8(some_images)), list(to_uint8(model.decode(means)))]
    image_grid(rows, folder / "reconstructions.png", labels=["input", "output"], cell=0.7)
    samples = to_uint8(model.sample(60, generator=torch.Generator().manual_seed(0)))
    image_grid([list(samples[start : start + 12]) for start in range(0, 60, 12)], folder / "samples.png", cell=0.7)
    half = len(means) // 2
    ways = model.interpolate(means[:half], means[half : 2 * half], 10)
    inputs = to_uint8(some_images)
    rows = [[inputs[pair], *to_uint8(way), inputs[half + pair]] for pair, way in enumerate(ways)]
    titles = ["input", *[""] * 10, "input"]
    image_grid(rows, folder / "interpolations.png", titles=titles, cell=0.7)
    draw_map(model, test, folder / "latent_map.png")


@torch.no_grad()
def draw_map(model: ImageVaeModel, data: LabeledImages, path: Path, *, side: int = 15) -> Path:
    """Draw the plane in which posterior means vary most: where each class lies, and the images of its points."""
    indices = range(min(MAP_IMAGES, len(data)))
    batches = [data.__getitems__(range(i, min(i + 250, len(indices))))["image"] for i in range(0, len(indices), 250)]
    means = torch.cat([model.encode(to_pixel_values(batch, model.device))[0].cpu() for batch in batches]).double()
    center = means.mean(dim=0)
    _, spread, axes = torch.linalg.svd(means - center, full_matrices=False)
    if len(axes) < 2:  # a code of one number
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
    right.set_title("what the decoder makes of the points of this plane", fontsize=10)
    figure.savefig(path, metadata={"Software": None})
    return path


def class_groups(labels: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, list[str]]:
    """Give each image the number of its class; where there are many, of classes whose names end alike."""
    if len(names) > 20:
        ends = [name.split()[-1] for name in names]
        if len(set(ends)) <= 20:
            groups = list(dict.fromkeys(ends))
            return torch.tensor([groups.index(end) for end in ends])[labels], groups
    return labels, names


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def conventions_table(metrics: dict[str, float], importance_samples: int) -> str:
    """Write as markdown what each convention gives: while it trained, and for training and test images after."""
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


def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and say where everything is."""
    plot_run(folder, folder / "curves.png", CURVES)
    results = read_results(folder)
    metrics, args = results["metrics"], results["args"]
    collapse = posterior_collapse(int(metrics["test_active_units"]), args["latent_size"])
    limits = ([collapse] if collapse else []) + list(LIMITS)
    card = run_card(folder, summary=SUMMARY, limits=limits, pipeline_tag="unconditional-image-generation", tags=TAGS)
    card.text += (
        "\n\n## The loss by every convention\n\nSums over an image, in nats where it is a likelihood; the mean over "
        "the images, with one code drawn for each. The epochs are means over the batches while the weights changed; "
        f"how far the bound is above the ELBO is measured on the first {BOUND_IMAGES} images at most.\n\n"
        + conventions_table(metrics, args["importance_samples"])
        + "\n"
    )
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (AutoModel.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
    print(f"pictures    {folder / 'reconstructions.png'}, samples.png, interpolations.png, latent_map.png")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate the model that the flags name, and write what was found beside it."""
    args = Args(**vars(HfArgumentParser(Args, allow_abbrev=False).parse_args(argv)))
    model = ImageVaeModel.from_pretrained(args.model)
    folder = Path(args.output_dir or args.model)
    folder.mkdir(parents=True, exist_ok=True)
    args.image_size, args.num_channels = model.config.image_size, model.config.num_channels
    train, test = load_images(args, "train"), load_images(args, "test")
    metrics = {}
    for split, data in (("train", some(train, test)), ("test", test)):
        loader = DataLoader(data, 250, collate_fn=as_is)
        scores = evaluate(model, loader, importance_samples=args.importance_samples)
        metrics |= {f"{split}_{name}": value for name, value in scores.items()}
    draw(model, test, folder)
    found = {"args": portable(asdict(args)), "metrics": metrics}
    (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, value in metrics.items():
        print(f"{name:40s} {value:.4f}")
    if warning := posterior_collapse(int(metrics["test_active_units"]), model.config.latent_size):
        print(warning, file=sys.stderr)
    print(f"Pictures and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
