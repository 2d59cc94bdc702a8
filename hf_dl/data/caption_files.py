"""Read the captions of image files: COCO captions (JSON), or the tables and token files of Flickr8k and Flickr30k."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from .class_folders import SUFFIXES, file_stamp, find_images, shown_path
from .splits import MAX_FIELD, SPLIT_OF

IMAGE_NAMES = ("image", "image_name", "filename", "file_name", "file", "image_path", "path", "image_id")
CAPTION_NAMES = ("captions", "caption", "sentences", "sentence", "comment", "texts", "text", "raw")
TEXT_KEYS = ("raw", "caption", "text")  # of a record with one caption
EXPECTED = "COCO captions (JSON), or a table with a column of image names and a column of captions"

_TOKEN = re.compile(r"([^\t]+)#\d+\t(.*)")  # "1000268201.jpg#0<tab>A child ..."
_LOST_DELIMITER = re.compile(r"\d+\s+(.+)")  # one line of the results.csv of Flickr30k: "name.jpg| 4   A dog runs ..."


def clean_captions(value: Any) -> list[str]:
    """Return the captions of a text, of a record with a key of `TEXT_KEYS`, or of a list; without empty ones.

    Example:
        >>> clean_captions(["A dog  runs.", {"raw": "Two cats. "}, " ", None])
        ['A dog runs.', 'Two cats.']
    """
    if isinstance(value, str):
        return [" ".join(value.split())] if value.strip() else []
    if isinstance(value, dict):
        return clean_captions(next((value[key] for key in TEXT_KEYS if key in value), None))
    return [] if value is None else [text for item in value for text in clean_captions(item)]


def find_caption_files(root: Path) -> dict[str, tuple[Path, Path]]:
    """Find the caption files of a folder.

    Args:
        root: A folder of COCO with `annotations/captions_<split>.json`, or a folder with one table or token file of
            captions, such as captions.txt or results.csv.

    Returns:
        From the name of a split to the caption file and the folder of its images. Empty if no caption file is found.

    Raises:
        ValueError: If there are several tables.
    """
    found = {}
    for path in sorted([*root.glob("annotations/captions_*.json"), *root.glob("captions_*.json")]):
        name = path.stem.removeprefix("captions_")  # such as train2017
        split = re.match("[a-z]*", name)[0]
        folders = [folder for folder in (root / name, root / "images" / name, root / split) if folder.is_dir()]
        found[split if split in SPLIT_OF else "train"] = path, next(iter(folders), root)
    if found:
        return found
    tables = [path for path in sorted(root.iterdir()) if path.is_file() and _is_table(path)]
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise ValueError(f"source={str(root)!r} has several caption files: {names}. Set annotations to one of them.")
    return {"train": (tables[0], root)} if tables else {}


def _is_table(path: Path) -> bool:
    if path.name == "metadata.csv":  # `datasets` reads it
        return False
    return path.suffix in (".csv", ".tsv", ".token") or path.name == "captions.txt" or path.name.endswith(".token.txt")


def read_caption_file(
    path: Path, folder: Path, *, image_column: str | None = None, caption_column: str | None = None
) -> datasets.Dataset:
    """Read the captions of a file, without decoding images.

    Args:
        path: The caption file.
        folder: Folder of the images. If an image is not directly in it, a subfolder may have it.
        image_column: Column of a table with the names of the images. Defaults to the first one of `IMAGE_NAMES`.
        caption_column: Column of a table with the captions. Defaults to the first one of `CAPTION_NAMES`.

    Returns:
        A dataset with one row per image: `image_id`, the undecoded `image`, `captions`, and `stamp`. The stamp changes
        with the image file.

    Raises:
        FileNotFoundError: If the caption file or the folder does not exist.
        ValueError: If the file has another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"annotations={str(path)!r} does not exist. Expected {EXPECTED}.")
    if not folder.is_dir():
        raise FileNotFoundError(f"source={str(folder)!r} is not a folder. Expected the folder of the images.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}. Expected {EXPECTED}.") from None
    if path.suffix == ".json":
        rows = _read_coco(path, text)
    else:
        rows = [(name, name, texts) for name, texts in _read_table(path, text, image_column, caption_column).items()]
    if not rows:
        raise ValueError(f"{path} has no images. Expected {EXPECTED}.")
    files = _locate(folder, [name for _, name, _ in rows])
    columns = {
        "image_id": [image_id for image_id, _, _ in rows],
        "image": [{"bytes": None, "path": shown_path(file)} for file in files],
        "captions": [clean_captions(texts) for _, _, texts in rows],
        "stamp": [file_stamp(file) for file in files],
    }
    string = datasets.Value("string")
    features = datasets.Features(
        image_id=string, image=datasets.Image(decode=False), captions=datasets.List(string), stamp=string
    )
    return datasets.Dataset.from_dict(columns, features)


