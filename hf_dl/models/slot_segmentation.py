"""Segments from the output of a slot autoencoder: which slots an image needs, and which slot explains each pixel."""

import torch


def mixture_posterior(
    pixel_values: torch.Tensor,
    contents: torch.Tensor,
    masks: torch.Tensor,
    *,
    pixel_std: float,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the probability that a slot explains a pixel, given the color of the pixel.

    The decoder computes its alphas m without looking at the image. Where two slots paint the same color, such as the
    ground around an object, the alphas may favor either slot. The alphas are the prior of a mixture of Gaussians
    around the contents c (Greff et al. 2019, IODINE, section 2.1), so Bayes' rule gives

        p(slot k | pixel x) = m_k N(x; c_k, pixel_std^2) / sum_j m_j N(x; c_j, pixel_std^2)

    Args:
        pixel_values: (batch, channels, height, width).
        contents: The image that each slot paints, (batch, slots, channels, height, width).
        masks: Alphas, (batch, slots, height, width), which sum to 1 over the slots.
        pixel_std: Standard deviation of a pixel, in the units of `pixel_values`.
        keep: Slots that may have pixels, bool (batch, slots), at least one per image. Defaults to all slots.

    Returns:
        float32 (batch, slots, height, width), which sums to 1 over the slots. Slots that are not kept have 0.
    """
    error = (contents.float() - pixel_values.float().unsqueeze(1)).square().sum(dim=2)
    logits = masks.float().clamp_min(1e-12).log() - error / (2 * pixel_std**2)
    if keep is not None:
        logits = logits.masked_fill(~keep[:, :, None, None], float("-inf"))
    return logits.softmax(dim=1)


@torch.no_grad()
def find_needed_slots(
    pixel_values: torch.Tensor, contents: torch.Tensor, masks: torch.Tensor, *, max_error: float
) -> torch.Tensor:
    """Find the slots that an image needs; a spare slot shares the background or an object with another slot.

    Slots are removed one at a time. Each time, the slot is removed whose absence increases the mean squared error of
    the image the least, as long as the increase is at most `max_error`.

    Args:
        pixel_values: (batch, channels, height, width).
        contents: The image that each slot paints, (batch, slots, channels, height, width).
        masks: Alphas, (batch, slots, height, width), which sum to 1 over the slots.
        max_error: Largest increase of the mean squared error per removed slot.

    Returns:
        bool (batch, slots), with at least one slot per image.
    """
    contents, masks, images = contents.float(), masks.float(), pixel_values.float()
    keep = torch.ones(masks.shape[:2], dtype=torch.bool, device=masks.device)

    def errors(rows: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        weights = masks[rows] * keep[:, :, None, None]
        painted = (contents[rows] * weights.unsqueeze(2)).sum(dim=1) / weights.sum(dim=1)[:, None].clamp_min(1e-12)
        return (painted - images[rows]).square().mean(dim=(1, 2, 3))

    rows = torch.arange(len(masks), device=masks.device)  # the images that may have another spare slot
    error = errors(rows, keep)
    for _ in range(masks.shape[1] - 1):
        without = torch.full_like(keep[rows], float("inf"), dtype=torch.float32)
        for slot in range(masks.shape[1]):
            fewer = keep[rows]
            fewer[:, slot] = False
            without[:, slot] = errors(rows, fewer).where(keep[rows, slot], without[:, slot])
        least, slot = without.min(dim=1)
        spare = least <= error + max_error
        rows, slot, error = rows[spare], slot[spare], least[spare]
        keep[rows, slot] = False
        if not len(rows):
            break
    return keep
