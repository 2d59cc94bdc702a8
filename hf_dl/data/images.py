"""Labeled images: single-object scenes, classics by Hub id, and any folder of images or parquet files.

* `load` gives a `datasets.Dataset` of square images and labels, decoded and resized once into the cache of `datasets`.
* `LabeledImages` keeps it as one memory-mapped uint8 file, so that no batch waits for a decoder, and processes that
  train side by side share the pages.
* `augment` crops and flips a whole batch.

The embedded data are scenes of one textured object each, rendered by `hf_dl.data.raycast` on a ground of another
texture. A class is what the object is, not where it stands, how it is lit or turned, how large it is, or what the
ground looks like:

* 25 classes: 5 shapes x 5 materials, "striped cone". The fifth shape, a disc, is a flat cylinder.
* 100 classes: these x 4 colors, "red striped cone"; class c of the 100 belongs to class c // 4 of the 25.

By Hub id, for example: `uoft-cs/cifar10`, `uoft-cs/cifar100`, `zalando-datasets/fashion_mnist`, `tanganke/stl10`. The
four idx files in which MNIST and Fashion-MNIST are published are read from a local folder.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import random
import re
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

from .materials import TEXTURES
from .raycast import Scene, SceneObject, Surface, chunk_size, render
from .scenes import _LINEAR, COLORS, _draw_ground, _draw_surface, _pick, _png, _uniform

SPLITS = {"train": 10_000, "validation": 1000, "test": 2000}  # images of the synthetic ones
SHAPES = ("sphere", "cube", "cylinder", "cone", "disc")
MATERIALS = ("checkered", "striped", "dotted", "brick", "marble")
CLASS_COLORS = ("red", "green", "blue", "yellow")
CLASSES = {  # by their number
    25: tuple(f"{material} {shape}" for shape in SHAPES for material in MATERIALS),
    100: tuple(f"{c} {material} {shape}" for shape in SHAPES for material in MATERIALS for c in CLASS_COLORS),
}
SUPERCLASSES = {  # of CIFAR-100, as it is published: its 20 coarse labels
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}

FASHION = (  # the classes of Fashion-MNIST, as its Hub copy writes them; idx files have no names
    "T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

_VERSION = 1  # bump with any change of the pixels or columns: `datasets` caches by arguments, not by this code
_GROUNDS = tuple(name for name in TEXTURES if name not in MATERIALS)
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_IDX_NAME = re.compile(r"(train|t10k|test)-(images|labels)[.-]idx[13]-ubyte(\.gz)?")
_IDX_MAGIC = {"images": b"\0\0\x08\x03", "labels": b"\0\0\x08\x01"}  # unsigned bytes, in 3 dimensions or 1
_FASHION_LABELS = (0x2ED6E46A, 0x242BC73F)  # CRC-32 of the labels of its splits
_SHARD = 512  # rows that are decoded together
_NAMED = 10  # corrupt files that a message names


def load(
    split: str = "train",
    source: str | os.PathLike = "synthetic",
    *,
    size: int = 64,
    num_classes: int = 25,
    num_images: int | None = None,
    seed: int = 0,
    holdout: float = 0.1,
    image_column: str | None = None,
    label_column: str | None = None,
    corrupt: str = "refuse",
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Square images with labels.

    `source` is recognized by what it holds: "synthetic"; a folder with a folder of images for each class, or one for
    each split with such folders inside; a folder of parquet files or one such file; a dataset saved by `save_to_disk`;
    a folder with idx files; else a Hub id. Images of any size are cut to a centered square and resized.

    A split that the source lacks is cut from its training images, `holdout` of each class, the same ones each time.

    Args:
        split: "train", "validation" or "test". Sources that call them train, val, dev, ... are understood.
        source: "synthetic", a path or a Hub id.
        size: Width and height of the results in pixels; 32 to 256 for synthetic ones.
        num_classes: Classes of the synthetic images, 25 or 100.
        num_images: How many images; all of them where None, or `SPLITS` of the synthetic ones. Classes keep their
            shares, and a longer dataset starts with the images of a shorter one.
        seed: Other seeds give other synthetic images, or hold out others.
        holdout: Part of the training images of each class that a missing split takes, above 0 and below 0.5.
        image_column: Where the images are; the first column of images where None.
        label_column: Where the labels are; where None "fine_label", "label" or "labels", or else the first column of
            class labels.
        corrupt: What becomes of images that cannot be decoded: "refuse" them in an error that names them, or "skip"
            them with a warning that does.
        streaming: Render or decode while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns `image` (RGB, size x size) and `label` (`ClassLabel` with the names); synthetic
        images also have `mask` (8-bit, 1 where the object is).

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: An argument, a column or a label is not what was expected, or an image cannot be read.

    Example:
        >>> from hf_dl.data import images
        >>> dataset = images.load("test", num_images=25, size=32)
        >>> dataset.features["label"].names[1]
        'striped sphere'
    """
    for name, value, known in (("split", split, SPLITS), ("corrupt", corrupt, ("refuse", "skip"))):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images={num_images} is too small; ask for at least 1.")
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout={holdout} is out of range; give a part of the training images, between 0 and 0.5.")
    if str(source) == "synthetic":
        return _load_synthetic(split, size, num_classes, num_images, seed, streaming)
    if size < 1:
        raise ValueError(f"size={size} is too small; give a number of pixels.")
    options = {"size": size, "corrupt": corrupt}
    root = Path(source).expanduser()
    if root.exists():
        found = _read_folder(root.resolve(), image_column, label_column)
    elif root.is_absolute() or str(source).startswith((".", "~")) or len(root.parts) > 2:
        raise FileNotFoundError(
            f"source={str(source)!r} does not exist; expected a folder of images or parquet files."
        )
    elif streaming:
        return _stream_hub(split, str(source), image_column, label_column, num_images, options)
    else:
        found = _labeled(datasets.load_dataset(str(source)), str(source), image_column, label_column)
    rows, indices = _choose(found, split, str(source), holdout, seed, num_images)
    arguments = {
        "shards": [(start, min(start + _SHARD, len(indices))) for start in range(0, len(indices), _SHARD)],
        "rows": rows,
        "indices": indices,
        "size": size,
        "version": _VERSION,
    }
    label = rows.features["label"]
    if streaming:
        features = datasets.Features(image=datasets.Image(), label=label)
        arguments |= {"corrupt": corrupt, "source": str(source)}
        return datasets.IterableDataset.from_generator(
            _decode_strictly, features=features, gen_kwargs=arguments, split=datasets.NamedSplit(split)
        )
    text = datasets.Value("string")
    features = datasets.Features(image=datasets.Image(), label=label, problem=text)
    dataset = datasets.Dataset.from_generator(
        _decode, features=features, gen_kwargs=arguments, split=datasets.NamedSplit(split)
    )
    return _settle(dataset, corrupt, str(source))


