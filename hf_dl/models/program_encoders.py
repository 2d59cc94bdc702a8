"""Encoders of word problems: a bidirectional LSTM or BERT, and the states that represent the numbers of a problem.

To add an encoder, subclass `ProgramEncoder` and add the class to `ENCODERS`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedConfig
from transformers.utils import ModelOutput

from .layers_recurrent import BidirectionalLSTM


@dataclass
class ProgramEncoderOutput(ModelOutput):
    """Output of a `ProgramEncoder`.

    Attributes:
        last_hidden_state: One state per word, (batch, words, channels).
        summary: Input of the decoder's initial state, (batch, channels). "bilstm": the last h and c of both directions
            of its last layer. "bert": the mean of its outputs.
        number_states: One state per number of the problem, (batch, numbers, channels); None with
            `number_embeddings="free"`.
        hidden_states: If requested, tensors (batch, words, channels). "bilstm": the embedded words and the outputs of
            the last layer. "bert": the embedded words and the outputs of each layer.
        attentions: If requested, one tensor (batch, heads, words, words) per layer of "bert". Empty for "bilstm".
    """

    last_hidden_state: torch.Tensor | None = None
    summary: torch.Tensor | None = None
    number_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class TiedNumbers:
    """Represent the i-th number by the embedding of its word in the problem."""

    @staticmethod
    def size(encoder: "ProgramEncoder") -> int:
        """Return the channels of a number state."""
        return encoder.word_embeddings.embedding_dim

    @staticmethod
    def states(
        encoder: "ProgramEncoder", input_ids: torch.Tensor, mask: torch.Tensor, memory: torch.Tensor
    ) -> torch.Tensor:
        """Return one state per number, (batch, numbers, channels)."""
        return encoder.word_embeddings(encoder.number_token_ids).expand(input_ids.shape[0], -1, -1)


class PointerNumbers:
    """Represent the i-th number by the encoder's output at its word.

    A word that occurs more than once is represented by the mean of its outputs, a word that does not occur by zeros.
    """

    @staticmethod
    def size(encoder: "ProgramEncoder") -> int:
        """Return the channels of a number state."""
        return encoder.memory_size

    @staticmethod
    def states(
        encoder: "ProgramEncoder", input_ids: torch.Tensor, mask: torch.Tensor, memory: torch.Tensor
    ) -> torch.Tensor:
        """Return one state per number, (batch, numbers, channels)."""
        found = (input_ids[:, None] == encoder.number_token_ids[:, None]) & mask.bool()[:, None]
        found = found.to(memory.dtype)  # (batch, numbers, words)
        return (found @ memory) / found.sum(dim=-1, keepdim=True).clamp(min=1)


NUMBER_EMBEDDINGS: dict[str, type[TiedNumbers] | type[PointerNumbers] | None] = {
    "free": None,
    "tied": TiedNumbers,
    "pointer": PointerNumbers,
}
"""How the numbers of a problem are represented, by name; None: not at all."""


class ProgramEncoder(nn.Module):
    """Base class of the encoders.

    A subclass builds its network in `add_network`, where it also sets `memory_size` and `summary_size`.

    Args:
        config: A `ProgramSeq2SeqConfig`.

    Attributes:
        memory_size: Channels of the outputs.
        summary_size: Channels of the summary.
        number_size: Channels of a number state; None with `number_embeddings="free"`.
    """

    main_input_name = "input_ids"
    memory_size: int
    summary_size: int

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.add_network(config)
        self.number_embedding = NUMBER_EMBEDDINGS[config.number_embeddings]
        self.number_size = None if self.number_embedding is None else self.number_embedding.size(self)
        self.dropout = nn.Dropout(config.dropout)
        self.numbers = None if self.number_embedding is None else config.number_token_ids
        for name, values in self.make_buffers().items():
            self.register_buffer(name, values)

    def add_network(self, config: PreTrainedConfig) -> None:
        """Build the network of the encoder and set the sizes of its outputs."""
        raise NotImplementedError

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The embedding of words."""
        raise NotImplementedError

    def set_word_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of words."""
        raise NotImplementedError

    def read(
        self, input_ids: torch.Tensor, mask: torch.Tensor, token_type_ids: torch.Tensor | None, **requested: bool
    ) -> ProgramEncoderOutput:
        """Return the output without its number states.

        Args:
            input_ids: Words, int64 (batch, words).
            mask: The words to read, (batch, words).
            token_type_ids: Token types of "bert".
            **requested: `output_attentions` and `output_hidden_states`.
        """
        raise NotImplementedError

    def make_buffers(self) -> dict[str, torch.Tensor]:
        """Return the values of the buffers: the ids of the words that represent numbers."""
        return {} if self.numbers is None else {"number_token_ids": torch.tensor(self.numbers)}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ProgramEncoderOutput:
        """Read problems.

        Args:
            input_ids: Words, int64 (batch, words).
            attention_mask: The words to read, 1 or True, (batch, words), at least one per row. Defaults to all words.
            token_type_ids: Token types of "bert"; "bilstm" ignores them.
            output_attentions: Whether to return the attention of each layer of "bert".
            output_hidden_states: Whether to return the outputs of the layers.
            **kwargs: Ignored; `generate` passes further arguments to every encoder.

        Raises:
            ValueError: If a row has no words, or the mask has another shape or keeps no word of a row.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            shape = tuple(input_ids.shape)
            raise ValueError(f"input_ids has shape {shape}. Expected (batch, words) with at least one word per row.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        requested = {"output_attentions": bool(output_attentions), "output_hidden_states": bool(output_hidden_states)}
        output = self.read(input_ids, mask, token_type_ids, **requested)
        memory, numbers = output.last_hidden_state, None
        if self.number_embedding is not None:
            numbers = self.number_embedding.states(self, input_ids, mask, memory)
        return ProgramEncoderOutput(
            last_hidden_state=self.dropout(memory),
            summary=self.dropout(output.summary),
            number_states=numbers,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class BiLSTMEncoder(ProgramEncoder):
    """A bidirectional LSTM over word embeddings."""

    def add_network(self, config: PreTrainedConfig) -> None:
        """Build word embeddings and LSTM."""
        self.embedding = nn.Embedding(config.encoder_vocab_size, config.embedding_size)
        self.lstm = BidirectionalLSTM(
            config.embedding_size,
            config.encoder_hidden_size,
            num_layers=config.encoder_layers,
            dropout=config.dropout,
            fused=config.fused_lstm,
        )
        self.memory_size = 2 * config.encoder_hidden_size
        self.summary_size = 2 * self.memory_size

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The embedding of words."""
        return self.embedding

    def set_word_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of words."""
        self.embedding = value

    def read(
        self, input_ids: torch.Tensor, mask: torch.Tensor, token_type_ids: torch.Tensor | None, **requested: bool
    ) -> ProgramEncoderOutput:
        """Return the output without its number states."""
        embedded = self.embedding(input_ids)
        memory, states = self.lstm(self.dropout(embedded), mask)
        return ProgramEncoderOutput(
            last_hidden_state=memory,
            summary=torch.cat([state[:, -1] for state in states], dim=-1),
            hidden_states=(embedded, memory) if requested["output_hidden_states"] else None,
            attentions=() if requested["output_attentions"] else None,
        )


class BertEncoder(ProgramEncoder):
    """BERT (Devlin et al. 2019) without its pooling layer."""

    def add_network(self, config: PreTrainedConfig) -> None:
        """Build BERT from `bert_config`, with the attention implementation of the model."""
        fields = {**(config.bert_config or {}), "vocab_size": config.encoder_vocab_size}
        bert_config = BertConfig.from_dict(fields, attn_implementation=config._attn_implementation)
        self.bert = BertModel(bert_config, add_pooling_layer=False)
        self.memory_size = self.summary_size = self.bert.config.hidden_size

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The embedding of words."""
        return self.bert.get_input_embeddings()

    def set_word_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of words."""
        self.bert.set_input_embeddings(value)
        self.bert.config.vocab_size = value.num_embeddings

    def read(
        self, input_ids: torch.Tensor, mask: torch.Tensor, token_type_ids: torch.Tensor | None, **requested: bool
    ) -> ProgramEncoderOutput:
        """Return the output without its number states."""
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected {tuple(input_ids.shape)}.")
        if not torch.compiler.is_compiling() and not mask.bool().any(dim=1).all():
            rows = (~mask.bool().any(dim=1)).nonzero().flatten().tolist()
            raise ValueError(f"attention_mask keeps no token of rows {rows}; each needs at least one.")
        output = self.bert(
            input_ids, attention_mask=mask, token_type_ids=token_type_ids, **requested, return_dict=True
        )
        memory = output.last_hidden_state
        weights = mask.to(memory.dtype)[..., None]
        return ProgramEncoderOutput(
            last_hidden_state=memory,
            summary=(memory * weights).sum(dim=1) / weights.sum(dim=1),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


ENCODERS: dict[str, type[ProgramEncoder]] = {"bilstm": BiLSTMEncoder, "bert": BertEncoder}
"""The encoders by name."""
