"""Sequence classification: the flags, data, model, evaluation and report of scripts/train_sequence_classifier.py.

Each row of `TASKS` is one shape of sequence problems:

- topics: many to one. The label of a text, such as the sentiment of a review or the topic of a news item.
- frames: many to many, in step. The motion of an object in each frame of a video.
- dates, reversal: many to many, after reading. The model reads all letters, and then writes one letter per blank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_dl.data import labeled_texts, motion, rewriting, word_vectors
from hf_dl.models.layers_recurrent import CELLS
from hf_dl.models.recurrent_classifier import (
    RecurrentClassifierConfig,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
)
from hf_dl.progress import activity
from hf_dl.reporting.card import run_card
from hf_dl.reporting.plots import plot_run

from .evaluation import checked_config, hide_progress_bars

SPLITS = {"train": "train", "val": "validation", "test": "test"}  # from the prefix of the metrics to the split
BATCH_SIZE = 100
IGNORED = -100
BLANK = "_"  # a step at which the model writes a letter
CURVES = {"loss": {"training": "loss", "validation": "val_loss"}, "accuracy": {"validation": "val_accuracy"}}
Model = RecurrentForSequenceClassification | RecurrentForTokenClassification


class Examples(torch.utils.data.Dataset):
    """Sequences and labels in memory.

    Args:
        inputs: One tensor per sequence: int tokens (length,), or float frames (length, channels, height, width).
        labels: One scalar per sequence, or one label per step.
        names: The names of the labels.
        tokenizer: The tokenizer of the tokens, or `None` for frames.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        labels: Sequence[torch.Tensor],
        names: Sequence[str],
        tokenizer: PreTrainedTokenizerFast | None = None,
    ):
        self.inputs, self.labels, self.names, self.tokenizer = inputs, labels, list(names), tokenizer

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}

    @property
    def lengths(self) -> list[int]:
        """Return the number of steps of each sequence."""
        return [len(each) for each in self.inputs]

    def fingerprint_data(self) -> list[torch.Tensor]:
        """Return the labels, which a resumed run compares with the labels of the original run."""
        return [torch.cat([each.flatten() for each in self.labels])]