def superclasses(names: Sequence[str]) -> list[list[int]]:
    """Group classes that are alike, where that is known: for hierarchical output layers.

    Args:
        names: The classes, in the order of their labels: those of CIFAR-100, in 20 groups of 5, or of the synthetic
            images, in a group for each material and shape (of 100) or each shape (of 25).

    Returns:
        Lists of labels, each label once.

    Raises:
        ValueError: If the classes are others.

    Example:
        >>> superclasses(CLASSES[25])[0]
        [0, 1, 2, 3, 4]
    """
    number = {name: label for label, name in enumerate(names)}
    known = [members.split() for members in SUPERCLASSES.values()]
    if number.keys() == {name for members in known for name in members}:
        return [[number[name] for name in members] for members in known]
    for count, group in ((100, 4), (25, 5)):
        if tuple(names) == CLASSES[count]:
            return [list(range(first, first + group)) for first in range(0, count, group)]
    raise ValueError(
        f"The superclasses of these {len(names)} classes ({', '.join(list(names)[:3])}, ...) are not known; expected "
        "CIFAR-100 or the synthetic images."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic images


class _Disc(SceneObject):
    """A flat cylinder: the ray caster stretches its unit shapes to any extent."""

    @property
    def extent(self) -> tuple[float, float]:
        return self.radius, 0.3 * self.radius


def _label(index: int, split: str, num_classes: int, seed: int) -> int:
    """The class of an image; each class comes once in every `num_classes` images."""
    block, place = divmod(index, num_classes)
    rng = random.Random(f"hf_dl.images order {num_classes} {seed} {split} {block}")
    return sorted(range(num_classes), key=lambda _: rng.random())[place]


def sample_scene(index: int, split: str = "train", *, num_classes: int = 25, seed: int = 0) -> tuple[Scene, int]:
    """Draw the description of one synthetic image: a pure function of its arguments.

    Args:
        index: Number of the image inside its split.
        split: Name of the split; different splits draw from different streams.
        num_classes: 25 or 100.
        seed: Seed of the whole dataset.

    Returns:
        The scene, with one object, and its class.
    """
    label = _label(index, split, num_classes, seed)
    rng = random.Random(f"hf_dl.images {num_classes} {seed} {split} {index}")
    *color, material, shape = CLASSES[num_classes][label].split()
    color = color[0] if color else _pick(rng, tuple(COLORS))
    surface = _draw_surface(rng, material, _LINEAR[color])
    radius = _uniform(rng, 0.65, 0.95)
    kind, shape = (_Disc, "cylinder") if shape == "disc" else (SceneObject, shape)
    draft = kind(shape, color, "medium", radius, _uniform(rng, 0, 360), (0, 0, 0), surface)
    position = (_uniform(rng, -0.4, 0.4), _uniform(rng, -0.4, 0.4), draft.extent[1])
    ground = _draw_ground(rng, "textured")
    if ground.material in MATERIALS:  # what a class is named after is only seen on the object
        ground = Surface(_pick(rng, _GROUNDS), ground.color, ground.accent, ground.scale, ground.offset)
    scene = Scene(
        objects=(kind(shape, color, "medium", radius, draft.rotation, position, surface),),
        elevation=_uniform(rng, 22, 40),
        distance=_uniform(rng, 5.5, 6.5),
        target=(0.0, 0.0, _uniform(rng, 0.35, 0.6)),
        light_azimuth=_uniform(rng, 190, 260),
        light_elevation=_uniform(rng, 44, 60),
        ground=ground,
        ground_rotation=_uniform(rng, 0, 360),
    )
    return scene, label


def _load_synthetic(split: str, size: int, num_classes: int, num_images: int | None, seed: int, streaming: bool):
    if num_classes not in CLASSES:
        raise ValueError(
            f"num_classes={num_classes} is unknown; synthetic images have {' or '.join(map(str, CLASSES))}."
        )
    if not 32 <= size <= 256:
        raise ValueError(f"size={size} is out of range; synthetic images are 32 to 256 pixels wide and high.")
    count = SPLITS[split] if num_images is None else num_images
    arguments = {
        "shards": [(start, min(start + _SHARD, count)) for start in range(0, count, _SHARD)],
        "split": split,
        "size": size,
        "num_classes": num_classes,
        "seed": seed,
        "version": _VERSION,
    }
    features = datasets.Features(
        image=datasets.Image(), mask=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES[num_classes]))
    )
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    return kind.from_generator(_render, features=features, gen_kwargs=arguments, split=datasets.NamedSplit(split))


