"""The LSTM from its definition: one step, a cell, a layer that continues from a state, and a bidirectional encoder.

Hochreiter & Schmidhuber 1997, "Long Short-Term Memory", with the forget gate of Gers et al. 2000. The order of the
gates and the two biases are the same as in torch, so weights can be exchanged with the modules of torch.

Each module runs in one of two ways, whose results differ only by rounding. `fused=False` runs the definition step by
step. `fused=True`, the default, uses the kernel of torch and is faster. There is one exception: the CPU kernel for
packed sequences has a backward pass whose time grows with the square of the length. Therefore, the bidirectional
encoder always trains step by step on a CPU.

`torch.compile` breaks its graph at `torch.nn.LSTM`. With `torch._dynamo.config.allow_rnn = True` it makes one graph.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


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


class LSTMCell(nn.Module):
    """One step of an LSTM with its weights, which have the same names as in `torch.nn.LSTMCell`.

    Args:
        input_size: Channels of the inputs.
        hidden_size: Channels of h and c.
        fused: Whether to use the kernel of torch instead of `lstm_step`.

    Example:
        ```python
        >>> cell = LSTMCell(8, 16)
        >>> h, c = cell(torch.randn(2, 8), (torch.zeros(2, 16), torch.zeros(2, 16)))
        >>> h.shape, c.shape
        (torch.Size([2, 16]), torch.Size([2, 16]))

        ```
    """

    def __init__(self, input_size: int, hidden_size: int, *, fused: bool = True):
        super().__init__()
        self.input_size, self.hidden_size, self.fused = input_size, hidden_size, fused
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(4 * hidden_size))
        self.bias_hh = nn.Parameter(torch.empty(4 * hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights uniformly within 1 / sqrt(hidden_size), as torch does."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute one step.

        Args:
            x: Inputs, (batch, input_size).
            state: h and c, (batch, hidden_size) each.

        Returns:
            The next h and c.
        """
        step = torch.lstm_cell if self.fused else lstm_step
        return step(x, state, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class BidirectionalLSTM(nn.Module):
    """LSTM layers that read a sequence forward and backward, and skip masked tokens.

    Masked tokens may be anywhere. They do not change the states, and their output is 0. `lstm` contains the weights
    with the names and shapes of torch.

    Args:
        input_size: Channels of the inputs.
        hidden_size: Channels per direction.
        num_layers: Number of layers. Each layer reads the outputs of both directions of the layer below.
        dropout: Dropout probability between layers.
        fused: Whether to use the kernel of torch instead of single steps.

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
        super().__init__()
        self.fused = fused
        self.lstm = nn.LSTM(
            input_size,
            hidden_size,
            num_layers,
            batch_first=True,
            bidirectional=True,
            dropout=dropout if num_layers > 1 else 0.0,
        )

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Encode sequences.

        Args:
            x: Inputs, (batch, length, input_size).
            attention_mask: 1 or True for tokens to read, at least one per row, (batch, length). Defaults to all
                tokens.

        Returns:
            The outputs of the last layer, (batch, length, 2 * hidden_size), and the final h and c of each layer,
            (batch, num_layers, 2 * hidden_size) each. The forward direction comes first. The outputs of masked tokens
            are 0. The forward direction ends at the last token that is not masked, the backward direction at the first
            one.

        Raises:
            ValueError: If the sequence is empty, or the mask has the wrong shape or masks all tokens of a row.
        """
        _check_length(x)
        keep, lengths = _kept(x, attention_mask)
        slow_backward = x.device.type == "cpu" and torch.is_grad_enabled()
        if (self.fused and lengths is not None and not slow_backward) or type(self.lstm) is not nn.LSTM:
            return self._run_kernel(x, keep, lengths)  # a quantized LSTM has no weights for single steps
        return self._run_steps(x, keep)

    def _run_kernel(self, x, keep, lengths):
        outputs, states = _read_packed(self.lstm, x, keep, lengths)
        h, c = (
            s.unflatten(0, (self.lstm.num_layers, 2)).permute(2, 0, 1, 3).flatten(2) for s in states
        )  # (layers * 2, batch, hidden) to (batch, layers, 2 * hidden)
        return outputs, (h, c)

    def _run_steps(self, x, keep):
        # Run both directions together, (2, batch, length, channels). The backward direction reads a flipped sequence.
        kept = torch.stack([keep, keep.flip(1)])[..., None]
        hiddens, cells = [], []
        for layer in range(self.lstm.num_layers):
            if layer:
                x = nn.functional.dropout(x, self.lstm.dropout, self.training)
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weights = [
                [getattr(self.lstm, f"{name}_l{layer}{suffix}") for suffix in ("", "_reverse")] for name in names
            ]
            weight_ih, weight_hh = (torch.stack(pair) for pair in weights[:2])
            # Added before they are stacked: the gradients of both biases would otherwise be views of one tensor, which
            # clipping and accumulation would change twice.
            bias = torch.stack([bias_ih + bias_hh for bias_ih, bias_hh in zip(*weights[2:], strict=True)])[:, None]
            both = torch.stack([x, x.flip(1)])
            inputs = (both.flatten(1, 2) @ weight_ih.transpose(1, 2) + bias).unflatten(1, x.shape[:2])
            h = c = x.new_zeros(2, x.shape[0], self.lstm.hidden_size)
            outputs = []
            for step, here in zip(inputs.unbind(2), kept.unbind(2), strict=True):
                new_h, new_c = lstm_update(torch.baddbmm(step, h, weight_hh.transpose(1, 2)), c)
                outputs.append(torch.where(here, new_h, 0.0))
                h, c = torch.where(here, new_h, h), torch.where(here, new_c, c)  # skip masked tokens
            forward, backward = torch.stack(outputs, dim=2)
            x = torch.cat([forward, backward.flip(1)], dim=-1)
            hiddens.append(torch.cat([*h], dim=-1))
            cells.append(torch.cat([*c], dim=-1))
        return x, (torch.stack(hiddens, dim=1), torch.stack(cells, dim=1))


class LSTM(nn.Module):
    """LSTM layers that read a sequence forward, starting from a state, and skip masked tokens.

    A long sequence can be read in pieces: pass the state after one piece to the next call. The result is the same as
    for the whole sequence.

    Args:
        input_size: Channels of the inputs.
        hidden_size: Channels of h and c.
        num_layers: Number of layers.
        dropout: Dropout probability between layers.
        fused: Whether to use the kernel of torch instead of single steps.

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
        super().__init__()
        self.fused = fused
        dropout = dropout if num_layers > 1 else 0.0
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True, dropout=dropout)

    def forward(
        self,
        x: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Encode sequences.

        Args:
            x: Inputs, (batch, length, input_size).
            state: h and c of each layer, (batch, num_layers, hidden_size) each. Defaults to zeros.
            attention_mask: 1 or True for tokens to read, at least one per row, (batch, length). Defaults to all
                tokens.

        Returns:
            The outputs of the last layer, (batch, length, hidden_size), with 0 for masked tokens; and the state after
            the last token that is not masked.

        Raises:
            ValueError: If an argument has the wrong shape, the sequence is empty, or the mask masks all tokens of a
                row.
        """
        _check_length(x)
        shape = (x.shape[0], self.lstm.num_layers, self.lstm.hidden_size)
        if state is None:
            state = (x.new_zeros(shape), x.new_zeros(shape))
        for values in state:
            if values.shape != shape:
                raise ValueError(
                    f"state has shape {tuple(values.shape)}, expected {shape}: (batch, num_layers, hidden_size)."
                )
        keep, lengths = (None, None) if attention_mask is None else _kept(x, attention_mask)
        if type(self.lstm) is nn.LSTM and (not self.fused or (keep is not None and lengths is None)):
            return self._run_steps(x, state, keep)
        h, c = (values.transpose(0, 1).contiguous() for values in state)
        if keep is not None:
            outputs, (h, c) = _read_packed(self.lstm, x, keep, lengths, (h, c))
        elif torch.compiler.is_exporting():
            outputs, h, c = self._export_kernel(x, h, c)
        else:
            outputs, (h, c) = self.lstm(x, (h, c))
        return outputs, (h.transpose(0, 1), c.transpose(0, 1))

    def _export_kernel(self, x, h, c):
        # The module would replace its list of weights, which torch.export warns about.
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [getattr(self.lstm, f"{name}_l{layer}") for layer in range(self.lstm.num_layers) for name in names]
        return torch.lstm(
            x, (h, c), weights, True, self.lstm.num_layers, self.lstm.dropout, self.training, False, True
        )

    def _run_steps(self, x, state, keep):
        keep = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        states = []
        for layer in range(self.lstm.num_layers):
            if layer:
                x = nn.functional.dropout(x, self.lstm.dropout, self.training)
            begin = tuple(values[:, layer] for values in state)
            x, *after = _read_steps(self.lstm, x, keep, f"_l{layer}", begin)
            states.append(after)
        h, c = (torch.stack(values, dim=1) for values in zip(*states, strict=True))
        return x, (h, c)


def _check_length(x):
    if x.ndim != 3 or x.shape[1] == 0:
        shape = tuple(x.shape[:-1])
        raise ValueError(f"The tokens have shape {shape}. Expected (batch, length) with at least one token per row.")


def _kept(x, attention_mask):
    """Return the mask of the tokens to read, bool (batch, length), and their number per row, on the CPU.

    Under `torch.export` and `torch.compile` the number is None. The LSTM then runs step by step, because the kernel
    needs the lengths.
    """
    batch, length = x.shape[:2]
    if attention_mask is None:
        keep = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    elif attention_mask.shape != (batch, length):
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(batch, length)}.")
    else:
        keep = attention_mask.to(x.device).bool()
    if torch.compiler.is_compiling():
        return keep, None  # the values are unknown
    lengths = keep.sum(dim=1).cpu()
    if bool((lengths == 0).any()):
        rows = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(f"attention_mask keeps no token of rows {rows}; each needs at least one.")
    return keep, lengths


