"""The formulas of the arithmetic of a network, with the numbers put in.

    output size      (in - kernel + 2 padding) / stride + 1, rounded down, or up with ceil_mode
    parameters       (kernel * kernel * in_channels / groups + 1) * out_channels          of a convolution
    multiply-adds    out_height * out_width * out_channels * kernel * kernel * in_channels / groups

An elementwise operation, a normalization and pooling have no multiply-adds, as in the literature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .arithmetic_fields import Field, Window

CONVOLUTIONS = ("convolution", "cudnn_convolution", "_convolution", "mkldnn_convolution")
PRODUCTS = {
    "mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
}
POOLS = ("max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "avg_pool1d", "max_pool3d_with_indices", "avg_pool3d")
ATTENTION = "_scaled_dot_product"
NORMS = ("batch_norm", "group_norm", "layer_norm", "rms_norm")
NAMES = {
    "add": "+",
    "add_": "+",
    "sub": "-",
    "mul": "*",
    "mul_": "*",
    "div": "/",
    "relu_": "relu",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "cat": "concatenate",
    "constant_pad_nd": "pad",
    "clone": "copy",
    "mm": "matmul",
    "addmm": "linear",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "max_pool2d_with_indices": "max pooling",
    "avg_pool2d": "average pooling",
    "native_layer_norm": "layer norm",
    "native_group_norm": "group norm",
}
"""Names of functions of torch in the tables."""


@dataclass(frozen=True)
class Call:
    """A call of a function of torch below autograd.

    Attributes:
        name: Name of the function in `torch.ops.aten`.
        arguments: The arguments by name, with defaults.
        outputs: The tensors that it returned.
    """

    name: str
    arguments: dict[str, Any]
    outputs: list[torch.Tensor]

    @property
    def label(self) -> str:
        """Return the name for the tables."""
        return "attention" if self.name.startswith(ATTENTION) else NAMES.get(self.name, self.name.strip("_"))

    @property
    def kind(self) -> str:
        """Return the group of the operation: convolution, linear, attention, pooling, normalization or other."""
        if self.name in CONVOLUTIONS:
            return "convolution"
        if self.name in PRODUCTS:
            return "linear" if self.name in ("mm", "addmm") else "attention"
        if self.name.startswith(ATTENTION):
            return "attention"
        if "pool" in self.name:
            return "pooling"
        return "normalization" if any(part in self.name for part in NORMS) else "other"

    @property
    def image(self) -> torch.Tensor:
        """Return the tensor over which a window moves."""
        return self.arguments["input" if "input" in self.arguments else "self"]


def bind(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operator by name, with the defaults of its schema."""
    schema = function._schema.arguments
    found = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    found |= {argument.name: value for argument, value in zip(schema, args, strict=False)}
    return found | kwargs


def _fill(values: int | Sequence[int], count: int) -> tuple[int, ...]:
    values = (values,) if isinstance(values, int) else tuple(values)
    return values * count if len(values) == 1 else values


def window_of(call: Call) -> Window | None:
    """Return the window of a convolution or a pooling layer, or None for other calls.

    Adaptive pooling is ordinary pooling if the input size is a multiple of the output size.
    """
    values = call.arguments
    if call.name in CONVOLUTIONS:
        kernel = tuple(values["weight"].shape[2:])
        count = len(kernel)
        sizes = [_fill(values[name], count) for name in ("stride", "padding", "dilation")]
        return Window(kernel, *sizes, transposed=bool(values.get("transposed", False)))
    if call.name in POOLS:
        count = 3 if "3d" in call.name else 1 if "1d" in call.name else 2
        kernel = _fill(values["kernel_size"], count)
        stride = _fill(values["stride"], count) if values.get("stride") else kernel
        padding, dilation = _fill(values["padding"], count), _fill(values.get("dilation", 1), count)
        return Window(kernel, stride, padding, dilation, ceil=bool(values.get("ceil_mode", False)))
    if call.name in ("_adaptive_avg_pool2d", "adaptive_max_pool2d"):
        before, after = call.image.shape[-2:], call.outputs[0].shape[-2:]
        if all(size % out == 0 for size, out in zip(before, after, strict=True)):
            kernel = tuple(size // out for size, out in zip(before, after, strict=True))
            return Window(kernel, kernel, (0, 0), (1, 1))
    return None


def show(value: float) -> str:
    """Write a number with thousands separators, and without decimals if it is whole."""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,.4g}"


def product(values: Sequence[int]) -> str:
    """Write a product, such as 11*11*3; factors of 1 at the front are left out."""
    values = list(values)
    while len(values) > 1 and values[0] == 1:
        values.pop(0)
    return "*".join(str(value) for value in values)


def both(formulas: Sequence[str]) -> str:
    """Join the formulas of height and width, which are usually equal."""
    return "; ".join(dict.fromkeys(formulas))