def _render(
    shards: list[tuple[int, int]], split: str, size: int, num_classes: int, seed: int, version: int
) -> Iterator[dict]:
    step = chunk_size(size)
    for first, last in shards:
        for start in range(first, last, step):
            drawn = [
                sample_scene(i, split, num_classes=num_classes, seed=seed)
                for i in range(start, min(start + step, last))
            ]
            pictures, masks = render([scene for scene, _ in drawn], size)
            for (_, label), picture, mask in zip(drawn, pictures.numpy(), masks.numpy(), strict=True):
                yield {"image": _png(picture), "mask": _png(mask), "label": label}


# ---------------------------------------------------------------------------------------------------------------------
# Finding images and labels


def _read_folder(root: Path, image_column: str | None, label_column: str | None) -> dict[str, datasets.Dataset]:
    """The splits of a local source: undecoded images and labels."""
    if root.is_file():
        if root.suffix != ".parquet":
            raise ValueError(f"source={str(root)!r} is a file; expected a parquet file or a folder.")
        found = datasets.load_dataset("parquet", data_files=str(root))
    elif any((root / f"{kind}.json").is_file() for kind in ("dataset_info", "dataset_dict")):
        found = datasets.load_from_disk(root)
        found = found if isinstance(found, datasets.DatasetDict) else {str(found.split or "train"): found}
    elif any(root.rglob("*.parquet")):
        found = datasets.load_dataset(str(root))
    else:
        return _read_idx_folder(root) or _read_image_folder(root)
    return _labeled(found, str(root), image_column, label_column)


