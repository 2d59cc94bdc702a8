"""Check a trained model before it is published: weights, loading, processor, results and card."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..reporting.card import format_metric, read_card, results_key, run_card, with_repository
from ..reporting.experiment import portable, read_results
from .files import Files, one_line

PROCESSORS = {
    "preprocessor_config.json": "AutoImageProcessor",
    "processor_config.json": "AutoProcessor",
    "tokenizer_config.json": "AutoTokenizer",
}


def check_model(folder: Path, repo_id: str, files: Files) -> Iterator[str]:
    """Yield a sentence for each problem of a model's folder.

    Args:
        folder: Folder of the run.
        repo_id: Repository that the published card names.
        files: Files to publish. This function puts results.json and README.md in as they will be published.

    Yields:
        The problems.
    """
    results = None
    try:
        results = read_results(folder)
        files["results.json"] = (json.dumps(portable(results), indent=2) + "\n").encode()
    except (OSError, ValueError) as error:
        yield str(error)
    kind, problems = check_loading(folder)
    yield from problems
    if results is not None:
        yield from check_card(folder, repo_id, files, results, kind)


def check_loading(folder: Path) -> tuple[type | None, list[str]]:
    """Load a model and its processor as users do.

    Returns:
        The class of the model, or None if it cannot be loaded, and a sentence for each problem.
    """
    if is_diffusers(folder):
        kind, problems = None, [each for part in list_weight_folders(folder) for each in check_weights(part)]
        if not problems:
            kind, problems = _try_to_load(folder, _load_diffusers)
        return kind, problems
    kind, problems = None, []
    if not (folder / "config.json").is_file():
        problems.append(
            f"{folder} has no config.json, so it holds no saved model. Name a run such as runs/train_slots."
        )
    else:
        problems += check_weights(folder)
        if not problems:
            kind, problems = _try_to_load(folder, _load_transformers)
    return kind, [*problems, *check_processor(folder)]


def check_weights(folder: Path) -> Iterator[str]:
    """Yield a sentence for each weight file that is missing, incomplete or not finite."""
    import torch
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        yield f"{folder} has no model.safetensors. Save the model there with save_pretrained."
    for path in paths:
        try:
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():
                    tensor = weights.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        yield f"{path.name}: {name} has values that are not finite. The training diverged."
        except (SafetensorError, OSError) as error:
            yield f"{path.name} is incomplete or damaged ({error}). Save the model again."


def check_processor(folder: Path) -> Iterator[str]:
    """Yield a sentence if the processor or tokenizer is missing or cannot be loaded."""
    import transformers

    present = [name for name in PROCESSORS if (folder / name).is_file()]
    if not present:
        yield f"{folder} has no processor or tokenizer next to the weights. Save it there with save_pretrained."
    for name in present:
        try:
            getattr(transformers, PROCESSORS[name]).from_pretrained(folder)
        except (OSError, ValueError, ImportError) as error:
            yield f"{name} cannot be loaded: {one_line(error)}"


def check_card(folder: Path, repo_id: str, files: Files, results: dict[str, Any], kind: type | None) -> Iterator[str]:
    """Yield a sentence for each number of the card that differs from results.json.

    A folder without README.md gets a new card in `files`.
    """
    path = folder / "README.md"
    try:
        if path.is_file():
            card = read_card(path)
        else:
            summary = (kind.__doc__ or "").strip().split("\n\n")[0] if kind else ""
            card = run_card(folder, name=repo_id.split("/")[1], summary=" ".join(summary.split()) or None)
    except ValueError as error:
        yield str(error)
        return
    # The usage example of a local card loads the model from its folder, which may have another name meanwhile.
    names = {folder.resolve().name, Path(results["args"].get("output_dir") or folder).name}
    files["README.md"] = with_repository(str(card), repo_id, names=names).encode()
    metrics = results["metrics"]
    advice = "Delete README.md, and the next call writes a new card."
    for result in card.data.eval_results or []:
        name = results_key(result)
        if metrics.get(name) != result.metric_value:
            yield (
                f"README.md says {name} = {result.metric_value}, but results.json says "
                f"{metrics.get(name, 'nothing')}. {advice}"
            )
    for name, shown in re.findall(r"^\| `(\w+)` \|.*\| ([^|]+?) \|$", card.text, re.MULTILINE):
        if name in metrics and shown != format_metric(metrics[name]):
            yield (
                f"The table of README.md says {name} = {shown}, but results.json says "
                f"{format_metric(metrics[name])}. {advice}"
            )
    for name, value in metrics.items():
        if not math.isfinite(value):
            yield f"results.json says {name} = {value}, which is not finite. The run failed."


# ------------------------------------------------------------------------------------------------ loading


def is_diffusers(folder: Path) -> bool:
    """Return whether a folder holds a pipeline or a model of diffusers."""
    if (folder / "model_index.json").is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "_diffusers_version" in config


def list_weight_folders(folder: Path) -> list[Path]:
    """List the folders in which a pipeline or a model of diffusers keeps weights."""
    if not (folder / "model_index.json").is_file():
        return [folder]
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError:
        return []  # loading the pipeline reports this
    parts = [name for name, kind in index.items() if isinstance(kind, list) and not name.startswith("_")]
    return [folder / name for name in parts if not (folder / name / "scheduler_config.json").is_file()]


def _try_to_load(folder: Path, load: Callable[[Path], tuple[type | None, list[str]]]) -> tuple[type | None, list[str]]:
    try:
        with _quiet():
            return load(folder)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        return None, [f"from_pretrained cannot load {folder}: {one_line(error)}"]


def _load_diffusers(folder: Path) -> tuple[type, list[str]]:
    import diffusers

    from ..pipelines.slot_diffusion import SlotDiffusionPipeline

    if (folder / "model_index.json").is_file():
        return type(SlotDiffusionPipeline.from_pretrained(folder)), []
    return type(diffusers.AutoModel.from_pretrained(str(folder), use_safetensors=True)), []


def _load_transformers(folder: Path) -> tuple[type | None, list[str]]:
    """Load a model through each Auto class that its config names."""
    import transformers

    from .. import models  # registers the Auto classes, so that no remote code runs

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["?"])[0]
    autos = [auto for auto in getattr(config, "auto_map", None) or {} if auto.startswith("AutoModel")]
    loaders = [getattr(transformers, auto) for auto in autos]
    if not loaders:
        loaders = [getattr(transformers, name, None) or getattr(models, name, None)]
    if loaders == [None]:
        return None, [f"config.json names the class {name!r}, which neither transformers nor hf_dl has."]
    kind, problems = None, []
    for loader in loaders:
        model, info = loader.from_pretrained(folder, output_loading_info=True)
        if type(model).__name__ != name:
            continue  # a base model, which rightly loads only a part of the weights
        kind = type(model)
        for key, state in (("missing_keys", "lack"), ("unexpected_keys", "have extra")):
            if info[key]:
                shown = ", ".join(sorted(info[key])[:3])
                problems.append(f"The weights {state} {len(info[key])} tensors of the model in config.json ({shown}).")
    if kind is None:
        problems.append(f"No Auto class of config.json loads {name!r}, the class that was saved.")
    return kind, problems


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars and warnings of transformers; the checks report problems themselves."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
