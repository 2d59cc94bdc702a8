"""Variational autoencoders of images: a multilayer perceptron and a small convolutional network.

Kingma & Welling 2014, "Auto-Encoding Variational Bayes": an encoder gives the mean and log-variance of a Gaussian
posterior q(z|x), a code is drawn from it by reparameterization, and a decoder gives the distribution of the pixels
p(x|z). The loss is the negative evidence lower bound (ELBO), the reconstruction term -log p(x|z) and the divergence
KL(q(z|x) || N(0, I)), both summed over an image and averaged over the batch: nats an image.

Two likelihoods, for pixels in [0, 1]:

- "bernoulli": -log p(x|z) is the binary cross-entropy (BCE). For gray pixels it is the expectation over images that
  are made black and white at random, each pixel white with the probability of its gray.
- "gaussian": -log p(x|z) is the summed squared error (SSE) / (2 pixel_std^2), and a constant that the loss leaves out
  and `log_likelihood` has. The default pixel_std^2 = 1/2 makes the loss SSE + KL; pixel_std = 1 makes it SSE/2 + KL.

What differs from the paper: `architecture="conv"`, the weight `beta` of the KL (Higgins et al. 2017), and a decoder
whose mean of the Gaussian is a sigmoid, so that reconstructions are images under both likelihoods.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TorchvisionBackend
from transformers import initialization as init
from transformers.image_utils import ImageInput, PILImageResampling
from transformers.processing_utils import ImagesKwargs
from transformers.utils import ModelOutput, can_return_tuple


@strict
class ImageVaeConfig(PreTrainedConfig):
    """Configuration of an `ImageVaeModel`.

    Args:
        architecture: "mlp" or "conv".
        image_size: Height and width of the images, in pixels; for "conv" a multiple of 2 for each of `widths`.
        num_channels: Channels of the images, 1 (gray) or 3.
        latent_size: Numbers of a code.
        likelihood: "bernoulli" or "gaussian", see the module.
        pixel_std: Standard deviation of a pixel under the Gaussian likelihood.
        beta: Weight of the KL in the loss; 1 makes it the ELBO.
        hidden_sizes: "mlp": hidden units of the encoder's layers; the decoder has them in reverse.
        widths: "conv": channels of the encoder's grids, each half as fine as the one before; the decoder's in reverse.
        num_blocks: "conv": residual blocks on the coarsest grid, of the encoder and of the decoder.
        hidden_size: "conv": units of the dense layer between the coarsest grid and the code.

    Example:
        ```python
        >>> ImageVaeConfig(architecture="mlp", image_size=28).num_pixels
        784

        ```
    """

    model_type = "image_vae"

    architecture: Literal["mlp", "conv"] = "conv"
    image_size: int = 28
    num_channels: int = 1
    latent_size: int = 20
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    pixel_std: float = 0.5**0.5
    beta: float = 1.0
    hidden_sizes: list[int] | tuple[int, ...] = (400,)
    widths: list[int] | tuple[int, ...] = (32, 64)
    num_blocks: int = 1
    hidden_size: int = 256

    def __post_init__(self, **kwargs):
        """Make the fields what JSON gives back, so that a saved config equals the one it came from."""
        self.hidden_sizes, self.widths = list(self.hidden_sizes), list(self.widths)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse fields that do not fit together.

        Raises:
            ValueError: With the field, its value and what was expected.
        """
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
        if self.architecture == "conv" and self.image_size % 2 ** len(self.widths):
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of {2 ** len(self.widths)}: it is halved for each "
                f"of widths={self.widths}."
            )

    @property
    def num_pixels(self) -> int:
        """Values of an image: channels times height times width."""
        return self.num_channels * self.image_size**2


