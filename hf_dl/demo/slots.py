"""Slots of an image as pictures, and the loading of the models that find them."""

import functools
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ..data import scenes
from ..models.slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel
from ..models.slot_frames import FRAME_DIM
from ..pipelines.model_loading import check_not_runs
from ..pipelines.slot_diffusion import SlotDiffusionPipeline
from ..reporting.grids import color_segments
from .checkpoints import one_line
from .pictures import shown_size, to_picture

MAX_SEED = 2**31 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Models


def _model_type(name: str | Path) -> str | None:
    try:
        return SlotAutoencoderConfig.get_config_dict(name)[0].get("model_type")
    except (OSError, ValueError):
        return None


def load_model(name: str) -> SlotAutoencoderModel:
    """Load a slot autoencoder for evaluation, on the GPU if one is available.

    Args:
        name: A folder or a Hub id.

    Raises:
        ValueError: If the model is missing, damaged, or has another type.
    """
    check_not_runs(name)
    kind = _model_type(name)
    if kind is None:
        raise ValueError(
            f"The model {name!r} was not found. Expected a folder with a config.json, or the id of a model on a Hub "
            "that can be reached. Set HF_DL_MODEL to a slot autoencoder, and start the page again."
        )
    if kind != SlotAutoencoderConfig.model_type:
        raise ValueError(f"The model {name!r} has model_type={kind!r}. This page needs a 'slot_autoencoder'.")
    try:
        model, info = SlotAutoencoderModel.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # each library reports damaged files with its own type of error
        raise ValueError(f"The model {name!r} cannot be loaded ({one_line(error)}).") from error
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ValueError(
            f"The model {name!r} does not fit this version of hf_dl: {len(wrong)} of its tensors are missing or have "
            "the wrong shape. Train it again, or install the version that trained it."
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_pipeline(name: str) -> SlotDiffusionPipeline:
    """Load a slot diffusion pipeline, on the GPU if one is available.

    Args:
        name: A folder or a Hub id.

    Raises:
        ValueError: If the pipeline is missing, damaged, or has another class.
    """
    check_not_runs(name)
    try:
        pipe = SlotDiffusionPipeline.from_pretrained(name)
    except Exception as error:  # each library reports damaged files with its own type of error
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise ValueError(
                f"The diffusion pipeline {name!r} was not found. Expected a folder with a model_index.json, or the id "
                "of a pipeline on a Hub that can be reached. Set HF_DL_DIFFUSION_MODEL to a slot diffusion pipeline, "
                "and start the page again."
            ) from error
        raise ValueError(f"The diffusion pipeline {name!r} cannot be loaded ({one_line(error)}).") from error
    for part in (pipe.slot_encoder, pipe.unet, pipe.autoencoder):
        part.eval()
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Scenes and seeds


@functools.lru_cache(maxsize=64)
def load_scene(style: str, seed: int, *, max_objects: int = 4) -> Mapping[str, Any]:
    """Generate a random scene.

    Args:
        style: "plain" or "textured".
        seed: Seed of the scene.
        max_objects: The scene has between 2 and this number of objects.

    Returns:
        A row of `hf_dl.data.scenes.load`, with the image and its annotations.
    """
    objects = (2, max(2, max_objects))
    data = scenes.load("test", style=style, size=192, num_objects=objects, num_scenes=1, seed=seed, streaming=True)
    return next(iter(data))


def draw_scene(style: str, seed: int, *, max_objects: int = 4) -> Image.Image:
    """Return the image of `load_scene`."""
    return load_scene(style, seed, max_objects=max_objects)["image"]


def new_seed() -> int:
    """Draw a new seed for a scene or for noise."""
    return secrets.randbelow(10_000)


def check_seed(seed: int | None) -> int:
    """Return a seed for noise, or raise a ValueError if it is out of range."""
    if seed is None or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"The noise seed {seed} is out of range. Expected a whole number from 0 to {MAX_SEED}.")
    return int(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Explanations


@dataclass
class Explanation:
    """An image divided into slots. The slots are sorted by `shares`, from the largest, usually the background.

    Attributes:
        image: The original image. The pictures below have its proportions, with a longer side of `SIDE` pixels.
        segments: The image under one color per slot.
        reconstruction: The image as painted by all slots, or None if it still has to be drawn.
        parts: For each slot, its content inside its mask, on white, in a frame of its color.
        shares: For each slot, its share of the pixels. The shares sum to 1.
        labels: For each pixel of the pictures, the slot that covers it, (height, width).
        used: The slots that the image needs. The model removed the others, which repeat a part of the image.
        slots: The slots, (1, slots, slot_dim), on the CPU.
        made: Name of the decoder that found the slots, and the requested numbers of slots and iterations.
        scene: The row of `load_scene` if the image is a generated scene.
        seed: Seed of the noise for drawing the image and its edits.
    """

    image: Image.Image
    segments: Image.Image
    reconstruction: Image.Image | None
    parts: list[Image.Image]
    shares: list[float]
    labels: np.ndarray
    used: list[int]
    slots: torch.Tensor
    made: tuple[str, int | None, int | None]
    scene: Mapping[str, Any] | None = None
    seed: int = field(default_factory=new_seed)


def make_explanation(
    image: Image.Image,
    *,
    slots: torch.Tensor,
    masks: torch.Tensor,
    contents: torch.Tensor,
    posterior: torch.Tensor,
    reconstruction: torch.Tensor | None,
    made: tuple[str, int | None, int | None],
) -> Explanation:
    """Sort the slots by the number of pixels that they cover, and make the pictures of an explanation.

    Args:
        image: The image.
        slots: The slots, (1, slots, slot_dim).
        masks: Weight of each slot for each pixel, (slots, height, width), summing to 1 over the slots. Unused slots
            have no weight.
        contents: Content of each slot, (slots, 3, height, width), in [0, 1].
        posterior: Scores that assign each pixel to a slot, (slots, height, width).
        reconstruction: The image from all slots, (3, height, width) in [0, 1], or None.
        made: See `Explanation`.
    """
    width, height = size = shown_size(image)
    winners = F.interpolate(posterior[None], size=(height, width), mode="bilinear")[0].argmax(dim=0).cpu().numpy()
    counts, weights = np.bincount(winners.ravel(), minlength=len(masks)), masks.mean(dim=(1, 2)).tolist()
    order = sorted(range(len(masks)), key=lambda slot: (counts[slot], weights[slot]), reverse=True)
    labels = np.argsort(order)[winners]
    masks, contents = masks[order].float(), contents[order]
    parts = [
        ImageOps.expand(to_picture(content * mask + 1 - mask, size), border=10, fill=tuple(map(int, color)))
        for content, mask, color in zip(contents, masks, color_segments(np.arange(len(masks))), strict=True)
    ]
    return Explanation(
        image=image,
        segments=color_slots(image.resize(size, Image.Resampling.BICUBIC), labels),
        reconstruction=None if reconstruction is None else to_picture(reconstruction, size),
        parts=parts,
        shares=(counts[order] / labels.size).tolist(),
        labels=labels,
        used=(masks.amax(dim=(1, 2)) > 0).nonzero().flatten().tolist(),
        slots=slots[:, order].cpu(),
        made=made,
    )


def get_frame(found: Explanation, slot: int) -> tuple[float, float, float]:
    """Return the frame of a slot: the center x, y and the size, as fractions of the image; see `slot_frames`."""
    return tuple(found.slots[0, slot, -FRAME_DIM:].tolist())


def is_at(found: Explanation, slot: int, x: float, y: float) -> bool:
    """Return whether the center of a slot is at a position, which the page rounds to three decimals."""
    old_x, old_y, _ = get_frame(found, slot)
    return max(abs(x - old_x), abs(y - old_y)) < 1e-3


def move_slot(found: Explanation, slot: int, x: float, y: float, scale: float = 1.0) -> Explanation:
    """Move and resize one slot.

    Args:
        found: An explanation whose slots have frames.
        slot: Index of the slot.
        x: New center from the left, as a fraction of the image's width.
        y: New center from the top, as a fraction of the image's height.
        scale: Factor for the size.

    Returns:
        The explanation with the changed slot. Its pictures still show the original image. Without a change of the
        rounded position and the size, the explanation itself.
    """
    if is_at(found, slot, x, y) and scale == 1:
        return found
    slots = found.slots.clone()
    slots[0, slot, -FRAME_DIM:] = torch.tensor([x, y, get_frame(found, slot)[2] * scale])
    return replace(found, slots=slots)


def color_slots(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """Draw the color of each label (height, width) over an image, with white lines between different labels."""
    gray = np.asarray(image.convert("L"))[..., None]
    picture = (0.4 * gray + 0.6 * color_segments(labels)).astype(np.uint8)
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, :-1] |= edge[:, 1:]
    edge[:-1] |= edge[1:]
    picture[edge] = 255
    return Image.fromarray(picture)
