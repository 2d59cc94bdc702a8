"""Render a dataset of scenes with edits, and push it to the Hub shard by shard.

A shard is a Parquet file with a fixed range of rows. It is rendered, pushed in one commit, and forgotten. So the
memory use does not depend on the number of scenes. The file manifest.json of the repository lists each shard with its
recipe, its hash and its statistics. A shard is skipped if its recipe is the same and the Hub has a file with that
hash. An interrupted push therefore continues where it stopped, and a longer dataset keeps the shards of a shorter one.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError

from ..data import edited_scenes, scenes
from .files import check_files, human_size
from .hub import open_repository
from .scene_card import draw_pictures, write_card

MANIFEST = "manifest.json"
_SHARD_PIXELS = 2000 * 64**2  # pixels of the images of a shard: about 70 MB with all edits
_SAMPLE = 8  # rows that a dry run renders to estimate sizes

Manifest = dict[str, dict[str, Any]]  # from the path of a shard to its entry


@dataclass(frozen=True)
class SceneRecipe:
    """The settings of a dataset of scenes.

    Attributes:
        style: Look of the scenes, a value of `hf_dl.data.scenes.STYLES`.
        num_scenes: Number of training scenes. It must be even, because the rows 2k and 2k + 1 exchange objects.
        image_size: Width and height of the images in pixels.
        num_objects: Smallest and largest number of objects per scene.
        seed: Seed of the dataset.

    Raises:
        ValueError: If a setting is out of range.
    """

    style: str = "plain"
    num_scenes: int = 8000
    image_size: int = 64
    num_objects: tuple[int, int] = (2, 4)
    seed: int = 0

    def __post_init__(self):
        scenes.check_arguments(
            "train", style=self.style, size=self.image_size, num_objects=self.num_objects, num_scenes=self.num_scenes
        )
        if self.num_scenes % 2:
            raise ValueError(
                f"num_scenes={self.num_scenes} must be even, because each two neighboring rows exchange an object."
            )

    def split_sizes(self) -> dict[str, int]:
        """Return the number of rows of each split. Validation and test have a tenth of the training rows each."""
        held_out = max(2, self.num_scenes // 20 * 2)
        return {"train": self.num_scenes, "validation": held_out, "test": held_out}

    def shards(self) -> list[Shard]:
        """List the shards of all splits."""
        step = _SHARD_PIXELS // self.image_size**2 // 2 * 2
        return [
            Shard(split, range(start, min(start + step, count)), f"data/{split}-{start // step:05d}.parquet")
            for split, count in self.split_sizes().items()
            for start in range(0, count, step)
        ]

    def generate(self, split: str, rows: range) -> Iterator[dict[str, Any]]:
        """Render a range of rows with the columns of `hf_dl.data.edited_scenes.FEATURES`."""
        low, high = self.num_objects
        options = {"style": self.style, "size": self.image_size, "num_objects": (low, high), "seed": self.seed}
        return edited_scenes.generate(rows, split, **options)

    def describe(self, shard: Shard) -> str:
        """Return all that determines the rows of a shard, as text."""
        low, high = self.num_objects
        return (
            f"{self.style}, {self.image_size} pixels, {low} to {high} objects, seed {self.seed}, {shard.split} rows "
            f"{shard.rows.start} to {shard.rows.stop - 1}, version {scenes.VERSION}.{edited_scenes.VERSION}"
        )


@dataclass(frozen=True)
class Shard:
    """One Parquet file of the dataset.

    Attributes:
        split: Name of the split.
        rows: Rows of the split that the file contains.
        path: Path in the repository.
    """

    split: str
    rows: range
    path: str


def make_shard(recipe: SceneRecipe, shard: Shard) -> tuple[bytes, dict[str, Any]]:
    """Render a shard. The same recipe gives the same bytes with the same versions of the libraries.

    Args:
        recipe: The settings of the dataset.
        shard: One of its shards.

    Returns:
        The Parquet file, and its entry in the manifest.
    """
    rows = list(recipe.generate(shard.split, shard.rows))
    table = datasets.Dataset.from_list(rows, features=edited_scenes.FEATURES)
    buffer = io.BytesIO()
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        table.to_parquet(buffer)
    finally:
        if shown:
            datasets.utils.enable_progress_bars()
    content = buffer.getvalue()
    return content, {
        "recipe": recipe.describe(shard),
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "memory_bytes": table.data.nbytes,
        "split": shard.split,
        "rows": len(rows),
        "statistics": count_objects(rows, recipe.image_size),
    }


AREAS = (0.005, 0.01, 0.02, 0.04, 0.08)  # limits of the histogram of visible areas, as fractions of the image


def count_objects(rows: list[dict[str, Any]], size: int) -> dict[str, dict[str, int]]:
    """Count scenes by their number of objects, and objects by their attributes and their visible area.

    Args:
        rows: Rows with the column `objects`.
        size: Width and height of the images in pixels.

    Returns:
        From the name of a property to the number of objects (or scenes) with each value.
    """
    records = [record for row in rows for record in row["objects"]]
    counts = {name: Counter(r[name] for r in records) for name in ("shape", "color", "material", "size")}
    limits = [f"{100 * limit:g} %" for limit in AREAS]
    names = [f"below {limits[0]}", *map(" to ".join, itertools.pairwise(limits)), f"{limits[-1]} or more"]
    areas = Counter(names[bisect.bisect(AREAS, record["visible_pixels"] / size**2)] for record in records)
    ordered = {name: {value: counts[name][value] for value in sorted(counts[name])} for name in counts}
    numbers = Counter(len(row["objects"]) for row in rows)
    return {
        "objects": {str(number): numbers[number] for number in sorted(numbers)},
        **ordered,
        "area": {name: areas[name] for name in names},
    }


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


def push_scenes(
    recipe: SceneRecipe,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
) -> str:
    """Render the missing shards, push each of them, and then push the card.

    Args:
        recipe: The settings of the dataset.
        repo_id: The repository, as owner/name.
        private: Create the repository as a private one.
        revision: Branch, which is created if it does not exist. Defaults to the main branch.
        tag: Tag of the last commit.
        message: Message of the last commit. Defaults to "Publish <name>".

    Returns:
        The address of the last commit.

    Raises:
        ValueError: If the token is missing or invalid, if it may not write, or if the tag exists.
    """
    api = open_repository(repo_id, repo_type="dataset", private=private, revision=revision, tag=tag)
    target = {"repo_id": repo_id, "repo_type": "dataset", "revision": revision}
    present = {file.path: file for file in api.list_repo_tree(**target, recursive=True)}
    manifest = read_manifest(api, target) if MANIFEST in present else {}
    shards = recipe.shards()
    for number, shard in enumerate(shards, start=1):
        entry, file = manifest.get(shard.path), present.get(shard.path)
        head = f"[{number}/{len(shards)}] {shard.path}"
        if entry and entry["recipe"] == recipe.describe(shard) and file and file.lfs:
            if file.lfs.sha256 == entry["sha256"]:
                print(f"{head} is on the Hub.", flush=True)
                continue
        start = time.perf_counter()
        content, manifest[shard.path] = make_shard(recipe, shard)
        seconds = time.perf_counter() - start
        operations = [
            CommitOperationAdd(shard.path, content),
            CommitOperationAdd(MANIFEST, encode_manifest(manifest)),
        ]
        api.create_commit(**target, operations=operations, commit_message=f"Add {shard.path}")
        print(f"{head} {human_size(len(content))}, rendered in {seconds:.0f} s", flush=True)
    manifest = {shard.path: manifest[shard.path] for shard in shards}
    files = {
        "README.md": write_card(recipe, repo_id, manifest),
        **draw_pictures(recipe.generate("train", range(min(16, recipe.num_scenes)))),
        MANIFEST: encode_manifest(manifest),
    }
    problems = list(check_files(files))
    assert not problems, problems
    old = [path for path in present if path.startswith("data/") and Path(path).suffix and path not in manifest]
    commit = api.create_commit(
        **target,
        operations=[
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(path) for path in old),
        ],
        commit_message=message or f"Publish {repo_id.split('/')[1]}",
    )
    if tag:
        api.create_tag(repo_id=repo_id, repo_type="dataset", tag=tag, revision=commit.oid)
    return commit.commit_url


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the content of manifest.json."""
    return (json.dumps({"shards": manifest}, indent=1) + "\n").encode()


