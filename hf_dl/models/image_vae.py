"""Variational autoencoders of images: a multilayer perceptron and a small convolutional network.

Kingma & Welling 2014, "Auto-Encoding Variational Bayes". The encoder computes mean and log-variance of a Gaussian
posterior q(z|x). A code z is drawn from it by reparameterization, and the decoder computes the distribution of the
pixels p(x|z). The loss is the negative evidence lower bound (ELBO): the reconstruction term -log p(x|z) plus the
divergence KL(q(z|x) || N(0, I)). Both are summed over the pixels or latents of an image and averaged over the batch,
so the unit is nats per image.

There are two likelihoods for pixels in [0, 1]:

- "bernoulli": -log p(x|z) is the binary cross-entropy (BCE). For gray pixels, this is the expected value over images
  that are made black and white at random: each pixel is white with the probability of its gray value.
- "gaussian": -log p(x|z) is the summed squared error (SSE) / (2 pixel_std^2), plus a constant. The loss leaves the
  constant out; `log_likelihood` includes it. The default pixel_std^2 = 1/2 makes the loss SSE + KL; pixel_std = 1
  makes it SSE/2 + KL.

Differences from the paper: `architecture="conv"`, the weight `beta` of the KL (Higgins et al. 2017), and a decoder
whose Gaussian mean is a sigmoid, so that reconstructions are images under both likelihoods.

To add an architecture, a likelihood or a path between codes, add it to `ARCHITECTURES`, `LIKELIHOODS` or
`INTERPOLATIONS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.image_utils import ImageInput, PILImageResampling
from transformers.processing_utils import ImagesKwargs
from transformers.utils import ModelOutput, can_return_tuple

from .image_input import RgbImageProcessor
from .layers_precision import reference_parameter


@strict
class ImageVaeConfig(PreTrainedConfig):
    """Configuration of an `ImageVaeModel`.

    Args:
        architecture: A key of `ARCHITECTURES`: "mlp" or "conv".
        image_size: Height and width of the images in pixels. For "conv", divisible by 2 once per entry of `widths`.
        num_channels: Channels of the images, 1 (gray) or 3 (RGB).
        latent_size: Length of a code.
        likelihood: A key of `LIKELIHOODS`: "bernoulli" or "gaussian".
        pixel_std: Standard deviation of a pixel under the Gaussian likelihood.
        beta: Weight of the KL in the loss; with 1, the loss is the negative ELBO.
        hidden_sizes: For "mlp": hidden units of the encoder's layers. The decoder has them in reverse order.
        widths: For "conv": channels of the encoder's grids, each half as fine as the previous one. The decoder has
            them in reverse order.
        num_blocks: For "conv": residual blocks on the coarsest grid, in the encoder and in the decoder.
        hidden_size: For "conv": units of the dense layer between the coarsest grid and the code.

    Example:
        ```python
        >>> ImageVaeConfig(architecture="mlp", image_size=28).num_pixels
        784

        ```
    """

    model_type = "image_vae"

    architecture: str = "conv"
    image_size: int = 28
    num_channels: int = 1
    latent_size: int = 20
    likelihood: str = "bernoulli"
    pixel_std: float = 0.5**0.5
    beta: float = 1.0
    hidden_sizes: list[int] | tuple[int, ...] = (400,)
    widths: list[int] | tuple[int, ...] = (32, 64)
    num_blocks: int = 1
    hidden_size: int = 256

    def __post_init__(self, **kwargs):
        """Convert tuples to lists as JSON does, so that a saved and loaded config equals the original."""
        self.hidden_sizes, self.widths = list(self.hidden_sizes), list(self.widths)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is out of range or unknown, or if fields do not fit together.
        """
        for name, known in (("architecture", ARCHITECTURES), ("likelihood", LIKELIHOODS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")
        for name in ("image_size", "latent_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels={self.num_channels} must be 1 (gray) or 3 (RGB).")
        if self.num_blocks < 0:
            raise ValueError(f"num_blocks={self.num_blocks} must be at least 0.")
        for name in ("hidden_sizes", "widths"):
            sizes = getattr(self, name)
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{name}={sizes} must be one or more numbers, each at least 1.")
        if not (self.pixel_std > 0 and math.isfinite(self.pixel_std)):
            raise ValueError(f"pixel_std={self.pixel_std} must be above 0.")
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta={self.beta} must be at least 0.")
        ARCHITECTURES[self.architecture].check_config(self)

    @property
    def num_pixels(self) -> int:
        """Number of values of an image: channels times height times width."""
        return self.num_channels * self.image_size**2


@dataclass
class ImageVaeOutput(ModelOutput):
    """Output of `ImageVaeModel`.

    Args:
        loss: Mean over the batch of `reconstruction_loss` + beta * `kl`, a scalar.
        reconstruction_loss: -log p(x|z) per image in nats, without the constant of the Gaussian, (batch,).
        kl: KL(q(z|x) || N(0, I)) per image in nats, (batch,).
        reconstruction: Means of the pixels in [0, 1], (batch, channels, height, width).
        logits: `reconstruction` before the sigmoid.
        latents: The decoded codes, (batch, latent_size).
        posterior_mean: Mean of q(z|x), (batch, latent_size).
        posterior_log_variance: Log-variance of q(z|x), (batch, latent_size).
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    posterior_mean: torch.Tensor | None = None
    posterior_log_variance: torch.Tensor | None = None


class ImageVaeProcessorKwargs(ImagesKwargs, total=False):
    """Arguments of `ImageVaeProcessor` in addition to the arguments of every image processor."""

    do_grayscale: bool


class ImageVaeProcessor(RgbImageProcessor):
    """Resize images to a square and scale them to [0, 1]; convert them to gray if `do_grayscale` is set."""

    valid_kwargs = ImageVaeProcessorKwargs
    resample = PILImageResampling.BILINEAR
    size = {"height": 28, "width": 28}
    do_convert_rgb = True
    do_grayscale = True
    do_resize = True
    do_rescale = True
    do_normalize = False

    def process_image(self, image: ImageInput, do_grayscale: bool | None = None, **kwargs: Any) -> torch.Tensor:
        """Convert an image to a tensor (channels, height, width); gray is the ITU-R 601 luma, as in Pillow."""
        image = super().process_image(image, **kwargs)
        if not do_grayscale or len(image) == 1:
            return image
        if image.shape[0] != 3:
            raise ValueError(f"An image has {image.shape[0]} channels. Expected 1 or 3; convert it to RGB.")
        luma = torch.tensor([19595, 38470, 7471], device=image.device).view(3, 1, 1)  # weights sum to 2^16
        if image.is_floating_point():
            return (image * luma / 2**16).sum(dim=0, keepdim=True)
        return ((image.int() * luma).sum(dim=0, keepdim=True) + 2**15 >> 16).to(image.dtype)


def gaussian_kl(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Compute KL(N(mean, exp(log_variance)) || N(0, 1)) per element, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class ResidualBlock(nn.Module):
    """Compute x + conv(relu(conv(relu(x)))) with 3x3 convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, width, height, width) to the same shape."""
        return x + self.second(F.relu(self.first(F.relu(x))))


def _mlp(sizes: list[int]) -> list[nn.Module]:
    """Build linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return layers[:-1]


class MlpNetworks:
    """Multilayer perceptrons with `hidden_sizes` units, as in Kingma & Welling 2014."""

    @staticmethod
    def check_config(config: ImageVaeConfig) -> None:
        """Accept every config."""

    @staticmethod
    def encoder(config: ImageVaeConfig) -> nn.Sequential:
        """Map images (batch, channels, height, width) to mean and log-variance, (batch, 2 * latent_size)."""
        return nn.Sequential(nn.Flatten(), *_mlp([config.num_pixels, *config.hidden_sizes, 2 * config.latent_size]))

    @staticmethod
    def decoder(config: ImageVaeConfig) -> nn.Sequential:
        """Map codes (batch, latent_size) to the logits of the pixels, (batch, channels, height, width)."""
        shape = (config.num_channels, config.image_size, config.image_size)
        layers = _mlp([config.latent_size, *reversed(config.hidden_sizes), config.num_pixels])
        return nn.Sequential(*layers, nn.Unflatten(1, shape))


class ConvNetworks:
    """Convolutions of stride 2 with `widths` channels, residual blocks on the coarsest grid, and a dense layer."""

    @staticmethod
    def check_config(config: ImageVaeConfig) -> None:
        """Raise ValueError if `image_size` cannot be halved once per entry of `widths`."""
        if config.image_size % 2 ** len(config.widths):
            raise ValueError(
                f"image_size={config.image_size} must be a multiple of {2 ** len(config.widths)}: it is halved for "
                f"each of widths={config.widths}."
            )

    @staticmethod
    def encoder(config: ImageVaeConfig) -> nn.Sequential:
        """Map images (batch, channels, height, width) to mean and log-variance, (batch, 2 * latent_size)."""
        layers, channels = [], config.num_channels
        for width in config.widths:
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.ReLU()]
            channels = width
        # A residual block starts with its own ReLU.
        layers[-1:] = [ResidualBlock(channels) for _ in range(config.num_blocks)]
        side = config.image_size // 2 ** len(config.widths)
        dense = _mlp([channels * side**2, config.hidden_size, 2 * config.latent_size])
        return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), *dense)

    @staticmethod
    def decoder(config: ImageVaeConfig) -> nn.Sequential:
        """Map codes (batch, latent_size) to the logits of the pixels, (batch, channels, height, width)."""
        channels, side = config.widths[-1], config.image_size // 2 ** len(config.widths)
        layers = _mlp([config.latent_size, config.hidden_size, channels * side**2])
        layers.append(nn.Unflatten(1, (channels, side, side)))
        layers += [ResidualBlock(channels) for _ in range(config.num_blocks)]
        for width in [*reversed(config.widths[:-1]), config.num_channels]:
            layers += [nn.ReLU(), nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1)]
            channels = width
        return nn.Sequential(*layers)


