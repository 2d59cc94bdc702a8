"""Loss terms of slot autoencoders besides the reconstruction error. They need no labels.

Each term is a function of the model's output, so that a training script shows all terms of its loss.
"""

import torch
import torch.nn.functional as F

from .slot_frames import token_side


def color_error(attention: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """Compute how badly the attention alone explains the colors of the image.

    Let t_i be the mean color of the image in the cell of token i, and a_ki the attention of slot k. The mean color c_k
    of slot k is weighted with its attention. The error is the mean of (t_i - sum_k a_ki c_k)^2.

    Slots that divide every image into the same regions cannot lower this error, but slots that follow the objects can.
    Early in training, the term makes slots bind to objects. Later it has to fade: an object may have several colors.

    Args:
        attention: (batch, slots, tokens), which sums to 1 over the slots.
        pixel_values: (batch, channels, height, width).

    Returns:
        A scalar, averaged over images, tokens and channels.

    Example:
        ```python
        >>> image = torch.cat([torch.ones(1, 3, 4, 2), -torch.ones(1, 3, 4, 2)], dim=3)
        >>> by_color = torch.tensor([[[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]])
        >>> by_row = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]])
        >>> color_error(by_color, image), color_error(by_row, image)
        (tensor(0.), tensor(1.))

        ```
    """
    side = token_side(attention.shape[-1])
    colors = F.adaptive_avg_pool2d(pixel_values, side).flatten(2).transpose(1, 2)  # t, (batch, tokens, channels)
    weights = attention / attention.sum(dim=-1, keepdim=True).clamp_min(1e-8)
    explained = attention.transpose(1, 2) @ (weights @ colors)
    return (colors - explained).square().mean()


def area_penalty(masks: torch.Tensor) -> torch.Tensor:
    """Compute the sum over all masks except the largest of the square root of their area.

    Several slots can paint the ground, or an object, as well as one slot. The square root makes one slot cheaper than
    two, and the penalty gives shadows and spare slots to the largest mask, which is usually the ground.

    Args:
        masks: (batch, slots, height, width), which sum to 1 over the slots.

    Returns:
        A scalar, averaged over images.

    Example:
        ```python
        >>> masks = torch.tensor([0.5, 0.25, 0.25, 0.0]).view(1, 4, 1, 1)
        >>> round(area_penalty(masks).item(), 2)
        1.01

        ```
    """
    areas = masks.mean(dim=(2, 3))  # (batch, slots)
    roots = (areas + 1e-4).sqrt()  # the gradient stays finite for empty masks
    return (roots.sum(dim=1) - roots.amax(dim=1)).mean()


def matching_error(attention: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy between the attention and the decoder's masks, which are its constant targets.

    The decoder sees each slot on its own and finds where an object ends. The attention learns this from its masks, as
    in SPOT (Kakogeorgiou et al. 2024). Where p is the largest mask, a pixel has the weight max(0, 2 p - 1). Pixels
    that several slots share, such as the ground early in training, would teach the slots to share their tokens.

    Args:
        attention: (batch, slots, tokens), which sums to 1 over the slots.
        masks: (batch, slots, height, width), which sum to 1 over the slots. No gradient flows to them.

    Returns:
        A scalar, averaged over images and tokens.
    """
    side = token_side(attention.shape[-1])
    masks = masks.detach()
    confidence = (2 * masks.amax(dim=1, keepdim=True) - 1).clamp_min(0)
    targets = F.adaptive_avg_pool2d(masks * confidence, side).flatten(2)  # (batch, slots, tokens)
    return -(targets * (attention + 1e-8).log()).sum(dim=1).mean()


def mixture_error(
    pixel_values: torch.Tensor, contents: torch.Tensor, masks: torch.Tensor, *, pixel_std: float
) -> torch.Tensor:
    """Compute the error of a mixture: each pixel comes from one slot, drawn with the probabilities of the masks.

    Let e_k be the squared error of slot k at a pixel, m_k its mask, C the number of channels and s the standard
    deviation. The error of the pixel is -(2 s^2 / C) log sum_k m_k exp(-e_k / 2 s^2). It is the negative
    log-likelihood of a mixture of Gaussians (Greff et al. 2019, section 2.1) in units of the squared error. For a
    single slot it is the mean squared error. A blend of two wrong colors does not help, so the masks become sharp.

    Args:
        pixel_values: (batch, channels, height, width).
        contents: The image that each slot paints, (batch, slots, channels, height, width).
        masks: (batch, slots, height, width), which sum to 1 over the slots.
        pixel_std: s, in the units of `pixel_values`.

    Returns:
        A scalar, averaged over images and pixels.
    """
    errors = (contents - pixel_values.unsqueeze(1)).square().sum(dim=2)  # e_k, (batch, slots, height, width)
    scale = 2 * pixel_std**2
    likelihood = (masks.clamp_min(1e-8).log() - errors / scale).logsumexp(dim=1)
    return -scale / pixel_values.shape[1] * likelihood.mean()
