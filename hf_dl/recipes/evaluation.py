"""Shared code of the evaluation scripts: checked configs, quiet data loading, and evaluation.json.

An evaluation script parses its flags, loads a model, calls the recipe of its family, and writes the report:

    args = parse_flags(Args, argv)                      # from hf_dl.training.args
    model = load_model(SlotAutoencoderModel, args.model)
    folder = make_output_folder(args)
    metrics = evaluate(model, batches)
    write_evaluation(folder, args, metrics)
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import datasets
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from hf_dl.pipelines.model_loading import check_not_runs
from hf_dl.reporting.experiment import portable, read_results
from hf_dl.training.args import given_flags

ConfigT = TypeVar("ConfigT")


def checked_config(make: Callable[..., ConfigT], **fields: Any) -> ConfigT:
    """Create a config and report invalid fields in one sentence.

    Args:
        make: A config class, or a function that returns a config.
        **fields: The fields of the config.

    Returns:
        The config.

    Raises:
        ValueError: If a field is unknown or has an invalid value.

    Example:
        >>> from hf_dl.models.image_vae import ImageVaeConfig
        >>> checked_config(ImageVaeConfig, latent_size=8).latent_size
        8
    """
    try:
        return make(**fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def load_model(kind: type[Any], name: str | Path) -> Any:
    """Load a model or a pipeline, and report in one sentence why it cannot be loaded.

    Args:
        kind: A class with `from_pretrained`. If it has a config class, the model must have the same `model_type`.
        name: Folder or Hub id.

    Returns:
        The model.

    Raises:
        ValueError: If the model is missing, incomplete or of another family.
    """
    check_not_runs(name)
    expected = getattr(getattr(kind, "config_class", None), "model_type", None)
    try:
        if expected:
            found = kind.config_class.get_config_dict(name)[0].get("model_type")
            if not found:
                raise ValueError("It has no config.json with a model_type.")
            if found != expected:
                raise ValueError(f"Its model_type is {found}; expected {expected}.")
        return kind.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = "" if Path(name).is_dir() else " is not a folder, and"
        raise ValueError(f"model={str(name)!r}{place} cannot be loaded. {reason}") from error


def use_training_data(args: Any, folder: str | Path, kind: type, argv: list[str] | None) -> None:
    """Set flags that select data to the values of the training run, unless the user gave them or another source.

    Args:
        args: The flags, which are changed in place.
        folder: Folder of the model. Nothing changes if it has no results.json, as for a Hub id.
        kind: The dataclass of the flags that select the data of a training run.
        argv: The command line. Defaults to `sys.argv`.

    Raises:
        ValueError: If results.json is damaged.
    """
    given = given_flags(argv)
    if "source" in given or not Path(folder, "results.json").is_file():
        return
    known, changed = read_results(folder)["args"], []
    for name in [each.name for each in fields(kind) if hasattr(args, each.name) and each.name not in given]:
        if name in known and known[name] != getattr(args, name):
            setattr(args, name, known[name])
            changed.append(f"{name}={known[name]!r}")
    if changed:
        print(f"Using the data of the training run: {', '.join(changed)}.", file=sys.stderr)


def split_size(flags: Any, split: str, default: int | None = None) -> int | None:
    """Return the number of examples of a split to load. A short training split makes the other splits short as well.

    Args:
        flags: Flags with `num_train` and `num_test`. A `num_test` of None selects `default`, but at most half of
            `num_train`. 0 selects all examples.
        split: "train", or another split.
        default: Number of examples of the other splits. None: all examples.

    Returns:
        The number, or None for all examples.

    Raises:
        ValueError: If a number is negative.

    Example:
        >>> from types import SimpleNamespace
        >>> [split_size(SimpleNamespace(num_train=n, num_test=None), "test", 2000) for n in (0, 500, 5000)]
        [2000, 250, 2000]
    """
    for name in ("num_train", "num_test"):
        if (getattr(flags, name, None) or 0) < 0:
            raise ValueError(f"{name}={getattr(flags, name)} must be at least 0. 0 uses all examples.")
    if split == "train":
        return flags.num_train or None
    if flags.num_test is not None:
        return flags.num_test or None
    if not flags.num_train:
        return default
    most = max(2, flags.num_train // 2)
    return most if default is None else min(default, most)


def hide_progress_bars() -> None:
    """Disable the progress bars of `datasets` if stderr is not a terminal, so that log files stay readable."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def report_data(data: datasets.Dataset, split: str) -> None:
    """Print the classes, their numbers of images, and the skipped files. Generated data has no report.

    Args:
        data: A dataset of `hf_dl.data`. In a run of several processes, the first one prints.
        split: Name of the split.
    """
    if data.info.description and int(os.environ.get("RANK", 0)) == 0:
        print(f"{split}: {data.info.description}", file=sys.stderr)


def make_output_folder(args: Any) -> Path:
    """Create the folder for the results of an evaluation.

    Args:
        args: Flags with `output_dir` and `model`, both text. An empty `output_dir` selects the model's folder, and
            for a Hub id a folder in runs/: a folder with the name of the id would be loaded instead of the id.

    Returns:
        The folder.
    """
    model = Path(args.model)
    folder = Path(args.output_dir or (model if model.is_dir() else f"runs/{model.name}"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_evaluation(folder: Path, args: Any, metrics: Mapping[str, float], **more: Any) -> None:
    """Write evaluation.json, and print the metrics as a table.

    Args:
        folder: The folder of the results.
        args: The flags, a dataclass. Absolute paths are cut to their last part, see `portable`.
        metrics: The scores by name.
        **more: Additional entries of evaluation.json; must be serializable as JSON.
    """
    found = {"args": portable(asdict(args)), "metrics": dict(metrics), **more}
    (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for name, value in metrics.items():
        print(f"{name:45s} {value:.4f}")
