"""Gradients through time on a page: measured curves of several recurrent cells, without the layout of the page."""

import functools
import html
import math
from collections.abc import Mapping, Sequence

import torch

from ..data.memory_tasks import TASKS, MemoryTask
from ..models.layers_recurrent import CELLS, init_recurrent
from ..recipes.gradient_flow import gradient_norms

NAMES = {"rnn": "RNN, tanh", "rnn_relu": "RNN, ReLU", "gru": "GRU", "lstm": "LSTM"}
COLORS = {"rnn": "#0072B2", "rnn_relu": "#D55E00", "gru": "#009E73", "lstm": "#CC79A7"}
HIDDEN_SIZE = 64
SEQUENCES = 4
LENGTHS = 5, 200  # smallest and largest number of steps
RADII = 0.1, 3.0
FORGET_BIASES = -2.0, 6.0
LIMITS = -24, 24  # exponents of ten on the vertical axis
CSS = """
.flow svg {width: 100%; max-width: 760px; height: auto; display: block}
.flow .grid {stroke: currentColor; stroke-opacity: 0.15}
.flow .one {stroke: currentColor; stroke-opacity: 0.6; stroke-dasharray: 3 3}
.flow text {fill: currentColor; font-size: 11px}
.flow polyline {fill: none; stroke-width: 2}
.flow ul {list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 0; margin: 6px 0}
.flow li {white-space: nowrap; margin: 0}
.flow i {display: inline-block; width: 18px; height: 3px; margin-right: 7px; vertical-align: middle}
"""
assert NAMES.keys() == CELLS.keys()


@functools.lru_cache(maxsize=128)
def measure(
    cell: str,
    length: int = 60,
    *,
    spectral_radius: float | None = None,
    forget_bias: float | None = None,
    seed: int = 0,
) -> tuple[float, ...]:
    """Measure the gradient of the last step of a new cell with respect to the state of each earlier step.

    The inputs are sequences of the copy task of `hf_dl.data.memory_tasks`.

    Args:
        cell: A key of `CELLS`.
        length: Number of steps.
        spectral_radius: Largest absolute eigenvalue of the recurrent matrix of each gate. Defaults to the random
            weights of torch.
        forget_bias: Bias of the forget gate of an LSTM; other cells ignore it. Defaults to the random one of torch.
        seed: Seed of the weights.

    Returns:
        The norm of the gradient, relative to the last step, for each distance from 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> curve = measure("rnn", 20)
        >>> curve[0], curve[19] < 0.01
        (1.0, True)
    """
    if cell not in CELLS:
        raise ValueError(f"cell={cell!r} is unknown. Choose one of: {', '.join(CELLS)}.")
    for name, value, (least, most) in (
        ("length", length, LENGTHS),
        ("spectral_radius", spectral_radius, RADII),
        ("forget_bias", forget_bias, FORGET_BIASES),
    ):
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name}={value} is out of range. Choose a number from {least} to {most}.")
    kind, task = CELLS[cell], MemoryTask("copy", length=length, num_rows=SEQUENCES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = kind.layers(TASKS["copy"].features, HIDDEN_SIZE, batch_first=True, **kind.options)
        init_recurrent(module, forget_bias=forget_bias, spectral_radius=spectral_radius)
    x = torch.stack([task[row]["inputs_embeds"] for row in range(SEQUENCES)])
    return tuple(gradient_norms(module, x).tolist())


def reach(curve: Sequence[float]) -> int:
    """Return the largest distance up to which a curve stays at 1 percent or more.

    Example:
        >>> reach([1.0, 0.1, 0.02, 0.001, 0.02])
        2
    """
    return next((distance for distance, value in enumerate(curve) if value < 0.01), len(curve)) - 1


def describe(curve: Sequence[float]) -> str:
    """Describe a curve in a few words.

    Example:
        >>> describe([1.0, 0.1, 0.001]), describe([1.0, 50.0, 2e3]), describe([1.0, 0.9, 1.1])
        ('vanishes: below 1% after 2 steps', 'explodes: 2e+03 times after 2 steps', 'stays near 1.1')
    """
    last, steps = curve[-1], len(curve) - 1
    if reach(curve) < steps:
        return f"vanishes: below 1% after {reach(curve) + 1} step{'s' * (reach(curve) > 0)}"
    if last > 100:
        return f"explodes: {last:.0e} times after {steps} steps"
    if 0.5 <= last <= 2:
        return f"stays near {last:.1f}"
    return f"{'falls' if last < 1 else 'grows'} to {last:.2g} after {steps} steps"


def draw(curves: Mapping[str, Sequence[float]]) -> str:
    """Draw curves on a logarithmic axis, as HTML with an SVG picture.

    Args:
        curves: The curve of each cell. All have the same length.
    """
    steps = len(next(iter(curves.values()))) - 1
    logs = {
        cell: [min(max(math.log10(value), LIMITS[0]), LIMITS[1]) if value > 0 else LIMITS[0] for value in curve]
        for cell, curve in curves.items()
    }
    low = math.floor(min(-2.0, *(min(values) for values in logs.values())))
    high = math.ceil(max(1.0, *(max(values) for values in logs.values())))
    left, top, width, height = 52, 8, 410, 236

    def place(distance: float, exponent: float) -> tuple[float, float]:
        return left + width * distance / steps, top + height * (high - exponent) / (high - low)

    marks = []
    jump = max(1, math.ceil((high - low) / 8))
    for exponent in range(-(-low // jump) * jump, high + 1, jump):
        y = place(0, exponent)[1]
        kind = "one" if exponent == 0 else "grid"
        marks.append(f"<line class='{kind}' x1='{left}' y1='{y:.1f}' x2='{left + width}' y2='{y:.1f}'/>")
        marks.append(f"<text x='{left - 6}' y='{y + 4:.1f}' text-anchor='end'>{_power(exponent)}</text>")
    for distance in range(0, steps + 1, next(jump for jump in (1, 2, 5, 10, 20, 50) if steps / jump < 8)):
        x = place(distance, low)[0]
        marks.append(f"<line class='grid' x1='{x:.1f}' y1='{top}' x2='{x:.1f}' y2='{top + height}'/>")
        marks.append(f"<text x='{x:.1f}' y='{top + height + 16}' text-anchor='middle'>{distance}</text>")
    for cell, values in logs.items():
        points = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in enumerate(values))
        marks.append(f"<polyline points='{points}' stroke='{COLORS[cell]}'/>")
    marks.append(f"<text x='{left + width / 2}' y='{top + height + 34}' text-anchor='middle'>steps back, k</text>")
    legend = "".join(
        f"<li><i style='background: {COLORS[cell]}'></i>{NAMES[cell]}: {describe(curve)}</li>"
        for cell, curve in curves.items()
    )
    label = html.escape(f"Norm of the gradient over {steps} steps for {', '.join(curves)}", quote=True)
    size = f"0 0 {left + width + 12} {top + height + 40}"
    return (
        f"<div class='flow'><ul>{legend}</ul><svg viewBox='{size}' role='img' aria-label='{label}'>"
        f"{''.join(marks)}</svg></div>"
    )


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else f"10<tspan dy='-4' font-size='8'>{exponent}</tspan>"
