"""Slot autoencoder: an image becomes a set of slots, each slot paints its part, the parts add up to the image.

Locatello et al. 2020, "Object-Centric Learning with Slot Attention", section 4.1 and appendix E: convolutional
encoder, 2-D position embedding, MLP, slot attention, spatial broadcast decoder (Watters et al. 2019), softmax over
the slots' alphas, mean squared error.

What differs from the paper, each by a field of the config:

- `encoder="resnet18"`: ResNet-18 with group normalization and stride 4, as SlotDiffusion's CLEVRTex baseline has.
- `slot_init="learned"`: one learned vector a slot in place of draws from one learned Gaussian.
- `gradient`: implicit or bi-level differentiation of the iterations (see `SlotAttention`).
- `decoder="pixel_shuffle"`: 3x3 convolutions on coarse grids and sub-pixel upsampling (Shi et al. 2016) in place of
  5x5 transposed convolutions up to the full size, which are most of the bill on a CPU; and slots that multiply Fourier
  features of the position in place of being added to the position (see `PixelShuffleDecoder`).
- `num_draws`: in evaluation each image is explained from several draws of the initial slots, and the explanation
  that reconstructs it best is kept, as K-means keeps the best of its starts. Slot attention is such a descent into
  the nearest solution, and from one draw it often leaves an object to the slot that paints the ground.
- `posterior`, a segmentation that looks at the pixels once more, beside the decoder's alphas.
- Positions are the centers of the cells, not corner-aligned, so that weights carry over to other resolutions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import PreTrainedConfig, PreTrainedModel, TorchvisionBackend
from transformers import initialization as init
from transformers.image_utils import ImageInput, PILImageResampling
from transformers.utils import ModelOutput, can_return_tuple

from .layers_attention import SlotAttention
from .layers_position import PositionEmbedding


@strict
class SlotAutoencoderConfig(PreTrainedConfig):
    """Configuration of a `SlotAutoencoderModel`; the defaults are the small model that a CPU trains in minutes.

    Args:
        image_size: Height and width of the images, in pixels; a multiple of `decoder_size`.
        num_channels: Channels of the images.
        encoder: "cnn" (5x5 convolutions, one for each entry of `encoder_channels`) or "resnet18" (group normalization,
            stride 4).
        encoder_channels: Output channels of each convolution of the "cnn" encoder.
        encoder_strides: Stride of each of them; the paper's 128x128 model has four of stride 1.
        token_dim: Channels of the tokens after the position embedding and the MLP.
        num_slots: K, slots used unless the call says otherwise.
        slot_dim: Channels of a slot.
        num_iterations: T, iterations of slot attention unless the call says otherwise.
        num_draws: Draws of the initial slots that evaluation tries for each image, at as many times the cost of one;
            training has one, and so has `slot_init="learned"`.
        slot_mlp_dim: Hidden units of the MLP inside slot attention.
        slot_init: "gaussian" (draws from one learned Gaussian: any K works at inference) or "learned" (one vector a
            slot: K at most `num_slots`).
        slot_std: Scale of the Gaussian that `slot_init="gaussian"` starts from. 1 is the paper's; the GRU has to
            overwrite the draws in T iterations, which it learns sooner when they are small.
        gradient: "full", "implicit" or "bilevel" (see `SlotAttention`); with "implicit" the initial slots, or their
            Gaussian, stay what they were initialized to.
        epsilon: Added to the attention before it is normalized over the tokens.
        qkv_bias: Whether the projections of slot attention have a bias.
        decoder: "broadcast" (transposed convolutions of stride 2 from `decoder_size` to `image_size`, then plain
            ones) or "pixel_shuffle".
        decoder_channels: Hidden channels of the decoder. "broadcast": one entry a layer. "pixel_shuffle": one entry a
            grid, each twice as fine as the one before.
        decoder_size: Height and width of the grid that the slots are broadcast to.
        decoder_frequencies: Octaves of Fourier features in the decoder's position embedding; 0 for none, as in the
            paper.
        pixel_std: Standard deviation of a pixel around what its slot paints, in the units of `pixel_values`, by which
            `SlotAutoencoderModel.posterior` weighs pixels against alphas.
        prune_error: A slot without which the mean squared error of an image rises by no more than this gets no pixel
            of `SlotAutoencoderModel.posterior`.

    Example:
        ```python
        >>> SlotAutoencoderConfig(num_slots=7, image_size=128).num_slots
        7

        ```
    """

    model_type = "slot_autoencoder"

    # Images
    image_size: int = 64
    num_channels: int = 3
    # Encoder
    encoder: Literal["cnn", "resnet18"] = "cnn"
    encoder_channels: list[int] | tuple[int, ...] = (32, 32)
    encoder_strides: list[int] | tuple[int, ...] = (2, 2)
    token_dim: int = 64
    # Slot attention
    num_slots: int = 5
    slot_dim: int = 64
    num_iterations: int = 3
    num_draws: int = 8
    slot_mlp_dim: int = 128
    slot_init: Literal["gaussian", "learned"] = "gaussian"
    slot_std: float = 0.3
    gradient: Literal["full", "implicit", "bilevel"] = "implicit"
    epsilon: float = 1e-8
    qkv_bias: bool = False
    # Decoder
    decoder: Literal["broadcast", "pixel_shuffle"] = "pixel_shuffle"
    decoder_channels: list[int] | tuple[int, ...] = (64, 32)
    decoder_size: int = 8
    decoder_frequencies: int = 4
    # Segmentation
    pixel_std: float = 0.2
    prune_error: float = 2e-3

    def __post_init__(self, **kwargs):
        """Make the fields what JSON gives back, so that a saved config equals the one it came from."""
        self.encoder_channels = list(self.encoder_channels)
        self.encoder_strides = list(self.encoder_strides)
        self.decoder_channels = list(self.decoder_channels)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse fields that do not fit together.

        Raises:
            ValueError: With the field, its value and what was expected.
        """
        for name in (
            "image_size",
            "num_channels",
            "token_dim",
            "num_slots",
            "slot_dim",
            "num_iterations",
            "num_draws",
            "slot_mlp_dim",
            "decoder_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if len(self.encoder_channels) != len(self.encoder_strides) or not self.encoder_channels:
            raise ValueError(
                f"encoder_channels={self.encoder_channels} and encoder_strides={self.encoder_strides} must have "
                "one entry for each convolution, at least one."
            )
        for name in ("slot_std", "pixel_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if not self.prune_error >= 0:
            raise ValueError(f"prune_error={self.prune_error} must be 0 or above.")
        if not self.decoder_channels:
            raise ValueError("decoder_channels=[] must have at least one entry.")
        finest = self.decoder_size * 2 ** (len(self.decoder_channels) - 1)
        if self.decoder == "pixel_shuffle" and self.image_size % finest:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of {finest}, the last of the decoder's grids: "
                f"decoder_size={self.decoder_size}, doubled for each of decoder_channels={self.decoder_channels} but "
                "one."
            )
        if self.decoder == "broadcast" and self.decoder_size * 2**self.num_upsamplings != self.image_size:
            raise ValueError(
                f"image_size={self.image_size} must be decoder_size={self.decoder_size} times a power of two."
            )
        if self.decoder == "broadcast" and len(self.decoder_channels) < self.num_upsamplings:
            raise ValueError(
                f"decoder_channels={self.decoder_channels} must have at least {self.num_upsamplings} entries, "
                f"one for each doubling from decoder_size={self.decoder_size} to image_size={self.image_size}."
            )

    @property
    def num_upsamplings(self) -> int:
        """Doublings from `decoder_size` to `image_size` in the "broadcast" decoder."""
        return (self.image_size // self.decoder_size).bit_length() - 1


def _architecture(**fields) -> Callable[..., SlotAutoencoderConfig]:
    return lambda **others: SlotAutoencoderConfig(**{**fields, **others})


# Named networks: ARCHITECTURES["paper"](num_slots=11) is a config.
ARCHITECTURES = {
    # The config's own defaults, for 64x64 images and a CPU.
    "small": SlotAutoencoderConfig,
    # Locatello et al. 2020, appendix E, for 128x128 images.
    "paper": _architecture(
        image_size=128,
        encoder_channels=[64] * 4,
        encoder_strides=[1] * 4,
        num_slots=7,
        num_draws=1,
        slot_init="gaussian",
        slot_std=1.0,
        gradient="full",
        decoder_frequencies=0,
        decoder="broadcast",
        decoder_size=8,
        decoder_channels=[64] * 5,
    ),
    # The slot attention baseline of SlotDiffusion on CLEVRTex, for 128x128 images.
    "resnet18": _architecture(
        image_size=128,
        encoder="resnet18",
        token_dim=192,
        num_slots=11,
        slot_dim=192,
        slot_mlp_dim=384,
        slot_init="learned",
        gradient="full",
        decoder_frequencies=0,
        decoder="broadcast",
        decoder_size=8,
        decoder_channels=[128] * 4,
    ),
}


@dataclass
class SlotAutoencoderOutput(ModelOutput):
    """Output of `SlotAutoencoderModel`.

    Args:
        loss: Mean squared error between `reconstruction` and the input, a scalar.
        reconstruction: (batch, channels, height, width), in the units of `pixel_values`.
        slots: (batch, slots, slot_dim).
        masks: Decoder alphas, (batch, slots, height, width), summing to 1 over the slots.
        attentions: One (batch, slots, tokens) for each iteration, summing to 1 over the slots.
        contents: What each slot paints before it is masked, (batch, slots, channels, height, width).
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    contents: torch.Tensor | None = None


class SlotImageProcessor(TorchvisionBackend):
    """Resizes images to a square and maps them to [-1, 1]."""

    resample = PILImageResampling.BILINEAR
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"height": 64, "width": 64}
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True


class SlotEncoder(nn.Module):
    """Images (batch, channels, height, width) to tokens (batch, tokens, token_dim)."""

    def __init__(self, config: SlotAutoencoderConfig):
        super().__init__()
        if config.encoder == "resnet18":
            resnet = ResNet(BasicBlock, [2, 2, 2, 2], norm_layer=lambda channels: nn.GroupNorm(32, channels))
            # Small inputs: a 3x3 stem of stride 1 and no pooling, three stages of stride 1, 2, 2.
            stem = nn.Conv2d(config.num_channels, 64, 3, padding=1, bias=False)
            self.backbone = nn.Sequential(stem, resnet.bn1, nn.ReLU(), resnet.layer1, resnet.layer2, resnet.layer3)
            channels = 256
        else:
            layers, channels = [], config.num_channels
            for width, stride in zip(config.encoder_channels, config.encoder_strides, strict=True):
                layers += [nn.Conv2d(channels, width, 5, stride=stride, padding=2), nn.ReLU()]
                channels = width
            self.backbone = nn.Sequential(*layers)
        self.position = PositionEmbedding(channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, config.token_dim), nn.ReLU(), nn.Linear(config.token_dim, config.token_dim)
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images; the tokens run row by row."""
        features = self.backbone(pixel_values).permute(0, 2, 3, 1)  # (batch, height, width, channels)
        features = features + self.position.grid(*features.shape[1:3])
        return self.mlp(self.norm(features.flatten(1, 2)))


class BroadcastDecoder(nn.Module):
    """Spatial broadcast decoder (Watters et al. 2019) with transposed 5x5 convolutions, as in the paper."""

    patch = 1

    def __init__(self, config: SlotAutoencoderConfig):
        super().__init__()
        self.size = config.decoder_size
        self.position = PositionEmbedding(config.slot_dim, frequencies=config.decoder_frequencies)
        layers, channels = [], config.slot_dim
        for index, width in enumerate(config.decoder_channels):
            if index < config.num_upsamplings:
                layers += [nn.ConvTranspose2d(channels, width, 5, stride=2, padding=2, output_padding=1), nn.ReLU()]
            else:
                layers += [nn.Conv2d(channels, width, 5, padding=2), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, config.num_channels + 1, 3, padding=1))

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        """Paint slots (batch * slots, slot_dim): (batch * slots, channels + 1, image_size, image_size)."""
        grid = slots[:, None, None, :] + self.position.grid(self.size, self.size)  # (batch * slots, size, size, dim)
        return self.layers(grid.permute(0, 3, 1, 2))


class PixelShuffleDecoder(nn.Module):
    """Spatial broadcast to a coarse grid, 3x3 convolutions there and on finer ones, then a patch for each cell.

    Where the paper adds the slot to the position embedding, here they are multiplied as well (feature-wise modulation,
    Perez et al. 2018): with p(x, y) the Fourier features and s the slot,

        grid(x, y) = A s + C ((B s) * (D p(x, y)))

    Products of sines and cosines are sines and cosines of differences, so a shape moves with its slot by a linear map
    of the slot, and need not be learned anew at each position.
    """

    def __init__(self, config: SlotAutoencoderConfig):
        super().__init__()
        self.size = config.decoder_size
        channels, *finer = config.decoder_channels
        self.from_slot = nn.Linear(config.slot_dim, channels)
        self.scale = nn.Linear(config.slot_dim, 2 * channels)
        self.position = PositionEmbedding(2 * channels, frequencies=config.decoder_frequencies)
        self.mix = nn.Linear(2 * channels, channels)
        layers = [nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        for width in finer:
            layers += [nn.Conv2d(channels, 4 * width, 1), nn.PixelShuffle(2), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
            channels = width
        patch = config.image_size // (self.size * 2 ** len(finer))
        layers.append(nn.Conv2d(channels, (config.num_channels + 1) * patch**2, 1))
        self.layers, self.patch = nn.Sequential(*layers), patch

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        """Paint slots (batch * slots, slot_dim): (batch * slots, (channels + 1) * patch^2, size, size)."""
        moved = self.scale(slots)[:, None, None, :] * self.position.grid(self.size, self.size)
        grid = self.from_slot(slots)[:, None, None, :] + self.mix(moved)  # (batch * slots, size, size, channels)
        return self.layers(grid.permute(0, 3, 1, 2))


DECODERS = {"broadcast": BroadcastDecoder, "pixel_shuffle": PixelShuffleDecoder}


def _mixture(
    decoder: nn.Module, config: SlotAutoencoderConfig, slots: torch.Tensor, keep: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What slots paint together, what each one paints, and the alphas."""
    if slots.ndim != 3 or slots.shape[-1] != config.slot_dim:
        raise ValueError(f"slots has shape {tuple(slots.shape)}, expected (batch, slots, {config.slot_dim}).")
    patch = decoder.patch
    painted = decoder(slots.flatten(0, 1)).unflatten(0, slots.shape[:2])
    contents, alphas = painted.split([config.num_channels * patch**2, patch**2], dim=2)
    if keep is not None:
        if keep.shape != slots.shape[:2] or not keep.any(dim=1).all():
            raise ValueError(
                f"keep has shape {tuple(keep.shape)}, expected {tuple(slots.shape[:2])} with at least one slot "
                "kept in each image."
            )
        alphas = alphas.masked_fill(~keep[:, :, None, None, None].to(alphas.device), float("-inf"))
    masks = alphas.softmax(dim=1)
    # The parts are added up while a cell still holds its patch of pixels: only the sum is laid out for the loss.
    by_channel = contents.unflatten(2, (config.num_channels, patch**2))
    reconstruction = (by_channel * masks.unsqueeze(2)).sum(dim=1).flatten(1, 2)
    return (
        F.pixel_shuffle(reconstruction, patch),
        F.pixel_shuffle(contents, patch),
        F.pixel_shuffle(masks, patch).squeeze(2),
    )


def mixture_posterior(
    pixel_values: torch.Tensor,
    contents: torch.Tensor,
    masks: torch.Tensor,
    *,
    pixel_std: float,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """The probability that a slot explains a pixel, given the pixel.

    The decoder's alphas m are made without a look at the image: where a slot paints what its neighbor paints as well,
    such as the ground around an object, they may be either's. With the alphas as the prior of a mixture of Gaussians
    around the contents c (Greff et al. 2019, IODINE, section 2.1), Bayes' rule says

        p(slot k | pixel x) = m_k N(x; c_k, pixel_std^2) / sum_j m_j N(x; c_j, pixel_std^2)

    Args:
        pixel_values: (batch, channels, height, width).
        contents: What each slot paints, (batch, slots, channels, height, width).
        masks: Alphas, (batch, slots, height, width), summing to 1 over the slots.
        pixel_std: Standard deviation of a pixel, in the units of `pixel_values`.
        keep: Slots that may have pixels, bool (batch, slots), at least one in each image; all when not given.

    Returns:
        float32 (batch, slots, height, width), summing to 1 over the slots; 0 for slots that are not kept.
    """
    error = (contents.float() - pixel_values.float().unsqueeze(1)).square().sum(dim=2)
    logits = masks.float().clamp_min(1e-12).log() - error / (2 * pixel_std**2)
    if keep is not None:
        logits = logits.masked_fill(~keep[:, :, None, None], float("-inf"))
    return logits.softmax(dim=1)


class SlotAutoencoderPreTrainedModel(PreTrainedModel):
    """Weight initialization and loading of the slot autoencoder."""

    config: SlotAutoencoderConfig
    base_model_prefix = "slot_autoencoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # The original code is Keras: Glorot for every kernel, orthogonal recurrent weights, zero biases.
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.GRUCell):
            init.xavier_uniform_(module.weight_ih)
            init.orthogonal_(module.weight_hh)
            init.zeros_(module.bias_ih)
            init.zeros_(module.bias_hh)
        elif isinstance(module, (SlotAutoencoderModel, SlotEncoderModel)):
            if module.config.slot_init == "learned":
                init.normal_(module.slot_vectors, std=1.0)
            else:
                scale, bound = module.config.slot_std, (6 / (1 + module.config.slot_dim)) ** 0.5
                init.uniform_(module.slot_mean, -bound * scale, bound * scale)
                # One scale for all channels: with the spread of a Glorot draw around it, fewer runs bind.
                init.constant_(module.slot_log_std, math.log(scale))

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a model, as of any `PreTrainedModel`; what no gradient reaches is frozen as it was."""
        loaded = super().from_pretrained(*args, **kwargs)  # its parameters are new ones, and none of them frozen
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_unreached()
        return loaded

    def _freeze_unreached(self) -> None:
        if self.config.gradient == "implicit":  # data-parallel training must not wait for a gradient of these
            for name in ("slot_vectors", "slot_mean", "slot_log_std"):
                if hasattr(self, name):
                    getattr(self, name).requires_grad_(False)

    def _add_encoder(self, config: SlotAutoencoderConfig) -> None:
        self.encoder = SlotEncoder(config)
        if config.slot_init == "learned":
            self.slot_vectors = nn.Parameter(torch.empty(config.num_slots, config.slot_dim))
        else:
            self.slot_mean = nn.Parameter(torch.empty(config.slot_dim))
            self.slot_log_std = nn.Parameter(torch.empty(config.slot_dim))
        self._freeze_unreached()
        self.slot_attention = SlotAttention(
            config.token_dim,
            config.slot_dim,
            mlp_dim=config.slot_mlp_dim,
            epsilon=config.epsilon,
            qkv_bias=config.qkv_bias,
        )

    def prepare_images(self, images: ImageInput) -> torch.Tensor:
        """What the model takes of images of any size.

        Args:
            images: PIL images, or arrays or tensors (channels, height, width) of uint8; a list of them.

        Returns:
            pixel_values, (batch, channels, image_size, image_size), in [-1, 1], on the model's device.
        """
        size = {"height": self.config.image_size, "width": self.config.image_size}
        inputs = SlotImageProcessor(size=size)(images=list(images), return_tensors="pt")
        return inputs["pixel_values"].to(self.device, self.dtype)

    def _check_images(self, pixel_values: torch.Tensor) -> None:
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, "
                f"{', '.join(map(str, expected))}); prepare images with the model's SlotImageProcessor."
            )

    def initial_slots(
        self,
        batch: int,
        num_slots: int | None = None,
        *,
        num_draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The slots before the first iteration.

        Args:
            batch: Images.
            num_slots: K; the config's when not given.
            num_draws: Draws of K slots; learned slots have only one.
            generator: Source of the draws of `slot_init="gaussian"`.

        Returns:
            (batch, num_draws * slots, slot_dim), one draw after the other.

        Raises:
            ValueError: If `num_slots` or `num_draws` is below 1, or K above the learned ones.
        """
        num_slots = self.config.num_slots if num_slots is None else num_slots
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots} must be at least 1.")
        if num_draws < 1:
            raise ValueError(f"num_draws={num_draws} must be at least 1.")
        if self.config.slot_init == "learned":
            if num_slots > self.config.num_slots:
                raise ValueError(
                    f"num_slots={num_slots} is more than the {self.config.num_slots} slots this model has learned; "
                    "use fewer, or train with slot_init='gaussian', which takes any number."
                )
            return self.slot_vectors[:num_slots].expand(batch, -1, -1)
        rows = batch
        if generator is None and not self.training:
            generator, rows = torch.Generator().manual_seed(0), 1
        device = self.slot_mean.device if generator is None else generator.device
        shape = (rows, num_slots, self.config.slot_dim)
        noise = torch.cat([torch.randn(shape, generator=generator, device=device) for _ in range(num_draws)], dim=1)
        slots = self.slot_mean + self.slot_log_std.exp() * noise.to(self.slot_mean)
        return slots.expand(batch, -1, -1)


class SlotAutoencoderModel(SlotAutoencoderPreTrainedModel):
    """Slot attention autoencoder: finds the objects of an image without labels.

    In training, slots of `slot_init="gaussian"` are drawn anew for every image. In evaluation without a `generator`
    they are the same draws for every image and every call: results are repeatable and rows of a batch independent.
    Evaluation tries `num_draws` draws for each image and keeps the one with the smallest reconstruction error.

    Example:
        ```python
        >>> model = SlotAutoencoderModel(SlotAutoencoderConfig())
        >>> output = model(torch.randn(2, 3, 64, 64))
        >>> output.masks.shape, output.slots.shape
        (torch.Size([2, 5, 64, 64]), torch.Size([2, 5, 64]))

        ```
    """

    def __init__(self, config: SlotAutoencoderConfig):
        super().__init__(config)
        self._add_encoder(config)
        self.decoder = DECODERS[config.decoder](config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_slots: int | None = None,
        num_iterations: int | None = None,
        num_draws: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> SlotAutoencoderOutput:
        """Encode images into slots and decode them.

        Args:
            pixel_values: (batch, channels, image_size, image_size), in [-1, 1].
            num_slots: K; the config's when not given.
            num_iterations: T; the config's when not given.
            num_draws: Draws to try for each image; the config's when not given, and one in training.
            generator: Source of the draws of `slot_init="gaussian"`.
            **kwargs: `return_dict=False` gives a tuple.

        Returns:
            See `SlotAutoencoderOutput`.

        Raises:
            ValueError: If the images have another shape than the config says, or K or T cannot be had.
        """
        self._check_images(pixel_values)
        num_iterations = self.config.num_iterations if num_iterations is None else num_iterations
        if self.config.slot_init == "learned" or (num_draws is None and self.training):
            num_draws = 1
        num_draws = self.config.num_draws if num_draws is None else num_draws
        tokens = self.encoder(pixel_values)
        initial = self.initial_slots(len(pixel_values), num_slots, num_draws=num_draws, generator=generator)
        best = None
        for start in initial.chunk(num_draws, dim=1):
            slots, attentions = self.slot_attention(
                tokens, start, num_iterations=num_iterations, gradient=self.config.gradient
            )
            reconstruction, contents, masks = self._paint(slots)
            found = (reconstruction, contents, masks, slots, *attentions)
            if best is not None:  # of each image the better one
                error, least = (
                    (tried[0].float() - pixel_values.float()).square().mean((1, 2, 3)) for tried in (found, best)
                )
                better = error < least
                found = tuple(
                    new.where(better.view(-1, *[1] * (new.ndim - 1)), old)
                    for new, old in zip(found, best, strict=True)
                )
            best = found
        reconstruction, contents, masks, slots, *attentions = best
        return SlotAutoencoderOutput(
            loss=F.mse_loss(reconstruction.float(), pixel_values.float()),
            reconstruction=reconstruction,
            slots=slots,
            masks=masks,
            attentions=tuple(attentions),
            contents=contents,
        )

    def decode_parts(
        self, slots: torch.Tensor, *, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Paint each slot.

        Args:
            slots: (batch, slots, slot_dim).
            keep: Slots to paint, bool (batch, slots); a slot that is left out gets no pixel, and the others share its
                pixels as their alphas say. All when not given.

        Returns:
            Contents, (batch, slots, channels, height, width), in [-1, 1] up to the model's error, and masks,
            (batch, slots, height, width), summing to 1 over the slots.

        Raises:
            ValueError: If `slots` has another shape, or `keep` leaves an image without a slot.
        """
        _, contents, masks = self._paint(slots, keep)
        return contents, masks

    def _paint(
        self, slots: torch.Tensor, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _mixture(self.decoder, self.config, slots, keep)

    @torch.no_grad()
    def decode(self, slots: torch.Tensor, *, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Paint images from slots, those of an image, edited ones or ones from a `SlotLibrary`.

        Args:
            slots: (batch, slots, slot_dim).
            keep: Slots to paint, bool (batch, slots); all when not given.

        Returns:
            Images, (batch, channels, height, width), in [0, 1].
        """
        reconstruction, _, _ = self._paint(slots.to(self.device, self.dtype), keep)
        return (reconstruction / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def needed_slots(self, pixel_values: torch.Tensor, output: SlotAutoencoderOutput) -> torch.Tensor:
        """Say which slots an image needs: spare ones share the ground or an object with another slot.

        Slots are left out one by one, always the one that the reconstruction misses least, as long as that raises the
        mean squared error of the image by no more than `config.prune_error`.

        Args:
            pixel_values: (batch, channels, height, width).
            output: What the model gave for them.

        Returns:
            bool (batch, slots), with at least one slot in each image.
        """
        contents, masks, images = output.contents.float(), output.masks.float(), pixel_values.float()
        keep = torch.ones(masks.shape[:2], dtype=torch.bool, device=masks.device)

        def errors(rows: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            weights = masks[rows] * keep[:, :, None, None]
            painted = (contents[rows] * weights.unsqueeze(2)).sum(dim=1) / weights.sum(dim=1)[:, None].clamp_min(1e-12)
            return (painted - images[rows]).square().mean(dim=(1, 2, 3))

        rows = torch.arange(len(masks), device=masks.device)
        error = errors(rows, keep)
        for _ in range(masks.shape[1] - 1):
            without = torch.full_like(keep[rows], float("inf"), dtype=torch.float32)
            for slot in range(masks.shape[1]):
                fewer = keep[rows]
                fewer[:, slot] = False
                without[:, slot] = errors(rows, fewer).where(keep[rows, slot], without[:, slot])
            least, slot = without.min(dim=1)
            spare = least <= error + self.config.prune_error
            rows, slot, error = rows[spare], slot[spare], least[spare]
            keep[rows, slot] = False
            if not len(rows):
                break
        return keep

    @torch.no_grad()
    def posterior(self, pixel_values: torch.Tensor, output: SlotAutoencoderOutput) -> torch.Tensor:
        """The probability that a slot explains a pixel, given the pixel: `mixture_posterior` over `needed_slots`.

        Args:
            pixel_values: (batch, channels, height, width).
            output: What the model gave for them.

        Returns:
            (batch, slots, height, width), summing to 1 over the slots; 0 for slots that are not needed.
        """
        keep = self.needed_slots(pixel_values, output)
        return mixture_posterior(
            pixel_values, output.contents, output.masks, pixel_std=self.config.pixel_std, keep=keep
        )

    @torch.no_grad()
    def segment(
        self, images: ImageInput, *, num_slots: int | None = None, num_iterations: int | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Say for each pixel which slot explains it: the largest `posterior`.

        Args:
            images: A PIL image, an array or tensor (channels, height, width) of uint8, or a list of them, of any size.
            num_slots: K; the config's when not given.
            num_iterations: T; the config's when not given.

        Returns:
            int64 (height, width) at the image's own size, with values in [0, K); a list of them for a list. A value is
            the index of the slot in `SlotAutoencoderOutput.slots`; which of them is the background is not labeled.

        Example:
            ```python
            >>> model = SlotAutoencoderModel(SlotAutoencoderConfig()).eval()
            >>> model.segment(Image.new("RGB", (320, 240))).shape
            torch.Size([240, 320])

            ```
        """
        if not isinstance(images, (list, tuple)):
            return self.segment([images], num_slots=num_slots, num_iterations=num_iterations)[0]
        pixel_values = self.prepare_images(images)
        masks = self.posterior(pixel_values, self(pixel_values, num_slots=num_slots, num_iterations=num_iterations))
        sizes = [image.size[::-1] if isinstance(image, Image.Image) else tuple(image.shape[-2:]) for image in images]
        return [
            F.interpolate(mask[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
            for mask, size in zip(masks, sizes, strict=True)
        ]


@dataclass
class SlotEncoderOutput(ModelOutput):
    """Output of `SlotEncoderModel`.

    Args:
        slots: (batch, slots, slot_dim).
        attentions: One (batch, slots, tokens) for each iteration, summing to 1 over the slots; the tokens are the
            cells of a square grid over the image, row by row.
    """

    slots: torch.Tensor | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class SlotEncoderModel(SlotAutoencoderPreTrainedModel):
    """The encoder of a slot autoencoder without its decoder, to train with another one, such as slot diffusion.

    It has the same config, of which the decoder's fields are not used, and loads the encoder from the checkpoint of a
    `SlotAutoencoderModel` too. Slots are drawn as there, but only once for each image: the several draws of evaluation
    are told apart by the reconstruction, which is not known here. Load it by its class: the Auto classes take the
    config for that of a `SlotAutoencoderModel`.

    Example:
        ```python
        >>> encoder = SlotEncoderModel(SlotAutoencoderConfig())
        >>> encoder(torch.randn(2, 3, 64, 64)).slots.shape
        torch.Size([2, 5, 64])

        ```
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: SlotAutoencoderConfig):
        super().__init__(config)
        self._add_encoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_slots: int | None = None,
        num_iterations: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> SlotEncoderOutput:
        """Encode images into slots.

        Args:
            pixel_values: (batch, channels, image_size, image_size), in [-1, 1].
            num_slots: K; the config's when not given.
            num_iterations: T; the config's when not given.
            generator: Source of the draws of `slot_init="gaussian"`.
            **kwargs: `return_dict=False` gives a tuple.

        Returns:
            See `SlotEncoderOutput`.

        Raises:
            ValueError: If the images have another shape than the config says, or K or T cannot be had.
        """
        self._check_images(pixel_values)
        slots, attentions = self.slot_attention(
            self.encoder(pixel_values),
            self.initial_slots(len(pixel_values), num_slots, generator=generator),
            num_iterations=self.config.num_iterations if num_iterations is None else num_iterations,
            gradient=self.config.gradient,
        )
        return SlotEncoderOutput(slots=slots, attentions=attentions)


@dataclass
class SlotDecoderOutput(ModelOutput):
    """Output of `SlotDecoderModel`.

    Args:
        reconstruction: (batch, channels, height, width).
        masks: Alphas, (batch, slots, height, width), summing to 1 over the slots.
        contents: What each slot paints before it is masked, (batch, slots, channels, height, width).
    """

    reconstruction: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    contents: torch.Tensor | None = None


class SlotDecoderModel(SlotAutoencoderPreTrainedModel):
    """The decoder of a slot autoencoder without its encoder: paints images, or latents, from slots.

    It has the same config, of which the encoder's fields are not used, and loads the decoder from the checkpoint of a
    `SlotAutoencoderModel` too. Load it by its class, as `SlotEncoderModel`.

    Example:
        ```python
        >>> decoder = SlotDecoderModel(SlotAutoencoderConfig(image_size=16))
        >>> decoder(torch.randn(2, 5, 64)).masks.shape
        torch.Size([2, 5, 16, 16])

        ```
    """

    main_input_name = "slots"
    _keys_to_ignore_on_load_unexpected = [r"^encoder\.", r"^slot_"]

    def __init__(self, config: SlotAutoencoderConfig):
        super().__init__(config)
        self.decoder = DECODERS[config.decoder](config)
        self.post_init()

    @can_return_tuple
    def forward(self, slots: torch.Tensor, keep: torch.Tensor | None = None, **kwargs) -> SlotDecoderOutput:
        """Paint slots.

        Args:
            slots: (batch, slots, slot_dim).
            keep: Slots to paint, bool (batch, slots); all when not given.
            **kwargs: `return_dict=False` gives a tuple.

        Returns:
            See `SlotDecoderOutput`.

        Raises:
            ValueError: If `slots` has another shape, or `keep` leaves an image without a slot.
        """
        reconstruction, contents, masks = _mixture(self.decoder, self.config, slots, keep)
        return SlotDecoderOutput(reconstruction=reconstruction, masks=masks, contents=contents)