ARCHITECTURES: dict[str, type[MlpNetworks] | type[ConvNetworks]] = {"mlp": MlpNetworks, "conv": ConvNetworks}
"""Encoder and decoder by the name of the architecture."""


class BernoulliLikelihood:
    """Each pixel is white with the probability of its gray value."""

    @staticmethod
    def loss(logits: torch.Tensor, pixel_values: torch.Tensor, config: ImageVaeConfig) -> torch.Tensor:
        """Compute -log p(x|z) per pixel: the binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(logits, pixel_values, reduction="none")

    @staticmethod
    def constant(config: ImageVaeConfig) -> float:
        """Return the part of -log p(x|z) of an image that `loss` leaves out."""
        return 0.0


class GaussianLikelihood:
    """Each pixel is normally distributed around its mean, with standard deviation `pixel_std`."""

    @staticmethod
    def loss(logits: torch.Tensor, pixel_values: torch.Tensor, config: ImageVaeConfig) -> torch.Tensor:
        """Compute -log p(x|z) per pixel without its constant: the scaled squared error."""
        return (logits.sigmoid() - pixel_values).square() / (2 * config.pixel_std**2)

    @staticmethod
    def constant(config: ImageVaeConfig) -> float:
        """Return the part of -log p(x|z) of an image that `loss` leaves out."""
        return config.num_pixels * 0.5 * math.log(2 * math.pi * config.pixel_std**2)


LIKELIHOODS: dict[str, type[BernoulliLikelihood] | type[GaussianLikelihood]] = {
    "bernoulli": BernoulliLikelihood,
    "gaussian": GaussianLikelihood,
}
"""The likelihoods p(x|z) by name."""


def linear_path(start: torch.Tensor, end: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Interpolate along the line from `start` to `end`, for t in [0, 1]."""
    return start + t * (end - start)


