"""The peak memory of a training step, predicted from the steps of a forward pass.

    at each step of the backward pass:
    parameters + buffers + images + optimizer state
        + tensors saved by the steps that are still to come
        + gradients of the parameters so far
        + gradients of the feature maps that are in use

The prediction walks through the steps from the last to the first. It counts the gradient of a step's output, and the
gradients of its inputs, which a sum and a concatenation share. It includes no temporary memory of kernels, and no
memory that an allocator reserves without using it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .arithmetic_trace import IMAGE, Step

OPTIMIZERS = {"sgd": (0, 0), "momentum": (1, 0), "adam": (2, 2)}
"""For each optimizer, the copies of all parameters in its state, and of the largest parameter during an update."""
SHARING = ("+", "concatenate", "copy")
"""Functions whose inputs get the gradient of the output, or a part of it, without a copy."""


@dataclass(frozen=True)
class Peak:
    """The largest memory in use during a training step.

    Attributes:
        bytes: The sum.
        step: Name of the module whose backward pass needs the most memory, or "optimizer".
        parts: Bytes of parameters, buffers, images, optimizer state, gradients, saved tensors and maps at this time.
    """

    bytes: int
    step: str
    parts: Mapping[str, int]


def tensor_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Return the bytes of tensors; a shared tensor counts once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def predict_peak(
    model: nn.Module, image: torch.Tensor, steps: Sequence[Step], output: int, *, optimizer: str = "adam"
) -> Peak:
    """Predict the peak memory of a training step, from the second step on, when the optimizer has its state.

    Args:
        model: The network.
        image: The images.
        steps: Steps of a forward pass in training mode.
        output: Number of the step that makes the output.
        optimizer: A key of `OPTIMIZERS`.

    Returns:
        The peak.

    Raises:
        ValueError: If the optimizer is unknown.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is unknown. Choose one of: {', '.join(OPTIMIZERS)}.")
    copies, update = OPTIMIZERS[optimizer]
    trained = {name: p.numel() * p.element_size() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {
        "parameters": tensor_bytes(list(model.parameters())),
        "buffers": tensor_bytes(list(model.buffers())),
        "images": tensor_bytes([image]),
        "optimizer": copies * sum(trained.values()),
    }
    saved = sum(step.saved_bytes for step in steps)
    learns = _find_learning(steps, trained)
    gradients, best = 0, Peak(-1, "", {})
    sizes: dict[int, int] = {output: steps[output].result.bytes} if output != IMAGE else {}
    owner = {output: output}  # step -> number of the buffer that holds the gradient of its output

    def consider(name: str, temporary: int) -> None:
        nonlocal best
        parts = {**fixed, "gradients": gradients, "saved": saved, "feature_map_gradients": temporary}
        if sum(parts.values()) > best.bytes:
            best = Peak(sum(parts.values()), name, parts)

    free = len(steps)  # numbers of new buffers
    for number in range(len(steps) - 1, -1, -1):
        step = steps[number]
        if number not in owner or not learns[number]:
            continue
        made = {}
        for source in step.inputs:
            if source == IMAGE or not learns[source]:
                continue
            if step.operation in SHARING and source not in owner:
                made[source] = owner[number]
            else:
                made[source], free = free, free + 1
                sizes[made[source]] = steps[source].result.bytes
        gradients += sum(trained.get(name, 0) for name in step.parameters)
        consider(step.name, sum(sizes.values()))
        del owner[number]
        for source in made:
            if source in owner and list(owner.values()).count(owner[source]) == 1:
                made[source] = owner[source]  # added in place
        owner |= made
        sizes = {buffer: size for buffer, size in sizes.items() if buffer in owner.values()}
        saved -= step.saved_bytes
    saved = 0
    consider("optimizer", update * max(trained.values(), default=0))
    return best


def _find_learning(steps: Sequence[Step], trained: Mapping[str, int]) -> list[bool]:
    """Return for each step whether its output depends on a trained parameter."""
    used: set[str] = set()
    learns = []
    for step in steps:
        used |= {name for name in step.parameters if name in trained}
        own = any(name in trained for name in step.parameters)
        learns.append(own or any(source != IMAGE and learns[source] for source in step.inputs))
    return learns
