"""Detect failed runs of slot attention without labels.

Slot attention fails to find objects in some runs and does not recover. All slots may explain all pixels equally, one
slot may explain the whole image, or the slots may divide all images into the same regions. See Locatello et al. 2020,
section 5, and the issues 567 and 1928 of the official repository.
"""

import torch

from .segmentation import adjusted_rand_index


def slot_binding(masks: torch.Tensor) -> dict[str, float]:
    """Measure whether masks follow the content of the images.

    Args:
        masks: Masks of at least two different images, (batch, slots, height, width), with sum 1 over the slots.

    Returns:
        * `confidence`: mean over pixels of the largest mask. It is 1 / slots if all slots explain a pixel equally, and
          1 if each pixel belongs to one slot.
        * `used_slots`: mean number of slots that own more than 1 % of an image.
        * `sameness`: adjusted Rand index between the segmentations of different images. It is 1 if all images are
          divided in the same way, and about 0 if the segments follow the content.

    Raises:
        ValueError: If there are fewer than two images.

    Example:
        ```python
        >>> masks = torch.eye(2).repeat_interleave(2, dim=1).view(1, 2, 2, 2).expand(3, -1, -1, -1)
        >>> slot_binding(masks)
        {'confidence': 1.0, 'used_slots': 2.0, 'sameness': 1.0}

        ```
    """
    if masks.ndim != 4 or len(masks) < 2:
        raise ValueError(
            f"masks has shape {tuple(masks.shape)}. Expected (batch, slots, height, width) with at least two images."
        )
    owners = masks.argmax(dim=1)
    shares = torch.nn.functional.one_hot(owners, masks.shape[1]).float().mean(dim=(1, 2))
    return {
        "confidence": masks.amax(dim=1).mean().item(),
        "used_slots": (shares > 0.01).sum(dim=1).float().mean().item(),
        "sameness": adjusted_rand_index(owners, owners.roll(1, dims=0)).mean().item(),
    }


ADVICE = (
    "If this happens again, train longer before the check (--binding_step), let the colors count more "
    "(--color_weight 1), lower the learning rate (--learning_rate 1e-3), or use larger images (--image_size) if the "
    "objects are smaller than 4 pixels."
)
"""What to change if slots do not bind, in the flags of scripts/train_slots.py."""


def failure_to_bind(masks: torch.Tensor, *, explained_variance: float) -> str | None:
    """Return why the slots do not follow the objects, so that a failed run can restart early.

    Args:
        masks: Masks of at least two different images, (batch, slots, height, width), with sum 1 over the slots.
        explained_variance: 1 - error / variance of the pixels around the mean image. It is about 0 for a model that
            reconstructs the same background for every image and no objects.

    Returns:
        The reason as a sentence, or None if the slots follow the content of the images.
    """
    signs = slot_binding(masks)
    if explained_variance < 0.1:
        return f"the reconstruction explains {explained_variance:.0%} of the variance between images."
    if signs["used_slots"] < 1.5:
        return f"{signs['used_slots']:.1f} of {masks.shape[1]} slots are in use."
    if signs["sameness"] > 0.3:
        return (
            f"the slots divide all images in the same way (adjusted Rand index {signs['sameness']:.2f} between two)."
        )
    if signs["confidence"] < 1.5 / masks.shape[1]:
        return f"no slot owns its pixels (mean largest mask {signs['confidence']:.2f} of {masks.shape[1]} slots)."
    return None
