"""Word problem to program: an encoder that reads the words, and an LSTM that writes the program symbol by symbol.

The sequence to sequence model of Sutskever et al. 2014 and Bahdanau et al. 2015, in the four forms that are compared:

1. a bidirectional LSTM, of which the decoder sees only the last states (`attention=False`);
2. the same with additive attention over its outputs (the default);
3. BERT that stays as it is (`encoder="bert", freeze_encoder=True`), with attention;
4. BERT that is trained along.

At each step the decoder attends with its last hidden state, reads the last symbol and what it attended to, and names
the next symbol from its new hidden state and what it attended to:

    a = softmax(v^T tanh(W h + U M)),  c = a M,  h, s = LSTM([e(y); c], (h, s)),  p(y') = softmax(V tanh(R [h; c]))

What differs from Bahdanau et al.: LSTM instead of GRU, one tanh layer instead of maxout, the last states of both
directions instead of the backward one's begin the decoder, and scheduled sampling in training: each symbol that the
decoder reads is the true one with probability `teacher_forcing_ratio`, drawn for each example and step, and else its
own choice (Bengio et al. 2015, "Scheduled Sampling").

A program is a list of whole symbols without punctuation, as program_grammar.py describes it. The config carries these
symbols with the arities of the operations, so a checkpoint can decode by the grammar without anything else.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import BertConfig, BertModel, GenerationMixin, LogitsProcessorList, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation import EosTokenCriteria, GenerateBeamEncoderDecoderOutput, MaxLengthCriteria
from transformers.utils import ModelOutput, can_return_tuple

from .beam_search import BeamSearchOutput, Constraint, beam_search
from .layers_attention import AdditiveAttention
from .layers_recurrent import BidirectionalLSTM, LSTMCell
from .program_grammar import GrammarLogitsProcessor, ProgramGrammar, indexed_tokens

OPERATIONS = {"add": 2, "subtract": 2, "multiply": 2, "divide": 2}
SPECIAL_TOKENS = ("<unk>", "<pad>", "<s>", "</s>")

# What `generate` calls the state that it reorders: "past_key_values" up to transformers 5.23, "cache" from 5.24.
CACHE = (
    "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
)


def program_vocabulary(
    operations: Sequence[str], constants: Sequence[str], *, num_numbers: int = 26, num_results: int = 56
) -> list[str]:
    """The symbols of a program language: unknown, padding, start, end, and all that can be in a program.

    Args:
        operations: Names of the operations.
        constants: Names of the constants, `const_...`.
        num_numbers: How many numbers a problem may have: n0, n1, ...
        num_results: How many steps a program may refer back to: #0, #1, ...
    """
    numbers, results = (f"n{i}" for i in range(num_numbers)), (f"#{i}" for i in range(num_results))
    return [*SPECIAL_TOKENS, *operations, *constants, *numbers, *results]


@strict
class ProgramSeq2SeqConfig(PreTrainedConfig):
    """Configuration of a `ProgramSeq2SeqForConditionalGeneration`.

    The token ids (`pad_token_id`, ...) are those of programs. Padding is not 0: `generate` of transformers would fill
    up with end tokens.

    Args:
        encoder_vocab_size: Words that problems are made of; of BERT, its tokens.
        vocab_size: How many symbols programs are made of, as many as `program_tokens`; needs not be given.
        program_tokens: Symbols that programs are made of, in the order of their ids. The default is that of
            `program_vocabulary` for the four basic operations and the constants 1, 2, 3, 4, 10, 60 and 100.
        operations: How many arguments each operation takes; of those among `program_tokens` only.
        encoder: "bilstm" or "bert".
        attention: Whether the decoder attends to the encoder's outputs, or starts from its last states and no more.
        number_embeddings: What stands for n_i in the decoder, beside a vector of its own. "free": nothing. "tied":
            the embedding of the word that stands for the i-th number in problems. "pointer": the encoder's output
            there (the mean, where the word is found more than once; nothing, where it is not found). Either way it is
            added, after a projection, to what the decoder reads for n_i, and scored against what it says.
        number_token_ids: Of "tied" and "pointer": the words that stand for the 0th, 1st, ... number in problems.
        embedding_size: Channels of a word's embedding, of "bilstm".
        encoder_hidden_size: Channels of a direction of "bilstm".
        encoder_layers: Layers of "bilstm".
        bert_config: Fields of the `BertConfig` of "bert"; its `vocab_size` is `encoder_vocab_size`.
        freeze_encoder: Whether the encoder stays as it is. It is then in evaluation mode, whatever the model is in.
        program_embedding_size: Channels of a program symbol's embedding.
        decoder_hidden_size: Channels of the decoder.
        attention_size: Channels in which the decoder's state and the encoder's outputs are compared.
        dropout: Dropout of embeddings, between layers of the encoder, of its outputs, and before the output layer.
        fused_lstm: Whether torch's LSTM kernels run, or the written-out steps; the weights are the same.
        teacher_forcing_ratio: Probability with which the decoder reads the true symbol in training, from 0 to 1.
        max_program_length: Symbols of a program that is searched for, the end included.
        mask_numbers: Whether problems have `<n0>`, `<n1>`, ... in the place of their numbers. This and what follows
            is not used by the model itself; it says how a problem becomes `input_ids`, and a program an answer.
        number_convention: How the numbers of a problem are found: "mathqa", or "course" as in its files.
        semantics: What the operations compute: "data", "textbook" or "course".

    Example:
        ```python
        >>> config = ProgramSeq2SeqConfig(encoder_vocab_size=50)
        >>> config.program_tokens[:9]
        ['<unk>', '<pad>', '<s>', '</s>', 'add', 'subtract', 'multiply', 'divide', 'const_1']
        >>> config.vocab_size
        97

        ```
    """

    model_type = "program_seq2seq"

    encoder_vocab_size: int = 10_000
    vocab_size: int | None = None
    program_tokens: list[str] | None = None
    operations: dict[str, int] | None = None
    encoder: Literal["bilstm", "bert"] = "bilstm"
    attention: bool = True
    number_embeddings: Literal["free", "tied", "pointer"] = "free"
    number_token_ids: list[int] | None = None
    embedding_size: int = 100
    encoder_hidden_size: int = 128
    encoder_layers: int = 1
    bert_config: dict[str, Any] | None = None
    freeze_encoder: bool = False
    program_embedding_size: int = 64
    decoder_hidden_size: int = 256
    attention_size: int = 128
    dropout: float = 0.2
    fused_lstm: bool = True
    teacher_forcing_ratio: float = 0.6
    max_program_length: int = 64
    mask_numbers: bool = True
    number_convention: Literal["mathqa", "course"] = "mathqa"
    semantics: Literal["data", "textbook", "course"] = "data"
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | None = 3
    decoder_start_token_id: int | None = 2

    def __post_init__(self, **kwargs):
        """Fill in the default language, and make the fields what JSON gives back."""
        if self.operations is None:
            self.operations = dict(OPERATIONS)
        if self.program_tokens is None:
            constants = [f"const_{value}" for value in (1, 2, 3, 4, 10, 60, 100)]
            self.program_tokens = program_vocabulary(list(self.operations), constants)
        if self.vocab_size is None:
            self.vocab_size = len(self.program_tokens)
        self.bert_config = json.loads(json.dumps(self.bert_config))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse fields that do not fit together.

        Raises:
            ValueError: With the field, its value and what was expected.
        """
        for name in (
            "encoder_vocab_size",
            "embedding_size",
            "encoder_hidden_size",
            "encoder_layers",
            "program_embedding_size",
            "decoder_hidden_size",
            "attention_size",
            "max_program_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.vocab_size != len(self.program_tokens):
            raise ValueError(
                f"vocab_size={self.vocab_size} must be the {len(self.program_tokens)} of program_tokens; the words of "
                "problems are counted by encoder_vocab_size."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if not 0 <= self.teacher_forcing_ratio <= 1:
            raise ValueError(f"teacher_forcing_ratio={self.teacher_forcing_ratio} must be from 0 to 1.")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            if value is None or not 0 <= value < self.vocab_size:
                raise ValueError(f"{name}={value} must be one of the {self.vocab_size} program_tokens.")
        if self.pad_token_id == self.eos_token_id:
            raise ValueError(f"pad_token_id={self.pad_token_id} must differ from eos_token_id.")
        if len(set(self.program_tokens)) != self.vocab_size:
            twice = sorted({token for token in self.program_tokens if self.program_tokens.count(token) > 1})
            raise ValueError(f"program_tokens has {', '.join(twice)} more than once; each needs one id.")
        if not set(self.operations) & set(self.program_tokens):
            raise ValueError(
                "operations names none of program_tokens; a program needs operations, for instance {'add': 2}."
            )
        known = re.compile(r"n\d+|const_.*|[^a-z].*")
        unknown = [
            token
            for index, token in enumerate(self.program_tokens)
            if token not in self.operations
            and not known.fullmatch(token)
            and index not in (self.pad_token_id, self.bos_token_id, self.eos_token_id, self.decoder_start_token_id)
        ]
        if unknown:
            raise ValueError(f"operations lacks the arity of {', '.join(unknown)}, which program_tokens has.")
        if self.number_embeddings != "free":
            numbers = len(indexed_tokens(self.program_tokens, "n"))
            ids = self.number_token_ids
            if not ids or len(ids) > numbers or not all(0 <= index < self.encoder_vocab_size for index in ids):
                raise ValueError(
                    f"number_embeddings={self.number_embeddings!r} needs number_token_ids: 1 to {numbers} ids below "
                    f"encoder_vocab_size={self.encoder_vocab_size}, of the words that stand for the numbers in "
                    f"problems; got {ids}."
                )

    def make_grammar(self, num_numbers: torch.Tensor | Sequence[int] | int | None = None) -> ProgramGrammar:
        """The grammar of `program_tokens`.

        Args:
            num_numbers: How many numbers each problem has, one for all or (batch,); None: any may be used.
        """
        return ProgramGrammar.from_vocabulary(
            self.program_tokens, self.operations, eos_token_id=self.eos_token_id, num_numbers=num_numbers
        )


@dataclass
class ProgramEncoderOutput(ModelOutput):
    """What is known of problems.

    Attributes:
        last_hidden_state: Outputs, (batch, words, channels).
        summary: What the decoder starts from, (batch, channels): of "bilstm" the last h and c of both directions of
            its last layer, of "bert" the mean of its outputs.
        number_states: What stands for the 0th, 1st, ... number, (batch, numbers, channels); None with
            `number_embeddings="free"`.
    """

    last_hidden_state: torch.Tensor | None = None
    summary: torch.Tensor | None = None
    number_states: torch.Tensor | None = None


class DecoderContext(NamedTuple):
    """What all hypotheses of a problem share; None where the config has no use for it.

    Attributes:
        memory: Outputs of the encoder, (batch, words, channels).
        keys: Its projection by the attention, (batch, words, attention_size).
        keep: Where there are words, bool (batch, words).
        numbers_read: What is added to the embedding of n_0, n_1, ... and, last, of other symbols: 0;
            (batch, numbers + 1, program_embedding_size).
        numbers_said: What n_0, n_1, ... are scored against, (batch, numbers, channels).
    """

    memory: torch.Tensor | None
    keys: torch.Tensor | None
    keep: torch.Tensor | None
    numbers_read: torch.Tensor | None
    numbers_said: torch.Tensor | None


class DecoderState:
    """Where a decoder is, as `generate` of transformers wants to have it: the counterpart of a key-value cache.

    Args:
        hidden: h, (rows, 1, decoder_hidden_size).
        cell: c, likewise.
        context: What the rows read from; rows are only ever exchanged within a problem, so it needs no reordering.
        length: Symbols read so far.
    """

    is_compileable = False

    def __init__(self, hidden: torch.Tensor, cell: torch.Tensor, context: DecoderContext, length: int):
        self.hidden, self.cell, self.context, self.length = hidden, cell, context, length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i what row beam_idx[i] was."""
        self.hidden, self.cell = self.hidden.index_select(0, beam_idx), self.cell.index_select(0, beam_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many symbols were read."""
        return self.length


@dataclass
class ProgramSeq2SeqOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: Mean cross-entropy of the symbols.
        logits: (batch, symbols, vocab_size).
        decoder_state: Where the decoder is afterwards, if `use_cache`.
        cross_attentions: One tensor (batch, 1, symbols, words), rows summing to 1; None without attention.
        encoder_last_hidden_state: (batch, words, channels).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    decoder_state: DecoderState | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None


class ProgramEncoder(nn.Module):
    """Reads problems: a bidirectional LSTM over word embeddings, or BERT."""

    main_input_name = "input_ids"

    def __init__(self, config: ProgramSeq2SeqConfig):
        super().__init__()
        self.kind, self.number_embeddings = config.encoder, config.number_embeddings
        if config.encoder == "bilstm":
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
            word_size = config.embedding_size
        else:
            fields = {**(config.bert_config or {}), "vocab_size": config.encoder_vocab_size}
            self.bert = BertModel(BertConfig.from_dict(fields), add_pooling_layer=False)
            self.memory_size = self.summary_size = word_size = self.bert.config.hidden_size
        self.number_size = {"free": None, "tied": word_size, "pointer": self.memory_size}[config.number_embeddings]
        self.dropout = nn.Dropout(config.dropout)
        self.numbers = config.number_token_ids if config.number_embeddings != "free" else None
        for name, values in self.make_buffers().items():
            self.register_buffer(name, values)

    def make_buffers(self) -> dict[str, torch.Tensor]:
        """What is not trained: the words that stand for numbers."""
        return {} if self.numbers is None else {"number_token_ids": torch.tensor(self.numbers)}

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The embedding of words."""
        return self.embedding if self.kind == "bilstm" else self.bert.get_input_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ProgramEncoderOutput:
        """Read problems.

        Args:
            input_ids: Words, int64 (batch, words).
            attention_mask: Words to read, 1 or True, (batch, words), at least one in each row; None: all.
            token_type_ids: Of "bert"; not used by "bilstm".
            **kwargs: Not used; what `generate` passes to any encoder.

        Raises:
            ValueError: If the mask has another shape, or keeps no word of a row.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.kind == "bilstm":
            memory, states = self.lstm(self.dropout(self.embedding(input_ids)), mask)
            summary = torch.cat([state[:, -1] for state in states], dim=-1)
        else:
            if mask.shape != input_ids.shape:
                raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected {tuple(input_ids.shape)}.")
            if not mask.bool().any(dim=1).all():
                rows = (~mask.bool().any(dim=1)).nonzero().flatten().tolist()
                raise ValueError(f"attention_mask keeps no token of rows {rows}; each needs at least one.")
            memory = self.bert(input_ids, attention_mask=mask, token_type_ids=token_type_ids).last_hidden_state
            weights = mask.to(memory.dtype)[..., None]
            summary = (memory * weights).sum(dim=1) / weights.sum(dim=1)
        numbers = None
        if self.number_embeddings == "tied":
            numbers = self.word_embeddings(self.number_token_ids).expand(len(input_ids), -1, -1)
        elif self.number_embeddings == "pointer":
            found = (input_ids[:, None] == self.number_token_ids[:, None]) & mask.bool()[:, None]
            found = found.to(memory.dtype)  # (batch, numbers, words)
            numbers = (found @ memory) / found.sum(dim=-1, keepdim=True).clamp(min=1)
        return ProgramEncoderOutput(
            last_hidden_state=self.dropout(memory), summary=self.dropout(summary), number_states=numbers
        )


class ProgramDecoder(nn.Module):
    """Writes programs: an LSTM that may attend to what the encoder read.

    Tokens, states and results are (batch, hypotheses, ...) throughout; a problem's context is there once.
    """

    def __init__(self, config: ProgramSeq2SeqConfig, encoder: ProgramEncoder):
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
        """What is not trained: which symbol is which number."""
        if not self.points:
            return {}
        number_of_token = torch.full((self.output.out_features,), len(self.numbers))  # the count: no number
        number_of_token[self.numbers] = torch.arange(len(self.numbers))
        return {"number_tokens": torch.tensor(self.numbers), "number_of_token": number_of_token}

    def start(
        self, encoded: ProgramEncoderOutput, attention_mask: torch.Tensor | None = None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], DecoderContext]:
        """Begin programs.

        Args:
            encoded: What the encoder made of problems.
            attention_mask: Words that it read, (batch, words); None: all.

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

    def step(
        self, tokens: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor], context: DecoderContext
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
        """Read a symbol.

        Args:
            tokens: The last symbols, int64 (batch, hypotheses).
            state: h and c, (batch, hypotheses, decoder_hidden_size) each.
            context: Of the problems.

        Returns:
            Features, of which `classify` makes the next symbol's logits, (batch, hypotheses, decoder_hidden_size); the
            next state; and the attention, (batch, hypotheses, words), None without.
        """
        read = self.embedding(tokens)
        if self.points:
            numbers = self.number_of_token[tokens][..., None].expand(*tokens.shape, read.shape[-1])
            read = read + context.numbers_read.gather(1, numbers)
        inputs, weights, attended = [self.dropout(read)], None, []
        if self.attention is not None:
            weights = self.attention(state[0], context.keys, context.keep).softmax(dim=-1)
            attended = [weights @ context.memory]
        x = torch.cat(inputs + attended, dim=-1)
        hidden, cell = self.cell(x.flatten(0, 1), (state[0].flatten(0, 1), state[1].flatten(0, 1)))
        hidden, cell = hidden.unflatten(0, tokens.shape), cell.unflatten(0, tokens.shape)
        features = self.dropout(self.readout(torch.cat([hidden, *attended], dim=-1)).tanh())
        return features, (hidden, cell), weights

    def classify(self, features: torch.Tensor, context: DecoderContext) -> torch.Tensor:
        """Logits of the next symbols, (batch, hypotheses, vocab_size), of what `step` gives."""
        logits = self.output(features)
        if self.points:
            scores = features @ context.numbers_said.transpose(1, 2) * features.shape[-1] ** -0.5
            logits = logits.index_add(-1, self.number_tokens, scores.to(logits.dtype))
        return logits


class ProgramSeq2SeqForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Reads a word problem and writes its program.

    Three ways to search: `beam_search`, which keeps what is read of a problem once for all of its hypotheses and gives
    n-best lists; `generate`, that of transformers, with all of its options; and `generate(custom_generate=
    beam_generate)`, the first in the clothes of the second. They find the same.

    Example:
        ```python
        >>> model = ProgramSeq2SeqForConditionalGeneration(ProgramSeq2SeqConfig(encoder_vocab_size=50)).eval()
        >>> words, programs = torch.randint(50, (2, 9)), torch.tensor([[4, 15, 16, 3], [7, 15, 8, 3]])
        >>> model(words, labels=programs).logits.shape
        torch.Size([2, 4, 97])
        >>> grammar = model.config.make_grammar(num_numbers=[2, 3])
        >>> found = model.beam_search(words, num_beams=5, num_return_sequences=5, max_length=7, constraint=grammar)
        >>> found.sequences.shape, found.scores.shape
        (torch.Size([2, 5, 7]), torch.Size([2, 5]))

        ```
    """

    config: ProgramSeq2SeqConfig
    base_model_prefix = "program_seq2seq"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _is_stateful = True  # its state cannot be cut back, so assisted decoding is refused
    _supports_sdpa = True
    _no_split_modules = ["BertLayer", "BidirectionalLSTM", "ProgramDecoder"]

    def __init__(self, config: ProgramSeq2SeqConfig):
        super().__init__(config)
        self.encoder = ProgramEncoder(config)
        self.decoder = ProgramDecoder(config, self.encoder)
        self.post_init()
        self.generation_config.max_length = config.max_program_length + 1  # with the start
        self.train(self.training)

    @classmethod
    def from_encoder_pretrained(
        cls, name_or_path: str | os.PathLike, **fields: Any
    ) -> "ProgramSeq2SeqForConditionalGeneration":
        """Make a model around a BERT that has been trained.

        Args:
            name_or_path: Hub id or folder of any checkpoint that `BertModel` loads, as "bert-base-cased".
            **fields: Of `ProgramSeq2SeqConfig`. With an `encoder_vocab_size` above that of the checkpoint its
                embedding is widened, as tokens added to its tokenizer need it.

        Raises:
            ValueError: If `encoder_vocab_size` is below that of the checkpoint.
        """
        bert = BertModel.from_pretrained(name_or_path, add_pooling_layer=False)
        known = bert.config.vocab_size
        encoder_vocab_size = fields.pop("encoder_vocab_size", known)
        if encoder_vocab_size < known:
            raise ValueError(
                f"encoder_vocab_size={encoder_vocab_size} must be at least the {known} of {name_or_path}."
            )
        bert_fields = bert.config.to_diff_dict()
        config = ProgramSeq2SeqConfig(
            encoder="bert", encoder_vocab_size=encoder_vocab_size, bert_config=bert_fields, **fields
        )
        model, weights = cls(config), bert.state_dict()
        name = "embeddings.word_embeddings.weight"
        added = model.encoder.bert.state_dict()[name][known:].to(weights[name].dtype)
        model.encoder.bert.load_state_dict({**weights, name: torch.cat([weights[name], added])})
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)
        elif isinstance(module, (nn.LSTM, LSTMCell)):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, (ProgramEncoder, ProgramDecoder)):
            for name, values in module.make_buffers().items():
                init.copy_(getattr(module, name), values)

    def train(self, mode: bool = True) -> "ProgramSeq2SeqForConditionalGeneration":
        """Set the mode; an encoder that is frozen stays in evaluation mode and untrained."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.requires_grad_(False).eval()
        return self

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder."""
        return self.encoder

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of words."""
        return self.encoder.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of words."""
        if self.config.encoder == "bilstm":
            self.encoder.embedding = value
        else:
            self.encoder.bert.set_input_embeddings(value)

    @torch.no_grad()
    def resize_token_embeddings(self, new_num_tokens: int | None = None, **kwargs: Any) -> nn.Embedding:
        """Change how many words problems are made of, after tokens were added; programs stay as they are.

        Args:
            new_num_tokens: Words; the first ones keep their embedding, new ones are drawn with the spread of these.
            **kwargs: Not used; what PreTrainedModel has beside it.
        """
        old = self.get_input_embeddings()
        if new_num_tokens is not None and new_num_tokens != old.num_embeddings:
            new = nn.Embedding(new_num_tokens, old.embedding_dim, old.padding_idx).to(old.weight)
            new.weight.normal_(std=old.weight.float().std().item())
            kept = min(new_num_tokens, old.num_embeddings)
            new.weight[:kept] = old.weight[:kept]
            self.set_input_embeddings(new.requires_grad_(old.weight.requires_grad))
            self.config.encoder_vocab_size = new_num_tokens
        return self.get_input_embeddings()

    @torch.no_grad()
    def load_word_embeddings(self, matrix: torch.Tensor) -> None:
        """Start from word embeddings such as GloVe; they are trained along.

        Args:
            matrix: (encoder_vocab_size, embedding_size), finite.

        Raises:
            ValueError: If the matrix has another shape or is not finite.
        """
        weight = self.encoder.word_embeddings.weight
        if matrix.shape != weight.shape:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}, expected {tuple(weight.shape)}.")
        if not matrix.isfinite().all():
            raise ValueError("matrix has entries that are not finite; give words without a vector random ones.")
        weight.copy_(matrix)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        encoder_outputs: ProgramEncoderOutput | None = None,
        decoder_state: DecoderState | None = None,
        token_type_ids: torch.Tensor | None = None,
        teacher_forcing_ratio: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> ProgramSeq2SeqOutput:
        """Read problems, and programs up to each of their symbols.

        Args:
            input_ids: Words, int64 (batch, words).
            attention_mask: Words to read, 1 or True, (batch, words), at least one in each row; None: all. What it
                leaves out changes nothing.
            decoder_input_ids: Symbols to read, (batch, symbols), from the start token on; those before `labels` when
                not given.
            labels: Symbols to predict, (batch, symbols), -100 where there is none; with them there is a `loss`.
            encoder_outputs: Of the encoder, instead of `input_ids`.
            decoder_state: Of an earlier call, which read what comes before `decoder_input_ids`.
            token_type_ids: Of "bert".
            teacher_forcing_ratio: Probability with which `decoder_input_ids` are read, from 0 to 1, drawn for each
                example and step; else the decoder's own choice is. The first symbol is always read. Not given: the
                config's in training with `labels`, else 1.
            generator: Source of these draws, on the CPU.
            use_cache: Whether to return a `decoder_state`; the config's when not given, but not with `labels`.
            output_attentions: Whether to return the attention; the config's when not given.
            **kwargs: `return_dict=False` gives a tuple.

        Raises:
            ValueError: If neither `labels` nor `decoder_input_ids` are given, or an argument is out of range.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("Neither labels nor decoder_input_ids are given; give the programs, or generate.")
            before = labels[:, :-1].masked_fill(labels[:, :-1] == -100, self.config.pad_token_id)
            decoder_input_ids = F.pad(before, (1, 0), value=self.config.decoder_start_token_id)
        if labels is not None and labels.shape != decoder_input_ids.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected that of decoder_input_ids, "
                f"{tuple(decoder_input_ids.shape)}."
            )
        if teacher_forcing_ratio is None:
            teacher_forcing_ratio = self.config.teacher_forcing_ratio if self.training and labels is not None else 1.0
        if not 0 <= teacher_forcing_ratio <= 1:
            raise ValueError(f"teacher_forcing_ratio={teacher_forcing_ratio} must be from 0 to 1.")
        use_cache = (self.config.use_cache and labels is None) if use_cache is None else use_cache
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions

        if decoder_state is not None:
            state, context = (decoder_state.hidden, decoder_state.cell), decoder_state.context
        else:
            encoder_outputs = self._encode(input_ids, attention_mask, token_type_ids, encoder_outputs)
            state, context = self.decoder.start(encoder_outputs, attention_mask)
        forced = None
        if teacher_forcing_ratio < 1:
            # By step and then by example, so that the draws of a step do not depend on how many follow.
            draws = torch.rand(decoder_input_ids.shape[::-1], generator=generator)
            forced = (draws < teacher_forcing_ratio).T.to(decoder_input_ids.device)
        features, attentions = [], []
        for position in range(decoder_input_ids.shape[1]):
            tokens = decoder_input_ids[:, position, None]
            if forced is not None and position:
                with torch.no_grad():
                    own = self.decoder.classify(features[-1], context).argmax(dim=-1)
                tokens = torch.where(forced[:, position, None], tokens, own)
            feature, state, weights = self.decoder.step(tokens, state, context)
            features.append(feature)
            attentions.append(weights)
        logits = self.decoder.classify(torch.cat(features, dim=1), context)

        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.to(logits.device).flatten(), ignore_index=-100)
        if use_cache:
            length = decoder_input_ids.shape[1] + (decoder_state.length if decoder_state is not None else 0)
            decoder_state = DecoderState(*state, context, length)
        return ProgramSeq2SeqOutput(
            loss=loss,
            logits=logits,
            decoder_state=decoder_state if use_cache else None,
            cross_attentions=(torch.stack(attentions, dim=2),)
            if output_attentions and self.config.attention
            else None,
            encoder_last_hidden_state=None if encoder_outputs is None else encoder_outputs.last_hidden_state,
        )

    def _encode(self, input_ids, attention_mask, token_type_ids, encoder_outputs):
        if encoder_outputs is not None:
            return encoder_outputs
        if input_ids is None:
            raise ValueError("Neither input_ids nor encoder_outputs are given; give the problems.")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_encoder):
            return self.encoder(input_ids, attention_mask, token_type_ids)

    @torch.no_grad()
    def beam_search(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        num_beams: int = 10,
        max_length: int | None = None,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        num_return_sequences: int = 1,
        constraint: Constraint | None = None,
        token_type_ids: torch.Tensor | None = None,
        encoder_outputs: ProgramEncoderOutput | None = None,
    ) -> BeamSearchOutput:
        """Search for the most probable programs; see `beam_search.beam_search`.

        Args:
            input_ids: Words, int64 (batch, words).
            attention_mask: Words to read, as of `forward`.
            num_beams: Hypotheses that are kept for a problem; 1 is greedy search.
            max_length: Symbols of a program at most, the end included, the start not; the config's
                `max_program_length` when not given.
            length_penalty: Power of the length that a log-probability is divided by.
            early_stopping: True, False or "never".
            num_return_sequences: How many programs to return for each problem, at most `num_beams`.
            constraint: What may be said: `config.make_grammar(num_numbers)` for programs that can be read and run.
            token_type_ids: Of "bert".
            encoder_outputs: Of the encoder, instead of `input_ids`.

        Returns:
            N-best lists with scores.
        """
        encoder_outputs = self._encode(input_ids, attention_mask, token_type_ids, encoder_outputs)
        state, context = self.decoder.start(encoder_outputs, attention_mask)
        return self._search(
            state,
            context,
            num_beams=num_beams,
            max_length=self.config.max_program_length if max_length is None else max_length,
            start_token_id=self.config.decoder_start_token_id,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_return_sequences,
            constraint=constraint,
        )

    def _search(self, state, context, **options):
        def step(tokens, state):
            features, state, _ = self.decoder.step(tokens, state, context)
            return self.decoder.classify(features, context).float().log_softmax(dim=-1), state

        return beam_search(step, state, **options)

    # What `generate` of transformers asks for.

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is none of keys and values

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: ProgramEncoderOutput | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` for the next symbol, of what `generate` holds."""
        state = kwargs.get(CACHE)
        return {
            "decoder_input_ids": input_ids if state is None else input_ids[:, -1:],
            "decoder_state": state,
            "attention_mask": attention_mask,
            "encoder_outputs": encoder_outputs,
            "use_cache": use_cache,
            "output_attentions": kwargs.get("output_attentions"),
        }

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.decoder_state is not None:
            model_kwargs[CACHE] = outputs.decoder_state
        return model_kwargs


