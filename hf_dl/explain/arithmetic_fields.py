"""Receptive fields of all positions of a tensor, followed through any operation.

A `Field` describes which pixels of the image each position of a tensor depends on. It stores the field of the first
position, and for each dimension of the tensor how far a step moves the field. For a window with kernel k, stride s,
padding p and dilation d over an input whose neighbors are `jump` pixels apart:

    low  <- low - p * jump                          first pixel of the field
    high <- high + ((k - 1) * d - p) * jump         last pixel of the field
    jump <- jump * s
    size = high - low + 1,    offset = (low + high) / 2

An operation with several inputs has the union of their fields. A dimension may combine several image axes, such as
tokens of a vision transformer. Operations that this file does not know are assumed to mix all positions. Fields are
theoretical: they may be larger than the image, because they include padding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

ANY = -1  # the axis of positions that are not on a regular grid, such as patches after a CLS token


@dataclass(frozen=True)
class Part:
    """A factor of a dimension of a tensor.

    Attributes:
        size: Number of positions.
        axis: Image axis along which the positions move: 0 for height, 1 for width, `ANY`, or None for channels.
        jump: Pixels between neighbors.
    """

    size: int
    axis: int | None = None
    jump: float = 0.0


@dataclass(frozen=True)
class Window:
    """The window of a convolution or a pooling layer, with one number per spatial dimension.

    Attributes:
        kernel: Sides of the window.
        stride: Steps of the window.
        padding: Positions that are added on each side.
        dilation: Steps between the elements of the window.
        ceil: Whether the output size is rounded up.
        transposed: Whether it is a transposed convolution.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Field:
    """The receptive fields of all positions of a tensor.

    Attributes:
        low: First row and first column of the image that the first position depends on.
        high: Last row and last column.
        dims: The parts of each dimension.
        image: Height and width of the image.
    """

    low: tuple[float, float]
    high: tuple[float, float]
    dims: tuple[tuple[Part, ...], ...]
    image: tuple[int, int]

    @classmethod
    def of_image(cls, shape: Sequence[int]) -> "Field":
        """Return the field of an image tensor (batch, channels, height, width): each position sees itself."""
        batch, channels, height, width = shape
        dims = ((Part(batch),), (Part(channels),), (Part(height, 0, 1.0),), (Part(width, 1, 1.0),))
        return cls((0.0, 0.0), (0.0, 0.0), dims, (height, width))

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width of the receptive field of one position, in pixels."""
        return tuple(math.ceil(high - low + 1) for low, high in zip(self.low, self.high, strict=True))

    @property
    def offset(self) -> tuple[float, float]:
        """Return row and column of the center of the first field. 0 is the center of the first pixel."""
        return tuple((low + high) / 2 for low, high in zip(self.low, self.high, strict=True))

    @property
    def jump(self) -> tuple[float, float] | None:
        """Return the rows and columns between the fields of neighbors, or None without a grid."""
        found = [[part.jump for dim in self.dims for part in dim if part.axis == axis] for axis in (0, 1)]
        return None if any(len(jumps) != 1 for jumps in found) else tuple(jumps[0] for jumps in found)

    def mix(self, dims: Sequence[int] | None = None) -> "Field":
        """Return the field after an operation in which each output depends on all positions along dimensions.

        Args:
            dims: The dimensions, which keep their size. Defaults to all.
        """
        chosen = range(len(self.dims)) if dims is None else [dim % len(self.dims) for dim in dims]
        field = self
        for index in chosen:
            field = field._collapse(index, (0, 1, ANY))
        return field

    def _collapse(self, index: int, axes: Sequence[int]) -> "Field":
        """Let each position depend on all positions along the given image axes of a dimension."""
        low, high, parts = list(self.low), list(self.high), []
        for part in self.dims[index]:
            if part.axis not in axes or part.axis is None:
                parts.append(part)
                continue
            if part.axis == ANY:
                low = [min(value, 0.0) for value in low]
                high = [max(value, size - 1.0) for value, size in zip(high, self.image, strict=True)]
            else:
                high[part.axis] += (part.size - 1) * part.jump
            parts.append(Part(part.size))
        return replace(self, low=tuple(low), high=tuple(high), dims=self._with(index, tuple(parts)))

    def _with(self, index: int, parts: tuple[Part, ...]) -> tuple[tuple[Part, ...], ...]:
        return (*self.dims[:index], parts, *self.dims[index + 1 :])

    def _move(self, axis: int, low: float, high: float) -> "Field":
        lows, highs = list(self.low), list(self.high)
        lows[axis] += low
        highs[axis] += high
        return replace(self, low=tuple(lows), high=tuple(highs))

    def permute(self, order: Sequence[int]) -> "Field":
        """Return the field after a permutation of the dimensions."""
        return replace(self, dims=tuple(self.dims[index] for index in order))

    def cut(self, dim: int, start: int, step: int, size: int) -> "Field":
        """Return the field of a slice, or of a padded tensor with a negative start.

        Args:
            dim: The dimension.
            start: First position.
            step: Step between positions.
            size: Number of positions.
        """
        dim %= len(self.dims)
        parts = self.dims[dim]
        if all(part.axis is None for part in parts):
            return replace(self, dims=self._with(dim, (Part(size),)))
        if len(parts) > 1 or parts[0].axis == ANY:
            same = start == 0 and step == 1 and size == math.prod(part.size for part in parts)
            return self if same else replace(self, dims=self._with(dim, (Part(size, ANY),)))
        part = parts[0]
        moved = self._move(part.axis, start * part.jump, start * part.jump)
        return replace(moved, dims=self._with(dim, (Part(size, part.axis, part.jump * step),)))

    def select(self, dim: int, index: int) -> "Field":
        """Return the field of one position along a dimension, which is removed."""
        dim %= len(self.dims)
        parts, field = self.dims[dim], self
        index %= math.prod(part.size for part in parts)
        for part in reversed(parts):
            index, place = divmod(index, part.size)
            if part.axis == ANY:
                field = field.mix([dim])
                break
            if part.axis is not None:
                field = field._move(part.axis, place * part.jump, place * part.jump)
        return replace(field, dims=(*field.dims[:dim], *field.dims[dim + 1 :]))

    def scatter(self, dims: Sequence[int]) -> "Field":
        """Return the field after an operation that moves positions along dimensions in an irregular way."""
        field = self
        for index in (dim % len(self.dims) for dim in dims):
            if any(part.axis is not None for part in field.dims[index]):
                size = math.prod(part.size for part in field.dims[index])
                field = replace(field, dims=field._with(index, (Part(size, ANY),)))
        return field

    def reshape(self, shape: Sequence[int]) -> "Field":
        """Return the field after a change of the shape that keeps the order of the elements."""
        rest = [part for dim in self.dims for part in dim if part.size != 1]
        dims = []
        for size in shape:
            parts = []
            while size > 1:
                part = rest.pop(0)
                if size % part.size == 0:
                    parts.append(part)
                    size //= part.size
                elif part.size % size == 0:
                    inner = part.size // size
                    parts.append(Part(size, part.axis, part.jump * inner))
                    rest.insert(0, Part(inner, part.axis, part.jump))
                    size = 1
                else:
                    return replace(self.mix(), dims=tuple((Part(length),) for length in shape))
            dims.append(tuple(parts) or (Part(1),))
        return replace(self, dims=tuple(dims))

    def slide(self, window: Window, sizes: Sequence[int], *, channel: int | None = -3) -> "Field":
        """Return the field after a window has moved over the last dimensions.

        Args:
            window: The window.
            sizes: The output sizes of these dimensions.
            channel: Dimension of the channels, which a convolution mixes. None for pooling.
        """
        field = self if channel is None else self.mix([channel])
        for offset, size in enumerate(sizes):
            dim = len(field.dims) - len(sizes) + offset
            parts = field.dims[dim]
            if len(parts) != 1 or parts[0].axis == ANY:
                field = replace(field.mix([dim]), dims=field._with(dim, (Part(size),)))
                continue
            axis, jump = parts[0].axis, parts[0].jump
            kernel, stride, padding, dilation = (
                values[offset] for values in (window.kernel, window.stride, window.padding, window.dilation)
            )
            if axis is None:
                field = replace(field, dims=field._with(dim, (Part(size),)))
                continue
            reach = (kernel - 1) * dilation
            if window.transposed:  # bounds of the input positions whose windows contain an output position
                step = jump / stride
                field = field._move(axis, (padding - reach) * step, padding * step)
            else:
                step = jump * stride
                field = field._move(axis, -padding * jump, (reach - padding) * jump)
            field = replace(field, dims=field._with(dim, (Part(size, axis, step),)))
        return field

    def resize(self, sizes: Sequence[int], *, reach: int) -> "Field":
        """Return the field after interpolation of the last two dimensions, which sees `reach` more neighbors."""
        field = self
        for dim, size in zip((len(self.dims) - 2, len(self.dims) - 1), sizes, strict=True):
            parts = field.dims[dim]
            if len(parts) != 1 or parts[0].axis in (None, ANY):
                field = replace(field.mix([dim]), dims=field._with(dim, (Part(size),)))
                continue
            part = parts[0]
            side = part.jump * reach / 2
            field = field._move(part.axis, -side, side)
            step = part.jump * part.size / size
            field = replace(field, dims=field._with(dim, (Part(size, part.axis, step),)))
        return field


def combine(fields: Sequence[Field | None], shape: Sequence[int]) -> Field | None:
    """Return the union of fields after an elementwise operation with broadcasting.

    Args:
        fields: The fields of the inputs. None stands for a tensor that does not depend on the image.
        shape: Shape of the output.

    Returns:
        The field of the output, or None if no input depends on the image. Inputs whose positions move along an image
        axis in different ways are mixed along this axis.
    """
    known = [field for field in fields if field is not None]
    if not known:
        return None
    rank = len(shape)
    known = [replace(f, dims=((Part(1),),) * (rank - len(f.dims)) + f.dims) for f in known]
    for axis in (0, 1, ANY):
        grids = [
            [(i, part) for i, dim in enumerate(field.dims) for part in dim if part.axis == axis and part.size > 1]
            for field in known
        ]
        if any(grid != grids[0] for grid in grids):
            for index in range(rank):
                known = [field._collapse(index, (axis,)) for field in known]
    dims = []
    for index, size in enumerate(shape):
        fitting = [f.dims[index] for f in known if math.prod(part.size for part in f.dims[index]) == size]
        traced = [parts for parts in fitting if any(part.axis is not None for part in parts)]
        dims.append(traced[0] if traced else (Part(size),))
    low = tuple(min(field.low[axis] for field in known) for axis in (0, 1))
    high = tuple(max(field.high[axis] for field in known) for axis in (0, 1))
    return Field(low, high, tuple(dims), known[0].image)


def join(fields: Sequence[Field | None], sizes: Sequence[int], dim: int, shape: Sequence[int]) -> Field | None:
    """Return the field of a concatenation.

    Args:
        fields: The fields of the inputs, or None.
        sizes: The sizes of the inputs along the dimension.
        dim: The dimension.
        shape: Shape of the output.
    """
    dim %= len(shape)
    traced, resized = False, []
    for field, size in zip(fields, sizes, strict=True):
        if field is None or size == 0:
            continue
        if any(part.axis is not None for part in field.dims[dim]) and len(fields) > 1:
            traced = True
        resized.append(replace(field, dims=field._with(dim, (Part(shape[dim]),))))
    found = combine(resized, shape)
    if found is not None and traced:
        found = replace(found, dims=found._with(dim, (Part(shape[dim], ANY),)))
    return found
