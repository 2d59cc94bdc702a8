"""Attributions to pixels by backpropagation: the gradient of a class logit, and four ways to clean it.

With the logit y of a class and the image x:

- `gradient`: dy/dx (Simonyan et al. 2013, section 3)
- `deconvolution` (Zeiler & Fergus 2014) and `guided_backprop` (Springenberg et al. 2015): other backward passes of
  ReLU, see backward_rules.py. They reconstruct edges of the image, and depend little on the class (Adebayo et al.
  2018), so compare them with `sanity_check`.
- `integrated_gradients` (Sundararajan et al. 2017): (x - x') times the mean of dy/dx on the line from a baseline x' to
  x. The attributions sum to y(x) - y(x').
- `smooth_grad` (Smilkov et al. 2017): the mean of dy/dx over noisy copies of x

Images are independent of the batch. Gradients of weights are not computed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .backward_rules import BackwardRule
from .calls import class_logits, evaluating, normalize, pick_classes, to_model
from .masking import replacement

Classes = int | Sequence[int] | torch.Tensor | None


@dataclass
class AttributionOutput:
    """Output of the functions of this module.

    Attributes:
        attributions: Signed values for each pixel and channel, (batch, channels, height, width).
        classes: Explained classes, int64 (batch,).
        logits: Logits of the images, (batch, classes).
        error: For integrated gradients, the sum of the attributions minus the difference of the logits, (batch,).
    """

    attributions: torch.Tensor
    classes: torch.Tensor
    logits: torch.Tensor
    error: torch.Tensor | None = None

    @property
    def maps(self) -> torch.Tensor:
        """Return the largest absolute value over the channels, scaled to [0, 1], (batch, height, width)."""
        return normalize(self.attributions.abs().amax(dim=1))


def _logit_gradient(
    model: nn.Module, images: torch.Tensor, classes: Classes
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dy/dx (batch, channels, height, width), the classes and the logits."""
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = class_logits(model, images)
        picked = pick_classes(logits.detach(), classes)
        # images are independent in evaluation mode, so the sum gives the gradient of each image
        (gradient,) = torch.autograd.grad(logits.gather(1, picked[:, None]).sum(), images)
    return gradient, picked, logits.detach()


def gradient(model: nn.Module, pixel_values: torch.Tensor, *, classes: Classes = None) -> AttributionOutput:
    """Compute the gradient of a class logit with respect to the pixels.

    Args:
        model: Classifier.
        pixel_values: Images, (batch, channels, height, width).
        classes: One class for all images or one for each image. Defaults to the predicted classes.

    Returns:
        See `AttributionOutput`.

    Raises:
        ValueError: If a class is unknown.

    Example:
        ```python
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        >>> output = gradient(model, torch.zeros(2, 3, 2, 2), classes=1)
        >>> torch.equal(output.attributions[0].flatten(), model[1].weight[1])
        True

        ```
    """
    with evaluating(model):
        return AttributionOutput(*_logit_gradient(model, to_model(model, pixel_values), classes))


def _by_rule(model: nn.Module, pixel_values: torch.Tensor, classes: Classes, rule: str) -> AttributionOutput:
    mode = BackwardRule(rule)
    with evaluating(model), mode:
        found = _logit_gradient(model, to_model(model, pixel_values), classes)
    if not mode.calls:
        raise ValueError(
            f"model={type(model).__name__} has no ReLU, so method={rule!r} would equal the gradient. Use "
            "method='gradient' or 'integrated_gradients'."
        )
    return AttributionOutput(*found)


def deconvolution(model: nn.Module, pixel_values: torch.Tensor, *, classes: Classes = None) -> AttributionOutput:
    """Project a class logit back to the pixels with a deconvolutional network (Zeiler & Fergus 2014).

    It differs from the gradient at each ReLU: negative gradients become zero, and the input of the ReLU does not
    matter. Max pooling uses the positions of the maxima.

    Args:
        model: Classifier with ReLU.
        pixel_values: Images, (batch, channels, height, width).
        classes: One class for all images or one for each image. Defaults to the predicted classes.

    Returns:
        See `AttributionOutput`.

    Raises:
        ValueError: If the model has no ReLU, or a class is unknown.
    """
    return _by_rule(model, pixel_values, classes, "deconvolution")


