"""The precision in which a module computes, for modules whose inputs may have another one."""

import torch
from torch import nn


def reference_parameter(module: nn.Module) -> torch.Tensor:
    """Return a parameter with the dtype and the device in which a module computes.

    The weights themselves may be integers, or may be missing after quantization. An adapter may replace them. Code
    that needs the dtype therefore calls this function instead of reading the weight of a layer.

    Args:
        module: The module.

    Returns:
        The first floating-point parameter, or an empty float32 tensor on the CPU for a module without one.

    Example:
        ```python
        >>> reference_parameter(nn.Linear(2, 3).half()).dtype
        torch.float16

        ```
    """
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter
    return torch.empty(0)
