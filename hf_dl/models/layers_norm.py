"""Normalization layers for images, from their definitions: batch, instance, batch-instance, layer and group.

All layers take x of shape (batch, channels, height, width). They subtract a mean, divide by a standard deviation, and
apply a learned scale and shift per channel:

    y = weight * (x - mean) / sqrt(var + eps) + bias

They differ only in the values that share a mean and a variance:

- batch: all values of a channel (Ioffe & Szegedy 2015);
- instance: all values of a channel of an image (Ulyanov et al. 2016);
- batch-instance: a learned mixture of these two (Nam & Kim 2018);
- layer: all values of an image (Ba et al. 2016);
- group: all values of a group of channels of an image (Wu & He 2018).

`standardize_plainly` is the formula in plain operations. layers_norm_kernel.py computes the same with fewer passes
over x. The kernel runs unless the model is compiled.

Differences from the layers of torch.nn:

- Statistics are computed from a shifted x in float32 or float64 and pooled in float64. They are therefore exact for a
  mean of 10^4 with a deviation of 1, and for bfloat16. The result has the dtype of x, also under autocast.
- `InstanceNorm2d` has a scale and a shift by default, like the other layers.
- `LayerNorm2d` has one scale and shift per channel, not per pixel, unless `image_size` is set.
- `BatchNorm2d(sync=True)` shares its statistics between the processes of a distributed run.
- Second derivatives are not supported in eager mode and raise an error.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization as init

from .layers_norm_kernel import Given, Pool, Standardize, compute_dtypes, pool_moments, shares_of


def standardize_plainly(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    sources: Sequence[Pool | Given],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Compute `standardize` in plain operations. A compiler fuses them; without it, each is a pass over x."""
    dtype, wide = compute_dtypes(x)
    pixels, values = x.shape[2] * x.shape[3], x.to(dtype)
    if any(isinstance(source, Pool) for source in sources):
        # Moments of each channel of each image. Subtracting a first estimate of the mean keeps them exact.
        pivot = values.detach().mean((2, 3))
        centered = values - pivot[:, :, None, None]
        rest = centered.mean((2, 3))
        var = (centered - rest[:, :, None, None]).square().mean((2, 3)).to(wide)
        pivot = pivot.to(wide)
        mean = pivot + rest.to(wide)
    else:
        mean = var = None
        pivot = sources[0][0].to(dtype).expand(x.shape[:2]).to(wide)
        centered = values - pivot.to(dtype)[:, :, None, None]
    # y = scale * (x - pivot) + shift, with the contributions of all sources added up.
    scale, shift, first = 0.0, 0.0, None
    for share, source in zip(shares_of(None if gate is None else gate.to(wide)), sources, strict=True):
        pooled_mean, pooled_var, count = pool_moments(source, mean, var, pixels)
        pooled_mean, pooled_var = pooled_mean.to(wide), pooled_var.to(wide)
        inv = (pooled_var + eps).rsqrt()
        scale = scale + share * inv
        shift = shift + share * inv * (pivot - pooled_mean)
        first = first or (pooled_mean.detach().squeeze(0), pooled_var.detach().squeeze(0), count)
    if weight is not None:
        scale, shift = scale * weight.to(wide), shift * weight.to(wide)
    if bias is not None:
        shift = shift + bias.to(wide)
    scale, shift = (v.expand(x.shape[:2]).to(dtype)[:, :, None, None] for v in (scale, shift))
    return (centered * scale + shift).to(x.dtype), *first


_standardize_outside_graphs = torch.compiler.disable(Standardize.apply)


def standardize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    sources: Sequence[Pool | Given],
    *,
    eps: float,
    gate: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Subtract the mean, divide by the standard deviation, then scale and shift.

    Args:
        x: (batch, channels, height, width).
        weight: Scale per channel, (channels,). `None` for 1.
        bias: Shift per channel, (channels,). `None` for 0.
        sources: One source of mean and variance, or two that `gate` mixes. A `Pool` computes them from x; a pair
            (mean, variance) gives them directly.
        eps: Added to the variance.
        gate: Share of the first of two sources per channel, (channels,), in [0, 1].

    Returns:
        y, of the shape and dtype of x; and the mean, the variance and the pixel count of the first source.

    Raises:
        ValueError: If x does not have four dimensions.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, channels, height, width).")
    if not torch.compiler.is_compiling():
        return Standardize.apply(x, weight, bias, gate, sources, eps)
    if any(isinstance(source, Pool) and source.sync for source in sources):
        return _standardize_outside_graphs(x, weight, bias, gate, sources, eps)
    return standardize_plainly(x, weight, bias, gate, sources, eps)


