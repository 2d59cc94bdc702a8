"""Images with phrases and masks from a dataset: on the Hub, in parquet files, or already in memory."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from functools import partial

import datasets

from .phrasecut_coverage import FoundRows, hold_out_images
from .phrasecut_features import make_features
from .phrasecut_phrases import count_negatives, draw_false_phrases
from .splits import SPLIT_NAMES, Rows, find_split

_REQUIRED = ("image", "phrase", "mask")
_DEFAULTS = {"kind": None, "seen": True, "subsets": ()}


def load_rows(
    found: Mapping[str, Rows],
    split: str,
    source: str,
    *,
    size: int | None,
    negatives: float,
    max_images: int | None,
    holdout: float,
    seed: int,
    streaming: bool,
    version: int,
) -> Rows:
    """Return a split of a dataset with the columns of `hf_dl.data.phrasecut`.

    Rows without a column `image_id` belong to the same image if their image files are equal. If the validation or test
    split is missing, images of the training split are held out for it, with all their phrases.

    Args:
        found: The splits of the dataset.
        split: "train", "validation" or "test".
        source: Name of the dataset, for messages.
        size: Width and height of images and masks in pixels. Defaults to their own size.
        negatives: Share of negative phrases.
        max_images: Maximum number of images, which are chosen at random.
        holdout: Share of the training images to hold out.
        seed: Seed of the choices.
        streaming: Whether to read while iterating.
        version: Version of the rows; it only changes the name of the cache.

    Raises:
        ValueError: If a split or column is missing, or an argument cannot be used for a stream.
    """
    if split not in SPLIT_NAMES:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLIT_NAMES)}.")
    missing = [name for name in ("validation", "test") if find_split(found, name) is None]
    rows = find_split(found, "train" if split in missing else split)
    if rows is None:
        raise ValueError(f"{source!r} has no {split} split. Its splits: {', '.join(found) or 'none'}.")
    columns = rows.column_names or list(next(iter(rows)))
    absent = [column for column in _REQUIRED if column not in columns]
    if absent:
        raise ValueError(
            f"{source!r} has no column {' and no column '.join(map(repr, absent))}, only {', '.join(columns)}. "
            "Use rename_column."
        )
    if isinstance(rows, datasets.IterableDataset):
        if negatives or max_images is not None or split in missing:
            raise ValueError(
                f"{source!r} is a stream, from which images cannot be chosen or held out. Use streaming=False, or "
                "leave out negatives and max_images and choose a split that exists."
            )
        features = make_features(size)
        return rows.map(partial(_convert, features=features), features=features, remove_columns=columns)
    empty = next((row for row, text in enumerate(rows["phrase"]) if not isinstance(text, str)), None)
    if empty is not None:
        raise ValueError(f"Row {empty} of {source!r} has the phrase {rows[empty]['phrase']!r}. Expected a text.")
    groups = _group_images(rows)
    names = list(groups)
    if not names:
        raise ValueError(f"The {split} split of {source!r} has no rows. Choose another split.")
    if missing and (split == "train" or split in missing):
        names = hold_out_images(names, split, missing, holdout, seed)
    if max_images is not None and max_images < len(names):
        chosen = set(random.Random(f"hf_dl.phrasecut images {seed}").sample(names, max_images))
        names = [name for name in names if name in chosen]
    images = [(name, groups[name]) for name in names]
    options = {"size": size, "negatives": negatives, "seed": seed, "streaming": streaming, "version": version}
    return FoundRows(_make_rows, images, {"rows": rows}).build(split, **options)


def _complete(row: dict) -> dict:
    """Return a row with all columns."""
    known = {name: row.get(name, default) for name, default in _DEFAULTS.items()}
    return {"image_id": str(row["image_id"]) if "image_id" in row else None, **known} | {n: row[n] for n in _REQUIRED}


def _convert(row: dict, features: datasets.Features) -> dict:
    """Return a row of a stream with images that are converted and resized like all others."""
    return features.decode_example(features.encode_example(_complete(row)))


def _group_images(rows: datasets.Dataset) -> dict[str, list[int]]:
    """Return the row numbers of each image, in the order of their first rows."""
    groups: dict[str, list[int]] = {}
    if "image_id" in rows.column_names:
        names = map(str, rows["image_id"])
    else:
        tables = rows.select_columns(["image"]).with_format("arrow").iter(batch_size=100)
        names = (_digest(value) for table in tables for value in table["image"].to_pylist())
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    return groups


def _digest(value: dict) -> str:
    content = value["bytes"] if value["bytes"] is not None else f"{value['path']} {value.get('row')}".encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _make_rows(
    rows: datasets.Dataset, shards: list[list[tuple[str, list[int]]]], negatives: float, seed: int, version: int
) -> Iterator[dict]:
    pool = [(phrase, phrase) for phrase in rows["phrase"]] if negatives else []
    stored = rows.with_format("arrow")  # images are not decoded
    for name, numbers in (image for shard in shards for image in shard):
        group = stored[numbers].to_pylist()
        for row in group:
            yield _complete(row) | {"image_id": name}
        rng = random.Random(f"hf_dl.phrasecut negatives {seed} {name}")
        texts = [row["phrase"] for row in group]
        mask = group[0]["mask"]
        drawing = json.loads(mask.get("drawing") or "{}") | {"empty": True}
        for phrase in draw_false_phrases(count_negatives(len(group), negatives, rng), pool, texts, rng):
            yield {
                "image_id": name,
                "image": group[0]["image"],
                "phrase": phrase,
                "mask": mask | {"drawing": json.dumps(drawing)},
                "kind": "negative",
                "seen": True,
                "subsets": [],
            }
