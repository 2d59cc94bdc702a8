"""Find the images of a folder with one folder per class, and list everything that is skipped."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from .splits import SPLIT_OF

SUFFIXES = {
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm",
}  # fmt: skip
EXPECTED = "Expected <class>/<image> or <split>/<class>/<image>, with at least two classes."

_LISTED = 5  # names per reason in a report


@dataclass
class Skipped:
    """Files and folders that are not read, by reason."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: Path) -> None:
        """Note a file or a folder."""
        self.names.setdefault(reason, []).append(shown_path(path.name))

    def describe(self) -> str:
        """Return one sentence, or an empty text if nothing was skipped."""
        parts = []
        for reason, names in sorted(self.names.items()):
            listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
            parts.append(f"{reason}: {len(names)} ({listed})")
        return f"Skipped {'; '.join(parts)}." if parts else ""


def shown_path(path: str | os.PathLike) -> str:
    r"""Return a path as text. Bytes of a name that is not UTF-8 become escapes such as `\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def real_path(shown: str) -> str | bytes:
    """Return the path of a file from the result of `shown_path`."""
    if os.path.lexists(shown):
        return shown
    return re.sub(rb"\\x([89a-f][0-9a-f])", lambda match: bytes([int(match[1], 16)]), shown.encode())


def find_images(folder: Path, skipped: Skipped | None = None) -> list[Path]:
    """List the image files in a folder and its subfolders, sorted by path.

    Args:
        folder: The folder. Hidden files and folders, and the folder `__MACOSX` of an archive, are ignored.
        skipped: Receives other files, and folders that cannot be opened.
    """
    skipped, found = skipped or Skipped(), []

    def note_closed(error: OSError) -> None:
        skipped.add("folders that cannot be opened", Path(error.filename))

    for place, folders, files in os.walk(folder, onerror=note_closed):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in sorted(files):
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES and not _is_hidden(name):
                found.append(path)
            elif not _is_hidden(name):
                skipped.add("files that are not images", path)
    return sorted(found)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _has_images(folder: Path) -> bool:
    """Return whether there is an image directly in a folder."""
    return any(path.suffix.lower() in SUFFIXES and not _is_hidden(path.name) for path in folder.iterdir())


def _splits(folder: Path) -> dict[str, Path]:
    """Return the folders that are named like splits and have subfolders."""
    return {path.name: path for path in _subfolders(folder) if path.name.lower() in SPLIT_OF and _subfolders(path)}


def unwrap(folder: Path) -> Path:
    """Return the folder in which the classes or splits are, below the outer folders of an archive.

    Args:
        folder: A folder. As long as all its images are in one subfolder, the result is that subfolder.
    """
    while not _has_images(folder) and not _splits(folder):
        inner = [path for path in _subfolders(folder) if find_images(path)]
        if len(inner) != 1:
            break
        folder = inner[0]
    return folder


def is_flat(source: str | os.PathLike) -> bool:
    """Return whether `source` is a folder of images without class folders."""
    root = Path(source).expanduser()
    return root.is_dir() and _has_images(unwrap(root))


def read_class_folders(source: Path) -> tuple[dict[str, datasets.Dataset], str]:
    """Read `class/image` or `split/class/image` below a folder, without decoding images.

    Args:
        source: The folder, or the outer folder of an unpacked archive.

    Returns:
        The splits by their names in lower case, and a sentence about skipped files and folders, or an empty text. The
        columns are `image`, `label` and `stamp`, which changes with the file.

    Raises:
        ValueError: If there are fewer than two classes, or two folders for the same split.
    """
    root, skipped = unwrap(source), Skipped()
    parts = _splits(root) or {"train": root}
    _check_splits(parts, source)
    if root not in parts.values():
        for path in sorted(set(_subfolders(root)) - set(parts.values())):
            skipped.add("folders beside the splits", path)
        inner = {name: unwrap(folder) for name, folder in parts.items()}
        if all(inner[name] != parts[name] and not _has_images(inner[name]) for name in parts):
            parts = inner  # each split has an outer folder of its own
    members: dict[str, dict[str, list[Path]]] = {}
    for part, folder in parts.items():
        members[part] = {shown_path(path.name): find_images(path, skipped) for path in _subfolders(folder)}
        for path in sorted(folder.iterdir()):
            if not path.is_dir() and not _is_hidden(path.name):
                is_image = path.suffix.lower() in SUFFIXES
                skipped.add("images outside of class folders" if is_image else "files that are not images", path)
    names = sorted({name for classes in members.values() for name, files in classes.items() if files})
    for name in sorted({name for classes in members.values() for name in classes} - set(names)):
        skipped.add("folders without images", Path(name))
    if len(names) < 2:
        problem = "has no images in class folders" if not names else f"has one class, {names[0]!r}"
        more = "" if not skipped.names else f" {skipped.describe()}"
        raise ValueError(f"source={str(source)!r} {problem} and no parquet files. {EXPECTED}{more}")
    found = {
        part.lower(): _make_dataset({name: files for name, files in classes.items() if files}, names)
        for part, classes in members.items()
        if any(classes.values())
    }
    return found, skipped.describe()


def _check_splits(parts: dict[str, Path], source: Path) -> None:
    for split, count in Counter(SPLIT_OF[name.lower()] for name in parts).items():
        if count > 1:
            names = " and ".join(repr(name) for name in parts if SPLIT_OF[name.lower()] == split)
            raise ValueError(
                f"source={str(source)!r} has several folders of the {split} split: {names}. Keep or join one."
            )


def _make_dataset(classes: dict[str, list[Path]], names: list[str]) -> datasets.Dataset:
    files = [(path, names.index(name)) for name, paths in classes.items() for path in paths]
    columns = {
        "image": [shown_path(path) for path, _ in files],
        "label": [label for _, label in files],
        "stamp": [file_stamp(path) for path, _ in files],  # reload changed files
    }
    features = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=names), stamp=datasets.Value("string")
    )
    return datasets.Dataset.from_dict(columns, features)


def file_stamp(path: Path) -> str:
    """Return a text that changes when the content of a file changes."""
    try:
        stat = path.stat()
    except OSError:  # a link to a missing file, which is reported when it is opened
        return "missing"
    return f"{stat.st_size} {stat.st_mtime_ns}"


def count_classes(labels: list[int], names: list[str]) -> str:
    """Describe the number of images and classes in one sentence.

    Args:
        labels: Label of each image.
        names: Names of the classes.

    Example:
        >>> count_classes([0, 1, 1], ["ant", "bee"])
        '3 images of 2 classes: ant 1, bee 2.'
    """
    counts = Counter(labels)
    if len(names) <= 20:
        detail = ", ".join(f"{name} {counts[label]}" for label, name in enumerate(names))
    else:
        numbers = [counts[label] for label in range(len(names))]
        detail = f"{min(numbers)} to {max(numbers)} images per class"
    return f"{len(labels)} images of {len(names)} classes: {detail}."
