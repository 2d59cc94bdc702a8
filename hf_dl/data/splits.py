"""The splits of a source: read them, find them by names such as "val" or "dev", and hold out missing ones."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
from huggingface_hub.errors import HFValidationError

T = TypeVar("T")
Rows = datasets.Dataset | datasets.IterableDataset
Source = str | os.PathLike | Rows | Mapping[str, Rows]

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
MAX_FIELD = 2**31 - 1  # characters in a field of a CSV file; the default of Python is 131072
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}
# Endings of files. A Hub id may end in other ones, such as ".0".
FILE_ENDINGS = frozenset(
    ".arrow .csv .gz .idx .jpeg .jpg .json .jsonl .npy .npz .parquet .png .raw .tar .text .tgz .tokens .tsv .txt "
    ".zip".split()
)


def find_split(found: Mapping[str, T], split: str) -> T | None:
    """Return the split of a source under any of its names, or None if the source does not have it.

    Args:
        found: The splits of the source, by the names that it uses.
        split: A key of `SPLIT_NAMES`.

    Example:
        >>> find_split({"train": 800, "dev": 100}, "validation")
        100
    """
    return next((found[name] for name in SPLIT_NAMES[split] if name in found), None)


def given_splits(source: Source) -> dict[str, Rows] | None:
    """Return the splits of a dataset that the user already has, or None if `source` is a path or a name.

    Args:
        source: A `Dataset`, an `IterableDataset`, or a dictionary of them. A single dataset without a split is the
            training split. A slice such as "train[:80%]" counts as its split.

    Example:
        >>> given_splits(datasets.Dataset.from_dict({"text": ["a"]}))["train"].num_rows
        1
        >>> given_splits("a/folder") is None
        True
    """
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        name = re.match(r"\w*", str(source.split or ""))[0]
        return {name or "train": source}
    if isinstance(source, Mapping):
        return dict(source)
    return None


def name_source(source: Source) -> str:
    """Return a source as text for messages: its path or name, or the kind of the dataset."""
    return str(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__


def find_local(source: str, expected: str) -> Path | None:
    """Return the absolute path of a local source, or None if the source is a Hub id.

    Args:
        source: Path or Hub id.
        expected: Description of valid sources, for the message.

    Raises:
        FileNotFoundError: If the source does not exist and is written as a path. A Hub id has at most one slash. It
            does not begin with "." or have the ending of a file.

    Example:
        >>> find_local("tanganke/stl10", "a folder") is None
        True
    """
    root = Path(source).expanduser()
    if root.exists():
        return root.resolve()
    is_path = root.is_absolute() or source.startswith((".", "~")) or len(root.parts) > 2
    if is_path or root.suffix.lower() in FILE_ENDINGS:
        raise FileNotFoundError(f"source={source!r} does not exist. Expected {expected}.")
    return None


def load_from_hub(
    source: str, expected: str, *, config: str | None = None, streaming: bool = False
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load the splits of a dataset on the Hub.

    Args:
        source: The id. It may also be a misspelled path, because `find_local` returns None for names such as "photos".
        expected: Description of valid sources, for the message.
        config: Configuration of the dataset, if it has several.
        streaming: Fetch while iterating.

    Raises:
        FileNotFoundError: If the Hub has no such dataset, does not permit access to it, or cannot be reached.
    """
    names = [source] if config is None else [source, config]
    options = {"streaming": True} if streaming else {}
    try:
        return datasets.load_dataset(*names, **options)
    except (ConnectionError, HFValidationError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise FileNotFoundError(
            f"source={source!r} is not a folder or file, and was not found on the Hub. Expected {expected}. ({reason})"
        ) from error


def read_tables(root: Path, *, streaming: bool = False) -> dict[str, Rows] | None:
    """Return the splits of a parquet file, a folder of parquet files, or a dataset saved by `save_to_disk`.

    Args:
        root: File or folder.
        streaming: Read parquet files while iterating.

    Returns:
        The splits by their names, or None for other files and folders.

    Raises:
        ValueError: If a file is damaged.
    """
    try:
        if root.is_file() and root.suffix == ".parquet":
            return dict(datasets.load_dataset("parquet", data_files=str(root), streaming=streaming))
        if any((root / f"{kind}.json").is_file() for kind in ("dataset_info", "dataset_dict")):
            return given_splits(datasets.load_from_disk(root))
        if any(root.rglob("*.parquet")):
            return dict(datasets.load_dataset(str(root), streaming=streaming))
    except Exception as error:  # errors of pyarrow, json and `datasets` have no base class
        reason = error.__cause__ or error
        reason = str(reason).rstrip(".") or type(reason).__name__
        raise ValueError(f"source={str(root)!r} is a damaged dataset. Write it again. ({reason})") from error
    return None


def hold_out(members: np.ndarray, missing: Sequence[str], holdout: float) -> dict[str, np.ndarray]:
    """Divide shuffled training rows into a training split and missing splits.

    Args:
        members: Row numbers in random order.
        missing: Names of the splits to hold out.
        holdout: Share of the rows for each of them. At least one row, but none if there are too few rows for all.

    Returns:
        The row numbers per split, "train" included.

    Example:
        >>> {name: len(rows) for name, rows in hold_out(np.arange(10), ["test"], 0.2).items()}
        {'test': 2, 'train': 8}
    """
    size = max(1, round(holdout * len(members))) if len(members) > len(missing) else 0
    parts = {}
    for name in missing:
        parts[name], members = members[:size], members[size:]
    return parts | {"train": members}


def streamed_split(found: Mapping[str, Rows], split: str, source: Source) -> Rows:
    """Return a split to stream. Nothing can be held out of a stream.

    Args:
        found: The splits of the source.
        split: A key of `SPLIT_NAMES`.
        source: The source. The training split of a path or a Hub id is only streamed if the other splits exist,
            because it might contain held-out rows otherwise.

    Raises:
        ValueError: If the split, or a split that would be held out, is missing.
    """
    needed = list(SPLIT_NAMES) if split == "train" and given_splits(source) is None else [split]
    missing = [name for name in needed if find_split(found, name) is None]
    if missing:
        raise ValueError(
            f"{name_source(source)!r} has no {missing[0]} split to stream, only {', '.join(found)}. Use "
            "streaming=False to hold it out from the training rows."
        )
    return find_split(found, split)
