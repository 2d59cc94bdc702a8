"""The names of splits in folders, in files and on the Hub, such as "val" or "dev" for the validation split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}


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
