"""Programs for math word problems: the flags, data and model that the scripts share.

scripts/train_seq2seq.py trains an encoder-decoder that reads a problem and writes its program, and
scripts/evaluate_seq2seq.py scores a saved model. The scores and the report are in seq2seq_evaluation.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_dl import programs
from hf_dl.data import math_programs, word_problems
from hf_dl.models.program_config import ProgramSeq2SeqConfig
from hf_dl.models.program_encoders import ENCODERS, NUMBER_EMBEDDINGS
from hf_dl.models.program_seq2seq import ProgramSeq2SeqForConditionalGeneration
from hf_dl.pipelines.math_program import MathProgramPipeline

from .evaluation import checked_config, hide_progress_bars, split_size

MODELS = {  # the four compared models: encoder, attention, freeze_encoder
    "bilstm": ("bilstm", False, False),
    "bilstm_attention": ("bilstm", True, False),
    "bert_frozen": ("bert", True, True),
    "bert": ("bert", True, False),
}
SWITCHES = ("grammar", "rerank", "vote", "options")  # see hf_dl.pipelines.math_program
BATCH_SIZE = 64  # problems per batch during evaluation
BERT_LEARNING_RATE = 3e-5  # the middle of the three fine-tuning rates in Devlin et al. 2019


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@dataclass
class ProblemFlags:
    """Flags that select the problems, for training and for evaluation."""

    source: str = field(
        default="synthetic",
        metadata={"help": "synthetic (generated), a folder or file in the format of MathQA, or a Hub dataset id."},
    )
    subset: Literal["all", "course"] = field(
        default="all",
        metadata={"help": "course keeps the rows of assignment COL775 A1.2, with numbers read by its rules."},
    )
    resplit: Literal["none", "template"] = field(
        default="none", metadata={"help": "template splits the problems again, so that no template is in two splits."}
    )
    num_train: int = field(
        default=0, metadata={"help": "Number of training problems. 0 uses all, 20000 for source=synthetic."}
    )
    num_test: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of problems in each other split. 0 uses all problems. Defaults to all, and to at "
            "most half of num_train."
        },
    )


@dataclass
class DecodingFlags:
    """Flags for the search of programs, for training and for evaluation."""

    num_beams: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "Beam sizes. Each size is scored; predictions are saved for the last size."},
    )
    length_penalty: float = field(
        default=1.0, metadata={"help": "Exponent of the program length by which beam scores are divided."}
    )
    decoding: str = field(
        default="plain",
        metadata={
            "help": f"plain, or one or more of {', '.join(SWITCHES)} joined with +. hf_dl.pipelines.math_program "
            "explains them."
        },
    )

    def __post_init__(self):
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        if not self.num_beams or min(self.num_beams) < 1 or len(set(self.num_beams)) < len(self.num_beams):
            raise ValueError(f"num_beams={self.num_beams} must be distinct numbers, each at least 1.")
        if any(switch not in ("plain", *SWITCHES) for switch in self.decoding.split("+")):
            raise ValueError(
                f"decoding={self.decoding!r} is unknown. Use plain, or one or more of {', '.join(SWITCHES)} joined "
                "with +."
            )


@dataclass
class ModelFlags:
    """Flags that select the model. The defaults suit generated problems and two CPU cores."""

    model: str = field(
        default="",
        metadata={"help": f"Preset of encoder, attention and freeze_encoder. Choose one of: {', '.join(MODELS)}."},
    )
    encoder: str = field(
        default="bilstm", metadata={"help": f"Encoder of problems. Choose one of: {', '.join(ENCODERS)}."}
    )
    attention: bool = field(default=True, metadata={"help": "Let the decoder attend to the words of the problem."})
    bert: str = field(default="bert-base-cased", metadata={"help": "encoder=bert: Hub id or folder of BERT."})
    freeze_encoder: bool = field(default=False, metadata={"help": "encoder=bert: do not train the encoder."})
    encoder_learning_rate: float = field(
        default=0.0,
        metadata={"help": "Peak learning rate of the encoder. 0 uses learning_rate, or 3e-5 for encoder=bert."},
    )
    mask_numbers: bool = field(
        default=True, metadata={"help": "Replace the numbers in problems with the tokens <n0>, <n1>, ..."}
    )
    min_count: int = field(
        default=2, metadata={"help": "encoder=bilstm: minimum number of occurrences of a word in the vocabulary."}
    )
    glove: str = field(default="", metadata={"help": "encoder=bilstm: file of GloVe vectors to start from."})
    number_embeddings: str = field(
        default="free",
        metadata={
            "help": f"How the decoder embeds the number n_i. Choose one of: {', '.join(NUMBER_EMBEDDINGS)}. "
            "ProgramSeq2SeqConfig explains them."
        },
    )
    embedding_size: int = field(default=64, metadata={"help": "encoder=bilstm: channels of the word embeddings."})
    encoder_hidden_size: int = field(default=64, metadata={"help": "encoder=bilstm: channels per direction."})
    encoder_layers: int = field(default=1, metadata={"help": "encoder=bilstm: number of layers."})
    program_embedding_size: int = field(default=64, metadata={"help": "Channels of the program token embeddings."})
    decoder_hidden_size: int = field(default=128, metadata={"help": "Channels of the decoder LSTM."})
    attention_size: int = field(default=64, metadata={"help": "Channels of the attention scores."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout probability."})
    max_program_length: int = field(
        default=64,
        metadata={"help": "Maximum number of program tokens with the end token. Longer programs are not trained on."},
    )
    teacher_forcing_ratio: float = field(
        default=0.6,
        metadata={"help": "Initial probability that the decoder reads the correct previous token in training."},
    )
    teacher_forcing_end: float = field(
        default=-1.0,
        metadata={"help": "Final value of teacher_forcing_ratio, reached linearly. Below 0, the ratio is constant."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model:
            if self.model not in MODELS:
                raise ValueError(f"model={self.model!r} is unknown. Choose one of: {', '.join(MODELS)}.")
            self.encoder, self.attention, self.freeze_encoder = MODELS[self.model]
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder={self.encoder!r} is unknown. Choose one of: {', '.join(ENCODERS)}.")
        if self.teacher_forcing_end > 1:
            raise ValueError(f"teacher_forcing_end={self.teacher_forcing_end} must be at most 1.")
        if self.encoder_learning_rate < 0:
            raise ValueError(f"encoder_learning_rate={self.encoder_learning_rate} must be 0 or greater.")
        if self.freeze_encoder:
            self.encoder_learning_rate = 0.0
        elif self.encoder == "bert":
            self.encoder_learning_rate = self.encoder_learning_rate or BERT_LEARNING_RATE
        if self.encoder == "bert" and self.glove:
            raise ValueError(f"glove={self.glove!r} works only with encoder='bilstm'. Remove the flag.")
        if self.encoder == "bilstm" and self.freeze_encoder and not self.glove:
            raise ValueError("freeze_encoder would leave encoder='bilstm' untrained. Use it with encoder='bert'.")
        checked_config(ProgramSeq2SeqConfig, **config_fields(self))


def config_fields(args: Any) -> dict[str, Any]:
    """Collect the config fields of the model from the flags.

    Args:
        args: Flags with the fields of `ModelFlags` and `ProblemFlags`.

    Returns:
        The fields of the config. `number_token_ids` are placeholders that `make_model` replaces.
    """
    symbols = math_programs.program_tokenizer()
    names = (
        "attention freeze_encoder mask_numbers number_embeddings embedding_size encoder_hidden_size "
        "encoder_layers program_embedding_size decoder_hidden_size attention_size dropout max_program_length "
        "teacher_forcing_ratio"
    )
    course = args.subset == "course"
    return {name: getattr(args, name) for name in names.split()} | {
        "encoder_type": args.encoder,
        "program_tokens": symbols.convert_ids_to_tokens(list(range(len(symbols)))),
        "operations": dict(programs.OPERATIONS),
        "number_token_ids": list(range(math_programs.NUM_NUMBERS)),
        "number_convention": "course" if course else "mathqa",
        "semantics": "course" if course else "data",
        "pad_token_id": symbols.pad_token_id,
        "bos_token_id": symbols.bos_token_id,
        "eos_token_id": symbols.eos_token_id,
        "decoder_start_token_id": symbols.bos_token_id,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Data


def load_problems(args: ProblemFlags, split: str, *, mask_numbers: bool = True) -> datasets.Dataset:
    """Load one split of the problems that the flags select.

    Args:
        args: The flags.
        split: "train", "validation" or "test". Generated problems also have "test_situations". Their "test" has
            problems with seen templates (`test_seen`) followed by problems with unseen templates.
        mask_numbers: Whether the tokens <n0>, <n1>, ... replace the numbers.

    Returns:
        The rows, see `hf_dl.data.math_programs`.
    """
    hide_progress_bars()
    options = {"subset": args.subset, "resplit": args.resplit, "mask_numbers": mask_numbers}
    names = ("test_seen", "test") if args.source == "synthetic" and split == "test" else (split,)
    counts = [split_size(args, n, word_problems.SPLITS[n] if args.source == "synthetic" else None) for n in names]
    parts = [
        math_programs.load(name, args.source, num_problems=count, **options)
        for name, count in zip(names, counts, strict=True)
    ]
    return datasets.concatenate_datasets(parts, info=parts[0].info, split=parts[0].split)


def load_splits(args: Any) -> dict[str, datasets.Dataset]:
    """Load all splits of the problems that the flags select.

    Args:
        args: Flags with the fields of `ModelFlags` and `ProblemFlags`.

    Returns:
        The problems of "train", "val" and "test". Generated problems also have "situations": kinds of problems that
        training does not contain.
    """
    names = {"train": "train", "val": "validation", "test": "test"}
    if args.source == "synthetic":
        names["situations"] = "test_situations"
    return {key: load_problems(args, split, mask_numbers=args.mask_numbers) for key, split in names.items()}


class Examples(torch.utils.data.Dataset):
    """Tokenized problems and programs. `__getitems__` returns a padded batch.

    Attributes:
        problems: The rows. With `trainable`, only the rows that can be trained on.
        lengths: Number of program tokens and of problem tokens per row. They decide how long a step takes.

    Args:
        problems: Rows of `load_problems`.
        pipeline: Tokenizes the problems.
        symbols: The tokenizer of programs.
        trainable: Whether to leave out programs that are too long or have unknown tokens.
    """

    def __init__(
        self,
        problems: datasets.Dataset,
        pipeline: MathProgramPipeline,
        symbols: PreTrainedTokenizerBase,
        *,
        trainable: bool = False,
    ):
        labels, unknown = symbols(problems["program"][:])["input_ids"], symbols.unk_token_id
        if trainable:
            longest = pipeline.config.max_program_length
            kept = [i for i, row in enumerate(labels) if len(row) <= longest and unknown not in row]
            if len(kept) < len(labels):
                print(f"{len(labels) - len(kept)} training programs are left out: too long, or with unknown tokens.")
            problems, labels = problems.select(kept), [labels[i] for i in kept]
        self.problems, self.labels, self.pipeline = problems, labels, pipeline
        self.input_ids = pipeline.encode(problems["text"][:])["input_ids"]
        self.num_numbers = [len(numbers) for numbers in problems["numbers"][:]]
        self.lengths = [(len(row), len(words)) for row, words in zip(self.labels, self.input_ids, strict=True)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return a batch: `input_ids`, `attention_mask`, `labels` (-100 in the padding) and `num_numbers`."""
        rows = [torch.tensor(self.labels[i]) for i in indices]
        return {
            **self.pipeline.pad([self.input_ids[i] for i in indices]),
            "labels": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100),
            "num_numbers": torch.tensor([self.num_numbers[i] for i in indices]),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Model


