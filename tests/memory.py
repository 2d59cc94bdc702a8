"""The alignment of weights in memory, which affects the last bits of results."""

from itertools import chain

from torch import nn


def aligned(module: nn.Module) -> nn.Module:
    """Give each weight memory of its own, as a new model has it.

    In a file that is mapped into memory weights begin anywhere, and the CPU then takes other kernels, which sum in
    another order. Once aligned, the same weights give the same to the last bit.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        tensor.data = tensor.data.clone()
    return module
