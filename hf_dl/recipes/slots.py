"""Slot autoencoders: flags and config, evaluation, composition of new images, figures and report.

The training loop is in scripts/train_slots.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from hf_dl.data.image_arrays import ImageTensors
from hf_dl.metrics import perceptual
from hf_dl.metrics.images import default_features, fid
from hf_dl.metrics.segmentation import segmentation_scores
from hf_dl.models.layers_attention import attention_masks
from hf_dl.models.slot_autoencoder import SlotAutoencoderModel
from hf_dl.models.slot_config import ARCHITECTURES, SlotAutoencoderConfig
from hf_dl.models.slot_library import SlotLibrary
from hf_dl.progress import activity
from hf_dl.reporting.card import run_card, usage_snippet
from hf_dl.reporting.grids import color_segments, image_grid
from hf_dl.reporting.plots import plot_run

from .evaluation import checked_config
from .scene_images import mean_perceptual_distance, quantize, to_pixel_values, to_uint8

SUMMARY = (
    "A slot autoencoder with slot attention (Locatello et al. 2020) finds the objects of an image without labels. "
    "Each slot paints a part of the image. The masks that combine the parts segment the image. The posterior segments "
    "it more exactly: it assigns each pixel to the slot that explains its color best."
)
TASK = "image-segmentation"  # its pipeline returns a mask, a label and a score for each slot that the image needs
CALLS = """\
image = Image.open("image.png")
segments = model.segment(image)  # (height, width), the slot of each pixel
outputs = model(model.prepare_images([image]))  # outputs.masks, outputs.slots, outputs.reconstruction"""
LIMITS = (
    "Slots have no names. The slot of the background, and the slot of an object, differ between images.",
    "The model finds objects like those in its training images. It segments photographs by color and position.",
)
TAGS = ("slot-attention", "object-centric-learning", "unsupervised")
MASKS = ("posterior", "decoder", "attention")
CURVES = {
    "squared error": {"training": "mse", "validation": "val_loss"},
    "foreground ARI": {name: f"val_{name}_fg_ari" for name in MASKS},
    "ARI of all pixels": {name: f"val_{name}_ari" for name in MASKS},
}
# Scores that are logged during training, as far as the data has masks.
WATCHED = ("loss", *(f"{mask}_{score}" for mask in MASKS for score in ("fg_ari", "ari")))
SHOWN = {"loss": "loss", "mse": "squared error", "val_posterior_fg_ari": "foreground ARI"}  # next to the progress bar
LIBRARY_IMAGES = 2000  # number of training images whose slots fill the slot library


@dataclass
class SlotFlags:
    """Flags of the slot encoder. The scripts for slots and for slot diffusion share them."""

    architecture: Literal[tuple(ARCHITECTURES)] = field(
        default="small", metadata={"help": "Sizes of the slot encoder and its decoder."}
    )
    num_slots: int = field(
        default=5, metadata={"help": "Slots K per image: one for the background, and one per object at most."}
    )
    num_iterations: int = field(default=5, metadata={"help": "Iterations T of slot attention."})


