"""Edits of images by their slots: the edited slots, and the region of the image that an edit may change.

Outside the region, blended latent diffusion keeps the image (Avrahami et al. 2023, "Blended Latent Diffusion").
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel

from ..models.latent_autoencoder import encode_latents


class Background(NamedTuple):
    """Images that stay outside a region, and their latents.

    Attributes:
        pixel_values: (batch, channels, height, width).
        region: The pixels to draw, bool (batch, 1, height, width).
        latents: (batch, latent channels, rows, columns).
        cells: The latents to draw, bool (batch, 1, rows, columns): all cells with a pixel of the region.
    """

    pixel_values: torch.Tensor
    region: torch.Tensor
    latents: torch.Tensor
    cells: torch.Tensor


def prepare_background(
    autoencoder: AutoencoderKL | VQModel, pixel_values: torch.Tensor, region: torch.Tensor | None, *, batch: int
) -> Background:
    """Encode the images that stay outside a region.

    Args:
        autoencoder: The autoencoder of the latents.
        pixel_values: (batch, channels, height, width), in [-1, 1].
        region: The pixels to draw, bool (batch, height, width).
        batch: Number of images to draw.

    Returns:
        See `Background`.

    Raises:
        ValueError: If an image to draw has no image or no region, or has several.
    """
    expected = (batch, *pixel_values.shape[-2:])
    if region is None or region.shape != expected or region.dtype != torch.bool or len(pixel_values) != batch:
        found = "missing" if region is None else f"{region.dtype} of shape {tuple(region.shape)}"
        raise ValueError(
            f"background has {len(pixel_values)} images and region is {found}, expected {batch} images and "
            f"torch.bool of shape {expected}: the pixels to draw."
        )
    region = region.to(pixel_values.device)[:, None]
    latents = encode_latents(autoencoder, pixel_values.to(autoencoder.dtype))
    return Background(pixel_values, region, latents, F.adaptive_max_pool2d(region.float(), latents.shape[-2:]).bool())


def edited_region(masks: torch.Tensor, *, threshold: float = 0.1, margin: int = 2) -> torch.Tensor:
    """Return the pixels that an edit may change: all pixels near the mask of the edited slots.

    Args:
        masks: Sum of the masks of the edited slots, (batch, height, width), in [0, 1].
        threshold: Value of the mask at the border of the region.
        margin: Number of pixels by which the region is enlarged on each side.

    Returns:
        bool (batch, height, width).

    Example:
        >>> edited_region(torch.eye(3)[None], margin=0)[0].sum().item()
        3
    """
    region = (masks > threshold).float()
    return F.max_pool2d(region[:, None], 2 * margin + 1, stride=1, padding=margin)[:, 0].bool()


class ChangedSlots(NamedTuple):
    """The slots of one image after an edit.

    Attributes:
        slots: (slots, slot_dim).
        keep: The slots to draw, bool (slots,).
        new: Indices of the slots that come from another image.
    """

    slots: torch.Tensor
    keep: torch.Tensor
    new: list[int]


def change_slots(
    slots: torch.Tensor,
    keep: torch.Tensor,
    others: torch.Tensor,
    *,
    remove: Sequence[int] = (),
    swap: Mapping[int, int] | None = None,
    add: Sequence[int] = (),
) -> ChangedSlots:
    """Remove slots of an image, and replace or add slots by slots of another image.

    Args:
        slots: (slots, slot_dim).
        keep: The slots that the image needs, bool (slots,).
        others: Slots of the other image, (slots, slot_dim), or (0, slot_dim) without another image.
        remove: Slots to leave out.
        swap: Slots of the image as keys; the slots of the other image that replace them as values.
        add: Slots of the other image to add.

    Returns:
        See `ChangedSlots`. If only slots are left that the image does not need, all of them are drawn.

    Raises:
        ValueError: If a slot does not exist, is removed and replaced, or no slot is left.

    Example:
        >>> slots, keep = torch.eye(3), torch.ones(3, dtype=torch.bool)
        >>> change_slots(slots, keep, 5 * slots, remove=[0], swap={2: 1}).slots.tolist()
        [[0.0, 1.0, 0.0], [0.0, 5.0, 0.0]]
    """
    swap, edited, keep = dict(swap or {}), slots.clone(), keep.clone()
    _check_numbers("remove", remove, len(slots))
    _check_numbers("swap", swap, len(slots))
    both = sorted(set(remove) & set(swap))
    if both:
        raise ValueError(f"remove and swap both have slot {both[0]}; either remove a slot or replace it.")
    _check_numbers("swap", swap.values(), len(others), of="other")
    _check_numbers("add", add, len(others), of="other")
    for mine, theirs in swap.items():
        edited[mine], keep[mine] = others[theirs], True
    left = [slot for slot in range(len(slots)) if slot not in set(remove)]
    edited = torch.cat([edited[left], others[list(add)]])
    keep = torch.cat([keep[left], keep.new_ones(len(add))])
    if not len(edited):
        raise ValueError(f"remove has all {len(slots)} slots of the image; leave at least one, or add one.")
    new = [*(left.index(slot) for slot in swap), *range(len(left), len(edited))]
    return ChangedSlots(edited, keep if keep.any() else torch.ones_like(keep), new)


def _check_numbers(name: str, numbers: Iterable[int], count: int, *, of: str = "the image") -> None:
    for number in numbers:
        if not 0 <= number < count:
            raise ValueError(f"{name} has slot {number}, but {of} has slots 0 to {count - 1}.")
