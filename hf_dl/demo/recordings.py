"""Recorded results: real outputs of our own runs, which a page shows while it has no model.

Each Space keeps them in `examples/` next to app.py: small PNG files, and examples.json with the captions, the numbers,
and the flags and commit of the run. Record them again with `scripts/run python spaces/NAME/app.py --record RUN`.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..reporting.experiment import portable, read_results
from .page import embed, show_bars

SMALL = 256  # longest side, in pixels, of a recorded picture
MAX_PICTURE = 100_000  # bytes


@dataclass
class Example:
    """One recorded result.

    Attributes:
        caption: One sentence about it.
        pictures: The pictures by label, in the order to show.
        bars: Heading, rows and highlighted name for `show_bars`, or None.
        lines: Further lines of plain text.
        wide: Show each picture in full width.
    """

    caption: str
    pictures: dict[str, Image.Image]
    bars: tuple[str, list[tuple[str, float]], str] | None = None
    lines: list[str] = field(default_factory=list)
    wide: bool = False


def save_recordings(
    space: Path,
    run: Path,
    examples: Sequence[Example],
    *,
    title: Image.Image,
    scores: dict[str, str],
) -> Path:
    """Write recorded results to space/examples, replacing the old ones.

    Args:
        space: Folder of app.py.
        run: Folder of the finished run.
        examples: The results.
        title: Picture for the top of the page.
        scores: Maps labels to the names of metrics in the run's results.json.

    Returns:
        The file examples.json.

    Raises:
        ValueError: If a picture is larger than `MAX_PICTURE` bytes, or the run lacks a metric.
    """
    results, folder = portable(read_results(run)), space / "examples"
    if missing := [name for name in scores.values() if name not in results["metrics"]]:
        raise ValueError(
            f"{run}/results.json has no metric {missing[0]!r}. Record a run of the page's default script."
        )
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    _save(title, folder / "title.png", longest=900)
    written = []
    for number, example in enumerate(examples, start=1):
        files = []
        for place, (label, picture) in enumerate(example.pictures.items(), start=1):
            name = f"{number}_{place}.png"
            _save(picture, folder / name, longest=1000 if example.wide else SMALL)
            files.append({"file": name, "label": label})
        bars = example.bars and [
            example.bars[0],
            [[name, round(x, 4)] for name, x in example.bars[1]],
            example.bars[2],
        ]
        written.append(
            {"caption": example.caption, "pictures": files, "bars": bars, "lines": example.lines, "wide": example.wide}
        )
    content = {
        "run": {key: results.get(key) for key in ("script", "commit", "args")},
        "scores": {label: results["metrics"][name] for label, name in scores.items()},
        "examples": written,
    }
    path = folder / "examples.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _save(picture: Image.Image, path: Path, *, longest: int) -> None:
    picture = picture.convert("RGB")
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    palette = picture.quantize(256)
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    if path.stat().st_size > MAX_PICTURE:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes. Expected at most {MAX_PICTURE:,}.")


def show_recordings(space: Path) -> str:
    """Return the recorded results of a Space as HTML, or an empty string if it has none."""
    folder = space / "examples"
    if not (folder / "examples.json").is_file():
        return ""
    content = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    run, commit = content["run"], (content["run"]["commit"] or "unknown")[:7]
    scores = " · ".join(f"{label} {value:.3f}" for label, value in content["scores"].items())
    head = (
        f"<h3>Recorded results</h3><p>These are outputs of a model that <code>{html.escape(run['script'])}</code> "
        f"trained (commit <code>{html.escape(commit)}</code>). {html.escape(scores)}.</p>"
    )
    return head + "".join(_show(folder, example) for example in content["examples"])


def _show(folder: Path, example: dict[str, Any]) -> str:
    wide = " class='wide'" if example["wide"] else ""
    figures = "".join(
        f"<figure{wide}><img src='{embed(folder / picture['file'])}' alt='{html.escape(picture['label'])}'>"
        f"<figcaption>{html.escape(picture['label'])}</figcaption></figure>"
        for picture in example["pictures"]
    )
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in example["lines"])
    bars = show_bars(*example["bars"]) if example["bars"] else ""
    return (
        f"<div class='recorded'><h4>{html.escape(example['caption'])}</h4>{lines}"
        f"<div class='pictures'>{figures}</div>{bars}</div>"
    )
