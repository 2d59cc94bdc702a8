"""Texts with one label: generated reviews, a CSV or parquet file such as AG News, or a Hub dataset.

A generated review has one to four clauses about parts of a film. Each clause praises or blames, sometimes with a
negation ("not dull"). The clause after "but" decides. Therefore, the order of the words matters: "good but slow" is
negative, and "slow but good" is positive.
"""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .splits import (
    MAX_FIELD,
    Source,
    find_local,
    find_split,
    given_splits,
    hold_out,
    load_from_hub,
    name_source,
    read_tables,
)

SPLITS = {"train": 4000, "validation": 500, "test": 500}  # default numbers of reviews
NAMES = ("negative", "positive")
_PARTS = ("plot", "acting", "music", "ending", "script", "pace", "humor", "camera work", "cast", "first half")
_WORDS = {
    1: ("good", "great", "clever", "moving", "funny", "bright", "charming", "fresh", "rich", "tense"),
    -1: ("bad", "dull", "slow", "silly", "flat", "empty", "clumsy", "tired", "cheap", "lazy"),
}


def sample_review(rng: random.Random) -> tuple[str, int]:
    """Draw a generated review.

    Args:
        rng: Source of random numbers.

    Returns:
        The text, and 0 for a negative or 1 for a positive review.
    """
    label = rng.choice((-1, 1))
    count = rng.randint(1, 4)
    turn = rng.randint(1, count - 1) if count > 1 and rng.random() < 0.6 else 0  # clauses before "but"
    text = ""
    for number in range(count):
        opinion = -label if number < turn else label
        negated = rng.random() < 0.3
        word = rng.choice(_WORDS[-opinion if negated else opinion])
        clause = f"the {rng.choice(_PARTS)} is {'not ' * negated}{rng.choice(('', 'very ', 'so '))}{word}"
        text += ("", " but ", " and ")[0 if number == 0 else 1 if number == turn else 2] + clause
    return text + " .", (label + 1) // 2


