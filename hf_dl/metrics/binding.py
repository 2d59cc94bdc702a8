"""Do the slots bind? Signs of the known failures of slot attention that need no labels.

Slot attention fails to find objects in some runs and does not recover: every slot explains every pixel alike, one
slot takes the image, or the slots cut the image into regions that are the same whatever it shows (Locatello et al.
2020, section 5; the official repository's issues 567 and 1928).
"""

import torch

from .segmentation import adjusted_rand_index


def slot_binding(masks: torch.Tensor) -> dict[str, float]:
    """Measure whether masks follow the content of the images.

    Args:
        masks: Of at least two different images, (batch, slots, height, width), summing to 1 over the slots.

    Returns:
        `confidence`, the mean over pixels of the largest mask: 1 / slots where no slot owns anything, 1 where each
        pixel has an owner. `used_slots`, the mean number of slots that own more than 1 % of an image. And
        `sameness`, the adjusted Rand index between the segmentations of different images: 1 where all images are cut
        the same way, about 0 where the cut follows the content.

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
            f"masks has shape {tuple(masks.shape)}, expected (batch, slots, height, width) with a batch of two or "
            "more."
        )
    owners = masks.argmax(dim=1)
    shares = torch.nn.functional.one_hot(owners, masks.shape[1]).float().mean(dim=(1, 2))
    return {
        "confidence": masks.amax(dim=1).mean().item(),
        "used_slots": (shares > 0.01).sum(dim=1).float().mean().item(),
        "sameness": adjusted_rand_index(owners, owners.roll(1, dims=0)).mean().item(),
    }


def failure_to_bind(masks: torch.Tensor, *, explained_variance: float) -> str | None:
    """Say whether and why slots have not bound; for a run that can start over early instead of ending as a failure.

    Args:
        masks: Of at least two different images, (batch, slots, height, width), summing to 1 over the slots.
        explained_variance: 1 - error / variance of the pixels around the mean image; a model that paints the same
            background for every image and no object has about 0.

    Returns:
        A sentence, or None where the slots follow the content of the images.
    """
    signs = slot_binding(masks)
    if explained_variance < 0.1:
        return f"the reconstruction explains {explained_variance:.0%} of the variance between images."
    if signs["used_slots"] < 1.5:
        return f"{signs['used_slots']:.1f} of {masks.shape[1]} slots are in use."
    if signs["sameness"] > 0.3:
        return f"the slots cut every image the same way (adjusted Rand index {signs['sameness']:.2f} between images)."
    if signs["confidence"] < 1.5 / masks.shape[1]:
        return f"no slot owns its pixels (mean largest mask {signs['confidence']:.2f} of {masks.shape[1]} slots)."
    return None