def make_config(flags: Any, **fields: Any) -> SlotAutoencoderConfig:
    """Create the config of the slot autoencoder.

    Args:
        flags: `SlotFlags` with `image_size`.
        **fields: Further fields of the config.

    Raises:
        ValueError: If a size is invalid.
    """
    sizes = {name: getattr(flags, name) for name in ("image_size", "num_slots", "num_iterations")}
    return checked_config(ARCHITECTURES[flags.architecture], **sizes, **fields)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[dict],
    *,
    gather: Callable[[Any], Any] = lambda values: values,
    **options: Any,
) -> tuple[dict[str, float], torch.Tensor]:
    """Compare the posterior, the decoder masks and the attention masks with the true masks.

    Args:
        model: The slot autoencoder, wrapped for several devices or not.
        batches: Batches with `image` and, if the data has masks, `mask`, both uint8.
        gather: Concatenates tensors of all processes. Defaults to a single process.
        **options: `num_slots`, `num_iterations` and `num_draws` for the forward pass of the model.

    Returns:
        The scores, and the decoder masks of the first batch for `failure_to_bind`, which start from the same draw of
        the initial slots. `loss` is the mean squared error. `explained_variance` is 1 - loss / variance of the pixels
        around their mean color. With true masks, there are ARI, foreground ARI, mIoU and mBO per mask
        (`posterior_ari`, ..., `attention_mbo`). Scores that are undefined for all images are left out: the foreground
        ARI needs images with two objects. The scores also have the number of images.
    """
    model.eval()
    columns, first = [], None
    for batch in batches:
        pixel_values = to_pixel_values(batch["image"], next(model.parameters()).device)
        output = model(pixel_values, **options)
        if first is None:
            first = gather(model(pixel_values, **{**options, "num_draws": 1, "prune": False}).masks)
        size = output.masks.shape[-2:]
        attentions = attention_masks(output.attentions[-1], size, image_size=pixel_values.shape[-1])
        error = (output.reconstruction - pixel_values).square().mean(dim=(1, 2, 3))
        colors, squares = pixel_values.mean(dim=(2, 3)), pixel_values.square().mean(dim=(1, 2, 3))
        module = getattr(model, "module", model)  # inside a data-parallel wrapper
        masks = module.posterior(pixel_values, output), output.masks, attentions
        segments = ()
        if "mask" in batch:
            segments = *(mask.argmax(1) for mask in masks), batch["mask"].to(error.device)
        columns.append(gather((error, colors, squares, *segments)))
    error, colors, squares, *segments = map(torch.cat, zip(*columns, strict=True))
    scores = {"images": float(len(error))}
    for mask, segment in zip(MASKS, segments[:-1], strict=False):
        found = segmentation_scores(segment, segments[-1].long(), mask=mask)
        scores |= {name: value for name, value in found.items() if not math.isnan(value)}
    variance = squares.mean() - colors.mean(dim=0).square().mean()
    loss = error.mean()
    return {"loss": loss.item(), "explained_variance": (1 - loss / variance).item(), **scores}, first


@torch.no_grad()
def draw_slots(model: SlotAutoencoderModel, images: torch.Tensor, path: Path) -> Path:
    """Draw one row per image: input, reconstruction, segments, and the part that each slot paints.

    Args:
        model: The slot autoencoder.
        images: uint8 (images, 3, height, width).
        path: The PNG file to write.

    Returns:
        The path.
    """
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


@activity("Composing images from slots")
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
    """Fill a slot library from training images, compose new images from it, and measure their FID.

    Args:
        model: The slot autoencoder.
        train: Images whose slots fill the library.
        real: Images to compare with. As many images are composed.
        folder: Folder for slot_library/ and compositions.png.
        seed: Seed of the clustering and of the compositions.
        measure: Network of the perceptual distance, see `hf_dl.metrics.perceptual.load`.

    Returns:
        The FID of images with one slot per cluster (`per_cluster_fid_...`), of images with one background and several
        objects (`background_aware_fid_...`), and of the reconstructions (`reconstruction_fid_...`). The last one is a
        lower bound in practice. Also `reconstruction_perceptual`, the perceptual distance of the reconstructions, and
        `composed_images`, the number of images.
    """
    distance = perceptual.load(measure)
    model.eval()
    slots, masks = [], []
    for start in range(0, min(LIBRARY_IMAGES, len(train)), 64):
        index = range(start, min(start + 64, LIBRARY_IMAGES, len(train)))
        output = model(to_pixel_values(train.__getitems__(index)["image"], model.device), num_draws=2)
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
        fakes = quantize(torch.cat(batches))
        scores = fid(images, fakes, features=features)
        if mode == "reconstruction":
            metrics["reconstruction_perceptual"] = mean_perceptual_distance(distance, fakes, images)
        metrics |= {f"{mode}_{name}": value for name, value in scores.items() if name.startswith("fid")}
        rows.append(list(fakes[:8].movedim(1, -1).numpy()))
    image_grid(rows, folder / "compositions.png", labels=["test images", *(name.replace("_", " ") for name in made)])
    return {**metrics, "composed_images": float(len(images))}


def draw_and_compose(
    model: SlotAutoencoderModel, train: ImageTensors, test: ImageTensors, folder: Path, *, measure: str = "random"
) -> dict[str, float]:
    """Write slots.png, compositions.png and slot_library/ into the folder, and return the scores of `compose`."""
    draw_slots(model, test.__getitems__(range(min(8, len(test))))["image"], folder / "slots.png")
    return compose(model, train, test, folder, measure=measure)


@activity("Writing the report")
def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and print the paths."""
    plot_run(folder, folder / "curves.png", CURVES)
    usage = usage_snippet(folder, "SlotAutoencoderModel", calls=CALLS, task=TASK)
    card = run_card(folder, summary=SUMMARY, usage=usage, limits=LIMITS, tags=TAGS, task=TASK)
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (SlotAutoencoderModel.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
    print(f"picture     {folder / 'slots.png'}")
