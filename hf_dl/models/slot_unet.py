"""Slot U-Net: predicts the noise in the latents of an image, given the slots of the image.

The denoiser of slot-conditioned latent diffusion: Wu et al. 2023, "SlotDiffusion: Object-Centric Generative Modeling
with Diffusion Models", section 3.2, and Jiang et al. 2023, "Object-Centric Slot Diffusion". It has the interface of
the denoisers of diffusers, `unet(sample, timestep, encoder_hidden_states).sample`. `UNet2DConditionModel` can replace
it, if its `cross_attention_dim` is the size of a slot.

Differences from SlotDiffusion:

- Resampling happens inside residual blocks: average pooling or nearest interpolation replaces their first convolution
  (see `ResidualBlock`). SlotDiffusion uses strided convolutions, and a convolution after the interpolation.
- There is one middle block (residual, transformer, residual). It always attends to the slots.
- Images must have the size in the config, because the network was never trained on other sizes.

Three options help small networks. They are off by default:

- `patch_size` cuts the latents into patches, as vision transformers cut images. The feature maps are then smaller.
- `sketch_channels` adds the latents of a sketch to the input. The sketch is the image that the decoder of a slot
  autoencoder paints from the same slots. Diffusion then only adds what the sketch lacks, as in Pandey et al. 2022,
  "DiffuseVAE".
- `layout_channels` adds a projection of the slots to the input. Each slot is painted where its mask is.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from .layers_unet import ResidualBlock, SlotTransformer, TimeEmbedding

# For 4x32x32 latents of 64x64 images and slots of 64 channels, on a CPU.
_SMALL = {
    "sample_size": 32,
    "in_channels": 4,
    "patch_size": 2,
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "attention_resolutions": (8, 4),
    "cross_attention_dim": 64,
    "norm_num_groups": 16,
}

ARCHITECTURES = {
    "small": _SMALL,
    # SlotDiffusion on CLEVRTex, for 3x32x32 latents of 128x128 images and slots of 192 channels.
    "clevrtex": {
        "sample_size": 32,
        "block_out_channels": (128, 256, 384, 512),
        "layers_per_block": 2,
        "attention_resolutions": (16, 8, 4),
        "cross_attention_dim": 192,
        "dropout": 0.1,
    },
    # "small" with more channels on the fine levels, for textured images.
    "wide": _SMALL | {"block_out_channels": (64, 96, 128)},
}
"""Arguments of `SlotUNetModel` by name: `SlotUNetModel(**ARCHITECTURES["clevrtex"])`."""


GROUND_SHARE = 1e-3
"""Added to the share of objects in a patch, so that the scale of the ground is above 0."""


@dataclass
class SlotUNetOutput(BaseOutput):
    """Output of `SlotUNetModel`.

    Args:
        sample: The predicted noise, (batch, in_channels, sample_size, sample_size).
    """

    sample: torch.Tensor


class SlotUNetLayer(nn.Module):
    """A residual block, followed by a transformer if the layer attends to the slots."""

    def __init__(self, residual: ResidualBlock, transformer: SlotTransformer | None = None):
        super().__init__()
        self.residual = residual
        self.transformer = transformer

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, slots: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """Transform a feature map; for the arguments see `ResidualBlock` and `SlotTransformer`."""
        x = self.residual(x, time)
        return x if self.transformer is None else self.transformer(x, slots, keep)


class SlotUNetModel(ModelMixin, ConfigMixin):
    """U-Net with cross-attention to slots.

    Down path: each level has `layers_per_block` layers, and a further layer between levels halves the feature map.
    Then comes one middle block. Up path: each level has `layers_per_block + 1` layers. Each of them also gets the
    output of the corresponding layer of the down path. A further layer between levels doubles the feature map.

    Args:
        sample_size: Height and width of the latents. In patches, divisible by 2 once per level after the first.
        in_channels: Channels of the latents.
        block_out_channels: Channels of each level, from the finest to the coarsest. Multiples of `norm_num_groups`,
            and in levels with a transformer also of `attention_head_dim`.
        layers_per_block: Layers per level of the down path.
        attention_resolutions: Heights of the feature maps whose layers have a transformer. The finest level has height
            `sample_size` / `patch_size`, and each further level has half the height. The middle block always has a
            transformer.
        transformer_layers_per_block: Transformer blocks per transformer.
        attention_head_dim: Channels of an attention head.
        cross_attention_dim: Channels of a slot.
        dropout: Probability of dropout in the residual blocks.
        norm_num_groups: Groups of the normalizations.
        num_train_timesteps: Number of timesteps of the noise schedule, which are numbered from 0.
        position_frequencies: Octaves of the position embedding of the transformers. Defaults to no position embedding,
            as in `UNet2DConditionModel`.
        patch_size: Side of the patches of the latents. The finest feature map has height `sample_size` / `patch_size`.
        sketch_channels: Channels of the sketch, a second input with the size of the latents. 0: no sketch.
        layout_channels: Channels of the slots that are painted by their masks. 0: no masks.
        residual_scale: If above 0, the U-Net works with (latents - sketch) / `residual_scale`. It then only draws the
            difference from the sketch, and its errors shrink with this difference (Whang et al. 2022, "Deblurring via
            Stochastic Refinement"). See `to_residual` and `from_residual`.
        residual_power: If above 0, the scale depends on the place: the sketch of the ground needs smaller changes than
            the sketch of objects. See `residual_scales`. Needs `residual_scale` and `layout_channels`.
        temperature: The factor of the noise that `SlotDiffusionPipeline` samples with by default.

    Raises:
        ValueError: If the sizes do not fit together.

    Example:
        ```python
        >>> unet = SlotUNetModel(**ARCHITECTURES["small"])
        >>> unet(torch.randn(2, 4, 32, 32), torch.tensor([0, 999]), torch.randn(2, 5, 64)).sample.shape
        torch.Size([2, 4, 32, 32])

        ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SlotUNetLayer"]
    _repeated_blocks = ["SlotTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 384, 512),
        layers_per_block: int = 2,
        attention_resolutions: tuple[int, ...] = (16, 8, 4),
        transformer_layers_per_block: int = 1,
        attention_head_dim: int = 32,
        cross_attention_dim: int = 192,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        num_train_timesteps: int = 1000,
        position_frequencies: int | None = None,
        patch_size: int = 1,
        sketch_channels: int = 0,
        layout_channels: int = 0,
        residual_scale: float = 0.0,
        residual_power: float = 0.0,
        temperature: float = 1.0,
    ):
        super().__init__()
        self._check_config()
        self.gradient_checkpointing = False
        time_dim = 4 * block_out_channels[0]
        sizes = [sample_size // patch_size >> level for level in range(len(block_out_channels))]

        def layer(width: int, out: int, attend: bool = False, resample: str | None = None) -> SlotUNetLayer:
            residual = ResidualBlock(
                width, out, time_dim=time_dim, groups=norm_num_groups, dropout=dropout, resample=resample
            )
            if not attend:
                return SlotUNetLayer(residual)
            transformer = SlotTransformer(
                out,
                cross_attention_dim,
                head_dim=attention_head_dim,
                depth=transformer_layers_per_block,
                groups=norm_num_groups,
                position_frequencies=position_frequencies,
            )
            return SlotUNetLayer(residual, transformer)

        self.time_embedding = TimeEmbedding(block_out_channels[0], time_dim)
        inputs = (in_channels + sketch_channels) * patch_size**2 + layout_channels
        self.conv_in = nn.Conv2d(inputs, block_out_channels[0], 3, padding=1)
        self.layout = nn.Linear(cross_attention_dim, layout_channels) if layout_channels else None

        width = block_out_channels[0]
        widths = [width]  # of the feature maps that the up path reads
        self.down_layers = nn.ModuleList()
        for level, out in enumerate(block_out_channels):
            for _ in range(layers_per_block):
                self.down_layers.append(layer(width, out, sizes[level] in attention_resolutions))
                width = out
                widths.append(width)
            if level + 1 < len(block_out_channels):
                self.down_layers.append(layer(width, width, resample="down"))
                widths.append(width)

        self.middle_layers = nn.ModuleList([layer(width, width, True), layer(width, width)])

        self.up_layers = nn.ModuleList()
        for level, out in reversed(list(enumerate(block_out_channels))):
            for _ in range(layers_per_block + 1):
                self.up_layers.append(layer(width + widths.pop(), out, sizes[level] in attention_resolutions))
                width = out
            if level:
                self.up_layers.append(layer(width, width, resample="up"))

        self.norm_out = nn.GroupNorm(norm_num_groups, width)
        self.conv_out = nn.Conv2d(width, in_channels * patch_size**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def _check_config(self) -> None:
        config = self.config
        for name in (
            "sample_size",
            "in_channels",
            "layers_per_block",
            "transformer_layers_per_block",
            "attention_head_dim",
            "cross_attention_dim",
            "norm_num_groups",
            "num_train_timesteps",
            "patch_size",
        ):
            if config[name] < 1:
                raise ValueError(f"{name}={config[name]} must be at least 1.")
        for name in ("sketch_channels", "layout_channels", "residual_scale", "residual_power", "temperature"):
            if not config[name] >= 0:
                raise ValueError(f"{name}={config[name]} must be 0 or above.")
        if config.residual_scale and config.sketch_channels != config.in_channels:
            raise ValueError(
                f"residual_scale={config.residual_scale} needs a sketch with the channels of the latents: "
                f"sketch_channels={config.sketch_channels} must be in_channels={config.in_channels}."
            )
        if config.residual_power and not config.layout_channels:
            raise ValueError(
                f"residual_power={config.residual_power} needs masks of the slots: layout_channels=0 must be above 0."
            )
        if config.position_frequencies is not None and config.position_frequencies < 0:
            raise ValueError(f"position_frequencies={config.position_frequencies} must be None or at least 0.")
        channels, groups, head_dim = config.block_out_channels, config.norm_num_groups, config.attention_head_dim
        if not channels:
            raise ValueError("block_out_channels=() must have at least one level.")
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout={config.dropout} must be at least 0 and below 1.")
        patch = config.patch_size
        coarsest = patch * 2 ** (len(channels) - 1)
        if config.sample_size % coarsest:
            raise ValueError(
                f"sample_size={config.sample_size} must be a multiple of {coarsest}, because it is halved between the "
                f"{len(channels)} levels of block_out_channels, with patches of size {patch}."
            )
        sizes = [config.sample_size // patch >> level for level in range(len(channels))]
        for size in config.attention_resolutions:
            if size not in sizes:
                raise ValueError(
                    f"attention_resolutions={tuple(config.attention_resolutions)} has {size}, but no level has "
                    f"this height; choose from {', '.join(map(str, sizes))}."
                )
        if channels[0] % 2:
            raise ValueError(
                f"block_out_channels={tuple(channels)} must begin with an even number, for sines and cosines of time."
            )
        for width, size in zip(channels, sizes, strict=True):
            if width < 1 or width % groups:
                raise ValueError(
                    f"block_out_channels={tuple(channels)} must be multiples of norm_num_groups={groups}."
                )
            if (size in config.attention_resolutions or size == sizes[-1]) and width % head_dim:
                raise ValueError(
                    f"block_out_channels={tuple(channels)} must be multiples of attention_head_dim={head_dim} where "
                    "the network has transformers: at attention_resolutions, and at the last level."
                )

    def _check_inputs(
        self,
        sample: torch.Tensor,
        slots: torch.Tensor,
        keep: torch.Tensor | None,
        timestep: torch.Tensor,
        sketch: torch.Tensor | None,
        masks: torch.Tensor | None,
    ) -> None:
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if sample.ndim != 4 or tuple(sample.shape[1:]) != expected:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}, expected (batch, {', '.join(map(str, expected))}): pass "
                "latents, not images, of the image size that this U-Net was built for."
            )
        if slots.ndim != 3 or slots.shape[0] != sample.shape[0] or slots.shape[2] != config.cross_attention_dim:
            raise ValueError(
                f"encoder_hidden_states has shape {tuple(slots.shape)}, expected ({sample.shape[0]}, slots, "
                f"{config.cross_attention_dim}): the slots of each image in the batch."
            )
        if not slots.shape[1]:
            raise ValueError("encoder_hidden_states has no slots; expected at least one per image.")
        if keep is not None and (keep.shape != slots.shape[:2] or keep.dtype != torch.bool):
            raise ValueError(
                f"encoder_attention_mask is {keep.dtype} of shape {tuple(keep.shape)}, expected torch.bool of shape "
                f"{tuple(slots.shape[:2])}: the slots to attend to."
            )
        expected = (sample.shape[0], config.sketch_channels, config.sample_size, config.sample_size)
        if (sketch is None) != (not config.sketch_channels) or (sketch is not None and sketch.shape != expected):
            found = "missing" if sketch is None else f"of shape {tuple(sketch.shape)}"
            wanted = f"a tensor of shape {expected}" if config.sketch_channels else "none, as sketch_channels=0"
            raise ValueError(f"sketch is {found}, expected {wanted}.")
        if (masks is None) != (not config.layout_channels) or (
            masks is not None and (masks.ndim != 4 or masks.shape[:2] != slots.shape[:2])
        ):
            found = "missing" if masks is None else f"of shape {tuple(masks.shape)}"
            wanted = f"(batch, {slots.shape[1]}, height, width), one mask per slot"
            raise ValueError(
                f"masks is {found}, expected {wanted if config.layout_channels else 'none, as layout_channels=0'}."
            )
        if timestep.ndim > 1 or (timestep.ndim and timestep.shape[0] not in (sample.shape[0], 1)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}, expected one number, or one for each of the "
                f"{sample.shape[0]} images in the batch."
            )
        # On an accelerator, reading the values would wait for all pending computations.
        if timestep.device.type == "cpu" and not torch.compiler.is_compiling():
            first, last = timestep.min().item(), timestep.max().item()
            if not (first >= 0 and last <= config.num_train_timesteps - 1):  # NaN compares false
                raise ValueError(
                    f"timestep has values from {first} to {last}, expected 0 to {config.num_train_timesteps - 1}: "
                    f"the U-Net has num_train_timesteps={config.num_train_timesteps}."
                )

    def _run(self, layer: nn.Module, *args: torch.Tensor | None) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, *args)
        return layer(*args)

    def to_residual(
        self, latents: torch.Tensor, sketch: torch.Tensor | None, masks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the latents that the U-Net works with, from the latents of images; see `residual_scale`.

        Args:
            latents: (batch, channels, rows, columns).
            sketch: Latents of the painted images, of the same shape.
            masks: The mask of each slot, for `residual_scales`.

        Returns:
            The shape of `latents`.
        """
        if not self.config.residual_scale:
            return latents
        return (latents - sketch.to(latents)) / self.residual_scales(masks)

    def from_residual(
        self, latents: torch.Tensor, sketch: torch.Tensor | None, masks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the latents of images, the inverse of `to_residual`."""
        if not self.config.residual_scale:
            return latents
        return sketch.to(latents) + self.residual_scales(masks) * latents

    def residual_scales(self, masks: torch.Tensor | None) -> torch.Tensor | float:
        """Compute the scale of the difference from the sketch at each place.

        Let g(x) be the share of the ground in a patch of latents: the mean of the largest mask. The scale is

            residual_scale * (1 - g(x) + 0.001)^residual_power.

        With one scale for all places, small errors of the U-Net would be visible as grain on the ground. Lee et al.
        2022, "PriorGrad", adapt the noise of diffusion to the data as well.

        Args:
            masks: The mask of each slot, (batch, slots, height, width).

        Returns:
            (batch, 1, sample_size, sample_size), or `residual_scale` if `residual_power` is 0.

        Raises:
            ValueError: If the masks are missing.
        """
        config = self.config
        if not config.residual_power:
            return config.residual_scale
        if masks is None:
            raise ValueError(f"masks is missing, but residual_power={config.residual_power} needs it; pass the masks.")
        return config.residual_scale * self.object_share(masks).pow(config.residual_power)

    def object_share(self, masks: torch.Tensor) -> torch.Tensor:
        """Return 1 - g(x) + 0.001 of `residual_scales`, (batch, 1, sample_size, sample_size)."""
        config = self.config
        areas = F.adaptive_avg_pool2d(masks.float(), config.sample_size // config.patch_size)
        largest = areas.mean((2, 3)).argmax(dim=1)
        ground = areas[torch.arange(len(areas), device=areas.device), largest, None]
        return F.interpolate(1 - ground + GROUND_SHARE, scale_factor=config.patch_size, mode="nearest")

    def _gather_inputs(
        self, sample: torch.Tensor, slots: torch.Tensor, sketch: torch.Tensor | None, masks: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the patches of the latents and of the sketch, and the slots where their masks are."""
        if sketch is not None:
            sample = torch.cat([sample, sketch], dim=1)
        inputs = F.pixel_unshuffle(sample, self.config.patch_size)
        if masks is None:
            return inputs
        areas = F.adaptive_avg_pool2d(masks.to(slots.dtype), inputs.shape[-2:])
        painted = torch.einsum("bkhw,bkc->bchw", areas, self.layout(slots))
        return torch.cat([inputs, painted.to(inputs.dtype)], dim=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        sketch: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
    ) -> SlotUNetOutput | tuple[torch.Tensor]:
        """Predict the noise.

        Args:
            sample: Noisy latents, (batch, in_channels, sample_size, sample_size).
            timestep: From 0 (almost no noise) to `num_train_timesteps` - 1 (almost only noise); one number, or
                (batch,). The range is only checked for numbers and for tensors on the CPU.
            encoder_hidden_states: Slots, (batch, slots, cross_attention_dim); any number of slots, in any order.
            encoder_attention_mask: The slots to attend to, bool (batch, slots), at least one per row. Defaults to all
                slots.
            return_dict: Whether to return a `SlotUNetOutput` instead of a tuple.
            sketch: Latents of the sketch, (batch, sketch_channels, sample_size, sample_size).
            masks: The mask of each slot in the sketch, (batch, slots, height, width), of any size that is a multiple
                of the finest feature map. For `layout_channels`.

        Returns:
            The noise, as `.sample` or the first element.

        Raises:
            ValueError: If a shape does not match the config, or a timestep is out of range.
        """
        # A number stays on the CPU until it is checked.
        timestep = torch.as_tensor(timestep)
        self._check_inputs(sample, encoder_hidden_states, encoder_attention_mask, timestep, sketch, masks)
        slots, keep = encoder_hidden_states, encoder_attention_mask
        time = self.time_embedding(timestep.to(sample.device).reshape(-1).expand(sample.shape[0]), sample.dtype)

        hidden = self.conv_in(self._gather_inputs(sample, slots, sketch, masks))
        skips = [hidden]
        for layer in self.down_layers:
            hidden = self._run(layer, hidden, time, slots, keep)
            skips.append(hidden)
        for layer in self.middle_layers:
            hidden = self._run(layer, hidden, time, slots, keep)
        for layer in self.up_layers:
            if layer.residual.resample is None:
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = self._run(layer, hidden, time, slots, keep)
        noise = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(hidden))), self.config.patch_size)
        return SlotUNetOutput(sample=noise) if return_dict else (noise,)
