"""Images made by gradients: the image of a class, the image of a neuron, and the inversion of a layer.

All functions optimize pixels in [0, 1], in a batch of independent images:

- `class_model` (Simonyan et al. 2013): ascend S_c(x) - decay * |x - 0.5|^2 - tv * TV(x), with the logit S_c. The
  probability would also rise if the logits of other classes fall.
- `activation_maximization` (Erhan et al. 2009): the same for a channel of a layer, or one position of it
- `feature_inversion` (Mahendran & Vedaldi 2015): descend
  |F(x) - F(x0)|^2 / |F(x0)|^2 + alpha * |x - 0.5|_6^6 + tv * TV(x), with the features F and the image x0

|x|_p^p and TV are means over the pixels, so the weights do not depend on the size. TV is the sum of the squared
differences of neighbors (beta = 2). Jitter moves the image by a random shift in each step, and blur removes high
frequencies every few steps (Yosinski et al. 2015).

Differences from the papers: `Ascent` divides the gradient by its root mean square, so all steps have the same length.
Inversion uses Adam instead of momentum.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.transforms.v2.functional import gaussian_blur

from .backprop import Classes
from .calls import class_logits, default_layers, evaluating, per_channel, pick_classes, to_model
from .layer_reader import LayerReader, check_channels

Score = Callable[[torch.Tensor], torch.Tensor]  # normalized images (batch, ...) -> values (batch,)


@dataclass
class OptimizedOutput:
    """Output of the functions of this module.

    Attributes:
        pictures: Images in [0, 1], (batch, channels, height, width).
        scores: Logits or activations of the pictures; for inversion, their relative squared error; (batch,).
        history: The same values before each step, (steps, batch).
        target: Classes or channels, int64 (batch,), or None for inversion.
    """

    pictures: torch.Tensor
    scores: torch.Tensor
    history: torch.Tensor
    target: torch.Tensor | None = None


def total_variation(pictures: torch.Tensor) -> torch.Tensor:
    """Return the sum of squared differences of neighboring pixels, divided by the number of values, (batch,).

    Example:
        ```python
        >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]])).item()
        3.5

        ```
    """
    vertical = (pictures[:, :, 1:] - pictures[:, :, :-1]).square().sum(dim=(1, 2, 3))
    horizontal = (pictures[:, :, :, 1:] - pictures[:, :, :, :-1]).square().sum(dim=(1, 2, 3))
    return (vertical + horizontal) / pictures[0].numel()


@dataclass(frozen=True)
class Ascent:
    """How to climb: the options of `class_model` and `activation_maximization`.

    Args:
        steps: Number of steps.
        learning_rate: Length of a step, the root mean square of the change of the pixels.
        decay: Weight of the mean of (x - 0.5)^2.
        tv: Weight of the total variation.
        jitter: Largest shift of the image in pixels, in both directions.
        blur: Standard deviation of the blur in pixels. 0 does not blur.
        blur_every: Number of steps between blurs.
        seed: Seed of the start and of the shifts.

    Raises:
        ValueError: If an argument is out of range.
    """

    steps: int = 150
    learning_rate: float = 0.03
    decay: float = 1.0
    tv: float = 500.0
    jitter: int = 2
    blur: float = 0.5
    blur_every: int = 4
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "blur_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be greater than 0.")
        for name in ("decay", "tv", "jitter", "blur"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")

    def start(self, like: torch.Tensor) -> torch.Tensor:
        """Return gray images with little noise, of the shape of `like`."""
        draw = torch.Generator().manual_seed(self.seed)
        return (0.5 + 0.01 * torch.randn(like.shape[1:], generator=draw)).expand(like.shape).to(like)

    def climb(
        self,
        score: Score,
        pictures: torch.Tensor,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the pictures (batch, channels, height, width) after each step, and their scores before it (batch,).

        A page can show the pictures as they appear, and stop at any time.

        Args:
            score: Function of normalized images to maximize.
            pictures: Start in [0, 1].
            image_mean: Mean of the normalization, see `fill_patches`.
            image_std: Standard deviation of the normalization, see `fill_patches`.
        """
        draw = torch.Generator().manual_seed(self.seed + 1)
        mean, std = per_channel(image_mean, pictures), per_channel(image_std, pictures)
        for step in range(self.steps):
            shift = tuple((torch.randint(2 * self.jitter + 1, (2,), generator=draw) - self.jitter).tolist())
            with torch.inference_mode(False), torch.enable_grad():
                x = pictures.detach().requires_grad_()
                values = score((x.roll(shift, dims=(2, 3)) - mean) / std)
                penalty = self.decay * (x - 0.5).square().mean(dim=(1, 2, 3)) + self.tv * total_variation(x)
                (gradient,) = torch.autograd.grad((values - penalty).sum(), x)
            length = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1e-30)
            pictures = (x.detach() + self.learning_rate * gradient / length).clamp(0, 1)
            if self.blur and (step + 1) % self.blur_every == 0:
                pictures = blur(pictures, self.blur)
            yield pictures, values.detach()


