"""Recurrent cells from their definitions, RNN, GRU and LSTM: single steps, and layers in one or two directions.

* RNN: Elman 1990, "Finding structure in time". `rnn_relu` is the variant of Le et al. 2015.
* GRU: Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder".
* LSTM: Hochreiter & Schmidhuber 1997, "Long short-term memory", with the forget gate of Gers et al. 2000.

The order of the gates and the two biases are the same as in torch, so weights can be exchanged with the modules of
torch. As in torch, the reset gate of the GRU multiplies the product U h. In the paper it multiplies h, before the
product: U (r * h). The two forms give different results.

Each module runs in one of two ways, whose results differ only by rounding. `fused=False` runs the definition step by
step. `fused=True`, the default, uses the kernel of torch and is faster. There is one exception: the CPU kernel for
packed sequences has a backward pass whose time grows with the square of the length. Therefore, layers that train with
a mask on a CPU always run step by step.

`torch.compile` breaks its graph at `torch.nn.LSTM`. With `torch._dynamo.config.allow_rnn = True` it makes one graph.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import initialization as init

State = tuple[torch.Tensor, ...]
"""h, (batch, layers, hidden), and for an LSTM also c. In two directions, hidden is the channels of both."""


def rnn_step(
    x: torch.Tensor,
    hidden: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor,
    bias_hh: torch.Tensor,
    *,
    activation: Callable[[torch.Tensor], torch.Tensor] = torch.tanh,
) -> torch.Tensor:
    """Compute one step of a vanilla RNN: h' = tanh(W x + b + U h + c).

    Args:
        x: Inputs, (batch, inputs).
        hidden: Hidden state h, (batch, hidden).
        weight_ih: W, (hidden, inputs).
        weight_hh: U, (hidden, hidden).
        bias_ih: b, (hidden,).
        bias_hh: c, (hidden,).
        activation: `torch.tanh` or `torch.relu`.

    Returns:
        The next h, (batch, hidden).
    """
    return activation(x @ weight_ih.T + bias_ih + hidden @ weight_hh.T + bias_hh)


def gru_step(
    x: torch.Tensor,
    hidden: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor,
    bias_hh: torch.Tensor,
) -> torch.Tensor:
    """Compute one step of a GRU.

    Args:
        x: Inputs, (batch, inputs).
        hidden: Hidden state h, (batch, hidden).
        weight_ih: Weight of x, (3 * hidden, inputs), with the rows of the reset gate, update gate and new state.
        weight_hh: Weight of h, (3 * hidden, hidden).
        bias_ih: Bias of the product with x, (3 * hidden,).
        bias_hh: Bias of the product with h, (3 * hidden,).

    Returns:
        The next h, (batch, hidden).
    """
    return gru_update(x @ weight_ih.T + bias_ih, hidden @ weight_hh.T + bias_hh, hidden)


def gru_update(from_x: torch.Tensor, from_h: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Compute the next h, (..., hidden), from the products with x and h, (..., 3 * hidden), and the last h."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, dim=-1), from_h.chunk(3, dim=-1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()  # the reset gate acts after the product with h
    return (1 - z) * n + z * hidden


def lstm_step(
    x: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor],
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor,
    bias_hh: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute one step of an LSTM.

    Args:
        x: Inputs, (batch, inputs).
        state: Hidden state h and cell state c, (batch, hidden) each.
        weight_ih: Weight of x, (4 * hidden, inputs), with the rows of the input, forget, cell and output gate.
        weight_hh: Weight of h, (4 * hidden, hidden).
        bias_ih: Bias of the product with x, (4 * hidden,).
        bias_hh: Bias of the product with h, (4 * hidden,).

    Returns:
        The next h and c, (batch, hidden) each.
    """
    hidden, cell = state
    return lstm_update(x @ weight_ih.T + bias_ih + hidden @ weight_hh.T + bias_hh, cell)


