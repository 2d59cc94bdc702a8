"""Normalization layers for images, from their definitions: batch, instance, batch-instance, layer and group.

Ioffe & Szegedy 2015 (batch), Ba et al. 2016 (layer), Ulyanov et al. 2016 (instance), Nam & Kim 2018 (batch-instance),
Wu & He 2018 (group). All take x of (batch, channels, height, width), subtract a mean, divide by a standard deviation
and apply a learned scale and shift for each channel:

    y = weight * (x - mean) / sqrt(var + eps) + bias

and differ only in which values share a mean and a variance. Each value that is shared is a mean over the moments of
single channels of single images, by the law of total variance: var = E[var_nc] + Var[mean_nc]. So one pass over x for
the moments of each (image, channel) serves all five, what is pooled is of (batch, channels) and costs nothing, and a
second pass over x writes y = scale * (x - pivot) + shift. The backward pass likewise needs two sums for each (image,
channel) and writes one combination of x and the gradient. Both are written out in `_Standardize`.

What differs from torch.nn's layers:

- Statistics are those of a shifted x, in float32 or wider, pooled in float64: means of 10^4 with deviations of 1 are
  no trouble, nor is bfloat16. The result has the dtype of x, also under autocast.
- `InstanceNorm2d` has scale and shift unless told otherwise, as the other layers have.
- `LayerNorm2d` has them for each channel, not for each pixel, unless told the height and width.
- `BatchNorm2d(sync=True)` shares its statistics between the processes of a distributed run.
- No second derivatives in eager mode (asking for them raises).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_BLOCK_BYTES = 2**18  # a few of them stay in a core's cache between the passes


@dataclass(frozen=True)
class _Pool:
    """Which (image, channel) pairs share a mean and a variance; the default is none, each has its own.

    Args:
        over_batch: All images share them.
        sync: So do the images of all processes.
        groups: The channels of each of so many groups share them; 0 for none.
    """

    over_batch: bool = False
    sync: bool = False
    groups: int = 0

    def average(self, values: torch.Tensor, pixels: int) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Average over what shares.

        Args:
            values: (batch, channels), each a mean over the pixels of one channel of one image.
            pixels: How many.

        Returns:
            The averages, of a shape that broadcasts to (batch, channels), and how many pixels each is over.
        """
        batch, channels = values.shape
        if self.groups:
            grouped = values.unflatten(1, (self.groups, -1)).mean(2, keepdim=True)
            return grouped.expand(-1, -1, channels // self.groups).flatten(1), pixels * channels // self.groups
        if not self.over_batch:
            return values, pixels
        if not self.sync:
            return values.mean(0, keepdim=True), batch * pixels
        # Processes may hold different numbers of images, of different sizes: sums and counts travel, not means.
        total = torch.cat([values.sum(0) * pixels, values.new_tensor([batch * pixels])])
        dist.all_reduce(total)
        return total[:-1].unsqueeze(0) / total[-1], total[-1]


# Statistics that are given, as a BatchNorm2d has them in evaluation: (mean, variance), each (channels,).
_Given = tuple[torch.Tensor, torch.Tensor]


def _statistics(
    source: _Pool | _Given, mean: torch.Tensor | None, var: torch.Tensor | None, pixels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Pool moments of (batch, channels): the mean, the variance, and how many pixels they are over."""
    if not isinstance(source, _Pool):
        return source[0].unsqueeze(0), source[1].unsqueeze(0), 0
    pooled_mean, count = source.average(mean, pixels)
    pooled_var, _ = source.average(var + (mean - pooled_mean).square(), pixels)  # law of total variance
    return pooled_mean, pooled_var, count


def _shares(gate: torch.Tensor | None) -> tuple[torch.Tensor | float, ...]:
    """How much of each standardized x the result has: all of the only one, or rho and 1 - rho of the two."""
    return (1.0,) if gate is None else (gate, 1 - gate)


def _dtypes(x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the passes over x and of the pooled statistics."""
    if x.dtype == torch.float64:
        return torch.float64, torch.float64
    return torch.float32, torch.float32 if x.device.type == "mps" else torch.float64  # Metal has no float64


def _rows(x: torch.Tensor) -> torch.Tensor:
    """View x as (rows, columns, pixels), rows being what blocks are cut along.

    Rows are channels of images, or whole images where the channels of a pixel lie together (channels_last).
    """
    batch, channels, height, width = x.shape
    if x.is_contiguous():
        return x.view(batch * channels, 1, height * width)
    return x.permute(0, 2, 3, 1).view(batch, height * width, channels).transpose(1, 2)


def _blocks(
    x: torch.Tensor, *others: torch.Tensor, scratch: Sequence[torch.dtype] = ()
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut tensors of as many rows as x along them into blocks that fit the cache.

    For each dtype of `scratch`, blocks come with room for a result of their shape, the same for all, so that it stays
    in the cache.
    """
    size = _BLOCK_BYTES
    if x.device.type != "cpu":
        size *= 256  # so that launches do not count
    elif (threads := torch.get_num_threads()) > 1:
        size *= 4 * threads  # each pass over a block ends in a wait for the slowest thread; so fewer of them
    step = max(1, size // max(1, x[:1].numel() * max(4, x.element_size())))
    blocks = [tensor.split(step) for tensor in (x, *others)]
    first, last = blocks[0][0], blocks[0][-1]
    for dtype in scratch:
        room = torch.empty_strided(first.shape, first.stride(), dtype=dtype, device=x.device)
        blocks.append([room] * (len(blocks[0]) - 1) + [room[: len(last)]])
    return zip(*blocks, strict=True)


class _Standardize(torch.autograd.Function):
    """y = weight * sum_k share_k (x - mean_k) / sqrt(var_k + eps) + bias, for one or two sources of statistics.

    With inv = 1 / sqrt(var + eps), xhat = (x - mean) * inv and g = weight * share * dy, the gradient through one
    source is (Ioffe & Szegedy 2015, section 3, its three paths added up)

        dx = inv * (g - E[g] - xhat * E[g * xhat])

    with E the average over what shares the statistics; both averages vanish for statistics that are given.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        gate: torch.Tensor | None,
        sources: Sequence[_Pool | _Given],
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | float]:
        """Standardize; also returns the first source's mean, variance and count."""
        if not x.is_contiguous():
            last = x.is_contiguous(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        dtype, wide = _dtypes(x)
        batch, channels = x.shape[:2]
        rows, pixels = _rows(x), x.shape[2] * x.shape[3]
        columns = (*rows.shape[:2], 1)

        if any(isinstance(source, _Pool) for source in sources):
            # Two steps: x minus its mean as far as float32 holds it, then the mean and the square of the rest.
            pivot, rest, square = (x.new_empty(columns, dtype=dtype) for _ in range(3))
            for block, m, r, s, d, d2 in _blocks(rows, pivot, rest, square, scratch=(dtype, dtype)):
                torch.sum(block, 2, True, dtype=dtype, out=m).mul_(1 / pixels)
                torch.sub(block, m, out=d)
                torch.sum(d, 2, True, out=r)
                torch.sum(torch.mul(d, d, out=d2), 2, True, out=s)
            pivot, rest, square = (values.view(batch, channels).to(wide) for values in (pivot, rest, square))
            rest, square = rest / pixels, square / pixels
            mean, var = pivot + rest, (square - rest.square()).clamp_(min=0)
        else:
            mean = var = None
            pivot = sources[0][0].to(dtype).expand(batch, channels).to(wide)
        # x whose mean is within a few deviations of zero loses nothing by not being shifted, and saves three passes.
        # Looking costs a wait on other devices.
        spread = sources[0][1].to(wide) if var is None else var
        center = x.device.type != "cpu" or bool((pivot.square() > 16 * (spread + eps)).any())
        if not center:
            pivot = torch.zeros_like(pivot)

        shares = _shares(None if gate is None else gate.to(wide))
        factor = pivot.new_ones(()) if weight is None else weight.to(wide)
        scale = shift = 0.0
        saved = []
        for share, source in zip(shares, sources, strict=True):
            pooled_mean, pooled_var, count = _statistics(source, mean, var, pixels)
            pooled_mean, pooled_var = pooled_mean.to(wide), pooled_var.to(wide)
            inv = (pooled_var + eps).rsqrt()
            offset = (pivot - pooled_mean) * inv  # xhat where x is the pivot
            scale = scale + factor * share * inv
            shift = shift + factor * share * offset
            if not saved:
                first = (pooled_mean.squeeze(0), pooled_var.squeeze(0), count)
            saved += [inv, offset]
        shift = shift if bias is None else shift + bias.to(wide)

        y = torch.empty_like(x)
        pivot = pivot.to(dtype).contiguous()
        scale, shift = (values.expand(batch, channels).to(dtype) for values in (scale, shift))
        views = (rows, _rows(y), *(values.reshape(columns) for values in (pivot, scale, shift)))
        if y.dtype == dtype:
            for block, out, m, a, b in _blocks(*views):
                (torch.sub(block, m, out=out).mul_(a) if center else torch.mul(block, a, out=out)).add_(b)
        else:
            for block, out, m, a, b, result in _blocks(*views, scratch=(dtype,)):
                out.copy_(torch.sub(block, m, out=result).mul_(a).add_(b))

        ctx.save_for_backward(x, weight, gate, pivot, scale, *saved)
        ctx.sources, ctx.center, ctx.bias_dtype = sources, center, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*(value for value in first if isinstance(value, torch.Tensor)))
        return y, *first

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x, weight, bias and gate."""
        x, weight, gate, pivot, scale, *saved = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
        dtype, wide = _dtypes(x)
        batch, channels = x.shape[:2]
        rows, gradients, pixels = _rows(x), _rows(dy), x.shape[2] * x.shape[3]
        columns = (*rows.shape[:2], 1)
        pivots = pivot.view(columns)

        # For each (image, channel): the means of dy and of dy * (x - pivot).
        dy_mean, dy_x_mean = (x.new_empty(columns, dtype=dtype) for _ in range(2))
        views = (rows, gradients, pivots, dy_mean, dy_x_mean)
        for block, g, m, sum_g, sum_gx, d, product in _blocks(*views, scratch=(dtype, dtype)):
            d = torch.sub(block, m, out=d) if ctx.center else block
            torch.sum(g, 2, True, dtype=dtype, out=sum_g)
            torch.sum(torch.mul(d, g, out=product), 2, True, out=sum_gx)
        dy_mean, dy_x_mean = (values.view(batch, channels).to(wide) / pixels for values in (dy_mean, dy_x_mean))

        factor = dy_mean.new_ones(()) if weight is None else weight.to(wide)
        shares = _shares(None if gate is None else gate.to(wide))
        slope = constant = None  # dx = scale * dy + slope * (x - pivot) + constant
        standardized = []  # E[dy * xhat] of each source
        for share, source, inv, offset in zip(shares, ctx.sources, saved[::2], saved[1::2], strict=True):
            dy_xhat_mean = dy_x_mean * inv + dy_mean * offset
            standardized.append(dy_xhat_mean)
            if isinstance(source, _Pool):
                g, _ = source.average(factor * share * dy_mean, pixels)
                g_xhat, _ = source.average(factor * share * dy_xhat_mean, pixels)
                slope = (0.0 if slope is None else slope) - inv * inv * g_xhat
                constant = (0.0 if constant is None else constant) - inv * (g + offset * g_xhat)

        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            rescaled = scale.reshape(columns)
            if slope is None:  # the statistics were given
                for g, out, a, result in _blocks(gradients, _rows(dx), rescaled, scratch=(dtype,)):
                    out.copy_(torch.mul(g, a, out=result))
            else:
                slope, constant = (v.expand(batch, channels).to(dtype).reshape(columns) for v in (slope, constant))
                views = (rows, gradients, _rows(dx), pivots, rescaled, slope, constant)
                if dx.dtype == dtype:
                    for block, g, out, m, a, c1, c0 in _blocks(*views):
                        d = torch.sub(block, m, out=out).mul_(c1) if ctx.center else torch.mul(block, c1, out=out)
                        d.add_(c0).addcmul_(g, a)
                else:
                    for block, g, out, m, a, c1, c0, result in _blocks(*views, scratch=(dtype,)):
                        out.copy_(torch.sub(block, m, out=result).mul_(c1).add_(c0).addcmul_(g, a))

        dweight = dbias = dgate = None
        if weight is not None and ctx.needs_input_grad[1]:
            mixed = sum(share * values for share, values in zip(shares, standardized, strict=True))
            dweight = (mixed.sum(0) * pixels).to(weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            dbias = (dy_mean.sum(0) * pixels).to(ctx.bias_dtype)
        if gate is not None and ctx.needs_input_grad[3]:
            of_batch, of_instance = standardized
            dgate = ((factor * (of_batch - of_instance)).sum(0) * pixels).to(gate.dtype)
        return dx, dweight, dbias, dgate, None, None


def _standardize_for_compilers(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    sources: Sequence[_Pool | _Given],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """The definition in plain operations, which a compiler fuses; eager, each would be a pass over x of its own."""
    dtype, wide = _dtypes(x)
    pixels, values = x.shape[2] * x.shape[3], x.to(dtype)
    if any(isinstance(source, _Pool) for source in sources):
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
    scale, shift, first = 0.0, 0.0, None
    for share, source in zip(_shares(None if gate is None else gate.to(wide)), sources, strict=True):
        pooled_mean, pooled_var, count = _statistics(source, mean, var, pixels)
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


_standardize_outside_graphs = torch.compiler.disable(_Standardize.apply)


def _standardize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    sources: Sequence[_Pool | _Given],
    *,
    eps: float,
    gate: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | float]:
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, channels, height, width).")
    if not torch.compiler.is_compiling():
        return _Standardize.apply(x, weight, bias, gate, sources, eps)
    if any(isinstance(source, _Pool) and source.sync for source in sources):
        return _standardize_outside_graphs(x, weight, bias, gate, sources, eps)
    return _standardize_for_compilers(x, weight, bias, gate, sources, eps)


class _Norm2d(nn.Module):
    """Scale and shift for each channel, and what all layers check."""

    def __init__(self, channels: int, *, eps: float, affine: bool, shape: Sequence[int] | None = None):
        super().__init__()
        if channels < 1:
            raise ValueError(f"The number of channels is {channels}; it must be at least 1.")
        self.eps, self.affine = eps, affine
        self._channels = channels
        shape = (channels,) if shape is None else tuple(shape)
        self.weight = nn.Parameter(torch.ones(shape)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape)) if affine else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the scale to 1 and the shift to 0."""
        if self.affine:
            self.weight.fill_(1.0)
            self.bias.fill_(0.0)

    def _check(self, x: torch.Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self._channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected (batch, {self._channels}, height, width) "
                f"for {type(self).__name__}({self.extra_repr()})."
            )

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"{self._channels}, eps={self.eps}, affine={self.affine}"


class BatchNorm2d(_Norm2d):
    """All values of a channel share a mean and a variance: over batch, height and width.

    In training they are the batch's own, and running averages of them are kept, the variance's unbiased (divided by
    n - 1); in evaluation they are those averages. State dicts are those of `torch.nn.BatchNorm2d`, both ways.

    In a distributed run each process has its batch's own statistics, as with `torch.nn.BatchNorm2d`, and
    `DistributedDataParallel` hands the running averages of the first process to all before each forward. With
    `sync=True` all share those of the whole batch, as with `torch.nn.SyncBatchNorm`, for two small reductions in each
    direction.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of the new statistics in the running ones; None for the plain average of all so far.
        affine: Whether there is a learned scale and shift.
        track_running_stats: Whether there are running averages; without them evaluation too uses the batch's own.
        sync: Whether the processes of a distributed run share their statistics in training.

    Raises:
        ValueError: In training, where a channel has a single value, and by that no variance.

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

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set scale and shift to 1 and 0, and forget the running averages."""
        super().reset_parameters()
        if self.track_running_stats:
            self.running_mean.fill_(0.0)
            self.running_var.fill_(1.0)
            self.num_batches_tracked.fill_(0)

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        shared = ", sync=True" if self.sync else ""
        return f"{super().extra_repr()}, momentum={self.momentum}{shared}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x of (batch, channels, height, width), and in training take note of its statistics."""
        y, *statistics = _standardize(x, self.weight, self.bias, [self._source(x)], eps=self.eps)
        self._track(*statistics)
        return y

    def _source(self, x: torch.Tensor) -> _Pool | _Given:
        self._check(x)
        if not self.training and self.track_running_stats:
            return self.running_mean, self.running_var
        sync = self.sync and self.training and dist.is_available() and dist.is_initialized()
        if x.numel() <= self.num_features and not sync:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, a single value for each channel or none, which has no variance; "
                "train on larger batches or images, or call eval()."
            )
        return _Pool(over_batch=True, sync=sync)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor | float) -> None:
        if not (self.training and self.track_running_stats):
            return
        self.num_batches_tracked.add_(1)
        momentum = self.num_batches_tracked.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_(running.to(new.dtype) * (1 - momentum) + new * momentum)


