"""The layers of classic convolutional networks, each with the arithmetic of its output size.

A network is a table of layers, see classic_architectures.py. A row of a table is, for example,
`Conv(96, 11, stride=4)`. `build` makes its module, and `steps` computes the size of its output:

    out = floor((in - kernel + 2 padding) / stride) + 1                  for convolution and pooling

With `ceil=True`, a pooling layer rounds up, if the last window starts inside of the image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn


class LocalResponseNorm(nn.Module):
    """Local response normalization of AlexNet (Krizhevsky et al. 2012, section 3.3), across channels.

        b_i = a_i / (k + alpha * sum over j of a_j^2)^beta,    j = i - n/2, ..., i + n/2

    `torch.nn.LocalResponseNorm` divides alpha by n. So its `alpha` must be n times as large for the same result.

    Args:
        n: Number of channels in the sum.
        k: Constant in the denominator.
        alpha: Weight of the sum.
        beta: Exponent.

    Example:
        ```python
        >>> x = torch.rand(1, 6, 2, 2)
        >>> torch.allclose(LocalResponseNorm()(x), nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)(x))
        True

        ```
    """

    def __init__(self, n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75):
        super().__init__()
        self.n, self.k, self.alpha, self.beta = n, k, alpha, beta

    def extra_repr(self) -> str:
        """Return the constants for `print`."""
        return f"n={self.n}, k={self.k}, alpha={self.alpha}, beta={self.beta}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x, (batch, channels, height, width)."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow in half precision
        padded = F.pad(values.square(), (0, 0, 0, 0, self.n // 2, (self.n - 1) // 2))
        sums = sum(padded[:, i : i + x.shape[1]] for i in range(self.n))
        return (values * (self.k + self.alpha * sums).pow(-self.beta)).to(x.dtype)


@dataclass(frozen=True)
class Options:
    """Changes of a table by a config.

    Attributes:
        width: Factor for the number of channels.
        dropout: Dropout probability in place of the published one, or None.
    """

    width: float = 1.0
    dropout: float | None = None

    def scale(self, channels: int) -> int:
        """Scale a number of channels, to an even number, because some layers split their input into two groups."""
        return channels if self.width == 1 else max(round(channels * self.width / 2), 1) * 2


class Layer:
    """One row of a table."""

    def build(self, channels: int, options: Options) -> tuple[nn.Module, int]:
        """Make the module for a number of input channels; also return the number of output channels."""
        raise NotImplementedError

    def steps(self, size: int) -> list[tuple[int, str]]:
        """Return each size along the layer and the arithmetic behind it; an empty list if the size stays."""
        return []


@dataclass(frozen=True)
class Window(Layer):
    """A layer that moves a window over the image."""

    def window(self) -> tuple[int, int, int, bool]:
        """Return kernel, stride, padding and whether the size is rounded up."""
        raise NotImplementedError

    def steps(self, size: int) -> list[tuple[int, str]]:
        """Return the output size and the arithmetic behind it."""
        kernel, stride, padding, ceil = self.window()
        out = window_size(size, kernel, stride, padding, ceil)
        brackets = "⌈⌉" if ceil else "⌊⌋"
        formula = f"{brackets[0]}({size} - {kernel} + 2*{padding})/{stride}{brackets[1]} + 1 = {out}"
        return [(out, formula)]


def window_size(size: int, kernel: int, stride: int, padding: int = 0, ceil: bool = False) -> int:
    """Return the output size of a convolution or a pooling layer.

    Args:
        size: Height or width of the input in pixels.
        kernel: Side of the window.
        stride: Step of the window.
        padding: Pixels added on each side.
        ceil: Whether to round up. A window that would start in the padding on the right is left out, as in torch.

    Returns:
        The output size. It is less than 1 if the window is larger than the padded input.

    Example:
        ```python
        >>> window_size(227, 11, 4)
        55

        ```
    """
    length = size - kernel + 2 * padding
    if length < 0:
        return 0
    out = (math.ceil(length / stride) if ceil else length // stride) + 1
    return out - 1 if ceil and (out - 1) * stride >= size + padding else out


@dataclass(frozen=True)
class Conv(Window):
    """A convolution, with optional batch normalization, and a ReLU or another activation.

    Attributes:
        channels: Output channels.
        kernel: Side of the kernel in pixels.
        stride: Step of the kernel.
        padding: Zeros on each side.
        groups: Number of groups; an output channel sees the input channels of its group only.
        norm: Whether batch normalization takes the place of the bias.
        eps: Added to the variance of batch normalization.
        bias: Whether the convolution has a bias.
        activation: The activation.
    """

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    norm: bool = False
    eps: float = 1e-5
    bias: bool = True
    activation: Callable[[], nn.Module] | None = nn.ReLU

    def window(self) -> tuple[int, int, int, bool]:
        """Return kernel, stride, padding and False."""
        return self.kernel, self.stride, self.padding, False

    def build(self, channels: int, options: Options) -> tuple[nn.Module, int]:
        """Make the convolution with its normalization and activation."""
        out = options.scale(self.channels)
        conv = nn.Conv2d(channels, out, self.kernel, self.stride, self.padding, groups=self.groups, bias=self.bias)
        parts = [conv]
        if self.norm:
            parts.append(nn.BatchNorm2d(out, eps=self.eps))
        if self.activation is not None:
            parts.append(self.activation())
        return nn.Sequential(*parts), out


@dataclass(frozen=True)
class Pool(Window):
    """Max pooling, or average pooling with `mean=True`."""

    kernel: int
    stride: int
    padding: int = 0
    ceil: bool = False
    mean: bool = False

    def window(self) -> tuple[int, int, int, bool]:
        """Return kernel, stride, padding and whether to round up."""
        return self.kernel, self.stride, self.padding, self.ceil

    def build(self, channels: int, options: Options) -> tuple[nn.Module, int]:
        """Make the pooling layer."""
        kind = nn.AvgPool2d if self.mean else nn.MaxPool2d
        return kind(self.kernel, self.stride, self.padding, ceil_mode=self.ceil), channels


@dataclass(frozen=True)
class ResponseNorm(Layer):
    """Local response normalization."""

    def build(self, channels: int, options: Options) -> tuple[nn.Module, int]:
        """Make the normalization with the constants of AlexNet."""
        return LocalResponseNorm(), channels


@dataclass(frozen=True)
class Hidden(Layer):
    """A fully connected layer with its activation, and dropout before or after it.

    Attributes:
        features: Output features.
        dropout: Dropout probability.
        dropout_first: Whether dropout is applied to the input instead of the output.
        activation: The activation.
    """

    features: int
    dropout: float = 0.0
    dropout_first: bool = False
    activation: Callable[[], nn.Module] = nn.ReLU

    def build(self, channels: int, options: Options) -> tuple[nn.Module, int]:
        """Make the layer; `channels` are input features."""
        out = options.scale(self.features)
        parts = [nn.Linear(channels, out), self.activation()]
        probability = self.dropout if options.dropout is None else options.dropout
        if probability:
            parts.insert(0 if self.dropout_first else len(parts), nn.Dropout(probability))
        return nn.Sequential(*parts), out


@dataclass(frozen=True)
class Inception(Layer):
    """A module of GoogLeNet: four branches, whose outputs are joined along the channels (Szegedy et al. 2014).

    Attributes:
        one: Channels of the 1x1 branch.
        three: Channels of the 1x1 and the 3x3 convolution of the second branch.
        five: Channels of the 1x1 and the 5x5 convolution of the third branch.
        pool: Channels of the 1x1 convolution after max pooling.
        kernel: Side of the large kernel of the third branch: 5 in the paper, 3 in torchvision.
        norm: Whether batch normalization takes the place of the biases, as in torchvision.
    """

    one: int
    three: tuple[int, int]
    five: tuple[int, int]
    pool: int
    kernel: int = 5
    norm: bool = False

    def build(self, channels: int, options: Options) -> tuple[nn.Module, int]:
        """Make the four branches."""
        conv = Conv(0, 1, norm=self.norm, eps=1e-3, bias=not self.norm)
        branches = (
            [replace(conv, channels=self.one)],
            [replace(conv, channels=self.three[0]), replace(conv, channels=self.three[1], kernel=3, padding=1)],
            [
                replace(conv, channels=self.five[0]),
                replace(conv, channels=self.five[1], kernel=self.kernel, padding=self.kernel // 2),
            ],
            [Pool(3, 1, padding=1), replace(conv, channels=self.pool)],
        )
        built = [build_layers(branch, channels, options) for branch in branches]
        return Branches([module for module, _ in built]), sum(out for _, out in built)


class Branches(nn.ModuleList):
    """Modules that see the same input, and whose outputs are joined along the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (batch, channels of all branches, height, width)."""
        return torch.cat([branch(x) for branch in self], dim=1)


@dataclass(frozen=True)
class Residual(Layer):
    """Residual blocks (He et al. 2015). The first block has the stride.

    Attributes:
        blocks: Number of blocks.
        channels: Channels of the 3x3 convolutions.
        stride: Stride of the first block.
        bottleneck: Whether a block has 1x1, 3x3 and 1x1 convolutions and 4 times as many output channels, instead
            of two 3x3 convolutions.
    """

    blocks: int
    channels: int
    stride: int = 1
    bottleneck: bool = False

    def build(self, channels: int, options: Options) -> tuple[nn.Module, int]:
        """Make the blocks."""
        width, parts = options.scale(self.channels), []
        for index in range(self.blocks):
            stride = self.stride if index == 0 else 1
            out = width * 4 if self.bottleneck else width
            parts.append(ResidualBlock(channels, width, out, stride))
            channels = out
        return nn.Sequential(*parts), channels

    def steps(self, size: int) -> list[tuple[int, str]]:
        """Return the output size; a 3x3 convolution with padding 1 has the stride."""
        return Conv(0, 3, self.stride, 1).steps(size) if self.stride > 1 else []


class ResidualBlock(nn.Module):
    """A residual block, relu(shortcut(x) + f(x)), with two 3x3 convolutions, or a bottleneck if out > width.

    As in torchvision, the 3x3 convolution of a bottleneck has the stride. In the paper, its first 1x1 convolution
    has it, which skips three quarters of the pixels.
    """

    def __init__(self, channels: int, width: int, out: int, stride: int):
        super().__init__()
        conv = Conv(0, 3, padding=1, norm=True, bias=False)
        rows = [replace(conv, channels=width, stride=stride), replace(conv, channels=out, activation=None)]
        if out > width:
            one = replace(conv, kernel=1, padding=0)
            rows = [replace(one, channels=width), rows[0], replace(one, channels=out, activation=None)]
        self.path = build_layers(rows, channels, Options())[0]
        self.shortcut = nn.Identity()
        if stride > 1 or channels != out:
            shortcut = Conv(out, 1, stride, norm=True, bias=False, activation=None)
            self.shortcut = shortcut.build(channels, Options())[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform x, (batch, channels, height, width)."""
        return F.relu(self.shortcut(x) + self.path(x))


def build_layers(layers: Sequence[Layer], channels: int, options: Options) -> tuple[nn.Sequential, int]:
    """Build layers one after the other.

    Args:
        layers: Rows of a table.
        channels: Input channels.
        options: Changes of the table.

    Returns:
        The modules and the number of output channels.
    """
    modules = []
    for layer in layers:
        module, channels = layer.build(channels, options)
        modules.append(module)
    return nn.Sequential(*modules), channels