class NormLayer:
    """The methods of normalization classes that models use. Every class in `NORMS` has them.

    Models call `make` to create a layer and `reset_parameters` to initialize it; their configs call `check_channels`.
    """

    has_shift = True  # whether the layer shifts each channel; if not, the convolution before it has a bias

    @classmethod
    def make(cls, channels: int, **options: Any) -> nn.Module:
        """Make a layer.

        Args:
            channels: Channels of the images.
            **options: Options of any layer in `NORMS`. A layer takes its own and ignores the others.

        Returns:
            The layer.
        """
        return cls(channels)

    @classmethod
    def check_channels(cls, channels: int, **options: Any) -> None:
        """Check that `make` accepts a number of channels. By default, it accepts any number.

        Args:
            channels: Channels of the images.
            **options: As in `make`.

        Raises:
            ValueError: If the layer does not accept this number of channels.
        """

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the scale to 1 and the shift to 0, and forget the running averages.

        Values that `from_pretrained` loaded are not changed.
        """
        if getattr(self, "weight", None) is not None:
            init.ones_(self.weight)
        if getattr(self, "bias", None) is not None:
            init.zeros_(self.bias)
        if getattr(self, "running_mean", None) is not None:
            init.zeros_(self.running_mean)
            init.ones_(self.running_var)
            init.zeros_(self.num_batches_tracked)


class Norm2d(NormLayer, nn.Module):
    """Base class of the normalization layers: a learned scale and shift per channel, and a check of the input.

    A new layer needs a `forward`, and a `reset_parameters` if it has parameters besides scale and shift.

    Args:
        channels: Channels of the images, at least 1.
        eps: Added to the variance.
        affine: Whether to learn a scale and a shift.
        shape: Shape of scale and shift. Defaults to (channels,).

    Raises:
        ValueError: If `channels` is less than 1.
    """

    def __init__(self, channels: int, eps: float = 1e-5, *, affine: bool = True, shape: Sequence[int] | None = None):
        super().__init__()
        if channels < 1:
            raise ValueError(f"The number of channels is {channels}. It must be at least 1.")
        self.eps, self.affine = eps, affine
        self._channels = channels
        shape = (channels,) if shape is None else tuple(shape)
        self.weight = nn.Parameter(torch.ones(shape)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape)) if affine else None

    def _check(self, x: torch.Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self._channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected (batch, {self._channels}, height, width) "
                f"for {type(self).__name__}({self.extra_repr()})."
            )

    def extra_repr(self) -> str:
        """Return the text that `print` shows in the parentheses of the layer."""
        return f"{self._channels}, eps={self.eps}, affine={self.affine}"


class BatchNorm2d(Norm2d):
    """Normalize each channel over batch, height and width.

        mean_c = mean of x[:, c, :, :],    var_c = mean of (x[:, c, :, :] - mean_c)^2

    Training uses the statistics of the batch and keeps running averages of them. The running variance is unbiased
    (divided by n - 1). Evaluation uses the running averages. State dicts are compatible with `torch.nn.BatchNorm2d`.

    In a distributed run, each process uses the statistics of its own batch, as with `torch.nn.BatchNorm2d`.
    `DistributedDataParallel` copies the running averages of the first process to all processes before each forward
    pass. With `sync=True`, all processes use the statistics of the whole batch, as with `torch.nn.SyncBatchNorm`. This
    takes two small reductions per forward and backward pass.

    Args:
        num_features: C, number of channels.
        eps: Added to the variance.
        momentum: Weight of the new statistics in the running averages. `None` for the plain average of all batches.
        affine: Whether to learn a scale and a shift.
        track_running_stats: Whether to keep running averages. Without them, evaluation uses the batch, too.
        sync: Whether the processes of a distributed run share their statistics during training.

    Raises:
        ValueError: If a channel has a single value during training. It has no variance then.

    Example:
        ```python
        >>> BatchNorm2d(16)(torch.randn(8, 16, 32, 32)).shape
        torch.Size([8, 16, 32, 32])

        ```
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        sync: bool = False,
    ):
        super().__init__(num_features, eps=eps, affine=affine)
        self.num_features, self.momentum = num_features, momentum
        self.track_running_stats, self.sync = track_running_stats, sync
        self.register_buffer("running_mean", torch.zeros(num_features) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones(num_features) if track_running_stats else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if track_running_stats else None)

    def extra_repr(self) -> str:
        """Return the text that `print` shows in the parentheses of the layer."""
        shared = ", sync=True" if self.sync else ""
        return f"{super().extra_repr()}, momentum={self.momentum}{shared}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x, (batch, channels, height, width); in training, also update the running averages."""
        y, *statistics = standardize(x, self.weight, self.bias, [self._source(x)], eps=self.eps)
        self._track(*statistics)
        return y

    def _source(self, x: torch.Tensor) -> Pool | Given:
        self._check(x)
        if not self.training and self.track_running_stats:
            return self.running_mean, self.running_var
        sync = self.sync and self.training and dist.is_available() and dist.is_initialized()
        if x.numel() <= self.num_features and not sync:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, at most one value per channel, which has no variance. Train with "
                "larger batches or images, or call eval()."
            )
        return Pool(over_batch=True, sync=sync)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor | float) -> None:
        if not (self.training and self.track_running_stats):
            return
        self.num_batches_tracked.add_(1)
        momentum = self.num_batches_tracked.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_(running.to(new.dtype) * (1 - momentum) + new * momentum)


