"""The arithmetic of a network: sizes, parameters, multiply-adds, memory and receptive fields, each with its formula.

`arithmetic(model, image_size)` calls any image model once in evaluation mode and once in training mode. It returns one
row per layer. Functional calls such as `F.relu(x)`, `x + y` and attention have rows, too. The model and the images may
be on the meta device or in a `FakeTensorMode`, which needs no memory for weights and feature maps:

    with torch.device("meta"):
        model = torchvision.models.vgg16()
    result = arithmetic(model, 224)
    result.rows[0].formulas["size"]       # '(224 - 3 + 2*1)/1 + 1 = 224'

- Multiply-adds: convolutions, linear layers, matrix products and attention; other operations have none.
- Parameters belong to the first row that uses them. A shared parameter counts once.
- Saved bytes are measured in training mode with `torch.autograd.graph.saved_tensors_hooks`: each storage once, for the
  first layer that saves it, without parameters, buffers and the images.
- Receptive fields are theoretical and may be larger than the image. `None` stands for "no grid", as for tokens.
  A group or instance normalization sees all pixels. Batch normalization in evaluation mode does not.

Where other tools count differently (their issues are in parentheses):

- torchinfo: Biases and normalizations have multiply-adds. A linear layer on tokens has the multiply-adds of a single
  token (torchinfo #77, #226). Matrix products of attention are missing. Versions before June 2026 count shared
  parameters several times (#322, #377).
- fvcore: `scaled_dot_product_attention` is unsupported, and left out with a warning.
- thop: `nn.MultiheadAttention` and functional calls have 0 operations (pytorch-OpCounter #197).
- `torch.utils.flop_counter`: Attention on the CPU has 0 operations before torch 2.15 (pytorch #195460).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from .arithmetic_formulas import field_formulas, parameter_formula, product, show, size_formula
from .arithmetic_memory import Peak, predict_peak
from .arithmetic_trace import Operation, Step, make_steps, trace

LAYERS = ("convolution", "pooling", "linear")
"""Kinds of operations whose outputs are the "memory" of lectures and papers."""

Shapes = dict[str, tuple[int, ...]]  # of the parameters by name, in their order in the model


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: Name of the module. A function has the name of the module that calls it.
        operation: Class of the module, or name of the function.
        kind: convolution, linear, attention, pooling, normalization or other.
        kernel: Sides of the window, or None.
        stride: Steps of the window, or None.
        padding: Padding of the window, or None.
        output: Shape of the output.
        parameters: Number of parameters.
        multiply_adds: Number of multiply-adds.
        output_bytes: Bytes of the output; 0 if it is written in place.
        saved_bytes: Bytes saved for backward, measured in training mode.
        field: Height and width of the receptive field in pixels, or None if the output does not depend on the image.
        jump: Pixels between the fields of neighbors, in rows and columns, or None.
        offset: Center of the first field in pixels, or None without a grid.
        formulas: The arithmetic of `size`, `parameters`, `multiply_adds`, `output_bytes`, `field`, `jump`, `offset`.
        only_training: Whether the layer runs in training mode only, such as dropout.
    """

    name: str
    operation: str
    kind: str
    kernel: tuple[int, ...] | None
    stride: tuple[int, ...] | None
    padding: tuple[int, ...] | None
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int
    output_bytes: int
    saved_bytes: int
    field: tuple[int, int] | None
    jump: tuple[float, float] | None
    offset: tuple[float, float] | None
    formulas: dict[str, str] = field(default_factory=dict)
    only_training: bool = False


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of a network.

    Attributes:
        rows: The layers in the order in which they run.
        image: Shape of the images.
        image_bytes: Bytes of the images.
        parameters: Number of parameters of the model; a shared parameter counts once.
        unused: Names of the parameters that the forward pass does not use.
        peaks: Predicted peak memory of a training step for each optimizer.
        in_training: Whether saved bytes were measured in training mode. Batch normalization cannot learn from one
            value per channel. In such a case they are measured in evaluation mode.
    """

    rows: list[Row]
    image: tuple[int, ...]
    image_bytes: int
    parameters: int
    unused: list[str]
    peaks: dict[str, Peak]
    in_training: bool = True

    @property
    def multiply_adds(self) -> int:
        """Return the multiply-adds of a forward pass in evaluation mode."""
        return sum(row.multiply_adds for row in self.rows if not row.only_training)

    @property
    def output_bytes(self) -> int:
        """Return the bytes of all outputs of a forward pass in evaluation mode."""
        return sum(row.output_bytes for row in self.rows if not row.only_training)

    @property
    def layer_bytes(self) -> int:
        """Return the bytes of the images and the outputs of convolutions, pooling and linear layers.

        This is the "memory" in the tables of lectures. It leaves out normalizations, activations and sums.
        """
        found = [row for row in self.rows if row.kind in LAYERS and not row.only_training]
        size = self.image_bytes // math.prod(self.image)
        return self.image_bytes + sum(math.prod(row.output) * size for row in found)

    @property
    def saved_bytes(self) -> int:
        """Return the bytes saved for backward."""
        return sum(row.saved_bytes for row in self.rows)

    def parameters_of(self, kind: str) -> int:
        """Return the number of parameters of one kind of layers, such as "linear"."""
        return sum(row.parameters for row in self.rows if row.kind == kind)

    def largest(self, attribute: str, share: float = 0.5) -> list[tuple[Row, float]]:
        """Return the fewest rows that hold a share of all parameters or bytes, each with its own share.

        Args:
            attribute: "parameters", "multiply_adds", "output_bytes" or "saved_bytes".
            share: Share of the sum over all rows.
        """
        total = sum(getattr(row, attribute) for row in self.rows)
        found, missing = [], share * total
        for row in sorted(self.rows, key=lambda row: getattr(row, attribute), reverse=True):
            if missing <= 0:
                break
            found.append((row, getattr(row, attribute) / total))
            missing -= getattr(row, attribute)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return rows and totals as JSON can hold them."""
        found = asdict(self)
        names = ("multiply_adds", "output_bytes", "layer_bytes", "saved_bytes")
        return {**{name: getattr(self, name) for name in names}, **found}