def lstm_update(gates: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the next h and c, (..., hidden), from the gates before activation, (..., 4 * hidden), and the last c."""
    i, f, g, o = gates.chunk(4, dim=-1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()  # c' = f * c + i * g
    hidden = o.sigmoid() * cell.tanh()  # h' = o * tanh(c')
    return hidden, cell


@dataclass(frozen=True)
class CellType:
    """A row of `CELLS`.

    Args:
        update: Returns the next state from W x, U h and the last state. Biases are already added.
        gates: Rows of the weights, in multiples of the hidden size.
        states: Number of tensors of the state.
        layers: Module of torch with the same weights.
        kernel: Function of torch that runs such layers.
        step: Definition of one step. It returns h, and c of an LSTM.
        fused_step: Function of torch that computes the same step.
        attribute: Name of the module inside `RecurrentLayers`, a part of the names in checkpoints.
        sum_biases: Whether only the sum of the two biases matters.
        options: Further arguments of `layers`.
    """

    update: Callable[[torch.Tensor, torch.Tensor, State], State]
    gates: int
    states: int
    layers: type[nn.RNNBase]
    kernel: Callable[..., Any]
    step: Callable[..., Any]
    fused_step: Callable[..., Any]
    attribute: str
    sum_biases: bool = True
    options: dict[str, str] = field(default_factory=dict)


def _update_rnn(from_x, from_h, state):
    return ((from_x + from_h).tanh(),)


def _update_rnn_relu(from_x, from_h, state):
    return ((from_x + from_h).relu(),)


def _update_gru(from_x, from_h, state):
    return (gru_update(from_x, from_h, *state),)


def _update_lstm(from_x, from_h, state):
    return lstm_update(from_x + from_h, state[1])


CELLS: dict[str, CellType] = {
    "rnn": CellType(_update_rnn, 1, 1, nn.RNN, torch.rnn_tanh, rnn_step, torch.rnn_tanh_cell, "rnn"),
    "rnn_relu": CellType(
        _update_rnn_relu,
        1,
        1,
        nn.RNN,
        torch.rnn_relu,
        partial(rnn_step, activation=torch.relu),
        torch.rnn_relu_cell,
        "rnn",
        options={"nonlinearity": "relu"},
    ),
    "gru": CellType(_update_gru, 3, 1, nn.GRU, torch.gru, gru_step, torch.gru_cell, "gru", sum_biases=False),
    "lstm": CellType(_update_lstm, 4, 2, nn.LSTM, torch.lstm, lstm_step, torch.lstm_cell, "lstm"),
}
"""The cells by the name that configs and flags use."""


def check_cell(cell: str) -> None:
    """Validate the name of a cell.

    Args:
        cell: The name.

    Raises:
        ValueError: If it is not a key of `CELLS`.
    """
    if cell not in CELLS:
        raise ValueError(f"cell={cell!r} is unknown. Choose one of: {', '.join(CELLS)}.")


class RecurrentCell(nn.Module):
    """One step of a recurrent cell with its weights, which have the same names as in `torch.nn.LSTMCell`.

    Args:
        input_size: Channels of the inputs.
        hidden_size: Channels of the state.
        cell: A key of `CELLS`: "rnn", "rnn_relu", "gru" or "lstm".
        fused: Whether to use the kernel of torch instead of the definition.

    Raises:
        ValueError: If `cell` is unknown.

    Example:
        ```python
        >>> cell = RecurrentCell(8, 16, cell="gru")
        >>> (h,) = cell(torch.randn(2, 8), (torch.zeros(2, 16),))
        >>> h.shape
        torch.Size([2, 16])

        ```
    """

    def __init__(self, input_size: int, hidden_size: int, *, cell: str = "lstm", fused: bool = True):
        super().__init__()
        check_cell(cell)
        self.input_size, self.hidden_size, self.cell, self.fused = input_size, hidden_size, cell, fused
        rows = CELLS[cell].gates * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights uniformly within 1 / sqrt(hidden_size), as torch does."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: torch.Tensor, state: State) -> State:
        """Compute one step.

        Args:
            x: Inputs, (batch, input_size).
            state: h, and for an LSTM also c, (batch, hidden_size) each.

        Returns:
            The next state.
        """
        kind = CELLS[self.cell]
        step = kind.fused_step if self.fused else kind.step
        given = state if kind.states > 1 else state[0]
        new = step(x, given, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return new if kind.states > 1 else (new,)


class LSTMCell(RecurrentCell):
    """One step of an LSTM with its weights. See `RecurrentCell` for the arguments.

    Example:
        ```python
        >>> cell = LSTMCell(8, 16)
        >>> h, c = cell(torch.randn(2, 8), (torch.zeros(2, 16), torch.zeros(2, 16)))
        >>> h.shape, c.shape
        (torch.Size([2, 16]), torch.Size([2, 16]))

        ```
    """

    def __init__(self, input_size: int, hidden_size: int, *, fused: bool = True):
        super().__init__(input_size, hidden_size, fused=fused)


@torch.no_grad()
def init_recurrent(
    module: nn.RNNBase,
    *,
    forget_bias: float | None = None,
    input_bias: float | None = None,
    spectral_radius: float | None = None,
) -> None:
    """Draw all weights uniformly within 1 / sqrt(hidden), as torch does.

    Args:
        module: A recurrent module of torch.
        forget_bias: Sum of both biases of the forget gate of an LSTM. With 1 or more, it remembers longer from the
            start (Jozefowicz et al. 2015). Defaults to random biases.
        input_bias: Sum of both biases of the input gate of an LSTM. If the forget gate is open, a negative value
            keeps c from drifting to values at which tanh is flat (Hochreiter & Schmidhuber 1997, section 4). Tallec &
            Ollivier 2018 use minus the forget bias. Defaults to random biases.
        spectral_radius: Largest absolute eigenvalue of the recurrent matrix of each gate. Defaults to no change.
    """
    bound, hidden = module.hidden_size**-0.5, module.hidden_size
    gates = [bias for bias in enumerate((input_bias, forget_bias)) if bias[1] is not None]  # the first two of an LSTM
    for name, parameter in module.named_parameters():
        if gates and name.startswith("bias") and isinstance(module, nn.LSTM):
            values = torch.empty_like(parameter).uniform_(-bound, bound)
            for gate, bias in gates:
                values[gate * hidden : (gate + 1) * hidden] = bias if name.startswith("bias_ih") else 0.0
            init.copy_(parameter, values)
        elif spectral_radius is not None and name.startswith("weight_hh"):
            values = torch.empty_like(parameter).uniform_(-bound, bound)
            for matrix in values.split(hidden):
                matrix *= spectral_radius / torch.linalg.eigvals(matrix.float()).abs().max()
            init.copy_(parameter, values)
        else:
            init.uniform_(parameter, -bound, bound)


class RecurrentLayers(nn.Module):
    """Recurrent layers in one or two directions, which start from a state and skip masked tokens.

    Masked tokens may be anywhere. They do not change the state, and their output is 0. Layer l reads the outputs of
    layer l - 1. A long sequence can be read forward in pieces: pass the state after one piece to the next call. The
    result is the same as for the whole sequence.

    Args:
        input_size: Channels of the inputs.
        hidden_size: Channels of the state, per direction.
        cell: A key of `CELLS`: "rnn", "rnn_relu", "gru" or "lstm".
        num_layers: Number of layers.
        bidirectional: Whether to read the sequence forward and backward.
        dropout: Dropout probability between layers.
        fused: Whether to use the kernel of torch instead of single steps.

    Raises:
        ValueError: If `cell` is unknown.

    Example:
        ```python
        >>> layers = RecurrentLayers(8, 16, cell="gru", bidirectional=True)
        >>> keep = torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> outputs, (h,) = layers(torch.randn(2, 3, 8), attention_mask=keep)
        >>> outputs.shape, h.shape
        (torch.Size([2, 3, 32]), torch.Size([2, 1, 32]))

        ```
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        cell: str = "lstm",
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        fused: bool = True,
    ):
        super().__init__()
        check_cell(cell)
        self.cell, self.fused, self.directions = cell, fused, 1 + bidirectional
        kind = CELLS[cell]
        layers = kind.layers(
            input_size,
            hidden_size,
            num_layers,
            batch_first=True,
            bidirectional=bidirectional,
            dropout=dropout if num_layers > 1 else 0.0,
            **kind.options,
        )
        self.add_module(kind.attribute, layers)

    @property
    def module(self) -> nn.Module:
        """The module of torch with the weights."""
        return getattr(self, CELLS[self.cell].attribute)

    def forward(
        self, x: torch.Tensor, state: State | None = None, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, State]:
        """Read sequences.

        Args:
            x: Inputs, (batch, length, input_size).
            state: State before the first token: h, and for an LSTM also c, (batch, num_layers, directions *
                hidden_size) each. Defaults to zeros.
            attention_mask: 1 or True for tokens to read, at least one per row, (batch, length). Defaults to all
                tokens.

        Returns:
            The outputs of the last layer, (batch, length, directions * hidden_size), with 0 for masked tokens; and the
            final state of each layer. The forward direction comes first. It ends at the last token that is not masked,
            the backward direction at the first one.

        Raises:
            ValueError: If an argument has the wrong shape, the sequence is empty, or the mask masks all tokens of a
                row.
        """
        _check_length(x)
        module, kind = self.module, CELLS[self.cell]
        shape = (x.shape[0], module.num_layers, self.directions * module.hidden_size)
        if state is None:
            state = (x.new_zeros(shape),) * kind.states
        if len(state) != kind.states:
            raise ValueError(f"state has {len(state)} tensors. cell={self.cell!r} needs {kind.states}.")
        for values in state:
            if values.shape != shape:
                raise ValueError(
                    f"state has shape {tuple(values.shape)}, expected {shape}: (batch, num_layers, hidden_size)."
                )
        keep, lengths = (None, None) if attention_mask is None else _kept(x, attention_mask)
        slow_backward = keep is not None and x.device.type == "cpu" and torch.is_grad_enabled()
        # The kernel needs the lengths, which are unknown under `torch.compile` and `torch.export`.
        unknown = lengths is None and (keep is not None or (self.directions == 2 and torch.compiler.is_compiling()))
        if type(module) is kind.layers and (not self.fused or slow_backward or unknown):
            return self._run_steps(x, state, keep)
        return self._run_kernel(x, state, keep, lengths)  # a quantized module has no weights for single steps

    def _run_kernel(self, x, state, keep, lengths):
        module = self.module
        begin = tuple(
            values.unflatten(-1, (self.directions, module.hidden_size)).permute(1, 2, 0, 3).flatten(0, 1).contiguous()
            for values in state
        )  # (batch, layers, directions * hidden) to (layers * directions, batch, hidden)
        begin = begin if len(begin) > 1 else begin[0]
        if keep is not None:
            outputs, after = _read_packed(module, x, keep, lengths, begin)
        elif torch.compiler.is_exporting():
            outputs, after = self._export_kernel(x, begin)
        else:
            outputs, after = module(x, begin)
        after = after if isinstance(after, tuple) else (after,)
        return outputs, tuple(
            values.unflatten(0, (module.num_layers, self.directions)).permute(2, 0, 1, 3).flatten(2)
            for values in after
        )

    def _export_kernel(self, x, begin):
        # The module would replace its list of weights, which torch.export warns about.
        module = self.module
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [getattr(module, f"{name}_l{layer}") for layer in range(module.num_layers) for name in names]
        outputs, *after = CELLS[self.cell].kernel(
            x, begin, weights, True, module.num_layers, module.dropout, module.training, False, True
        )
        return outputs, tuple(after)

    def _run_steps(self, x, state, keep):
        # Run both directions together, (2, batch, length, channels). The backward direction reads a flipped sequence.
        module, kind = self.module, CELLS[self.cell]
        kept = None if keep is None else self._both(keep)[..., None].unbind(2)
        finals = []
        for layer in range(module.num_layers):
            if layer:
                x = nn.functional.dropout(x, module.dropout, self.training)
            weight_ih, weight_hh, bias_ih, bias_hh = self._weights(layer)
            inputs = (self._both(x).flatten(1, 2) @ weight_ih.transpose(1, 2) + bias_ih).unflatten(1, x.shape[:2])
            current = tuple(
                values[:, layer].unflatten(-1, (self.directions, module.hidden_size)).transpose(0, 1)
                for values in state
            )
            outputs = []
            for t, from_x in enumerate(inputs.unbind(2)):
                from_h = current[0] @ weight_hh.transpose(1, 2)
                new = kind.update(from_x, from_h if bias_hh is None else from_h + bias_hh, current)
                if kept is None:
                    outputs.append(new[0])
                    current = new
                else:  # skip masked tokens
                    outputs.append(torch.where(kept[t], new[0], 0.0))
                    current = tuple(torch.where(kept[t], *pair) for pair in zip(new, current, strict=True))
            forward, *backward = torch.stack(outputs, dim=2)
            x = torch.cat([forward, backward[0].flip(1)], dim=-1) if backward else forward
            finals.append([torch.cat([*values], dim=-1) for values in current])
        return x, tuple(torch.stack(values, dim=1) for values in zip(*finals, strict=True))

    def _both(self, x):
        return torch.stack([x, x.flip(1)] if self.directions == 2 else [x])

    def _weights(self, layer):
        """Return the weights of a layer, (directions, ...) each, with bias_hh `None` if bias_ih is the sum of both."""
        suffixes = ("", "_reverse")[: self.directions]
        weight_ih, weight_hh, bias_ih, bias_hh = (
            [getattr(self.module, f"{name}_l{layer}{suffix}") for suffix in suffixes]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        if CELLS[self.cell].sum_biases:
            # Added before they are stacked: the gradients of both biases would otherwise be views of one tensor, which
            # clipping and accumulation would change twice.
            bias_ih, bias_hh = [one + other for one, other in zip(bias_ih, bias_hh, strict=True)], None
        return (
            torch.stack(weight_ih),
            torch.stack(weight_hh),
            torch.stack(bias_ih)[:, None],
            None if bias_hh is None else torch.stack(bias_hh)[:, None],
        )


class LSTM(RecurrentLayers):
    """LSTM layers that read forward. See `RecurrentLayers` for the arguments.

    Example:
        ```python
        >>> lstm = LSTM(8, 16)
        >>> outputs, (h, c) = lstm(torch.randn(2, 3, 8))
        >>> outputs.shape, h.shape
        (torch.Size([2, 3, 16]), torch.Size([2, 1, 16]))

        ```
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, num_layers: int = 1, dropout: float = 0.0, fused: bool = True
    ):
        super().__init__(input_size, hidden_size, num_layers=num_layers, dropout=dropout, fused=fused)


class BidirectionalLSTM(RecurrentLayers):
    """LSTM layers that read forward and backward from a zero state. See `RecurrentLayers` for the arguments.

    Example:
        ```python
        >>> lstm = BidirectionalLSTM(8, 16)
        >>> keep = torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> outputs, (h, c) = lstm(torch.randn(2, 3, 8), keep)
        >>> outputs.shape, h.shape
        (torch.Size([2, 3, 32]), torch.Size([2, 1, 32]))

        ```
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, num_layers: int = 1, dropout: float = 0.0, fused: bool = True
    ):
        super().__init__(
            input_size, hidden_size, num_layers=num_layers, bidirectional=True, dropout=dropout, fused=fused
        )

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, State]:
        """Read sequences, see `RecurrentLayers.forward`.

        Args:
            x: Inputs, (batch, length, input_size).
            attention_mask: 1 or True for tokens to read, at least one per row, (batch, length). Defaults to all
                tokens.

        Returns:
            The outputs and the final h and c of both directions.
        """
        return super().forward(x, None, attention_mask)


