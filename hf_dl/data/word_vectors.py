"""Word vectors in the text format of GloVe: one word per line, followed by its numbers, separated by spaces.

Pennington, Socher & Manning 2014, "GloVe: Global vectors for word representation". Files of word2vec and fastText also
work. They start with a line of two numbers: the number of words and the width.
"""

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch


def load(path: str | Path, words: Sequence[str], *, width: int) -> dict[str, torch.Tensor]:
    r"""Read the vectors of some words from a file.

    Args:
        path: The file, plain or gzipped (.gz), in UTF-8.
        words: The words to look for. Upper and lower case differ.
        width: Expected number of values of a vector.

    Returns:
        The vectors of the words that the file has, float32 (width,). The first line of a word counts.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not text, a line is invalid, or the vectors have another width.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "vectors.txt")
        ...     _ = path.write_text("good 0.5 1\nbad -0.5 2\n")
        ...     load(path, ["good", "great"], width=2)
        {'good': tensor([0.5000, 1.0000])}
    """
    path, wanted = Path(path), set(words)
    found: dict[str, torch.Tensor] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        word, *values = line.rstrip("\n").rstrip(" ").rsplit(" ", width)  # a word may contain spaces
        if number == 1:
            if len(values) == 1 and word.isdecimal() and values[0].isdecimal() and width > 1:
                continue  # the header of word2vec: the number of words and the width
            if (given := line.rstrip().count(" ")) != width:
                raise ValueError(
                    f"{path.name!r} has {given} numbers per word, but {width} were expected. Use vectors of this "
                    f"width, or set embedding_size to {given}."
                )
        if word in wanted and word not in found or len(values) != width:
            try:
                vector = torch.tensor([float(value) for value in values])
                valid = len(vector) == width and bool(vector.isfinite().all())
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(
                    f"Line {number} of {path.name!r} is {line[:40].strip()!r}. Expected a word and {width} numbers, "
                    "separated by spaces. Correct or remove the line."
                )
            found[word] = vector
    return found


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} does not exist. Expected a text file with a word and its vector per line, as from GloVe."
        )
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="\n") as file:
            yield from file
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"{path.name!r} is not a text file in UTF-8, plain or gzipped ({error}).") from None