def _read_packed(lstm, x, keep, lengths, state=None):
    """Run the kernel of torch; return outputs (batch, length, channels), with 0 for masked tokens, and the states."""
    # The kernel needs the tokens to read at the start of each row. A stable sort keeps their order.
    order = keep.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    x = x.gather(1, order[..., None].expand_as(x))
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    packed, states = lstm(packed, state)
    outputs, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
    return torch.zeros_like(outputs).scatter(1, order[..., None].expand_as(outputs), outputs), states


def _read_steps(lstm, x, keep, suffix, state=None):
    """Run one direction of a layer step by step; return the outputs and the last h and c."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights = [getattr(lstm, name + suffix) for name in names]
    h = c = x.new_zeros(x.shape[0], lstm.hidden_size)
    if state is not None:
        h, c = state
    outputs: list[torch.Tensor] = [h] * x.shape[1]
    steps = range(x.shape[1])
    for t in reversed(steps) if suffix.endswith("reverse") else steps:
        kept = keep[:, t, None]
        new_h, new_c = lstm_step(x[:, t], (h, c), *weights)
        outputs[t] = torch.where(kept, new_h, 0.0)
        h, c = torch.where(kept, new_h, h), torch.where(kept, new_c, c)  # skip masked tokens
    return torch.stack(outputs, dim=1), h, c
