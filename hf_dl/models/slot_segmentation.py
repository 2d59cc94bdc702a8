"""Segments from the output of a slot autoencoder: which slots an image needs, and which slot explains each pixel."""

import torch
import torch.nn.functional as F


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
def draw_cost(
    pixel_values: torch.Tensor, reconstruction: torch.Tensor, masks: torch.Tensor, *, area_weight: float
) -> torch.Tensor:
    """Rate the slots that one draw of the initial slots led to, in order to keep the best of several draws.

    The cost of an image is its mean squared error + `area_weight` * variance of its pixels * sum of sqrt(area) over
    all masks except the largest. The second term prefers draws in which one slot paints the ground.

    Args:
        pixel_values: (batch, channels, height, width).
        reconstruction: The image that the slots paint, same shape.
        masks: (batch, slots, height, width), which sum to 1 over the slots.
        area_weight: Weight of the areas.

    Returns:
        float32 (batch,), lower is better.
    """
    pixel_values = pixel_values.float()
    error = (reconstruction.float() - pixel_values).square().mean((1, 2, 3))
    roots = masks.float().mean((2, 3)).sqrt()
    variance = pixel_values.var(dim=(2, 3), correction=0).mean(1)
    return error + area_weight * variance * (roots.sum(1) - roots.amax(1))


@torch.no_grad()
def find_needed_slots(
    pixel_values: torch.Tensor,
    contents: torch.Tensor,
    masks: torch.Tensor,
    *,
    max_error: float,
    size: int | None = None,
) -> torch.Tensor:
    """Find the slots that an image needs; a spare slot shares the background or an object with another slot.

    A slot is spare if removing it increases the mean squared error of the image by at most

        max_error * variance * max(1, 4 sqrt(area of its mask))

    with the variance of the pixels around the mean color of the image. Slots are removed one at a time, first the slot
    that is furthest below this limit. A second ground slot has a large area, so it goes even if the masks get less
    sharp. The slot with the largest mask is never removed: where the ground has one color, the other slots could paint
    it as well.

    Args:
        pixel_values: (batch, channels, height, width).
        contents: The image that each slot paints, (batch, slots, channels, height, width).
        masks: Alphas, (batch, slots, height, width), which sum to 1 over the slots.
        max_error: Largest increase of the mean squared error per removed small slot, as a fraction of the variance.
        size: Height and width of the grid on which images are compared. Objects of a few pixels need the default,
            which compares all pixels.

    Returns:
        bool (batch, slots), with at least one slot per image.
    """
    size = min(size or pixel_values.shape[-1], pixel_values.shape[-1])

    def reduce(values: torch.Tensor) -> torch.Tensor:  # (..., height, width) to (..., size, size)
        return F.adaptive_avg_pool2d(values.flatten(0, -3), size).unflatten(0, values.shape[:-2])

    weights = masks.float().unsqueeze(2)
    painted, weights = reduce(contents.float() * weights), reduce(weights)
    images = reduce(pixel_values.float())
    keep = torch.ones(masks.shape[:2], dtype=torch.bool, device=masks.device)
    slots = torch.arange(masks.shape[1], device=masks.device)
    # The constant is a rounding error: all slots but one are spare in an image of a single color.
    limit = max_error * images.var(dim=(2, 3), correction=0).mean(dim=1) + 1e-7  # (batch,)
    error = (painted.sum(1) / weights.sum(1) - images).square().mean((1, 2, 3))
    for _ in range(masks.shape[1] - 1):
        total, weight = painted.sum(dim=1, keepdim=True), weights.sum(dim=1, keepdim=True)
        without = (total - painted) / (weight - weights).clamp_min(1e-6)  # (batch, slots, channels, size, size)
        area = weights.mean((2, 3, 4))
        largest = area.argmax(dim=1, keepdim=True)
        may_go = keep & (slots != largest)
        errors = (without - images[:, None]).square().mean((2, 3, 4)).masked_fill(~may_go, float("inf"))
        excess = errors - limit[:, None] * (16 * area).sqrt().clamp_min(1)
        slot = excess.argmin(dim=1)
        spare = excess.amin(dim=1) <= error
        least = errors.gather(1, slot[:, None]).squeeze(1)
        if not torch.compiler.is_compiling() and not spare.any():
            break
        keep = keep & ~(spare[:, None] & (slots == slot[:, None]))
        error = least.where(spare, error)
        painted, weights = (values * keep[:, :, None, None, None] for values in (painted, weights))
    return keep


def keep_slots(contents: torch.Tensor, masks: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove slots: the remaining slots share their pixels according to their alphas.

    Args:
        contents: The image that each slot paints, (batch, slots, channels, height, width).
        masks: Alphas, (batch, slots, height, width), which sum to 1 over the slots.
        keep: The slots to keep, bool (batch, slots), at least one per image.

    Returns:
        The blended image, (batch, channels, height, width), and the new masks, (batch, slots, height, width).
    """
    masks = (masks + 1e-6) * keep[:, :, None, None]  # a pixel may belong to removed slots alone
    masks = masks / masks.sum(dim=1, keepdim=True)
    return (contents * masks.unsqueeze(2)).sum(dim=1), masks