def blur(pictures: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur pictures with a Gaussian that reaches three standard deviations."""
    reach = [min(max(round(3 * sigma), 1), side - 1) for side in (pictures.shape[-1], pictures.shape[-2])]
    return gaussian_blur(pictures, [2 * r + 1 for r in reach], [sigma, sigma])


def _run(
    score: Score,
    images: torch.Tensor,
    ascent: Ascent,
    target: torch.Tensor,
    image_mean: float | Sequence[float],
    image_std: float | Sequence[float],
) -> OptimizedOutput:
    history, pictures = [], None
    for pictures, values in ascent.climb(score, ascent.start(images), image_mean, image_std):  # noqa: B007
        history.append(values)
    with torch.no_grad():
        mean, std = per_channel(image_mean, pictures), per_channel(image_std, pictures)
        scores = score((pictures - mean) / std)
    return OptimizedOutput(pictures, scores, torch.stack(history), target)


def class_score(model: nn.Module, classes: torch.Tensor) -> Score:
    """Return the function that computes one class logit per image, for `Ascent.climb`."""
    return lambda x: class_logits(model, x).gather(1, classes[:, None])[:, 0]


def class_model(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    classes: Classes = None,
    ascent: Ascent | None = None,
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
) -> OptimizedOutput:
    """Make an image with a large class logit (Simonyan et al. 2013, section 2).

    Args:
        model: Classifier.
        pixel_values: Images, (batch, channels, height, width). They give the size, and the default classes.
        classes: One class for each picture, or one for all. Defaults to the predicted classes of the images.
        ascent: Options of the optimization. Defaults to `Ascent()`.
        image_mean: Mean of the normalization, see `fill_patches`.
        image_std: Standard deviation of the normalization, see `fill_patches`.

    Returns:
        See `OptimizedOutput`.

    Raises:
        ValueError: If a class is unknown.

    Example:
        ```python
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
        >>> ascent = Ascent(steps=20, tv=0, jitter=0)
        >>> output = class_model(model, torch.zeros(1, 3, 4, 4), classes=2, ascent=ascent)
        >>> bool(output.scores > output.history[0]), output.pictures.shape
        (True, torch.Size([1, 3, 4, 4]))

        ```
    """
    images = to_model(model, pixel_values)
    with evaluating(model):
        with torch.no_grad():
            picked = pick_classes(class_logits(model, images), classes)
        return _run(class_score(model, picked), images, ascent or Ascent(), picked, image_mean, image_std)


def activation_maximization(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    channels: int | Sequence[int],
    layer: str | nn.Module | None = None,
    position: tuple[int, int] | None = None,
    ascent: Ascent | None = None,
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
) -> OptimizedOutput:
    """Make images that activate channels or neurons of a layer.

    Args:
        model: Classifier.
        pixel_values: Image, (1, channels, height, width), which gives the size.
        channels: One or several channels; one picture per channel.
        layer: Name or module. Defaults to the last feature map.
        position: Row and column of the neuron. Defaults to the sum of the channel over all positions. A mean would be
            too small for the penalties of `Ascent`, which suit class logits.
        ascent: Options of the optimization. Defaults to `Ascent()`.
        image_mean: Mean of the normalization, see `fill_patches`.
        image_std: Standard deviation of the normalization, see `fill_patches`.

    Returns:
        See `OptimizedOutput`.

    Raises:
        ValueError: If the layer, a channel or the position is unknown.
    """
    images = to_model(model, pixel_values)[:1]
    with evaluating(model):
        reader = LayerReader(model, images, default_layers(model, images)[0] if layer is None else layer)
        with torch.no_grad():
            shape = reader.as_map(images).shape
        channels = torch.tensor(check_channels(channels, shape[1], reader.name), device=images.device)
        if position is not None and not all(0 <= at < side for at, side in zip(position, shape[2:], strict=True)):
            raise ValueError(
                f"position={position} of layer={reader.name!r} is invalid. Expected a row and a column of the "
                f"{shape[2]}x{shape[3]} feature map."
            )

        def score(x: torch.Tensor) -> torch.Tensor:
            output = reader.as_map(x)[torch.arange(len(x)), channels]
            return output.sum(dim=(1, 2)) if position is None else output[:, position[0], position[1]]

        images = images.expand(len(channels), *images.shape[1:])
        return _run(score, images, ascent or Ascent(), channels, image_mean, image_std)


def feature_inversion(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    layer: str | nn.Module | None = None,
    steps: int = 200,
    learning_rate: float = 0.05,
    alpha: float = 1.0,
    tv: float = 3.0,
    seed: int = 0,
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
) -> OptimizedOutput:
    """Make images with the features of other images in a layer (Mahendran & Vedaldi 2015).

    Args:
        model: Classifier.
        pixel_values: Normalized images, (batch, channels, height, width).
        layer: Name or module. Defaults to the last feature map.
        steps: Number of steps.
        learning_rate: Learning rate of Adam in the first step. It decreases linearly.
        alpha: Weight of the mean of (x - 0.5)^6.
        tv: Weight of the total variation.
        seed: Seed of the start.
        image_mean: Mean of the normalization, see `fill_patches`.
        image_std: Standard deviation of the normalization, see `fill_patches`.

    Returns:
        See `OptimizedOutput`. The scores are relative squared errors of the features.

    Raises:
        ValueError: If the layer is unknown, or a number is out of range.
    """
    checked = Ascent(steps=steps, learning_rate=learning_rate, decay=alpha, tv=tv, seed=seed)
    images = to_model(model, pixel_values)
    mean, std = per_channel(image_mean, images), per_channel(image_std, images)
    with evaluating(model), torch.inference_mode(False):
        reader = LayerReader(model, images, default_layers(model, images)[0] if layer is None else layer)
        with torch.no_grad():
            wanted = reader(images).flatten(1)
            scale = wanted.square().sum(dim=1).clamp_min(1e-30)

        def error(x: torch.Tensor) -> torch.Tensor:
            return (reader((x - mean) / std).flatten(1) - wanted).square().sum(dim=1) / scale

        x, history = checked.start(images).clone().requires_grad_(), []
        optimizer = torch.optim.Adam([x], lr=learning_rate)
        for step in range(steps):
            with torch.enable_grad():
                values = error(x)
                loss = values + alpha * (x - 0.5).pow(6).mean(dim=(1, 2, 3)) + tv * total_variation(x)
                (x.grad,) = torch.autograd.grad(loss.sum(), x)
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            optimizer.step()
            with torch.no_grad():
                x.clamp_(0, 1)
            history.append(values.detach())
        with torch.no_grad():
            return OptimizedOutput(x.detach(), error(x), torch.stack(history))
