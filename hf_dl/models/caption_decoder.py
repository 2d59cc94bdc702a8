"""The decoder of captions: a recurrent cell that reads the image in one of four ways.

In each step, the cell reads the last word y and a vector z of the image:

    h, c = LSTM([e(y); z], (h, c))

`cell` of the config selects another cell of `CELLS`. With the vanilla RNN, the same step is

    h = tanh(W_x e(y) + W_h h + W_i z)

`CONDITIONINGS` lists where z comes from:

* "first_step": z is the image in the first step, and 0 afterwards (Vinyals et al. 2015, "Show and Tell"; Karpathy &
  Fei-Fei 2015). The state of the cell must keep everything that it will say.
* "every_step": z is the image in each step.
* "previous_attention": z attends to the feature map with the last h, before y is read (Xu et al. 2015, "Show, Attend
  and Tell", https://arxiv.org/abs/1502.03044). The query does not know yet which word was written.
* "attention": z attends with the new h, after y was read. The next word is predicted from h and z, and the next step
  of the cell reads z (Luong et al. 2015, input feeding). After "red", the attention can move to a red object.

The attention is additive: z = sum_i a_i m_i with a = softmax(v^T tanh(W h + U m_i)) over the cells m_i of the map.

Differences from Xu et al.: z has no gate, and one tanh layer reads h and z before the output layer. The output layer
does not read y. Both kinds of attention start with h and c from the mean of the map.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from .layers_attention import AdditiveAttention
from .layers_recurrent import CELLS, RecurrentCell

CONDITIONINGS = ("first_step", "every_step", "previous_attention", "attention")
ATTENTIONS = ("previous_attention", "attention")

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class CaptionContext(NamedTuple):
    """The tensors that all hypotheses of an image share. Both are None without attention.

    Attributes:
        memory: Cells of the feature map, (batch, cells, channels).
        keys: The memory, projected for the attention, (batch, cells, attention_size).
    """

    memory: torch.Tensor | None
    keys: torch.Tensor | None


@dataclass
class CaptionState:
    """The state of the decoder between two words, with the interface of a key-value cache for `generate`.

    Args:
        hidden: h, (rows, 1, decoder_hidden_size).
        cell: c of an LSTM, (rows, 1, decoder_hidden_size). For other cells it is empty, (rows, 1, 0).
        read: z that the next step reads, (rows, 1, channels).
        context: The context of the rows. Rows are only exchanged within an image, so it needs no reordering.
        length: Number of words read so far.
    """

    is_compileable = False
    is_linear = (True,)  # for `generate`: the state cannot be cut to fewer words

    hidden: torch.Tensor
    cell: torch.Tensor
    read: torch.Tensor
    context: CaptionContext
    length: int

    @property
    def tensors(self) -> State:
        """Return the tensors of `CaptionDecoder.step`."""
        return self.hidden, self.cell, self.read

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace row i by row beam_idx[i]."""
        self.hidden, self.cell, self.read = (each.index_select(0, beam_idx) for each in self.tensors)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of words read so far."""
        return self.length


torch.export.register_dataclass(CaptionState)  # so that an exported model can return a state


class CaptionDecoder(nn.Module):
    """Write captions word by word with a recurrent cell.

    Tokens, states and results have the shape (batch, hypotheses, ...). The context exists once per image.

    Args:
        config: An `ImageCaptionerConfig`.
        channels: Channels of the feature map.
        cells: Number of cells of the feature map.
    """

    def __init__(self, config: PreTrainedConfig, channels: int, cells: int):
        super().__init__()
        hidden, embedded = config.decoder_hidden_size, config.embedding_size
        self.conditioning = config.conditioning
        self.states = CELLS[config.cell].states
        self.state_sizes = (hidden, (self.states - 1) * hidden)  # channels of h and c
        self.embedding = nn.Embedding(config.vocab_size, embedded)
        if self.conditioning in ATTENTIONS:
            self.bridge = nn.Linear(channels, sum(self.state_sizes))
            self.attention = AdditiveAttention(hidden, channels, attention_dim=config.attention_size)
            self.read_size = channels
            self.readout = nn.Linear(hidden + channels, hidden)
        else:
            self.image = nn.Linear(channels * cells, embedded)
            self.image_norm = nn.LayerNorm(embedded)
            self.read_size = embedded
            self.readout = nn.Linear(hidden, hidden)
        self.cell = RecurrentCell(embedded + self.read_size, hidden, cell=config.cell, fused=config.fused_lstm)
        self.output = nn.Linear(hidden, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout)

    def start(self, memory: torch.Tensor) -> tuple[State, CaptionContext]:
        """Compute the initial state and the context of images.

        Args:
            memory: Cells of the feature map, (batch, cells, channels).

        Returns:
            h, c and z, (batch, 1, channels) each, and the context. Without an LSTM, c has 0 channels.
        """
        if self.conditioning in ATTENTIONS:
            mean = memory.mean(dim=1, keepdim=True)
            hidden, cell = self.bridge(mean).tanh().split(self.state_sizes, dim=-1)
            return (hidden, cell, mean), CaptionContext(memory, self.attention.project(memory))
        image = self.image_norm(self.image(memory.flatten(1)))[:, None]
        hidden, cell = (image.new_zeros(memory.shape[0], 1, size) for size in self.state_sizes)
        return (hidden, cell, image), CaptionContext(None, None)

    def step(
        self, tokens: torch.Tensor, state: State, context: CaptionContext
    ) -> tuple[torch.Tensor, State, torch.Tensor | None]:
        """Read one word per hypothesis.

        Args:
            tokens: The last words, int64 (batch, hypotheses).
            state: h, c and z, (batch, hypotheses, channels) each.
            context: The context of the images.

        Returns:
            Features for `classify`, (batch, hypotheses, decoder_hidden_size); the next state; and the attention,
            (batch, hypotheses, cells), or None without attention.
        """
        hidden, cell, read = state
        weights = None
        if self.conditioning == "previous_attention":
            read, weights = self._attend(hidden, context)
        x = torch.cat([self.dropout(self.embedding(tokens)), read], dim=-1).flatten(0, 1)
        hidden, *memory = self.cell(x, (hidden.flatten(0, 1), cell.flatten(0, 1))[: self.states])
        hidden = hidden.unflatten(0, tokens.shape)
        if memory:
            cell = memory[0].unflatten(0, tokens.shape)
        if self.conditioning == "attention":
            read, weights = self._attend(hidden, context)
        elif self.conditioning == "first_step":
            read = torch.zeros_like(read)
        seen = hidden if weights is None else torch.cat([hidden, read], dim=-1)
        return self.dropout(self.readout(seen).tanh()), (hidden, cell, read), weights

    def _attend(self, hidden, context):
        weights = self.attention(hidden, context.keys).softmax(dim=-1)
        return weights @ context.memory, weights

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Compute the logits of the next words, (..., vocab_size), from the features of `step`."""
        return self.output(features)
