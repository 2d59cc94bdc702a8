"""Short videos of one moving object, with its motion as a label for each frame.

The object of a generated scene moves left, right, away from the camera, or not at all. It changes its motion every few
frames. The label of a frame is the motion from this frame to the next one, so a single frame does not show it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import datasets
import numpy as np

from .generation import counted, row_bar
from .raycast import render
from .scene_description import Scene
from .scenes import has_room, visible_scenes

SPLITS = {"train": 600, "validation": 100, "test": 100}  # default numbers of videos
MOTIONS = ("still", "left", "right", "away")
VELOCITIES = {"still": (0.0, 0.0), "left": (-0.5, 0.0), "right": (0.5, 0.0), "away": (0.0, 0.9)}  # (x, y) per frame

_VERSION = 1  # increase it when rows change: `datasets` caches by arguments, not by code
_SHARD = 100
_SEGMENT = (3, 5)  # frames between changes of the motion


def load(
    split: str = "train",
    source: str = "synthetic",
    *,
    size: int = 32,
    num_frames: int = 12,
    num_videos: int | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """Generate videos of a moving object.

    Args:
        split: "train", "validation" or "test". Each split has different videos.
        source: Only "synthetic".
        size: Width and height of the frames in pixels, 32 to 256.
        num_frames: Number of frames per video, at least 4.
        num_videos: Number of videos. Defaults to the count in `SPLITS`.
        seed: Seed of the whole dataset.

    Returns:
        A dataset with the columns `frames`, uint8 (frames, height, width, 3), and `labels`, one of `MOTIONS` for each
        frame.

    Raises:
        ValueError: If an argument is not one of the values above.

    Example:
        >>> from hf_dl.data import motion
        >>> len(motion.load("test", num_videos=2)[0]["labels"])
        12
    """
    if source != "synthetic":
        raise ValueError(f"source={source!r} is unknown. Use 'synthetic'.")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown. Choose one of: {', '.join(SPLITS)}.")
    count = SPLITS[split] if num_videos is None else num_videos
    for name, value, low, high in (("size", size, 32, 256), ("num_frames", num_frames, 4, 1000)):
        if not low <= value <= high:
            raise ValueError(f"{name}={value} must be from {low} to {high}.")
    if count < 1:
        raise ValueError(f"num_videos={count} must be at least 1.")
    features = datasets.Features(
        frames=datasets.Array4D((num_frames, size, size, 3), "uint8"),
        labels=datasets.Sequence(datasets.ClassLabel(names=list(MOTIONS))),
    )
    arguments = {
        "shards": [(start, min(start + _SHARD, count)) for start in range(0, count, _SHARD)],
        "split": split,
        "size": size,
        "num_frames": num_frames,
        "seed": seed,
        "version": _VERSION,
    }
    with row_bar(count, f"Rendering {split} videos"):
        return datasets.Dataset.from_generator(
            _draw, features=features, gen_kwargs=arguments, split=datasets.NamedSplit(split)
        )


def move(scene: Scene, num_frames: int, rng: random.Random) -> tuple[list[Scene], list[int]]:
    """Move the first object of a scene.

    Args:
        scene: The scene at the beginning.
        num_frames: Number of frames.
        rng: Source of random numbers.

    Returns:
        One scene per frame, and the index in `MOTIONS` of the motion after each frame. The last label is the motion
        before the last frame. The object always stays inside the image.
    """
    scenes, labels, rest = [scene], [], 0
    while len(scenes) < num_frames:
        item = scenes[-1].objects[0]
        fits = {}
        for name, (x, y) in VELOCITIES.items():
            place = (item.position[0] + x, item.position[1] + y, item.position[2])
            fits[name] = replace(item, position=place)
        free = [name for name in MOTIONS if has_room(scene, fits[name], ())]
        motion = MOTIONS[labels[-1]] if labels else None
        if rest == 0 or motion not in free:
            motion, rest = rng.choice([name for name in free if name != motion] or ["still"]), rng.randint(*_SEGMENT)
        labels.append(MOTIONS.index(motion))
        scenes.append(replace(scene, objects=(fits[motion], *scene.objects[1:])))
        rest -= 1
    return scenes, [*labels, labels[-1]]


@counted
def _draw(
    shards: list[tuple[int, int]], split: str, size: int, num_frames: int, seed: int, version: int
) -> Iterator[dict]:
    for first, last in shards:
        begin = visible_scenes(range(first, last), split, "plain", size, (1, 1), seed, object_scale=1.2)
        for index, (scene, _) in zip(range(first, last), begin, strict=True):
            rng = random.Random(f"hf_dl.motion {seed} {split} {index}")
            scenes, labels = move(scene, num_frames, rng)
            yield {"frames": np.asarray(render(scenes, size)[0]), "labels": labels}
