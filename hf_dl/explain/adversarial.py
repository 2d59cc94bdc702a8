"""Adversarial examples: small changes of the pixels that change the prediction.

With pixels x in [0, 1], the label y and the cross-entropy L of the network:

- `fgsm` (Goodfellow et al. 2015): x + epsilon * sign(dL/dx)
- `pgd` (Madry et al. 2018): small steps of that kind from a random start, projected to the cube |x' - x| <= epsilon

Results are clipped to [0, 1]. Epsilon and the clipping are in pixels, before the normalization: 8/255 changes each
pixel by at most 8 of its 256 steps. With targets, the loss of the target is lowered instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .backprop import Classes
from .calls import class_logits, evaluating, per_channel, pick_classes, to_model


@dataclass
class AdversarialOutput:
    """Output of `fgsm` and `pgd`.

    Attributes:
        pictures: Changed images in [0, 1], (batch, channels, height, width).
        pixel_values: Changed images, normalized for the model.
        labels: Labels that the attack removes, int64 (batch,).
        before: Predictions for the original images, int64 (batch,).
        after: Predictions for the changed images, int64 (batch,).
        probabilities: Probabilities of the labels before and after, (batch, 2).
        targets: Classes that the attack wants, or None.
    """

    pictures: torch.Tensor
    pixel_values: torch.Tensor
    labels: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    probabilities: torch.Tensor
    targets: torch.Tensor | None

    @property
    def success(self) -> torch.Tensor:
        """Return whether the attack changed a correct prediction (with targets: to the target), bool (batch,)."""
        reached = self.after != self.labels if self.targets is None else self.after == self.targets
        return reached & (self.before == self.labels)

    @property
    def success_rate(self) -> float:
        """Return the fraction of the correctly classified images that the attack changed. NaN without such images."""
        right = (self.before == self.labels).sum().item()
        return self.success.sum().item() / right if right else float("nan")


def _check(epsilon: float, steps: int = 1) -> None:
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon={epsilon} must be from 0 to 1, in units of pixels, for example 8/255.")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")


class _Attack:
    """The images of an attack, their labels, and the sign of the gradient of the loss."""

    def __init__(
        self,
        model: nn.Module,
        pixel_values: torch.Tensor,
        labels: Classes,
        targets: Classes,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
    ):
        images = to_model(model, pixel_values)
        self.model, self.mean, self.std = model, per_channel(image_mean, images), per_channel(image_std, images)
        self.pixels = (images * self.std + self.mean).clamp(0, 1)
        with torch.no_grad():
            self.logits = self.logits_of(self.pixels)
        self.labels = pick_classes(self.logits, labels)
        self.targets = None if targets is None else pick_classes(self.logits, targets)

    def logits_of(self, pixels: torch.Tensor) -> torch.Tensor:
        return class_logits(self.model, (pixels - self.mean) / self.std)

    def direction(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = pixels.detach().requires_grad_()
            logits = self.logits_of(x)
            wanted = self.labels if self.targets is None else self.targets
            loss = F.cross_entropy(logits, wanted, reduction="sum")
            (gradient,) = torch.autograd.grad(loss if self.targets is None else -loss, x)
        return gradient.sign()

    def output(self, pixels: torch.Tensor) -> AdversarialOutput:
        with torch.no_grad():
            after = self.logits_of(pixels)
        chances = [x.float().softmax(dim=1).gather(1, self.labels[:, None])[:, 0] for x in (self.logits, after)]
        return AdversarialOutput(
            pictures=pixels,
            pixel_values=(pixels - self.mean) / self.std,
            labels=self.labels,
            before=self.logits.argmax(dim=1),
            after=after.argmax(dim=1),
            probabilities=torch.stack(chances, dim=1),
            targets=self.targets,
        )


def fgsm(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    labels: Classes = None,
    targets: Classes = None,
    epsilon: float = 8 / 255,
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
) -> AdversarialOutput:
    """Change each pixel by epsilon, in the direction that raises the loss (fast gradient sign method).

    Args:
        model: Classifier.
        pixel_values: Normalized images, (batch, channels, height, width).
        labels: Correct classes. Defaults to the predicted classes.
        targets: Classes to reach. By default, any other class than the label is a success.
        epsilon: Largest change of a pixel in [0, 1].
        image_mean: Mean of the normalization, see `fill_patches`.
        image_std: Standard deviation of the normalization, see `fill_patches`.

    Returns:
        See `AdversarialOutput`.

    Raises:
        ValueError: If a class is unknown, or epsilon is out of range.

    Example:
        ```python
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        >>> images = torch.zeros(2, 3, 2, 2)
        >>> round((fgsm(model, images, epsilon=0.1).pictures - 0.5).abs().max().item(), 4)
        0.1

        ```
    """
    _check(epsilon)
    with evaluating(model):
        attack = _Attack(model, pixel_values, labels, targets, image_mean, image_std)
        return attack.output((attack.pixels + epsilon * attack.direction(attack.pixels)).clamp(0, 1))


def pgd(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    labels: Classes = None,
    targets: Classes = None,
    epsilon: float = 8 / 255,
    steps: int = 10,
    step_size: float | None = None,
    seed: int | None = 0,
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
) -> AdversarialOutput:
    """Repeat small steps that raise the loss, within epsilon of the image (projected gradient descent).

    Args:
        model: Classifier.
        pixel_values: Normalized images, (batch, channels, height, width).
        labels: Correct classes. Defaults to the predicted classes.
        targets: Classes to reach. By default, any other class than the label is a success.
        epsilon: Largest change of a pixel in [0, 1].
        steps: Number of steps.
        step_size: Change of a pixel per step. Defaults to 2.5 * epsilon / steps, as in the paper's code.
        seed: Seed of the random start. None starts at the image.
        image_mean: Mean of the normalization, see `fill_patches`.
        image_std: Standard deviation of the normalization, see `fill_patches`.

    Returns:
        See `AdversarialOutput`.

    Raises:
        ValueError: If a class is unknown, or a number is out of range.
    """
    _check(epsilon, steps)
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    with evaluating(model):
        attack = _Attack(model, pixel_values, labels, targets, image_mean, image_std)
        pixels = attack.pixels
        if seed is not None:
            draw = torch.Generator().manual_seed(seed)
            noise = 2 * torch.rand(pixels.shape[1:], generator=draw).to(pixels) - 1
            pixels = (pixels + epsilon * noise).clamp(0, 1)
        for _ in range(steps):
            moved = pixels + step_size * attack.direction(pixels) - attack.pixels
            pixels = (attack.pixels + moved.clamp(-epsilon, epsilon)).clamp(0, 1)
        return attack.output(pixels)


ATTACKS = {"fgsm": fgsm, "pgd": pgd}