def _read_image_folder(root: Path) -> dict[str, datasets.Dataset]:
    """The splits of `root/class/file` or `root/split/class/file`."""
    aliases = {alias: name for name, names in _SPLIT_NAMES.items() for alias in names}
    folders = _subfolders(root)
    parts = {folder.name: folder for folder in folders if folder.name.lower() in aliases and _subfolders(folder)}
    parts = parts or {"train": root}
    names = sorted({folder.name for part in parts.values() for folder in _subfolders(part)})
    found = {}
    for part, folder in parts.items():
        files = [
            (path, names.index(each.name))
            for each in _subfolders(folder)
            for path in sorted(each.rglob("*"))
            if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
        ]
        if files:
            stats = [path.stat() for path, _ in files]
            columns = {
                "image": [str(path) for path, _ in files],
                "label": [label for _, label in files],
                "stamp": [f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats],  # a changed file is read anew
            }
            features = datasets.Features(
                image=datasets.Image(decode=False),
                label=datasets.ClassLabel(names=names),
                stamp=datasets.Value("string"),
            )
            found[part.lower()] = datasets.Dataset.from_dict(columns, features)
    if not found:
        raise ValueError(
            f"source={str(root)!r} holds no images in folders of classes, and no parquet files; expected "
            "<class>/<image> or <split>/<class>/<image>."
        )
    return found


def _read_idx_folder(root: Path) -> dict[str, datasets.Dataset]:
    """The splits of the idx files in a folder, or in its `raw` or `FashionMNIST/raw`; nothing where there are none."""
    files: dict[str, dict[str, Path]] = {}
    for folder in (root, root / "raw", root / "FashionMNIST" / "raw"):
        for path in sorted(folder.iterdir()) if folder.is_dir() and not files else ():
            if match := _IDX_NAME.fullmatch(path.name):
                files.setdefault(match[1], {}).setdefault(match[2], path)
    found = {}
    for split, parts in files.items():
        for kind in _IDX_MAGIC:
            if kind not in parts:
                there = next(iter(parts.values()))
                raise FileNotFoundError(
                    f"source={str(root)!r} has {there.name}, but not the {kind} that belong to it."
                )
        images, labels = _read_idx(parts["images"], "images"), _read_idx(parts["labels"], "labels")
        if len(images) != len(labels):
            raise ValueError(
                f"{parts['images'].name} has {len(images)} images, but {parts['labels'].name} {len(labels)} labels; "
                "expected as many."
            )
        if labels.max(initial=0) > 9:
            row = int(np.argmax(labels > 9))
            raise ValueError(f"{parts['labels'].name}: label {row} is {labels[row]}; expected 0 to 9.")
        names = FASHION if zlib.crc32(labels) in _FASHION_LABELS else [str(label) for label in range(10)]
        # With a header of one line, the raw pixels are a file that Pillow reads (PGM).
        header = b"P5 %d %d 255\n" % images.shape[:0:-1]
        columns = {
            "image": [{"bytes": header + image.tobytes(), "path": None} for image in images],
            "label": labels.tolist(),
        }
        features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=list(names)))
        found[split.replace("t10k", "test")] = datasets.Dataset.from_dict(columns, features)
    return found