class InstanceNorm2d(_Norm2d):
    """Each channel of each image has its own mean and variance: over height and width.

    State dicts are those of `torch.nn.InstanceNorm2d(affine=True)`, both ways. Running averages are not kept.

    Args:
        num_features: C.
        eps: Added to the variance.
        affine: Whether there is a learned scale and shift.

    Raises:
        ValueError: For images of a single pixel: all would become zero.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, *, affine: bool = True):
        super().__init__(num_features, eps=eps, affine=affine)
        self.num_features = num_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x of (batch, channels, height, width)."""
        self._check(x)
        if x.shape[2] * x.shape[3] == 1:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: the instance norm of a single pixel is zero whatever it was; "
                "use larger images, or another norm."
            )
        return _standardize(x, self.weight, self.bias, [_Pool()], eps=self.eps)[0]


class BatchInstanceNorm2d(BatchNorm2d):
    """A learned gate rho in [0, 1] for each channel mixes batch and instance normalization.

        y = weight * (rho * x_batch + (1 - rho) * x_instance) + bias

    Nam & Kim 2018, equation 3. rho starts at 1, batch normalization, and is clipped to [0, 1] after each update: here
    at the next forward pass, so that any training loop will do; a checkpoint may hold a value just outside, which
    counts as the bound. In evaluation the batch half has running statistics.

    Args:
        num_features: C.
        eps: Added to the variances.
        momentum: See `BatchNorm2d`.
        affine: Whether there is a learned scale and shift.
        gate_multiplier: By how much rho learns faster than the other weights; 10 is the paper's. The gradient of rho
            is multiplied, which with SGD is the same as a learning rate of its own; Adam's steps do not depend on the
            scale of a gradient, so there it takes a parameter group.
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
        """Set scale, shift and rho to 1, 0 and 1, and forget the running averages."""
        super().reset_parameters()
        self.gate.fill_(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x of (batch, channels, height, width), and in training take note of its statistics."""
        if self.training:
            # By .data, for the backward of an earlier forward that still holds rho: its value is not another.
            self.gate.data.clamp_(0, 1)
        # The gradient goes past the bound that the value is kept within, or a gate beyond it would never come back.
        multiplied = self.gate * self.gate_multiplier
        rho = multiplied + (self.gate.clamp(0, 1) - multiplied).detach()
        sources = [self._source(x), _Pool()]
        y, *statistics = _standardize(x, self.weight, self.bias, sources, eps=self.eps, gate=rho)
        self._track(*statistics)
        return y


