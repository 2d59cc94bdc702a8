"""Checkpoints that are either complete or absent. They use safetensors and JSON only.

A checkpoint is a folder with one safetensors file per group of tensors, `state.json`, and `manifest.json` with the
size and SHA-256 of the other files. It is written to a temporary folder, which is renamed when all files are on the
disk. A process that is killed leaves either a complete checkpoint or a temporary folder. The next run removes it.
"""

import contextlib
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import nn
from transformers.utils import logging as transformers_logging

_TEMPORARY = ".writing-"
_FORMER = ".former-"


class DamagedCheckpointError(Exception):
    """A checkpoint whose files do not match its manifest."""


def write_file(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a temporary file and rename it, so that readers see either the old or the new content."""
    aside = path.with_name(f".{path.name}")
    try:
        write_file(aside, data)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    os.replace(aside, path)


def merge_folder(source: Path, target: Path) -> None:
    """Move the content of a folder into another one, replacing files and folders of the same name."""
    for path in source.iterdir():
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.replace(path, target / path.name)
    source.rmdir()


def clear_run(folder: Path) -> Path | None:
    """Prepare the folder of a run for a fresh start: remove its log and results, and rename its checkpoints.

    Args:
        folder: The folder of the run; created if it does not exist.

    Returns:
        The folder with the former checkpoints, `checkpoints_old`, or None without former checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints, former = folder / "checkpoints", None
    if any(checkpoints.glob("step_*")):
        former = folder / "checkpoints_old"
        shutil.rmtree(former, ignore_errors=True)
        os.rename(checkpoints, former)
    for name in ("log.jsonl", "results.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "best", ignore_errors=True)
    return former


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a temporary folder with `write(path)`, then rename it.

    Args:
        folder: The folder to create or replace.
        write: Called with the path of the empty temporary folder.

    Raises:
        OSError: If writing fails. The temporary folder is removed, and an existing folder stays unchanged.
    """
    aside, former = (folder.parent / f"{prefix}{folder.name}" for prefix in (_TEMPORARY, _FORMER))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        _sync_folder(aside)
        if folder.exists():
            shutil.rmtree(former, ignore_errors=True)
            os.rename(folder, former)
        os.rename(aside, folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(former, ignore_errors=True)


def tidy(root: Path) -> None:
    """Clean up after a killed `replace_folder`: remove incomplete folders and restore the former folder."""
    for aside in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(aside, ignore_errors=True)
    for former in root.glob(f"{_FORMER}*"):
        folder = root / former.name.removeprefix(_FORMER)
        shutil.rmtree(former) if folder.exists() else os.rename(former, folder)


def save_checkpoint(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        folder: The folder of the checkpoint.
        tensors: Tensors by group and name; each group becomes a file, such as `model.safetensors`.
        state: Everything else; must be serializable as JSON.

    Raises:
        OSError: If writing fails. No part of this checkpoint is left.
    """

    def write(aside: Path) -> None:
        manifest = {}
        contents = {f"{group}.safetensors": members for group, members in tensors.items()} | {"state.json": state}
        for name, content in contents.items():
            # `save_file` uses a memory map, which does not report a full disk as an OSError.
            data = json.dumps(content).encode() if name == "state.json" else save(_to_cpu(content))
            write_file(aside / name, data)
            manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_file(aside / "manifest.json", json.dumps(manifest, indent=2).encode())

    replace_folder(folder, write)


def save_model(folder: Path, model: nn.Module, weights: dict[str, torch.Tensor], processor: Any = None) -> None:
    """Write a model and its processor into a folder, replacing the folder if it exists.

    Args:
        folder: The folder.
        model: The model; its `save_pretrained` is used if it has one, otherwise only `model.safetensors` is written.
        weights: The weights to save.
        processor: Image processor, tokenizer or other processor with `save_pretrained`.

    Raises:
        OSError: If a file cannot be written.
    """

    def write(aside: Path) -> None:
        transformers_logging.disable_progress_bar()  # a bar for every save would break the bar of the run
        if not hasattr(model, "save_pretrained"):
            save_file({name: value.contiguous() for name, value in weights.items()}, aside / "model.safetensors")
        elif "state_dict" in inspect.signature(model.save_pretrained).parameters:
            model.save_pretrained(aside, state_dict=weights)
        else:
            model.save_pretrained(aside)
        if processor is not None:
            processor.save_pretrained(aside)

    replace_folder(folder, write)


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read a checkpoint; call `verify` first.

    Returns:
        The tensors by group and name, on the CPU, and the state.
    """
    tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    return tensors, json.loads((folder / "state.json").read_text())


def verify(folder: Path) -> None:
    """Compare a checkpoint's files with its manifest.

    Raises:
        DamagedCheckpointError: If a file is missing, cut short or changed; the message names the file.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpointError("manifest.json is missing or unreadable") from None
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{name} is missing")
        if path.stat().st_size != size:
            raise DamagedCheckpointError(f"{name} has {path.stat().st_size} of {size} bytes")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise DamagedCheckpointError(f"{name} has a wrong checksum")


def newest_good(root: Path) -> tuple[Path | None, list[str]]:
    """Find the newest complete checkpoint in a folder of `step_XXXXXXXX` folders.

    The folder `last-checkpoint`, downloaded from the Hub, is used if all others are missing.

    Returns:
        The checkpoint or None, and a message about each newer checkpoint that is damaged.
    """
    complaints = []
    for folder in [*sorted(root.glob("step_*"), reverse=True), *root.glob("last-checkpoint")]:
        try:
            verify(folder)
        except DamagedCheckpointError as error:
            complaints.append(f"Checkpoint {folder} is damaged ({error}) and was skipped.")
        else:
            return folder, complaints
    return None, complaints


def keep_newest(root: Path, number: int) -> None:
    """Remove all checkpoints except the newest `number`; 0 keeps all."""
    for folder in sorted(root.glob("step_*"))[:-number] if number else []:
        shutil.rmtree(folder, ignore_errors=True)


def pack_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimizer's state dict into tensors, `<parameter>.<key>` or `group_<i>.<key>`, and a rest for JSON."""
    tensors, numbers = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, torch.Tensor) else numbers)[f"{index}.{key}"] = value
    groups = []
    for index, group in enumerate(state["param_groups"]):  # LAMB of timm counts its steps in a tensor of the group
        tensors |= {f"group_{index}.{key}": value for key, value in group.items() if isinstance(value, torch.Tensor)}
        groups.append({key: value for key, value in group.items() if not isinstance(value, torch.Tensor)})
    return tensors, {"numbers": numbers, "param_groups": groups}


def unpack_optimizer(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Rebuild the state dict from the output of `pack_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    groups = [dict(group) for group in rest["param_groups"]]
    for name, value in {**tensors, **rest["numbers"]}.items():
        index, key = name.split(".", 1)
        if index.startswith("group_"):
            groups[int(index.removeprefix("group_"))][key] = value
        else:
            state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": groups}


def _to_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # Cloned, because safetensors rejects tied weights: two names that share memory.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not all systems can open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
