"""Points of the modality gap for the Space: images and captions in two dimensions, before and after alignment.

Each setting of an experiment with train_clip.py, such as clip_gap.toml, becomes one cell: the scores of all seeds, and
the points of one model. Alignments are fitted on captioned scenes that the model was not trained on, and the points
are test scenes. `update_scores` takes the scores from the report of the experiment, so that the page and the card
agree.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_dl.metrics.alignment import METHODS
from hf_dl.reporting.experiment import read_results
from hf_dl.reporting.report import Report

from . import modality, zero_shot_classifier

ALIGNMENTS = ("none", "centering", "rotation", "centered_rotation")
SCORES = ("centroid_distance", "rmg", "separability", "accuracy")  # of each alignment
RUN_SCORES = ("centroid_distance", "rmg", "separability", "plain_accuracy", "plain_unseen_accuracy")  # of all seeds
MAX_BYTES = 300_000
FITTED_ON = "captioned scenes that CLIP was not trained on"


@dataclass
class _Flags(modality.AlignmentFlags, modality.LabeledFlags):
    """The flags that `hf_dl.recipes.modality` needs."""


def find_settings(root: str | Path) -> dict[tuple[str, str], list[Path]]:
    """Find the finished runs of each setting.

    Args:
        root: Folder of the runs, such as runs/clip_gap.

    Returns:
        The folders of the runs by level of detail and temperature, in the order of the seeds. The temperature is
        "learned", or a number as text.

    Raises:
        ValueError: If the folder has no finished run of train_clip.py.
    """
    found: dict[tuple[str, str], list[tuple[int, Path]]] = {}
    for path in sorted(Path(root).glob("*/results.json")):
        results = read_results(path.parent)
        args = results["args"]
        if results["script"] == "train_clip.py" and args.get("source") == "synthetic":
            found.setdefault(_setting(args), []).append((args["seed"], path.parent))
    if not found:
        raise ValueError(
            f"runs={str(root)!r} has no finished run of train_clip.py on scenes. Run the experiment clip_gap first."
        )
    return {setting: [folder for _, folder in sorted(runs)] for setting, runs in found.items()}


def _setting(args: Mapping[str, Any]) -> tuple[str, str]:
    """Return the level of detail and the temperature of a run as texts."""
    return args["detail"], "learned" if args["temperature"] is None else str(args["temperature"])


def summarize_runs(folders: Sequence[Path]) -> dict[str, list[float]]:
    """Compute mean and standard deviation of the test scores of runs that differ in their seed only.

    Args:
        folders: Folders of the runs.

    Returns:
        [mean, standard deviation] by name. The standard deviation of a single run is 0.
    """
    return _summarize([read_results(folder)["metrics"] for folder in folders])


def _summarize(metrics: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    scores = {}
    for name in RUN_SCORES:
        values = [each[f"test_{name}"] for each in metrics if f"test_{name}" in each]
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            scores[name] = [round(statistics.fmean(values), 4), round(deviation, 4)]
    return scores


def align_run(
    folder: Path, *, num_points: int = 150, num_pairs: int = 1000, num_test: int = 800
) -> dict[str, dict[str, Any]]:
    """Align the images and captions of one model, and project some of them on two axes.

    Args:
        folder: Folder of a run of train_clip.py on scenes.
        num_points: Number of test images with their caption to show.
        num_pairs: Number of pairs to fit on, and of test pairs for the scores of the gap.
        num_test: Number of labeled test images for the accuracy.

    Returns:
        For each alignment, `scores` and the coordinates x, y, x, y, ... of `images` and `texts`. Pairs have the same
        place in both lists. The axes are the principal components without alignment.
    """
    args = read_results(folder)["args"]
    flags = _Flags(detail=args["detail"], style=args["style"], image_size=args["image_size"])
    parts = (*zero_shot_classifier.load_clip(folder), flags)
    test, classes, _ = modality.embed_labeled(*parts, "test", num_test)
    fit = modality.embed_captioned(*parts, "train", num_pairs)
    new = modality.embed_captioned(*parts, "test", num_pairs)
    shown = new.pick(range(min(num_points, num_pairs)))
    scores, panels, views = {}, {}, {}
    for name in ALIGNMENTS:
        scores[name], alignment = modality.score_alignment(METHODS[name], fit, test, classes, new, labeled=False)
        panels[name] = alignment.apply(shown.images, shown.texts, ids=shown.ids)
    for name, points in modality.project(panels).items():
        images, texts = ([round(value, 3) for value in each.flatten().tolist()] for each in points)
        kept = {score: round(scores[name][score], 4) for score in SCORES}
        views[name] = {"scores": kept, "images": images, "texts": texts}
    return views


def update_scores(content: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Replace the scores of recorded cells by the scores of all seeds in the report of the experiment.

    Args:
        content: Recorded points, see `record_points`.
        report: The report of the experiment, model_cards/clip_gap.json.

    Returns:
        The content with new `seeds` and `scores`. The points stay.

    Raises:
        ValueError: If the report has no run of a cell with the same seed and commit. Its points are then of another
            model.
    """
    cells = []
    for cell in content["cells"]:
        setting = (cell["detail"], cell["temperature"])
        runs = [run for run in report.finished if _setting(run["args"]) == setting]
        commits = [run.get("commit") for run in runs if run["args"]["seed"] == cell["seed"]]
        if commits != [content["commit"]]:
            raise ValueError(
                f"The points of captions={setting[0]!r} with temperature={setting[1]!r} have seed {cell['seed']} and "
                f"commit {content['commit']}, but the runs with this seed in the report have the commits {commits}. "
                "Record the points again."
            )
        cells.append({**cell, "seeds": len(runs), "scores": _summarize([run["metrics"] for run in runs])})
    return {**content, "cells": cells}


def record_points(root: str | Path, *, num_pairs: int = 1000, **sizes: int) -> dict[str, Any]:
    """Collect scores and points of all settings of an experiment.

    Args:
        root: Folder of the runs, such as runs/clip_gap.
        num_pairs: Number of pairs to fit on.
        **sizes: See `align_run`.

    Returns:
        `script`, `commit`, `fitted_on` and `cells`. `fitted_on` describes the pairs of the alignments. A cell has
        `detail`, `temperature`, the number of `seeds`, the `seed` of the points, `scores` with mean and standard
        deviation, and `views`, see `align_run`.
    """
    cells, commits = [], set()
    for (detail, temperature), folders in find_settings(root).items():
        first = read_results(folders[0])
        commits.add(first.get("commit"))
        cells.append(
            {
                "detail": detail,
                "temperature": temperature,
                "seeds": len(folders),
                "seed": first["args"]["seed"],
                "scores": summarize_runs(folders),
                "views": align_run(folders[0], num_pairs=num_pairs, **sizes),
            }
        )
    commit = commits.pop() if len(commits) == 1 else None
    return {"script": "train_clip.py", "commit": commit, "fitted_on": f"{num_pairs} {FITTED_ON}", "cells": cells}


def write_points(content: Mapping[str, Any], path: str | Path) -> Path:
    """Write recorded points as JSON, with one line per cell.

    Args:
        content: The content, see `record_points`.
        path: The file to write.

    Raises:
        ValueError: If the file would have more than `MAX_BYTES` bytes.
    """
    cells = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in content["cells"])
    head = json.dumps({name: value for name, value in content.items() if name != "cells"})[:-1]
    text = f'{head}, "cells": [\n{cells}\n]}}\n'
    if len(text) > MAX_BYTES:
        raise ValueError(f"The points need {len(text):,} bytes. Expected at most {MAX_BYTES:,}. Record fewer points.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
