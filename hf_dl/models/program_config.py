"""Configuration of the word problem model: its sizes, and the symbols of its program language."""

import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .program_encoders import ENCODERS, NUMBER_EMBEDDINGS
from .program_grammar import ProgramGrammar, indexed_tokens

OPERATIONS = {"add": 2, "subtract": 2, "multiply": 2, "divide": 2}
SPECIAL_TOKENS = ("<unk>", "<pad>", "<s>", "</s>")


def program_vocabulary(
    operations: Sequence[str], constants: Sequence[str], *, num_numbers: int = 26, num_results: int = 56
) -> list[str]:
    """Return the symbols of a program language: unknown, padding, start, end, then all symbols of programs.

    Args:
        operations: Names of the operations.
        constants: Names of the constants, `const_...`.
        num_numbers: Maximum number of numbers in a problem: n0, n1, ...
        num_results: Maximum number of earlier steps that a program can refer to: #0, #1, ...
    """
    numbers, results = (f"n{i}" for i in range(num_numbers)), (f"#{i}" for i in range(num_results))
    return [*SPECIAL_TOKENS, *operations, *constants, *numbers, *results]


@strict
class ProgramSeq2SeqConfig(PreTrainedConfig):
    """Configuration of a `ProgramSeq2SeqForConditionalGeneration`.

    The token ids (`pad_token_id`, ...) are ids of program symbols. Padding is not 0, because `generate` of
    transformers would then pad with end tokens.

    Args:
        encoder_vocab_size: Size of the vocabulary of problems; for "bert", the number of its tokens.
        vocab_size: Number of program symbols. Defaults to the length of `program_tokens`.
        program_tokens: The program symbols in the order of their ids. Defaults to `program_vocabulary` for the four
            basic operations and the constants 1, 2, 3, 4, 10, 60 and 100.
        operations: Number of arguments of each operation; only operations among `program_tokens` count.
        encoder_type: A key of `ENCODERS`: "bilstm" or "bert".
        attention: Whether the decoder attends to the outputs of the encoder. If False, the summary of the encoder is
            its only input.
        number_embeddings: A key of `NUMBER_EMBEDDINGS`: how the decoder represents n_i. "free": by a learned vector
            only. "tied": also by the embedding of the word for the i-th number in problems. "pointer": also by the
            encoder's output at that word. "tied" and "pointer" project this state, add it to the embedding of n_i,
            and score n_i with it.
        number_token_ids: For "tied" and "pointer": the ids of the words for the 0th, 1st, ... number in problems.
        embedding_size: Channels of a word embedding of "bilstm".
        encoder_hidden_size: Channels per direction of "bilstm".
        encoder_layers: Layers of "bilstm".
        bert_config: Fields of the `BertConfig` of "bert". Its `vocab_size` is `encoder_vocab_size`.
        freeze_encoder: Whether the encoder is not trained. It then always stays in evaluation mode.
        program_embedding_size: Channels of the embedding of a program symbol.
        decoder_hidden_size: Channels of the decoder.
        attention_size: Channels of the additive attention.
        dropout: Probability of dropout in embeddings, between encoder layers, in the encoder's outputs, and before the
            output layer.
        fused_lstm: Whether to use torch's LSTM kernels instead of explicit steps; the weights are the same.
        teacher_forcing_ratio: Probability that the decoder reads the true symbol in training, from 0 to 1.
        max_program_length: Maximum number of symbols of a generated program, including the end.
        mask_numbers: Whether problems contain `<n0>`, `<n1>`, ... instead of their numbers. The model ignores this and
            the following fields. They tell `MathProgramPipeline` how to read problems and how to run programs.
        number_convention: How to find the numbers of a problem: a key of `hf_dl.programs.CONVENTIONS`.
        semantics: Definition of the operations: a key of `hf_dl.programs.SEMANTICS`.

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
    keys_to_ignore_at_inference = ["decoder_state", "encoder_last_hidden_state"]  # not predictions for `Trainer`

    encoder_vocab_size: int = 10_000
    vocab_size: int | None = None
    program_tokens: list[str] | None = None
    operations: dict[str, int] | None = None
    encoder_type: str = "bilstm"
    attention: bool = True
    number_embeddings: str = "free"
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
    number_convention: str = "mathqa"
    semantics: str = "data"
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | None = 3
    decoder_start_token_id: int | None = 2

    def __post_init__(self, **kwargs):
        """Fill in the default symbols; convert `bert_config` as JSON does, so that a loaded config is equal."""
        # The name of this field in older checkpoints; transformers expects a config under "encoder".
        self.encoder_type = kwargs.pop("encoder", self.encoder_type)
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
        """Validate the fields.

        Raises:
            ValueError: If a field is out of range or unknown, or if fields do not fit together.
        """
        for name, known in (("encoder_type", ENCODERS), ("number_embeddings", NUMBER_EMBEDDINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")
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
                f"vocab_size={self.vocab_size} must be {len(self.program_tokens)}, the number of program_tokens; "
                "encoder_vocab_size is the number of words of problems."
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
                "operations has no key among program_tokens; a program needs operations, for instance {'add': 2}."
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
        if NUMBER_EMBEDDINGS[self.number_embeddings] is not None:
            numbers = len(indexed_tokens(self.program_tokens, "n"))
            ids = self.number_token_ids
            if not ids or len(ids) > numbers or not all(0 <= index < self.encoder_vocab_size for index in ids):
                raise ValueError(
                    f"number_embeddings={self.number_embeddings!r} needs number_token_ids: 1 to {numbers} ids below "
                    f"encoder_vocab_size={self.encoder_vocab_size}, of the words that represent the numbers in "
                    f"problems; got {ids}."
                )

    def make_grammar(self, num_numbers: torch.Tensor | Sequence[int] | int | None = None) -> ProgramGrammar:
        """Return the grammar of `program_tokens`.

        Args:
            num_numbers: Number of numbers per problem, one value for all problems or (batch,). Defaults to all numbers
                of the vocabulary.
        """
        return ProgramGrammar.from_vocabulary(
            self.program_tokens, self.operations, eos_token_id=self.eos_token_id, num_numbers=num_numbers
        )
