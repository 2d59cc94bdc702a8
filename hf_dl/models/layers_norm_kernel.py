"""The kernel of the normalization layers: both passes over x in blocks that fit the cache, with a backward by hand.

layers_norm.py has the definitions. All layers share this kernel, because they differ only in which values share a mean
and a variance. By the law of total variance, var = E[var_nc] + Var[mean_nc], with the mean and the variance of each
channel c of each image n. So:

1. One pass over x computes the moments of each (image, channel).
2. Moments are pooled as (batch, channels) tensors, which costs nothing.
3. A second pass over x writes y = scale * (x - pivot) + shift.

The backward pass also needs two sums for each (image, channel) and writes one combination of x and the gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_BLOCK_BYTES = 2**18  # a few of them stay in a core's cache between the passes


@dataclass(frozen=True)
class Pool:
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
Given = tuple[torch.Tensor, torch.Tensor]


def pool_moments(
    source: Pool | Given, mean: torch.Tensor | None, var: torch.Tensor | None, pixels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Pool moments of (batch, channels): the mean, the variance, and how many pixels they are over."""
    if not isinstance(source, Pool):
        return source[0].unsqueeze(0), source[1].unsqueeze(0), 0
    pooled_mean, count = source.average(mean, pixels)
    pooled_var, _ = source.average(var + (mean - pooled_mean).square(), pixels)  # law of total variance
    return pooled_mean, pooled_var, count


def shares_of(gate: torch.Tensor | None) -> tuple[torch.Tensor | float, ...]:
    """How much of each standardized x the result has: all of the only one, or rho and 1 - rho of the two."""
    return (1.0,) if gate is None else (gate, 1 - gate)


def compute_dtypes(x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
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


class Standardize(torch.autograd.Function):
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
        sources: Sequence[Pool | Given],
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | float]:
        """Standardize; also returns the first source's mean, variance and count."""
        if not x.is_contiguous():
            last = x.is_contiguous(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        dtype, wide = compute_dtypes(x)
        batch, channels = x.shape[:2]
        rows, pixels = _rows(x), x.shape[2] * x.shape[3]
        columns = (*rows.shape[:2], 1)

        if any(isinstance(source, Pool) for source in sources):
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
        """The gradients of x, weight, bias and gate."""
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
