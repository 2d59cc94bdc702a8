"""The decoder of programs: an LSTM with additive attention, and the state that `generate` passes between its steps."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from .layers_attention import AdditiveAttention
from .layers_recurrent import LSTMCell
from .program_encoders import ProgramEncoder, ProgramEncoderOutput
from .program_grammar import indexed_tokens


class DecoderContext(NamedTuple):
    """The tensors that all hypotheses of a problem share. A field is None if the config does not use it.

    Attributes:
        memory: Outputs of the encoder, (batch, words, channels).
        keys: The memory, projected for the attention, (batch, words, attention_size).
        keep: The words to attend to, bool (batch, words).
        numbers_read: Vectors that are added to the embeddings of n_0, n_1, ..., and zeros for all other symbols in the
            last row, (batch, numbers + 1, program_embedding_size).
        numbers_said: Vectors that score n_0, n_1, ..., (batch, numbers, channels).
    """

    memory: torch.Tensor | None
    keys: torch.Tensor | None
    keep: torch.Tensor | None
    numbers_read: torch.Tensor | None
    numbers_said: torch.Tensor | None


@dataclass
class DecoderState:
    """The state of the decoder between two symbols, with the interface of a key-value cache for `generate`.

    Args:
        hidden: h, (rows, 1, decoder_hidden_size).
        cell: c, (rows, 1, decoder_hidden_size).
        context: The context of the rows. Rows are only exchanged within a problem, so it needs no reordering.
        length: Number of symbols read so far.
    """

    is_compileable = False
    is_linear = (True,)  # for `generate`: the state cannot be cut to fewer symbols

    hidden: torch.Tensor
    cell: torch.Tensor
    context: DecoderContext
    length: int

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace row i by row beam_idx[i]."""
        self.hidden, self.cell = self.hidden.index_select(0, beam_idx), self.cell.index_select(0, beam_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of symbols read so far."""
        return self.length


torch.export.register_dataclass(DecoderState)  # so that an exported model can return a state


class ProgramDecoder(nn.Module):
    """Write programs symbol by symbol with an LSTM, which may attend to the outputs of the encoder.

    Tokens, states and results have the shape (batch, hypotheses, ...). The context exists once per problem.

    Args:
        config: A `ProgramSeq2SeqConfig`.
        encoder: The encoder, for the sizes of its outputs.
    """

    def __init__(self, config: PreTrainedConfig, encoder: ProgramEncoder):
        super().__init__()
        hidden, embedded, symbols = (
            config.decoder_hidden_size,
            config.program_embedding_size,
            config.vocab_size,
        )
        memory = encoder.memory_size if config.attention else 0
        self.bridge = nn.Linear(encoder.summary_size, 2 * hidden)
        self.embedding = nn.Embedding(symbols, embedded)
        self.attention = None
        if config.attention:
            self.attention = AdditiveAttention(hidden, memory, attention_dim=config.attention_size)
        self.cell = LSTMCell(embedded + memory, hidden, fused=config.fused_lstm)
        self.readout = nn.Linear(hidden + memory, hidden)
        self.output = nn.Linear(hidden, symbols)
        self.dropout = nn.Dropout(config.dropout)
        self.points = encoder.number_size is not None
        if self.points:
            self.read_number = nn.Linear(encoder.number_size, embedded, bias=False)
            self.say_number = nn.Linear(encoder.number_size, hidden, bias=False)
            self.numbers = indexed_tokens(config.program_tokens, "n")[: len(config.number_token_ids)]
        for name, values in self.make_buffers().items():
            self.register_buffer(name, values)

    def make_buffers(self) -> dict[str, torch.Tensor]:
        """Return the values of the buffers: which symbol is which number."""
        if not self.points:
            return {}
        number_of_token = torch.full((self.output.out_features,), len(self.numbers))  # the count means: not a number
        number_of_token[self.numbers] = torch.arange(len(self.numbers))
        return {"number_tokens": torch.tensor(self.numbers), "number_of_token": number_of_token}

    def start(
        self, encoded: ProgramEncoderOutput, attention_mask: torch.Tensor | None = None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], DecoderContext]:
        """Compute the initial state and the context of problems.

        Args:
            encoded: Output of the encoder.
            attention_mask: The words that the encoder read, (batch, words). Defaults to all words.

        Returns:
            h and c, (batch, 1, decoder_hidden_size) each, and the context.
        """
        hidden, cell = self.bridge(encoded.summary).tanh()[:, None].chunk(2, dim=-1)
        memory = keys = keep = numbers_read = numbers_said = None
        if self.attention is not None:
            memory = encoded.last_hidden_state
            keys = self.attention.project(memory)
            keep = None if attention_mask is None else attention_mask.to(memory.device).bool()
        if self.points:
            numbers_read = F.pad(self.read_number(encoded.number_states), (0, 0, 0, 1))
            numbers_said = self.say_number(encoded.number_states)
        return (hidden, cell), DecoderContext(memory, keys, keep, numbers_read, numbers_said)

    def embed(self, tokens: torch.Tensor, context: DecoderContext) -> torch.Tensor:
        """Embed symbols, int64 (batch, hypotheses); returns (batch, hypotheses, program_embedding_size)."""
        read = self.embedding(tokens)
        if self.points:
            numbers = self.number_of_token[tokens][..., None].expand(*tokens.shape, read.shape[-1])
            read = read + context.numbers_read.gather(1, numbers)
        return read

    def step(
        self, tokens: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor], context: DecoderContext
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
        """Read one symbol per hypothesis.

        Args:
            tokens: The last symbols, int64 (batch, hypotheses).
            state: h and c, (batch, hypotheses, decoder_hidden_size) each.
            context: The context of the problems.

        Returns:
            Features for `classify`, (batch, hypotheses, decoder_hidden_size); the next state; and the attention,
            (batch, hypotheses, words), or None without attention.
        """
        inputs, weights, attended = [self.dropout(self.embed(tokens, context))], None, []
        if self.attention is not None:
            weights = self.attention(state[0], context.keys, context.keep).softmax(dim=-1)
            attended = [weights @ context.memory]
        x = torch.cat(inputs + attended, dim=-1)
        hidden, cell = self.cell(x.flatten(0, 1), (state[0].flatten(0, 1), state[1].flatten(0, 1)))
        hidden, cell = hidden.unflatten(0, tokens.shape), cell.unflatten(0, tokens.shape)
        features = self.dropout(self.readout(torch.cat([hidden, *attended], dim=-1)).tanh())
        return features, (hidden, cell), weights

    def classify(self, features: torch.Tensor, context: DecoderContext) -> torch.Tensor:
        """Compute the logits of the next symbols, (batch, hypotheses, vocab_size), from the features of `step`."""
        logits = self.output(features)
        if self.points:
            scores = features @ context.numbers_said.transpose(1, 2) * features.shape[-1] ** -0.5
            logits = logits.index_add(-1, self.number_tokens, scores.to(logits.dtype))
        return logits