def beam_generate(
    model: ProgramSeq2SeqForConditionalGeneration,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Sequence[Any],
    generation_config: Any,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateBeamEncoderDecoderOutput:
    """The search of `beam_search`, to be given to `generate`.

    What `generate` has repeated for each hypothesis is taken once again. A `GrammarLogitsProcessor` becomes the
    constraint; scores are always returned with `return_dict_in_generate`.

    Args:
        model: The model.
        input_ids: What programs start from, (batch * num_beams, symbols).
        logits_processor: Empty, or one `GrammarLogitsProcessor`.
        stopping_criteria: Those of the length and of the end token.
        generation_config: With `num_beams`, `max_length`, `length_penalty`, `early_stopping`, `num_return_sequences`.
        **model_kwargs: `encoder_outputs`, what was read of the problems, and `attention_mask`, each of the problems
            `num_beams` times.

    Returns:
        What `generate` returns.

    Raises:
        ValueError: If it is asked for what the search cannot do: sampling, other processors or criteria.

    Example:
        ```python
        >>> model = ProgramSeq2SeqForConditionalGeneration(ProgramSeq2SeqConfig(encoder_vocab_size=50)).eval()
        >>> model.generate(torch.randint(50, (2, 9)), num_beams=4, max_length=6, custom_generate=beam_generate).shape
        torch.Size([2, 6])

        ```
    """
    grammars = [processor for processor in logits_processor if isinstance(processor, GrammarLogitsProcessor)]
    others = [type(each).__name__ for each in logits_processor if each not in grammars]
    others += [
        type(each).__name__
        for each in stopping_criteria
        if not isinstance(each, (MaxLengthCriteria, EosTokenCriteria))
    ]
    eos = torch.as_tensor(generation_config.eos_token_id).reshape(-1)
    others += [
        f"a grammar of another prefix_length than {input_ids.shape[1]}"
        for each in grammars
        if each.prefix_length != input_ids.shape[1]
    ]
    if generation_config.do_sample or others or len(grammars) > 1 or len(eos) != 1:
        raise ValueError(
            f"beam_generate takes a GrammarLogitsProcessor, max_length and one eos_token_id; got "
            f"do_sample={generation_config.do_sample}, eos_token_id={eos.tolist()}, {len(grammars)} grammars and "
            f"{', '.join(others) or 'nothing else'}."
        )
    repeated = max(generation_config.num_beams, generation_config.num_return_sequences)
    input_ids, mask = input_ids[::repeated], model_kwargs.get("attention_mask")
    mask = None if mask is None else mask[::repeated]
    encoded = {name: each[::repeated] for name, each in model_kwargs["encoder_outputs"].items()}
    state, context = model.decoder.start(ProgramEncoderOutput(**encoded), mask)
    for position in range(input_ids.shape[1] - 1):
        _, state, _ = model.decoder.step(input_ids[:, position, None], state, context)
    found = model._search(
        state,
        context,
        num_beams=generation_config.num_beams,
        max_length=generation_config.max_length - input_ids.shape[1],
        start_token_id=input_ids[:, -1],
        eos_token_id=int(eos),
        pad_token_id=generation_config.pad_token_id,
        length_penalty=generation_config.length_penalty,
        early_stopping=generation_config.early_stopping,
        num_return_sequences=generation_config.num_return_sequences,
        constraint=grammars[0].grammar if grammars else None,
    )
    begun = input_ids[:, None].expand(-1, found.sequences.shape[1], -1)
    sequences = torch.cat([begun, found.sequences], dim=-1).flatten(0, 1)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateBeamEncoderDecoderOutput(sequences=sequences, sequences_scores=found.scores.flatten())
