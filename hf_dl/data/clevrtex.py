"""Real images with instance masks: CLEVRTex as it is published, and any dataset with an image and a mask.

CLEVRTex (Karazija et al. 2021, https://arxiv.org/abs/2111.10265) is read from the folder that its archives unpack to::

    clevrtex_full/0/CLEVRTEX_full_000000.png         320x240, RGBA: the alpha is dropped
                    CLEVRTEX_full_000000_flat.png    palette image whose pixel VALUES are the object indices
                    CLEVRTEX_full_000000.json        the objects
    clevrtex_full/1/CLEVRTEX_full_001000.png         folder = index // 1000

and alike for its variants camo, pbg, vbg, grassbg and outd. Splits go by index, as in the authors' loader: the first
10 % are test, the next 10 % validation, the rest train; outd, made for testing, is not split: all of it is test.
Converting a mask with `.convert("L")` or "RGB" replaces the indices by colors, so that is never done.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw

VARIANTS = ("full", "outd", "camo", "pbg", "vbg", "grassbg")
SPLITS = ("train", "validation", "test")

_VERSION = 1  # bump with any change of the columns: `datasets` caches by arguments, not by this code
_FOLDER = 1000  # scenes in a folder of CLEVRTex
_KNOWN = ("shape", "material", "color", "size", "rotation", "position")

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "objects": datasets.List(
            {
                "shape": datasets.Value("string"),
                "material": datasets.Value("string"),
                "color": datasets.Value("string"),
                "size": datasets.Value("string"),
                "rotation": datasets.Value("float64"),
                "position": datasets.List(datasets.Value("float64")),
                "box": datasets.List(datasets.Value("int32"), length=4),
                "visible_pixels": datasets.Value("int32"),
            }
        ),
    }
)
MASKED_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "objects": datasets.List(
            {
                "label": datasets.Value("string"),
                "box": datasets.List(datasets.Value("int32"), length=4),
                "visible_pixels": datasets.Value("int32"),
            }
        ),
    }
)


def load(
    split: str = "train",
    source: str | os.PathLike = "clevrtex_full",
    *,
    size: int = 128,
    crop: int | None = 192,
    image_column: str = "image",
    mask_column: str = "mask",
    annotations: str | os.PathLike | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Images with instance masks, cut to a centered square and resized.

    `source` is recognized by what it holds: a folder of CLEVRTex; a folder of images to which `annotations` points, in
    the format of COCO; a dataset saved by `save_to_disk`; else whatever `datasets.load_dataset` reads, a Hub id or a
    folder of images with a `metadata.jsonl` that has a `mask_file_name`.

    Args:
        split: "train", "validation" or "test". CLEVRTex is split by index; COCO is not split, and any name will do.
        source: Path or Hub id.
        size: Width and height of the results in pixels.
        crop: Side of the centered square in the original's pixels; None for the shorter side.
        image_column: Where the images are, for datasets by Hub id or path.
        mask_column: Where the masks are: images whose pixel values are object indices, of mode L, P, I or 1.
        annotations: A COCO file with polygons or uncompressed run lengths.
        streaming: Read while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns `image` (RGB), `mask` (8-bit, 0 = background, i = objects[i - 1]) and `objects`.
        Objects that the crop removes are left out and the others renumbered without gaps, in their old order. Every
        object has `box` (x0, y0, x1, y1 in pixels, half-open) and `visible_pixels`, and what its source knows: shape,
        material, size, rotation and 3-D position in CLEVRTex, a label in COCO.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: Columns, masks or arguments are not what was expected.

    Example:
        >>> from hf_dl.data import clevrtex
        >>> dataset = clevrtex.load("validation", "/data/clevrtex_full")  # doctest: +SKIP
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    if size < 1 or (crop is not None and crop < 1):
        raise ValueError(f"size={size} and crop={crop} are pixels; give positive numbers.")
    root, options = Path(source), {"crop": crop, "size": size}
    local = root.is_absolute() or str(source).startswith((".", "~")) or len(root.parts) > 2
    if local and not root.expanduser().is_dir():
        raise FileNotFoundError(
            f"source={str(source)!r} is not a folder; expected CLEVRTex or images with masks there."
        )
    if root.expanduser().is_dir():
        root = root.expanduser().resolve()
    if annotations is not None:
        return _load_coco(split, root, Path(annotations).expanduser(), options, streaming)
    variant = _variant(root)
    if variant is None:
        return _load_columns(
            split, root if root.is_dir() else str(source), (image_column, mask_column), options, streaming
        )
    first, last = _split_range(_count(root, variant), split, variant)
    arguments = {"shards": _shards(first, last), "root": str(root), "variant": variant, **options}
    return _build(_clevrtex, FEATURES, arguments, split, streaming)


def _shards(first: int, last: int) -> list[tuple[int, int]]:
    if first >= last:
        raise ValueError("There are too few images for this split: it would be empty.")
    return [(start, min(start + _FOLDER, last)) for start in range(first, last, _FOLDER)]


def _build(generator, features: datasets.Features, arguments: dict, split: str, streaming: bool):
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    arguments = arguments | {"version": _VERSION}
    return kind.from_generator(generator, features=features, gen_kwargs=arguments, split=datasets.NamedSplit(split))


# ---------------------------------------------------------------------------------------------------------------------
# Crops and masks


def _square(image: Image.Image, crop: int | None, size: int, resample: Image.Resampling) -> Image.Image:
    side = min(image.size) if crop is None else crop
    if side > min(image.size):
        raise ValueError(f"crop={crop} is larger than an image of {image.width}x{image.height}; use a smaller crop.")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), resample)


def _indices(mask: Image.Image, name: str) -> Image.Image:
    """The mask with its values as they are stored, in a mode that resizing leaves alone."""
    if mask.mode not in ("P", "L", "1", "I", "I;16"):
        raise ValueError(
            f"{name} is of mode {mask.mode}; expected a mask of mode P or L whose pixel values are object "
            "indices, with 0 for the background. Colors do not tell which object is which."
        )
    return Image.fromarray(np.asarray(mask).astype(np.int32))


def _relabel(mask: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Masks with the labels 1..n, and the old label of each."""
    kept = [int(label) for label in np.unique(mask) if label != 0]
    if len(kept) > 255:
        raise ValueError(f"A mask has {len(kept)} objects; an 8-bit mask holds 255.")
    return np.searchsorted([0, *kept], mask).astype(np.uint8), kept