def collate(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join sequences to a batch. Shorter ones are filled on the right with 0, which the mask hides.

    Args:
        rows: Rows of `Examples`.

    Returns:
        The arguments of the model.
    """
    inputs, labels = ([row[name] for row in rows] for name in ("inputs", "labels"))
    pad = torch.nn.utils.rnn.pad_sequence
    steps = labels[0].ndim > 0
    batch = {"labels": pad(labels, batch_first=True, padding_value=IGNORED) if steps else torch.stack(labels)}
    if inputs[0].is_floating_point():
        return {"pixel_values": torch.stack(inputs), **batch}
    lengths = torch.tensor([len(each) for each in inputs])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": pad(inputs, batch_first=True), "attention_mask": mask, **batch}


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@dataclass
class SequenceFlags:
    """Flags that select the task and the network."""

    task: str = field(
        default="topics",
        metadata={
            "help": "topics: one label per text. frames: the motion in each frame of a video. dates, reversal: read a "
            "text, then write another one."
        },
    )
    source: str = field(
        default="synthetic",
        metadata={"help": "task=topics: synthetic (reviews), a CSV or parquet file with text and label, or a Hub id."},
    )
    num_train: int = field(default=0, metadata={"help": "Number of training sequences. 0 uses all."})
    num_test: int = field(
        default=0, metadata={"help": "Number of validation sequences, and of test sequences. 0 uses all."}
    )
    cell: str = field(default="lstm", metadata={"help": f"Recurrent cell. Choose one of: {', '.join(CELLS)}."})
    bidirectional: bool = field(default=True, metadata={"help": "Read the sequence forward and backward."})
    embedding_size: int = field(default=32, metadata={"help": "Channels of the embedded tokens or frames."})
    hidden_size: int = field(default=64, metadata={"help": "Channels of the recurrent layers, per direction."})
    num_hidden_layers: int = field(default=1, metadata={"help": "Number of recurrent layers."})
    dropout: float = field(default=0.2, metadata={"help": "Dropout probability before, between and after the layers."})
    pooling: str = field(
        default="max_mean", metadata={"help": "task=topics: last (the final state) or max_mean (over all steps)."}
    )
    max_length: int = field(default=100, metadata={"help": "task=topics: maximum number of tokens of a text."})
    embeddings: str = field(
        default="",
        metadata={
            "help": "task=topics: file of word vectors in the format of GloVe, with embedding_size numbers each."
        },
    )
    group_by_length: bool = field(
        default=True, metadata={"help": "Put sequences of similar length into a batch, which saves padding."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown. Choose one of: {', '.join(TASKS)}.")
        if self.source != "synthetic" and self.task != "topics":
            raise ValueError(f"source={self.source!r} works only with task='topics'. Remove it.")
        if self.embeddings and self.task != "topics":
            raise ValueError(f"embeddings={self.embeddings!r} works only with task='topics'. Remove it.")
        for name, least in (("num_train", 0), ("num_test", 0), ("max_length", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        make_config(self, names=("a", "b"), vocab_size=10)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def _load_topics(args: Any) -> dict[str, Examples]:
    rows = {
        prefix: labeled_texts.load(split, args.source, num_rows=_count(args, prefix))
        for prefix, split in SPLITS.items()
    }
    tokenizer = labeled_texts.build_tokenizer(rows["train"]["text"])
    tokenizer.model_max_length = args.max_length
    found = {}
    for prefix, data in rows.items():
        ids = tokenizer(list(data["text"]), truncation=True)["input_ids"]
        labels = [torch.tensor(label) for label in data["label"]]
        found[prefix] = Examples([torch.tensor(each) for each in ids], labels, data.features["label"].names, tokenizer)
    return found


def _load_frames(args: Any) -> dict[str, Examples]:
    found = {}
    for prefix, split in SPLITS.items():
        data = motion.load(split, num_videos=_count(args, prefix)).with_format("torch")
        frames = [row["frames"].permute(0, 3, 1, 2).float() / 127.5 - 1 for row in data]
        found[prefix] = Examples(frames, [row["labels"] for row in data], motion.MOTIONS)
    return found


def _load_rewriting(args: Any) -> dict[str, Examples]:
    rows = {
        prefix: rewriting.load(args.task, split, num_rows=_count(args, prefix)) for prefix, split in SPLITS.items()
    }
    letters = sorted({letter for row in rows["train"] for letter in row["text"]})
    names = sorted({letter for data in rows.values() for row in data for letter in row["answer"]})
    tokens = ["<pad>", "<unk>", BLANK, *letters]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )
    found = {}
    for prefix, data in rows.items():
        inputs, labels = [], []
        for row in data:
            inputs.append(torch.tensor(tokenizer(row["text"] + BLANK * len(row["answer"]))["input_ids"]))
            answer = [names.index(letter) for letter in row["answer"]]
            labels.append(torch.tensor([IGNORED] * len(row["text"]) + answer))
        found[prefix] = Examples(inputs, labels, names, tokenizer)
    return found


def _count(args: Any, prefix: str) -> int | None:
    return (args.num_train if prefix == "train" else args.num_test) or None


@dataclass(frozen=True)
class Task:
    """A row of `TASKS`.

    Args:
        load: Returns the examples by key of `SPLITS` for the flags.
        model: Class of the model.
        summary: Sentence for the card.
        unit: Unit of a label.
    """

    load: Callable[[Any], dict[str, Examples]]
    model: type[Model]
    summary: str
    unit: str


TASKS = {
    "topics": Task(_load_topics, RecurrentForSequenceClassification, "A recurrent classifier of texts.", "text"),
    "frames": Task(
        _load_frames,
        RecurrentForTokenClassification,
        "A recurrent classifier of the motion in each frame of a video.",
        "frame",
    ),
    "dates": Task(
        _load_rewriting,
        RecurrentForTokenClassification,
        f"A recurrent network that reads a date and writes it as YYYY-MM-DD into ten blanks ({BLANK}) after it.",
        "letter",
    ),
    "reversal": Task(
        _load_rewriting,
        RecurrentForTokenClassification,
        f"A recurrent network that reads a word and writes it backward into blanks ({BLANK}) after it.",
        "letter",
    ),
}
"""The tasks by name."""


def load_splits(args: Any) -> dict[str, Examples]:
    """Load the training, validation and test sequences that the flags select.

    Args:
        args: Flags with the fields of `SequenceFlags`.

    Returns:
        The examples by key of `SPLITS`.
    """
    hide_progress_bars()
    return TASKS[args.task].load(args)


# ---------------------------------------------------------------------------------------------------------------------
# Model and evaluation


def make_config(args: Any, names: Sequence[str], vocab_size: int) -> RecurrentClassifierConfig:
    """Create the config that the flags select.

    Args:
        args: Flags with the fields of `SequenceFlags`.
        names: The names of the labels.
        vocab_size: Number of tokens. Ignored for frames.

    Returns:
        The config.

    Raises:
        ValueError: If a flag has an invalid value.
    """
    return checked_config(
        RecurrentClassifierConfig,
        input_type="frames" if args.task == "frames" else "tokens",
        vocab_size=vocab_size,
        embedding_size=args.embedding_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        cell=args.cell,
        bidirectional=args.bidirectional,
        dropout=args.dropout,
        pooling=args.pooling,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        problem_type="single_label_classification" if args.task == "topics" else None,
    )


def make_model(args: Any, train: Examples) -> Model:
    """Create the model that the flags select.

    Args:
        args: Flags with the fields of `SequenceFlags`.
        train: The training sequences.

    Returns:
        The model.
    """
    size = len(train.tokenizer) if train.tokenizer is not None else 1
    return TASKS[args.task].model(make_config(args, train.names, size))


@torch.no_grad()
def copy_vectors(args: Any, model: Model, train: Examples) -> dict[str, float]:
    """Copy the word vectors of the flag `embeddings` into the embedding of a model.

    Args:
        args: Flags with the fields of `SequenceFlags`.
        model: The model. Rows of words without a vector keep their random values.
        train: The training texts.

    Returns:
        `known_words`, the share of the words in the training texts that have a vector; nothing without the flag.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is invalid, or its vectors do not have `embedding_size` numbers.
    """
    if not args.embeddings:
        return {}
    words = train.tokenizer.get_vocab()
    special = set(train.tokenizer.all_special_tokens)
    vectors = word_vectors.load(
        args.embeddings, [word for word in words if word not in special], width=args.embedding_size
    )
    known = torch.zeros(len(words), dtype=torch.bool)
    for word, vector in vectors.items():
        known[words[word]] = True
        model.get_input_embeddings().weight[words[word]] = vector
    tokens = torch.cat(list(train.inputs))
    tokens = tokens[tokens != train.tokenizer.bos_token_id]
    share = known[tokens].float().mean().item() if len(tokens) else 0.0
    print(f"{args.embeddings} has vectors of {len(vectors)} words, {share:.0%} of the words in the training texts.")
    return {"known_words": share}


@torch.no_grad()
def evaluate(model: Model, data: Examples) -> dict[str, float]:
    """Compute the scores of a model.

    Args:
        model: The model. It is set to evaluation mode.
        data: The sequences.

    Returns:
        `loss`; `accuracy`, the fraction of right labels; and, for one label per step, `sequence_accuracy`, the part
        of the sequences whose labels are all right.
    """
    model.eval()
    device, loss, right, counted, whole = next(model.parameters()).device, 0.0, 0, 0, 0
    for start in range(0, len(data), BATCH_SIZE):
        batch = collate([data[row] for row in range(start, min(start + BATCH_SIZE, len(data)))])
        batch = {name: values.to(device) for name, values in batch.items()}
        output, labels = model(**batch), batch["labels"]
        known, hits = labels != IGNORED, output.logits.argmax(-1) == labels
        count = int(known.sum())
        loss, counted = loss + output.loss.item() * count, counted + count
        right += int((hits & known).sum())
        if labels.ndim > 1:
            whole += int((hits | ~known).all(1).sum())
    scores = {"loss": loss / counted, "accuracy": right / counted}
    return scores | ({"sequence_accuracy": whole / len(data)} if data.labels[0].ndim else {})


def evaluate_splits(run: Any, splits: Mapping[str, Examples]) -> dict[str, float]:
    """Compute the scores of the model of a training run on several splits.

    Args:
        run: The `TrainingRun`. Its averaged weights are used if it has them.
        splits: The sequences of each split.

    Returns:
        The scores, with keys such as `val_accuracy`.
    """
    metrics = {}
    with run.averaged():
        for split, data in splits.items():
            metrics |= {f"{split}_{name}": value for name, value in evaluate(run.unwrapped, data).items()}
    return metrics


def majority_accuracy(data: Examples, train: Examples) -> float:
    """Return the accuracy of always giving the most frequent label of the training sequences.

    Args:
        data: The sequences to score.
        train: The training sequences.
    """
    labels = {
        name: torch.cat([each.flatten() for each in part.labels]) for name, part in (("data", data), ("train", train))
    }
    known = {name: values[values != IGNORED] for name, values in labels.items()}
    return (known["data"] == known["train"].mode().values).double().mean().item()


@torch.no_grad()
def rewrite(
    model: RecurrentForTokenClassification, tokenizer: PreTrainedTokenizerFast, text: str, *, length: int
) -> str:
    """Let a model of the tasks "dates" or "reversal" rewrite a text.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        text: The text.
        length: Number of letters to write.

    Returns:
        The letters.

    Raises:
        ValueError: If the text is empty or has unknown letters.
    """
    inputs = tokenizer(text + BLANK * length, return_tensors="pt").to(model.device)
    ids = inputs["input_ids"][0, : len(text)].tolist()
    unknown = sorted({letter for letter, token in zip(text, ids, strict=True) if token == tokenizer.unk_token_id})
    if not text or unknown:
        raise ValueError(
            f"text={text!r} is empty or has unknown letters: {unknown}. Use letters of the training text."
        )
    found = model.eval()(**inputs).logits[0, len(text) :].argmax(-1).tolist()
    return "".join(model.config.id2label[number] for number in found)


@activity("Writing the report")
def write_report(args: Any, folder: Path) -> None:
    """Write the learning curves and the model card of a finished run, and print where they are.

    Args:
        args: Flags with the fields of `SequenceFlags`.
        folder: The folder of the run.
    """
    task = TASKS[args.task]
    plot_run(folder, folder / "curves.png", CURVES)
    limits = (f"Accuracy counts each {task.unit}. Sequences unlike the training sequences were not tested.",)
    run_card(folder, summary=task.summary, limits=limits, tags=["recurrent_classifier"]).save(folder / "README.md")
    print(f"checkpoint  {folder}  (load with {task.model.__name__}.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
