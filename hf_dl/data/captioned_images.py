"""Real images with captions: files of COCO and Flickr, tables, and the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .caption_files import CAPTION_NAMES, TEXT_KEYS, clean_captions, find_caption_files, read_caption_file
from .decoded_images import decode_rows, decode_stream, image_columns
from .splits import (
    SPLIT_OF,
    Rows,
    Source,
    find_local,
    find_split,
    given_splits,
    hold_out,
    load_from_hub,
    name_source,
    read_tables,
    streamed_split,
)

FEATURES = datasets.Features({
    "image_id": datasets.Value("string"),
    "image": datasets.Image(),
    "captions": datasets.List(datasets.Value("string")),
    "objects": datasets.List({
        "color": datasets.Value("string"),
        "shape": datasets.Value("string"),
        "size": datasets.Value("string"),
        "box": datasets.List(datasets.Value("int32"), length=4),
    }),
})  # fmt: skip

_ID_NAMES = ("image_id", "img_id", "imgid", "cocoid", "filename", "file_name")
_NUMBERED = re.compile(r"(captions?|sentences?|texts?)_?\d+")
_EXPECTED = (
    "annotations/captions_*.json of COCO, a table such as captions.txt or results.csv, a metadata.jsonl, or parquet "
    "files"
)


def load_captioned(
    split: str,
    source: Source,
    *,
    annotations: str | os.PathLike | None,
    image_column: str | None,
    caption_column: str | None,
    size: int | None,
    num_images: int | None,
    holdout: float,
    corrupt: str,
    seed: int,
    streaming: bool,
) -> Rows:
    """Load real images with captions. `hf_dl.data.captions.load` describes the arguments and the result."""
    given, name = given_splits(source), name_source(source)
    options = {"split": split, "source": name, "size": size, "corrupt": corrupt, "check": _check}
    columns = {"image_column": image_column, "caption_column": caption_column}
    expected = f"a folder with {_EXPECTED}; a Hub id, or 'synthetic'"
    root = None if given is not None else find_local(name, expected)
    if root is not None and root.is_file() and root.suffix != ".parquet" and annotations is None:
        annotations, root = root, root.parent
    if annotations is not None:
        if root is None:
            raise ValueError(f"annotations={str(annotations)!r} needs a folder of images, but got source={name!r}.")
        found = {"train": read_caption_file(Path(annotations).expanduser().resolve(), root, **columns)}
    elif root is not None and root.is_dir() and (files := find_caption_files(root)):
        found = {part: read_caption_file(path, folder, **columns) for part, (path, folder) in files.items()}
    else:
        if given is None:
            given = load_from_hub(name, expected, streaming=streaming) if root is None else _read_tables(root)
        if any(isinstance(rows, datasets.IterableDataset) for rows in given.values()):
            stream = streamed_split(given, split, source)
            stream = stream if num_images is None else stream.take(num_images)
            return decode_stream(_name_stream(stream, name, split, **columns), FEATURES, **options)
        found = {part: _name_columns(rows, name, SPLIT_OF.get(part, part), **columns) for part, rows in given.items()}
    rows, indices = _choose(found, split, name, holdout, seed)
    if "objects" not in rows.features:
        rows = rows.add_column("objects", [[]] * len(rows), feature=FEATURES["objects"])
    data, unreadable = decode_rows(rows, indices[:num_images], FEATURES, streaming=streaming, **options)
    if not streaming:
        count = sum(map(len, data["captions"]))
        data.info.description = f"{len(data)} images with {count} captions. {unreadable}".strip()
    return data


def _check(row: dict) -> str | None:
    return None if row["captions"] else "it has no caption"


def _read_tables(root: Path) -> dict[str, Rows]:
    """Return the splits of parquet files, of a saved dataset, or of images with a metadata file."""
    found = read_tables(root)
    if found is None and any(root.rglob("metadata.*")):
        try:
            found = dict(datasets.load_dataset("imagefolder", data_dir=str(root)))
        except Exception as error:  # errors of pyarrow, json and `datasets` have no base class
            reason = str(error.__cause__ or error).rstrip(".")
            raise ValueError(f"The metadata of source={str(root)!r} cannot be read. Repair it. ({reason})") from error
    if found is None:
        raise ValueError(f"source={str(root)!r} has no captions. Expected {_EXPECTED}. Or set annotations to a file.")
    return found


def _choose(
    found: Mapping[str, datasets.Dataset], split: str, source: str, holdout: float, seed: int
) -> tuple[datasets.Dataset, list[int]]:
    """Return the rows of a split and their order. Missing splits are held out from the training images."""
    rows = find_split(found, split)
    missing = [name for name in ("validation", "test") if find_split(found, name) is None]
    if rows is not None and (split != "train" or not missing):
        return rows, list(range(len(rows)))
    rows = find_split(found, "train")
    if rows is None:
        wanted = " or ".join(dict.fromkeys([split, "train"]))
        raise ValueError(f"{source!r} has no {wanted} split. Its splits: {', '.join(found)}.")
    ids = rows["image_id"][:]
    names = list(dict.fromkeys(ids))  # rows of the same image stay in the same split
    order = np.random.default_rng([seed, 20_150_501]).permutation(len(names))
    place = {names[i]: n for n, i in enumerate(hold_out(order, missing, holdout)[split])}
    if not place:
        raise ValueError(f"split={split!r} of {source!r} would be empty. The source has {len(names)} images.")
    return rows, sorted((i for i, name in enumerate(ids) if name in place), key=lambda i: place[ids[i]])


# ---------------------------------------------------------------------------------------------------------------------
# Columns of tables


@dataclass(frozen=True)
class _Columns:
    """The columns of a table: images, captions, and the names of the images if they have any."""

    image: str
    captions: tuple[str, ...]
    image_id: str | None
    objects: bool  # the table was written from a dataset with `FEATURES`

    def name_texts(self, row: dict, index: int, part: str) -> dict[str, Any]:
        image_id = f"{part}-{index}" if self.image_id is None else str(row[self.image_id])
        return {"image_id": image_id, "captions": clean_captions([row[name] for name in self.captions])}


def _find_columns(
    features: datasets.Features, source: str, image_column: str | None, caption_column: str | None
) -> _Columns:
    image = image_columns(features, source, image_column)[0]
    if caption_column is not None and caption_column not in features:
        raise ValueError(
            f"caption_column={caption_column!r} is not a column of {source!r}. Its columns: {', '.join(features)}."
        )
    usual = [name for name in CAPTION_NAMES if name in features]
    numbered = sorted((name for name in features if _NUMBERED.fullmatch(name)), key=lambda name: (len(name), name))
    captions = [caption_column] if caption_column is not None else usual[:1] or numbered
    if not captions:
        raise ValueError(f"{source!r} has the columns {', '.join(features)}. Set caption_column to one of them.")
    for name in captions:
        if not _holds_text(features[name]):
            raise ValueError(
                f"caption_column={name!r} of {source!r} has the type {features[name]}. Expected text or lists of text."
            )
    names = [name for name in _ID_NAMES if isinstance(features.get(name), datasets.Value)]
    return _Columns(image, tuple(captions), next(iter(names), None), features.get("objects") == FEATURES["objects"])


def _holds_text(kind: Any) -> bool:
    """Return whether a column has texts, records of a text, or lists of them."""
    if isinstance(kind, datasets.Value):
        return kind.dtype in ("string", "large_string")
    if isinstance(kind, dict):
        return any(_holds_text(kind[key]) for key in TEXT_KEYS if key in kind)
    return isinstance(kind, (datasets.List, datasets.LargeList)) and _holds_text(kind.feature)


def _name_columns(
    rows: datasets.Dataset, source: str, part: str, *, image_column: str | None, caption_column: str | None
) -> datasets.Dataset:
    """Return a dataset with an undecoded `image`, `image_id`, `captions`, and `objects` if there are any."""
    columns = _find_columns(rows.features, source, image_column, caption_column)
    rows = rows.with_format(None)
    texts = rows.select_columns([name for name in rows.features if name in (*columns.captions, columns.image_id)])
    named = [columns.name_texts(row, index, part) for index, row in enumerate(texts)]
    rows = rows.select_columns([columns.image, *(["objects"] if columns.objects else [])])
    rows = rows if columns.image == "image" else rows.rename_column(columns.image, "image")
    for name in ("image_id", "captions"):
        rows = rows.add_column(name, [row[name] for row in named], feature=FEATURES[name])
    return rows.cast_column("image", datasets.Image(decode=False))


def _name_stream(
    stream: datasets.IterableDataset, source: str, part: str, *, image_column: str | None, caption_column: str | None
) -> datasets.IterableDataset:
    """Do the same for a stream, while iterating. The column `objects` is always there."""
    if stream.features is None:
        raise ValueError(f"source={source!r} has no features. Give its columns with `cast` of datasets.")
    columns = _find_columns(stream.features, source, image_column, caption_column)

    def name_row(row: dict, index: int) -> dict[str, Any]:
        objects = row["objects"] if columns.objects else []
        return {"image": row[columns.image], "objects": objects, **columns.name_texts(row, index, part)}

    stream = stream.cast_column(columns.image, datasets.Image(decode=False))
    return stream.map(name_row, with_indices=True, remove_columns=list(stream.features))