def _read_idx(path: Path, kind: str) -> np.ndarray:
    """The bytes of an idx file: images (count, height, width) or labels (count,)."""
    magic = _IDX_MAGIC[kind]
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(4)
            if head != magic:
                raise ValueError(
                    f"{path.name} begins with {head.hex() or 'nothing'}, expected {magic.hex()}: it holds no {kind}."
                )
            sizes = file.read(4 * magic[3])
            if len(sizes) < 4 * magic[3]:
                raise EOFError("Its header is not whole")
            shape = tuple(int.from_bytes(sizes[start : start + 4], "big") for start in range(0, len(sizes), 4))
            count = math.prod(shape)
            if not 0 < count < 2**32:
                raise ValueError(f"{path.name} says that its shape is {shape}, which cannot be; download it again.")
            content = file.read(count + 1)  # no more than it says, whatever is packed in it
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path.name} is cut short or damaged ({error}); download it again.") from error
    if len(content) != count:
        more = "more" if len(content) > count else f"{len(content)}"
        raise ValueError(f"{path.name} has {more} bytes of {kind}, expected {count}; download it again.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _columns(
    features: datasets.Features, source: str, image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """The names of the columns of images and labels."""
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in features:
            raise ValueError(f"{option}={column!r} is not in {source!r}, whose columns are {', '.join(features)}.")
    pictures = [
        name
        for name, kind in features.items()
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)
    ]
    usual = [name for name in ("fine_label", "label", "labels") if name in features]
    usual += [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if image_column is not None and image_column not in pictures:
        raise ValueError(f"image_column={image_column!r} of {source!r} holds no images; expected datasets.Image.")
    if not pictures:
        raise ValueError(f"{source!r} has no column of images; its columns are {', '.join(features)}.")
    if label_column is None and not usual:
        raise ValueError(f"{source!r} has the columns {', '.join(features)}; say which one by label_column.")
    return image_column or pictures[0], label_column or usual[0]


def _labeled(
    found: Mapping[str, datasets.Dataset], source: str, image_column: str | None, label_column: str | None
) -> dict[str, datasets.Dataset]:
    """Every split with just an undecoded `image` and a `label` with names."""
    chosen = {}
    for name, dataset in found.items():
        image, label = _columns(dataset.features, source, image_column, label_column)
        dataset = dataset.select_columns([image, label]).rename_columns({image: "image", label: "label"})
        chosen[name] = dataset.cast_column("image", datasets.Image(decode=False))
    kinds = [dataset.features["label"] for dataset in chosen.values()]
    if not all(isinstance(kind, datasets.ClassLabel) for kind in kinds):
        values = sorted({value for dataset in chosen.values() for value in dataset.unique("label")}, key=str)
        if len(values) > 10_000 or any(not isinstance(value, (str, int)) for value in values):
            raise ValueError(f"The labels of {source!r} are such as {values[0]!r}; expected names or whole numbers.")
        values = sorted(values) if all(isinstance(value, int) for value in values) else values
        numbers = {value: number for number, value in enumerate(values)}
        names = datasets.ClassLabel(names=[str(value) for value in values])
        for name, dataset in chosen.items():
            labels = [numbers[value] for value in dataset["label"]]
            chosen[name] = dataset.remove_columns("label").add_column("label", labels).cast_column("label", names)
    elif any(kind.names != kinds[0].names for kind in kinds):
        raise ValueError(f"The splits of {source!r} have different classes; expected the same names in each.")
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def _named(found: Mapping[str, datasets.Dataset], split: str):
    return next((found[name] for name in _SPLIT_NAMES[split] if name in found), None)


def _choose(
    found: Mapping[str, datasets.Dataset], split: str, source: str, holdout: float, seed: int, num_images: int | None
) -> tuple[datasets.Dataset, tuple[int, ...]]:
    """The rows of a split, in an order of which each beginning has the classes in their shares."""
    rows = _named(found, split)
    missing = [name for name in ("validation", "test") if _named(found, name) is None]
    if rows is None:
        rows = _named(found, "train")
    if rows is None:
        raise ValueError(f"split={split!r} is not in {source!r}, nor is train; it has {', '.join(found)}.")
    labels = rows.with_format("numpy")["label"][:]
    count = rows.features["label"].num_classes
    bad = np.flatnonzero(~((labels >= 0) & (labels < count)))
    if len(bad):
        raise ValueError(f"Row {bad[0]} of {source!r} has the label {labels[bad[0]]}; expected 0 to {count - 1}.")
    rng = np.random.default_rng([seed, 20_151_210])
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for label in range(count):
        members = rng.permutation(np.flatnonzero(labels == label))
        if split in missing or split == "train":
            # a class of too few images for all splits is only trained on
            size = max(1, round(holdout * len(members))) if len(members) > len(missing) else 0
            for name in missing:
                parts[name].append(members[:size])
                members = members[size:]
        parts[split if split not in missing else "train"].append(members)
    chosen = [members for members in parts[split] if len(members)]
    if not chosen:
        raise ValueError(f"split={split!r} of {source!r} would be empty; it has {len(labels)} images in all.")
    place = np.concatenate([(np.arange(len(members)) + rng.random()) / len(members) for members in chosen])
    order = np.concatenate(chosen)[np.argsort(place, kind="stable")]
    return rows, tuple(order[:num_images].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def _square(record: dict | None, size: int) -> tuple[dict | None, str | None]:
    """An image as a PNG of size x size, or why it cannot be read."""
    try:
        if record is None or (record["bytes"] is None and record["path"] is None):
            return None, "there is no image"
        with Image.open(io.BytesIO(record["bytes"]) if record["bytes"] is not None else record["path"]) as image:
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG much larger than that is decoded at a fraction
            image = ImageOps.exif_transpose(image)
            if "transparency" in image.info:
                image = image.convert("RGBA")
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    # the decoders of damaged files raise whatever they stumble over: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        reason = f"{error}".split(" <_io")[0].split(" '/")[0]
        return None, reason or type(error).__name__
    return _png(np.asarray(image)), None


def _decode(
    shards: list[tuple[int, int]], rows: datasets.Dataset, indices: tuple[int, ...], size: int, version: int
) -> Iterator[dict]:
    """Rows with their image, or with what is wrong with it."""
    with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
        for first, last in shards:
            chunk = rows.select(indices[first:last])[:]
            squares = pool.map(_square, chunk["image"], [size] * (last - first))
            for index, record, label, (image, problem) in zip(
                indices[first:last], chunk["image"], chunk["label"], squares, strict=True
            ):
                if problem is not None:
                    problem = f"{(record or {}).get('path') or f'row {index}'} ({problem})"
                yield {"image": image, "label": label, "problem": problem}


def _decode_strictly(corrupt: str, source: str, **arguments) -> Iterator[dict]:
    for row in _decode(**arguments):
        problem = row.pop("problem")
        if problem is None:
            yield row
        elif corrupt == "skip":
            warnings.warn(f"An image of {source!r} is left out, since it cannot be read: {problem}.", stacklevel=2)
        else:
            raise ValueError(f"An image of {source!r} cannot be read: {problem}; corrupt='skip' leaves it out.")


def _settle(dataset: datasets.Dataset, corrupt: str, source: str) -> datasets.Dataset:
    """The rows with an image; the others are named, in this process and in each that reads the cache."""
    problems = dataset["problem"][:]
    bad = [problem for problem in problems if problem is not None]
    if bad:
        names = "; ".join(bad[:_NAMED]) + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
        count = f"{len(bad)} of {len(problems)} images of {source!r} ({dataset.split})"
        if corrupt == "refuse" or len(bad) == len(problems):
            raise ValueError(
                f"{count} cannot be read: {names}. Repair or remove them; corrupt='skip' leaves them out."
            )
        warnings.warn(f"{count} are left out, since they cannot be read: {names}.", stacklevel=3)
        dataset = dataset.select([index for index, problem in enumerate(problems) if problem is None])
    return dataset.remove_columns("problem")


def _stream_hub(
    split: str, source: str, image_column: str | None, label_column: str | None, num_images: int | None, options: dict
) -> datasets.IterableDataset:
    found = datasets.load_dataset(source, streaming=True)
    needed = SPLITS if split == "train" else [split]  # or images of other splits might be among those of train
    missing = [name for name in needed if _named(found, name) is None]
    if missing:
        raise ValueError(
            f"{source!r} has no {missing[0]} split to stream, only {', '.join(found)}; with streaming=False it is cut "
            "from the training images."
        )
    stream = _named(found, split)
    image, label = _columns(stream.features, source, image_column, label_column)
    kind = stream.features[label]
    if not isinstance(kind, datasets.ClassLabel):
        raise ValueError(f"label_column={label!r} of {source!r} has no names of classes; use streaming=False.")
    stream = stream.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    stream = stream if num_images is None else stream.take(num_images)

    def rows() -> Iterator[dict]:
        for index, row in enumerate(stream):
            picture, problem = _square(row[image], options["size"])
            if problem is None:
                yield {"image": picture, "label": row[label]}
                continue
            problem = f"{(row[image] or {}).get('path') or f'row {index}'} ({problem})"
            if options["corrupt"] == "refuse":
                raise ValueError(f"An image of {source!r} cannot be read: {problem}; corrupt='skip' leaves it out.")
            warnings.warn(f"An image of {source!r} is left out, since it cannot be read: {problem}.", stacklevel=2)

    features = datasets.Features(image=datasets.Image(), label=kind)
    return datasets.IterableDataset.from_generator(rows, features=features, split=datasets.NamedSplit(split))


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class LabeledImages(torch.utils.data.Dataset):
    """The images of a dataset as one memory-mapped uint8 array, and their labels.

    The array is written once, beside the cache of `datasets`; every later process opens it at once and decodes
    nothing. Rows are read from it by the operating system as they are needed, so it may be larger than the memory.

    Attributes:
        pixels: uint8 (rows, channels, height, width), read-only.
        labels: int64 (rows,).
        names: The names of the classes.

    Args:
        dataset: What `load` returned.
        channels: 3, or 1 for the luma: of gray images that is what they are.

    Raises:
        ValueError: If a column is missing, images differ in size, or there are other channels.

    Example:
        ```python
        >>> data = LabeledImages(load("test", num_images=50))  # doctest: +SKIP
        >>> data.__getitems__([0, 2])["image"].shape  # doctest: +SKIP
        torch.Size([2, 3, 64, 64])

        ```
    """

    def __init__(self, dataset: datasets.Dataset, *, channels: int = 3):
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} is unknown; choose 1 (gray) or 3 (RGB).")
        missing = {"image", "label"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"The dataset has the columns {dataset.column_names}; {sorted(missing)[0]!r} is missing: load it with "
                "hf_dl.data.images."
            )
        self.labels = torch.as_tensor(dataset.with_format("numpy")["label"][:]).long()
        self.names = list(dataset.features["label"].names)
        # the fingerprint names the rows: it follows from the arguments of the generator and from what came after it
        name = dataset._fingerprint + ("_gray" if channels == 1 else "")
        path = Path(datasets.config.HF_DATASETS_CACHE) / "hf_dl_images" / f"{name}.npy"
        if not path.is_file():
            _write_pixels(dataset, path, channels=channels)
        self.pixels = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Several rows at once: image uint8 (rows, channels, height, width) and labels int64 (rows,)."""
        index = np.asarray(indices)
        return {"image": torch.from_numpy(np.asarray(self.pixels[index])), "labels": self.labels[index]}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One row: image (channels, height, width) and labels ()."""
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def channel_statistics(self, max_images: int = 5000) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, in [0, 1], over the first images."""
        pixels = torch.from_numpy(np.array(self.pixels[:max_images]))
        channels = [pixels[:, channel].double() / 255 for channel in range(pixels.shape[1])]
        # a channel without contrast would be divided by 0
        return [round(c.mean().item(), 4) for c in channels], [max(round(c.std().item(), 4), 0.01) for c in channels]


def _write_pixels(dataset: datasets.Dataset, path: Path, *, channels: int = 3) -> None:
    """Write the images as a .npy file, aside and then renamed, so that a half-written one is never read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = dataset[0]["image"].size
    shape, mode = (len(dataset), channels, size[1], size[0]), "RGB" if channels == 3 else "L"
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, delete=False) as file:
        try:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for start in range(0, len(dataset), _SHARD):
                for image in dataset[start : start + _SHARD]["image"]:
                    if image.size != size:
                        raise ValueError(
                            f"The images have several sizes ({size}, {image.size}); load them with one size."
                        )
                    pixels = np.atleast_3d(np.asarray(image.convert(mode))).transpose(2, 0, 1)
                    file.write(np.ascontiguousarray(pixels).data)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def augment(
    images: torch.Tensor, *, padding: int = 4, flip: bool = True, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Shift and mirror each image of a batch at random (He et al. 2015, section 4.2), in one gather.

    Cropping a random window out of an image with a border of zeros is a random shift. On normalized images the border
    has the mean color.

    Args:
        images: Images of any dtype, (batch, channels, height, width).
        padding: Width of the border: shifts are up to so many pixels in each direction.
        flip: Whether every second image is mirrored, by the toss of a coin.
        generator: Source of the shifts and tosses, on the images' device.

    Returns:
        The images, changed, in the shape they had.

    Raises:
        ValueError: If the padding is negative or not smaller than the images.

    Example:
        >>> augment(torch.ones(2, 3, 8, 8), padding=0, flip=True).sum().item()
        384.0
    """
    batch, channels, height, width = images.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding={padding} is out of range; give 0 to less than the {height}x{width} of the images.")

    def draw(high: int) -> torch.Tensor:
        return torch.randint(high, (batch, 1), generator=generator, device=images.device)

    shifts = [draw(2 * padding + 1) for _ in range(2)]
    rows, columns = (
        torch.arange(side, device=images.device) + shift for side, shift in zip((height, width), shifts, strict=True)
    )
    if flip:
        columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    if padding:
        images = torch.nn.functional.pad(images, (padding,) * 4)
    flat = rows[:, :, None] * images.shape[3] + columns[:, None, :]
    index = flat.view(batch, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view(batch, channels, height, width)
