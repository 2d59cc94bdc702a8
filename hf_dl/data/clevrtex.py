"""CLEVRTex (Karazija et al. 2021, https://arxiv.org/abs/2111.10265): images of scenes with instance masks.

`load` reads the folder that the published archives unpack to::

    clevrtex_full/0/CLEVRTEX_full_000000.png         320x240, RGBA: the alpha channel is ignored
                    CLEVRTEX_full_000000_flat.png    palette image whose pixel VALUES are the object indices
                    CLEVRTEX_full_000000.json        the objects
    clevrtex_full/1/CLEVRTEX_full_001000.png         folder = index // 1000

The variants camo, pbg, vbg, grassbg and outd have the same layout. Splits depend on the index, as in the authors'
loader: the first 10 % are test, the next 10 % validation, the rest train. The variant outd has a test split only.
Masks must not be converted with `.convert("L")` or "RGB", which replaces the object indices by colors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import datasets

from .generation import counted
from .instance_masks import build_dataset, check_arguments, make_example, make_features, open_image

VARIANTS = ("full", "outd", "camo", "pbg", "vbg", "grassbg")

_FOLDER = 1000  # scenes per folder of CLEVRTex
_KNOWN = ("shape", "material", "color", "size", "rotation", "position")

FEATURES = make_features(
    shape=datasets.Value("string"),
    material=datasets.Value("string"),
    color=datasets.Value("string"),
    size=datasets.Value("string"),
    rotation=datasets.Value("float64"),
    position=datasets.List(datasets.Value("float64")),
)


def load(
    split: str = "train",
    source: str | os.PathLike = "clevrtex_full",
    *,
    size: int = 128,
    crop: int | None = 192,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load scenes of CLEVRTex, cropped to a centered square and resized.

    Args:
        split: "train", "validation" or "test".
        source: Folder of one variant.
        size: Width and height of the results in pixels.
        crop: Side of the centered square in pixels of the original image. None crops to the shorter side.
        streaming: Read while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns of `FEATURES`, as `hf_dl.data.masked_images.load` describes them.

    Raises:
        FileNotFoundError: If `source` is not a folder of CLEVRTex, or a file is missing.
        ValueError: If an argument is out of range, or the split would be empty.
    """
    check_arguments(split, size, crop)
    root = Path(source).expanduser().resolve()
    variant = find_variant(root)
    if variant is None:
        raise FileNotFoundError(f"source={str(source)!r} is not CLEVRTex. Expected 0/CLEVRTEX_full_000000.png.")
    return build_dataset(
        _generate,
        range(*_split_range(_count(root, variant), split, variant)),
        features=FEATURES,
        split=split,
        streaming=streaming,
        root=str(root),
        variant=variant,
        crop=crop,
        size=size,
    )


def find_variant(root: Path) -> str | None:
    """Return the variant of CLEVRTex in a folder, detected by its first scene, or None for other folders."""
    return next((v for v in VARIANTS if (root / "0" / f"CLEVRTEX_{v}_000000.png").is_file()), None)


def _count(root: Path, variant: str) -> int:
    """Count the scenes from the folder names and the files of the last folder."""
    folders = [int(entry.name) for entry in os.scandir(root) if entry.is_dir() and entry.name.isdecimal()]
    missing = sorted(set(range(max(folders))) - set(folders))
    if missing:
        raise FileNotFoundError(
            f"{root} has the folders 0 to {max(folders)} but not {missing[0]}. Unpack all parts of CLEVRTex there."
        )
    scene = re.compile(rf"CLEVRTEX_{variant}_\d{{6}}\.png")
    return _FOLDER * max(folders) + sum(
        scene.fullmatch(entry.name) is not None for entry in os.scandir(root / str(max(folders)))
    )


def _split_range(count: int, split: str, variant: str) -> tuple[int, int]:
    if variant == "outd":
        if split != "test":
            raise ValueError(f"split={split!r} is not in CLEVRTex outd, a test set; use split='test'.")
        return 0, count
    return {"test": (0, count // 10), "validation": (count // 10, count // 5), "train": (count // 5, count)}[split]


@counted
def _generate(
    shards: list[tuple[int, int]], root: str, variant: str, crop: int | None, size: int, version: int
) -> Iterator[dict]:
    for first, last in shards:
        for index in range(first, last):
            stem = Path(root, str(index // _FOLDER), f"CLEVRTEX_{variant}_{index:06d}")
            image = open_image(stem.with_suffix(".png"), f"scene {index} of CLEVRTex").convert("RGB")  # without alpha
            mask_path = stem.with_name(f"{stem.name}_flat.png")
            mask = open_image(mask_path, f"the mask of scene {index} of CLEVRTex")
            example, kept = make_example(image, mask, str(mask_path), crop, size)
            known = _read_objects(stem.with_suffix(".json"), variant)
            for record, label in zip(example["objects"], kept, strict=True):
                record |= known.get(label, dict.fromkeys(_KNOWN))
            yield example


def _read_objects(path: Path, variant: str) -> dict[int, dict]:
    """Return the attributes of each object by its index in the mask; an empty dict if the file is missing."""
    if not path.is_file():
        return {}
    return {
        record.get("index", number): {
            "shape": record.get("shape"),
            "material": record.get("material"),
            "color": record.get("color") if variant == "vbg" else None,  # other variants do not use the color
            "size": record.get("size"),
            "rotation": record.get("rotation"),
            "position": record.get("3d_coords"),
        }
        for number, record in enumerate(json.loads(path.read_text())["objects"], start=1)
    }