class GroupNorm2d(_Norm2d):
    """The channels of a group share a mean and a variance for each image: over channels, height and width.

    State dicts are those of `torch.nn.GroupNorm`, both ways.

    Args:
        num_groups: Groups of neighboring channels; 1 is layer normalization, one a channel instance normalization.
        num_channels: C, a multiple of `num_groups`.
        eps: Added to the variance.
        affine: Whether there is a learned scale and shift for each channel.

    Raises:
        ValueError: If the channels do not divide into the groups.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, *, affine: bool = True):
        super().__init__(num_channels, eps=eps, affine=affine)
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_groups={num_groups} must divide num_channels={num_channels}.")
        self.num_groups, self.num_channels = num_groups, num_channels

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"{self.num_groups}, {super().extra_repr()}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x of (batch, channels, height, width)."""
        self._check(x)
        return _standardize(x, self.weight, self.bias, [_Pool(groups=self.num_groups)], eps=self.eps)[0]


class LayerNorm2d(_Norm2d):
    """All values of an image share a mean and a variance: over channels, height and width.

    Args:
        num_channels: C.
        eps: Added to the variance.
        affine: Whether there is a learned scale and shift.
        image_size: (height, width), for a scale and a shift of every value, (channels, height, width), as
            `torch.nn.LayerNorm` has them: 16.8 million of them in a ResNet-14 for 256x256 images that otherwise has
            173 thousand weights, and images of one size only. By default there is one for each channel.
        over: "image", or "channels": a mean and a variance for each pixel, over its channels alone, as in ConvNeXt.

    Raises:
        ValueError: If `over` is unknown, or given with `image_size`.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        *,
        affine: bool = True,
        image_size: tuple[int, int] | None = None,
        over: str = "image",
    ):
        if over not in ("image", "channels"):
            raise ValueError(f"over={over!r} is unknown; choose one of image, channels.")
        if over == "channels" and image_size is not None:
            raise ValueError(f"over='channels' has one scale for each channel; leave image_size={image_size} out.")
        shape = None if image_size is None else (num_channels, *image_size)
        super().__init__(num_channels, eps=eps, affine=affine, shape=shape)
        self.num_channels, self.over = num_channels, over
        self.image_size = None if image_size is None else tuple(image_size)

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        size = "" if self.image_size is None else f", image_size={self.image_size}"
        return f"{super().extra_repr()}{size}" + ("" if self.over == "image" else f", over={self.over!r}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x of (batch, channels, height, width)."""
        self._check(x)
        if self.over == "channels":
            # Pixels are the images of this view, so that channels are what is averaged over.
            pixels = x.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]
            y = _standardize(pixels, self.weight, self.bias, [_Pool(groups=1)], eps=self.eps)[0]
            y = y.view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
            return y.contiguous() if x.is_contiguous() else y
        if self.image_size is None:
            return _standardize(x, self.weight, self.bias, [_Pool(groups=1)], eps=self.eps)[0]
        if tuple(x.shape[2:]) != self.image_size:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but the layer has a scale for each of "
                f"{self.image_size[0]}x{self.image_size[1]} pixels; without image_size it takes any."
            )
        y = _standardize(x, None, None, [_Pool(groups=1)], eps=self.eps)[0]
        return y * self.weight.to(y.dtype) + self.bias.to(y.dtype) if self.affine else y


# From name to layer, of a number of channels.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "batch": BatchNorm2d,
    "instance": InstanceNorm2d,
    "batch_instance": BatchInstanceNorm2d,
    "layer": LayerNorm2d,
    "group": lambda channels: GroupNorm2d(min(8, channels), channels),
    # torch's own, to compare with
    "torch_batch": nn.BatchNorm2d,
}


def make_norm(norm: str, channels: int, *, num_groups: int | None = None) -> nn.Module:
    """Make the layer that a name stands for.

    Args:
        norm: A key of `NORMS`.
        channels: C.
        num_groups: Groups of "group", which otherwise has 8.

    Returns:
        A layer that takes and gives (batch, channels, height, width).

    Raises:
        ValueError: If there is no such name.

    Example:
        ```python
        >>> make_norm("group", 16, num_groups=4)
        GroupNorm2d(4, 16, eps=1e-05, affine=True)

        ```
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(NORMS)}.")
    if norm == "group" and num_groups is not None:
        return GroupNorm2d(num_groups, channels)
    return NORMS[norm](channels)