def _example(image: Image.Image, mask: Image.Image, name: str, crop: int | None, size: int) -> tuple[dict, list[int]]:
    """Image, mask and objects with box and visible pixels, and the index that each object had in the source's mask."""
    mask = _indices(mask, name)
    if image.size != mask.size:
        raise ValueError(f"{name} is {mask.width}x{mask.height} but its image is {image.width}x{image.height}.")
    picture = _square(image.convert("RGB"), crop, size, Image.Resampling.BILINEAR)
    labels, kept = _relabel(np.asarray(_square(mask, crop, size, Image.Resampling.NEAREST)))
    objects = []
    for label in range(1, len(kept) + 1):
        rows, columns = np.nonzero(labels == label)
        box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        objects.append({"box": box, "visible_pixels": len(rows)})
    return {"image": picture, "mask": Image.fromarray(labels), "objects": objects}, kept


def _open(path: Path, expected: str) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected {expected}.")
    image = Image.open(path)
    image.load()
    return image


# ---------------------------------------------------------------------------------------------------------------------
# CLEVRTex


def _variant(root: Path) -> str | None:
    """Which variant of CLEVRTex a folder holds, by its first scene; None if it holds something else."""
    return next((v for v in VARIANTS if (root / "0" / f"CLEVRTEX_{v}_000000.png").is_file()), None)


def _count(root: Path, variant: str) -> int:
    """Number of scenes, from the names of the folders and the files of the last one."""
    folders = [int(entry.name) for entry in os.scandir(root) if entry.is_dir() and entry.name.isdecimal()]
    missing = sorted(set(range(max(folders))) - set(folders))
    if missing:
        raise FileNotFoundError(
            f"{root} has the folders 0 to {max(folders)} but not {missing[0]}; unpack all parts of CLEVRTex into it."
        )
    scene = re.compile(rf"CLEVRTEX_{variant}_\d{{6}}\.png")
    return _FOLDER * max(folders) + sum(
        scene.fullmatch(entry.name) is not None for entry in os.scandir(root / str(max(folders)))
    )