@dataclass
class Tokenizers:
    """The two tokenizers of a model.

    Attributes:
        problems: The tokenizer of problems.
        symbols: The tokenizer of programs.
    """

    problems: PreTrainedTokenizerBase
    symbols: PreTrainedTokenizerBase

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the tokenizer of problems into a folder, and the tokenizer of programs into its `program_tokenizer`."""
        self.problems.save_pretrained(folder)
        self.symbols.save_pretrained(Path(folder) / "program_tokenizer")


def make_tokenizers(args: ModelFlags, train: datasets.Dataset) -> Tokenizers:
    """Create the tokenizers.

    Args:
        args: The flags.
        train: The training problems. encoder=bilstm uses their words; encoder=bert uses the tokenizer of BERT with
            the number tokens added.

    Returns:
        The tokenizers of problems and programs.
    """
    if args.encoder == "bert":
        words = AutoTokenizer.from_pretrained(args.bert)
        math_programs.add_number_tokens(words)
    else:
        words = math_programs.problem_tokenizer(train["text"][:], min_count=args.min_count)
    return Tokenizers(words, math_programs.program_tokenizer())


def make_model(args: Any, tokenizers: Tokenizers) -> ProgramSeq2SeqForConditionalGeneration:
    """Create the model that the flags select.

    Args:
        args: Flags with the fields of `ModelFlags` and `ProblemFlags`.
        tokenizers: The tokenizers of problems and programs.

    Returns:
        The model, with the weights of BERT or GloVe vectors if the flags name them.
    """
    words = tokenizers.problems
    fields = config_fields(args) | {
        "encoder_vocab_size": len(words),
        "number_token_ids": words.convert_tokens_to_ids(list(math_programs.NUMBER_TOKENS)),
    }
    if args.encoder == "bert":
        checked_config(ProgramSeq2SeqConfig, **fields)
        del fields["encoder_type"]  # from_encoder_pretrained sets it
        return ProgramSeq2SeqForConditionalGeneration.from_encoder_pretrained(args.bert, **fields)
    model = ProgramSeq2SeqForConditionalGeneration(checked_config(ProgramSeq2SeqConfig, **fields))
    if args.glove:
        vectors, coverage = math_programs.word_vectors(words, args.glove, dim=args.embedding_size, seed=args.seed)
        print(f"{args.glove} has vectors for {coverage:.1%} of the words. The other words start with random vectors.")
        model.load_word_embeddings(vectors)
    return model