class InstanceNorm2d(Norm2d):
    """Normalize each channel of each image over height and width.

        mean_nc = mean of x[n, c, :, :],    var_nc = mean of (x[n, c, :, :] - mean_nc)^2

    The layer keeps no running averages. State dicts are compatible with `torch.nn.InstanceNorm2d(affine=True)`.

    Args:
        num_features: C, number of channels.
        eps: Added to the variance.
        affine: Whether to learn a scale and a shift.

    Raises:
        ValueError: If images have a single pixel, which would always become zero.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, *, affine: bool = True):
        super().__init__(num_features, eps=eps, affine=affine)
        self.num_features = num_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x, (batch, channels, height, width)."""
        self._check(x)
        if x.shape[2] * x.shape[3] == 1:
            raise ValueError(
                f"x has shape {tuple(x.shape)}. The instance norm of a single pixel is always zero. Use larger images "
                "or another norm."
            )
        return standardize(x, self.weight, self.bias, [Pool()], eps=self.eps)[0]


class BatchInstanceNorm2d(BatchNorm2d):
    """Mix batch and instance normalization with a learned gate rho in [0, 1] per channel.

        y = weight * (rho * x_batch + (1 - rho) * x_instance) + bias

    Nam & Kim 2018, equation 3. rho starts at 1, which is batch normalization. The paper clips rho to [0, 1] after each
    update. This layer clips it at the next forward pass, so that any training loop works. A checkpoint may therefore
    contain a value slightly outside; it counts as the bound. Evaluation uses running averages for the batch part.

    Args:
        num_features: C, number of channels.
        eps: Added to the variances.
        momentum: See `BatchNorm2d`.
        affine: Whether to learn a scale and a shift.
        gate_multiplier: Factor by which the gradient of rho is multiplied. Defaults to 10, as in the paper. With SGD
            this is a separate learning rate. Adam ignores the scale of gradients; use a parameter group there.
        sync: See `BatchNorm2d`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        momentum: float | None = 0.1,
        affine: bool = True,
        gate_multiplier: float = 10.0,
        sync: bool = False,
    ):
        super().__init__(num_features, eps, momentum=momentum, affine=affine, sync=sync)
        self.gate_multiplier = gate_multiplier
        self.gate = nn.Parameter(torch.ones(num_features))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset scale, shift and running averages, and set rho to 1."""
        super().reset_parameters()
        init.ones_(self.gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x, (batch, channels, height, width); in training, also update the running averages."""
        if self.training:
            # Through .data, so that the backward pass of an earlier forward pass accepts the in-place change.
            self.gate.data.clamp_(0, 1)
        # The value is clipped but its gradient is not; otherwise a gate outside the bounds could never return.
        multiplied = self.gate * self.gate_multiplier
        rho = multiplied + (self.gate.clamp(0, 1) - multiplied).detach()
        sources = [self._source(x), Pool()]
        y, *statistics = standardize(x, self.weight, self.bias, sources, eps=self.eps, gate=rho)
        self._track(*statistics)
        return y


class GroupNorm2d(Norm2d):
    """Normalize each group of channels of each image over its channels, height and width.

        mean_ng = mean of x[n, channels of group g, :, :],    var_ng = mean of (x[n, ...] - mean_ng)^2

    State dicts are compatible with `torch.nn.GroupNorm`.

    Args:
        num_groups: Number of groups of neighboring channels. One group is layer normalization, and one group per
            channel is instance normalization.
        num_channels: C, a multiple of `num_groups`.
        eps: Added to the variance.
        affine: Whether to learn a scale and a shift per channel.

    Raises:
        ValueError: If `num_groups` does not divide `num_channels`.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, *, affine: bool = True):
        super().__init__(num_channels, eps=eps, affine=affine)
        self.check_channels(num_channels, num_groups=num_groups)
        self.num_groups, self.num_channels = num_groups, num_channels

    @classmethod
    def make(cls, channels: int, *, num_groups: int | None = None, **options: Any) -> "GroupNorm2d":
        """Make a layer with `num_groups` groups. Defaults to 8, or to one per channel for fewer than 8 channels."""
        return cls(min(8, channels) if num_groups is None else num_groups, channels)

    @classmethod
    def check_channels(cls, channels: int, *, num_groups: int | None = None, **options: Any) -> None:
        """Raise ValueError unless the number of groups divides the number of channels."""
        num_groups = min(8, channels) if num_groups is None else num_groups
        if num_groups < 1 or channels % num_groups:
            raise ValueError(f"num_groups={num_groups} must divide num_channels={channels}.")

    def extra_repr(self) -> str:
        """Return the text that `print` shows in the parentheses of the layer."""
        return f"{self.num_groups}, {super().extra_repr()}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x, (batch, channels, height, width)."""
        self._check(x)
        return standardize(x, self.weight, self.bias, [Pool(groups=self.num_groups)], eps=self.eps)[0]