def _split_range(count: int, split: str, variant: str) -> tuple[int, int]:
    if variant == "outd":
        if split != "test":
            raise ValueError(f"split={split!r} is not in CLEVRTex outd, which is made for testing; use split='test'.")
        return 0, count
    return {"test": (0, count // 10), "validation": (count // 10, count // 5), "train": (count // 5, count)}[split]


def _clevrtex(
    shards: list[tuple[int, int]], root: str, variant: str, crop: int | None, size: int, version: int
) -> Iterator[dict]:
    for first, last in shards:
        for index in range(first, last):
            stem = Path(root, str(index // _FOLDER), f"CLEVRTEX_{variant}_{index:06d}")
            image = _open(stem.with_suffix(".png"), f"scene {index} of CLEVRTex")
            mask_path = stem.with_name(f"{stem.name}_flat.png")
            mask = _open(mask_path, f"the mask of scene {index} of CLEVRTex")
            example, kept = _example(image, mask, str(mask_path), crop, size)
            known = _clevrtex_objects(stem.with_suffix(".json"), variant)
            for record, label in zip(example["objects"], kept, strict=True):
                record |= known.get(label, dict.fromkeys(_KNOWN))
            yield example


def _clevrtex_objects(path: Path, variant: str) -> dict[int, dict]:
    """What is known of each object, by its index in the mask; nothing without the file."""
    if not path.is_file():
        return {}
    return {
        record.get("index", number): {
            "shape": record.get("shape"),
            "material": record.get("material"),
            "color": record.get("color") if variant == "vbg" else None,  # elsewhere it is drawn but not used
            "size": record.get("size"),
            "rotation": record.get("rotation"),
            "position": record.get("3d_coords"),
        }
        for number, record in enumerate(json.loads(path.read_text())["objects"], start=1)
    }


# ---------------------------------------------------------------------------------------------------------------------
# COCO


def _load_coco(split: str, root: Path, annotations: Path, options: dict, streaming: bool):
    if not annotations.is_file():
        raise FileNotFoundError(
            f"annotations={str(annotations)!r} is missing; expected a JSON file in the format of COCO."
        )
    count = len(_read_coco(annotations)["images"])
    stat = annotations.stat()
    arguments = {"shards": _shards(0, count), "root": str(root), "annotations": str(annotations.resolve()), **options}
    return _build(_coco, MASKED_FEATURES, arguments | {"stamp": (stat.st_size, stat.st_mtime_ns)}, split, streaming)


def _read_coco(path: Path) -> dict:
    content = json.loads(path.read_text())
    missing = {"images", "annotations"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(sorted(missing))}; expected the format of COCO instances.")
    return content


def _coco(
    shards: list[tuple[int, int]], root: str, annotations: str, crop: int | None, size: int, stamp: tuple, version: int
) -> Iterator[dict]:
    content = _read_coco(Path(annotations))
    names = {category["id"]: category["name"] for category in content.get("categories", ())}
    parts: dict[int, list[dict]] = {}
    for record in content["annotations"]:
        if not record.get("iscrowd"):  # a crowd is a region, not an object
            parts.setdefault(record["image_id"], []).append(record)
    for first, last in shards:
        for picture in content["images"][first:last]:
            image = _open(Path(root, picture["file_name"]), f"image {picture['id']} of {annotations}")
            records = parts.get(picture["id"], [])
            mask = _paint([record["segmentation"] for record in records], image.size, picture["file_name"])
            example, kept = _example(image, mask, f"the mask of {picture['file_name']}", crop, size)
            for item, label in zip(example["objects"], kept, strict=True):
                item["label"] = names.get(records[label - 1].get("category_id"))
            yield example


def _paint(segmentations: list, size: tuple[int, int], name: str) -> Image.Image:
    """One mask of all objects, small ones over large ones: COCO's overlap, and what is small is usually in front."""
    shapes = [_rasterize(segmentation, size, name) for segmentation in segmentations]
    mask = np.zeros(size[::-1], dtype=np.int32)
    for label in sorted(range(len(shapes)), key=lambda i: -shapes[i].sum()):
        mask[shapes[label]] = label + 1
    return Image.fromarray(mask)


def _rasterize(segmentation: list | dict, size: tuple[int, int], name: str) -> np.ndarray:
    width, height = size
    if isinstance(segmentation, list):
        canvas = Image.new("1", size)
        for polygon in segmentation:
            ImageDraw.Draw(canvas).polygon(polygon, fill=1)
        return np.asarray(canvas)
    runs = segmentation["counts"]
    if isinstance(runs, str) or sum(runs) != width * height:
        raise ValueError(
            f"A segmentation of {name} is neither polygons nor uncompressed run lengths of {width * height} pixels; "
            "decode compressed ones first, for example with pycocotools."
        )
    # runs of zeros and ones by turns, down the columns
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


# ---------------------------------------------------------------------------------------------------------------------
# Datasets with an image and a mask column


def _load_columns(split: str, source: Path | str, columns: tuple[str, str], options: dict, streaming: bool):
    if isinstance(source, Path) and any(
        (source / f"{kind}.json").is_file() for kind in ("dataset_info", "dataset_dict")
    ):
        dataset = datasets.load_from_disk(source)
        dataset = dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    else:
        dataset = datasets.load_dataset(str(source), split=split, streaming=streaming)
    names = dataset.column_names or list(next(iter(dataset)))
    for option, column in zip(("image_column", "mask_column"), columns, strict=True):
        if column not in names:
            raise ValueError(f"{option}={column!r} is not in {str(source)!r}, whose columns are {', '.join(names)}.")
    arguments = {"columns": columns, "version": _VERSION, **options}
    return dataset.map(_from_columns, fn_kwargs=arguments, remove_columns=names, features=MASKED_FEATURES)


def _from_columns(row: dict, columns: tuple[str, str], crop: int | None, size: int, version: int) -> dict:
    image, mask = (row[column] for column in columns)
    for column, value in zip(columns, (image, mask), strict=True):
        if not isinstance(value, Image.Image):
            raise ValueError(f"Column {column!r} holds {type(value).__name__}; expected images (datasets.Image).")
    example, _ = _example(image, mask, f"the mask in column {columns[1]!r}", crop, size)
    for item in example["objects"]:
        item["label"] = None
    return example
