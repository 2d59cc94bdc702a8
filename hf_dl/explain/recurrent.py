"""The cells of a recurrent network: states and gates over a text, cells with a meaning, and saturated gates.

Karpathy, Johnson & Li 2015, "Visualizing and understanding recurrent networks". The functions read the weights of
`torch.nn.RNN`, `GRU` or `LSTM` inside any model, and compute all layers again step by step.

- `record_cells`: hidden states, cell states and gates of each layer, for the inputs of a model
- `find_cell`: the cell that follows a property of the text best, such as the position in the line
- `gate_saturation`: how often each gate is almost closed or almost open
- `cell_html`, `cell_svg`: the text with one background color per character
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

GATES = {"LSTM": ("input", "forget", "output"), "GRU": ("reset", "update"), "RNN": ()}
"""The gates of each module of torch."""


@dataclass
class LayerCells:
    """States and gates of one layer, (batch, length, hidden) each.

    Attributes:
        hidden: Hidden states h after each step.
        cell: Cell states c of an LSTM, otherwise `None`.
        gates: Activations in (0, 1) for each gate of `GATES`.
    """

    hidden: torch.Tensor
    cell: torch.Tensor | None = None
    gates: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class CellMatch:
    """Output of `find_cell`.

    Attributes:
        layer: Layer of the cell, from 0.
        unit: Channel of the cell.
        correlation: Pearson correlation with the property on the second half of the text.
        chosen_by: Correlation on the first half, which selected this cell.
        median: Median absolute correlation of all cells on the second half.
    """

    layer: int
    unit: int
    correlation: float
    chosen_by: float
    median: float


@torch.no_grad()
def read_layers(module: nn.RNNBase, x: torch.Tensor) -> list[LayerCells]:
    """Compute the states and gates of each layer of a recurrent module, from a zero state.

    Args:
        module: A `torch.nn.RNN`, `GRU` or `LSTM` that reads forward.
        x: Inputs, (batch, length, channels).

    Returns:
        One entry per layer.

    Raises:
        ValueError: If the module reads in both directions or is of another kind.
    """
    kind = type(module).__name__
    if kind not in GATES:
        raise ValueError(f"module={kind} has no known gates. Expected one of: {', '.join(GATES)}.")
    if module.bidirectional:
        raise ValueError(f"The {kind} reads in both directions. Expected bidirectional=False.")
    layers = []
    for layer in range(module.num_layers):
        weight_ih, weight_hh, bias_ih, bias_hh = (
            getattr(module, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h = c = x.new_zeros(x.shape[0], module.hidden_size)
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in ("hidden", "cell", *GATES[kind])}
        for from_x in (x @ weight_ih.T + bias_ih).unbind(1):
            from_h = h @ weight_hh.T + bias_hh
            if kind == "LSTM":
                i, f, g, o = (from_x + from_h).chunk(4, dim=-1)
                gates = (i.sigmoid(), f.sigmoid(), o.sigmoid())
                c = gates[1] * c + gates[0] * g.tanh()
                h = gates[2] * c.tanh()
            elif kind == "GRU":
                (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, dim=-1), from_h.chunk(3, dim=-1)
                gates = ((x_r + h_r).sigmoid(), (x_z + h_z).sigmoid())
                h = (1 - gates[1]) * (x_n + gates[0] * h_n).tanh() + gates[1] * h
            else:
                gates, h = (), getattr(from_x + from_h, module.nonlinearity)()
            for name, values in zip(("hidden", "cell", *GATES[kind]), (h, c, *gates), strict=True):
                rows[name].append(values)
        found = {name: torch.stack(values, dim=1) for name, values in rows.items()}
        cell = found.pop("cell")
        x = found.pop("hidden")
        layers.append(LayerCells(hidden=x, cell=cell if kind == "LSTM" else None, gates=found))
    return layers


@torch.no_grad()
def record_cells(model: nn.Module, *args: Any, **inputs: Any) -> list[LayerCells]:
    """Run a model, and compute the states and gates of its recurrent layers.

    Args:
        model: A model with one `torch.nn.RNN`, `GRU` or `LSTM`, such as `RecurrentLMForCausalLM`. It runs in
            evaluation mode.
        *args: Inputs of the model.
        **inputs: Inputs of the model. Leave out masks, because masked tokens have no states.

    Returns:
        One entry per layer.

    Raises:
        ValueError: If the model has no recurrent module, or masks tokens.

    Example:
        ```python
        >>> model = nn.LSTM(3, 4, batch_first=True)
        >>> [layer] = record_cells(model, torch.randn(1, 5, 3))
        >>> layer.cell.shape, sorted(layer.gates)
        (torch.Size([1, 5, 4]), ['forget', 'input', 'output'])

        ```
    """
    modules = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    if not modules:
        raise ValueError(f"model={type(model).__name__} has no torch.nn.RNN, GRU or LSTM.")
    seen: list[Any] = []
    handle = modules[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    training = model.training
    try:
        model.eval()(*args, **inputs)
    finally:
        handle.remove()
        model.train(training)
    if not seen or not isinstance(seen[0], torch.Tensor):
        raise ValueError(
            "The recurrent layers did not get a plain tensor. Run the model without a mask and fused=True."
        )
    return read_layers(modules[0], seen[0] if modules[0].batch_first else seen[0].transpose(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Properties of a text


def position_in_line(text: str) -> torch.Tensor:
    r"""Return the position of each character in its line, from 0.

    Example:
        >>> position_in_line("ab\nc").tolist()
        [0.0, 1.0, 2.0, 0.0]
    """
    positions, here = [], 0
    for letter in text:
        positions.append(float(here))
        here = 0 if letter == "\n" else here + 1
    return torch.tensor(positions)


def inside_quotes(text: str) -> torch.Tensor:
    """Return 1 for characters inside double quotes, including the opening quote, and 0 for others.

    Straight quotes open and close in turn. Curly quotes have a direction.

    Example:
        >>> inside_quotes('a "b" c').tolist()
        [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """
    found, inside = [], False
    for letter in text:
        inside = {'"': not inside, "\u201c": True, "\u201d": False}.get(letter, inside)
        found.append(float(inside))
    return torch.tensor(found)


def bracket_depth(text: str) -> torch.Tensor:
    """Return the number of open brackets (, [ or { after each character.

    Example:
        >>> bracket_depth("a(b[c])").tolist()
        [0.0, 1.0, 1.0, 2.0, 2.0, 1.0, 0.0]
    """
    depths, depth = [], 0
    for letter in text:
        depth = max(0, depth + (letter in "([{") - (letter in ")]}"))
        depths.append(float(depth))
    return torch.tensor(depths)


PROPERTIES: dict[str, Callable[[str], torch.Tensor]] = {
    "position_in_line": position_in_line,
    "inside_quotes": inside_quotes,
    "bracket_depth": bracket_depth,
}
"""Properties of each character that a cell may follow."""


def find_cell(layers: Sequence[LayerCells], target: torch.Tensor, *, state: str = "hidden") -> CellMatch:
    """Find the cell that follows a property best, on a text that was not used to choose it.

    The first half of the text selects the cell with the highest absolute correlation. The second half measures it.
    Otherwise, the best of many random cells would seem to have a meaning.

    Args:
        layers: Output of `record_cells` for one text.
        target: Property of each character, (length,).
        state: "hidden", or "cell" for the cell states of an LSTM.

    Returns:
        The cell and its correlations.

    Raises:
        ValueError: If the lengths differ, or the property is constant in one half.

    Example:
        ```python
        >>> layers = [LayerCells(hidden=torch.tensor([[[0.0, 3], [1, 1], [0, 3], [1, 2]]]))]
        >>> find_cell(layers, torch.tensor([0.0, 1, 0, 1])).unit
        0

        ```
    """
    values = [getattr(layer, state, None) for layer in layers]
    if any(each is None for each in values):
        raise ValueError(f"state={state!r} is not available in these layers. Choose 'hidden', or use an LSTM.")
    units = torch.cat([each[0] for each in values], dim=-1).double()  # (length, layers * hidden)
    if target.shape != units.shape[:1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected {tuple(units.shape[:1])}: one per character."
        )
    half = len(target) // 2
    correlations = []
    for part in (slice(None, half), slice(half, None)):
        if len(set(target[part].tolist())) < 2:
            raise ValueError("The property is constant in one half of the text. Use a longer text that has it.")
        correlations.append(_correlation(units[part], target[part].double()))
    chosen = int(correlations[0].abs().argmax())
    width = layers[0].hidden.shape[-1]
    return CellMatch(
        layer=chosen // width,
        unit=chosen % width,
        correlation=correlations[1][chosen].item(),
        chosen_by=correlations[0][chosen].item(),
        median=correlations[1].abs().median().item(),
    )


def _correlation(units: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the Pearson correlation of each column with the target; 0 for constant columns."""
    units, target = units - units.mean(0), target - target.mean()
    return (units * target[:, None]).sum(0) / (units.norm(dim=0) * target.norm()).clamp(min=1e-12)


def gate_saturation(layers: Sequence[LayerCells], *, low: float = 0.1, high: float = 0.9) -> list[dict[str, Any]]:
    """Compute how often the gates are almost closed or almost open.

    Args:
        layers: Output of `record_cells`.
        low: A gate below this value counts as closed.
        high: A gate above this value counts as open.

    Returns:
        One row per layer and gate with `layer`, `gate`, `mean`, and the fractions of values that are `closed` and
        `open`. `always_open` is the fraction of units that are open in more than 90 % of the steps.

    Raises:
        ValueError: If the limits are not in 0 < low < high < 1.
    """
    if not 0 < low < high < 1:
        raise ValueError(f"low={low} and high={high} must be in the order 0 < low < high < 1.")
    return [
        {
            "layer": number,
            "gate": name,
            "closed": (values < low).double().mean().item(),
            "open": (values > high).double().mean().item(),
            "mean": values.double().mean().item(),
            "always_open": ((values > high).double().mean(dim=(0, 1)) > 0.9).double().mean().item(),
        }
        for number, layer in enumerate(layers)
        for name, values in layer.gates.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Colored text


def _color(value: float) -> str:
    """Return blue for -1, white for 0 and red for 1."""
    fade = round(255 * (1 - min(1.0, abs(value))))
    red, green, blue = (255, fade, fade) if value > 0 else (fade, fade, 255)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _scaled(text: str, values: torch.Tensor) -> list[float]:
    if values.shape != (len(text),):
        raise ValueError(f"values has shape {tuple(values.shape)}, expected ({len(text)},): one per character.")
    return (values.double() / values.double().abs().max().clamp(min=1e-12)).tolist()


def cell_html(text: str, values: torch.Tensor, *, title: str = "") -> str:
    """Write a text with the activation of a cell as the background color of each character.

    Args:
        text: The text.
        values: One activation per character. The largest absolute value is fully red, or blue if it is negative.
        title: Line above the text.

    Returns:
        A `<figure>` element for a web page.

    Raises:
        ValueError: If the number of values is not the number of characters.

    Example:
        >>> cell_html("a<", torch.tensor([1.0, -1.0])).count("<span")
        2
    """
    letters = []
    for letter, value in zip(text, _scaled(text, values), strict=True):
        shown = "&crarr;\n" if letter == "\n" else html.escape(letter)
        letters.append(f'<span style="background:{_color(value)}">{shown}</span>')
    caption = f"<figcaption>{html.escape(title)}</figcaption>" if title else ""
    style = "white-space:pre-wrap;overflow-wrap:anywhere;color:#000;background:#fff"
    return f'<figure>{caption}<pre style="{style}">{"".join(letters)}</pre></figure>'


def cell_svg(text: str, values: torch.Tensor, *, title: str = "", columns: int = 80) -> str:
    """Draw a text with the activation of a cell as the background color of each character.

    Args:
        text: The text.
        values: One activation per character, as in `cell_html`.
        title: Line above the text.
        columns: Characters per line. Longer lines are wrapped.

    Returns:
        An SVG picture.

    Raises:
        ValueError: If the number of values is not the number of characters, or `columns` is below 1.

    Example:
        >>> cell_svg("ab", torch.tensor([1.0, -1.0])).count("<rect")
        3
    """
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1.")
    width, height, row, column, marks = 8, 18, 1 if title else 0, 0, []
    for letter, value in zip(text, _scaled(text, values), strict=True):
        if column == columns:
            row, column = row + 1, 0
        x, y = column * width, row * height
        shown = "\u21b5" if letter == "\n" else letter
        marks.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{_color(value)}"/>')
        if shown.isprintable() and shown != " ":
            marks.append(f'<text x="{x + width / 2:g}" y="{y + 13}">{html.escape(shown)}</text>')
        row, column = (row + 1, 0) if letter == "\n" else (row, column + 1)
    size = (columns * width, (row + 1) * height)
    if title:
        marks.insert(0, f'<text x="0" y="13" text-anchor="start" font-weight="bold">{html.escape(title)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" font-family="monospace" '
        f'font-size="13" text-anchor="middle"><rect width="100%" height="100%" fill="#fff"/>{"".join(marks)}</svg>'
    )