class LayerNorm2d(Norm2d):
    """Normalize each image over channels, height and width.

        mean_n = mean of x[n, :, :, :],    var_n = mean of (x[n, :, :, :] - mean_n)^2

    Args:
        num_channels: C, number of channels.
        eps: Added to the variance.
        affine: Whether to learn a scale and a shift.
        image_size: (height, width) of the images, to learn a scale and a shift per value as `torch.nn.LayerNorm` does.
            The layer then accepts images of this size only. A ResNet-14 for 256x256 images has 16.8 million of them,
            besides 173 thousand other weights. Defaults to a scale and a shift per channel.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        *,
        affine: bool = True,
        image_size: tuple[int, int] | None = None,
    ):
        shape = None if image_size is None else (num_channels, *image_size)
        super().__init__(num_channels, eps=eps, affine=affine, shape=shape)
        self.num_channels = num_channels
        self.image_size = None if image_size is None else tuple(image_size)

    @classmethod
    def make(cls, channels: int, *, image_size: tuple[int, int] | None = None, **options: Any) -> "LayerNorm2d":
        """Make a layer. With `image_size`, it has a scale and a shift per value of an image."""
        return cls(channels, image_size=image_size)

    def extra_repr(self) -> str:
        """Return the text that `print` shows in the parentheses of the layer."""
        return super().extra_repr() + ("" if self.image_size is None else f", image_size={self.image_size}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x, (batch, channels, height, width)."""
        self._check(x)
        if self.image_size is None:
            return standardize(x, self.weight, self.bias, [Pool(groups=1)], eps=self.eps)[0]
        if tuple(x.shape[2:]) != self.image_size:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but the layer has one scale per pixel of images of size "
                f"{self.image_size[0]}x{self.image_size[1]}. Without image_size, it accepts images of any size."
            )
        y = standardize(x, None, None, [Pool(groups=1)], eps=self.eps)[0]
        return y * self.weight.to(y.dtype) + self.bias.to(y.dtype) if self.affine else y


class NoNorm(NormLayer, nn.Identity):
    """No normalization: return the input. The convolution before it has a bias."""

    has_shift = False


class TorchBatchNorm2d(NormLayer, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, as a reference for `BatchNorm2d`."""


# From name to class. To add a normalization, write a subclass of `Norm2d` and enter it here.
NORMS: dict[str, type[NormLayer]] = {
    "none": NoNorm,
    "batch": BatchNorm2d,
    "instance": InstanceNorm2d,
    "batch_instance": BatchInstanceNorm2d,
    "layer": LayerNorm2d,
    "group": GroupNorm2d,
    "torch_batch": TorchBatchNorm2d,
}


def check_norm(norm: str, widths: Sequence[int] = (), **options: Any) -> None:
    """Check that a normalization exists and accepts the channels of a network.

    Args:
        norm: A key of `NORMS`.
        widths: Channels of the layers of the network.
        **options: Options of any layer, as in `make_norm`.

    Raises:
        ValueError: If the name is unknown, or the layer does not accept one of `widths`.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown. Choose one of: {', '.join(NORMS)}.")
    for channels in widths:
        try:
            NORMS[norm].check_channels(channels, **options)
        except ValueError as error:
            raise ValueError(f"widths={list(widths)} do not fit norm={norm!r}: {error}") from error


def make_norm(norm: str, channels: int, **options: Any) -> nn.Module:
    """Make a normalization layer by name.

    Args:
        norm: A key of `NORMS`.
        channels: Channels of the images.
        **options: Options of any layer: `num_groups` of "group", `image_size` of "layer". A layer takes its own and
            ignores the others.

    Returns:
        A layer from (batch, channels, height, width) to the same shape.

    Raises:
        ValueError: If the name is unknown.

    Example:
        ```python
        >>> make_norm("group", 16, num_groups=4)
        GroupNorm2d(4, 16, eps=1e-05, affine=True)

        ```
    """
    check_norm(norm)
    return NORMS[norm].make(channels, **options)