def _check_length(x):
    if x.ndim != 3 or x.shape[1] == 0:
        shape = tuple(x.shape[:-1])
        raise ValueError(f"The tokens have shape {shape}. Expected (batch, length) with at least one token per row.")


def _kept(x, attention_mask):
    """Return the mask of the tokens to read, bool (batch, length), and their number per row, on the CPU.

    Under `torch.export` and `torch.compile` the number is None. The layers then run step by step, because the kernel
    needs the lengths.
    """
    batch, length = x.shape[:2]
    if attention_mask.shape != (batch, length):
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(batch, length)}.")
    keep = attention_mask.to(x.device).bool()
    if torch.compiler.is_compiling():
        return keep, None  # the values are unknown
    lengths = keep.sum(dim=1).cpu()
    if bool((lengths == 0).any()):
        rows = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(f"attention_mask keeps no token of rows {rows}; each needs at least one.")
    return keep, lengths


def _read_packed(module, x, keep, lengths, state):
    """Run the kernel of torch; return outputs (batch, length, channels), with 0 for masked tokens, and the states."""
    # The kernel needs the tokens to read at the start of each row. A stable sort keeps their order.
    order = None
    if bool((keep[:, 1:] & ~keep[:, :-1]).any()):
        order = keep.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        x = x.gather(1, order[..., None].expand_as(x))
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    packed, states = module(packed, state)
    outputs, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
    if order is not None:
        outputs = torch.zeros_like(outputs).scatter(1, order[..., None].expand_as(outputs), outputs)
    return outputs, states
