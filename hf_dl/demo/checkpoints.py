"""Find the model of a page, load it once, and keep the models that visitors asked for last.

A page looks for its model in this order:

1. the environment variable `HF_DL_MODEL`, a folder or a Hub id;
2. the folder `model/` next to app.py, where the publish command puts a checkpoint;
3. the newest finished run of a suitable type under `runs/` in the current folder.
"""

import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .training import Training


def find_model(kinds: Sequence[str], *, space: Path, root: Path) -> str | None:
    """Find the model to show.

    Args:
        kinds: Suitable values of `model_type`; they restrict only the search under `runs/`.
        space: Folder of app.py, which may contain `model/`.
        root: Folder that contains `runs/`.

    Returns:
        A folder or Hub id, or None if no model was found.
    """
    if name := os.environ.get("HF_DL_MODEL"):
        return name
    if (space / "model" / "config.json").is_file():
        return str(space / "model")
    return newest_run(root, kinds)


def find_pipeline(kind: str, *, variable: str, space: Path, root: Path) -> str | None:
    """Find the diffusers pipeline to show; see `find_model`.

    Args:
        kind: Class name of the pipeline.
        variable: Environment variable that comes first.
        space: Folder of app.py, which may contain `model/`.
        root: Folder that contains `runs/`.
    """
    if name := os.environ.get(variable):
        return name
    if (space / "model" / "model_index.json").is_file():
        return str(space / "model")
    return newest_pipeline(root, kind)


def newest_run(root: Path, kinds: Sequence[str]) -> str | None:
    """Return the newest finished run under root/runs whose `model_type` is one of `kinds`, or None."""

    def fits(folder: Path) -> bool:
        in_pipeline = (folder.parent / "model_index.json").is_file()  # a part of a pipeline may lack a decoder
        return not in_pipeline and _read(folder / "config.json").get("model_type") in kinds

    return _newest(root, "model.safetensors", fits)


def newest_pipeline(root: Path, kind: str) -> str | None:
    """Return the newest finished run under root/runs that is a diffusers pipeline of class `kind`, or None."""

    def fits(folder: Path) -> bool:
        found = _read(folder / "model_index.json").get("_class_name")
        return kind in (found[1:] if isinstance(found, list) else [found])  # [module, class] for remote code

    return _newest(root, "model_index.json", fits)


def _newest(root: Path, name: str, fits: Callable[[Path], bool]) -> str | None:
    """Return the suitable folder under root/runs with the newest file called `name`."""
    found = []
    for path in (root / "runs").rglob(name):
        inside = path.parent.relative_to(root / "runs").parts
        if any(part == "best" or part.startswith("checkpoints") for part in inside):
            continue  # the run is unfinished, or its own folder is found as well
        if fits(path.parent):
            found.append(path)
    return str(max(found, key=lambda path: path.stat().st_mtime).parent) if found else None


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file is missing or invalid."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def one_line(error: Exception) -> str:
    """Return the first sentence of an error's message, at most 200 characters and without a final period."""
    return " ".join(str(error).split()).partition(". ")[0][:200].rstrip(".")


def shown_name(name: str) -> str:
    """Return the name of a model on a page: a Hub id, or the name of a folder without its path on the server."""
    return Path(name).resolve().name if Path(name).is_absolute() or Path(name).is_dir() else name


def visible_error(error: Exception, name: str) -> str:
    """Return the message of an error about a model, without the path of its folder on the server."""
    return str(error).replace(name, shown_name(name))


def describe_model(name: str, *facts: str, kind: str = "Model") -> str:
    """Describe a model in one line of Markdown.

    Args:
        name: Its folder or Hub id.
        *facts: Short facts about it.
        kind: The first word of the line.
    """
    return " · ".join([f"{kind} `{shown_name(name).replace('`', '')}`", *facts])


class PageModels:
    """The models of a page: the default model, and the last two models that visitors asked for.

    Args:
        kinds: Values of `model_type` that the default model may have.
        training: Trains the default model if none is found.
        check: Raises an error if a model does not fit the page.
        load: Loads a model from a folder or Hub id, or raises a ValueError.
        needs: The kind of model that fits the page, for the error message; for example "an image classifier".
        space: Folder of app.py, which may contain `model/`.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        training: Training,
        check: Callable[[Any], Any],
        load: Callable[[str], Any],
        *,
        needs: str,
        space: Path,
    ):
        self.training, self.check, self.load, self.needs, self.problem = training, check, load, needs, ""
        self.default = find_model(kinds, space=space, root=training.root)
        self._lock, self._loaded = threading.Lock(), {}
        self._try_default()

    def _try_default(self) -> None:
        try:
            if self.default is not None:
                self.get()
        except ValueError as error:
            self.problem = visible_error(error, self.default)

    def get(self, name: str | None = None) -> Any:
        """Return a model, loading it if necessary.

        Args:
            name: A folder or Hub id. Defaults to the default model of the page.

        Raises:
            ValueError: If the model cannot be loaded or does not fit the page.
        """
        name = name or self.default
        if name is None:
            raise ValueError("This page has no model yet. Train one, or set HF_DL_MODEL and start the page again.")
        with self._lock:
            if name not in self._loaded:
                model = self.load(name)
                try:
                    self.check(model)
                except Exception as error:  # any model of the Hub may be named here
                    text = f"The model {name!r} does not fit this page, which needs {self.needs}."
                    raise ValueError(text) from error
                for old in [key for key in self._loaded if key != self.default][:-1]:
                    del self._loaded[old]
                self._loaded[name] = model
            return self._loaded[name]

    @property
    def can_train(self) -> bool:
        """Whether the page may offer training."""
        return self.training.available and not self.problem

    @property
    def ready(self) -> bool:
        """Whether the page has a default model. Loads the model of a training that has just finished."""
        process = self.training.process
        if self.default is None and process is not None and process.poll() == 0:
            self.default = str(self.training.folder)
            self._try_default()
        return self.default is not None and not self.problem
