"""The card of a published dataset of scenes: metadata for the Hub, text, statistics and pictures."""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image

from ..data import edited_scenes
from ..reporting.card import LICENSE
from ..reporting.grids import color_segments, image_grid
from .files import Files

if TYPE_CHECKING:
    from .scenes import SceneRecipe

TEMPLATE = Path(__file__).with_name("scene_card.md")
_SHOWN = 128  # pixels of an image in the pictures; `image_grid` shows this size without resampling
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
_PAPERS = {
    "plain": "[CLEVR](https://arxiv.org/abs/1612.06890)",
    "textured": "[CLEVRTex](https://arxiv.org/abs/2111.10265)",
}
_PROPERTIES = {
    "objects": "scenes by number of objects",
    "shape": "objects by shape",
    "color": "objects by color",
    "material": "objects by material",
    "size": "objects by size",
    "area": "objects by visible share of the image",
}


def write_card(recipe: SceneRecipe, repo_id: str, manifest: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Write README.md.

    Args:
        recipe: The settings of the dataset.
        repo_id: The repository, as owner/name.
        manifest: An entry for each shard.

    Returns:
        The text with its metadata.
    """
    counts = recipe.split_sizes()
    total = sum(counts.values())
    low, high = recipe.num_objects
    metadata = DatasetCardData(
        pretty_name=f"{recipe.style.capitalize()} 3-D scenes with edits",
        license=LICENSE,
        language=["en"],
        annotations_creators=["machine-generated"],
        size_categories=[next(text for limit, text in _SIZES.items() if total < limit or limit == max(_SIZES))],
        task_categories=["image-segmentation", "image-to-image", "object-detection"],
        tags=["hf_dl", "synthetic", "clevr", "object-centric-learning", "instance-segmentation", "counterfactual"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in counts],
            }
        ],
    )
    _describe_features(manifest, list(counts)).to_dataset_card_data(metadata)
    flags = [f"--style {recipe.style}", f"--num_scenes {recipe.num_scenes}", f"--image_size {recipe.image_size}"]
    flags += [f"--num_objects {low} {high}", f"--seed {recipe.seed}"]
    card = DatasetCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=repo_id.split("/")[1],
        repo_id=repo_id,
        total=f"{total:,}",
        style=recipe.style,
        paper=_PAPERS[recipe.style],
        size=recipe.image_size,
        objects=f"{low}" if low == high else f"{low} to {high}",
        splits="\n".join(f"| {split} | {count:,} |" for split, count in counts.items()),
        statistics=_statistics_table(manifest),
        flags=" ".join(flags),
        license=LICENSE,
    )
    return (str(card).rstrip("\n") + "\n").encode()


def _describe_features(manifest: Mapping[str, Mapping[str, Any]], splits: list[str]) -> DatasetInfosDict:
    """Return the columns and sizes, which the Hub and `load_dataset` read from the metadata."""
    parts = {split: [entry for entry in manifest.values() if entry["split"] == split] for split in splits}
    infos = [
        datasets.SplitInfo(split, sum(e["memory_bytes"] for e in entries), sum(e["rows"] for e in entries))
        for split, entries in parts.items()
    ]
    info = datasets.DatasetInfo(
        features=edited_scenes.FEATURES,
        splits=datasets.SplitDict({each.name: each for each in infos}),
        download_size=sum(entry["bytes"] for entry in manifest.values()),
        dataset_size=sum(each.num_bytes for each in infos),
    )
    return DatasetInfosDict({"default": info})


def _statistics_table(manifest: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows of a table with the counts of all shards."""
    lines = []
    for name, title in _PROPERTIES.items():
        counts: Counter[str] = Counter()
        for entry in manifest.values():
            counts.update(entry["statistics"][name])
        # the limits of the areas are in order already
        values = sorted(counts, key=int) if name == "objects" else list(counts) if name == "area" else sorted(counts)
        lines.append(f"| {title} | {', '.join(f'{value}: {counts[value]:,}' for value in values)} |")
    return "\n".join(lines)


def draw_pictures(rows: Iterable[Mapping[str, Any]]) -> Files:
    """Draw the pictures of the card.

    Args:
        rows: Rows with encoded images. At most 16 are shown.

    Returns:
        scenes.png with lines of eight images, and edits.png with the images and masks of four rows.
    """
    rows = list(rows)[:16]
    images = [_show(row["image"]) for row in rows]
    names = ["", *(f"{edit}_" for edit in edited_scenes.EDITS)]
    edits = [
        [picture for name in names for picture in (_show(row[f"{name}image"]), _show(row[f"{name}mask"]))]
        for row in rows[:4]
    ]
    titles = [title for name in ("image", *edited_scenes.EDITS) for title in (name, "mask")]
    with tempfile.TemporaryDirectory() as folder:
        lines = [images[start : start + 8] for start in range(0, len(images), 8)]
        paths = [image_grid(lines, Path(folder) / "scenes.png")]
        paths.append(image_grid(edits, Path(folder) / "edits.png", titles=titles))
        return {path.name: path.read_bytes() for path in paths}


def _show(encoded: Mapping[str, Any]) -> np.ndarray:
    """Decode an image or a mask for a picture; masks get colors."""
    image = Image.open(io.BytesIO(encoded["bytes"]))
    mask = image.mode == "P"
    if max(image.size) > _SHOWN:
        image = image.resize((_SHOWN, _SHOWN), Image.Resampling.NEAREST if mask else Image.Resampling.LANCZOS)
    return color_segments(np.asarray(image)) if mask else np.asarray(image)
