"""Decode the images of a source once into the cache, or while iterating, and report those that cannot be read."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

from ..models.image_input import open_image
from .class_folders import real_path
from .generation import counted, row_bar
from .png import encode_png
from .splits import Rows

Check = Callable[[dict], str | None]  # returns what is wrong with a row

CORRUPT = ("refuse", "skip")  # handling of rows that cannot be read

_VERSION = 2  # increase it when pixels or columns change: `datasets` caches by arguments, not by code
_SHARD = 512  # rows that are decoded together
_NAMED = 10  # corrupt files that an error message lists
_ORIENTATION = 0x0112  # the EXIF tag


def image_columns(features: datasets.Features, source: str, image_column: str | None) -> list[str]:
    """Return the columns with images, the one to use first.

    Args:
        features: The columns of the source.
        source: Its name, for messages.
        image_column: The column that the user chose, or None.

    Raises:
        ValueError: If the column is missing, or no column has images.
    """
    if image_column is not None and image_column not in features:
        raise ValueError(
            f"image_column={image_column!r} is not a column of {source!r}. Its columns: {_list(features)}."
        )
    found = [
        name
        for name, kind in features.items()
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)
    ]
    if image_column is not None and image_column not in found:
        raise ValueError(f"image_column={image_column!r} of {source!r} has no images. Expected datasets.Image.")
    if not found:
        raise ValueError(f"{source!r} has no column with images. Its columns: {_list(features)}.")
    return sorted(found, key=lambda name: name != image_column)


def _list(features: datasets.Features) -> str:
    return ", ".join(features)


def decode_image(record: dict | None, size: int | None) -> tuple[dict | None, str | None]:
    """Decode an image file, crop the centered square, and resize it.

    Args:
        record: The undecoded image: its bytes or its path.
        size: Width and height of the result. None keeps the whole image in its own size.

    Returns:
        The image as a value of the feature `datasets.Image`, or the reason why it cannot be read.
    """
    try:
        if record is None or (record["bytes"] is None and record["path"] is None):
            return None, "the image is missing"
        file = io.BytesIO(record["bytes"]) if record["bytes"] is not None else real_path(record["path"])
        image = open_image(file, min_side=None if size is None else 2 * size)
        if size is None and (content := _keep(file)) is not None:
            return {"bytes": content, "path": None}, None
    except (OSError, ValueError) as error:
        text = str(error).rstrip(".")
        return None, text[0].lower() + text[1:]
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return encode_png(np.asarray(image)), None


def _keep(file: io.BytesIO | str | bytes) -> bytes | None:
    """Return the content of an image file that is upright RGB already, such as a usual JPEG file, or else None."""
    with Image.open(file) as image:
        if image.mode != "RGB" or image.has_transparency_data or image.getexif().get(_ORIENTATION, 1) != 1:
            return None
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    with open(os.fsencode(file), "rb") as opened:
        return opened.read()


def decode_rows(
    rows: datasets.Dataset,
    indices: Sequence[int],
    features: datasets.Features,
    *,
    split: str,
    source: str,
    size: int | None,
    corrupt: str,
    streaming: bool = False,
    check: Check | None = None,
) -> tuple[Rows, str]:
    """Decode the images of a dataset.

    Args:
        rows: A dataset with an undecoded column `image`. Columns that `features` lacks only affect the cache.
        indices: Rows to decode, in this order.
        features: Columns of the result.
        split: Name of the result.
        source: Name of the source, for messages.
        size: As in `decode_image`.
        corrupt: "refuse" raises an error that lists the rows that cannot be read. "skip" removes them and warns.
        streaming: Decode while iterating.
        check: A function that returns what else is wrong with a row, or None.

    Returns:
        The dataset, and a sentence about rows that were skipped, or an empty text.

    Raises:
        ValueError: If rows cannot be read, and `corrupt` is "refuse" or no others are left.
    """
    arguments = {
        "shards": [(start, min(start + _SHARD, len(indices))) for start in range(0, len(indices), _SHARD)],
        "rows": rows,
        "indices": tuple(indices),
        "columns": tuple(features),
        "size": size,
        "check": check,
        "version": _VERSION,
    }
    name = datasets.NamedSplit(split)
    if streaming:
        arguments |= {"corrupt": corrupt, "source": source}
        stream = datasets.IterableDataset.from_generator(
            _decode_strictly, features=features, gen_kwargs=arguments, split=name
        )
        return stream, ""
    with row_bar(len(indices), f"Reading {split} images"):
        dataset = datasets.Dataset.from_generator(
            _decode,
            features=datasets.Features({**features, "problem": datasets.Value("string")}),
            gen_kwargs=arguments,
            split=name,
        )
    return settle(dataset, corrupt, source, split)


def decode_stream(
    stream: Iterable[dict],
    features: datasets.Features,
    *,
    split: str,
    source: str,
    size: int | None,
    corrupt: str,
    check: Check | None = None,
) -> datasets.IterableDataset:
    """Decode the images of a stream while iterating. `decode_rows` describes the arguments."""

    def examples() -> Iterator[dict]:
        for index, row in enumerate(stream):
            image, problem = decode_image(row["image"], size)
            problem = _locate(row, index, problem, check)
            if is_fine(problem, corrupt, source):
                yield {**{name: row[name] for name in features}, "image": image}

    return datasets.IterableDataset.from_generator(examples, features=features, split=datasets.NamedSplit(split))


def _locate(row: dict, index: int, problem: str | None, check: Check | None) -> str | None:
    """Return what is wrong with a row and where it is, or None."""
    problem = problem or (None if check is None else check(row))
    return problem and f"{(row['image'] or {}).get('path') or f'row {index}'} ({problem})"


@counted
def _decode(
    shards: list[tuple[int, int]],
    rows: datasets.Dataset,
    indices: tuple[int, ...],
    columns: tuple[str, ...],
    size: int | None,
    check: Check | None,
    version: int,
) -> Iterator[dict]:
    """Yield rows with their image, or with the problem of a corrupt one."""
    with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
        for first, last in shards:
            chunk = rows.select(indices[first:last]).to_list()
            images = pool.map(decode_image, [row["image"] for row in chunk], [size] * (last - first))
            for index, row, (image, problem) in zip(indices[first:last], chunk, images, strict=True):
                problem = _locate(row, index, problem, check)
                kept = {name: row[name] for name in columns}
                yield {**kept, "image": None if problem else image, "problem": problem}


def _decode_strictly(corrupt: str, source: str, **arguments) -> Iterator[dict]:
    """Yield rows with their image; skip corrupt ones or raise an error."""
    for row in _decode(**arguments):
        if is_fine(row.pop("problem"), corrupt, source):
            yield row


def is_fine(problem: str | None, corrupt: str, source: str) -> bool:
    """Return whether a row of a stream has no problem. Warn about a row that is skipped, or raise a ValueError."""
    if problem is not None and corrupt == "refuse":
        raise ValueError(f"An image of {source!r} cannot be read: {problem}. Skip it with corrupt='skip'.")
    if problem is not None:
        warnings.warn(f"An image of {source!r} cannot be read and is skipped: {problem}.", stacklevel=2)
    return problem is None


def settle(dataset: datasets.Dataset, corrupt: str, source: str, split: str) -> tuple[datasets.Dataset, str]:
    """Keep the rows with an image, and list the others, also when the dataset comes from the cache.

    Args:
        dataset: A dataset with the column `problem`: why the row cannot be read, or None.
        corrupt: As in `decode_rows`.
        source: Name of the source, for messages.
        split: Name of the split.

    Returns:
        The dataset without the column, and a sentence about rows that were skipped, or an empty text.

    Raises:
        ValueError: If rows cannot be read, and `corrupt` is "refuse" or no others are left.
    """
    text = ""
    problems = dataset["problem"][:]
    bad = [problem for problem in problems if problem is not None]
    if bad:
        names = "; ".join(bad[:_NAMED]) + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
        count = f"{len(bad)} of {len(problems)} images of {source!r} ({split})"
        if corrupt == "refuse" or len(bad) == len(problems):
            raise ValueError(
                f"{count} cannot be read: {names}. Repair or remove them, or skip them with corrupt='skip'."
            )
        text = f"{count} cannot be read and are skipped: {names}."
        warnings.warn(text, stacklevel=4)  # at the line that called `load`
        dataset = dataset.select([index for index, problem in enumerate(problems) if problem is None])
    return dataset.remove_columns("problem"), text