def read_manifest(api: HfApi, target: dict[str, Any]) -> Manifest:
    """Read the manifest of a repository. A damaged file counts as empty, and its shards are rendered again."""
    keys = {"recipe", "sha256", "bytes", "memory_bytes", "split", "rows", "statistics"}
    try:
        path = api.hf_hub_download(**target, filename=MANIFEST)
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["shards"]
        return {path: entry for path, entry in entries.items() if keys <= entry.keys()}
    except (EntryNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def estimate(recipe: SceneRecipe) -> Iterator[str]:
    """Yield lines about the files that would be pushed, with sizes and a time that are estimated from a few rows."""
    rows = range(min(_SAMPLE, recipe.num_scenes))
    start = time.perf_counter()
    content, _ = make_shard(recipe, Shard("train", rows, ""))
    seconds = (time.perf_counter() - start) / len(rows)
    shards, counts = recipe.shards(), recipe.split_sizes()
    per_row = len(content) / len(rows)
    for split, count in counts.items():
        paths = [shard.path for shard in shards if shard.split == split]
        names = paths[0] if len(paths) == 1 else f"{paths[0]} to {Path(paths[-1]).name}"
        yield f"  {'~' + human_size(int(per_row * count)):>9}  {names} ({count} scenes)"
    yield f"  {'':>9}  README.md, edits.png, scenes.png, {MANIFEST}"
    total = sum(counts.values())
    yield (
        f"  {'~' + human_size(int(per_row * total)):>9}  in {len(shards)} shards with {total} scenes; rendering takes "
        f"about {max(1, round(total * seconds / 60))} minutes on this machine"
    )
