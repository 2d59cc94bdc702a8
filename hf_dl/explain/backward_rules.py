"""Other backward passes of ReLU and max pooling: guided backpropagation, deconvolution and receptive fields.

A `TorchFunctionMode` replaces the calls, so it finds `nn.ReLU` and `F.relu`, in place or not, and a module that runs
several times. Nothing is attached to the model. Therefore nothing stays after an error.

With the input x and the gradient g of the output of a ReLU, the gradient of the input is:

- backpropagation: g where x > 0
- deconvolution (Zeiler & Fergus 2014): g where g > 0
- guided backpropagation (Springenberg et al. 2015): g where x > 0 and g > 0
- receptive field: g. Max pooling distributes g over its window. So no path from an input pixel is cut.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

RULES = ("deconvolution", "guided_backprop", "receptive_field")
_RELU = (F.relu, torch.relu, torch.Tensor.relu)
_RELU_IN_PLACE = (torch.relu_, torch.Tensor.relu_)


class _Relu(torch.autograd.Function):
    """min(max(x, 0), ceiling) with the backward pass of a rule."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ceiling: float, rule: str) -> torch.Tensor:
        ctx.rule = rule
        if rule == "guided_backprop":
            ctx.save_for_backward((x > 0) & (x < ceiling))
        return x.clamp(0, ceiling)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.rule == "receptive_field":
            return gradient, None, None
        gradient = gradient.relu()
        return (gradient * ctx.saved_tensors[0] if ctx.rule == "guided_backprop" else gradient), None, None


def _as_relu(func: Any, args: tuple, kwargs: dict) -> tuple[torch.Tensor, float, bool] | None:
    """Return the input of a ReLU or ReLU6, its ceiling, and whether it works in place; None for other calls."""
    values = [*args, *kwargs.values()]
    if func in _RELU:
        return values[0], math.inf, any(value is True for value in values[1:])
    if func in _RELU_IN_PLACE:
        return values[0], math.inf, True
    if func is F.relu6:
        return values[0], 6.0, any(value is True for value in values[1:])
    if func in (F.hardtanh, F.hardtanh_):  # nn.ReLU6 is a hardtanh from 0 to 6
        names = ("input", "min_val", "max_val", "inplace")
        given = {"min_val": -1.0, "max_val": 1.0, "inplace": False, **dict(zip(names, args, strict=False)), **kwargs}
        if given["min_val"] == 0:
            return given["input"], given["max_val"], given["inplace"] or func is F.hardtanh_
    return None


def _pool(
    input: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """Max pooling whose gradient goes to all pixels of the window."""
    maximum = F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    if dilation not in (1, (1, 1), [1, 1]):
        return maximum
    mean = F.avg_pool2d(input, kernel_size, stride or None, padding, ceil_mode)
    return mean + (maximum - mean).detach()


class BackwardRule(TorchFunctionMode):
    """Gives all ReLUs the backward pass of a rule while it is active.

    Args:
        rule: A name of `RULES`.

    Attributes:
        calls: Number of replaced ReLUs.

    Example:
        ```python
        >>> x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
        >>> with BackwardRule("guided_backprop"):
        ...     y = F.relu(x)
        >>> torch.autograd.grad(y, x, torch.tensor([1.0, -1.0, 1.0]))[0]
        tensor([0., 0., 1.])

        ```
    """

    def __init__(self, rule: str):
        super().__init__()
        assert rule in RULES, rule
        self.rule, self.calls = rule, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Replace the calls of ReLU and, for receptive fields, of max pooling."""
        kwargs = kwargs or {}
        found = _as_relu(func, args, kwargs)
        if found is not None:
            x, ceiling, in_place = found
            self.calls += 1
            result = _Relu.apply(x, ceiling, self.rule)
            return x.copy_(result) if in_place else result  # later layers may read x, for example a shortcut
        if self.rule == "receptive_field" and getattr(func, "__name__", "") == "max_pool2d":
            given = {
                {"input": "x"}.get(name, name): value for name, value in kwargs.items() if name != "return_indices"
            }
            return _pool(*args, **given)
        return func(*args, **kwargs)
