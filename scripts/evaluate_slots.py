"""Evaluate a slot autoencoder: segmentation scores, pictures, and new images composed of known slots.

    scripts/run python scripts/evaluate_slots.py --model runs/train_slots

Writes slots.png, compositions.png, slot_library/ and evaluation.json into the model's folder; half a minute on two
cores.
"""

import json
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
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from hf_dl.data import masked_images, scenes
from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import ImageTensors
from hf_dl.metrics import perceptual
from hf_dl.metrics.images import default_features, fid
from hf_dl.metrics.segmentation import segmentation_scores
from hf_dl.models.layers_attention import attention_masks
from hf_dl.models.slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel
from hf_dl.models.slot_library import SlotLibrary
from hf_dl.reporting.card import run_card
from hf_dl.reporting.experiment import portable
from hf_dl.reporting.grids import color_segments, image_grid
from hf_dl.reporting.plots import plot_run

SUMMARY = (
    "A slot autoencoder (slot attention, Locatello et al. 2020): it finds the objects of an image without labels. "
    "Each slot paints a part of the image; the masks by which the parts are put together segment it, and more exactly "
    "the posterior: which slot explains a pixel best, given the pixel."
)
LIMITS = (
    "Slots are not named: which of them is the background, and which object a slot holds, changes between images.",
    "It finds things of the kind it was trained on; on photographs it cuts by color and position.",
)
TAGS = ("slot-attention", "object-centric-learning", "unsupervised")
MASKS = ("posterior", "decoder", "attention")
CURVES = {
    "squared error": {"training": "mse", "validation": "val_loss"},
    "foreground ARI": {name: f"val_{name}_fg_ari" for name in MASKS},
    "ARI of all pixels": {name: f"val_{name}_ari" for name in MASKS},
}
WATCHED = ("loss", *(f"{mask}_{score}" for mask in MASKS for score in ("fg_ari", "ari")))  # while it trains
LIBRARY_IMAGES = 2000  # training images whose slots fill the library
PERCEPTUAL = "Network of the perceptual distance: random, lpips, or an image classifier."


@dataclass
class SlotData:
    """Flags that say which images, shared with the training script."""

    source: str = field(default="synthetic", metadata={"help": "synthetic, a CLEVRTex folder, or a Hub id or folder."})
    style: Literal["plain", "textured"] = field(default="plain", metadata={"help": "Look of synthetic scenes."})
    image_size: int = field(default=64, metadata={"help": "Height and width of the images, in pixels."})
    crop: int = field(default=192, metadata={"help": "Center crop of real images before resizing; 0: none."})
    num_objects: list[int] = field(default_factory=lambda: [2, 4], metadata={"help": "Fewest and most objects."})
    num_train: int = field(default=10_000, metadata={"help": "Training images; 0: all of a real data set."})
    num_test: int = field(default=500, metadata={"help": "Validation and test images, each."})


@dataclass
class Args(SlotData):
    """Flags of the evaluation."""

    model: str = field(default="runs/train_slots", metadata={"help": "Folder or Hub id of the model."})
    num_slots: list[int] = field(default_factory=list, metadata={"help": "Slots K to try; default: the model's own."})
    num_iterations: list[int] = field(default_factory=list, metadata={"help": "Iterations T to try, likewise."})
    perceptual: str = field(default="random", metadata={"help": PERCEPTUAL})
    output_dir: str = field(default="", metadata={"help": "Where to write; default: the model's folder."})


