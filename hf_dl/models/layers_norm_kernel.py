"""The kernel of the normalization layers: passes over x in blocks that fit the cache, and the backward pass by hand.

layers_norm.py has the definitions. All layers share this kernel, because they differ only in which values share a mean
and a variance. The law of total variance pools the moments of each channel c of each image n:
var = E[var_nc] + Var[mean_nc]. The forward pass has three steps:

1. A pass over x computes the mean and variance of each (image, channel).
2. The moments are pooled. They have shape (batch, channels), so this takes almost no time.
3. A second pass over x writes y = scale * (x - pivot) + shift.

The backward pass computes two sums per (image, channel). It then writes a linear combination of x and the gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_BLOCK_BYTES = 2**18  # a few blocks of this size fit in the cache of a core


@dataclass(frozen=True)
class Pool:
    """The (image, channel) pairs that share a mean and a variance. By default, each pair has its own.

    Args:
        over_batch: Whether all images share them.
        sync: Whether the images of all processes share them. Requires `over_batch`.
        groups: Number of groups whose channels share them. 0 for no groups.
    """

    over_batch: bool = False
    sync: bool = False
    groups: int = 0

    def average(self, values: torch.Tensor, pixels: int) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Average values over the pairs that share statistics.

        Args:
            values: Means over the pixels of each channel of each image, (batch, channels).
            pixels: Number of pixels of an image.

        Returns:
            The averages, in a shape that broadcasts to (batch, channels), and the number of pixels in each average.
        """
        batch, channels = values.shape
        if self.groups:
            grouped = values.unflatten(1, (self.groups, -1)).mean(2, keepdim=True)
            return grouped.expand(-1, -1, channels // self.groups).flatten(1), pixels * channels // self.groups
        if not self.over_batch:
            return values, pixels
        if not self.sync:
            return values.mean(0, keepdim=True), batch * pixels
        # Processes may have different numbers and sizes of images, so they exchange sums and counts instead of means.
        total = torch.cat([values.sum(0) * pixels, values.new_tensor([batch * pixels])])
        dist.all_reduce(total)
        return total[:-1].unsqueeze(0) / total[-1], total[-1]


# Known statistics (mean, variance), each (channels,), such as the running averages of a BatchNorm2d in evaluation.
Given = tuple[torch.Tensor, torch.Tensor]


def pool_moments(
    source: Pool | Given, mean: torch.Tensor | None, var: torch.Tensor | None, pixels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Pool the moments of each (image, channel); return the mean, the variance and the number of pixels in each."""
    if not isinstance(source, Pool):
        return source[0].unsqueeze(0), source[1].unsqueeze(0), 0
    pooled_mean, count = source.average(mean, pixels)
    pooled_var, _ = source.average(var + (mean - pooled_mean).square(), pixels)  # law of total variance
    return pooled_mean, pooled_var, count


def shares_of(gate: torch.Tensor | None) -> tuple[torch.Tensor | float, ...]:
    """Return the weight of each source: 1 for a single source, or rho and 1 - rho for two."""
    return (1.0,) if gate is None else (gate, 1 - gate)


def compute_dtypes(x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of the passes over x and the dtype of the pooled statistics."""
    if x.dtype == torch.float64:
        return torch.float64, torch.float64
    return torch.float32, torch.float32 if x.device.type == "mps" else torch.float64  # Metal has no float64


def _rows(x: torch.Tensor) -> torch.Tensor:
    """View x as (rows, columns, pixels), to be cut into blocks of rows.

    A row is a channel of an image, or a whole image in the memory format channels_last.
    """
    batch, channels, height, width = x.shape
    if x.is_contiguous():
        return x.view(batch * channels, 1, height * width)
    return x.permute(0, 2, 3, 1).view(batch, height * width, channels).transpose(1, 2)


def _blocks(
    x: torch.Tensor, *others: torch.Tensor, scratch: Sequence[torch.dtype] = ()
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut x, and other tensors with the same number of rows, into blocks of rows that fit in the cache.

    Each block comes with one scratch tensor of its shape per dtype in `scratch`. All blocks use the same memory for
    it, so that it stays in the cache.
    """
    size = _BLOCK_BYTES
    if x.device.type != "cpu":
        size *= 256  # large blocks, so that the time of kernel launches is negligible
    elif (threads := torch.get_num_threads()) > 1:
        size *= 4 * threads  # fewer blocks, because each one ends with a wait for the slowest thread
    step = max(1, size // max(1, x[:1].numel() * max(4, x.element_size())))
    blocks = [tensor.split(step) for tensor in (x, *others)]
    first, last = blocks[0][0], blocks[0][-1]
    for dtype in scratch:
        room = torch.empty_strided(first.shape, first.stride(), dtype=dtype, device=x.device)
        blocks.append([room] * (len(blocks[0]) - 1) + [room[: len(last)]])
    return zip(*blocks, strict=True)


class Standardize(torch.autograd.Function):
    """y = weight * sum_k share_k (x - mean_k) / sqrt(var_k + eps) + bias, for one or two sources of statistics.

    Let inv = 1 / sqrt(var + eps), xhat = (x - mean) * inv and g = weight * share * dy. The gradient through one source
    is the sum of the three paths in Ioffe & Szegedy 2015, section 3:

        dx = inv * (g - E[g] - xhat * E[g * xhat])

    E is the average over the values that share the statistics. Both averages are 0 for known statistics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        gate: torch.Tensor | None,
        sources: Sequence[Pool | Given],
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | float]:
        """Compute y; also return the mean, variance and pixel count of the first source."""
        if not x.is_contiguous():
            last = x.is_contiguous(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        dtype, wide = compute_dtypes(x)
        batch, channels = x.shape[:2]
        rows, pixels = _rows(x), x.shape[2] * x.shape[3]
        columns = (*rows.shape[:2], 1)

        if any(isinstance(source, Pool) for source in sources):
            # First subtract the mean rounded to float32, then compute the mean and the square of the rest.
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
        # If the mean is within a few deviations of zero, x needs no shift, which saves three passes. Other devices
        # always shift, because this test would wait for the device.
        spread = sources[0][1].to(wide) if var is None else var
        center = x.device.type != "cpu" or bool((pivot.square() > 16 * (spread + eps)).any())
        if not center:
            pivot = torch.zeros_like(pivot)

        shares = shares_of(None if gate is None else gate.to(wide))
        factor = pivot.new_ones(()) if weight is None else weight.to(wide)
        scale = shift = 0.0
        saved = []
        for share, source in zip(shares, sources, strict=True):
            pooled_mean, pooled_var, count = pool_moments(source, mean, var, pixels)
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
        """Compute the gradients of x, weight, bias and gate."""
        x, weight, gate, pivot, scale, *saved = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
        dtype, wide = compute_dtypes(x)
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
        shares = shares_of(None if gate is None else gate.to(wide))
        slope = constant = None  # dx = scale * dy + slope * (x - pivot) + constant
        standardized = []  # E[dy * xhat] of each source
        for share, source, inv, offset in zip(shares, ctx.sources, saved[::2], saved[1::2], strict=True):
            dy_xhat_mean = dy_x_mean * inv + dy_mean * offset
            standardized.append(dy_xhat_mean)
            if isinstance(source, Pool):
                g, _ = source.average(factor * share * dy_mean, pixels)
                g_xhat, _ = source.average(factor * share * dy_xhat_mean, pixels)
                slope = (0.0 if slope is None else slope) - inv * inv * g_xhat
                constant = (0.0 if constant is None else constant) - inv * (g + offset * g_xhat)

        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            rescaled = scale.reshape(columns)
            if slope is None:  # the statistics are known constants
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