def spherical_path(start: torch.Tensor, end: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Interpolate along the great circle from `start` to `end` (White 2016), for t in [0, 1]."""
    angle = F.cosine_similarity(start, end, dim=-1).clamp(-1, 1).acos().unsqueeze(-1)
    sine = angle.sin()
    arc = (((1 - t) * angle).sin() * start + (t * angle).sin() * end) / sine
    return torch.where(sine > 1e-4, arc, linear_path(start, end, t))  # parallel codes define no great circle


INTERPOLATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": linear_path,
    "spherical": spherical_path,
}
"""Paths between codes by name."""


class ImageVaePreTrainedModel(PreTrainedModel):
    """Weight initialization and loading."""

    config: ImageVaeConfig
    base_model_prefix = "image_vae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):  # torch's default, as in the reference
            init.kaiming_uniform_(module.weight, a=5**0.5)
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.bias, -bound, bound)


class ImageVaeModel(ImageVaePreTrainedModel):
    """A variational autoencoder of images.

    The code of an image is drawn from its posterior in training, and in evaluation if a `generator` is given. In
    evaluation without a generator, the code is the mean of the posterior. Results are then repeatable, but the loss
    does not estimate the ELBO.

    Example:
        ```python
        >>> model = ImageVaeModel(ImageVaeConfig(architecture="mlp")).eval()
        >>> model(torch.rand(2, 1, 28, 28)).kl.shape, model.sample(3).shape
        (torch.Size([2]), torch.Size([3, 1, 28, 28]))

        ```
    """

    def __init__(self, config: ImageVaeConfig):
        super().__init__(config)
        networks = ARCHITECTURES[config.architecture]
        self.encoder = networks.encoder(config)
        self.decoder = networks.decoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> ImageVaeOutput:
        """Encode images, draw their codes, and decode them.

        Args:
            pixel_values: (batch, channels, image_size, image_size), in [0, 1].
            generator: Source of the noise of the codes, on the model's device.
            return_loss: Whether to compute the loss. It needs no labels, so that `Trainer` also evaluates it.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            See `ImageVaeOutput`.

        Raises:
            ValueError: If the images have the wrong shape or range.
        """
        mean, log_variance = self.encode(pixel_values)
        latents = mean
        if self.training or generator is not None:
            latents = self.draw(mean, log_variance, generator=generator)
        logits = self._decode(latents)
        reconstruction_loss = self._reconstruction_loss(pixel_values, logits)
        kl = gaussian_kl(mean, log_variance).sum(dim=1)
        return ImageVaeOutput(
            loss=(reconstruction_loss + self.config.beta * kl).mean() if return_loss else None,
            reconstruction_loss=reconstruction_loss,
            kl=kl,
            reconstruction=logits.sigmoid(),
            logits=logits,
            latents=latents,
            posterior_mean=mean,
            posterior_log_variance=log_variance,
        )

    def encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the posterior of images.

        Args:
            pixel_values: (batch, channels, image_size, image_size), in [0, 1].

        Returns:
            Mean and log-variance of q(z|x), each (batch, latent_size), in float32.

        Raises:
            ValueError: If the images have the wrong shape or range.
        """
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, "
                f"{', '.join(map(str, expected))}); prepare images with the model's ImageVaeProcessor."
            )
        # Reading the values makes a GPU wait, so training skips the check.
        looks = not torch.compiler.is_compiling() and (pixel_values.device.type == "cpu" or not self.training)
        if looks and pixel_values.numel():
            low, high = (value.item() for value in pixel_values.aminmax())
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"pixel_values has values from {low:g} to {high:g}, expected [0, 1]; prepare images with the "
                    "model's ImageVaeProcessor."
                )
        mean, log_variance = self.encoder(pixel_values).float().chunk(2, dim=1)
        return mean, log_variance

    @staticmethod
    def draw(
        mean: torch.Tensor, log_variance: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Draw codes by reparameterization, mean + std * noise, so that gradients reach mean and log-variance.

        Args:
            mean: Mean of the posterior, (batch, latent_size).
            log_variance: Log-variance of the posterior, (batch, latent_size).
            generator: Source of the noise.

        Returns:
            (batch, latent_size).
        """
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + (0.5 * log_variance).exp() * noise

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode codes to images.

        Args:
            latents: (batch, latent_size).

        Returns:
            The means of the pixels in [0, 1], (batch, channels, image_size, image_size).

        Raises:
            ValueError: If the codes have the wrong shape.
        """
        if latents.ndim != 2 or latents.shape[1] != self.config.latent_size:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}, expected (batch, {self.config.latent_size}); "
                "`encode` returns such codes."
            )
        return self._decode(latents).sigmoid()

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        # Codes are float32, also with weights in half precision.
        return self.decoder(latents.to(reference_parameter(self.decoder).dtype))

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Decode codes drawn from the prior N(0, I) to new images.

        Args:
            n: Number of images.
            generator: Source of the codes, on the CPU or the model's device.

        Returns:
            (n, channels, image_size, image_size), in [0, 1].

        Raises:
            ValueError: If `n` is below 1.
        """
        if n < 1:
            raise ValueError(f"n={n} must be at least 1.")
        device = self.device if generator is None else generator.device
        noise = torch.randn((n, self.config.latent_size), generator=generator, device=device)
        return self.decode(noise.to(self.device))

    @torch.no_grad()
    def interpolate(
        self,
        start: torch.Tensor,
        end: torch.Tensor,
        num_steps: int = 8,
        *,
        mode: str = "linear",
    ) -> torch.Tensor:
        """Decode codes on the path from one code to another.

        Args:
            start: Codes, (batch, latent_size), such as the means of `encode`.
            end: Codes, (batch, latent_size).
            num_steps: Number of images per path, including both ends; at least 2.
            mode: A key of `INTERPOLATIONS`: "linear", or "spherical" for the great circle. Codes on the great circle
                are as far from the origin as draws from the prior.

        Returns:
            (batch, num_steps, channels, image_size, image_size), in [0, 1].

        Raises:
            ValueError: If `num_steps` is below 2, `mode` is unknown, or the codes differ in shape.
        """
        if num_steps < 2:
            raise ValueError(f"num_steps={num_steps} must be at least 2: start and end.")
        if mode not in INTERPOLATIONS:
            raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(INTERPOLATIONS)}.")
        if start.shape != end.shape:
            raise ValueError(f"end has shape {tuple(end.shape)}, expected the shape of start, {tuple(start.shape)}.")
        t = torch.linspace(0, 1, num_steps, device=start.device).view(1, -1, 1)
        codes = INTERPOLATIONS[mode](start.unsqueeze(1), end.unsqueeze(1), t)
        return self.decode(codes.flatten(0, 1)).unflatten(0, (-1, num_steps))

    def _reconstruction_loss(self, pixel_values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        likelihood = LIKELIHOODS[self.config.likelihood]
        error = likelihood.loss(logits.float(), pixel_values.float(), self.config)
        return error.flatten(1).sum(dim=1)

    def log_likelihood(self, pixel_values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Compute log p(x|z) in nats, including the constant of the Gaussian.

        Args:
            pixel_values: Images x, (batch, channels, image_size, image_size), in [0, 1].
            logits: Decoded codes z before the sigmoid, of the same shape.

        Returns:
            (batch,); under "gaussian", the log-density of pixels in [0, 1].
        """
        constant = LIKELIHOODS[self.config.likelihood].constant(self.config)
        return -self._reconstruction_loss(pixel_values, logits) - constant

    @torch.no_grad()
    def importance_weighted_bound(
        self, pixel_values: torch.Tensor, num_samples: int = 50, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Compute log mean_k p(x, z_k) / q(z_k|x), a tighter bound of log p(x) than the ELBO (Burda et al. 2015).

        Args:
            pixel_values: (batch, channels, image_size, image_size), in [0, 1].
            num_samples: K, the number of codes z_k drawn from the posterior of each image; 1 estimates the ELBO.
            generator: Source of the codes.

        Returns:
            (batch,), in nats.

        Raises:
            ValueError: If `num_samples` is below 1, or the images have the wrong shape or range.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1.")
        mean, log_variance = self.encode(pixel_values)
        weights = []
        for _ in range(num_samples):
            latents = self.draw(mean, log_variance, generator=generator)
            # log p(z) - log q(z|x); the constants of the two Gaussians cancel
            noise = (latents - mean).square() / log_variance.exp()
            ratio = 0.5 * (noise + log_variance - latents.square()).sum(dim=1)
            weights.append(self.log_likelihood(pixel_values, self._decode(latents)) + ratio)
        return torch.stack(weights).logsumexp(dim=0) - math.log(num_samples)
