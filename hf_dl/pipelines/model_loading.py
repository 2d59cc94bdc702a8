"""Load the config of a model for a pipeline, with error messages of one sentence."""

import os
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

MODEL_FILES = ("config.json", "model_index.json")  # of transformers or a part of a pipeline, and of diffusers


def load_config(name_or_path: str | os.PathLike, model_types: Sequence[str]) -> PreTrainedConfig:
    """Load a config and check its model type. Code in the repository is not run.

    Args:
        name_or_path: A folder or a Hub id.
        model_types: The model types that the pipeline accepts. The error names the first one.

    Raises:
        ValueError: If the model is missing, damaged, or of another type.
    """
    name = str(name_or_path)
    check_not_runs(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if not Path(name).is_dir() and not isinstance(error, ValueError):
            raise ValueError(
                f"The model {name!r} was not found. Expected a folder with a config.json, or the Hub id of a "
                "model that you can access."
            ) from error
        raise ValueError(f"The model {name!r} cannot be used ({one_line(error)}).") from error
    if config.model_type not in model_types:
        raise ValueError(f"The model {name!r} is a {config.model_type!r}; expected a {model_types[0]!r}.")
    return config


def check_not_runs(name_or_path: str | os.PathLike) -> None:
    """Check that a folder is not a folder of runs, which has its models one or two folders deeper.

    Args:
        name_or_path: A folder with a model, or a Hub id.

    Raises:
        ValueError: If the folder has no model, but folders in it do. The message names at most three of them.
    """
    folder = Path(name_or_path)
    if not str(name_or_path) or not folder.is_dir() or any((folder / name).is_file() for name in MODEL_FILES):
        return
    for depth in ("*", "*/*"):
        found = sorted({path.parent for name in MODEL_FILES for path in folder.glob(f"{depth}/{name}")})
        if found:
            number = f"one of its {len(found)} models, such as" if len(found) > 3 else "a model in it:"
            raise ValueError(
                f"The folder {str(name_or_path)!r} contains runs and is not a model itself. Choose {number} "
                f"{', '.join(map(str, found[:3]))}."
            )


def one_line(error: Exception) -> str:
    """Return the message of an error as one line of at most 200 characters, without the final period."""
    return " ".join(str(error).split())[:200].rstrip(".")
