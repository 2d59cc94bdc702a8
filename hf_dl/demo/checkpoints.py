"""Find the model of a page, load it once, and keep the models that visitors asked for last.

A page looks for its model in this order:

1. the environment variable `HF_DL_MODEL`, a folder or a Hub id;
2. the folder `model/` next to app.py, where the publish command puts a checkpoint;
3. the newest finished run of a suitable type under `runs/` in the current folder.
"""

import json
import os
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel

from ..pipelines.model_loading import check_not_runs
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


def newest_run(root: Path, kinds: Sequence[str], fields: Mapping[str, Any] | None = None) -> str | None:
    """Return the newest finished run of some kinds of models, or None.

    Args:
        root: Folder that contains runs/.
        kinds: Suitable values of `model_type`.
        fields: Values that other fields of config.json must have. Defaults to none.
    """

    def fits(folder: Path) -> bool:
        in_pipeline = (folder.parent / "model_index.json").is_file()  # a part of a pipeline may lack a decoder
        config = _read(folder / "config.json")
        wanted = all(config.get(key) == value for key, value in (fields or {}).items())
        return not in_pipeline and config.get("model_type") in kinds and wanted

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


def load_vision_model(name: str, auto: Any, known: Container[type], *, kind: str) -> tuple[PreTrainedModel, Any]:
    """Load a model for evaluation, on the GPU if one is available, and its image processor.

    Weights must be safetensors, so nothing is unpickled. Code inside a model repository is never run.

    Args:
        name: A folder or a Hub id.
        auto: The Auto class that loads it.
        known: The types of configs that the Auto class can load.
        kind: Kind of model for the messages, such as "image classifier".

    Raises:
        ValueError: If the model is missing, damaged, or of another kind.
    """
    check_not_runs(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if not Path(name).is_dir() and not isinstance(error, ValueError):
            raise ValueError(
                f"The model {name!r} was not found. Expected a folder with a config.json, or the id of a model on a "
                "Hub that can be reached."
            ) from error
        raise ValueError(f"The model {name!r} cannot be used ({one_line(error)}).") from error
    if type(config) not in known:
        raise ValueError(
            f"The model {name!r} has model_type={config.model_type!r}, which is not an {kind}. Choose an {kind}."
        )
    try:
        model, info = auto.from_pretrained(
            name,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each library reports damaged files with its own type of error
        raise ValueError(f"The model {name!r} cannot be loaded ({one_line(error)}).") from error
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ValueError(
            f"The model {name!r} is not a trained {kind} for this version of transformers and hf_dl: {len(wrong)} of "
            "its tensors are missing or have the wrong shape."
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


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