def checked(make: Callable[..., SlotAutoencoderConfig], **fields: Any) -> SlotAutoencoderConfig:
    """Make a config, and turn its refusal into a ValueError of one sentence."""
    try:
        return make(**fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def load_images(args: SlotData, split: str) -> ImageTensors:
    """Load a split of the source that the flags name, decoded."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    count = (args.num_train if split == "train" else args.num_test) or None
    if args.source == "synthetic":
        options = {"style": args.style, "size": args.image_size, "num_objects": tuple(args.num_objects)}
        return ImageTensors(scenes.load(split, num_scenes=count, **options))
    data = masked_images.load(split, args.source, size=args.image_size, crop=args.crop or None)
    return ImageTensors(data if count is None else data.select(range(min(count, len(data)))))


def to_pixel_values(images: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """Map uint8 images to [-1, 1], as the model's processor does."""
    return images.to(device).float() / 127.5 - 1


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[dict],
    *,
    gather: Callable[[Any], Any] = lambda values: values,
    **options: Any,
) -> tuple[dict[str, float], torch.Tensor]:
    """Score the posterior, the decoder's masks and the attention's against the true ones.

    Args:
        model: The model, wrapped or not.
        batches: With `image` and `mask`, uint8.
        gather: Joins what several processes computed.
        **options: For the model's forward: `num_slots`, `num_iterations`.

    Returns:
        `loss` (mean squared error), `explained_variance` (1 - loss / variance of the pixels around their mean color),
        `posterior_ari`, `posterior_fg_ari`, ... `attention_mbo`, image counts; and the decoder's masks of the first
        batch, gathered as well, all from the same draw of the initial slots: what `failure_to_bind` can compare.
    """
    model.eval()
    columns, first = [], None
    for batch in batches:
        pixel_values = to_pixel_values(batch["image"], next(model.parameters()).device)
        output = model(pixel_values, **options)
        if first is None:
            first = gather(model(pixel_values, **{**options, "num_draws": 1}).masks)
        size = output.masks.shape[-2:]
        attentions = attention_masks(output.attentions[-1], size, image_size=pixel_values.shape[-1])
        error = (output.reconstruction - pixel_values).square().mean(dim=(1, 2, 3))
        colors, squares = pixel_values.mean(dim=(2, 3)), pixel_values.square().mean(dim=(1, 2, 3))
        module = getattr(model, "module", model)  # of a data-parallel wrapper
        masks = module.posterior(pixel_values, output), output.masks, attentions
        segments = *(mask.argmax(1) for mask in masks), batch["mask"].to(error.device)
        columns.append(gather((error, colors, squares, *segments)))
    error, colors, squares, *segments, truth = map(torch.cat, zip(*columns, strict=True))
    scores = {}
    for mask, segment in zip(MASKS, segments, strict=True):
        scores |= segmentation_scores(segment, truth.long(), mask=mask)
    variance = squares.mean() - colors.mean(dim=0).square().mean()
    loss = error.mean()
    return {"loss": loss.item(), "explained_variance": (1 - loss / variance).item(), **scores}, first


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Turn images (..., 3, height, width) in [0, 1] into uint8 (..., height, width, 3)."""
    return (images.clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


@torch.no_grad()
def draw_slots(model: SlotAutoencoderModel, images: torch.Tensor, path: Path) -> Path:
    """Draw for each image: input, reconstruction, segments, and what each slot paints where its mask is."""
    model.eval()
    pixel_values = to_pixel_values(images, model.device)
    output = model(pixel_values)
    painted = (output.contents / 2 + 0.5) * output.masks.unsqueeze(2) + (1 - output.masks.unsqueeze(2))
    segments = model.posterior(pixel_values, output).argmax(1).cpu().numpy()
    rows = [
        [to_uint8(image / 2 + 0.5), to_uint8(reconstruction / 2 + 0.5), color_segments(segment), *to_uint8(slots)]
        for image, reconstruction, segment, slots in zip(
            pixel_values, output.reconstruction, segments, painted, strict=True
        )
    ]
    slots = [f"slot {index + 1}" for index in range(painted.shape[1])]
    return image_grid(rows, path, titles=["input", "reconstruction", "segments", *slots])


@torch.no_grad()
def mean_distance(measure: perceptual.PerceptualDistance, images: torch.Tensor, others: torch.Tensor) -> float:
    """The mean perceptual distance of images from others, both uint8 (images, 3, height, width), pair by pair."""
    pairs = zip(images.split(50), others.split(50), strict=True)
    return torch.cat([measure(to_pixel_values(one), to_pixel_values(other)) for one, other in pairs]).mean().item()


@torch.no_grad()
def compose(
    model: SlotAutoencoderModel,
    train: ImageTensors,
    real: ImageTensors,
    folder: Path,
    *,
    seed: int = 0,
    measure: str = "random",
) -> dict[str, float]:
    """Fill a slot library from training images, compose as many new images as there are real ones, and measure FID.

    Returns:
        For the recipe of one slot per cluster (`per_cluster_fid_...`) and for one background and n objects
        (`background_aware_fid_...`) the FID, and that of the reconstructions, which no composition can be expected to
        beat (`reconstruction_fid_...`); and the perceptual distance of these (`reconstruction_perceptual`), as `load`
        of `hf_dl.metrics.perceptual` makes it.
    """
    distance = perceptual.load(measure)
    model.eval()
    slots, masks = [], []
    for start in range(0, min(LIBRARY_IMAGES, len(train)), 64):
        index = range(start, min(start + 64, LIBRARY_IMAGES, len(train)))
        output = model(to_pixel_values(train.__getitems__(index)["image"], model.device))
        slots.append(output.slots.cpu())
        masks.append(F.interpolate(output.masks.cpu(), size=16, mode="area"))
    library = SlotLibrary().fit(torch.cat(slots), torch.cat(masks), num_clusters=output.slots.shape[1], seed=seed)
    library.save_pretrained(folder / "slot_library")

    images = real.__getitems__(range(len(real)))["image"]
    made = {
        "reconstruction": [model(to_pixel_values(b, model.device)).reconstruction / 2 + 0.5 for b in images.split(64)]
    }
    generator = torch.Generator().manual_seed(seed)
    for mode in ("per_cluster", "background_aware"):
        options = {"max_iou": 0.1} if mode == "background_aware" else {}
        drawn, keep = library.sample(len(images), generator=generator, mode=mode, **options)
        made[mode] = [model.decode(s, keep=k) for s, k in zip(drawn.split(64), keep.split(64), strict=True)]
    features, metrics, rows = default_features(), {}, [list(to_uint8(images[:8] / 255))]
    for mode, batches in made.items():
        fakes = (torch.cat(batches).clamp(0, 1) * 255).round().byte().cpu()
        scores = fid(images, fakes, features=features)
        if mode == "reconstruction":
            metrics["reconstruction_perceptual"] = mean_distance(distance, fakes, images)
        metrics |= {f"{mode}_{name}": value for name, value in scores.items() if name.startswith("fid")}
        rows.append(list(fakes[:8].movedim(1, -1).numpy()))
    image_grid(rows, folder / "compositions.png", labels=["test images", *(name.replace("_", " ") for name in made)])
    return {**metrics, "composed_images": float(len(images))}


def draw_and_compose(
    model: SlotAutoencoderModel, train: ImageTensors, test: ImageTensors, folder: Path, *, measure: str = "random"
) -> dict[str, float]:
    """Write slots.png, compositions.png and slot_library/ into the folder; returns what `compose` measured."""
    draw_slots(model, test.__getitems__(range(min(8, len(test))))["image"], folder / "slots.png")
    return compose(model, train, test, folder, measure=measure)


def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and say where everything is."""
    plot_run(folder, folder / "curves.png", CURVES)
    card = run_card(folder, summary=SUMMARY, limits=LIMITS, pipeline_tag="image-segmentation", tags=TAGS)
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (SlotAutoencoderModel.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
    print(f"picture     {folder / 'slots.png'}")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate the model that the flags name, and write what was found beside it."""
    args = Args(**vars(HfArgumentParser(Args, allow_abbrev=False).parse_args(argv)))
    model = SlotAutoencoderModel.from_pretrained(args.model).eval()
    folder = Path(args.output_dir or args.model)
    folder.mkdir(parents=True, exist_ok=True)
    args.image_size = model.config.image_size
    train, test = load_images(args, "train"), load_images(args, "test")
    metrics = {}
    for num_slots in args.num_slots or [model.config.num_slots]:
        for num_iterations in args.num_iterations or [model.config.num_iterations]:
            scores, _ = evaluate(
                model, DataLoader(test, 50, collate_fn=as_is), num_slots=num_slots, num_iterations=num_iterations
            )
            name = f"k{num_slots}_t{num_iterations}_" if args.num_slots or args.num_iterations else ""
            metrics |= {f"{name}test_{key}": value for key, value in scores.items()}
    metrics |= draw_and_compose(model, train, test, folder, measure=args.perceptual)
    found = {"args": portable(asdict(args)), "metrics": metrics}
    (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, value in metrics.items():
        print(f"{name:40s} {value:.4f}")
    print(f"Pictures, slot library and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
