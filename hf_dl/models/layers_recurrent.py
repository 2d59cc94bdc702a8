"""The LSTM from its definition: a step, a cell, a layer that goes on from a state, and a bidirectional encoder.

Hochreiter & Schmidhuber 1997, "Long Short-Term Memory", with the forget gate of Gers et al. 2000; the gates in the
order and with the two biases that torch has, so that weights go back and forth unchanged.

Everything runs in one of two ways that agree to rounding: written out (`fused=False`), where every line of the
definition is seen, or through the library's kernel (`fused=True`, the default), which is faster. There is one
exception: on a CPU the gradient of torch's kernel for packed sequences takes time by the square of their length, so
there the encoder is trained by the steps.
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
    """Take one step of an LSTM.

    Args:
        x: Inputs, (batch, inputs).
        state: h and c, the hidden and the cell state, (batch, hidden) each.
        weight_ih: W of x, (4 * hidden, inputs): the rows of the input, forget, cell and output gate.
        weight_hh: U of h, (4 * hidden, hidden).
        bias_ih: b of x, (4 * hidden).
        bias_hh: b of h, (4 * hidden).

    Returns:
        The next h and c, (batch, hidden) each.
    """
    hidden, cell = state
    return lstm_update(x @ weight_ih.T + bias_ih + hidden @ weight_hh.T + bias_hh, cell)


def lstm_update(gates: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next h and c, (..., hidden), of the four gates before their functions, (..., 4 * hidden), and the last c."""
    i, f, g, o = gates.chunk(4, dim=-1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()  # c' = f * c + i * g
    hidden = o.sigmoid() * cell.tanh()  # h' = o * tanh(c')
    return hidden, cell


class LSTMCell(nn.Module):
    """One step of an LSTM, with its weights; they are named as torch's `nn.LSTMCell` names them.

    Args:
        input_size: Channels of the inputs.
        hidden_size: Channels of h and of c.
        fused: Whether torch's kernel does the step, or `lstm_step`.

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
        """Draw all weights from U(-1 / sqrt(hidden), 1 / sqrt(hidden)), as torch does."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a step.

        Args:
            x: Inputs, (batch, input_size).
            state: h and c, (batch, hidden_size) each.

        Returns:
            The next h and c.
        """
        step = torch.lstm_cell if self.fused else lstm_step
        return step(x, state, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class BidirectionalLSTM(nn.Module):
    """LSTMs that read a sequence forwards and backwards, over tokens that a mask keeps.

    A token that the mask leaves out is as good as not there, wherever it stands: neither direction steps on it, and
    its output is 0. `lstm` holds the weights, of torch's names and layout, for both ways of running.

    Args:
        input_size: Channels of the inputs.
        hidden_size: Channels of a direction.
        num_layers: Layers; each but the first reads the outputs of both directions of the one below.
        dropout: Dropout between layers.
        fused: Whether torch's kernel runs the layers, or `lstm_step`, step by step.

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
        """Read sequences.

        Args:
            x: Inputs, (batch, length, input_size).
            attention_mask: Tokens to read, 1 or True, (batch, length), at least one in each row; None: all.

        Returns:
            The outputs of the last layer, (batch, length, 2 * hidden_size), forward direction first, 0 where masked;
            and h and c after each layer's last step, (batch, num_layers, 2 * hidden_size) each: the forward
            direction's after the last kept token, the backward direction's after the first.

        Raises:
            ValueError: If the mask has another shape, or keeps no token of a row.
        """
        keep, lengths = _kept(x, attention_mask)
        if self.fused and not (x.device.type == "cpu" and torch.is_grad_enabled()):
            return self._run_kernel(x, keep, lengths)
        return self._run_steps(x, keep)

    def _run_kernel(self, x, keep, lengths):
        outputs, states = _read_packed(self.lstm, x, keep, lengths)
        h, c = (
            s.unflatten(0, (self.lstm.num_layers, 2)).permute(2, 0, 1, 3).flatten(2) for s in states
        )  # (layers * 2, batch, hidden) to (batch, layers, 2 * hidden)
        return outputs, (h, c)

    def _run_steps(self, x, keep):
        # Both directions at once, (2, batch, length, channels): the backward one reads what is flipped.
        kept = torch.stack([keep, keep.flip(1)])[..., None]
        hiddens, cells = [], []
        for layer in range(self.lstm.num_layers):
            if layer:
                x = nn.functional.dropout(x, self.lstm.dropout, self.training)
            weight_ih, weight_hh, bias_ih, bias_hh = (
                torch.stack([getattr(self.lstm, f"{name}_l{layer}{suffix}") for suffix in ("", "_reverse")])
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            both = torch.stack([x, x.flip(1)])
            bias = (bias_ih + bias_hh)[:, None]
            inputs = (both.flatten(1, 2) @ weight_ih.transpose(1, 2) + bias).unflatten(1, x.shape[:2])
            h = c = x.new_zeros(2, len(x), self.lstm.hidden_size)
            outputs = []
            for step, here in zip(inputs.unbind(2), kept.unbind(2), strict=True):
                new_h, new_c = lstm_update(torch.baddbmm(step, h, weight_hh.transpose(1, 2)), c)
                outputs.append(torch.where(here, new_h, 0.0))
                h, c = torch.where(here, new_h, h), torch.where(here, new_c, c)  # a masked token is stepped over
            forward, backward = torch.stack(outputs, dim=2)
            x = torch.cat([forward, backward.flip(1)], dim=-1)
            hiddens.append(torch.cat([*h], dim=-1))
            cells.append(torch.cat([*c], dim=-1))
        return x, (torch.stack(hiddens, dim=1), torch.stack(cells, dim=1))


class LSTM(nn.Module):
    """LSTMs above each other that read sequences forwards, from a state to a state.

    The state after one piece of a sequence is that with which the next one is read: both pieces give what the whole
    sequence gives. A token that the mask leaves out is as good as not there.

    Args:
        input_size: Channels of the inputs.
        hidden_size: Channels of h and of c.
        num_layers: Layers.
        dropout: Dropout between layers.
        fused: Whether torch's kernel runs the layers, or `lstm_step`, step by step.

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
        """Read sequences.

        Args:
            x: Inputs, (batch, length, input_size).
            state: h and c of each layer, (batch, num_layers, hidden_size) each; None: zeros.
            attention_mask: Tokens to read, 1 or True, (batch, length), at least one in each row; None: all.

        Returns:
            The outputs of the last layer, (batch, length, hidden_size), 0 where masked, and the state after the last
            kept token.

        Raises:
            ValueError: If mask or state have another shape, or the mask keeps no token of a row.
        """
        shape = (len(x), self.lstm.num_layers, self.lstm.hidden_size)
        if state is None:
            state = (x.new_zeros(shape), x.new_zeros(shape))
        for values in state:
            if values.shape != shape:
                raise ValueError(
                    f"state has shape {tuple(values.shape)}, expected {shape}: (batch, num_layers, hidden_size)."
                )
        keep, lengths = (None, None) if attention_mask is None else _kept(x, attention_mask)
        if not self.fused:
            return self._run_steps(x, state, keep)
        h, c = (values.transpose(0, 1).contiguous() for values in state)
        outputs, (h, c) = self.lstm(x, (h, c)) if keep is None else _read_packed(self.lstm, x, keep, lengths, (h, c))
        return outputs, (h.transpose(0, 1), c.transpose(0, 1))

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


def _kept(x, attention_mask):
    """Which tokens are read, bool (batch, length), and how many of each row, on the CPU."""
    batch, length = x.shape[:2]
    if attention_mask is None:
        keep = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    elif attention_mask.shape != (batch, length):
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(batch, length)}.")
    else:
        keep = attention_mask.to(x.device).bool()
    lengths = keep.sum(dim=1).cpu()
    if length == 0 or bool((lengths == 0).any()):
        rows = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(f"attention_mask keeps no token of rows {rows}; each needs at least one.")
    return keep, lengths


def _read_packed(lstm, x, keep, lengths, state=None):
    """Run torch's kernel over the kept tokens: outputs (batch, length, channels), 0 where masked, and its states."""
    # The kernel wants what is kept at the front; stable, so that the order stays.
    order = keep.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    x = x.gather(1, order[..., None].expand_as(x))
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    packed, states = lstm(packed, state)
    outputs, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
    return torch.zeros_like(outputs).scatter(1, order[..., None].expand_as(outputs), outputs), states


def _read_steps(lstm, x, keep, suffix, state=None):
    """Run a layer in one direction step by step over the kept tokens: outputs, and the last h and c."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights = [getattr(lstm, name + suffix) for name in names]
    h = c = x.new_zeros(len(x), lstm.hidden_size)
    if state is not None:
        h, c = state
    outputs: list[torch.Tensor] = [h] * x.shape[1]
    steps = range(x.shape[1])
    for t in reversed(steps) if suffix.endswith("reverse") else steps:
        kept = keep[:, t, None]
        new_h, new_c = lstm_step(x[:, t], (h, c), *weights)
        outputs[t] = torch.where(kept, new_h, 0.0)
        h, c = torch.where(kept, new_h, h), torch.where(kept, new_c, c)  # a masked token is stepped over
    return torch.stack(outputs, dim=1), h, c