def _locate(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the path of each image, which may be in a subfolder. Missing images are reported when they are opened."""
    direct = [folder / name for name in names]
    if all(path.is_file() for path in direct):
        return direct
    inner: dict[str, Path] = {}
    for path in find_images(folder):
        inner.setdefault(path.name, path)
    return [path if path.is_file() else inner.get(path.name, path) for path in direct]


def _read_coco(path: Path, text: str) -> list[tuple[str, str, list[str]]]:
    """Return the id, the file name and the captions of each image."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Expected COCO captions.") from None
    missing = {"images", "annotations"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(sorted(missing))}. Expected COCO captions.")
    captions: dict[int, list[str]] = {}
    for number, record in enumerate(content["annotations"]):
        missing = {"image_id", "caption"} - set(record if isinstance(record, dict) else ())
        if missing:
            raise ValueError(
                f"Annotation {number} of {path} has no {' and no '.join(sorted(missing))}. Expected COCO captions, "
                "such as captions_val2017.json."
            )
        if not isinstance(record["caption"], str):
            raise ValueError(
                f"Annotation {number} of {path} has the caption {record['caption']!r:.80}. Expected text."
            )
        captions.setdefault(record["image_id"], []).append(record["caption"])
    rows = []
    for number, picture in enumerate(content["images"]):
        missing = {"id", "file_name"} - set(picture if isinstance(picture, dict) else ())
        if missing:
            missing = " and no ".join(sorted(missing))
            raise ValueError(f"Image {number} of {path} has no {missing}. Expected COCO captions.")
        rows.append((str(picture["id"]), picture["file_name"], captions.get(picture["id"], [])))
    return rows


def _read_table(path: Path, text: str, image_column: str | None, caption_column: str | None) -> dict[str, list[str]]:
    """Return the captions of each image name."""
    found: dict[str, list[str]] = {}
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    if _TOKEN.fullmatch(first):
        for number, line in enumerate(lines, start=1):
            if line.strip():
                match = _TOKEN.fullmatch(line)
                if match is None:
                    raise ValueError(f"Line {number} of {path} is {line!r:.80}. Expected name.jpg#0, a tab and text.")
                found.setdefault(match[1].strip(), []).append(match[2])
        return found
    delimiter = max("\t|,;", key=first.count)
    # a table with bars or tabs has quotation marks in its captions, and does not quote them
    quoting = csv.QUOTE_MINIMAL if delimiter in ",;" else csv.QUOTE_NONE
    quoted = quoting == csv.QUOTE_MINIMAL
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, skipinitialspace=quoted)
    header: list[str] | None = None
    for fields in reader:
        row = [field.strip() for field in fields]
        if not any(row):
            continue
        if header is None:
            header = _read_header(path, row)
            image = _find_column(path, header, image_column, "image_column", IMAGE_NAMES)
            caption = _find_column(path, header, caption_column, "caption_column", CAPTION_NAMES)
            if Path(row[0]).suffix.lower() not in SUFFIXES:
                continue
        if len(row) == len(header) - 1 > 1 and (match := _LOST_DELIMITER.fullmatch(row[-1])):
            row = [*row[:-1], "", match[1]]
        if len(row) > len(header) and caption == len(header) - 1:  # a caption that contains the delimiter
            row = [*row[:caption], (f"{delimiter} " if quoted else delimiter).join(fields[caption:])]
        if len(row) != len(header):
            raise ValueError(
                f"Line {reader.line_num} of {path} has {len(row)} fields. Expected {len(header)}: {', '.join(header)}."
            )
        found.setdefault(row[image], []).append(row[caption])
    return found


def _read_header(path: Path, row: list[str]) -> list[str]:
    """Return the names of the columns. A table without a header has image names first, and captions last."""
    if len(row) < 2:
        raise ValueError(f"{path} starts with {row[0]!r:.80}. Expected {EXPECTED}.")
    if Path(row[0]).suffix.lower() in SUFFIXES:
        return ["image", "caption"]
    return row


def _find_column(path: Path, header: list[str], column: str | None, option: str, names: Sequence[str]) -> int:
    known = [name.lower() for name in header]
    if column is not None and column.lower() not in known:
        raise ValueError(f"{option}={column!r} is not a column of {path}. Its columns: {', '.join(header)}.")
    for name in names if column is None else (column.lower(),):
        if name in known:
            return known.index(name)
    raise ValueError(f"{path} has the columns {', '.join(header)}. Set {option} to one of them.")
