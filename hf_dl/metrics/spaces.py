"""Files of the metric Spaces: each `evaluate` metric of this package as a folder that works without hf_dl.

`evaluate.load` reads a metric from a folder, or from a Space on the Hub, whose Python file has the name of the folder.
It copies that file, and the files that it imports with `from .x import y`, to its cache. `metric_files` makes such a
folder: one file with the functions of `<name>.py` and the class of `<name>_metric.py`, the files of `hf_dl.programs`
that it needs, a card, a web page and the requirements. The class has its own file in the package, because the import
of `evaluate` takes half a second.

    hf-dl publish classification me/classification --type metric
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

GRADIO_VERSION = "6.31.0"  # the version that Spaces run, as in spaces/*/README.md
_PACKAGE = Path(__file__).parents[1]
_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}  # names that differ from the import


@dataclass(frozen=True)
class MetricSpace:
    """Metadata and example of a metric Space. Its card is `cards/<name>.md`.

    Attributes:
        title: Title of the page.
        emoji: Emoji of the page.
        summary: One line of at most 60 characters.
        example: Example inputs of the page by name. None for pages with image files as inputs.
        files: Label of the image files of each input, for pages with image files.
    """

    title: str
    emoji: str
    summary: str
    example: dict[str, list] | None = None
    files: dict[str, str] | None = None


METRICS = {  # the key is the name of the file with the functions in hf_dl/metrics
    "captions": MetricSpace(
        "Caption scores",
        "💬",
        "BLEU, ROUGE-L and CIDEr-D of captions without Java",
        {
            "predictions": ["a red cube stands on a floor", "two dogs play"],
            "references": [["a red cube on a gray floor", "a cube"], ["two dogs play in the snow"]],
        },
    ),
    "classification": MetricSpace(
        "Classification scores",
        "🎯",
        "Accuracy, F1, precision, recall and top-k accuracy",
        {"predictions": [0, 1, 1, 2], "references": [0, 0, 1, 2]},
    ),
    "detection": MetricSpace(
        "Detection scores",
        "📦",
        "Mean average precision of boxes by COCO and PASCAL VOC",
        {
            "predictions": [
                {"boxes": [[0, 0, 10, 10], [50, 50, 60, 60]], "scores": [0.9, 0.4], "labels": [0, 1]},
                {"boxes": [[2, 2, 8, 8]], "scores": [0.7], "labels": [1]},
            ],
            "references": [
                {"boxes": [[0, 0, 10, 9]], "labels": [0]},
                {"boxes": [[2, 2, 8, 8], [20, 20, 40, 40]], "labels": [1, 1]},
            ],
        },
    ),
    "editing": MetricSpace(
        "Image editing scores",
        "✂️",
        "Success and error of image edits with a known truth",
        files={
            "predictions": "edited images",
            "references": "true results",
            "images": "images before the edit",
            "masks_before": "masks of the object before",
            "masks_after": "masks of the object after",
        },
    ),
    "images": MetricSpace(
        "Image distance (FID)",
        "🖼️",
        "Fréchet distance between two sets of images",
        files={"predictions": "generated images", "references": "real images"},
    ),
    "modality_gap": MetricSpace(
        "Modality gap",
        "↔️",
        "Distance between the embeddings of images and texts",
        {
            "image_embeds": [[1.0, 0.0, 0.2], [0.0, 1.0, 0.1], [0.7, 0.7, 0.3], [0.6, 0.1, 0.8]],
            "text_embeds": [[0.9, 0.1, -0.5], [0.1, 0.8, -0.6], [0.5, 0.5, -0.4], [0.7, 0.2, -0.7]],
        },
    ),
    "phrase_segmentation": MetricSpace(
        "Phrase segmentation scores",
        "✏️",
        "IoU and average precision of masks for phrases",
        {
            "predictions": [[[0.9, 0.8], [0.6, 0.1]], [[0.7, 0.2], [0.1, 0.1]]],
            "references": [[[1, 1], [0, 0]], [[0, 0], [0, 0]]],
        },
    ),
    "programs": MetricSpace(
        "Program accuracy",
        "🧮",
        "Exact match and execution accuracy of MathQA programs",
        {
            "predictions": ["add(n0,n1)", "multiply(n0,n1)"],
            "references": ["add(n1,n0)", "divide(n0,n1)"],
            "numbers": [[2, 3], [8, 4]],
            "answers": [5, 2],
        },
    ),
    "segmentation": MetricSpace(
        "Segmentation scores",
        "🧩",
        "ARI, mean IoU and mean best overlap of segments",
        {"predictions": [[[0, 0, 1], [2, 2, 1]]], "references": [[[0, 0, 2], [1, 1, 2]]]},
    ),
}

_JSON_APP = '''"""The page of the metric: inputs are JSON lists with one entry per example."""

import json
import re
from pathlib import Path

import evaluate
import gradio as gr

FOLDER = Path(__file__).parent
EXAMPLE = json.loads({example!r})
metric = evaluate.load(str(FOLDER / "{name}.py"))


def compute(*values):
    """Compute the scores of inputs given as JSON."""
    inputs = {{}}
    for key, value in zip(EXAMPLE, values, strict=True):
        try:
            inputs[key] = json.loads(value)
        except json.JSONDecodeError as error:
            raise gr.Error(f"{{key}} is not valid JSON: {{error}}") from None
    try:
        return metric.compute(**inputs)
    except ValueError as error:
        raise gr.Error(str(error)) from None


page = gr.Interface(
    compute,
    [gr.Textbox(json.dumps(value), label=f"{{key}} (JSON)") for key, value in EXAMPLE.items()],
    gr.JSON(label="scores"),
    title="{title}",
    description=metric.info.description,
    article=re.sub(r"\\A---.*?\\n---\\n", "", (FOLDER / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL),
    flagging_mode="never",
)

if __name__ == "__main__":
    page.launch()
'''

_IMAGE_APP = '''"""The page of the metric: inputs are sets of image files, equally many of each."""

import json
import re
from pathlib import Path

import evaluate
import gradio as gr
from PIL import Image

FOLDER = Path(__file__).parent
FILES = json.loads({files!r})
metric = evaluate.load(str(FOLDER / "{name}.py"))


def compute(*sets):
    """Compute the scores of lists of image files."""
    try:
        images = [[Image.open(path).convert("RGB") for path in paths or []] for paths in sets]
        return metric.compute(**dict(zip(FILES, images, strict=True)))
    except (OSError, ValueError) as error:
        raise gr.Error(str(error)) from None


page = gr.Interface(
    compute,
    [
        gr.File(label=label, file_count="multiple", file_types=["image"], type="filepath")
        for label in FILES.values()
    ],
    gr.JSON(label="scores"),
    title="{title}",
    description=metric.info.description,
    article=re.sub(r"\\A---.*?\\n---\\n", "", (FOLDER / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL),
    flagging_mode="never",
)

if __name__ == "__main__":
    page.launch()
'''


def metric_files(metric: str, repo_id: str | None = None) -> dict[str, bytes]:
    """Return the files of the Space of a metric.

    Write them to a folder with the name of the repository, and `evaluate.load(folder)` works offline. Push them to a
    Space, and `evaluate.load(repo_id)` works everywhere.

    Args:
        metric: A key of `METRICS`.
        repo_id: Hub id of the Space, "user/name", or only a name. The metric's file gets this name, because
            `evaluate.load` expects it. Defaults to `metric`.

    Returns:
        Content by file name: `<name>.py`, the files that it imports, `app.py`, `README.md` and `requirements.txt`.

    Raises:
        ValueError: If the metric is unknown, or the name of the repository cannot be the name of a module.

    Example:
        >>> sorted(metric_files("classification", "me/scores"))
        ['README.md', 'app.py', 'requirements.txt', 'scores.py']
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is unknown. Choose one of: {', '.join(METRICS)}.")
    repo_id = metric if repo_id is None else repo_id
    name = repo_id.split("/")[-1]
    modules = _vendor(metric)
    if not re.fullmatch(r"[\w-]+", name) or name in {"app", "__init__", *modules} - {metric}:
        raise ValueError(
            f"repo_id={repo_id!r} cannot name a metric: evaluate imports {name}.py. Use letters, digits, - and _, and "
            f"none of the names {', '.join(sorted({'app', *modules} - {metric}))}."
        )
    space = METRICS[metric]
    app = (_JSON_APP if space.example else _IMAGE_APP).format(
        name=name, title=space.title, example=json.dumps(space.example), files=json.dumps(space.files)
    )
    files = {
        **{f"{name if module == metric else module}.py": source for module, source in modules.items()},
        "app.py": app,
        "README.md": _card(metric, repo_id),
        "requirements.txt": _requirements(modules.values()),
    }
    return {path: content.encode() for path, content in sorted(files.items())}