def arithmetic(
    model: nn.Module, pixel_values: torch.Tensor | int, *, optimizers: Sequence[str] = ("sgd", "momentum", "adam")
) -> Arithmetic:
    """Compute the arithmetic of an image model.

    Args:
        model: Any module that maps images to a tensor or to an output with tensors.
        pixel_values: Images (batch, channels, height, width), or the side of one image with three channels in pixels.
            Their values have no effect.
        optimizers: Optimizers for the prediction of the peak memory, keys of `OPTIMIZERS`.

    Returns:
        Rows and totals.

    Raises:
        ValueError: If the images are not of shape (batch, channels, height, width).

    Example:
        ```python
        >>> model = nn.Sequential(nn.Conv2d(3, 96, 11, stride=4), nn.ReLU(), nn.MaxPool2d(3, 2))
        >>> result = arithmetic(model, 227)
        >>> [(row.operation, row.output[2:], row.field) for row in result.rows]
        [('Conv2d', (55, 55), (11, 11)), ('ReLU', (55, 55), (11, 11)), ('MaxPool2d', (27, 27), (19, 19))]
        >>> result.rows[0].formulas["parameters"], result.rows[2].formulas["field"]
        ('(11*11*3 + 1)*96 = 34,944', '11 + (3 - 1)*4 = 19')

        ```
    """
    if isinstance(pixel_values, int):
        first = next(iter(model.parameters()), torch.zeros(()))
        pixel_values = torch.zeros(1, 3, pixel_values, pixel_values, device=first.device, dtype=first.dtype)
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, channels, height, width)."
        )
    steps, _ = make_steps(trace(model, pixel_values))
    in_training = True
    try:
        found = trace(model, pixel_values, training=True)
    except ValueError as error:
        if "value per channel" not in str(error):
            raise
        in_training, found = False, trace(model, pixel_values)
    trained, output = make_steps(found)
    peaks = {name: predict_peak(model, pixel_values, trained, output, optimizer=name) for name in optimizers}
    used = {name for step in steps for name in step.parameters}
    return Arithmetic(
        rows=_join(steps, trained, {name: tuple(p.shape) for name, p in model.named_parameters()}),
        image=tuple(pixel_values.shape),
        image_bytes=pixel_values.numel() * pixel_values.element_size(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        unused=[name for name, _ in model.named_parameters() if name not in used],
        peaks=peaks,
        in_training=in_training,
    )


def _keys(steps: Sequence[Step]) -> list[tuple[str, int, str, int]]:
    """Return an identity for each step that is the same in both modes."""
    counts: dict[tuple[str, int, str], int] = {}
    keys = []
    for step in steps:
        key = (step.name, step.number, step.operation)
        counts[key] = counts.get(key, 0) + 1
        keys.append((*key, counts[key]))
    return keys


def _join(steps: Sequence[Step], trained: Sequence[Step], shapes: Shapes) -> list[Row]:
    """Make the rows of the evaluation pass, with saved bytes and extra steps of the training pass."""
    training = dict(zip(_keys(trained), trained, strict=True))
    rows, number = [], {key: i for i, key in enumerate(training)}
    known = dict(zip(_keys(steps), steps, strict=True))
    waiting = [key for key in training if key not in known and training[key].saved_bytes]
    for key, step in known.items():
        place = number.get(key, -1)
        while waiting and number[waiting[0]] < place:
            rows.append(_make_row(training[waiting.pop(0)], shapes, only_training=True))
        saved = training[key].saved_bytes if key in training else 0
        rows.append(_make_row(step, shapes, saved_bytes=saved))
    return rows + [_make_row(training[key], shapes, only_training=True) for key in waiting]


def _make_row(step: Step, shapes: Shapes, *, saved_bytes: int | None = None, only_training: bool = False) -> Row:
    main, result = step.main, step.result
    kind, window, place = main.call.kind, main.window, result.field
    if main.call.name == "mean" and None not in (main.before, place) and place.size != main.before.size:
        kind = "pooling"  # a mean over the pixels
    elif kind == "other" and "norm" in step.operation.lower():
        kind = "normalization"
    own = set() if only_training else set(step.parameters)
    found = [shape for name, shape in shapes.items() if name in own]
    size = result.bytes // max(math.prod(result.shape), 1)
    formulas = {
        "parameters": parameter_formula(kind, window, found),
        "multiply_adds": main.macs[1],
        "output_bytes": "in place" if result.in_place else f"{product(result.shape)}*{size} = {result.bytes:,}",
        **_window_formulas(main),
    }
    return Row(
        name=step.name if step.number == 1 else f"{step.name} (call {step.number})",
        operation=step.operation,
        kind=kind,
        kernel=None if window is None else window.kernel,
        stride=None if window is None else window.stride,
        padding=None if window is None else window.padding,
        output=result.shape,
        parameters=sum(math.prod(shape) for shape in found),
        multiply_adds=sum(each.macs[0] for each in step.operations),
        output_bytes=0 if result.in_place else result.bytes,
        saved_bytes=step.saved_bytes if saved_bytes is None else saved_bytes,
        field=None if place is None else place.size,
        jump=None if place is None else place.jump,
        offset=None if place is None or place.jump is None else place.offset,
        formulas={name: text for name, text in formulas.items() if text},
        only_training=only_training,
    )


def _window_formulas(main: Operation) -> dict[str, str]:
    window, before, after = main.window, main.before, main.result.field
    if window is None:
        if before is None or after is None or before.jump is None or before.size == after.size or after.jump:
            return {}
        grown = zip(before.size, before.jump, after.size, strict=True)  # a mean over all positions
        texts = [f"{show(old)} + {show((new - old) / jump)}*{show(jump)} = {show(new)}" for old, jump, new in grown]
        return {"field": "; ".join(dict.fromkeys(texts))}
    count = len(window.kernel)
    found = {"size": size_formula(window, *main.spatial)}
    if before is not None:
        spatial = list(range(count))[-2:] if count >= 2 else []
        found |= dict(zip(("field", "jump", "offset"), field_formulas(window, before, spatial), strict=True))
    return found
