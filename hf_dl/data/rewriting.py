"""Texts to rewrite after reading them: dates in a standard format, and words in reverse order of their letters."""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterator

import datasets

SPLITS = {"train": 8000, "validation": 500, "test": 500}  # default numbers of texts
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LONGEST = 8  # letters of a word to reverse
_FIRST, _LAST = datetime.date(1900, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()


def _date(rng: random.Random) -> tuple[str, str]:
    day = datetime.date.fromordinal(rng.randint(_FIRST, _LAST))
    month = _MONTHS[day.month - 1]
    written = rng.choice(
        (
            f"{month} {day.day}, {day.year}",
            f"{day.day} {month} {day.year}",
            f"{month[:3]} {day.day} {day.year}",
            f"{day.month}/{day.day}/{day.year}",
            f"{day.year}.{day.month}.{day.day}",
        )
    )
    return written, day.isoformat()


def _word(rng: random.Random) -> tuple[str, str]:
    word = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(3, _LONGEST)))
    return word, word[::-1]


TASKS = {"dates": _date, "reversal": _word}
"""The tasks by name: functions that draw a text and its answer."""


def load(task: str, split: str = "train", *, num_rows: int | None = None, seed: int = 0) -> datasets.Dataset:
    """Generate texts and their answers.

    Args:
        task: "dates", such as "March 3, 2021" to "2021-03-03", or "reversal", such as "abc" to "cba".
        split: "train", "validation" or "test". A text of the training split may occur in another split by chance.
        num_rows: Number of texts. Defaults to the count in `SPLITS`.
        seed: Seed of the texts.

    Returns:
        A dataset with the columns `text` and `answer`.

    Raises:
        ValueError: If an argument is invalid.

    Example:
        >>> load("reversal", "test", num_rows=2).column_names
        ['text', 'answer']
    """
    for name, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown. Choose one of: {', '.join(known)}.")
    count = SPLITS[split] if num_rows is None else num_rows
    if count < 1:
        raise ValueError(f"num_rows={count} must be at least 1.")
    rows = list(_draw(task, split, count, seed))
    return datasets.Dataset.from_list(rows, split=datasets.NamedSplit(split))


def _draw(task: str, split: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    rng = random.Random(f"hf_dl.rewriting {task} {split} {seed}")
    for _ in range(count):
        text, answer = TASKS[task](rng)
        yield {"text": text, "answer": answer}