def load(
    split: str = "train",
    source: Source = "synthetic",
    *,
    num_rows: int | None = None,
    holdout: float = 0.1,
    seed: int = 0,
) -> datasets.Dataset:
    """Load texts with labels.

    The source is "synthetic"; a CSV file, also gzipped; a parquet file or folder; a dataset saved by `save_to_disk`;
    or a Hub id. A CSV file has a header with `text` and `label`, or no header: the class first, then columns of text
    that are joined, as in AG News. Missing validation and test splits are random rows of the training split.

    Args:
        split: "train", "validation" or "test".
        source: The source, or a dataset that you already have.
        num_rows: Number of rows, from the first. Defaults to all, and to the count in `SPLITS` for reviews.
        holdout: Share of the rows for each missing split, above 0 and below 0.5.
        seed: Seed of the generated reviews and of the held-out rows.

    Returns:
        A dataset with the columns `text` and `label`, a `ClassLabel`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If an argument or the content of the source is invalid.

    Example:
        >>> load("test", num_rows=2).features["label"].names
        ['negative', 'positive']
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown. Choose one of: {', '.join(SPLITS)}.")
    if num_rows is not None and num_rows < 1:
        raise ValueError(f"num_rows={num_rows} must be at least 1.")
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout={holdout} must be above 0 and below 0.5: the share of rows to hold out.")
    found = given_splits(source)
    if found is None and str(source) == "synthetic":
        rng = random.Random(f"hf_dl.labeled_texts {seed} {split}")
        rows = [sample_review(rng) for _ in range(num_rows or SPLITS[split])]
        return _dataset([text for text, _ in rows], [NAMES[label] for _, label in rows], NAMES, split)
    if found is None:
        expected = "a CSV file, a parquet file or folder, a Hub id, or 'synthetic'"
        root = find_local(str(source), expected)
        if root is None:
            found = dict(load_from_hub(str(source), expected))
        else:
            found = read_tables(root) or {"train": _read_csv(root)}
    parts = {name: _columns(rows, name_source(source)) for name, rows in found.items()}
    names = sorted({label for _, labels in parts.values() for label in labels}, key=_natural)
    texts, labels = _choose(parts, split, name_source(source), holdout, seed)
    if not texts:
        raise ValueError(f"split={split!r} of {name_source(source)!r} has no text.")
    return _dataset(texts[:num_rows], labels[:num_rows], names, split)


def _natural(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (2**31, name)


def _dataset(texts: Sequence[str], labels: Sequence[str], names: Sequence[str], split: str) -> datasets.Dataset:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)))
    numbers = [names.index(label) for label in labels]
    return datasets.Dataset.from_dict(
        {"text": list(texts), "label": numbers}, features=features, split=datasets.NamedSplit(split)
    )


def _read_csv(path: Path) -> datasets.Dataset:
    csv.field_size_limit(MAX_FIELD)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, OSError, csv.Error) as error:
        raise ValueError(f"source={path.name!r} is not a CSV file in UTF-8 ({error}).") from None
    header = [name.strip().lower() for name in rows[0]] if rows else []
    if {"text", "label"} <= set(header):
        text, label = header.index("text"), header.index("label")
        pairs = [(row[text], row[label]) for row in rows[1:] if len(row) > max(text, label)]
    elif rows and all(len(row) > 1 for row in rows):
        pairs = [(" ".join(row[1:]), row[0]) for row in rows]
    else:
        raise ValueError(
            f"source={path.name!r} has {len(rows)} rows. Expected a header with text and label, or the class followed "
            "by text in each row."
        )
    return datasets.Dataset.from_dict({"text": [text for text, _ in pairs], "label": [label for _, label in pairs]})


def _columns(rows: datasets.Dataset, source: str) -> tuple[list[str], list[str]]:
    label = next((name for name in ("label", "labels") if name in rows.column_names), None)
    if label is None or "text" not in rows.column_names:
        raise ValueError(f"{source!r} has the columns {', '.join(rows.column_names)}. Expected text and label.")
    kind = rows.features[label]
    named = kind.int2str if isinstance(kind, datasets.ClassLabel) else str
    return [text or "" for text in rows["text"]], [named(value) for value in rows[label]]


def _choose(
    parts: Mapping[str, tuple[list[str], list[str]]], split: str, source: str, holdout: float, seed: int
) -> tuple[list[str], list[str]]:
    """Return the texts and labels of a split. Missing splits are random rows of the training split."""
    given = find_split(parts, split)
    if given is not None and split != "train":
        return given
    train = find_split(parts, "train")
    if train is None:
        raise ValueError(f"{source!r} has no train split. Its splits: {', '.join(parts)}.")
    missing = [name for name in ("test", "validation") if find_split(parts, name) is None]
    order = np.random.default_rng(seed).permutation(len(train[0]))
    members = hold_out(order, missing, holdout)[split]
    return [train[0][row] for row in members], [train[1][row] for row in members]


def build_tokenizer(texts: Sequence[str], *, max_tokens: int = 20_000, min_count: int = 2) -> PreTrainedTokenizerFast:
    """Build a tokenizer for the lower-cased words and punctuation of the training texts.

    Each text starts with the token <s>, so an empty text has one token. Short texts are filled on the right with
    <pad>, which the attention mask hides.

    Args:
        texts: Training texts.
        max_tokens: Maximum number of tokens, including <pad>, <unk> and <s>.
        min_count: Minimum count of a token. Rarer tokens become <unk>.

    Returns:
        A tokenizer of transformers.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> build_tokenizer(["A b, a b."])("B a?")["input_ids"]
        [2, 4, 3, 1]
    """
    for name, value, least in (("max_tokens", max_tokens, 4), ("min_count", min_count, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
    special = ["<pad>", "<unk>", "<s>"]
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=max_tokens, min_frequency=min_count, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