@dataclass
class ImageVaeOutput(ModelOutput):
    """Output of `ImageVaeModel`.

    Args:
        loss: Mean over the batch of `reconstruction_loss` + beta * `kl`, a scalar.
        reconstruction_loss: -log p(x|z) of each image in nats, without the constant of the Gaussian; (batch,).
        kl: KL(q(z|x) || N(0, I)) of each image in nats; (batch,).
        reconstruction: Means of the pixels, in [0, 1]; (batch, channels, height, width).
        logits: The same before the sigmoid.
        latents: The codes that were decoded, (batch, latent_size).
        posterior_mean: Of q(z|x), (batch, latent_size).
        posterior_log_variance: Likewise.
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
    """What a call of `ImageVaeProcessor` takes beside the arguments of every image processor."""

    do_grayscale: bool


class ImageVaeProcessor(TorchvisionBackend):
    """Resizes images to a square of pixels in [0, 1], of one channel where `do_grayscale` is set."""

    valid_kwargs = ImageVaeProcessorKwargs
    resample = PILImageResampling.BILINEAR
    size = {"height": 28, "width": 28}
    do_convert_rgb = True
    do_grayscale = True
    do_resize = True
    do_rescale = True
    do_normalize = False

    def process_image(self, image: ImageInput, do_grayscale: bool | None = None, **kwargs: Any) -> torch.Tensor:
        """Make a tensor (channels, height, width) of one image; gray is the luma of ITU-R 601, as Pillow has it."""
        image = super().process_image(image, **kwargs)
        if not do_grayscale or len(image) == 1:
            return image
        luma = torch.tensor([19595, 38470, 7471], device=image.device).view(3, 1, 1)  # they sum to 2^16
        if image.is_floating_point():
            return (image * luma / 2**16).sum(dim=0, keepdim=True)
        return ((image.int() * luma).sum(dim=0, keepdim=True) + 2**15 >> 16).to(image.dtype)


def gaussian_kl(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, of each element."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), with 3x3 convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, width, height, width) to the same shape."""
        return x + self.second(F.relu(self.first(F.relu(x))))