def size_formula(window: Window, before: Sequence[int], after: Sequence[int]) -> str:
    """Return the arithmetic of the output size.

    Args:
        window: The window.
        before: The input size in each spatial dimension.
        after: The output size in each spatial dimension.

    Example:
        ```python
        >>> size_formula(Window((11,), (4,), (0,), (1,)), [227], [55])
        '(227 - 11 + 2*0)/4 + 1 = 55'
        >>> size_formula(Window((7,), (2,), (3,), (1,)), [224], [112])
        '⌊(224 - 7 + 2*3)/2⌋ + 1 = 112'

        ```
    """
    found = []
    for i, (size, out) in enumerate(zip(before, after, strict=True)):
        kernel, stride, padding, dilation = window.kernel[i], window.stride[i], window.padding[i], window.dilation[i]
        side = str(kernel) if dilation == 1 else f"({dilation}*({kernel} - 1) + 1)"
        length = size - (dilation * (kernel - 1) + 1) + 2 * padding
        if window.transposed:
            extra = out - ((size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)  # output_padding
            more = f" + {extra}" if extra else ""
            found.append(f"({size} - 1)*{stride} - 2*{padding} + {side}{more} = {out}")
            continue
        left, right = ("", "") if length % stride == 0 else "⌈⌉" if window.ceil else "⌊⌋"
        text = f"{left}({size} - {side} + 2*{padding})/{stride}{right} + 1"
        rounded = (-(-length // stride) if window.ceil else length // stride) + 1
        if rounded == out + 1:  # a window that starts in the padding is left out
            text += " - 1"
        found.append(f"{text} = {out}")
    return both(found)


def multiply_adds(call: Call) -> tuple[int, str]:
    """Return the multiply-adds of a call and their formula; 0 and "" if it has none."""
    values = call.arguments
    if call.name in CONVOLUTIONS:
        weight, out = values["weight"], call.outputs[0]
        moved = call.image if values.get("transposed") else out
        sizes = [moved.shape[0], *moved.shape[2:], weight.shape[0]]
        taps = [*weight.shape[2:], weight.shape[1]]
        return _counted([sizes, taps])
    if call.name in PRODUCTS:
        first, second = (values[name].shape for name in PRODUCTS[call.name])
        return _counted([[*first[:-1], second[-1]], [first[-1]]])
    if call.name.startswith(ATTENTION):
        query, key, value = (values[name].shape for name in ("query", "key", "value"))
        weights = [*query[:-1], key[-2]]
        count = math.prod(weights) * (query[-1] + value[-1])
        return count, f"{product(weights)} * ({query[-1]} + {value[-1]}) = {count:,}"
    return 0, ""


def _counted(factors: Sequence[Sequence[int]]) -> tuple[int, str]:
    count = math.prod(math.prod(values) for values in factors)
    return count, f"{' * '.join(product(values) for values in factors)} = {count:,}"


def parameter_formula(kind: str, window: Window | None, shapes: Sequence[Sequence[int]]) -> str:
    """Return the arithmetic of the number of parameters.

    Args:
        kind: Kind of the operation.
        window: The window of a convolution.
        shapes: Shapes of the parameters.

    Example:
        ```python
        >>> parameter_formula("convolution", Window((11, 11), (4, 4), (0, 0), (1, 1)), [(96, 3, 11, 11), (96,)])
        '(11*11*3 + 1)*96 = 34,944'

        ```
    """
    total = sum(math.prod(shape) for shape in shapes)
    if not shapes:
        return ""
    if kind in ("convolution", "linear") and len(shapes) in (1, 2) and len(shapes[0]) > 1:
        kernel = [] if window is None else window.kernel
        transposed = window is not None and window.transposed
        out = shapes[-1][0] if len(shapes) == 2 else shapes[0][1 if transposed else 0]
        taps = product([*kernel, math.prod(shapes[0]) // math.prod(kernel) // out])
        if len(shapes) == 1:
            return f"{taps}*{out} = {total:,}"
        if len(shapes[1]) == 1 and (transposed or shapes[1][0] == shapes[0][0]):
            return f"({taps} + 1)*{out} = {total:,}"
    return f"{' + '.join(product(shape) for shape in shapes)} = {total:,}"


def field_formulas(window: Window, field: Field, spatial: Sequence[int]) -> tuple[str, str, str]:
    """Return the arithmetic of receptive field, jump and offset behind a window.

    Args:
        window: The window.
        field: The field of its input.
        spatial: Indices of the window's dimensions that are height and width.
    """
    if field.jump is None or window.transposed or len(spatial) != 2:
        return "", "", ""
    sizes, jumps, offsets = [], [], []
    for axis, i in enumerate(spatial):
        kernel, stride, padding, dilation = window.kernel[i], window.stride[i], window.padding[i], window.dilation[i]
        size, jump, offset = field.size[axis], field.jump[axis], field.offset[axis]
        reach = f"({kernel} - 1)" if dilation == 1 else f"({kernel} - 1)*{dilation}"
        new = [size + (kernel - 1) * dilation * jump, jump * stride]
        new.append(offset + ((kernel - 1) * dilation / 2 - padding) * jump)
        sizes.append(f"{show(size)} + {reach}*{show(jump)} = {show(new[0])}")
        jumps.append(f"{show(jump)}*{stride} = {show(new[1])}")
        offsets.append(f"{show(offset)} + ({reach}/2 - {padding})*{show(jump)} = {show(new[2])}")
    return both(sizes), both(jumps), both(offsets)
