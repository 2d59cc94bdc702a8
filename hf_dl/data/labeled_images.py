"""Labeled images from any source: generated, a Hub dataset, or a folder with images, parquet files or idx files.

Examples of Hub ids: `uoft-cs/cifar10`, `uoft-cs/cifar100`, `zalando-datasets/fashion_mnist`, `tanganke/stl10`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np

from . import object_images
from .binary_images import read_binary_folder
from .class_folders import count_classes, read_class_folders
from .decoded_images import CORRUPT, decode_rows, decode_stream, image_columns
from .idx_files import read_idx_folder
from .object_images import SPLITS
from .splits import (
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

_EXPECTED = "a folder of images or parquet files, a Hub id, or 'synthetic'"


def load(
    split: str = "train",
    source: Source = "synthetic",
    *,
    size: int | None = 64,
    num_classes: int = 25,
    num_images: int | None = None,
    seed: int = 0,
    holdout: float = 0.1,
    image_column: str | None = None,
    label_column: str | None = None,
    corrupt: str = "refuse",
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load images with labels.

    The kind of `source` is detected from its content:

    * "synthetic": generated images, see `hf_dl.data.object_images`;
    * a folder with one folder of images per class, or with one folder per split that has such class folders. Outer
      folders, as archives have them, are skipped, and so are empty, hidden and `__MACOSX` folders;
    * a parquet file, a folder of parquet files, or a dataset saved by `save_to_disk`;
    * a folder with the idx files of MNIST or Fashion-MNIST, or the binary files of STL-10 or CIFAR;
    * a `Dataset` that you already have, or a dictionary of splits;
    * anything else is a Hub id.

    Images of any size are cropped to a centered square and resized, unless `size` is None. If the source has no
    validation or test split, `holdout` of the training images of each class are held out for it. The choice depends on
    `seed` only.

    Args:
        split: "train", "validation" or "test". Usual aliases in the source, such as "val" or "dev", are recognized.
        source: "synthetic", a path, a Hub id, or a dataset that you already have. A single `Dataset` without a split
            is the training split. An `IterableDataset` is streamed.
        size: Width and height of the results in pixels. Synthetic images support 32 to 256. None keeps whole images
            in their own size.
        num_classes: Number of classes of synthetic images, 25 or 100.
        num_images: Number of images. Defaults to all, and to the count in `SPLITS` for synthetic images. The class
            frequencies stay the same, and a longer dataset starts with the images of a shorter one.
        seed: Seed of the synthetic images, and of the choice of held-out images.
        holdout: Share of the training images of each class to hold out for a missing split, above 0 and below 0.5.
        image_column: Column of the images. Defaults to the first column with images.
        label_column: Column of the labels. Defaults to "fine_label", "label", "labels" or the first column of class
            labels, in this order.
        corrupt: Handling of images that cannot be decoded. "refuse" raises an error that lists them. "skip" removes
            them and warns with a list.
        streaming: Render or decode while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns `image` (RGB, size x size) and `label` (`ClassLabel` with names). Synthetic images
        also have a `mask` (8-bit, 1 on the object). `dataset.info.description` lists the classes, their numbers of
        images, and the skipped files with the reason.

    Raises:
        FileNotFoundError: If the folder or file does not exist.
        ValueError: If an argument, a column or a label is invalid, or an image cannot be read.

    Example:
        >>> from hf_dl.data import labeled_images
        >>> dataset = labeled_images.load("test", num_images=25, size=32)
        >>> dataset.features["label"].names[1]
        'striped sphere'
    """
    for name, value, known in (("split", split, SPLITS), ("corrupt", corrupt, CORRUPT)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images={num_images} must be at least 1.")
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout={holdout} must be above 0 and below 0.5: the share of images to hold out.")
    if isinstance(source, str) and source == "synthetic":
        size = 64 if size is None else size
        options = {"size": size, "num_classes": num_classes, "num_images": num_images, "seed": seed}
        return object_images.load(split, streaming=streaming, **options)
    if size is not None and size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel.")
    options = {"size": size, "corrupt": corrupt}
    given, name, skipped = given_splits(source), name_source(source), ""
    if given is not None and any(isinstance(rows, datasets.IterableDataset) for rows in given.values()):
        return _stream(split, given, source, image_column, label_column, num_images, options)
    if given is not None:
        found = _labeled(given, name, image_column, label_column)
    elif (root := find_local(name, _EXPECTED)) is not None:
        found, skipped = _read_folder(root, image_column, label_column)
    elif streaming:
        found = load_from_hub(name, _EXPECTED, streaming=True)
        return _stream(split, found, source, image_column, label_column, num_images, options)
    else:
        found = _labeled(load_from_hub(name, _EXPECTED), name, image_column, label_column)
    rows, indices = _choose(found, split, name, holdout, seed, num_images)
    label = rows.features["label"]
    features = datasets.Features(image=datasets.Image(), label=label)
    options |= {"split": split, "source": name}
    dataset, unreadable = decode_rows(rows, indices, features, streaming=streaming, **options)
    if streaming:
        dataset.info.description = skipped
        return dataset
    notes = [count_classes(dataset.with_format("numpy")["label"][:].tolist(), label.names), skipped, unreadable]
    dataset.info.description = " ".join(filter(None, notes))
    return dataset


# ---------------------------------------------------------------------------------------------------------------------
# Finding images and labels


def _read_folder(
    root: Path, image_column: str | None, label_column: str | None
) -> tuple[dict[str, datasets.Dataset], str]:
    """Return the splits of a local source, with undecoded images and labels; and a report of skipped files."""
    if root.is_file() and root.suffix != ".parquet":
        raise ValueError(f"source={str(root)!r} is not a parquet file. Expected a parquet file or a folder.")
    if any(root.glob("annotations/instances_*.json")) or any(root.glob("annotations/captions_*.json")):
        raise ValueError(
            f"source={str(root)!r} is a folder of COCO, whose images have no class. Expected one folder of images per "
            "class, or a table with labels."
        )
    found = read_tables(root)
    if found is not None:
        return _labeled(found, str(root), image_column, label_column), ""
    found = read_idx_folder(root) or read_binary_folder(root)
    return (found, "") if found else read_class_folders(root)


def _columns(
    features: datasets.Features, source: str, image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Return the names of the image column and the label column."""
    pictures = image_columns(features, source, image_column)
    if label_column is not None and label_column not in features:
        raise ValueError(
            f"label_column={label_column!r} is not a column of {source!r}. Its columns: {', '.join(features)}."
        )
    usual = [name for name in ("fine_label", "label", "labels") if name in features]
    usual += [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if label_column is None and not usual:
        raise ValueError(f"{source!r} has the columns {', '.join(features)}. Set label_column to one of them.")
    return pictures[0], label_column or usual[0]


def _labeled(
    found: Mapping[str, datasets.Dataset], source: str, image_column: str | None, label_column: str | None
) -> dict[str, datasets.Dataset]:
    """Reduce each split to an undecoded `image` and a `label` with class names."""
    chosen = {}
    for name, dataset in found.items():
        image, label = _columns(dataset.features, source, image_column, label_column)
        dataset = (
            dataset.with_format(None).select_columns([image, label]).rename_columns({image: "image", label: "label"})
        )
        chosen[name] = dataset.cast_column("image", datasets.Image(decode=False))
    kinds = [dataset.features["label"] for dataset in chosen.values()]
    if not all(isinstance(kind, datasets.ClassLabel) for kind in kinds):
        values = sorted({value for dataset in chosen.values() for value in dataset.unique("label")}, key=str)
        if len(values) > 10_000 or any(not isinstance(value, (str, int)) for value in values):
            raise ValueError(f"A label of {source!r} is {values[0]!r}. Expected names or integers as labels.")
        values = sorted(values) if all(isinstance(value, int) for value in values) else values
        numbers = {value: number for number, value in enumerate(values)}
        names = datasets.ClassLabel(names=[str(value) for value in values])
        for name, dataset in chosen.items():
            labels = [numbers[value] for value in dataset["label"]]
            chosen[name] = dataset.remove_columns("label").add_column("label", labels).cast_column("label", names)
    elif any(kind.names != kinds[0].names for kind in kinds):
        raise ValueError(f"The splits of {source!r} have different classes. Expected the same class names in each.")
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def _choose(
    found: Mapping[str, datasets.Dataset], split: str, source: str, holdout: float, seed: int, num_images: int | None
) -> tuple[datasets.Dataset, tuple[int, ...]]:
    """Return the rows of a split and their order, in which every prefix has the same class frequencies."""
    rows = find_split(found, split)
    missing = [name for name in ("validation", "test") if find_split(found, name) is None]
    if rows is None:
        rows = find_split(found, "train")
    if rows is None:
        wanted = " or ".join(dict.fromkeys([split, "train"]))
        raise ValueError(f"{source!r} has no {wanted} split. Its splits: {', '.join(found)}.")
    labels = rows.with_format("numpy")["label"][:]
    count = rows.features["label"].num_classes
    bad = np.flatnonzero(~((labels >= 0) & (labels < count)))
    if len(bad):
        raise ValueError(f"Row {bad[0]} of {source!r} has the label {labels[bad[0]]}. Expected 0 to {count - 1}.")
    rng = np.random.default_rng([seed, 20_151_210])
    parts: list[np.ndarray] = []
    for label in range(count):
        members = rng.permutation(np.flatnonzero(labels == label))
        if split in missing or split == "train":
            # a class with too few images for all splits goes to the training split only
            members = hold_out(members, missing, holdout)[split]
        parts.append(members)
    chosen = [members for members in parts if len(members)]
    if not chosen:
        raise ValueError(f"split={split!r} of {source!r} would be empty. The source has {len(labels)} images.")
    place = np.concatenate([(np.arange(len(members)) + rng.random()) / len(members) for members in chosen])
    order = np.concatenate(chosen)[np.argsort(place, kind="stable")]
    return rows, tuple(order[:num_images].tolist())


def _stream(
    split: str,
    found: Mapping[str, Rows],
    source: Source,
    image_column: str | None,
    label_column: str | None,
    num_images: int | None,
    options: dict,
) -> datasets.IterableDataset:
    stream, source = streamed_split(found, split, source), name_source(source)
    if stream.features is None:
        raise ValueError(f"source={source!r} has no features. Give its columns with `cast` of datasets.")
    image, label = _columns(stream.features, source, image_column, label_column)
    kind = stream.features[label]
    if not isinstance(kind, datasets.ClassLabel):
        raise ValueError(f"label_column={label!r} of {source!r} has no class names. Use streaming=False.")
    stream = stream.select_columns([image, label])
    for old, new in ((image, "image"), (label, "label")):  # a stream cannot rename a column to its own name
        stream = stream if old == new else stream.rename_column(old, new)
    stream = stream.cast_column("image", datasets.Image(decode=False))
    stream = stream if num_images is None else stream.take(num_images)
    features = datasets.Features(image=datasets.Image(), label=kind)
    return decode_stream(stream, features, split=split, source=source, **options)