def _vendor(metric: str) -> dict[str, str]:
    """Return the source of the metric and of all files of `hf_dl.programs` that it needs, by module name.

    `evaluate` follows the imports of the metric's file only, so this file must import all of them.
    """
    source = (_PACKAGE / "metrics" / f"{metric}.py").read_text(encoding="utf-8")
    wrapper = _PACKAGE / "metrics" / f"{metric}_metric.py"
    if wrapper.exists():
        source = f"{source}\n\n{_join(wrapper.read_text(encoding='utf-8'), metric)}"
    source = re.sub(r"^from \.\.programs\.(\w+) import", r"from .\1 import", source, flags=re.MULTILINE)
    modules = {metric: source}
    for name in _siblings(source):
        modules[name] = (_PACKAGE / "programs" / f"{name}.py").read_text(encoding="utf-8")
        missing = _siblings(modules[name]) - _siblings(source)
        assert not missing, f"metrics/{metric}.py must also import from programs: {missing}"
    return modules


def _join(source: str, metric: str) -> str:
    """Return the source without its docstring and without its import of the file `<metric>.py`."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or (isinstance(node, ast.ImportFrom) and node.module == metric):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines).strip() + "\n"


def _siblings(source: str) -> set[str]:
    return {
        node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level == 1
    }


def _requirements(sources) -> str:
    """Return the packages that the sources import, with the bounds that hf_dl has for them."""
    imported = {
        (alias.name if isinstance(node, ast.Import) else node.module).split(".")[0]
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0)
        for alias in node.names
    }
    names = {_DISTRIBUTIONS.get(name, name) for name in imported}
    bounds = [line.split(";")[0].strip() for line in importlib.metadata.requires("hf_dl") or ()]
    return "".join(f"{line}\n" for line in sorted(bounds) if re.match(r"[\w-]+", line)[0] in names)


def _card(metric: str, repo_id: str) -> str:
    """Return the README of the Space: the metadata that the Hub reads, and the card of the metric."""
    space = METRICS[metric]
    metadata = {
        "title": space.title,
        "emoji": space.emoji,
        "colorFrom": "indigo",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "python_version": "3.11",
        "app_file": "app.py",
        "pinned": False,
        "license": "apache-2.0",
        "short_description": space.summary,
        "tags": ["evaluate", "metric"],
    }
    text = (Path(__file__).with_name("cards") / f"{metric}.md").read_text(encoding="utf-8")
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n# {space.title}\n\n{text.replace('REPO_ID', repo_id)}"