def guided_backprop(model: nn.Module, pixel_values: torch.Tensor, *, classes: Classes = None) -> AttributionOutput:
    """Compute the gradient without negative gradients at each ReLU (Springenberg et al. 2015).

    Args:
        model: Classifier with ReLU.
        pixel_values: Images, (batch, channels, height, width).
        classes: One class for all images or one for each image. Defaults to the predicted classes.

    Returns:
        See `AttributionOutput`.

    Raises:
        ValueError: If the model has no ReLU, or a class is unknown.
    """
    return _by_rule(model, pixel_values, classes, "guided_backprop")


def _mean_gradient(
    model: nn.Module,
    points: Iterable[tuple[float, torch.Tensor]],
    classes: torch.Tensor,
    batch_size: int,
) -> torch.Tensor:
    """Return the weighted sum of dy/dx over points, each a weight and a batch of images."""
    total, waiting = 0.0, []

    def add() -> torch.Tensor:
        weights, images = zip(*waiting, strict=True)
        found, _, _ = _logit_gradient(model, torch.cat(images), classes.repeat(len(images)))
        return sum(w * part for w, part in zip(weights, found.chunk(len(images)), strict=True))

    for point in points:
        waiting.append(point)
        if (len(waiting) + 1) * len(classes) > batch_size:
            total = total + add()
            waiting = []
    return total + add() if waiting else total


def integrated_gradients(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    classes: Classes = None,
    baseline: str | torch.Tensor = "black",
    steps: int = 32,
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
    batch_size: int = 32,
) -> AttributionOutput:
    """Integrate the gradient of a class logit from a baseline to the image (Sundararajan et al. 2017).

    The integral uses Gauss-Legendre quadrature, as in captum. If `error` is large, increase `steps`.

    Args:
        model: Classifier.
        pixel_values: Normalized images, (batch, channels, height, width).
        classes: One class for all images or one for each image. Defaults to the predicted classes.
        baseline: Image without information: "black", "gray", "mean" or "blur", see `fill_patches`; or normalized
            images that broadcast to `pixel_values`.
        steps: Number of points on the line.
        image_mean: Mean of the normalization, see `fill_patches`.
        image_std: Standard deviation of the normalization, see `fill_patches`.
        batch_size: Images per forward pass, if it is larger than the batch.

    Returns:
        See `AttributionOutput`. `error` is the deviation from completeness.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    images = to_model(model, pixel_values)
    if isinstance(baseline, str):
        start = replacement(images, baseline, image_mean, image_std, None).expand_as(images)
    else:
        start = baseline.to(images).expand_as(images)
    positions, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]
    points = (
        (weight / 2, start + (position + 1) / 2 * (images - start))
        for position, weight in zip(positions.tolist(), weights.tolist(), strict=True)
    )
    with evaluating(model):
        with torch.no_grad():
            logits, empty = class_logits(model, images), class_logits(model, start)
        picked = pick_classes(logits, classes)
        found = (images - start) * _mean_gradient(model, points, picked, batch_size)
    difference = (logits - empty).gather(1, picked[:, None])[:, 0]
    return AttributionOutput(found, picked, logits, found.flatten(1).sum(dim=1) - difference)


def smooth_grad(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    classes: Classes = None,
    samples: int = 32,
    noise: float = 0.15,
    seed: int = 0,
    batch_size: int = 32,
) -> AttributionOutput:
    """Average the gradient of a class logit over noisy copies of the image (Smilkov et al. 2017).

    Args:
        model: Classifier.
        pixel_values: Images, (batch, channels, height, width).
        classes: One class for all images or one for each image. Defaults to the classes predicted without noise.
        samples: Number of copies.
        noise: Standard deviation of the noise, as a fraction of the range of values of the image.
        seed: Seed of the noise. All images of a batch get the same noise.
        batch_size: Images per forward pass, if it is larger than the batch.

    Returns:
        See `AttributionOutput`.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1.")
    if noise < 0:
        raise ValueError(f"noise={noise} must be at least 0.")
    images = to_model(model, pixel_values)
    draw = torch.Generator().manual_seed(seed)
    sigma = noise * (images.amax(dim=(1, 2, 3)) - images.amin(dim=(1, 2, 3)))[:, None, None, None]
    points = (
        (1 / samples, images + sigma * torch.randn(images.shape[1:], generator=draw).to(images))
        for _ in range(samples)
    )
    with evaluating(model):
        with torch.no_grad():
            logits = class_logits(model, images)
        picked = pick_classes(logits, classes)
        return AttributionOutput(_mean_gradient(model, points, picked, batch_size), picked, logits)