def _mlp(sizes: list[int]) -> list[nn.Module]:
    """Linear layers with a ReLU between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return layers[:-1]


def make_encoder(config: ImageVaeConfig) -> nn.Sequential:
    """Images (batch, channels, height, width) to mean and log-variance, (batch, 2 * latent_size)."""
    if config.architecture == "mlp":
        return nn.Sequential(nn.Flatten(), *_mlp([config.num_pixels, *config.hidden_sizes, 2 * config.latent_size]))
    layers, channels = [], config.num_channels
    for width in config.widths:
        layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.ReLU()]
        channels = width
    layers[-1:] = [ResidualBlock(channels) for _ in range(config.num_blocks)]  # a block begins with its own ReLU
    side = config.image_size // 2 ** len(config.widths)
    dense = _mlp([channels * side**2, config.hidden_size, 2 * config.latent_size])
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), *dense)


def make_decoder(config: ImageVaeConfig) -> nn.Sequential:
    """Codes (batch, latent_size) to logits of the pixels, (batch, channels, height, width)."""
    shape = (config.num_channels, config.image_size, config.image_size)
    if config.architecture == "mlp":
        layers = _mlp([config.latent_size, *reversed(config.hidden_sizes), config.num_pixels])
        return nn.Sequential(*layers, nn.Unflatten(1, shape))
    channels, side = config.widths[-1], config.image_size // 2 ** len(config.widths)
    layers = _mlp([config.latent_size, config.hidden_size, channels * side**2])
    layers += [nn.Unflatten(1, (channels, side, side)), *(ResidualBlock(channels) for _ in range(config.num_blocks))]
    for width in [*reversed(config.widths[:-1]), config.num_channels]:
        layers += [nn.ReLU(), nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1)]
        channels = width
    return nn.Sequential(*layers)


class ImageVaePreTrainedModel(PreTrainedModel):
    """Weight initialization and loading of the networks."""

    config: ImageVaeConfig
    base_model_prefix = "image_vae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):  # torch's own, which the reference has
            init.kaiming_uniform_(module.weight, a=5**0.5)
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.bias, -bound, bound)


class ImageVaeModel(ImageVaePreTrainedModel):
    """A variational autoencoder of images.

    In training, and wherever a `generator` is given, the code of an image is drawn from its posterior. In evaluation
    without one it is the posterior's mean, so that results are repeatable; the loss is then no estimate of the ELBO.

    Example:
        ```python
        >>> model = ImageVaeModel(ImageVaeConfig(architecture="mlp")).eval()
        >>> model(torch.rand(2, 1, 28, 28)).kl.shape, model.sample(3).shape
        (torch.Size([2]), torch.Size([3, 1, 28, 28]))

        ```
    """

    def __init__(self, config: ImageVaeConfig):
        super().__init__(config)
        self.encoder = make_encoder(config)
        self.decoder = make_decoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, generator: torch.Generator | None = None, **kwargs: Any
    ) -> ImageVaeOutput:
        """Encode images, draw their codes and decode them.

        Args:
            pixel_values: (batch, channels, image_size, image_size), in [0, 1].
            generator: Source of the codes' noise, on the model's device.
            **kwargs: `return_dict=False` gives a tuple.

        Returns:
            See `ImageVaeOutput`.

        Raises:
            ValueError: If the images have another shape or range.
        """
        mean, log_variance = self.encode(pixel_values)
        latents = mean
        if self.training or generator is not None:
            latents = self.draw(mean, log_variance, generator=generator)
        logits = self.decoder(latents)
        reconstruction_loss = self._reconstruction_loss(pixel_values, logits)
        kl = gaussian_kl(mean, log_variance).sum(dim=1)
        return ImageVaeOutput(
            loss=(reconstruction_loss + self.config.beta * kl).mean(),
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
            ValueError: If the images have another shape or range.
        """
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, "
                f"{', '.join(map(str, expected))}); prepare images with the model's ImageVaeProcessor."
            )
        # To look at the values makes a GPU wait, which training is spared.
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
        """Draw codes by reparameterization, mean + std * noise, so that gradients reach both.

        Args:
            mean: Of the posterior, (batch, latent_size).
            log_variance: Likewise.
            generator: Source of the noise.

        Returns:
            (batch, latent_size).
        """
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + (0.5 * log_variance).exp() * noise

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Make images of codes.

        Args:
            latents: (batch, latent_size).

        Returns:
            The means of the pixels, in [0, 1], (batch, channels, image_size, image_size).

        Raises:
            ValueError: If the codes have another length.
        """
        if latents.ndim != 2 or latents.shape[1] != self.config.latent_size:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}, expected (batch, {self.config.latent_size}), as of "
                "`encode`."
            )
        return self.decoder(latents).sigmoid()

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Make new images of codes drawn from the prior N(0, I).

        Args:
            n: How many.
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
        mode: Literal["linear", "spherical"] = "linear",
    ) -> torch.Tensor:
        """Decode codes on the way from one to another.

        Args:
            start: Codes, (batch, latent_size), such as the means of `encode`.
            end: Likewise.
            num_steps: Images of each way, both ends among them; at least 2.
            mode: "linear", or "spherical": along the great circle (White 2016), which keeps codes as far from the
                origin as draws of the prior are.

        Returns:
            (batch, num_steps, channels, image_size, image_size), in [0, 1].

        Raises:
            ValueError: If there are fewer than 2 steps, or `mode` is unknown, or the codes differ in shape.
        """
        if num_steps < 2:
            raise ValueError(f"num_steps={num_steps} must be at least 2: start and end.")
        if mode not in ("linear", "spherical"):
            raise ValueError(f"mode={mode!r} is unknown; choose linear or spherical.")
        if start.shape != end.shape:
            raise ValueError(f"end has shape {tuple(end.shape)}, expected that of start, {tuple(start.shape)}.")
        t = torch.linspace(0, 1, num_steps, device=start.device).view(1, -1, 1)
        start, end = start.unsqueeze(1), end.unsqueeze(1)
        codes = start + t * (end - start)
        if mode == "spherical":
            angle = F.cosine_similarity(start, end, dim=-1).clamp(-1, 1).acos().unsqueeze(-1)
            sine = angle.sin()
            arc = (((1 - t) * angle).sin() * start + (t * angle).sin() * end) / sine
            codes = torch.where(sine > 1e-4, arc, codes)  # parallel codes have no circle between them
        return self.decode(codes.flatten(0, 1)).unflatten(0, (-1, num_steps))

    def _reconstruction_loss(self, pixel_values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        pixel_values, logits = pixel_values.float(), logits.float()
        if self.config.likelihood == "bernoulli":
            error = F.binary_cross_entropy_with_logits(logits, pixel_values, reduction="none")
        else:
            error = (logits.sigmoid() - pixel_values).square() / (2 * self.config.pixel_std**2)
        return error.flatten(1).sum(dim=1)

    def log_likelihood(self, pixel_values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Compute log p(x|z) in nats, the Gaussian's constant included.

        Args:
            pixel_values: Images x, (batch, channels, image_size, image_size), in [0, 1].
            logits: What the decoder made of the codes z, likewise.

        Returns:
            (batch,); under "gaussian" that of a density over pixels in [0, 1].
        """
        constant = 0.0
        if self.config.likelihood == "gaussian":
            constant = self.config.num_pixels * 0.5 * math.log(2 * math.pi * self.config.pixel_std**2)
        return -self._reconstruction_loss(pixel_values, logits) - constant

    @torch.no_grad()
    def importance_weighted_bound(
        self, pixel_values: torch.Tensor, num_samples: int = 50, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """A bound of log p(x) that is closer than the ELBO (Burda et al. 2015), log mean_k p(x, z_k) / q(z_k|x).

        Args:
            pixel_values: (batch, channels, image_size, image_size), in [0, 1].
            num_samples: K, codes z_k drawn from the posterior of each image; 1 estimates the ELBO.
            generator: Source of the codes.

        Returns:
            (batch,), in nats.

        Raises:
            ValueError: If `num_samples` is below 1, or the images have another shape or range.
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
            weights.append(self.log_likelihood(pixel_values, self.decoder(latents)) + ratio)
        return torch.stack(weights).logsumexp(dim=0) - math.log(num_samples)
